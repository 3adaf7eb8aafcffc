# Each target sets up all it needs: Python 3.11 or newer, git and make are enough.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
# XLA's compilers for GPUs and TPUs, apart: a gigabyte or two that nothing else needs.
COMPILERS := .venv-accelerators
WORKERS ?= 2

.PHONY: demo ablation test lint types docs figures bench accelerators test-accelerators clean

demo: $(READY)
	$(BIN)/python -m examples.retinanet_digits $(ARGS)

ablation: $(READY)
	$(BIN)/python -m examples.retinanet_digits.ablation $(ARGS)

test: $(READY)
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadfile $(TESTS)

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(READY)
	$(BIN)/pyright --pythonpath $(BIN)/python

# The site, in out/site: built strictly, then looked through by its tests.
docs: $(READY)
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --quiet
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m pytest -q tests/test_site.py -m slow

figures: $(READY)
	$(BIN)/python docs/figures.py

bench: $(READY)
	$(BIN)/python -m benchmarks $(ARGS)

accelerators: $(COMPILERS)/.compilers
	$(COMPILERS)/bin/python -m benchmarks.accelerators $(ARGS)

test-accelerators: $(COMPILERS)/.compilers
	$(COMPILERS)/bin/python -m pytest -m accelerators tests/test_accelerators.py

$(READY): pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=...")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	touch $@

# Beside the JAX that the tests have. A compiler that this platform has no wheel of is left out,
# and the benchmark says so.
$(COMPILERS)/.compilers: $(READY)
	$(MAKE) --no-print-directory VENV=$(COMPILERS) $(COMPILERS)/.ready
	version=$$($(BIN)/python -c 'import jax; print(jax.__version__)'); \
	for wheels in "jax[tpu]==$$version" \
	  "jax-cuda13-plugin==$$version jax-cuda13-pjrt==$$version nvidia-nvvm nvidia-cuda-nvcc"; do \
	  $(COMPILERS)/bin/python -m pip install --quiet "jax==$$version" $$wheels \
	    || echo "not to be had here: $$wheels"; \
	done
	touch $@

clean:
	rm -rf $(VENV) .venv-* out .pytest_cache .ruff_cache .hypothesis

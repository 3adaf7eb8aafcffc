# Every target creates the virtual environment that it needs, with Python 3.11 or newer.
# ARGS adds arguments to a command, TESTS selects tests.
# Packages are compiled on their first import: pip would compile the modules that nothing imports.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
# XLA's GPU and TPU compilers are gigabytes of packages, so they have their own environment.
COMPILERS := .venv-accelerators
PROJECTS := .venv-projects
WORKERS ?= 2

.PHONY: demo ablation test test-all test-projects lint types docs \
  figures bench accelerators test-accelerators clean

# Less than five minutes on two cores, with the installation. ARGS are for the detector.
demo: $(READY)
	$(BIN)/python -m examples.training_race
	$(BIN)/python -m examples.retinanet_digits $(ARGS)

ablation: $(READY)
	$(BIN)/python -m examples.retinanet_digits.ablation $(ARGS)

# Without the tests that are marked `slow`; `test-all` runs them too.
test: MARKED = -m "not slow"
test test-all: $(READY)
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadfile $(MARKED) $(ARGS) $(TESTS)

# Trains with packages of other projects, in an environment of their own with Python 3.12 or newer.
test-projects: $(PROJECTS)/.projects
	$(PROJECTS)/bin/python -m pytest -n $(WORKERS) --dist loadfile -rs --durations=5 tests/projects

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(READY)
	$(BIN)/pyright --pythonpath $(BIN)/python

# Builds the site in out/site. Warnings are errors. Then tests the built pages.
docs: $(READY)
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --quiet
	BUILT_SITE=out/site $(BIN)/python -m pytest -q tests/test_site.py -m slow

figures: $(READY)
	$(BIN)/python docs/figures.py

bench: $(READY)
	$(BIN)/python -m benchmarks $(ARGS)

accelerators: $(COMPILERS)/.compilers
	$(COMPILERS)/bin/python -m benchmarks.accelerators $(ARGS)

test-accelerators: $(COMPILERS)/.compilers
	$(COMPILERS)/bin/python -m pytest -m accelerators tests/programs/test_accelerators.py

# A package without a wheel for this platform is reported, and its tests are skipped. The packages
# of the second list pin or require more than the tests use, so they come without dependencies.
$(PROJECTS)/.projects: pyproject.toml $(wildcard tests/projects/*.txt)
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 12) and "Python 3.12 or newer is required: make test-projects PYTHON=...")'
	$(PYTHON) -m venv $(PROJECTS)
	$(PROJECTS)/bin/python -m pip install --quiet --upgrade pip
	$(PROJECTS)/bin/python -m pip install --quiet --no-compile --editable '.[benchmarks,compat]' pytest pytest-xdist hypothesis
	install() { $(PROJECTS)/bin/python -m pip install --quiet --no-compile "$$@" || echo "not installed: $$*"; }; \
	  grep -v '^#' tests/projects/requirements.txt | while read -r package; do install "$$package"; done; \
	  while read -r package; do install --no-deps "$$package"; done < tests/projects/without-dependencies.txt
	touch $@

$(READY): pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is required: make PYTHON=...")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --no-compile --editable '.[dev]'
	touch $@

# Installs the compilers for the version of JAX that the tests use. A compiler without a wheel for
# this platform is skipped; the benchmark and the tests report it.
$(COMPILERS)/.compilers: $(READY)
	$(MAKE) --no-print-directory VENV=$(COMPILERS) $(COMPILERS)/.ready
	version=$$($(BIN)/python -c 'import jax; print(jax.__version__)'); \
	for wheels in "jax[tpu]==$$version" \
	  "jax-cuda13-plugin==$$version jax-cuda13-pjrt==$$version nvidia-nvvm nvidia-cuda-nvcc"; do \
	  $(COMPILERS)/bin/python -m pip install --quiet --no-compile "jax==$$version" $$wheels \
	    || echo "not available on this platform: $$wheels"; \
	done
	touch $@

clean:
	rm -rf $(VENV) .venv-* out .pytest_cache .ruff_cache .hypothesis

# The commands of this project. `make help` lists them.
#
# PYTHON  the interpreter that makes the virtual environment (3.11 or newer)
# VENV    where the virtual environment is made
# WORKERS processes that run the tests, each a file at a time; slow tests run in one, which may take all processors
# PYTHONS versions that `make test-pythons` tries; PYTHONS=3.13 for one of them

PYTHON ?= python3
VENV ?= .venv
WORKERS ?= 2
PYTHONS ?= 3.11 3.12 3.13

VPYTHON := $(VENV)/bin/python
PYTEST := "$(VPYTHON)" -m pytest -n $(WORKERS) --dist loadfile

.DEFAULT_GOAL := help
.PHONY: help demo test test-slow test-lowest test-pythons test-package lint docs
.DELETE_ON_ERROR:

help:  ## Show this list
	@echo "make TARGET [PYTHON=$(PYTHON)] [VENV=$(VENV)]"
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  \1\t\2/p' Makefile | expand -t 16

demo: $(VENV)/.installed-plot  ## Install the package and run examples/plot_quickstart.py
	"$(VPYTHON)" examples/plot_quickstart.py

# What JAX has compiled is kept beside the packages, which is half of the time of the tests. With a largest
# size there is a lock, which the processes that share the cache need, and filelock makes.
test test-slow: export JAX_COMPILATION_CACHE_DIR := $(abspath $(VENV))/jax-cache
test test-slow: export JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS := 0.2
test test-slow: export JAX_COMPILATION_CACHE_MAX_SIZE := 4000000000

test: $(VENV)/.installed-test  ## Run the tests, without the slow ones
	$(PYTEST)

# Exit status 5 of pytest: nothing is marked slow.
test-slow: $(VENV)/.installed-test  ## Run the slow tests
	@status=0; "$(VPYTHON)" -m pytest -m slow --collect-only -q >/dev/null || status=$$?; \
	if [ $$status -eq 5 ]; then echo "There are no slow tests."; \
	else set -x; "$(VPYTHON)" -m pytest -m slow; fi

test-lowest:  ## Run the tests with the lowest version of every dependency
	$(MAKE) test VENV="$(VENV)-lowest" LOWEST=1

test-pythons:  ## Run the tests under each of PYTHONS that is found (PATH, pyenv)
	@failed=; found=; for version in $(PYTHONS); do \
	  python="$$(.ci/find_python $$version)" || { echo "Python $$version: not found"; continue; }; \
	  echo "Python $$version: $$python"; found=1; \
	  $(MAKE) test PYTHON="$$python" VENV="$(VENV)-$$version" || failed="$$failed $$version"; \
	done; \
	if [ -z "$$found" ]; then echo "error: no Python out of $(PYTHONS) was found." >&2; exit 1; fi; \
	if [ -n "$$failed" ]; then echo "error: the tests failed under Python$$failed." >&2; exit 1; fi

test-package:  ## Build sdist and wheel, install the wheel in a fresh environment, use it
	"$(PYTHON)" .ci/check_package.py

lint: $(VENV)/.installed-test  ## Check style and types
	"$(VENV)/bin/ruff" check .
	"$(VENV)/bin/ruff" format --check .
	"$(VENV)/bin/mypy"

docs: $(VENV)/.installed-docs  ## Check the spelling, build docs/_build/html, examples included, warnings as errors
	"$(VENV)/bin/codespell" *.md docs/*.md docs/*.rst docs/guide examples sknbln benchmarks
	"$(VENV)/bin/sphinx-build" -W --keep-going -b html docs docs/_build/html

# The stamps: nothing is installed again until pyproject.toml changes.
$(VENV)/.installed-%: pyproject.toml | $(VPYTHON)
	$(if $(LOWEST),"$(VPYTHON)" .ci/lowest_requirements.py $* >"$(VENV)/lowest.txt")
	"$(VPYTHON)" -m pip install --quiet --disable-pip-version-check --editable ".[$*]" \
	  $(if $(LOWEST),--constraint "$(VENV)/lowest.txt")
	@touch "$@"

$(VPYTHON):
	@command -v "$(PYTHON)" >/dev/null || { \
	  echo "error: '$(PYTHON)' not found. Say which Python to use: make PYTHON=/path/to/python3.11" >&2; \
	  exit 1; }
	@"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "error: sknbln needs Python 3.11 or newer; '$(PYTHON)' is $$("$(PYTHON)" -V 2>&1)." >&2; \
	  echo "       Say which one to use: make PYTHON=/path/to/python3.11" >&2; \
	  exit 1; }
	"$(PYTHON)" -m venv "$(VENV)"

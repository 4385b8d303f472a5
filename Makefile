# Everything runs in .venv, which belongs to this file: `make setup` makes it, `make clean` removes it.
PYTHON ?= python3
ARGS ?=
BIN := .venv/bin
# Groups of tests (tests/conftest.py) go to two processes, of one thread each: much of a test is waiting for the start of others.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/pytest -n 2
# The stamp is written when an install has ended well. No stamp: .venv is unfinished and is made again from nothing.
INSTALLED := .venv/.installed

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-all cluster-test check bench clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "make %-13s %s\n", $$1, $$2}' $(MAKEFILE_LIST)
	@echo 'Variables: PYTHON=/path/to/python3.11 (for setup), ARGS="..." (added to the command of demo, test, test-all, bench)'

setup: $(INSTALLED) ## make .venv and install csm there with the versions of constraints.txt

demo: $(INSTALLED) ## run the whole pipeline on the bundled digits and write workspace/report.html
	$(BIN)/csm run --config demo $(ARGS)

test: $(INSTALLED) ## the tests, without the slow ones
	$(PYTEST) $(ARGS)

test-all: $(INSTALLED) ## every test; those marked gpu only where torch finds one
	$(PYTEST) -m "$$($(BIN)/python -c 'import torch; print("not hosts" if torch.cuda.is_available() else "not hosts and not gpu")')" $(ARGS)

cluster-test: $(INSTALLED) ## the tests on isolated hosts, whose machines and networks fail; needs root
	@test "$$(id -u)" = 0 || { echo 'make cluster-test makes isolated hosts, which only root can: sudo make cluster-test' >&2; exit 2; }
	$(BIN)/pytest -m hosts tests/hosts $(ARGS)

check: $(INSTALLED) ## lint, format, types, and the import rule between the storeys
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/lint-imports

bench: $(INSTALLED) ## what the cluster storey costs against direct calls
	$(BIN)/csm bench overhead $(ARGS)

clean: ## remove .venv and caches; workspaces stay
	rm -rf .venv build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache
	find csm cluster flows tests -type d -name __pycache__ -prune -exec rm -rf {} +

# What keeps $(PYTHON) from making .venv, in one line; empty if nothing does.
HINT := Run 'make PYTHON=/path/to/python3.11 setup'
PROBLEM = $(shell \
	found=$$($(PYTHON) -c 'import sys; print("%d.%d.%d (%s)" % (tuple(sys.version_info[:3]) + (sys.executable,)))' 2>/dev/null); \
	if [ -z "$$found" ]; then \
	    echo "csm needs Python 3.11 or newer; $(PYTHON) does not run here. $(HINT)"; \
	elif ! $(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then \
	    echo "csm needs Python 3.11 or newer; $(PYTHON) is $$found. $(HINT)"; \
	elif ! $(PYTHON) -c 'import ensurepip, venv' 2>/dev/null; then \
	    echo "csm needs Python's venv and ensurepip modules, which $(PYTHON), $$found, lacks." \
	        "Install them (Debian, Ubuntu: apt install python3-venv), or use another Python. $(HINT)"; \
	fi)

$(INSTALLED): pyproject.toml constraints.txt
	$(if $(wildcard $@),,$(if $(PROBLEM),$(error $(PROBLEM))))
	@test -f $@ || { rm -rf .venv && $(PYTHON) -m venv .venv; } || { rm -rf .venv; exit 1; }
	$(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

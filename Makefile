# Every target does its own set-up, in .venv. PYTHON chooses the interpreter: make test PYTHON=python3.12
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install -c constraints.txt
export PIP_DISABLE_PIP_VERSION_CHECK := 1
# Built now, so that no first run is too short for it; without a compiler everything works all the same.
NATIVE := $(BIN)/python -c 'from cavelight.run.quick import without_native as why; print("Native layers:", why() or "ready")'

.DEFAULT_GOAL := help
.PHONY: help demo test check golden bench proof clean

help: ## list the targets
	@sed -n 's/^\([a-z]*\):.*## /  make \1\t/p' $(MAKEFILE_LIST) | expand -t 16

demo: $(VENV)/.ready ## the tour: train a small true V3, export it, generate with its drafts, draw the report
	@$(BIN)/cavelight demo

test: $(VENV)/.ready-dev ## run the tests
	@$(BIN)/python -m pytest

check: $(VENV)/.ready-dev ## formatting, lint, types and the import fence
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/python -m pytest tests/test_fence.py

golden: $(VENV)/.ready-dev ## rewrite the golden trajectories; read the diff before committing it
	$(BIN)/python -m tests.golden --write

# Proofs are the long runs behind docs/results; everything else in bench/ measures speeds.
PROOFS := bench.balance bench.conversion bench.memory bench.resume bench.needle bench.proof bench.crowd
BENCHES := bench.running bench.loading bench.training bench.scaling bench.speculation bench.packing bench.headers bench.planner bench.tokenising

bench: $(VENV)/.ready-dev ## measure the speeds that README and docs speak of (bench/*.py)
	@set -e; for script in $(BENCHES); do echo "== $$script"; $(BIN)/python -m $$script; done

proof: $(VENV)/.ready-dev ## repeat the runs behind docs/results; takes long
	@set -e; for script in $(PROOFS); do echo "== $$script"; $(BIN)/python -m $$script; done

clean: ## remove what the targets made, the environment included; keeps runs/
	rm -rf $(VENV) .hypothesis .mypy_cache .pytest_cache .ruff_cache build dist

# The demo needs only what runs the package; tests and checks add the rest.
$(VENV)/.ready: pyproject.toml constraints.txt | $(BIN)/pip
	$(PIP) -e .
	@$(NATIVE)
	@touch $@

$(VENV)/.ready-dev: pyproject.toml constraints.txt | $(BIN)/pip
	$(PIP) -e '.[dev]'
	@$(NATIVE)
	@touch $@ $(VENV)/.ready

$(BIN)/pip:
	@command -v $(PYTHON) >/dev/null || { \
	    echo "There is no '$(PYTHON)' here: name a Python of 3.11 or newer, as in 'make PYTHON=python3.12 ...'." >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	    echo "Cavelight needs Python 3.11 or newer, and '$(PYTHON)' is $$($(PYTHON) -V 2>&1):" \
	         "name a newer one with 'make PYTHON=python3.12 ...'." >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip' 2>/dev/null || { \
	    echo "This Python has no ensurepip (Debian ships it apart), so python3-venv has to be installed first." >&2; \
	    test "$$(id -u)" = 0 && command -v apt-get >/dev/null && apt-get update -q && apt-get install -qy python3-venv || { \
	    echo "Install it as root ('apt-get install python3-venv'), then run make again." >&2; exit 1; }; }
	$(PYTHON) -m venv --clear $(VENV)

# make demo   a whole run on this machine, in minutes      make test   everything but what needs a GPU
# make setup  .venv with all that is needed (both call it)  make clean  forget .venv and caches
#
# Variables: PYTHON (default python3), TORCH_INSTALL (how torch is installed; e.g. with --index-url of another build)

PYTHON ?= python3
TORCH_INSTALL ?= torch==2.13.0
BIN := .venv/bin
STAMP := .venv/.installed

.PHONY: setup demo test lint bench clean

demo: $(STAMP)
	$(BIN)/python launch/local.py configs/demo.yaml

test: lint
	$(BIN)/python -m pytest -m "not gpu"

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

bench: $(STAMP)
	$(BIN)/python launch/bench.py configs/demo.yaml

setup: $(STAMP)

$(STAMP): pyproject.toml
	@command -v $(PYTHON) >/dev/null || { echo "error: no $(PYTHON) here; install it (apt install python3 python3-venv) or name one: make PYTHON=python3.12" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' || { echo "error: $$($(PYTHON) --version) is not 3.11, 3.12 or 3.13; name one that is: make PYTHON=python3.12" >&2; exit 1; }
	@$(PYTHON) -c 'import venv, ensurepip' 2>/dev/null || { echo "error: $(PYTHON) cannot make environments; apt install python3-venv" >&2; exit 1; }
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install $(TORCH_INSTALL)
	$(BIN)/python -m pip install --editable '.[dev]'
	@touch $@

clean:
	rm -rf .venv .pytest_cache .hypothesis .ruff_cache .mypy_cache .import_linter_cache .grimp_cache build dist *.egg-info

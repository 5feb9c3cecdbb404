# make demo   a whole run on this machine, in minutes      make test   lint and tests, without GPU, SGLang or slow ones
# make setup  .venv with all that is needed (both call it)  make clean  forget .venv and caches
# make test-all   every test that needs no GPU: test, test-sglang and what is marked slow
# make docs   the documentation as a site, in build/site     make docs-pages   its pages that are written by the code
# make lock   requirements.lock from the versions that are in .venv now: after an upgrade, and after its tests
#
# make peers  .venv-peers with TransferQueue and Ray, with which sgpo-async bench transport --peers compares
# make trl    .venv-trl with TRL, with which sgpo-async bench trl --trl compares
#
# With real SGLang servers, on a CPU (Python 3.11):
# make sglang-cpu   .venv-sglang, SGLang's own environment    make demo-sglang, make test-sglang   demo and tests with it
#
# On a machine with a GPU: docs/gpu.md
# make gpu-wheels   what such a machine may lack, as wheels in .gpu-wheels      make gpu-check   all that one GPU can prove
#
# Variables: PYTHON (default python3), TORCH_INSTALL (how torch is installed; e.g. with --index-url of another build),
# JOBS (how many tests run side by side; default: as many as there are cores, at most 8), VENV (default .venv)

PYTHON ?= python3
TORCH_INSTALL ?= torch==2.13.0
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
LOCK := requirements.lock
SGLANG_BIN := .venv-sglang/bin
SGLANG_STAMP := .venv-sglang/.installed
JOBS ?= logical
# A file's tests share what they start, so a file is never divided. The slowest 40 are printed.
PYTEST := $(BIN)/python -m pytest -n $(JOBS) --maxprocesses 8 --dist loadfile --durations 40
SGLANG_PINS := sgpo_async/engines/sglang/cpu/requirements.txt

.PHONY: setup lock demo test units test-all lint docs docs-pages bench clean sglang-cpu demo-sglang test-sglang gpu-wheels gpu-check peers trl

demo: $(STAMP)
	$(BIN)/python launch/local.py configs/demo.yaml

test: lint
	$(PYTEST) -m "not gpu and not sglang and not slow"

demo-sglang: $(STAMP) $(SGLANG_STAMP)
	$(BIN)/python launch/local.py configs/demo-sglang.yaml

test-sglang: $(STAMP) $(SGLANG_STAMP)
	$(PYTEST) -m "sglang and not gpu and not slow"

# The fast part, by another Python or torch: make units VENV=.venv-3.12 PYTHON=python3.12 TORCH_INSTALL=torch==2.11.0
units: $(STAMP)
	$(PYTEST) -m "not process and not gpu and not sglang and not slow"

test-all: lint $(SGLANG_STAMP)
	$(PYTEST) -m "not gpu"

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

# The documentation as a site in build/site; to look at it: python -m http.server --directory build/site
docs: $(STAMP)
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --quiet

# The pages that are written by the code that they describe; a test says when they are old.
docs-pages: $(STAMP)
	$(BIN)/python -m sgpo_async.config.page > docs/configuration.md
	$(BIN)/python -m sgpo_async.cli.page > docs/commands.md
	$(BIN)/python -m sgpo_async.metrics.page > docs/metrics.md

bench: $(STAMP)
	$(BIN)/python launch/bench.py configs/demo.yaml

# For a GPU machine without a network that has torch, transformers and the usual scientific packages: pure Python
# packages, and pyzmq for its Python. None of them brings a torch.
GPU_PYTHON ?= 3.12
GPU_PACKAGES := pyzmq omegaconf math-verify latex2sympy2-extended antlr4-python3-runtime liger-kernel
gpu-wheels: $(STAMP)
	rm -rf .gpu-wheels
	$(BIN)/python -m pip download --quiet --no-deps --only-binary=:all: --python-version $(GPU_PYTHON) \
	    --implementation cp --platform manylinux_2_28_x86_64 --platform manylinux_2_26_x86_64 --platform manylinux2014_x86_64 \
	    --dest .gpu-wheels --constraint $(LOCK) $(GPU_PACKAGES)
	@du -sh .gpu-wheels

# With the machine's own Python (GPU_RUN), which has the torch that fits its driver; the wheels if they are there.
GPU_RUN ?= python3
GPU_OUT ?= runs/gpu-check
gpu-check:
	$(GPU_RUN) tests/gpu/check.py --out $(GPU_OUT)

setup: $(STAMP)

# Torch, and what only its CUDA build brings, is TORCH_INSTALL's choice and stays out. The new file is as old as .venv.
lock:
	@test -x $(BIN)/python || { echo "error: no .venv to take the versions from; make setup first" >&2; exit 1; }
	@{ echo "# The exact versions that were tested together, as constraints for pip; pyproject.toml has the ranges."; \
	   echo "# Rewritten from .venv by: make lock"; \
	   $(BIN)/python -m pip freeze --exclude-editable | grep -viE '^(torch|triton|nvidia[-_].*|cuda[-_].*)(==| @)'; } > $(LOCK).new
	@mv $(LOCK).new $(LOCK)
	@touch $(STAMP)

# PYTHONWARNINGS: setuptools warns of every editable installation, which newer versions of pip print.
$(STAMP): pyproject.toml $(LOCK)
	@command -v $(PYTHON) >/dev/null || { echo "error: no $(PYTHON) here; install it (apt install python3 python3-venv) or name one: make PYTHON=python3.12" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' || { echo "error: $$($(PYTHON) --version) is not 3.11, 3.12 or 3.13; name one that is: make PYTHON=python3.12" >&2; exit 1; }
	@$(PYTHON) -c 'import venv, ensurepip' 2>/dev/null || { echo "error: $(PYTHON) cannot make environments; apt install python3-venv" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install $(TORCH_INSTALL)
	PYTHONWARNINGS=ignore $(BIN)/python -m pip install --quiet --constraint $(LOCK) --editable '.[dev]'
	@touch $@
	@echo "installed in $(VENV); to use its commands: . $(VENV)/bin/activate"

sglang-cpu: $(SGLANG_STAMP)

# Without their dependencies, sglang and xgrammar leave the CPU build of torch alone; three packages that they import and
# never call on this path have stand-ins beside the pins, which a server finds on its PYTHONPATH.
$(SGLANG_STAMP): $(SGLANG_PINS)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))' || { echo "error: $$($(PYTHON) --version), but the pins for SGLang on a CPU are for Python 3.11; name one: make PYTHON=python3.11 $@" >&2; exit 1; }
	$(PYTHON) -m venv .venv-sglang
	$(SGLANG_BIN)/python -m pip install --quiet --upgrade pip
	$(SGLANG_BIN)/python -m pip install $(TORCH_INSTALL)
	$(SGLANG_BIN)/python -m pip install --requirement $(SGLANG_PINS)
	$(SGLANG_BIN)/python -m pip install --no-deps sglang==0.5.23 xgrammar==0.2.7
	@touch $@

# sgpo-async bench transport --peers .venv-peers/bin/python
peers:
	$(PYTHON) -m venv .venv-peers
	.venv-peers/bin/python -m pip install --quiet $(TORCH_INSTALL)
	.venv-peers/bin/python -m pip install --quiet TransferQueue==0.1.11 ray==2.60.0

# sgpo-async bench trl --trl .venv-trl/bin/python
trl:
	$(PYTHON) -m venv .venv-trl
	.venv-trl/bin/python -m pip install --quiet $(TORCH_INSTALL)
	.venv-trl/bin/python -m pip install --quiet $(shell grep -i '^transformers==' $(LOCK)) trl==1.16.0

clean:
	rm -rf .venv .venv-sglang .venv-peers .venv-trl .pytest_cache .hypothesis .ruff_cache .mypy_cache .import_linter_cache .grimp_cache build dist *.egg-info

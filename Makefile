# make quickstart   install into .venv, run the quickstart, print its table and where its report is
# make test         the tests, without the slow ones
# make test-parity  the tests against PyTorch and transformers, which it installs
# A machine needs Python 3.11 or 3.12, make, and the network for the first installation.

PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python
PIP := $(RUN) -m pip --disable-pip-version-check -qq install -c constraints.txt
TESTS := JAX_PLATFORMS=cpu $(RUN) -m pytest

.DEFAULT_GOAL := help
.PHONY: help quickstart install install-test test test-all test-parity test-tpu-compile drill lint \
	bench bench-torch bench-gpu clean

help:
	@echo "make quickstart   install into $(VENV), run configs/quickstart.py into runs/quickstart"
	@echo "make test         the tests (CPU only)"
	@echo "make test-all     the slow tests too"
	@echo "make test-parity  the tests against PyTorch and transformers (installs them)"
	@echo "make test-tpu-compile  the test that compiles a step for TPUs (installs libtpu; needs no TPU)"
	@echo "make drill        kill -9 at random moments, KILLS=100 of them; resumed to the same bits"
	@echo "make bench        images per second: whole step, feed, augmentation, layout solver"
	@echo "make bench-torch  our step against PyTorch's on this CPU (installs PyTorch)"
	@echo "make bench-gpu    the same on a GPU, and PyTorch with CPU augmentation; meant for 10 minutes;"
	@echo "                  BENCH_PYTHON=python3 runs it in an environment that is there already"
	@echo "make lint         ruff"
	@echo "make clean        remove $(VENV) and caches; runs/ stays"
	@echo "PYTHON=/path/to/python3.12 chooses the Python of $(VENV)"

quickstart: install
	$(RUN) -m jax_cl_bd --config=configs/quickstart.py --workdir=runs/quickstart

# Two processes, each with its 8 simulated devices; most of the time goes into compiling, of programs
# too small to gain by XLA's costly optimisations, or by its newer code generator, which compiles at
# half the speed of the older. `make test-all` leaves both on.
test: install-test
	JAX_DISABLE_MOST_OPTIMIZATIONS=1 \
	XLA_FLAGS=--xla_backend_extra_options=xla_cpu_disable_new_fusion_emitters \
	$(TESTS) -q -n 2 --dist loadfile -m "not slow and not gpu and not tpu"

test-all: install-test
	$(RUN) -m pytest -q -rs

test-parity: install-test $(VENV)/.installed-parity
	$(TESTS) -q -rs $$(grep -rlE "importorskip\(.(torch|transformers)" tests --include=*.py)

test-tpu-compile: install-test $(VENV)/.installed-tpu
	$(TESTS) -q -rs tests/test_compile_for.py -k libtpu

drill: install-test
	$(RUN) -m tests.drill --kills=$(or $(KILLS),100) --seed=$(or $(SEED),0)

lint: $(VENV)/.installed-lint
	$(RUN) -m ruff check .

bench: install
	for name in step feed augment layout; do \
		echo "$$name"; $(RUN) -m jax_cl_bd.bench $$name || exit 1; done

bench-torch: install $(VENV)/.installed-peers
	JAX_PLATFORMS=cpu $(RUN) -m tests.bench_torch

# BENCH_PYTHON: a Python that has JAX for CUDA, PyTorch and the rest already; nothing is installed.
bench-gpu: $(if $(BENCH_PYTHON),,install $(VENV)/.installed-gpu $(VENV)/.installed-peers)
	$(or $(BENCH_PYTHON),$(RUN)) -m tests.bench_torch --gpu --json=$(or $(JSON),runs/bench_gpu.json)

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .ruff_cache .bench_cache
	find . -name __pycache__ -not -path "./.git/*" -prune -exec rm -rf {} +

install: $(VENV)/.installed
install-test: $(VENV)/.installed-test

# Each stamp is as new as the last installation: nothing is done again until the pins change.
$(VENV)/.installed: pyproject.toml constraints.txt
	@$(PYTHON) -c "import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 12))" 2>/dev/null || \
		{ echo "error: jax_cl_bd needs Python 3.11 or 3.12, but PYTHON=$(PYTHON) is" \
		"$$($(PYTHON) --version 2>&1 | head -n 1); name another: make PYTHON=python3.12 $(MAKECMDGOALS)" >&2; exit 2; }
	@$(PYTHON) -c "import ensurepip, venv" 2>/dev/null || \
		{ echo "error: $(PYTHON) has no venv or ensurepip (Debian, Ubuntu: apt install python3-venv);" \
		"or name another: make PYTHON=/path/to/python3.12 $(MAKECMDGOALS)" >&2; exit 2; }
	@echo "installing into $(VENV) (minutes, once)"
	@rm -rf $(VENV)
	@$(PYTHON) -m venv $(VENV)
	@$(PIP) -e .
	@touch $@

$(VENV)/.installed-%: $(VENV)/.installed
	@echo "installing the extra $*"
	@$(PIP) -e ".[$*]"
	@touch $@

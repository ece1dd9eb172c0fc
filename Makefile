# Every verb sets itself up: a .venv of Python 3.11 to 3.14 and the versions of constraints.txt. Nothing else is needed.

VENV := .venv
PY := $(VENV)/bin/python
PIP := $(PY) -m pip --disable-pip-version-check --no-input
READY := $(VENV)/.ready
LIBRARY := -e ".[diffusers,bench,demo,docs,dev]"
TORCH := $(shell sed -n 's/^torch==/torch==/p' constraints.txt)
# for the user's shell, from the folder that make was called in
ENTER := $(if $(filter-out $(CURDIR),$(PWD)),cd "$(CURDIR)" && )source $(VENV)/bin/activate
OUT ?= demo_out
ARGS ?=
CALLS ?= 20000
BACKEND ?= tiled
PYTEST = $(PY) -m pytest -n logical --maxprocesses 8 --dist loadfile
# waiting threads give their core away: half the processor time where cores are shared
demo test test-slow: export OMP_WAIT_POLICY ?= passive

.DEFAULT_GOAL := help
.PHONY: demo test test-slow test-all test-versions fuzz lint static bench validate docs clean help

help:
	@echo "make demo      one step on real photographs, then appearance transfer and its leakage; writes $(OUT)/ (under three minutes once installed)"
	@echo "make test      ruff, mypy, kernels against plain PyTorch, the fast tier of the tests (about five minutes on two cores)"
	@echo "make test-slow the cases marked slow, which make test leaves out"
	@echo "make test-all  make test, then make test-slow: everything that CI runs"
	@echo "make test-versions  environments of the oldest and newest promised versions, a short suite in each (some 20 GB)"
	@echo "make fuzz      random calls of every op against float64 formulas; CALLS=20000 BACKEND=tiled|reference|interpreted"
	@echo "make lint      ruff and mypy"
	@echo "make validate  every op x backend x dtype x shape on this machine against float64"
	@echo "make static    compile every kernel for every architecture and hold it to its budgets (no GPU needed)"
	@echo "make bench     speed and memory against what you would use instead; ARGS=--quick for two minutes on a CPU"
	@echo "make docs      the pages of docs/ into build/site, where a warning is an error"
	@echo "make clean     remove $(VENV) and all that the other verbs wrote"
	@echo "PYTHON=...     the interpreter to build $(VENV) with (default: the first of 3.11 to 3.14)"

# pip writes to a log, because a quiet pip hides which pins conflict; a failure shows the end of the log
define install
$(PIP) install $(1) -c constraints.txt >$(VENV)/install.log 2>&1 || { tail -n 30 $(VENV)/install.log >&2; \
  echo "setup: pip could not install $(1); its whole output is in $(VENV)/install.log" >&2; exit 1; }
endef

$(READY): setup.py pyproject.toml constraints.txt
	@set -e; \
	found=""; \
	for candidate in $(or $(PYTHON),$(PY) python3 python3.13 python3.12 python3.14 python3.11); do \
	  if $$candidate -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 14))' >/dev/null 2>&1; then \
	    found=$$candidate; break; \
	  fi; \
	done; \
	if [ -z "$$found" ]; then \
	  echo "setup: expected Python 3.11 to 3.14, got $$($(or $(PYTHON),python3) --version 2>&1 | tail -n 1);" \
	    "name one with PYTHON=..." >&2; exit 1; \
	fi; \
	echo "setup 1/3: $(VENV) ($$($$found --version))"; \
	if ! $(PY) -m pip --version >/dev/null 2>&1; then \
	  $$found -m venv $(VENV) || { echo "setup: $$found has no working venv module (on Debian: apt install python3-venv)" >&2; exit 1; }; \
	fi
	@echo "setup 2/3: $(TORCH), the large one (progress: $(VENV)/install.log)"
	@$(call install,$(TORCH))
	@echo "setup 3/3: this library and its tools, as pinned in constraints.txt"
	@$(call install,$(LIBRARY))
	@touch $@

demo: $(READY)
	@$(PY) -m qalign demo --out $(OUT) $(ARGS)
	@echo 'next: the environment, and one transfer of your choice'
	@echo '  $(ENTER)'
	@echo '  python -m qalign scenes --count 12 --held-out --out scenes'
	@echo '  python -m qalign transfer --appearance scenes/0003.png --structure scenes/0011.png --out O.png'

lint: $(READY)
	@echo "lint: ruff, mypy"
	@$(PY) -m ruff check .
	@$(PY) -m ruff format --check --quiet . || { echo "lint: run ruff format ." >&2; exit 1; }
	@$(PY) -m mypy

validate: $(READY)
	@$(PY) -m qalign_kernels.validate $(ARGS)

static: $(READY)
	@$(PY) -m benchmarks static $(ARGS)

bench: $(READY)
	@$(PY) -m benchmarks speed $(ARGS)

test: lint
	@echo "validate: every op against float64"
	@$(PY) -m qalign_kernels.validate --quick
	@echo "pytest: the fast tier"
	@$(PYTEST) -m "not slow" --durations 20 --durations-min 2 $(ARGS)

test-slow: $(READY)
	@echo "pytest: the slow tier"
	@$(PYTEST) -m slow $(ARGS)

test-all: test
	@$(MAKE) --no-print-directory test-slow

fuzz: $(READY)
	@echo "fuzz: $(CALLS) calls, $(BACKEND)"
	@FUZZ_CALLS=$(CALLS) $(PYTEST) --dist load tests/fuzz -k $(BACKEND)_calls -o fast_case_seconds=inf $(ARGS)

docs: $(READY)
	@$(PY) -m benchmarks pages --check || { echo "docs: run python -m benchmarks pages" >&2; exit 1; }
	@NO_MKDOCS_2_WARNING=1 $(PY) -m mkdocs build --strict --quiet

test-versions: $(READY)
	@$(PY) -m tests.versions $(ARGS)

clean:
	rm -rf $(VENV) $(OUT) build dist .mypy_cache .pytest_cache .ruff_cache .benchmarks .hypothesis *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

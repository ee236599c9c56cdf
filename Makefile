# Two commands set everything up, each in a .venv they make: `make demo` and `make test`.
PYTHON ?= python3
# To `make wheelhouse` it is the version the wheels are for, PYTHON=3.12; to any other target the interpreter.
ifeq ($(MAKECMDGOALS),wheelhouse)
WHEELS_FOR := $(PYTHON)
override PYTHON := python3
endif
EXTRAS ?= cli,ogbench,minari,files,reports
ALSO ?=
VENV ?= .venv
SEED ?= 0
QUICK ?=
# On Linux the default torch wheel brings CUDA; PIP_ARGS lets a machine without a GPU point pip at CPU wheels.
PIP_ARGS ?=

# OpenMP threads that spin while they wait slow each other down on a busy machine (see deflow_torchrl/cli).
export GOMP_SPINCOUNT ?= 1000

BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: help install demo test lint docs release pairs bench wheelhouse clean

help: ## list the targets
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/'

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit("Python 3.11 or newer is needed, this is %d.%d" % sys.version_info[:2] if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check $(PIP_ARGS) -c constraints.txt "$$(grep '^torch==' constraints.txt)"
	$(BIN)/pip install --quiet --disable-pip-version-check $(PIP_ARGS) -c constraints.txt -e '.[dev]'
	touch $@

install: $(STAMP) ## make .venv and install the package with everything the demo and the tests need

demo: $(STAMP) ## generate data, train DeFlow, evaluate, report: SEED=0, QUICK=1 for a short run
	$(BIN)/deflow demo --seed $(SEED) $(if $(QUICK),--quick)

# A process a core with one thread each: small operations of several threads wait for one another.
test: $(STAMP) ## run the tests
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --maxprocesses 8 --dist loadfile

lint: $(STAMP) ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: $(STAMP) ## build the docs site into site/
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

release: $(STAMP) ## build wheel and sdist into dist/, and run README's snippet on each in a clean environment
	$(BIN)/python .ci/release.py --pip-args '$(PIP_ARGS)'

pairs: $(STAMP) ## README's snippet with the oldest and the newest torch: downloads 6 GB of CUDA, ten minutes
	$(BIN)/python .ci/release.py --pair 2.9.0 0.14.1 --pip-args '$(PIP_ARGS)'
	$(BIN)/python .ci/release.py --pair 2.15.0 0.14.1 --pip-args '$(PIP_ARGS)'

bench: $(STAMP) ## how long an update takes: ratios now, against the stored ones
	$(BIN)/python benchmarks/throughput.py bench

wheelhouse: $(STAMP) ## wheels for a machine without a registry, besides torch: PYTHON=3.12
	$(BIN)/python .ci/wheelhouse.py --python $(WHEELS_FOR) --extras $(EXTRAS) --also $(ALSO)

clean: ## remove the environment and caches (never data or runs)
	rm -rf $(VENV) *.egg-info build site .mypy_cache .ruff_cache

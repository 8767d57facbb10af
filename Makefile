PYTHON ?= python3
SHELL := /bin/bash
BIN := .venv/bin
ROOMS := $(wildcard server kernels models training)

# As the `rae` command sets it; server/cli.py says why.
export GOMP_SPINCOUNT ?= 1000

.PHONY: install serve test test-slow kernels-compile bench paper soak gpu check wheel image clean \
    typecheck-links

install: .venv/.installed

.venv/.installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=python3.12")'
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@echo "Installing into .venv; the first time takes a few minutes"
	@set -o pipefail; $(BIN)/python -m pip install --disable-pip-version-check --progress-bar off \
	    -c constraints.txt -e '.[dev,train,report,convert]' \
	    | awk '/(Downloading|Using cached) / && !/metadata/ { print; fflush() }'
	@touch $@

serve: .venv/.installed
	$(BIN)/rae serve $(ARGS)

# `python -m pytest` would put this folder, and so a namespace package `models`, on sys.path.
test: .venv/.installed
	$(BIN)/pytest $(or $(ARGS),-n 2 --dist loadfile)

# The published models at their true size, and the Dockerfile's steps.
test-slow: .venv/.installed
	$(BIN)/pytest -m slow $(ARGS)

# What the compilers of both supported Tritons say of the kernels; no GPU is needed.
kernels-compile: .venv/.installed .venv-triton3.6/.installed
	$(BIN)/python benchmarks/compile_kernels.py --csv benchmarks/results/compile/triton-3.8.csv
	$(BIN)/python benchmarks/compile_models.py
	PYTHONPATH=.venv-triton3.6 $(BIN)/python benchmarks/compile_kernels.py \
	    --csv benchmarks/results/compile/triton-3.6.csv
	PYTHONPATH=.venv-triton3.6 $(BIN)/python benchmarks/compile_models.py

# The oldest Triton, over the rest of .venv.
.venv-triton3.6/.installed:
	$(BIN)/python -m pip install -q --disable-pip-version-check --no-deps \
	    --target .venv-triton3.6 triton==3.6.0
	@touch $@

# The embedded digits here, or what ARGS say: benchmarks/throughput.py --help.
bench: .venv/.installed
	$(BIN)/python benchmarks/throughput.py --out out/throughput $(ARGS)

# The paper's four claims on the digits: docs/paper.md. Half an hour. Does it run?
# make paper ARGS=--quick CLAIMS=out/paper CLAIM_PLOTS=out/paper
CLAIMS ?= benchmarks/results/cpu/paper
CLAIM_PLOTS ?= docs/paper
paper: .venv/.installed
	@for claim in width shift noise head; do \
	    echo "== $$claim"; \
	    $(BIN)/python benchmarks/paper/$$claim.py $(ARGS) \
	        --json $(CLAIMS)/$$claim.json --plot $(CLAIM_PLOTS)/$$claim.png || exit 1; \
	done

# The service under load and chaos, two hours of it, each part on servers of its own. Shorter:
# make soak SECONDS=20 HOUR=300 CLIENTS=500 KILLS=5 STOPS=4 CASES=500; MODEL= a checkpoint folder.
SECONDS ?= 300
HOUR ?= 3600
CLIENTS ?= 10000
KILLS ?= 50
STOPS ?= 20
CASES ?= 20000
SERVICE ?= benchmarks/results/cpu/service
soak: .venv/.installed
	@status=0; \
	part() { \
	    echo "== $$1"; \
	    $(BIN)/python benchmarks/$$1.py "$${@:2}" $(if $(MODEL),--model $(MODEL)) \
	        --json $(SERVICE)/$$1.json || status=1; \
	}; \
	part load --seconds $(SECONDS); \
	part disconnects --clients $(CLIENTS); \
	part kills --kills $(KILLS); \
	part stops --stops $(STOPS); \
	part soak --seconds $(HOUR); \
	echo "== fuzz"; \
	$(BIN)/python benchmarks/fuzz.py --cases $(CASES) || status=1; \
	exit $$status

# On a machine with a GPU; OUT, PARTS and UPSTREAM as benchmarks/gpu.sh says.
OUT ?= benchmarks/results/gpu
gpu: .venv/.installed
	benchmarks/gpu.sh $(OUT) $(PARTS)

check: .venv/.installed typecheck-links
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

# An editable install maps `rae` by an import hook, which a type checker cannot follow.
typecheck-links:
	@mkdir -p .typecheck/rae
	@for room in $(ROOMS); do ln -sfn ../../$$room .typecheck/rae/$$room; done

# A stale build folder would ship modules that were deleted since.
wheel: .venv/.installed
	rm -rf build dist
	$(BIN)/python -m pip wheel --disable-pip-version-check --no-deps --no-build-isolation -q -w dist .
	rm -rf build
	@ls dist/*.whl

image:
	docker build -t rae-server .

clean:
	rm -rf build dist *.egg-info .typecheck .pytest_cache .ruff_cache .hypothesis
	find $(ROOMS) $(wildcard tests benchmarks) -name __pycache__ -prune -exec rm -rf {} +

# The interface that people and CI share. Every target does its own set-up.
#
#   make setup    a virtual environment in .venv with everything in it
#   make demo     the whole loop on this machine: warm start, asynchronous GRPO, ledger audit (about 4 minutes)
#   make test     all tests that run on a CPU
#   make compose-test  the demo's loop in containers, killed in mid-run (needs Docker and Compose v2)
#   make gpu-test tests that need a GPU and SGLang, which are installed into the environment beforehand
#   make gpu-bench  publication to an engine on the trainer's GPU, beside a flat copy; needs the same
#   make bench    speed beside peers, in ratios; BENCH_ARGS="--only router" for one of them (about 5 minutes)
#   make lint     ruff, import rules, protos (buf, where npm is there)
#   make types    pyright, strict
#   make protos   regenerate the stubs
#   make docs     regenerate the references of settings and metrics
#   make clean    remove what the targets above made, but .venv

PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.milepost-installed
BUF    := node_modules/.bin/buf
BUF_VERSION := 1.75.0
export OMP_NUM_THREADS ?= 1
export TOKENIZERS_PARALLELISM ?= false
PYTEST_ARGS ?=

.PHONY: setup demo test lint types protos docs clean
.DELETE_ON_ERROR:

setup: $(STAMP)

# torch comes first and alone: the constraint picks the CPU build, and nothing may pull another one in.
$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade "pip>=25.1"
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[all]" --group dev
	touch $@

demo: setup
	$(BIN)/python examples/arithmetic/demo.py

test: setup
	$(BIN)/python -m pytest -n 2 --dist loadfile $(PYTEST_ARGS)

.PHONY: compose-test
compose-test: setup
	MILEPOST_COMPOSE=1 $(BIN)/python -m pytest tests/compose $(PYTEST_ARGS)

# On a GPU machine: GPU_PYTHON names the Python that has torch with CUDA and SGLang.
GPU_PYTHON ?= python3
GPU_TESTS  ?= tests/gpu tests/gpu_trainer
.PHONY: gpu-test
gpu-test:
	$(GPU_PYTHON) -m pytest $(GPU_TESTS) -W default $(PYTEST_ARGS)

# Publication beside a flat copy; the table is also written to runs/bench/gpu.json.
.PHONY: gpu-bench
gpu-bench:
	$(GPU_PYTHON) -m benchmarks.gpu $(BENCH_ARGS)

BENCH_STAMP := $(VENV)/.milepost-bench-installed
BENCH_ARGS  ?=

# The table is also written to runs/bench/results.json; exit status 1: a target was missed.
.PHONY: bench
bench: setup $(BENCH_STAMP)
	$(BIN)/python -m benchmarks $(BENCH_ARGS)

$(BENCH_STAMP): $(STAMP)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --group bench
	touch $@

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports
	$(BIN)/python scripts/generate_stubs.py --check
	$(BIN)/python scripts/settings_reference.py --check
	$(BIN)/python scripts/metrics_reference.py --check
	if command -v npm >/dev/null; then $(MAKE) --no-print-directory lint-protos; \
	else echo "npm is not here: protos are not linted"; fi

.PHONY: lint-protos
lint-protos: $(BUF)
	$(BUF) lint
	$(BUF) format --diff --exit-code

# Against the commit or tag that was deployed last: make breaking BASE=v0.1.0
.PHONY: breaking
breaking: $(BUF)
	$(BUF) breaking --against '.git#ref=$(BASE)'

$(BUF):
	npm install --silent --no-save --no-audit --no-fund @bufbuild/buf@$(BUF_VERSION)

types: setup
	$(BIN)/pyright

protos: setup
	$(BIN)/python scripts/generate_stubs.py

docs: setup
	$(BIN)/python scripts/settings_reference.py
	$(BIN)/python scripts/metrics_reference.py

clean:
	rm -rf runs build dist node_modules .pytest_cache .ruff_cache .hypothesis .import_linter_cache
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +

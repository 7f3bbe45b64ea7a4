# `make demo` and `make test` set everything up on a fresh machine.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# torch first and pinned, so that no resolver picks another build later. On Linux the package index's own wheel carries
# CUDA; for a CPU-only machine: make demo TORCH="torch==2.13.0+cpu --index-url <PyTorch's CPU index>"
TORCH ?= torch==2.13.0
export HF_HUB_OFFLINE := 1
export TOKENIZERS_PARALLELISM := false

.PHONY: demo test check lint types notebooks bench demo-weights clean

demo: .stamp-demo
	$(BIN)/circuits demo --out demo-out

test: .stamp-install
	$(BIN)/python -m pytest --numprocesses auto --dist loadfile

check: lint types test notebooks

lint: .stamp-install
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/python -m pytest --collect-only -qqq # every test file imports, before minutes are spent on the others

types: .stamp-install
	$(BIN)/mypy

notebooks: .stamp-install
	$(BIN)/python notebooks/execute.py

bench: .stamp-install
	for script in benchmarks/[a-z]*.py; do $(BIN)/python $$script --json || exit 1; done

# Rebuilds the shipped weights from their seed on one thread, and fails if a single byte differs.
demo-weights: .stamp-install
	$(BIN)/python -m hooks.demo.build --check

.stamp-venv:
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet "pip>=25.1"
	$(BIN)/python -m pip install --quiet $(TORCH)
	touch $@

.stamp-demo: .stamp-venv pyproject.toml
	$(BIN)/python -m pip install --quiet --editable ".[plot]"
	touch $@

.stamp-install: .stamp-venv pyproject.toml
	$(BIN)/python -m pip install --quiet --editable ".[all]" --group dev
	$(BIN)/python -c "from hooks.rows import compiled; compiled()" # once, and not in the midst of a first graph
	touch $@

clean:
	rm -rf $(VENV) .stamp-* demo-out build *.egg-info

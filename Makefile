# `make demo` and `make test` set everything up on a fresh machine, from the exact versions in locks/.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# torch is pinned, but without hashes: its builds differ by machine. On Linux the package index's own wheel carries CUDA;
# for a CPU-only machine: make demo TORCH="torch==2.13.0+cpu --index-url <PyTorch's CPU index>"
TORCH ?= --requirement locks/torch.txt
# a lock names everything, so nothing is resolved; what is built from source is built with the locked setuptools
LOCKED := -m pip install --quiet --no-deps --no-build-isolation --require-hashes --requirement
EDITABLE := -m pip install --quiet --no-deps --no-build-isolation --editable
CHECKED := --jaxtyping-packages=hooks,circuits,beartype.beartype
export HF_HUB_OFFLINE := 1
export TOKENIZERS_PARALLELISM := false

.PHONY: demo test check lint types notebooks docs bench bench-test stress demo-weights upgrade test-newest clean

demo: .stamp-demo
	$(BIN)/circuits demo --out demo-out

# Everything, then one case of every test with the shapes and dtypes of all signatures checked.
test: .stamp-install
	$(BIN)/python -m pytest --numprocesses auto --dist worksteal
	$(BIN)/python -m pytest --numprocesses auto --dist worksteal --one-each $(CHECKED)

check: lint types docs test notebooks

lint: .stamp-install
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/python -m pytest --collect-only -qqq # every test file imports, before minutes are spent on the others

types: .stamp-install
	$(BIN)/mypy

notebooks: .stamp-install
	$(BIN)/python notebooks/execute.py

# The pages with a reference of all public names: site/index.html. A broken link or a missing docstring stops it.
docs: .stamp-install
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --quiet

# Large counts of what the suite tries a few times: thousands of interrupts, damaged files, random models. Over an hour.
stress: .stamp-install
	for script in stress/[a-z]*.py; do $(BIN)/python $$script --json || exit 1; done

bench: .stamp-install
	for script in benchmarks/[a-z]*.py; do $(BIN)/python $$script --json || exit 1; done

# Every benchmark on a tiny shape: that it runs, and that what it says follows from what it measured.
bench-test: .stamp-install
	$(BIN)/python -m pytest --numprocesses auto benchmarks/tests

# Rebuilds the shipped weights from their seed on one thread, and fails if a single byte differs.
demo-weights: .stamp-install
	$(BIN)/python -m hooks.demo.build --check

# The newest of everything within the bounds of pyproject.toml, written to locks/; torch stays unless TORCH names another.
upgrade:
	$(PYTHON) -m venv --clear .venv-upgrade
	.venv-upgrade/bin/python -m pip install --quiet pip-tools
	.venv-upgrade/bin/python locks/upgrade.py --torch="$(TORCH)"

# The suite on the newest of everything within those bounds, so that drift is seen before the lock is raised. What the
# bounds keep out is tried by name: make test-newest BEYOND="transformers transformer-lens"
test-newest:
	$(PYTHON) -m venv --clear .venv-newest
	.venv-newest/bin/python -m pip install --quiet "pip>=25.1"
	.venv-newest/bin/python -m pip install --quiet $(TORCH)
	.venv-newest/bin/python -m pip install --quiet --editable ".[all]" --group dev --group docs
	$(if $(BEYOND),.venv-newest/bin/python -m pip install --quiet --upgrade $(BEYOND))
	.venv-newest/bin/python -m pip freeze --exclude-editable
	.venv-newest/bin/python -c "from hooks.kernels.rows_in_place import compiled; compiled()"
	.venv-newest/bin/python -m pytest --numprocesses auto --dist worksteal
	.venv-newest/bin/python -m pytest --numprocesses auto --dist worksteal --one-each $(CHECKED)

.stamp-venv: locks/build.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python $(LOCKED) locks/build.txt
	touch $@

.stamp-demo: .stamp-venv pyproject.toml locks/demo.txt locks/torch.txt
	$(BIN)/python $(LOCKED) locks/demo.txt
	$(BIN)/python -m pip install --quiet $(TORCH) # behind the lock: what it needs besides is there then
	$(BIN)/python $(EDITABLE) .
	touch $@

.stamp-install: .stamp-venv pyproject.toml locks/all.txt locks/torch.txt
	$(BIN)/python $(LOCKED) locks/all.txt
	$(BIN)/python -m pip install --quiet $(TORCH)
	$(BIN)/python $(EDITABLE) .
	$(BIN)/python -c "from hooks.kernels.rows_in_place import compiled; compiled()" # once, and not in the midst of a first graph
	touch $@

clean:
	rm -rf $(VENV) .venv-upgrade .venv-newest .stamp-* demo-out site build *.egg-info

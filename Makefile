# make demo       set up .venv, then fine-tune the bundled model and show what changed
# make test       set up .venv, then lint, types, import floors and all tests (at most 8 minutes on 2 cores)
# make test-full  the whole product of methods, families and precisions, and results/test-full.json
PYTHON ?= python3
BIN := .venv/bin
# One thread a process and one process a core: torch's threads fight each other otherwise.
WORKERS ?= 2
TEST := OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -n $(WORKERS) --dist worksteal

.PHONY: demo test test-full install clean

demo: install
	$(BIN)/fitune demo

test: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(TEST)

test-full: install
	mkdir -p build
	FITUNE_TESTS=full $(TEST) -m "" --junitxml build/test-full.xml
	$(BIN)/python scripts/record_tests.py build/test-full.xml results/test-full.json
	$(BIN)/python scripts/planted_faults.py
	$(BIN)/python scripts/torture.py --minutes 10 --seed 1

install: .venv/installed

# torch first and by its exact version, so that no other package picks a build of its own.
.venv/installed: pyproject.toml src/fitune/constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet "$$(grep '^torch==' src/fitune/constraints.txt)"
	$(BIN)/python -m pip install --quiet --constraint src/fitune/constraints.txt --editable '.[dev]'
	touch $@

clean:
	rm -rf .venv build .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis

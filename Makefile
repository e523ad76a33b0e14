# Every target sets up .venv first, if it is not there.
#
# make demo       fine-tune the bundled model and show what changed
# make unit       the tests that need no process and no training
# make test       lint, types and all tests but the whole product
# make test-full  the whole product of methods, families and precisions, and results/test-full.json
# make lessons    run the lessons of examples/ and compare their figures with the notebooks
# make docs       the docs site, in build/site; a dead link ends it
# make fmt        sort imports, fix what ruff can, format
# make lint       ruff, the format, and which folder imports which
# make types      mypy in strict mode: sources, tests, scripts, benchmarks
PYTHON ?= python3
BIN := $(if $(filter Windows_NT,$(OS)),.venv/Scripts,.venv/bin)
# One thread a process and one process a core: torch's threads fight each other otherwise.
WORKERS ?= 2
# PYTHONUTF8: tests read and write text as UTF-8 on Windows too, where Python's default is another; fitune names it itself.
# PYTHONDONTWRITEBYTECODE: where it is set, pytest would rewrite all tests in each worker of every run, 6 s of each.
TEST := OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 PYTHONUTF8=1 PYTHONDONTWRITEBYTECODE= $(BIN)/python -m pytest -n $(WORKERS) --dist worksteal

.PHONY: demo lessons docs unit test test-full fmt lint types bytecode install clean

demo: install
	$(BIN)/fitune demo

lessons: install
	HF_HUB_OFFLINE=1 $(BIN)/python scripts/lessons.py

docs: install
	$(BIN)/python -m pip install --quiet --constraint src/fitune/constraints.txt --editable '.[docs]'
	$(BIN)/python scripts/site.py
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet --config-file build/mkdocs.yml

unit: bytecode
	$(TEST) -m "unit and not full"

test: install
	$(MAKE) -j2 lint types bytecode
	$(TEST)

fmt: install
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports

# mypy's workers have three seconds to begin, which a busy machine may not give them: then one process does it.
types: install
	$(BIN)/mypy --num-workers $(WORKERS) || $(BIN)/mypy

test-full: bytecode
	mkdir -p build
	FITUNE_TESTS=full $(TEST) -m "" --junitxml build/test-full.xml
	$(BIN)/python scripts/record_tests.py build/test-full.xml results/test-full.json
	$(BIN)/python scripts/planted_faults.py
	$(BIN)/python scripts/torture.py --minutes 10 --seed 1

# Once, for the many processes that tests start: where PYTHONDONTWRITEBYTECODE is set each would compile fitune anew.
bytecode: install
	$(BIN)/python -m compileall -q src

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

# make demo: train a small SPRINT model on digits and draw a sample grid (about 3 minutes on two CPU cores)
# make test: minutes; every room, and one run of the pipeline      make test-all: everything that needs no GPU
# make check: lint, types, docs, package                           make docs: serve the documentation

PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/python -m pip -qq --disable-pip-version-check
# One process per core, each with one thread: small work is slower on more.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --maxprocesses 8 -q

.PHONY: demo test test-all test-slow check package docs clean
.DELETE_ON_ERROR:
.SILENT: .venv/test .venv/dev

demo: .venv/test
	$(BIN)/python examples/quickstart.py $(ARGS)

test: .venv/test
	$(PYTEST) $(ARGS)

test-all: test test-slow

test-slow: .venv/test
	$(PYTEST) -m "slow and not gpu" $(ARGS)

check: .venv/dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright
	$(BIN)/mkdocs build --strict
	$(MAKE) package

package: .venv/dev  # build sdist and wheel, install each into an empty folder, import it from there
	rm -rf dist build
	$(BIN)/python -m build --quiet
	for file in dist/*.whl dist/*.tar.gz; do \
		$(BIN)/python -m pip install --quiet --no-deps --target build/$$(basename $$file) $$file && \
		(cd build/$$(basename $$file) && ../../$(BIN)/python -c \
			"import sprint, pathlib; assert pathlib.Path(sprint.__file__).is_relative_to(pathlib.Path.cwd()); \
			assert pathlib.Path('sprint/py.typed').exists(); print('$$file', sprint.__version__)") || exit 1; \
	done

docs: .venv/dev
	$(BIN)/mkdocs serve

.venv/%: pyproject.toml constraints.txt
	echo "setting up .venv, some minutes the first time"
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(PIP) install --upgrade pip
	$(PIP) install --constraint constraints.txt --editable '.[$*]'
	touch $@

clean:
	rm -rf .venv build dist site out

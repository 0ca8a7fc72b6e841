# make demo: train a small SPRINT model on digits and draw a sample grid (about 4 minutes on two CPU cores)
# make test: run the tests                                  make check: lint, types, docs, package

PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test check docs clean
.DELETE_ON_ERROR:

demo: .venv/test
	$(BIN)/python examples/quickstart.py $(ARGS)

test: .venv/test
	$(BIN)/python -m pytest $(ARGS)

check: .venv/dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright
	$(BIN)/mkdocs build --strict
	rm -rf dist && $(BIN)/python -m build
	$(BIN)/python -m pytest -m package

docs: .venv/dev
	$(BIN)/mkdocs serve

.venv/%: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[$*]'
	touch $@

clean:
	rm -rf .venv build dist site out

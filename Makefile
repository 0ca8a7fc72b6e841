# make demo: train a small SPRINT model on digits and draw a sample grid (about 3 minutes on two CPU cores)
# make test: run the tests                                  make check: lint, types, docs, package

PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test check package docs clean
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
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[$*]'
	touch $@

clean:
	rm -rf .venv build dist site out

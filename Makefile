# Every target sets up what it needs in .venv; PYTHON chooses the interpreter it is made from, after "make clean".
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

# Two targets at once would install into one environment at once.
.NOTPARALLEL:
.PHONY: pretrain test lint format bench gpu-check clean

pretrain: $(VENV)/train.stamp
	$(BIN)/moco-fast pretrain $(ARGS)

test: $(VENV)/test.stamp
	GOMP_SPINCOUNT=2000 $(BIN)/python -m pytest -n auto --maxprocesses 4 --dist loadfile $(ARGS)

lint: $(VENV)/test.stamp
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror csrc/*.cpp csrc/*.cu csrc/*.h tests/*/*.h tests/*/*.cpp
	$(BIN)/mypy

format: $(VENV)/test.stamp
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i csrc/*.cpp csrc/*.cu csrc/*.h tests/*/*.h tests/*/*.cpp

bench: $(VENV)/test.stamp
	$(BIN)/python -m bench --readme README.md $(ARGS)
	$(BIN)/python -m bench.step --readme README.md $(ARGS)

# Build, benchmark, GPU tests and compute-sanitizer, on a machine with a GPU; without one it says so and exits 2.
gpu-check: $(VENV)/test.stamp
	$(BIN)/python bench/gpu_check.py $(ARGS)

clean:
	rm -rf $(VENV) build dist moco_fast.egg-info moco_fast/_C.*.so moco_fast/_build_info.json
	rm -rf .pytest_cache .mypy_cache .ruff_cache .benchmarks
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# Installed editable, and again whenever what is compiled or declared changes.
SOURCES := setup.py pyproject.toml $(wildcard csrc/*)

$(VENV)/train.stamp: $(SOURCES) | $(BIN)/pip
	@echo "Installing moco_fast and PyTorch into $(VENV); the first time this downloads a few GB."
	$(BIN)/python -m pip install --editable ".[train]"
	touch $@

$(VENV)/test.stamp: $(SOURCES) | $(BIN)/pip
	@echo "Installing moco_fast, PyTorch and the test tools into $(VENV); the first time this downloads a few GB."
	$(BIN)/python -m pip install --editable ".[train,test,lint]"
	touch $@

# Debian and Ubuntu keep what venv needs in a package of its own, which root can install here and now.
$(BIN)/pip:
	$(PYTHON) -m venv $(VENV) || { \
	  echo "Installing python3-venv, without which this Python makes no virtual environments."; \
	  apt-get update -qq && apt-get install -y -qq python3-venv && $(PYTHON) -m venv --clear $(VENV); } || { \
	  rm -rf $(VENV); echo "No virtual environment: run 'apt-get install python3-venv' as root, or set PYTHON."; exit 1; }

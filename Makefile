# Everything a fresh machine with Python >= 3.11 and pip needs: `make train`, `make test`.
PYTHON ?= python3
ARGS ?=
FAULTS ?= runs/faults
BIN := .venv/bin
# Python keeps compiled modules, even where the environment forbids it: otherwise every start of it,
# of which the tests have many, compiles some 1,700 modules again.
unexport PYTHONDONTWRITEBYTECODE
READY := .venv/.ready
TESTABLE := .venv/.testable
UV = $(shell command -v uv || echo $(BIN)/uv)
FAST := tests/test_imports.py tests/test_config.py tests/test_command_line.py tests/runs/test_files.py \
  tests/models/test_layers.py tests/training/test_losses.py tests/training/test_optimizer.py

.DEFAULT_GOAL := help
.PHONY: help train results docs test test-all test-newest test-faults lint format clean cuda tpu imagenet

help: ## Show this list
	@sed -n 's/^\([a-z -]*\):.*## \(.*\)/  make \1\t\2/p' Makefile

train: $(READY) ## Train the digits example; more flags: make train ARGS="--config.seed=1"
	$(BIN)/python -m densejax.main --config=configs/digits.py $(ARGS)

results: $(READY) ## Write the study's tables and figures from its runs: make results ROOT=FOLDER
	for part in study depth growth shapes time; do folder=experiments/results/study_connections/$$part; \
	  $(BIN)/python experiments/report.py --root=$(ROOT)/$$part --output=$$folder || exit 1; \
	  rm $$folder/index.html $$folder/*training_seconds*; done # runs shared a machine: no times
	cp $(ROOT)/time/patterns_equal_time/training_time.json experiments/results/study_connections/time
	$(BIN)/python docs/generate.py --only study_patterns study_comparisons study_time study_depth \
	  study_growth_rates study_growth_schedule study_depth_width

docs: $(READY) ## Write the tables and pictures of docs/ that the code knows
	$(BIN)/python docs/generate.py $(ARGS)

test: $(TESTABLE) ## Run the tests, without the slow ones
	$(BIN)/python -m pytest -n 2 --dist worksteal -m "not slow" $(ARGS)

test-all: $(TESTABLE) ## Run all the tests, and say why some are skipped
	$(BIN)/python -m pytest -n 2 --dist worksteal -m "" -rs $(ARGS)

test-newest: $(TESTABLE) ## Run fast tests with Python 3.13 and the newest versions of what it installs
	$(UV) run --isolated --no-project --python 3.13 --with-editable '.[dev]' \
	  python -m pytest -m "not slow" $(FAST) $(ARGS)

test-faults: $(TESTABLE) ## Hurt real runs some 900 times and count what survives (most of an hour)
	$(BIN)/python experiments/faults.py --folder=$(FAULTS) $(ARGS)

cuda tpu imagenet: $(READY) ## Add what NVIDIA GPUs (make cuda), TPUs (make tpu) or streams (make imagenet) need
	UV_PROJECT_ENVIRONMENT=.venv $(UV) $(SYNC) --extra $@ --python $(BIN)/python

lint: $(TESTABLE) ## Check style and formatting
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(TESTABLE) ## Correct what can be corrected by itself
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean: ## Remove the environment and what the tools keep (never runs/)
	rm -rf .venv .pytest_cache .ruff_cache dist build *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# The versions of uv.lock, by a uv on the PATH or else by one installed into the environment.
# --inexact: what was added by hand (jax[cuda13], that uv) stays. Without any uv, pip installs the
# newest versions that pyproject.toml allows, and says so.
SYNC := sync --quiet --frozen --inexact
$(READY): EXTRA := plots
$(TESTABLE): EXTRA := dev
$(READY) $(TESTABLE): export UV_PROJECT_ENVIRONMENT := .venv
$(READY) $(TESTABLE): pyproject.toml uv.lock
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo \
	  "PYTHON=$(PYTHON): Python 3.11 or newer is needed; name one: make PYTHON=python3.12"; exit 1; }
	@echo "Installing packages into .venv; the first time takes a few minutes."
	@uv --version >/dev/null 2>&1 || $(PYTHON) -m venv .venv
	@if uv --version >/dev/null 2>&1; then \
	  uv $(SYNC) --extra $(EXTRA) --python "$(PYTHON)"; \
	elif $(BIN)/python -m pip install --quiet uv; then \
	  $(BIN)/uv $(SYNC) --extra $(EXTRA) --python $(BIN)/python; \
	else \
	  echo "uv cannot be had: pip installs without the pins of uv.lock"; \
	  $(BIN)/python -m pip install --quiet --editable '.[$(EXTRA)]'; \
	fi
	@touch $@

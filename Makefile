PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin

.PHONY: install quickstart test lint types clean

install: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check torch torchvision
	$(BIN)/pip install --quiet --disable-pip-version-check --editable '.[dev]'
	touch $@

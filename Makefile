# `make demo` and `make test` work on a machine that has Python 3.11 and pip, and nothing else.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt
OUT ?= demo

.PHONY: install demo test lint clean

install: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP) --editable .
	touch $@

$(VENV)/.tested: $(VENV)/.installed
	$(PIP) --editable '.[test]'
	touch $@

demo: install
	$(BIN)/ddpm train digits --out $(OUT)/run
	$(BIN)/ddpm sample $(OUT)/run -n 64 --steps 250 --out $(OUT)/digits.png
	$(BIN)/ddpm sample $(OUT)/run -n 8 --steps 250 --progressive --out $(OUT)/progressive.png
	$(BIN)/ddpm sample $(OUT)/run -n 200 --steps 250 --out $(OUT)/samples.npz
	$(BIN)/python examples/digits_report.py $(OUT)/samples.npz
	@echo "pictures: $(OUT)/digits.png, $(OUT)/progressive.png"

test: $(VENV)/.tested
	$(BIN)/python -m pytest

lint: $(VENV)/.tested
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:
	rm -rf $(VENV) $(OUT) build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis

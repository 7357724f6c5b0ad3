PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test test-slow bench lint clean

demo: .venv/installed
	$(BIN)/python -m examples.demo

test: lint
	$(BIN)/python -m pytest -n 2

test-slow: .venv/installed
	$(BIN)/python -m pytest -n 2 -m slow

# DATA=folder with mnist.npz; from OpenML without.
bench: .venv/installed
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[bench]'
	$(BIN)/python -m examples.bench $(if $(DATA),--data-dir $(DATA))

lint: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# constraints.txt is for this environment only: it picks the CPU build where one is at hand.
.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

clean:
	rm -rf .venv build artefacts lightning_logs .mypy_cache .pytest_cache .ruff_cache .hypothesis

# Each target sets up .venv by itself when needed, from python3 (3.10 or newer) alone.

PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test lint parity clean

demo: .venv/installed
	$(BIN)/python -m mlx_vae.decode examples/data/astronaut.safetensors -o demo.png
	@echo "The picture is in demo.png"

test: .venv/installed
	$(BIN)/python -m pytest -m "not parity"

lint: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

parity: .venv/installed-parity
	$(BIN)/python -m pytest -m "parity or coreml"

clean:
	rm -rf .venv build *.egg-info demo.png

.venv/installed: pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
		{ echo "Python 3.10 or newer is needed; name one with: make PYTHON=python3.12 $(MAKECMDGOALS)" >&2; exit 1; }
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable ".[test]"
	touch $@

.venv/installed-parity: .venv/installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable ".[test,parity]"
	touch $@

# The two commands a newcomer needs: `make demo` and `make test`. Each does its own set-up.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed
EXTRAS := audio,cpu,cuda,lab,monitor,ray,trackers,transformers,vision

.PHONY: demo test test-all coverage examples gpu docs lint package release sbom install clean

demo: install
	$(BIN)/normwise compare

test: lint
	$(BIN)/python -m pytest -q -n 2 --dist loadgroup -m "not slow"

test-all: lint
	$(BIN)/python -m pytest -q -n 2 --dist loadgroup

# Lines and branches, of other processes too; then the section of docs/tested.md. ROOMS=tests/decay: a part.
coverage: install
	$(BIN)/python -m pytest -q -n 2 --dist loadgroup -m "not slow" $(ROOMS) \
		--cov --cov-report=json:build/coverage.json --cov-report=html:build/coverage
	$(BIN)/python tools/coverage_section.py build/coverage.json docs/tested.md "make coverage $(if $(ROOMS),ROOMS=\"$(ROOMS)\")"

# What they print and draw is left in build/examples. NAMES="small_gpt fsdp2": some.
examples: install
	$(BIN)/python tools/try_examples.py build/examples $(NAMES)

# On a machine with a CUDA device, in whatever environment PYTHON is of: it installs nothing.
gpu:
	PYTHONPATH=src $(PYTHON) benchmarks/gpu.py --json docs/results/gpu.json

# Open build/site/index.html, or `python -m http.server -d build/site` for the search.
docs: install
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo

package: install
	$(BIN)/python tools/release.py

release: install
	$(BIN)/python tools/release.py $(or $(VERSION),$(error say which: make release VERSION=0.2.0))

# A list is made of what is installed: here every extra for users, in an environment of its own.
sbom:
	$(PYTHON) -m venv --clear build/extras
	build/extras/bin/pip install --quiet --constraint constraints.txt packaging ".[$(EXTRAS)]"
	build/extras/bin/python tools/sbom.py build/sbom

install: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --constraint constraints.txt --editable ".[lab,docs,dev]"
	touch $(STAMP)

clean:
	rm -rf $(VENV) build dist .mypy_cache .pytest_cache .ruff_cache src/*.egg-info

# Everything installs into .venv; a fresh machine needs Python 3.11 or 3.12 with venv, and make.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
PIP    := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt

.PHONY: demo test check clean

demo: $(VENV)/demo.stamp
	$(BIN)/anatomynet-client phantom demo/study --overwrite
	$(BIN)/anatomynet-client segment demo/study --output demo/rtstruct.dcm --picture demo/picture.png --overwrite
	$(BIN)/anatomynet-client review demo/study demo/rtstruct.dcm --reference demo/study.truth.dcm \
	    --output demo/review.html --overwrite
	@echo "RTSTRUCT demo/rtstruct.dcm, picture demo/picture.png"
	@echo "Open in a browser: $(CURDIR)/demo/review.html"

test: $(VENV)/dev.stamp
	$(BIN)/python -m pytest

check: $(VENV)/dev.stamp
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy -p anatomynet.engine -p anatomynet.export -p anatomynet.client
	$(BIN)/mypy tests benchmarks

clean:
	rm -rf $(VENV) build dist demo src/*.egg-info

$(VENV)/demo.stamp: pyproject.toml constraints.txt | $(BIN)/python
	$(PIP) --editable '.[local]'
	touch $@

$(VENV)/dev.stamp: pyproject.toml constraints.txt | $(BIN)/python
	$(PIP) --editable '.[dev]'
	touch $@

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

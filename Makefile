# Everything installs into .venv; a fresh machine needs Python 3.11 or 3.12 with venv, and make.
PYTHON ?= python3
# Processes that test; each takes about 2 GB, and the servers that it starts beside.
WORKERS ?= 2
VENV   := .venv
BIN    := $(VENV)/bin
PIP    := $(BIN)/python -m pip install --quiet --disable-pip-version-check \
	--constraint constraints.txt --constraint requirements.lock

.PHONY: demo test check lock sbom audit clean

demo: $(VENV)/demo.stamp
	$(BIN)/anatomynet-client phantom demo/study --overwrite
	$(BIN)/anatomynet-client segment demo/study --output demo/rtstruct.dcm --picture demo/picture.png --overwrite
	$(BIN)/anatomynet-client review demo/study demo/rtstruct.dcm --reference demo/study.truth.dcm \
	    --output demo/review.html --overwrite
	@echo "RTSTRUCT demo/rtstruct.dcm, picture demo/picture.png"
	@echo "Open in a browser: $(CURDIR)/demo/review.html"

# A file's tests share what they set up, so each goes to one process whole. Threads that wait leave the other's core.
# One that hung or crashed would do so again.
test: $(VENV)/dev.stamp
	OMP_WAIT_POLICY=passive $(BIN)/python -m pytest --numprocesses $(WORKERS) --dist loadfile --no-loadscope-reorder \
	    --max-worker-restart 0

check: $(VENV)/dev.stamp
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy -p anatomynet.engine -p anatomynet.export -p anatomynet.client -m anatomynet.start
	$(BIN)/mypy tests benchmarks deploy/lock.py

# After a change of a dependency: install it, then write down what it brought.
lock:
	$(BIN)/python deploy/lock.py > requirements.lock.new
	mv requirements.lock.new requirements.lock

# Every package of the environment with its licence, as CycloneDX JSON.
sbom: $(VENV)/dev.stamp
	$(BIN)/cyclonedx-py environment --pyproject pyproject.toml --output-reproducible --of JSON -o sbom.json \
	    $(BIN)/python

# Known vulnerabilities of what is locked; asks a public database, so not a part of `make test`. In an environment of
# its own: what it brings is not locked.
audit:
	$(PYTHON) -m venv $(VENV)-audit
	$(VENV)-audit/bin/python -m pip install --quiet --disable-pip-version-check pip-audit
	$(VENV)-audit/bin/pip-audit --requirement requirements.lock \
	    --requirement deploy/container/requirements-gpu.lock --no-deps --disable-pip

clean:
	rm -rf $(VENV) $(VENV)-audit build dist demo src/*.egg-info

$(VENV)/demo.stamp: pyproject.toml constraints.txt requirements.lock | $(BIN)/python
	$(PIP) --editable '.[local]'
	touch $@

$(VENV)/dev.stamp: pyproject.toml constraints.txt requirements.lock | $(BIN)/python
	$(PIP) --editable '.[dev]'
	touch $@

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

# make test     sets up .venv if need be, then runs the tests
# make soak     what kills runs at every moment there is; takes half an hour
# make demo     the method on the embedded world; sets up .venv if need be, then takes minutes
# make install  sets up .venv
# make lint     ruff, check only
# make format   ruff, in place
PYTHON ?= python3
VENV ?= .venv
STAMP = $(VENV)/.installed

.PHONY: test soak demo install lint format

test: install
	$(VENV)/bin/python -m pytest

soak: install
	$(VENV)/bin/python -m pytest -m soak

demo: install
	$(VENV)/bin/python tools/demo.py

install: $(STAMP)

$(STAMP): requirements.txt
	$(PYTHON) -c 'import sys; assert sys.version_info >= (3, 9), "Python 3.9 or newer is needed"'
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet --upgrade pip
	$(VENV)/bin/python -m pip install --quiet -r requirements.txt
	touch $@

lint: install
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .

format: install
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .

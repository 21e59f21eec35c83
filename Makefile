# make install  set up .venv; the other targets do this first
# make demo     train and compare methods on the toy world, in minutes
# make app      try the method in a browser: installs gradio into .venv and starts a page on this machine
# make test     run the tests and report line coverage
# make soak     kill runs at every possible moment; half an hour
# make mutants  mutation testing: change the arithmetic of the method and count the changes that the tests notice
# make lint     check style with ruff
# make format   fix style with ruff
# make install-cluster  what sweeps on Slurm need
PYTHON ?= python3
VENV ?= .venv
STAMP = $(VENV)/.installed

.PHONY: test mutants soak demo app install install-cluster lint format

test: install
	$(VENV)/bin/python -m pytest --cov

# From scratch, because mutmut does not notice changed tests. One thread each, because two workers share the cores.
mutants: $(VENV)/.mutmut
	rm -rf mutants
	OMP_NUM_THREADS=1 $(VENV)/bin/python -m mutmut run
	$(VENV)/bin/python tests/mutants.py

$(VENV)/.mutmut: $(STAMP)
	$(VENV)/bin/python -c 'import sys; assert sys.version_info >= (3, 10), "mutmut requires Python 3.10 or newer"'
	$(VENV)/bin/python -m pip install --quiet 'mutmut>=3.8,<4'
	touch $@

soak: install
	$(VENV)/bin/python -m pytest -m soak

demo: install
	$(VENV)/bin/python toy/demo.py

app: $(VENV)/.app
	$(VENV)/bin/python tools/app.py

$(VENV)/.app: $(STAMP) requirements-app.txt
	$(VENV)/bin/python -c 'import sys; assert sys.version_info >= (3, 10), "gradio requires Python 3.10 or newer"'
	$(VENV)/bin/python -m pip install --quiet -r requirements-app.txt
	touch $@

install: $(STAMP)

$(STAMP): requirements.txt
	$(PYTHON) -c 'import sys; assert sys.version_info >= (3, 9), "Python 3.9 or newer is required"'
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet --upgrade pip
	$(VENV)/bin/python -m pip install --quiet -r requirements.txt
	touch $@

install-cluster: $(VENV)/.cluster

$(VENV)/.cluster: $(STAMP) requirements-cluster.txt
	$(VENV)/bin/python -m pip install --quiet -r requirements-cluster.txt
	touch $@

lint: install
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .

format: install
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .

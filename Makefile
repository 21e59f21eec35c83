# make test     sets up .venv if need be, then runs the tests and says which lines they run
# make mutants  mutation testing: changes the method's code in 1,500 ways and counts the changes that tests detect
# make soak     what kills runs at every moment there is; takes half an hour
# make demo     the method on the embedded world; sets up .venv if need be, then takes minutes
# make install  sets up .venv
# make lint     ruff, check only
# make format   ruff, in place
PYTHON ?= python3
VENV ?= .venv
STAMP = $(VENV)/.installed

.PHONY: test mutants soak demo install lint format

test: install
	$(VENV)/bin/python -m pytest --cov

# From scratch, because mutmut does not notice changed tests. One thread, because the workers are forked.
mutants: $(VENV)/.mutmut
	rm -rf mutants
	OMP_NUM_THREADS=1 $(VENV)/bin/python -m mutmut run
	$(VENV)/bin/python tests/mutants.py

$(VENV)/.mutmut: $(STAMP)
	$(VENV)/bin/python -c 'import sys; assert sys.version_info >= (3, 10), "mutmut needs Python 3.10 or newer"'
	$(VENV)/bin/python -m pip install --quiet 'mutmut>=3.8,<4'
	touch $@

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

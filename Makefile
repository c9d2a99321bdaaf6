# Two commands are all the set-up there is: `make demo` and `make test`.
PYTHON ?= python3
PY = .venv/bin/python

demo: .venv/ready
	$(PY) -m tools.demo

test: .venv/ready
	$(PY) -m pytest -q test_all.py

test-tools: .venv/ready
	$(PY) -m pytest -q tools recipes

test-long: .venv/ready
	LONG=1 $(PY) -m pytest -q test_all.py tools recipes

test-gpu: .venv/ready
	$(PY) -m pytest -q -k gpu test_all.py

lint: .venv/ready
	$(PY) -m ruff check .

.venv/ready: requirements.txt requirements-dev.txt
	test -x $(PY) || $(PYTHON) -m venv .venv
	.venv/bin/pip install -q -r requirements.txt -r requirements-dev.txt
	touch .venv/ready

clean:
	rm -rf .venv out

.PHONY: demo test test-tools test-long test-gpu lint clean

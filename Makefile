# Two commands are all the set-up there is: `make demo` and `make test`.
PYTHON ?= python3
PY = .venv/bin/python

demo: .venv/ready
	$(PY) demo.py

test: .venv/ready
	$(PY) -m pytest -q -n auto --maxprocesses 4 test_kernels.py test_all.py

test-gpu: .venv/ready
	$(PY) -m pytest -q -k gpu test_kernels.py test_all.py

.venv/ready: requirements.txt
	test -x $(PY) || $(PYTHON) -m venv .venv
	.venv/bin/pip install -q -r requirements.txt
	touch .venv/ready

clean:
	rm -rf .venv out

.PHONY: demo test test-gpu clean

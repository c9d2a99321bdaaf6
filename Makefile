# Two commands are all the set-up there is: `make demo` and `make test`.
PYTHON ?= python3
PY = .venv/bin/python
TESTS = test_kernels.py test_engine.py test_dryrun.py test_data.py test_training.py test_ppo.py test_bench.py \
	test_docs.py test_mistakes.py test_serve.py test_plan.py test_look.py

demo: .venv/ready
	$(PY) demo.py

test: .venv/ready
	$(PY) -m pytest -q -n auto --maxprocesses 4 $(TESTS)

gpu:
	./gpu.sh $(OUT)

lint: .venv/ready
	$(PY) -m ruff check .

test-long: .venv/ready
	FLATRLHF_LONG=1 $(PY) -m pytest -q -n auto --maxprocesses 4 $(TESTS)

test-gpu: .venv/ready
	$(PY) -m pytest -q -k gpu test_kernels.py test_engine.py

.venv/ready: requirements.txt
	test -x $(PY) || $(PYTHON) -m venv .venv
	.venv/bin/pip install -q -r requirements.txt
	touch .venv/ready

clean:
	rm -rf .venv out

.PHONY: demo test test-long gpu lint test-gpu clean

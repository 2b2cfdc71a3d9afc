# Two commands need nothing but Python 3.11 (or 3.12) and a C++ compiler: make demo, make test.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

.PHONY: demo test nightly notebooks lock audit lint format clean

demo: $(VENV)/.base
	$(BIN)/python train.py --flagfile=configs/tiny_cpu.flags
	$(BIN)/python -m llama_fn.tools.chart work/tiny_cpu
	$(BIN)/python -m llama_fn.tools.generate --source=work/tiny_cpu --prompt="def " --tokens=60 --temperature=0.7 --top_k=40
	@echo "Go on with:"
	@echo "  $(BIN)/python train.py --flagfile=configs/tiny_cpu.flags --run.steps=1000 --run.accept_changes"
	@echo "  $(BIN)/python -m llama_fn.tools.evaluate --source=work/tiny_cpu --path=README.md --seq_len=128"
	@echo "  $(BIN)/python -m llama_fn.tools.plan --flagfile=configs/llama_65b_32npu.flags"

test: $(VENV)/.test lint
	OMP_WAIT_POLICY=PASSIVE $(BIN)/python -m pytest -q -n auto --maxprocesses=4 --dist=loadfile --no-loadscope-reorder

nightly: $(VENV)/.test
	$(BIN)/python -m pip install --quiet -e '.[eval,cluster,notebook,wandb,mlflow,prometheus]'
	$(BIN)/python -m pytest -q -m "slow or not slow"
	$(MAKE) audit

# Every package but torch, at one version, with the hashes of its files (BUILD.md).
lock: $(VENV)/.base
	$(BIN)/python -m pip install --quiet uv
	$(BIN)/uv pip compile --quiet --universal --python-version 3.11 --generate-hashes --no-emit-index-url \
	  --no-emit-package torch --no-annotate --custom-compile-command "make lock" --extra viz --extra data --extra test \
	  --output-file requirements.lock pyproject.toml

# Asks PyPI for known vulnerabilities of what the lock names.
audit: $(VENV)/.base
	$(BIN)/python -m pip install --quiet pip-audit
	$(BIN)/pip-audit --disable-pip --require-hashes --requirement requirements.lock

notebooks: $(VENV)/.base
	$(BIN)/python -m pip install --quiet -e '.[notebook]'
	$(BIN)/jupytext --quiet --to ipynb notebooks/*.py
	@echo "Open them with $(BIN)/jupyter lab notebooks"

lint: $(VENV)/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/.test
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

$(VENV)/.base: pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info[:2] not in ((3, 11), (3, 12)) and "llama_fn needs Python 3.11 or 3.12, this is " + sys.version)'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet torch==2.13.0
	$(BIN)/python -m pip install --quiet -e '.[viz]'  # charts
	touch $@

$(VENV)/.test: $(VENV)/.base
	$(BIN)/python -m pip install --quiet -e '.[test]'
	touch $@

clean:
	rm -rf $(VENV) work .pytest_cache .mypy_cache .ruff_cache

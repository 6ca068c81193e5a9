# `make demo` and `make test` are the two commands to know; both stand on `make venv`.

PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python
STAMP := $(VENV)/installed
SOURCES := pyproject.toml setup.py constraints.txt $(shell find csrc -type f)

.DEFAULT_GOAL := help
.PHONY: help venv demo test test-all lint bench report peers triton36 aot gpu-check gpu-sanitize clean

help:  ## this list
	@grep -hE '^[a-z0-9-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

venv: $(STAMP)  ## the environment in .venv, from pyproject.toml and constraints.txt

# The mark `installing` stands until the installation is complete: finding it means that the last one was interrupted,
# and a half-written package is not something pip can see, so the environment is made anew.
$(STAMP): $(SOURCES)
	@if [ -e $(VENV)/installing ] || ! $(RUN) -m pip --version >/dev/null 2>&1; then rm -rf $(VENV); fi
	@[ -d $(VENV) ] || $(PYTHON) -m venv $(VENV)
	@touch $(VENV)/installing
	$(RUN) -m pip install -q -c constraints.txt -e '.[test,bench]'
	@rm $(VENV)/installing && touch $@

demo: venv  ## train a small language model with tp=2 x pp=2 on four processes, and prove it
	$(RUN) -m tpmp_kernels train examples/demo.toml

# What is about deaths and deadlines has the machine for itself; all else runs on two workers.
TIMED := $(addprefix tests/,$(addsuffix .py,$(addprefix comm/test_,agreement backend_life emulated faults lifecycle mismatches \
    native out_of_band overlap_timed shm_transfers shm_transport) test_bench_comm training/test_launch pipeline/test_two_hosts \
    pipeline/test_prediction pipeline/test_validate))
# By file, those that take long and are few in a file first.
TWO := -n 2 --dist loadfile --no-loadscope-reorder tests/training $(TIMED:%=--ignore=%)

# Hundreds of processes import the package: where the environment forbids bytecode, each would compile it anew.
PYTEST := PYTHONDONTWRITEBYTECODE= $(RUN) -m pytest

test: venv  ## the tests: a seeded sample of every large grid
	OMP_NUM_THREADS=1 $(PYTEST) -m 'not gpu and not full' $(TWO) tests
	$(PYTEST) -m 'not gpu and not full' $(TIMED)

test-all: venv  ## the full grids too
	OMP_NUM_THREADS=1 $(PYTEST) -m 'not gpu' $(TWO) tests
	$(PYTEST) -m 'not gpu' $(TIMED)

lint: venv  ## ruff
	$(RUN) -m ruff check . && $(RUN) -m ruff format --check .

bench: venv  ## the CPU benchmarks; rows go to benchmarks/results/
	$(RUN) -m pytest benchmarks

report: venv  ## the README's tables, made from the committed rows
	$(RUN) -m benchmarks.report

peers: venv  ## the optional peers that benchmarks compare with
	$(RUN) -m pip install -q -c constraints.txt -e '.[hf,liger]'
	$(RUN) -m pip install -q --no-deps megatron-core==0.16.1 packaging

triton36:  ## the oldest supported Triton, beside the environment, for ahead-of-time tests
	$(PYTHON) -m pip install -q --target .triton36 --no-deps triton==3.6.0

aot: venv triton36  ## every kernel on every shipped tile of four architectures, compiled by the newest and the oldest Triton
	OMP_NUM_THREADS=1 $(RUN) -m pytest -m 'not gpu' -n 2 tests/kernels -k aot

# On a GPU machine nothing can be installed: this uses the machine's own Python, and collects the files for it alone,
# because others import what such a machine lacks (hypothesis).
gpu-check:  ## on a GPU machine: the gpu tests and benchmarks, table last, rows under $$OUT; SUITE=kernels or ops: all its cases
	@$(PYTHON) -c "import sys; from importlib.util import find_spec; find_spec('torch') and __import__('torch').cuda.is_available() \
	    or sys.exit('gpu-check: expected torch and a CUDA device, $(PYTHON) finds none; run it on a GPU machine')"
	SUITE=$(SUITE) $(PYTHON) -m pytest -m gpu -o python_files='*_gpu.py' $(if $(SUITE),,tests) benchmarks

gpu-sanitize:  ## on a GPU machine: the kernels' own tests under compute-sanitizer
	compute-sanitizer --error-exitcode 1 $(PYTHON) -m pytest -m gpu -o python_files='*_gpu.py' tests/ops -k 'within or exact'

clean:  ## everything that make made
	rm -rf $(VENV) .triton36 build dist *.egg-info tpmp_kernels/*.so

# make demo    set up .venv and run the main job
# make test    set up .venv and run the tests
# make check   all that continuous integration runs
# JOBS processes share the tests.
# TORCH chooses the torch release; on a machine without a GPU its CPU build is tried first.
PYTHON ?= python3
VENV   ?= .venv
TORCH  ?= 2.13.0
JOBS   ?= 2
BIN    := $(VENV)/bin
PIP    := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt

.DEFAULT_GOAL := help
.PHONY: help demo test check format lint types layers doctests tests notebooks gpu clean

help:           ## show this list
	@grep -hE '^[a-z]+: .*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

demo: $(VENV)/.ready            ## set up, then run the main job on real data
	$(BIN)/lapkit demo

test: tests     ## set up, then run the tests

check: format lint types layers doctests tests notebooks    ## everything CI runs

format: $(VENV)/.ready-dev
	$(BIN)/ruff format --check .
lint: $(VENV)/.ready-dev
	$(BIN)/ruff check .
types: $(VENV)/.ready-dev
	$(BIN)/mypy
layers: $(VENV)/.ready-dev
	$(BIN)/lint-imports
doctests: $(VENV)/.ready-dev
	$(BIN)/pytest --doctest-modules lapkit
notebooks: $(VENV)/.ready-dev
	$(BIN)/pytest --nbmake notebooks -p no:cacheprovider
# One thread a process: small matrices gain nothing from more, and processes that share cores lose by them.
tests: $(VENV)/.ready-dev
	OMP_NUM_THREADS=1 $(BIN)/pytest --numprocesses $(JOBS) --dist loadfile

gpu: $(VENV)/.ready-dev         ## the tests that need a CUDA device
	$(BIN)/pytest -m gpu

clean:          ## remove the environment and what was built
	rm -rf $(VENV) build dist outputs *.egg-info

# torch goes first. As a mere dependency it would be resolved to the newest CUDA build, several gigabytes,
# also where there is no GPU; installed already, it satisfies lapkit and nothing more is fetched.
$(VENV)/.torch:
	$(PYTHON) -m venv $(VENV)
	{ nvidia-smi -L >/dev/null 2>&1 && $(PIP) 'torch==$(TORCH)'; } \
	|| $(PIP) 'torch==$(TORCH)+cpu' 2>/dev/null \
	|| $(PIP) 'torch==$(TORCH)'
	touch $@
$(VENV)/.ready: $(VENV)/.torch pyproject.toml constraints.txt
	$(PIP) --editable '.[plot]'
	touch $@
# The peers that the tests compare with declare torchvision, whose wheel replaces a CPU torch: no dependencies.
$(VENV)/.ready-dev: $(VENV)/.ready tests/peers.txt
	$(PIP) --editable '.[dev]'
	$(PIP) --no-deps -r tests/peers.txt
	touch $@

# `make demo` and `make test` need python3 (3.11 or later) and make, nothing else; they set up .venv by themselves.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
.DEFAULT_GOAL := help

.PHONY: help demo test fuzz check lint types docs dist lock example bench bench-scale test-mergekit test-families test-ecosystem test-serving test-faults test-scale test-ray paper paper-methods paper-smoke clean

help:            ## this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*##/\t/' | expand -t 18

# torch comes first and alone: the pinned version decides which build pip takes, and nothing later replaces it.
$(VENV)/ready: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; assert sys.version_info >= (3, 11), "Python 3.11 or later is needed: make PYTHON=python3.12"'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q -c constraints.txt torch
	$(BIN)/pip install -q -c constraints.txt -e '.[dev]'
	@touch $@

demo: $(VENV)/ready        ## four small checkpoints, planned, merged into a BAM mixture, verified, run
	rm -rf demo
	$(BIN)/bam-merge demo demo

test: $(VENV)/ready        ## the test suite (offline, a process a processor)
	$(BIN)/python -m pytest -n auto

fuzz: $(VENV)/ready        ## 100,000 broken or hostile files and folders, 200 random merges and as many faults (minutes; CASES=, MERGES=, SEED=)
	$(BIN)/python tests/fuzz/run.py --cases $(or $(CASES),100000) --merges $(or $(MERGES),200) --seed $(or $(SEED),0)

lint: $(VENV)/ready        ## ruff: style and formatting; codespell: spelling; import-linter: who may import whom
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/codespell
	$(BIN)/lint-imports --no-cache

types: $(VENV)/ready       ## mypy, strict
	$(BIN)/mypy

docs: $(VENV)/ready        ## the pages of docs/ as a site in build/site; a broken link is an error
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

dist: $(VENV)/ready        ## wheel and source package, each installed in a clean virtual environment and run
	rm -rf dist build/lib
	$(BIN)/python scripts/check_dist.py

lock: $(VENV)/ready        ## constraints.txt anew from pyproject.toml: what is pinned stays, unless a range or UPGRADE=1 says otherwise
	$(BIN)/pip install -q uv
	$(BIN)/uv pip compile pyproject.toml --all-extras --universal --python-version 3.11 --no-annotate --no-emit-index-url \
		--custom-compile-command "make lock" $(if $(UPGRADE),--upgrade,) --output-file constraints.txt

check: lint types docs dist paper-smoke test test-ray  ## all that CI runs

example: $(VENV)/ready     ## the walk-through: a pretrained seed, three branches, every recipe
	$(BIN)/pip install -q -c constraints.txt -e '.[examples]'
	$(BIN)/python examples/smollm2/run.py

bench: $(VENV)/ready       ## speed and memory against cp and mergekit-moe (tens of minutes, tens of GB)
	$(BIN)/python benchmarks/merge.py
	$(BIN)/python benchmarks/verify.py
	$(BIN)/python benchmarks/diff.py

bench-scale: .venv-scale/ready ## what it costs to make a merge in parts and on Ray, against one process (tens of minutes, tens of GB)
	.venv-scale/bin/python benchmarks/overhead.py

paper: $(VENV)/ready       ## the paper's tables in miniature: docs/paper.md (over an hour; goes on where it was stopped)
	$(BIN)/python benchmarks/paper/run.py

paper-methods: $(VENV)/ready ## docs/paper.md's table of makes for shared tensors and of experts that differ (hours; goes on where it was stopped)
	$(BIN)/python benchmarks/paper/methods.py

paper-smoke: $(VENV)/ready ## the same chain at a tiny size, with assertions (a minute)
	$(BIN)/python benchmarks/paper/smoke.py

test-mergekit: .venv-mergekit/ready $(VENV)/ready  ## compare the merge methods with mergekit's, in a venv of its own
	$(BIN)/python benchmarks/mergekit_parity.py --mergekit .venv-mergekit/bin

.venv-mergekit/ready:
	$(PYTHON) -m venv .venv-mergekit
	.venv-mergekit/bin/pip install -q -c constraints.txt torch
	.venv-mergekit/bin/pip install -q mergekit==0.1.5
	@touch $@

# Without what they ask for: it is there, or another torch.
QUANTISERS := bitsandbytes==0.50.2 torchao==0.18.0 optimum-quanto==0.2.7 ninja llmcompressor==0.14.0.1 compressed-tensors==0.20.0 loguru==0.7.3

test-ecosystem: .venv-ecosystem/ready  ## the exported model in Trainer, TRL, PEFT, FSDP2, lm-eval, quantisers and transformers' own model tests, in a venv of its own (an hour)
	.venv-ecosystem/bin/python -m pytest -m ecosystem tests/ecosystem

.venv-ecosystem/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv-ecosystem
	.venv-ecosystem/bin/pip install -q -c constraints.txt torch
	.venv-ecosystem/bin/pip install -q -c constraints.txt -e '.[ecosystem]'
	.venv-ecosystem/bin/pip install -q --no-deps $(QUANTISERS) || echo "quantisers do not install here: their tests are skipped"
	@touch $@

# Each engine has an environment of its own; where its packages do not install, its rows are skipped with a word.
test-serving: $(VENV)/ready .venv-serving-vllm/ready .venv-serving-llama/ready checkpoints/seed  ## merges in vLLM and llama.cpp, token by token beside transformers (tens of minutes)
	$(BIN)/python -m pytest -m serving -rs tests/serving

.venv-serving-vllm/ready:
	scripts/serving_environment.sh vllm $(PYTHON) .venv-serving-vllm

.venv-serving-llama/ready: pyproject.toml constraints.txt
	scripts/serving_environment.sh llama $(PYTHON) .venv-serving-llama

checkpoints/seed: $(VENV)/ready
	$(BIN)/pip install -q -c constraints.txt -e '.[examples]'
	$(BIN)/python examples/smollm2/get_seed.py checkpoints/seed

test-scale: .venv-scale/ready  ## parts on two Ray nodes of this machine, killed and resumed, in a venv of its own (minutes)
	.venv-scale/bin/python -m pytest -m scale -rs tests/scale tests/docs/test_machines_page.py

test-ray: .venv-scale/ready    ## of these what needs under two minutes in all
	.venv-scale/bin/python -m pytest -m 'scale and sampled' -rs tests/scale

.venv-scale/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv-scale
	.venv-scale/bin/pip install -q -c constraints.txt torch
	.venv-scale/bin/pip install -q -c constraints.txt -e '.[dev,ray]'
	@touch $@

test-families: $(VENV)/ready  ## every family and variant through everything that `make test` tries on a few (minutes)
	$(BIN)/python -m pytest -n auto -m families

test-faults: .venv-faults/ready $(VENV)/ready  ## killed, starved and lied to at every system call (minutes; as root with strace, all of it)
	$(BIN)/python -m pytest -m faults -rs tests/faults

.venv-faults/ready:
	$(PYTHON) -m venv .venv-faults
	.venv-faults/bin/pip install -q ckpt-chaos==0.1.8
	@touch $@

clean:           ## remove what the targets above made
	rm -rf $(VENV) .venv-mergekit .venv-ecosystem .venv-serving-* .venv-scale .venv-faults demo build dist *.egg-info

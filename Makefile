# `make demo` and `make test` need nothing but make, Python >= 3.10 and python3-venv; everything else goes into .venv.

PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/installed
# Tests at a time: most wait for processes and time limits. A file's tests stay together, for what they share.
TESTS_AT_A_TIME ?= 4
DEMO_RUN := demo/runs/demo
# Options of tests.fuzz; the long form: make fuzz FUZZ='--cases 200000 --processes 2'
FUZZ ?=

.DEFAULT_GOAL := help
.PHONY: help install demo test test-fast test-gpu test-slurm fuzz test-faults lint types bench gpu-run clean

help:  ## this list
	@sed -n 's/^\([a-z-]*\):.*## */\1	/p' $(MAKEFILE_LIST) | expand -t 12

install: $(STAMP)  ## .venv with the package (editable), the demo's voices and the development tools

$(STAMP): setup.cfg constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' \
		|| { echo "error: $(PYTHON) is missing or older than 3.10; name a newer one: make PYTHON=python3.11" >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null \
		|| { echo "error: $(PYTHON) has no venv module; on Debian: apt install python3-venv" >&2; exit 1; }
	$(PYTHON) -m venv .venv
	$(BIN)/pip install -c constraints.txt -e '.[demo,dev]'
	@touch $@

demo: $(STAMP)  ## synthesise a corpus, shard, train on two processes, evaluate with a language model and without, transcribe
	$(BIN)/python -m synthetic_speech --out demo/corpus
	$(BIN)/python -m ddp_asr.shard demo/corpus/train --out demo/shards/train
	$(BIN)/python -m ddp_asr.shard demo/corpus/test --out demo/shards/test
	OMP_NUM_THREADS=1 $(BIN)/python -m ddp_asr train --processes 2 --config configs/demo.yaml
	$(BIN)/python -m ddp_asr.evaluate $(DEMO_RUN) demo/shards/test --report demo/report
	$(BIN)/python -m ddp_asr.lm --run $(DEMO_RUN) --out demo/lm.arpa.gz
	@set -e; echo "With a beam search and this language model:"; \
		table=$$($(BIN)/python -m ddp_asr.evaluate $(DEMO_RUN) demo/shards/test --decoder configs/decoders/demo.yaml); \
		echo "$$table" | grep '^greedy'
	@set -- $$($(BIN)/python -m synthetic_speech --out demo/corpus --example); \
		echo "A sentence and a voice that training has not met:"; \
		audio=$$1; shift; echo "reference   $$*"; \
		printf 'transcript  '; $(BIN)/python -m ddp_asr.transcribe $(DEMO_RUN) $$audio
	@echo "The run       $(DEMO_RUN)"
	@echo "Comet archive $$(ls $(DEMO_RUN)/comet/*.zip) (upload it with: $(BIN)/comet upload ARCHIVE)"
	@echo "Curves        $(DEMO_RUN)/curves.png"
	@echo "Report        demo/report/index.html (open it in a browser)"

test: $(STAMP)  ## every test this machine can run, but for those on a cluster
	$(BIN)/python -m pytest -n $(TESTS_AT_A_TIME) --dist loadfile --no-loadscope-reorder

test-fast: $(STAMP)  ## the tests without the slow ones
	$(BIN)/python -m pytest -n $(TESTS_AT_A_TIME) --dist loadfile --no-loadscope-reorder -m "not slow and not gpu"

test-gpu: $(STAMP)  ## the tests that need a GPU
	@if $(BIN)/python -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; \
		then $(BIN)/python -m pytest -m gpu; \
		else echo "no GPU here: the tests marked gpu were not run"; fi

test-slurm: $(STAMP)  ## the tests on a real Slurm cluster of namespaces; takes root, and Debian or its packages
	$(BIN)/python -m pytest tests/slurm

fuzz: $(STAMP)  ## bad input for every reader of the program; FUZZ=... are options of tests.fuzz
	$(BIN)/python -m tests.fuzz $(FUZZ)

test-faults: $(STAMP)  ## kills, full disks, lost networks ... in trainings: the short form. FAULTS=... are its options
	$(BIN)/python -m tests.faults --fresh $(FAULTS)

lint: $(STAMP)  ## ruff: rules and format
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(STAMP)  ## mypy
	$(BIN)/mypy

bench: $(STAMP)  ## speed of plan, loader and step, beside peers; a run by the number of processes
	$(BIN)/pip install -c constraints.txt -e '.[bench]'
	$(BIN)/python -m benchmarks.plan
	$(BIN)/python -m benchmarks.loader
	$(BIN)/python -m benchmarks.loader --augment.speeds=0.9,1,1.1 --augment.noise.share=0.5
	$(BIN)/python -m benchmarks.step
	$(BIN)/python -m benchmarks.scaling

gpu-run:  ## all that takes a GPU, in ten minutes; needs torch, numpy, pyarrow, pytest. GPU_RUN=... are its options
	$(firstword $(wildcard $(BIN)/python) $(PYTHON)) -m benchmarks.gpu $(GPU_RUN)

clean:  ## everything that make made, .venv included
	rm -rf .venv demo build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -not -path './.git/*' -prune -exec rm -rf {} +

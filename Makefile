# Two commands do everything on a fresh machine: `make demo` and `make test`.
PYTHON ?= python3
# Another torch: make test TORCH=torch==2.13.0 (in a fresh folder, or after make clean).
TORCH ?= torch>=2.10
VENV := .venv
RUN := $(VENV)/bin/python
SOURCES := pyproject.toml setup.py $(wildcard csrc/*)

.PHONY: demo sweep test gpu-test bench lint install clean

demo: install
	$(VENV)/bin/cl-optim demo

sweep: install
	$(VENV)/bin/cl-optim demo --sweep

test: install
	$(RUN) -m pytest

gpu-test: install
	PYTHON=$(RUN) bench/gpu.sh runs/gpu

bench: install
	mkdir -p runs
	$(RUN) -m pytest bench --benchmark-json=runs/bench.json -q -p no:cacheprovider
	$(RUN) bench/summary.py runs/bench.json

lint: install
	$(VENV)/bin/pre-commit run --all-files --show-diff-on-failure

install: $(VENV)/.installed

# torch comes first, so that the extension is built against the torch that it will run with.
$(VENV)/.torch:
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet "$(TORCH)" "setuptools>=77" "pybind11>=2.13" wheel
	touch $@

$(VENV)/.installed: $(VENV)/.torch $(SOURCES)
	$(RUN) -m pip install --quiet --no-build-isolation --editable ".[demo,test,bench,lint]"
	touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info cl_optim/_C*.so

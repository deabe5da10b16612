# Every target works in a fresh clone with nothing activated. The second time only what changed is done again.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
LAB_ARGS ?=          # for example LAB_ARGS='--no-browser --port 8890'
PIP    := $(BIN)/python -m pip install --quiet --disable-pip-version-check

.PHONY: help demo lab test gpu-test bench feed-bench gpu-bench gpu-sanitize clean

help:
	@echo "make demo       set up, then eight prompts on the embedded model, watched live in the terminal"
	@echo "make lab        set up, then JupyterLab on notebooks/00_start_here.ipynb"
	@echo "make test       set up, then all tests (no GPU needed)"
	@echo "make bench      CPU speed at the Llama-3.2-1B shape"
	@echo "make feed-bench what the live panels cost the engine, in a real JupyterLab"
	@echo "make gpu-bench  GPU speed at the Llama-3.2-1B shape, with the limits of the same GPU (about eight minutes)"
	@echo "make gpu-test   the tests that need an NVIDIA GPU"
	@echo "make gpu-sanitize  the same under NVIDIA's compute-sanitizer: bad accesses, races in shared memory"
	@echo "make clean      remove the virtual environment"

# A stamp file a set of packages: made anew when the list of dependencies changes.
$(BIN)/python:
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(0 if (3, 11) <= v <= (3, 13) else "tinyvllm needs Python 3.11 to 3.13, and $(PYTHON) is %d.%d: say make PYTHON=/path/to/python3.12 ..." % v)'
	$(PYTHON) -m venv $(VENV)

$(VENV)/.base: pyproject.toml | $(BIN)/python
	@echo "installing tinyvllm into $(VENV) (a minute or two, once)"
	$(PIP) -e .
	@touch $@

$(VENV)/.test: pyproject.toml $(VENV)/.base
	$(PIP) -e '.[test]'
	@touch $@

$(VENV)/.cuda: pyproject.toml $(VENV)/.test
	$(PIP) -e '.[cuda,test]'
	@touch $@

# The browser tests need a Chromium: one that is there is taken, else one is installed.
$(VENV)/.browser: $(VENV)/.test tests/browser/chromium.py
	$(BIN)/python -m tests.browser.chromium
	@touch $@

demo: $(VENV)/.base
	$(BIN)/python -m tinyvllm demo

lab: $(VENV)/.base
	$(BIN)/jupyter lab $(LAB_ARGS) notebooks/00_start_here.ipynb

test: $(VENV)/.test $(VENV)/.browser
	$(BIN)/python -m pytest -m "not gpu"
	$(BIN)/python -m pytest --nbval-lax --nbval-current-env --nbval-cell-timeout=120 notebooks

bench: $(VENV)/.base
	$(BIN)/python -m tinyvllm.bench.cpu

feed-bench: $(VENV)/.test $(VENV)/.browser
	$(BIN)/python -m tests.browser.feed_budget

gpu-bench: $(VENV)/.cuda
	$(BIN)/python -m tinyvllm.bench.gpu --processes 3 --json tinyvllm/bench/results/gpu_llama_1b.json
	$(BIN)/python -m tinyvllm.bench.plot

gpu-test: $(VENV)/.cuda
	$(BIN)/python -m pytest -m gpu tests/gpu

gpu-sanitize: $(VENV)/.cuda
	$(BIN)/python -m tests.gpu.sanitize

clean:
	rm -rf $(VENV)

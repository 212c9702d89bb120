# Every command sets up what it needs, once, in .venv; PYTHON=python3.12 chooses another Python,
# CPU=1 takes PyTorch's builds without CUDA from PyTorch's own index.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
READY  := $(VENV)/.ready
INDEX  := $(if $(CPU),--extra-index-url https://download.pytorch.org/whl/cpu)

.DEFAULT_GOAL := help
.PHONY: help setup demo test soak lab docs bench export browser

help: ## list the commands
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "  make %-8s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(READY) ## install everything into .venv

$(READY): constraints.txt pyproject.toml
	@$(PYTHON) -c 'import sys; v = sys.version_info; v >= (3, 11) or sys.exit(f"paretolab needs Python 3.11 or newer (got {v[0]}.{v[1]}): make PYTHON=python3.11 ...")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt $(INDEX) -e '.[lab,dev,transformers,optimizers,kernels]'
	@touch $@

demo: $(READY) ## train, compress, measure, and draw the frontier (paretolab frontier)
	$(BIN)/paretolab frontier --settings settings.ini

test: $(READY) browser ## all tests and all pages
	$(BIN)/python -m pytest --durations=15

soak: $(VENV)/.handoffs browser ## long fault and property campaigns, with a journal in soak/
	$(BIN)/python -m pytest -m soak

lab: $(READY) ## JupyterLab on the pages, at 127.0.0.1 only
	PLOTLY_RENDERER=plotly_mimetype $(BIN)/jupyter lab --ip=127.0.0.1 $(if $(filter 0,$(shell id -u)),--allow-root) --notebook-dir=nbs --LabApp.default_url=/lab/tree/explorers/start.ipynb

docs: $(READY) ## the website, in _docs/
	$(BIN)/python docs/build.py

$(VENV)/.handoffs: $(READY)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt $(INDEX) -e '.[lm-eval,executorch]' || echo "not all tools that models are handed to could be installed: their tests are skipped"
	@touch $@

$(VENV)/.bench: $(READY)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt $(INDEX) -e '.[bench]' || echo "not all engines that bench/ compares with could be installed: what needs them is left out"
	@touch $@

bench: $(VENV)/.bench ## speed and quality beside other engines: bench/results/*.json
	@for f in bench/*.py; do echo "$$f"; $(BIN)/python "$$f" || exit 1; done

export: $(READY) ## write the package and README.md from the pages
	$(BIN)/python -m paretolab._export

# the browser tests need Chromium; where it cannot be installed they are skipped
browser:
	@command -v chromium >/dev/null || { [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null && apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq chromium >/dev/null; } || echo "chromium is not installed: the browser tests will be skipped"

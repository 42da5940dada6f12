# Two commands are enough on a fresh machine with Python 3.11: `make demo` and `make test`.
PYTHON ?= python3.11
VENV   := .venv
BIN    := $(VENV)/bin
READY  := $(VENV)/.ready
DEV    := $(VENV)/.ready-dev
LIBRARIES := $(VENV)/.ready-libraries
BROWSER := $(VENV)/.ready-browser
# One thread: tiny models gain nothing from more.
ALONE  := OMP_NUM_THREADS=1 $(BIN)/python -m pytest
# Three workers keep two cores busy while tests wait for processes and sockets. A worker takes file after file;
# `tests/conftest.py` says which files come first.
PYTEST := $(ALONE) -n 3 --dist loadfile --no-loadscope-reorder
IN_BROWSER := $(ALONE) tests/browser
ON_DESKTOP := $(ALONE) -m desktop tests/app/tray
# Those that every change is tested with; `make test-all` has agents, evaluations and coding programs, too.
CLIENTS := npm or litellm or langchain or llm or version_before
PIP    := $(BIN)/python -m pip install --disable-pip-version-check --progress-bar on -c constraints.txt

.DEFAULT_GOAL := help
.PHONY: help demo test test-all clients browser desktop installation front-ends notebooks check settings pictures bench wheel installers clean

help: ## show this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

$(READY): pyproject.toml constraints.txt
	@test -x $(BIN)/python || { echo "Making $(VENV) …"; $(PYTHON) -m venv $(VENV); }
	@echo "Installing swarmkit (a few minutes the first time) …"
	@$(PIP) -q -r constraints.txt
	@$(PIP) -q -e '.[app]'
	@touch $@

$(DEV): $(READY)
	@echo "Installing what the tests need …"
	@$(PIP) -q -e '.[dev]'
	@touch $@

$(LIBRARIES): $(DEV)
	@echo "Installing the libraries that are tested with swarmkit …"
	@$(PIP) -q -e '.[dev,libraries,clients]'
	@touch $@

demo: $(READY) ## four servers, a chat, and a server that dies in the middle of an answer
	@$(BIN)/swarmkit demo

test: $(DEV) ## the tests; under 10 minutes on 2 cores
	@$(PYTEST) --ignore tests/browser --ignore tests/libraries -m "not slow and not notebook and not browser and not desktop"

# A browser's tests leave a running event loop in their process, where others start their own.
test-all: $(LIBRARIES) $(BROWSER) ## all tests: with the slow ones, the notebooks, a browser and a desktop
	@failed=0; \
	$(PYTEST) -m "not browser and not desktop" || failed=1; \
	$(IN_BROWSER) || failed=1; \
	$(ON_DESKTOP) || failed=1; \
	exit $$failed

clients: $(DEV) ## the HTTP API under client libraries from PyPI and npm; about 2 minutes
	@$(PIP) -q -e '.[dev,client-libraries]'
	@$(ALONE) tests/api/test_npm_clients.py tests/api/test_clients.py -k "$(CLIENTS)"

$(BROWSER): $(DEV)
	@echo "Installing what the tests in a browser need …"
	@$(PIP) -q -e '.[dev,browser]'
	@touch $@

browser: $(BROWSER) ## the tests in a headless Chromium, which the distribution has; pictures go to build/screenshots
	@$(IN_BROWSER)

desktop: $(DEV) ## the tray on a small desktop, which the distribution has; pictures go to build/screenshots
	@$(ON_DESKTOP)

installation: $(DEV) ## build, install, upgrade and remove the installers, as far as this machine can
	@$(ALONE) -m slow tests/installer

front-ends: $(BROWSER) ## the live views in Notebook 7, marimo and a kernel like Colab's, which this installs below build/
	@$(PIP) -q --no-deps --upgrade --target build/notebook-7 'notebook>=7,<8'
	@$(PIP) -q --upgrade --target build/marimo 'marimo>=0.14'
	@$(BIN)/python -m pip install -q --disable-pip-version-check --upgrade --target build/colab-like -r tests/browser/colab.txt
	@$(ALONE) tests/browser/test_front_ends.py

notebooks: $(DEV) ## run every notebook from a clean kernel; about 2 minutes on 2 cores
	@$(BIN)/python -m pytest -m notebook tests/notebooks

check: $(DEV) ## ruff and the type checker
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy

settings: $(READY) ## write docs/settings.md from the code
	@$(BIN)/python -m tools.settings_page

pictures: $(BROWSER) ## write the pictures of README and notebooks anew, from a swarm at work
	@$(BIN)/python -m tools.pictures

bench: $(READY) ## measure; writes to benchmarks/results/
	@$(BIN)/python benchmarks/run.py

wheel: $(READY) ## build the wheel in dist/, install it into a fresh environment, and run the demo from there
	@$(BIN)/python tools/check_wheel.py

installers: $(DEV) ## build in dist/installers what this machine can build: .deb, Linux archive, Windows set-up, macOS app
	@$(BIN)/python -m installer.build

clean: ## remove the environment and caches
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache build dist *.egg-info

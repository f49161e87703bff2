# All set-up happens by itself, in .venv: Python 3.11 or newer and make are all that is needed.

VENV ?= .venv
EXTRAS ?= demo,flower,flower-sim,metrics,quant,hub,tables,tracking,api,privacy,dev
WORKERS ?= 2
# The first of these that is new enough makes the environment; name your own with `make venv PYTHON=/path/to/python`.
PYTHON ?= python3.11 python3.12 python3.13 python3.14 python3
# How often `make test-kill` kills: simulations, and processes of a federation over Flower.
KILLS ?= 100
FEDERATION_KILLS ?= 20
# More for pip, such as --extra-index-url https://download.pytorch.org/whl/cpu for the CPU build of torch.
PIP_FLAGS ?=
# constraints-hashed.txt: check the SHA-256 of every package but torch (Python 3.11 on Linux).
HASHED ?=

BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# One thread per worker: two workers with two threads each on two cores are slower than one process. hypothesis's own
# profile ci takes the same examples every time and sets no deadline.
PYTEST := OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false $(BIN)/python -m pytest \
	-n $(WORKERS) --dist worksteal --hypothesis-profile=ci

.DEFAULT_GOAL := help
.PHONY: help venv demo test test-slow test-flower test-secure test-kill fuzz test-ray test-tracking test-lowest lowest-tests lint types format hooks bench gpu docs gallery site clean

help:  ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-11s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

venv: $(STAMP)  ## set up .venv; done again when pyproject.toml or constraints.txt change

demo: $(STAMP)  ## a federation of a few organisations, in under five minutes
	$(BIN)/coterie demo

test: lint types  ## lint, types and all tests but the slow ones
	$(PYTEST) -m 'not slow'

test-slow: lint types  ## lint, types and all tests but those of real processes
	$(PYTEST) -m 'not flower and not ray and not secure and not kill'

test-flower: $(STAMP)  ## federations of real processes on loopback, TLS and failures among them; about seven minutes on two cores
	@# Three at a time: they wait more than they work.
	$(PYTEST) -n 3 -m flower tests/e2e

test-secure: $(STAMP)  ## secure aggregation with six sites of real processes, two killed before each step; some minutes
	$(PYTEST) -n 1 -m secure tests/e2e

test-kill: $(STAMP)  ## random kills of simulations (KILLS) and of a federation (FEDERATION_KILLS), each resumed
	KILLS=$(KILLS) FEDERATION_KILLS=$(FEDERATION_KILLS) $(PYTEST) -n 1 -m kill tests/e2e/test_kills.py

fuzz: $(STAMP)  ## an hour of bad input for every reader; what shows a fault is kept in runs/fuzz
	PYTHONPATH=tests/support OMP_NUM_THREADS=1 $(BIN)/python tests/support/fuzz.py --seconds 3600

test-ray: $(STAMP)  ## every method, and secure sums, on Flower's simulation runtime (Ray)
	$(PYTEST) -n 0 -m ray tests/parity

test-tracking: .venv-tracking/.installed  ## trackers with their own libraries, in .venv-tracking beside .venv
	OMP_NUM_THREADS=1 .venv-tracking/bin/python -m pytest -n 0 tests/unit/runs/test_tracking.py

# trackio and wandb need other versions than constraints.txt has, so they get an environment of their own. It sees the
# packages of .venv behind its own: torch is not installed twice.
.venv-tracking/.installed: $(STAMP)
	$(BIN)/python -m venv --clear .venv-tracking
	.venv-tracking/bin/pip install -q $(PIP_FLAGS) mlflow-skinny==3.17.2 sqlalchemy alembic wandb==0.31.0 trackio==0.43.0
	pure='import sysconfig; print(sysconfig.get_paths()["purelib"])'; \
	{ $(BIN)/python -c "$$pure"; echo '$(CURDIR)/src'; } > "$$(.venv-tracking/bin/python -c "$$pure")/zz_coterie.pth"
	@touch $@

# LOWEST=torch==2.13.0 spares the download of the oldest torch, which on Linux is several GB with its CUDA.
test-lowest:  ## unit, property and parity tests with the oldest dependencies that pyproject.toml allows, in .venv-lowest
	@$(MAKE) --no-print-directory .venv-lowest/bin/python
	.venv-lowest/bin/uv pip install --python .venv-lowest/bin/python --resolution lowest-direct \
		-e '.[$(EXTRAS)]' $(LOWEST)
	$(MAKE) --no-print-directory lowest-tests BIN=.venv-lowest/bin

lowest-tests:
	$(PYTEST) -m 'not slow and not flower and not ray' tests/unit tests/property tests/parity

.venv-lowest/bin/python:
	@for python in $(PYTHON); do command -v $$python > /dev/null && $$python -m venv .venv-lowest && break; done
	.venv-lowest/bin/pip install --quiet uv

lint: $(STAMP)  ## ruff: rules and format
	$(BIN)/ruff check
	$(BIN)/ruff format --check

types: $(STAMP)  ## mypy, strict on src
	$(BIN)/mypy

format: $(STAMP)  ## let ruff fix what it can
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

hooks: $(STAMP)  ## run the lint before every commit
	$(BIN)/pre-commit install

bench: $(STAMP)  ## measure speed and memory; see bench/README.md
	@set -e; for script in bench/[!_]*.py; do echo "$$script"; $(BIN)/python "$$script"; done

gpu: $(STAMP)  ## on a machine with a GPU: tests on it, then its figures against those required; under ten minutes
	$(BIN)/python bench/gpu.py $(GPU_FLAGS)

docs: $(STAMP)  ## write the tables of methods and of config keys anew
	@mkdir -p docs/reference
	@set -e; for page in methods config; do \
	  { echo "<!-- Made by \`make docs\`: do not edit. -->"; echo; $(BIN)/coterie $$page --markdown; } > docs/reference/.$$page.tmp; \
	  mv docs/reference/.$$page.tmp docs/reference/$$page.md; \
	done
	@{ echo "<!-- Made by \`make docs\`: do not edit. -->"; echo; $(BIN)/coterie methods --releases --markdown; } \
	  > docs/reference/releases.md
	@{ echo "<!-- Made by \`make docs\`: do not edit. -->"; echo; $(BIN)/coterie site config --markdown; } > docs/reference/site.md

gallery: $(STAMP)  ## the pictures of docs/gallery.md, from the demo; Chromium for screenshots
	$(BIN)/python docs/make_gallery.py

site: .venv-site/bin/zensical  ## the documentation as a website, in build/site
	.venv-site/bin/python docs/make_site.py

.venv-site/bin/zensical:
	@for python in $(PYTHON); do command -v $$python > /dev/null && $$python -m venv .venv-site && break; done
	.venv-site/bin/pip install --quiet $(PIP_FLAGS) zensical==0.0.73

clean:  ## remove .venv and caches; runs stay
	rm -rf .venv .venv-lowest .venv-tracking .venv-site .pytest_cache .mypy_cache .ruff_cache .hypothesis build dist src/coterie.egg-info
	find bench src tests -name __pycache__ -type d -prune -exec rm -rf {} +

$(STAMP): pyproject.toml constraints.txt
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || { \
	  for python in $(PYTHON) ''; do \
	    "$$python" -c 'import ensurepip, sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && break; \
	  done; \
	  if [ -z "$$python" ]; then \
	    echo "Coterie needs Python 3.11 or newer with its venv module. None of these is: $(PYTHON)" >&2; \
	    echo "(python3 is $$(python3 --version 2>&1))." >&2; \
	    echo "Install one (Debian, Ubuntu: apt install python3.11-venv), or make venv PYTHON=/path/to/it." >&2; \
	    exit 1; \
	  fi; \
	  echo "making $(VENV) with $$("$$python" --version)"; \
	  "$$python" -m venv --clear $(VENV); }
	@echo "installing Coterie and what it needs into $(VENV): about a minute, or the time of the downloads"
	@test -z "$(HASHED)" || $(BIN)/python -m pip install -q $(PIP_FLAGS) --no-deps --require-hashes -r $(HASHED)
	@$(BIN)/python -m pip install -q $(PIP_FLAGS) -c constraints.txt -e '.[$(EXTRAS)]'
	@touch $@

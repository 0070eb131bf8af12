# `make` lists the targets. PYTHON chooses the interpreter of a new environment: make demo PYTHON=python3.11

SUITS := import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 13))
ifndef PYTHON
PYTHON := $(shell for p in python3 python3.13 python3.12 python3.11 python3.10; do \
  if $$p -c '$(SUITS)' 2>/dev/null; then echo $$p; exit; fi; done; echo python3)
endif
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.DEFAULT_GOAL := help
.PHONY: help demo test lint clean .venv

help: ## list the targets
	@echo "targets:"
	@sed -n 's/^\([a-z.]*\):.*## /  make \1\t/p' $(MAKEFILE_LIST) | expand -t 16

demo: $(READY) ## train a teacher, then students alone, with KD and with MSKD, on handwritten digits
	@echo "== demo"
	@$(BIN)/python tools/compare.py configs/_base_/pairs/resnet20_resnet8_digits.py \
	  --teacher configs/demo/teacher_resnet20_digits.py --work-dir work_dirs/demo $(DEMO)

test: $(READY) ## run the tests, two files at a time (some: make test TESTS=tests/test_host.py)
	@echo "== tests"
	@$(BIN)/python -m pytest -q $(or $(TESTS),-n 2 --dist loadfile)

lint: $(READY) ## check style, format and types
	@echo "== ruff"
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@echo "== mypy"
	@$(BIN)/mypy

.venv: $(READY) ## set up the environment of all other targets; reused until its versions change

clean: ## remove the environment, caches and builds; data and runs stay
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(READY): constraints.txt setup.py
	@if [ ! -x $(BIN)/python ]; then \
	  $(PYTHON) -c '$(SUITS)' || { \
	    echo "error: Python 3.10 to 3.13 is needed, and $(PYTHON) is none; give one: make PYTHON=python3.11"; \
	    exit 1; } >&2; \
	  echo "== environment: $(VENV) with $$($(PYTHON) --version)"; \
	  $(PYTHON) -m venv $(VENV) || { \
	    echo "error: '$(PYTHON) -m venv' failed; on Debian and Ubuntu: apt install python3-venv"; \
	    rm -rf $(VENV); exit 1; } >&2; \
	fi
	@$(BIN)/python -c '$(SUITS)' || { \
	  echo "error: $(VENV) has another Python than 3.10 to 3.13; make clean removes it" >&2; exit 1; }
	@rm -f $@
	@echo "== packages of constraints.txt: about 6 GB, some minutes"
	@$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt -e '.[mmcv-lite,demo,dev]'
	@$(BIN)/python -c 'import mskd_plugin'
	@touch $@
	@echo "== ready: $(VENV)"

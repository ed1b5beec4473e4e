# `make demo` shows the whole job on the model that ships with this repository; `make help` lists the rest.
# the first that runs: a name on the PATH may be a shim with no Python behind it
PYTHON ?= $(shell for p in python3.12 python3.11 python3.13 python3; do $$p -c '' 2>/dev/null && echo $$p && break; done)
BIN := .venv/bin
GIB := 12
export DO_NOT_TRACK := 1
export DVC_NO_ANALYTICS := 1
export MLFLOW_DISABLE_TELEMETRY := true
export HF_HUB_DISABLE_TELEMETRY := 1

.DEFAULT_GOAL := help
.PHONY: help setup check demo compare test lint repro record trust prune code trainings ui lock

help: ## this list
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

setup: .venv/.ok ## a virtual environment with the pinned, hashed requirements (once, some minutes, 7 GB)

# resumable: pip keeps what it has downloaded, and the stamp is set last
.venv/.ok: requirements.txt pyproject.toml
	@$(MAKE) --no-print-directory check
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --disable-pip-version-check --require-hashes -r requirements.txt
	$(BIN)/python -m pip install --disable-pip-version-check --no-deps --no-build-isolation -e .
	@touch $@

check:
	@test -n "$(PYTHON)" || { echo "python3 is missing: install Python 3.11, 3.12 or 3.13 (apt install python3 python3-venv)"; exit 2; }
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' || \
	  { echo "$(PYTHON) is not Python 3.11, 3.12 or 3.13: make setup PYTHON=/path/to/python3.12"; exit 2; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || \
	  { echo "$(PYTHON) has no venv: apt install python3-venv"; exit 2; }
	@command -v git >/dev/null || { echo "git is missing: apt install git"; exit 2; }
	@test -d .venv || test "$$(df -Pk . | awk 'NR==2 {print int($$4/1048576)}')" -ge $(GIB) || \
	  { echo "less than $(GIB) GB of disk are free here: free some, or clone to another disk"; exit 2; }

demo: setup ## quantize the embedded model, measure it, and show the report (minutes, offline)
	@$(BIN)/python -m halftone run

compare: setup ## the published table: 1,000 images a row
	@$(BIN)/python -m halftone run headline

test: setup lint ## everything that must pass
	$(BIN)/python -m pytest -q

lint: setup
	$(BIN)/ruff check src tests
	$(BIN)/ruff format --check src tests
	$(BIN)/mypy
	$(BIN)/snakefmt --check Snakefile workflow/rules

repro: setup ## the same pipeline through DVC
	PATH=$(CURDIR)/$(BIN):$$PATH $(BIN)/dvc repro

record: setup ## enter in dvc.lock what Snakemake has made
	$(BIN)/python -m halftone record

trust: setup ## after `dvc pull` or `dvc checkout`: tell Snakemake what DVC has verified
	$(BIN)/python -m halftone trust

prune: setup ## remove results of scenarios that are no longer configured
	$(BIN)/python -m halftone prune

code: setup ## after imports have changed: list in dvc.yaml what each rule depends on
	$(BIN)/python -m halftone code

trainings: setup ## put the trainings of the embedded models into MLflow: curves and pictures on the way
	@for run in docs/trainings/*; do $(BIN)/python -m halftone.scenes.train log-run \
	  --log $$run/log.jsonl --sheets $$run --name $$(basename $$run) || exit; done

ui: setup ## the runs in MLflow, at http://127.0.0.1:5000
	$(BIN)/mlflow server --backend-store-uri sqlite:///$(CURDIR)/mlflow.db --host 127.0.0.1 --workers 1

lock: ## resolve versions anew (the only step that does)
	uv pip compile -q requirements-dev.in --universal --python-version 3.11 --generate-hashes --no-emit-index-url \
	  --no-header -o requirements.txt

# The one entry point, the same for a person, a commit hook and CI. `make` alone lists what there is.

PYTHON ?= python3
VENV := .venv
PEERS := .venv-peers
BIN := $(VENV)/bin
PIP_INSTALL := $(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt
# The same constraints hold while pip builds the project itself.
export PIP_CONSTRAINT := $(abspath constraints.txt)
export ORT_DISABLE_TELEMETRY := 1

.DEFAULT_GOAL := help
.PHONY: help run test training lint format bench bench-peers bench-survival contract networks clean

help: ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-14s %s\n", $$1, $$2}'

run: $(VENV)/.serve ## serve the models of models/ on http://127.0.0.1:8000 (CONVOY_PORT=9000 make run)
	@exec $(BIN)/convoy serve

test: $(VENV)/.dev lint ## lint, type-check and run the whole test suite
	$(BIN)/pytest

training: $(VENV)/.train ## add PyTorch and convoy-train to the environment

lint: $(VENV)/.dev ## style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/.dev ## put the code into shape
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(VENV)/.dev ## measure the service here: throughput, latency, and against the bare loop
	$(BIN)/python -m benchmarks.serving

bench-peers: $(VENV)/.dev $(PEERS)/.installed ## measure the service beside LitServe, mosec and Triton, in turns; needs wrk
	$(BIN)/python -m benchmarks.peers $(ARGS)

bench-survival: $(VENV)/.dev ## overload, leaving clients, kills, signals, quotas and two soaks: 45 minutes (ARGS="--only overload")
	$(BIN)/python -m benchmarks.survival $(ARGS)

contract: $(VENV)/.dev ## hold the answers to 5,000 requests against both OpenAPI documents (ARGS="--cases 500")
	$(BIN)/python -m tests.contract $(ARGS)

networks: $(VENV)/.dev ## train, export and serve every network of training/nets on a few drawn images (ARGS="resnet50 --size 224")
	$(BIN)/python -m tests.networks $(ARGS)

clean: ## remove the environments and caches
	rm -rf $(VENV) $(PEERS) benchmarks/.cache .pytest_cache .mypy_cache .ruff_cache build *.egg-info

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.serve: pyproject.toml constraints.txt | $(BIN)/python
	@echo "Setting up $(VENV) (once) …"
	$(PIP_INSTALL) --editable '.[cpu]'
	@touch $@

$(VENV)/.train: pyproject.toml constraints.txt | $(BIN)/python
	@echo "Setting up $(VENV) for training (once; PyTorch is large) …"
	$(PIP_INSTALL) --editable '.[cpu,train]'
	@touch $(VENV)/.serve $@

$(VENV)/.dev: pyproject.toml constraints.txt | $(BIN)/python
	@echo "Setting up $(VENV) for development (once) …"
	$(PIP_INSTALL) --editable '.[cpu,grpc,otel,train,dev]'
	@touch $(VENV)/.serve $(VENV)/.train $@

# What every peer runs on must be there; of the peers themselves, one that cannot be installed here leaves the others, and
# the report says so. Their pins are not ours, NumPy's least of all.
PEERS_INSTALL = PIP_CONSTRAINT= $(PEERS)/bin/pip install --quiet --disable-pip-version-check --constraint $<

$(PEERS)/.installed: benchmarks/peers/requirements.txt
	@echo "Setting up $(PEERS) with the servers to compare with (once) …"
	$(PYTHON) -m venv $(PEERS)
	$(PEERS_INSTALL) onnxruntime pillow simplejpeg pydantic
	@for peer in litserve mosec nvidia-pytriton; do \
		$(PEERS_INSTALL) $$peer || echo "*** $$peer cannot be installed here and will be left out (rm -r $(PEERS): try again). ***"; \
	done
	@touch $@

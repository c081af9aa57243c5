# Afterward. `make help` lists the targets; none but up, down and demo needs Docker.
PYTHON ?= python3
BIN := .venv/bin
INSTALLED := .venv/.installed
# Four at once: most tests wait for something.
TEST := $(BIN)/python -m pytest --numprocesses=4 --dist=loadfile

# What has a long form.
TORTURED := tests/faults tests/attacks tests/files tests/mail/test_message.py \
	tests/mail/test_recipients.py tests/queue/test_durable.py tests/queue/test_engine_model.py \
	tests/queue/test_retry.py tests/api/test_document.py

.DEFAULT_GOAL := help

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

install: $(INSTALLED) ## make .venv and put everything in it

$(INSTALLED): requirements-dev.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=python3.13 install")'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --require-hashes -r requirements-dev.txt
	@touch $@

run: $(INSTALLED) ## start everything on this machine: API, worker, SMTP catcher
	CATCHER=$${CATCHER:-true} $(BIN)/python -m app

test: $(INSTALLED) ## run every test
	$(TEST)

check: $(INSTALLED) ## lint, types, tests, coverage
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/bandit --quiet --recursive --configfile pyproject.toml app
	$(BIN)/hadolint Dockerfile
	$(TEST) --cov --cov-fail-under=100

torture: $(INSTALLED) ## every fault and attack in its long form: 200 kills, 100 power cuts, and so on
	TORTURE=1 $(TEST) $(TORTURED)

bench: $(INSTALLED) ## measure everything, into docs/performance.md (needs wrk, redis-server)
	$(BIN)/python -m benchmarks --write

bench-quick: $(INSTALLED) ## measure what matters most, in three minutes (needs wrk)
	$(BIN)/python -m benchmarks P1 P4 P8 --quick

up: ## start the API and Mailpit in Docker
	docker compose up --build --wait

down: ## stop them; the volumes stay
	docker compose -f docker-compose.yml -f docker-compose.scale.yml down

demo: ## send a mail through what `make run` or `make up` started, and show what became of it
	@scripts/demo.sh

lock: ## resolve the dependencies anew, with hashes (needs uv)
	uv pip compile --universal --generate-hashes --no-annotate --no-header --python-version 3.11 --all-extras pyproject.toml -o requirements.txt
	uv pip compile --universal --generate-hashes --no-annotate --no-header --python-version 3.11 --all-extras pyproject.toml --group dev -o requirements-dev.txt
	uv pip compile --universal --generate-hashes --no-annotate --no-header --python-version 3.11 benchmarks/requirements.in -o benchmarks/requirements.txt

.PHONY: help install run test check torture bench bench-quick up down demo lock

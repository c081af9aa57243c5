# `make help` lists the targets. Only up and down need Docker.
BIN := .venv/bin
# Returns at once if the lock file is installed already. PYTHON=python3.13 selects an interpreter.
INSTALL := @PYTHON='$(PYTHON)' scripts/install.sh
# More processes than cores, here two, because many tests wait, above all the faults and attacks.
TEST := $(BIN)/python -m pytest --dist=worksteal --numprocesses=3
CHECK := $(BIN)/python -m pytest --dist=loadfile --numprocesses=4

# The tests with a long form.
TORTURED := tests/faults tests/attacks tests/uploads tests/mail/test_message.py \
	tests/mail/test_recipients.py tests/library/test_unit_of_work.py tests/library/test_engine_model.py \
	tests/library/test_retry.py tests/api/test_openapi.py

.DEFAULT_GOAL := help

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

install: ## create .venv with the packages of `make run` and `make test`
	$(INSTALL) requirements.txt
	$(INSTALL) requirements-test.txt

run: ## start everything on this machine: API, worker, SMTP catcher
	$(INSTALL) requirements.txt
	CATCHER=$${CATCHER:-true} $(BIN)/python -m app

test: ## run the tests of normal behaviour, in about a minute
	$(INSTALL) requirements-test.txt
	$(TEST) --ordinary

check: ## run all that CI runs: lint, types, every test (faults and attacks in their short form), coverage
	$(INSTALL) requirements-check.txt
	$(BIN)/python -m pip check
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/bandit --quiet --recursive --configfile pyproject.toml afterward app
	$(BIN)/hadolint Dockerfile
	$(CHECK) --cov --cov-fail-under=100

torture: ## run every fault and attack in its long form: 200 kills, 100 power cuts, and so on
	$(INSTALL) requirements-check.txt
	TORTURE=1 $(CHECK) $(TORTURED)

bench: ## run all benchmarks, and write docs/performance.md (needs wrk, redis-server)
	$(INSTALL) requirements-check.txt
	$(BIN)/python -m benchmarks --write

bench-quick: ## run the main benchmarks, in three minutes (needs wrk)
	$(INSTALL) requirements-check.txt
	$(BIN)/python -m benchmarks P1 P4 P8 --quick

up: ## start the API and Mailpit in Docker
	docker compose up --build --wait

down: ## stop the containers, and keep the volumes
	docker compose -f docker-compose.yml -f docker-compose.scale.yml down

demo: ## send 200 mails and a file through the service at PORT or URL, and show how their tasks end
	$(INSTALL) requirements.txt
	@$(BIN)/python -m app.terminal.demo

# Only wheels, for every system and every Python from 3.11 on. The largest lock file is made first,
# and the others take their versions from it, so that all targets agree.
LOCK := uv pip compile --quiet --universal --python-version 3.11 --generate-hashes \
	--only-binary :all: --no-annotate --no-header --upgrade
OTHERS := $(LOCK) --constraint requirements-check.txt

screenshots: ## take the pictures of the dashboard in docs/images again (needs Chromium)
	$(INSTALL) requirements-check.txt
	$(BIN)/python -m scripts.screenshots

lock: ## resolve the dependencies again, with hashes (needs uv)
	$(LOCK) --all-extras --group check pyproject.toml --output-file requirements-check.txt
	$(OTHERS) --all-extras --group test pyproject.toml --output-file requirements-test.txt
	$(OTHERS) --all-extras --group service pyproject.toml --output-file requirements.txt
	$(OTHERS) benchmarks/requirements.in --output-file benchmarks/requirements.txt

.PHONY: help install run test check torture bench bench-quick up down demo screenshots lock

# Afterward. `make help` lists the targets; none but up, down and demo needs Docker.
BIN := .venv/bin
# Does nothing where the lock is installed already. PYTHON=python3.13 names another interpreter.
INSTALL := @PYTHON='$(PYTHON)' scripts/install.sh
# On two cores: many tests wait for something, and faults and attacks more than others.
TEST := $(BIN)/python -m pytest --dist=loadfile --numprocesses

# What has a long form.
TORTURED := tests/faults tests/attacks tests/uploads tests/mail/test_message.py \
	tests/mail/test_recipients.py tests/library/test_unit_of_work.py tests/library/test_engine_model.py \
	tests/library/test_retry.py tests/api/test_openapi.py

.DEFAULT_GOAL := help

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

install: ## make .venv, with what `make run` and `make test` need
	$(INSTALL) requirements.txt
	$(INSTALL) requirements-test.txt

run: ## start everything on this machine: API, worker, SMTP catcher
	$(INSTALL) requirements.txt
	CATCHER=$${CATCHER:-true} $(BIN)/python -m app

test: ## run the tests of the ordinary behaviour, in a minute
	$(INSTALL) requirements-test.txt
	$(TEST)=3 --ordinary

check: ## what CI runs: lint, types, every test with each fault and attack in its short form, coverage
	$(INSTALL) requirements-check.txt
	$(BIN)/python -m pip check
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/bandit --quiet --recursive --configfile pyproject.toml afterward app
	$(BIN)/hadolint Dockerfile
	$(TEST)=4 --cov --cov-fail-under=100

torture: ## every fault and attack in its long form: 200 kills, 100 power cuts, and so on
	$(INSTALL) requirements-check.txt
	TORTURE=1 $(TEST)=4 $(TORTURED)

bench: ## measure everything, into docs/performance.md (needs wrk, redis-server)
	$(INSTALL) requirements-check.txt
	$(BIN)/python -m benchmarks --write

bench-quick: ## measure what matters most, in three minutes (needs wrk)
	$(INSTALL) requirements-check.txt
	$(BIN)/python -m benchmarks P1 P4 P8 --quick

up: ## start the API and Mailpit in Docker
	docker compose up --build --wait

down: ## stop them; the volumes stay
	docker compose -f docker-compose.yml -f docker-compose.scale.yml down

demo: ## send a mail and a file through the service at PORT or URL, and show what became of them
	@scripts/demo.sh

# Wheels alone, for every system and every Python from 3.11 on. The largest comes first, and the
# others take their versions from it: what one target installs suits the others.
LOCK := uv pip compile --quiet --universal --python-version 3.11 --generate-hashes \
	--only-binary :all: --no-annotate --no-header --upgrade
OTHERS := $(LOCK) --constraint requirements-check.txt

lock: ## resolve the dependencies anew, with hashes (needs uv)
	$(LOCK) --all-extras --group check pyproject.toml --output-file requirements-check.txt
	$(OTHERS) --all-extras --group test pyproject.toml --output-file requirements-test.txt
	$(OTHERS) --all-extras --group service pyproject.toml --output-file requirements.txt
	$(OTHERS) benchmarks/requirements.in --output-file benchmarks/requirements.txt

.PHONY: help install run test check torture bench bench-quick up down demo lock

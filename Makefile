# `make watch` and `make test` do everything on a fresh machine; see `make help`.

VENV := .venv
BIN := $(VENV)/bin
# The first Python that is new enough; `make PYTHON=...` takes another. The system's own comes first: it is optimised,
# and one that pyenv built by default makes procwatch a third more expensive.
PYTHON ?= $(shell for python in /usr/bin/python3 python3 python3.14 python3.13 python3.12 python3.11; do \
	$$python -c 'import ensurepip, sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$python && break; done)
# Debian packages that the tests use: a compiler for tiny programs, other programs to compare with, containers to look into,
# servers to send to.
PACKAGES := python3-venv gcc libc6-dev util-linux procps strace forkstat runc containerd podman busybox-static systemd \
	nats-server rsyslog openssl logrotate
PIP := $(BIN)/python -m pip --disable-pip-version-check --quiet install
TESTS ?= procwatch tests

.DEFAULT_GOAL := help
.PHONY: help watch test check format schema packages clean

help:  ## This list
	@awk -F ':.*## *' '/^[a-z-]+:.*##/ { printf "make %-13s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

watch: $(VENV)/.installed  ## Install into .venv and print every process; ARGS="--events exec" passes options
	@exec $(BIN)/procwatch watch $(ARGS)

test: packages $(VENV)/.tested  ## Install what the tests need and run them; ARGS="-k scan" passes options
	@exec $(BIN)/python -m pytest --doctest-modules $(TESTS) $(ARGS)

check: $(VENV)/.tested bpf-check  ## Linter, formatter, types, and the tests with coverage: what must hold before a commit
	@$(BIN)/ruff check --quiet
	@$(BIN)/ruff format --check --quiet || { echo 'not formatted: run `make format`' >&2; exit 1; }
	@$(BIN)/mypy --no-error-summary
	@$(MAKE) --no-print-directory test ARGS="-q --cov --cov-report=term $(ARGS)"

format: $(VENV)/.tested  ## Format the code
	@$(BIN)/ruff check --quiet --fix-only
	@$(BIN)/ruff format

schema: $(VENV)/.installed  ## Write docs/schema.json anew from procwatch/events.py
	@$(BIN)/python -c 'import json; from procwatch.formats.native import schema; print(json.dumps(schema(), indent=2))' \
		>docs/schema.json.new && mv docs/schema.json.new docs/schema.json

# As root the packages are installed; anybody else is told, and the tests that need them skip.
packages:
	@missing=; for package in $(PACKAGES); do \
		dpkg-query -W -f '$${db:Status-Status}' $$package 2>/dev/null | grep -qx installed || missing="$$missing $$package"; \
	done; \
	if [ -z "$$missing" ]; then :; \
	elif [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
		echo "installing$$missing"; export DEBIAN_FRONTEND=noninteractive; \
		{ apt-get update; apt-get install -y --no-install-recommends $$missing; } >/dev/null </dev/null; \
	else echo "not installed, so some tests are skipped:$$missing" >&2; fi

$(BIN)/python:
	@python='$(PYTHON)'; \
	if [ -z "$$python" ] || ! $$python -c 'import ensurepip' 2>/dev/null; then \
		if [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
			echo 'installing python3 and python3-venv'; export DEBIAN_FRONTEND=noninteractive; \
			{ apt-get update; apt-get install -y --no-install-recommends python3 python3-venv; } >/dev/null </dev/null; \
		else echo 'Python 3.11 or newer with its venv module is needed: install python3-venv' >&2; exit 1; fi; \
	fi; \
	$${python:-/usr/bin/python3} -m venv $(VENV)

$(VENV)/.installed: pyproject.toml | $(BIN)/python
	@$(PIP) --editable '.[all]'
	@touch $@

$(VENV)/.tested: pyproject.toml | $(BIN)/python
	@$(PIP) --editable '.[all,check]'
	@touch $@ $(VENV)/.installed

clean:  ## Remove all that can be made again
	@rm -rf $(VENV) build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis .coverage
	@find . -name __pycache__ -type d -prune -exec rm -rf {} +

-include bpf.mk kernels.mk bench.mk soak.mk fuzz.mk

# The two commands that do everything, installation included:  make demo  ·  make test
# Settings: UNDERSTUDY_REQUIRE (testbeds that must not be skipped), UNDERSTUDY_ROUNDS=long (full counts),
# UNDERSTUDY_QEMU (another QEMU for the tests), PYTEST_ARGS (for example -k name; every phase of the tests gets them).
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
MAKEFLAGS += --no-print-directory

BIN := .venv/bin
# The daemons, the demo and the QEMU tests make namespaces and taps: root, or sudo.
ROOT := tools/as-root
FAST_TESTS = $(wildcard tests/unit tests/contract tests/sim tests/docs tests/hotplug)

.PHONY: help setup demo test test-long test-qemu10 check lint types imports fast-tests bench constraints fresh clean

help:
	@echo 'make demo         a real guest survives the death of its host, twice (installs what it needs)'
	@echo 'make test         all tests (installs what they need)'
	@echo 'make check        the fast inner loop: lint, types, import rules, tests without a hypervisor'
	@echo 'make test-long    all tests with full counts'
	@echo 'make test-qemu10  the QEMU tests with Debian 13'"'"'s QEMU 10.0, unpacked into .cache'
	@echo 'make bench        measure, print a table, write bench.json'
	@echo 'make fresh        make test and make demo in a fresh minimal Debian 12'
	@echo 'make constraints  pin all Python packages anew'
	@echo 'make setup        only install;  make clean  remove what was made in this checkout'

setup:
	@tools/setup

demo: setup
	@$(ROOT) $(BIN)/understudy demo

test: export UNDERSTUDY_REQUIRE ?= qemu,kernel,xen
test: setup
	@$(ROOT) $(BIN)/python -m tests.phases $(PYTEST_ARGS)

test-long: export UNDERSTUDY_REQUIRE ?= qemu,kernel,xen
test-long: export UNDERSTUDY_ROUNDS := long
test-long: setup
	@$(ROOT) $(BIN)/python -m tests.phases --timeout 1800 $(PYTEST_ARGS)

test-qemu10: export UNDERSTUDY_REQUIRE ?= qemu,kernel
test-qemu10: setup
	@tools/unpack-qemu10
	@UNDERSTUDY_QEMU=$(CURDIR)/.cache/qemu10/bin/qemu-system-x86_64 $(ROOT) $(BIN)/pytest tests/qemu $(PYTEST_ARGS)

check: setup
	@$(MAKE) -k -j 2 --output-sync=target lint types imports fast-tests

lint:
	@$(BIN)/ruff check
	@$(BIN)/ruff format --check
	@tools/lint-shell

types:
	@$(BIN)/mypy

imports:
	@$(BIN)/lint-imports --no-logo

fast-tests:
	@$(BIN)/pytest -q -n 2 -m 'not qemu and not slow' $(FAST_TESTS) $(PYTEST_ARGS)

bench: setup
	@$(ROOT) $(BIN)/python -m bench

constraints: setup
	@tools/constraints

fresh:
	@tools/fresh-machine

clean:
	rm -rf .venv .tools .cache .mypy_cache .ruff_cache .pytest_cache .import_linter_cache .hypothesis .coverage
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# make demo     a virtual environment, and the demo in it
# make test     the same, the Debian packages that the integration tests need, then everything that is checked
# make help     the rest

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
FUZZ_SECONDS ?= 180
KILLS ?= 300
LIFECYCLE_SECONDS ?= 600
PAIRS_SECONDS ?= 600
BETWEEN_SECONDS ?= 600

.PHONY: help demo test packages lint types unit integration bench powercut powerlog kills lifecycle between pairs flips traces fuzz format clean

help:
	@sed -n 's/^# \(make .*\)/\1/p; s/^\([a-z]*\):.*## \(.*\)/make \1\t\2/p' Makefile

$(STAMP): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo "nbdclone needs Python 3.11 or newer; $(PYTHON) is $$($(PYTHON) --version)" >&2; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV) \
		|| { echo "python3-venv is missing (Debian: apt install python3-venv)" >&2; exit 1; }
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[dev]'
	@touch $@

demo: $(STAMP) ## show what it does, in a minute
	$(BIN)/nbdclone demo

test: $(STAMP) packages lint types unit integration ## everything that CI checks

packages: $(STAMP)
	@missing="$$($(BIN)/python -m integration.packages)"; \
	if [ -z "$$missing" ]; then :; \
	elif [ "$$(id -u)" = 0 ]; then \
		apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -qq -y --no-install-recommends $$missing; \
	else echo "for all of the integration tests: sudo apt-get install --no-install-recommends $$missing"; fi

lint: $(STAMP) ## ruff, check and format
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(STAMP) ## mypy --strict
	$(BIN)/mypy

unit: $(STAMP) ## the tests of the modules, on all processors
	$(BIN)/pytest tests --numprocesses auto --dist loadfile --max-worker-restart 0

integration: $(STAMP) ## the tests with other people's programs
	$(BIN)/pytest integration -m "not alone" --numprocesses auto --maxprocesses 4 --dist loadfile --max-worker-restart 0
	$(BIN)/pytest integration -m alone

bench: $(STAMP) ## nbdclone beside other servers; docs/benchmarks.md says how to read it
	$(BIN)/python -m integration.bench $(or $(ARGS),--cost)

powercut: $(STAMP) ## simulated power cuts by the million, on all processors; docs/durability.md has the counts
	$(BIN)/python tests/store/campaign.py $(ARGS)

powerlog: $(STAMP) ## the same in a guest's ext4, from the log of its disk; docs/durability.md has the counts
	POWER_CUTS=300 POWER_ACKNOWLEDGEMENTS=400 POWER_FILE_SYSTEM_BLOCKS="4096 1024" $(BIN)/pytest -rP \
		integration/test_power.py

lifecycle: $(STAMP) ## random verbs under writers, servers killed in their midst, LIFECYCLE_SECONDS; docs/lifecycle.md
	$(BIN)/python -m integration.lifecycle --seconds $(LIFECYCLE_SECONDS) $(ARGS)

between: $(STAMP) ## a verb between any two looks of another, BETWEEN_SECONDS; docs/lifecycle.md
	$(BIN)/python tests/store/between.py --seconds $(BETWEEN_SECONDS) $(ARGS)

pairs: $(STAMP) ## every two verbs at once on the same clone, again and again, PAIRS_SECONDS; docs/lifecycle.md
	$(BIN)/python -m integration.pairs --seconds $(PAIRS_SECONDS) $(ARGS)

kills: $(STAMP) ## a server killed KILLS times under writing clients; docs/durability.md has what it gave
	KILLS=$(KILLS) $(BIN)/pytest -rP integration/test_kill.py

traces: $(STAMP) ## a longer trace of mixed requests; docs/protocol.md has what it gave
	TRACE_BYTES=3300000000 $(BIN)/pytest -rP --timeout 3600 tests/traps/test_traces.py

flips: $(STAMP) ## every bit of the metadata flipped; docs/check.md has the counts
	FLIP_ALL=1 $(BIN)/pytest -rP --timeout 7200 tests/store/test_check_flips.py tests/store/test_rot.py

fuzz: $(STAMP) ## the protocol core against garbage, coverage-guided, FUZZ_SECONDS for each target; docs/protocol.md
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[fuzz]'
	$(BIN)/python tests/fuzz/campaign.py --seconds $(FUZZ_SECONDS) $(ARGS)
	$(BIN)/pytest -q -k goes_through tests/fuzz --cov=nbdclone.protocol --cov-report=term

format: $(STAMP) ## ruff, put right
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean: ## all that was made here
	rm -rf $(VENV) .cache .fuzz .mypy_cache .pytest_cache .ruff_cache .hypothesis .coverage

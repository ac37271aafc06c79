# make study   everything from nothing: environment, the embedded study on two ranks, a report with plots
# make test    everything from nothing: environment, then the tests
# make test-models  every model family of transformers, measured; writes docs/models.md
# make docs    the documentation as a site in build/docs; a warning is an error
# make faults  everything that tries to lose a user's data, the long tests too (docs/faults.md)
# make soak    a study on a small Slurm, disturbed at random for MINUTES (20), then compared with an undisturbed one
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
MINUTES ?= 20
READY := $(VENV)/.ready
PEERS := .venv-peers

.PHONY: study bench test test-slow test-models docs faults soak lint format types clean

study: $(READY)
	$(BIN)/python tools/study.py run studies/quickstart.yaml

test: $(READY)
	$(BIN)/python -m pytest -m "not slow" --numprocesses 2 --dist loadfile $(PYTEST_FLAGS)

test-slow: $(READY)
	$(BIN)/python -m pytest -m slow $(PYTEST_FLAGS)

test-models: $(READY)
	$(BIN)/python -m tests.models.table $(MODELS_FLAGS)

# What the benchmarks compare with has an environment of its own, so that it can break nothing.
bench: $(PEERS)/.ready
	$(PEERS)/bin/python benchmarks/run.py $(BENCH_FLAGS)

docs: $(READY)
	$(BIN)/python -m sphinx -W --keep-going -n -q docs build/docs

soak: $(READY)
	$(BIN)/python -m tests.faults.soak --minutes $(MINUTES)

faults: $(READY)
	$(BIN)/python -m pytest -m faults -rP $(PYTEST_FLAGS)

lint: $(READY)
	$(BIN)/ruff check . && $(BIN)/ruff format --check .

format: $(READY)
	$(BIN)/ruff check --fix . && $(BIN)/ruff format .

types: $(READY)
	$(BIN)/mypy

# The file is touched last, so that an interrupted installation is taken up again. DeepSpeed comes as source and is
# built by pip in an environment of its own.
$(READY): setup.py constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --constraint constraints.txt --editable ".[mpi,dev]"
	touch $@

$(PEERS)/.ready: setup.py constraints.txt benchmarks/requirements.txt
	$(PYTHON) -m venv $(PEERS)
	$(PEERS)/bin/pip install --quiet --constraint constraints.txt --requirement benchmarks/requirements.txt --editable ".[mpi]"
	touch $@

clean:
	rm -rf $(VENV) $(PEERS) runs shards build *.egg-info

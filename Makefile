# make study   environment, the embedded study on two ranks, a report with plots
# make test    environment with the test tools, then all tests but the slow ones
# make unit    tests in one process each, in under 3 minutes; make distributed: with real ranks; make cluster: on a real Slurm
# make test-models  every model family of transformers, measured; writes docs/models.md
# make docs    the documentation as a site in build/docs; a warning is an error
# make faults  everything that tries to lose a user's data, the long tests too (docs/faults.md)
# make soak    a study on a small Slurm, disturbed at random for MINUTES (20), then compared with an undisturbed one
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
MINUTES ?= 20
STUDY := $(VENV)/.study
READY := $(VENV)/.ready
PEERS := .venv-peers
RUN_STUDY = $(BIN)/python tools/study.py run studies/quickstart.yaml
CHECK_PYTHON = @$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
	echo "Python 3.11 or newer is needed, and $(PYTHON) is not; run make with PYTHON=/path/to/python3.11"; exit 1; }

.PHONY: study bench test unit distributed cluster test-slow test-models docs faults soak lint format types clean

# Ctrl-C reaches the shell, too: with the trap the shell waits until the study has saved, and exit status 130 is no error.
study: $(STUDY)
	@trap : INT; echo $(RUN_STUDY); $(RUN_STUDY) || test $$? -eq 130

test: $(READY)
	$(BIN)/python -m pytest -m "not slow" --numprocesses 2 --dist loadfile $(PYTEST_FLAGS)

# The three parts of the tests that are neither slow nor fault tests; tests/conftest.py says which test is in which.
unit: $(READY)
	$(BIN)/python -m pytest -m unit --numprocesses 2 --dist loadfile $(PYTEST_FLAGS)

distributed: $(READY)
	$(BIN)/python -m pytest -m "processes or compute" --numprocesses 2 --dist loadfile $(PYTEST_FLAGS)

cluster: $(READY)
	$(BIN)/python -m pytest -m cluster $(PYTEST_FLAGS)

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

# Two stamps in one environment: the study needs no test tools. Each is touched last, so that an interrupted installation
# is continued by the next make. DeepSpeed is a source distribution; pip builds it in an environment of its own.
$(STUDY): pyproject.toml setup.py constraints.txt
	$(CHECK_PYTHON)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --constraint constraints.txt --editable ".[report,mpi]"
	touch $@

$(READY): $(STUDY)
	$(BIN)/pip install --quiet --constraint constraints.txt --editable ".[report,teacher,mpi,docs,dev]"
	touch $@

$(PEERS)/.ready: pyproject.toml setup.py constraints.txt benchmarks/requirements.txt
	$(CHECK_PYTHON)
	$(PYTHON) -m venv $(PEERS)
	$(PEERS)/bin/pip install --quiet --constraint constraints.txt --requirement benchmarks/requirements.txt --editable ".[report,mpi]"
	touch $@

clean:
	rm -rf $(VENV) $(PEERS) runs shards build *.egg-info

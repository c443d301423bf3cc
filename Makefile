# `make quickstart` and `make test` do all of the set-up on a fresh machine.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
TORCH ?= torch torchvision
VENV := .venv
BIN := $(VENV)/bin
QUICKSTART := runs/quickstart

.PHONY: install quickstart test test-slow test-lowest test-all chaos bench gpu reference docs lint types check \
	release clean

install: $(VENV)/.installed

# torch first and by name alone: a machine's own pip configuration may hold a build for it.
$(VENV)/.usable: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check $(TORCH)
	$(BIN)/pip install --quiet --disable-pip-version-check --editable .
	touch $@

# With what tests and documents need.
$(VENV)/.installed: $(VENV)/.usable
	$(BIN)/pip install --quiet --disable-pip-version-check --editable '.[dev]'
	touch $@

# Teacher, search, confirm and export on digits, which need no download. An unfinished
# quickstart is continued, a finished one shown again.
quickstart: $(VENV)/.usable
	$(BIN)/python -m ekd_ray quickstart --out $(QUICKSTART)

test: install
	$(BIN)/python -m pytest -n auto --dist loadfile --no-loadscope-reorder -m "not slow"

# Tests whose promises faster ones hold.
test-slow: install
	$(BIN)/python -m pytest -n auto --dist loadfile --no-loadscope-reorder -m slow

# The oldest releases that pyproject allows, on tests that touch every library but torchvision.
test-lowest: .venv-lowest/.installed
	PYTHONPATH=. .venv-lowest/bin/python -m pytest -n auto --dist loadfile -m "not slow" \
		tests/losses/test_dirichlet.py tests/losses/test_kd.py \
		tests/data/test_splits.py tests/data/test_store.py \
		tests/engine/test_teacher_cache.py tests/engine/test_private_torch.py \
		tests/results/test_report.py tests/results/test_importance.py \
		tests/results/test_tensorboard.py tests/results/test_paired.py \
		tests/scale/test_private_api.py tests/scale/test_searcher.py \
		tests/scale/test_samplers.py tests/scale/test_schedulers.py tests/scale/test_storage.py tests/scale/test_study_run.py

.venv-lowest/.installed: pyproject.toml tests/lowest_versions.py
	test -x .venv-lowest/bin/python || $(PYTHON) -m venv .venv-lowest
	$(PYTHON) tests/lowest_versions.py > .venv-lowest/requirements.txt
	.venv-lowest/bin/pip install --quiet --disable-pip-version-check \
		--requirement .venv-lowest/requirements.txt
	touch $@

test-all: test test-slow test-lowest

# Too long for `make test`: studies whose drivers, trials, workers, nodes and Ray are killed at named
# points, commands that are, one study that is killed before every kind of change of its files,
# disks that fill up, memory that does, nodes that are cut off, differ or have GPUs, a submitted job,
# parts of one's own on a cluster, a script with a Ray of its own (over an hour on two cores; the last
# table says what was killed and what it cost); then ten minutes of hostile bundles, folders, recipes.
# EKD_CHAOS_SEED draws other moments and inputs.
chaos: install
	EKD_CHAOS_KILLS=1 EKD_CHAOS_CHANGES=110 EKD_CHAOS_FILLS=40 EKD_CHAOS_NODES=1 EKD_WORKERS=1 \
		EKD_CHAOS_JSON=chaos.json $(BIN)/python -m pytest -s tests/chaos \
		tests/cluster/test_lost_nodes.py tests/cluster/test_namespaces.py \
		tests/cluster/test_job.py tests/cluster/test_own_parts.py \
		tests/cluster/test_gpu_nodes.py tests/cluster/test_secrets_left.py \
		tests/cluster/test_cluster_check.py tests/scale/test_memory_groups.py \
		tests/scale/test_effects.py tests/studies/test_background.py \
		tests/scale/test_one_run.py tests/scale/test_groups_stopped.py tests/benchmarks/test_leaks.py
	EKD_FUZZ_SECONDS=600 $(BIN)/python -m pytest --override-ini timeout=1200 tests/fuzz

# EKD_DATA_ROOT with CIFAR-10 and its teacher adds the benchmark of a whole study.
bench: install
	$(BIN)/pip install --quiet --disable-pip-version-check --editable '.[dev,bench]'
	$(BIN)/python -m benchmarks.run --json bench.json

# Whether the GPU paths do what is said of them, and what a step costs there; no download.
# After six minutes nothing more is begun.
gpu: install
	$(BIN)/python -m benchmarks.run gpu --json gpu.json

# The parts of the documents that are made from the code, into their pages.
reference: install
	$(BIN)/python docs/write_reference.py

# The site, in build/site.
docs: install
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports

types: install
	$(BIN)/mypy

check: lint types test

# What would be published, in dist/, tested; CONTRIBUTING.md says what comes before and after.
release: install
	$(BIN)/python deploy/release.py
	rm -rf dist
	$(BIN)/python -m build --outdir dist
	EKD_DIST=dist $(BIN)/python -m pytest tests/packaging

clean:
	rm -rf $(VENV) .venv-lowest runs build dist *.egg-info

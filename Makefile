# `make demo` and `make test` need Linux, Python 3.11 or later (with its venv module) and make; they install the
# rest, at the versions of constraints.txt, into .venv beside this file. Choose another interpreter with
# `make PYTHON=/path/to/python ...`, hand options to pip with PIP_FLAGS.

SHELL := /bin/sh
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
PIP := $(BIN)/python -m pip --disable-pip-version-check
PIP_FLAGS ?=
PYTEST_FLAGS ?=
NOX_FLAGS ?=
RANKS ?= 4
DEMO_ARGS ?=
OUT ?= out
# PyTorch types the members of a module as Tensor | Module, which a script that looks into models trips over at every step, and
# does not say which names it hands on.
BENCHMARK_TYPES := --no-warn-unused-ignores --implicit-reexport $(addprefix --disable-error-code=,arg-type union-attr operator misc call-overload import-not-found import-untyped)
# Tests change modules in place (to mypy they stay what they were), and put two calls into a lambda.
TEST_TYPES := $(BENCHMARK_TYPES) --no-warn-unreachable --disable-error-code=index --disable-error-code=func-returns-value
PINS := --python-version 3.11 --python-platform x86_64-manylinux_2_28 --no-annotate --strip-extras \
    --custom-compile-command "make pins"
FORM ?= --full

# Ranks share the machine: several threads in each of them only get in each other's way.
export OMP_NUM_THREADS ?= 1
# Tests and recipes find mpiexec, torchrun and syncbn-launch of this environment first.
export PATH := $(CURDIR)/$(BIN):$(PATH)

.PHONY: help venv test test-oldest test-newest matrix sanitize lint types docs demo fuzz soak bench experiments pictures pins clean

help: ## say what each target does
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  make \1\t\2/p' Makefile | expand -t 20

venv: $(STAMP) ## make .venv and install everything, pinned

# An environment that works is kept. A candidate for a new one counts only if it runs, is new enough and can make
# environments (Debian ships venv separately).
$(STAMP): pyproject.toml constraints.txt $(wildcard setup.py syncbn/kernels/native/*.[ch] syncbn/comm/*.c)
	@found=; if $(BIN)/python -c 'import sys; sys.exit(sys.prefix == sys.base_prefix)' 2>/dev/null; then exit 0; fi; \
	python="$(PYTHON)"; \
	for candidate in $${python:-python3.11 python3 python3.12 python3.13 python3.14}; do \
	    if $$candidate -c 'import ensurepip, sys, venv; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then \
	        found=$$candidate; break; \
	    fi; \
	done; \
	if [ -z "$$found" ]; then \
	    echo "make: no Python 3.11 or later with the venv and ensurepip modules found$${python:+ (tried $$python)}:" \
	        "install one (on Debian also python3-venv) or run make PYTHON=/path/to/python" >&2; exit 1; \
	fi; \
	echo "making $(VENV) with $$($$found --version)"; \
	$$found -m venv --clear $(VENV)
	$(PIP) install -q $(PIP_FLAGS) -c constraints.txt --upgrade pip
	$(PIP) install -q $(PIP_FLAGS) -c constraints.txt --group dev
	$(PIP) install -q $(PIP_FLAGS) -c constraints.txt --no-build-isolation -e '.[mpi,examples]'
	@touch $@

test: $(STAMP) ## run the tests that need no GPU (mpiexec included), in minutes
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder -m "not slow and not gpu and not nccl" $(PYTEST_FLAGS)

# Each in an environment of its own under .nox; a first run downloads what it needs.
test-oldest: $(STAMP) ## the same tests with the oldest torch, numpy, mpi4py, ... that syncbn supports
	$(PIP) install -q $(PIP_FLAGS) -c constraints.txt --group matrix
	$(BIN)/python -m nox -s oldest $(NOX_FLAGS)

test-newest: $(STAMP) ## and with the newest of everything, on the Python of .venv (another: ON=3.13)
	$(PIP) install -q $(PIP_FLAGS) -c constraints.txt --group matrix
	$(BIN)/python -m nox -s newest -p "$${ON:-$$($(BIN)/python -c 'import sys; print("%d.%d" % sys.version_info[:2])')}" $(NOX_FLAGS)

matrix: $(STAMP) ## the oldest, the pinned and the newest, on every Python from 3.11 on that is here
	$(PIP) install -q $(PIP_FLAGS) -c constraints.txt --group matrix
	$(BIN)/python -m nox $(NOX_FLAGS)

# A second copy of the package, whose compiled part stops at a read or write outside of memory or at undefined behaviour.
sanitize: $(STAMP) ## run the tests of the compiled parts under AddressSanitizer and UBSan
	rm -rf $(OUT)/sanitized build
	CFLAGS="-O1 -fsanitize=address,undefined -fno-sanitize-recover=undefined" LDFLAGS="-fsanitize=address,undefined" \
	    $(PIP) install -q $(PIP_FLAGS) --no-deps --no-build-isolation --target $(OUT)/sanitized .
	PYTHONPATH=$(OUT)/sanitized LD_PRELOAD="$$(gcc -print-file-name=libasan.so)" ASAN_OPTIONS=detect_leaks=0 \
	    UBSAN_OPTIONS=print_stacktrace=1 $(BIN)/python -P -m pytest -m "not slow" tests/test_native.py tests/test_sockets.py $(PYTEST_FLAGS)

lint: $(STAMP) ## check style and formatting, the shell scripts and the workflows
	$(BIN)/python -m ruff check .
	$(BIN)/python -m ruff format --check .
	$(BIN)/shellcheck .ci/run $(wildcard launch/*.sh launch/slurm.sbatch)
	$(BIN)/check-jsonschema -q --builtin-schema vendor.github-workflows $(wildcard .github/workflows/*.yml)

types: $(STAMP) ## check the type annotations
	$(BIN)/python -m mypy
	MYPYPATH=examples $(BIN)/python -m mypy $(BENCHMARK_TYPES) benchmarks
	MYPYPATH=tests:examples $(BIN)/python -m mypy $(TEST_TYPES) tests

docs: $(STAMP) ## build the guide as a site, into docs/_build/html
	$(BIN)/python -m sphinx -W --keep-going -b html docs docs/_build/html

demo: $(STAMP) ## the small-batch experiment on RANKS=4 ranks: table, CSV and picture under OUT=out
	$(BIN)/python -m syncbn.launch -n $(RANKS) examples/small_batch.py --out $(OUT)/small_batch $(DEMO_ARGS)

# Most of the time ranks wait for the timeout of a group, so that several scenarios share a core.
fuzz: $(STAMP) ## 10,000 random programs: no hang, abort, innocent name or wrong number
	$(BIN)/python -m pytest -n 4 -m slow -k fuzz --timeout 3600 $(PYTEST_FLAGS)

soak: $(STAMP) ## ten thousand steps: memory flat, statistics equal
	$(BIN)/python -m pytest -m slow -k soak --timeout 3600 $(PYTEST_FLAGS)

bench: export BENCHMARKS_OUT ?= $(OUT)/benchmarks
bench: $(STAMP) ## all benchmarks on 2 ranks, gloo and MPI, into OUT/benchmarks (or BENCHMARKS_OUT)
	$(PIP) install -q $(PIP_FLAGS) --no-deps --no-build-isolation fairscale==0.4.13 # to compare with
	$(BIN)/python benchmarks/layer.py
	$(BIN)/python -m syncbn.launch --engine mpi -n 2 benchmarks/layer.py --backend mpi4py
	$(BIN)/python -m syncbn.launch --engine mpi -n 2 benchmarks/layer.py --backend mpi4py --rivals
	$(BIN)/python -m syncbn.launch --engine mpi -n 2 benchmarks/layer.py --backend mpi4py --shapes resnet50 --rounds 9
	$(BIN)/python -m syncbn.launch --engine mpi -n 2 benchmarks/layer.py --backend mpi4py --shapes unet --rounds 9
	$(BIN)/python -m syncbn.launch --engine mpi -n 2 benchmarks/layer.py --backend mpi4py --shapes mlp --rounds 9
	$(BIN)/python benchmarks/layer.py --threads 2
	$(BIN)/python benchmarks/compiled.py
	$(BIN)/python -m syncbn.launch --engine mpi -n 2 benchmarks/compiled.py --backend mpi4py
	$(BIN)/python -m syncbn.launch --engine mpi -n 2 benchmarks/step.py --backend mpi4py
	$(BIN)/python -m syncbn.launch -n 2 benchmarks/step.py --backend gloo
	$(BIN)/python benchmarks/memory.py
	$(BIN)/python benchmarks/masks.py
	$(BIN)/python benchmarks/accumulation.py
	$(BIN)/python benchmarks/checks.py
	$(BIN)/python benchmarks/kernels.py
	$(BIN)/python benchmarks/observer.py
	$(BIN)/python benchmarks/latency.py
	$(BIN)/python benchmarks/scaling.py

# RESULTS=examples/results writes what the documentation shows anew. FORM= gives the short form of each, about two minutes.
# One that was interrupted goes on where it was.
experiments: RESULTS ?= $(OUT)/experiments
experiments: $(STAMP) ## all experiments in full, into OUT/experiments (or RESULTS; 40 minutes on 2 free cores, 70 on busy ones)
	$(BIN)/python -m syncbn.launch -n 4 examples/small_batch.py $(FORM) --out $(RESULTS)/small_batch
	$(BIN)/python -m syncbn.launch -n 4 examples/segmentation.py $(FORM) --out $(RESULTS)/segmentation
	$(BIN)/python -m syncbn.launch -n 4 examples/mnist_1d.py $(FORM) --out $(RESULTS)/mnist_1d
	$(BIN)/python -m syncbn.launch -n 4 examples/population.py $(FORM) --out $(RESULTS)/population
	$(BIN)/python -m syncbn.launch -n 8 examples/group_size.py $(FORM) --out $(RESULTS)/group_size
	$(BIN)/python -m syncbn.launch -n 8 examples/advice.py $(FORM) --out $(RESULTS)/advice
	$(BIN)/python -m syncbn.launch -n 4 examples/discrepancy.py $(FORM) --out $(RESULTS)/discrepancy
	$(BIN)/python -m syncbn.launch -n 4 examples/batch_renorm.py $(FORM) --out $(RESULTS)/batch_renorm
	$(BIN)/python -m syncbn.launch -n 4 examples/claims.py $(FORM) --out $(RESULTS)/claims
	$(BIN)/python -m syncbn.launch -n 4 examples/depth.py $(FORM) --out $(RESULTS)/depth
	$(BIN)/python -m syncbn.launch -n 4 examples/covariate_shift.py $(FORM) --out $(RESULTS)/covariate_shift
	$(BIN)/python -m syncbn.launch -n 4 examples/undo.py $(FORM) --out $(RESULTS)/undo
	$(BIN)/python -m syncbn.launch -n 4 examples/regularization.py $(FORM) --out $(RESULTS)/regularization
	$(BIN)/python -m syncbn.launch -n 4 examples/padded.py $(FORM) --out $(RESULTS)/padded
	$(BIN)/python -m syncbn.launch -n 4 examples/contrastive.py $(FORM) --out $(RESULTS)/contrastive
	$(BIN)/python -m syncbn.launch --engine mpi -n 8 examples/overhead.py $(FORM) --out $(RESULTS)/overhead
	$(BIN)/python -m syncbn.launch -n 4 examples/equivalence.py $(FORM) --out $(RESULTS)/equivalence

pictures: $(STAMP) ## draw the pictures of results again, from their CSVs
	$(BIN)/python examples/redraw.py
	$(BIN)/python benchmarks/redraw.py

# Versions that are in the files stay; UV_FLAGS=--upgrade takes the newest, `UV_FLAGS="--upgrade-package numpy"` one of them.
# constraints.in says which torch is the pinned one.
pins: $(STAMP) ## write constraints.txt and constraints-oldest.txt anew
	$(PIP) install -q $(PIP_FLAGS) -c constraints.txt --group matrix
	$(BIN)/python -m uv pip compile -q pyproject.toml --all-extras --group dev --group matrix -c constraints.in \
	    $(PINS) $(UV_FLAGS) -o constraints.txt
	$(BIN)/python -m uv pip compile -q pyproject.toml --extra mpi --extra examples --resolution lowest-direct \
	    $(PINS) -o constraints-oldest.txt

clean: ## remove the environment and everything else that was made here
	rm -rf $(VENV) .nox $(OUT) build dist docs/_build .hypothesis .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

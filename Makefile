# Two commands do everything: `make demo` and `make test`. Both make .venv first.

PYTHON ?= python3.11
BIN := .venv/bin
# Versions for development; of another Python or PyTorch: `make CONSTRAINTS=/dev/null`.
CONSTRAINTS ?= $(CURDIR)/.ci/constraints.txt
PIP := pip install --quiet --disable-pip-version-check --constraint $(CONSTRAINTS)
# A process a core, up to four, since each may hold a compiler; a file's tests stay together.
PYTEST := pytest --numprocesses auto --maxprocesses 4 --dist loadfile --durations 25

# Compilers for targets that are not here, where the tests of all environments find them.
export KPX_PLUGINS ?= $(CURDIR)/.plugins

.PHONY: demo test test-slow test-changed lint format skeletons wheel-test readme-test clean

.venv/.installed: pyproject.toml .ci/constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m $(PIP) --editable ".[dev]"
	touch $@

demo: .venv/.installed
	$(BIN)/python -m kpx demo

.plugins/.installed: .venv/.installed
	$(BIN)/python -m kpx doctor --install tpu --install cuda --install rocm
	touch $@

# Intel's, which needs a Python of 3.12 or later beside this one.
.plugins/.intel: .venv/.installed
	$(BIN)/python -m kpx doctor --install xpu
	touch $@

test: .venv/.installed .plugins/.installed
	$(BIN)/python -m $(PYTEST) tests -m "not slow"

# What repeats a check over many cases: every target's every model, the op database, random programs, patterns.
test-slow: .venv/.installed .plugins/.installed
	$(BIN)/python -m $(PYTEST) tests -m slow

# The slow tests of what changed since the last commit that passed all of them, and a fifth of the others: another one at
# each commit. Where that commit is not in the clone, all.
test-changed: .venv/.installed .plugins/.installed
	$(BIN)/python -m $(PYTEST) tests -m slow --changed-since "$$(cat .ci/passed)" --share "$$(git rev-list --count HEAD)/5"

lint: .venv/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright
	$(BIN)/python -m kpx.passes.skeletons --check

format: .venv/.installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# After a change of what patterns are spelled by, or of how modules are canonicalized.
skeletons: .venv/.installed
	$(BIN)/python -m kpx.passes.skeletons

# The README's Python blocks, run as they stand.
readme-test: .venv/.installed .plugins/.installed
	$(BIN)/python -m tests.readme

# The tests of what a wheel could lack (modules, data files, entry points), against the built one, in an environment of its
# own, from a folder where the checkout cannot be imported.
wheel-test: .venv/.installed .plugins/.installed
	rm -rf build dist .venv-wheel
	$(BIN)/python -m build --wheel --outdir dist . > /dev/null
	$(PYTHON) -m venv .venv-wheel
	.venv-wheel/bin/python -m $(PIP) "$$(ls $(CURDIR)/dist/*.whl)[test]"
	outside=$$(mktemp -d) && cp -r tests bench pyproject.toml $$outside && cd $$outside && \
	  $(CURDIR)/.venv-wheel/bin/$(PYTEST) tests/test_[a-f]*.py tests/test_[h-z]*.py tests/bridges/test_flax.py \
	  tests/bridges/test_torch_doors.py tests/bridges/test_torch_module.py tests/hardware tests/observe \
	  tests/runtime/test_absent.py tests/runtime/test_programs.py tests/kernels/test_kernels.py tests/kernels/test_mkl.py \
	  tests/train/test_trainer.py -m "not models and not slow" -p no:cacheprovider && \
	  rm -rf $$outside

clean:
	rm -rf build dist .venv .venv-wheel .plugins *.egg-info

# Every target sets up its own virtual environment; only python3 (3.11 or newer) and make are needed.
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin

.PHONY: train test test-slow test-parity lint bench docs notebooks

$(VENV)/.installed: pyproject.toml
	$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("gramjax needs Python 3.11 or newer, found " + sys.version)'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[train,test]'
	touch $@

# Trains on the embedded emoji set and evaluates; interrupted, it continues. Options: make train ARGS="--seed 1".
train: $(VENV)/.installed
	$(BIN)/python -m experiments.train $(ARGS)

# The tests of a file share what they have compiled: `loadfile` keeps them in one process.
test: $(VENV)/.installed
	$(BIN)/python -m pytest -q -n auto --maxprocesses 8 --dist loadfile -m "not slow"

test-slow: $(VENV)/.installed
	$(BIN)/python -m pytest -q -m slow

# PyTorch with GPU support, as the registry has it for Linux, takes gigabytes: where only the CPU build is wanted, install
# that one into the environment first.
$(VENV)/.parity: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[train,test,parity]'
	touch $@

test-parity: $(VENV)/.parity
	$(BIN)/python -m pytest -q -m parity tests

lint: $(VENV)/.installed
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/pyright

bench: $(VENV)/.installed
	$(BIN)/python -m experiments.benchmark $(ARGS)

# The reference of every public name, from the docstrings: build/docs/index.html.
docs: $(VENV)/.installed
	$(BIN)/python -W error -W "ignore:The module specification" \
	  -W "ignore:Error parsing type annotation tree_types" -m pdoc --docformat google --math --output-directory build/docs gramjax \
	  $$($(BIN)/python -c 'import gramjax, pkgutil; print(*(module.name for module in pkgutil.walk_packages(gramjax.__path__, "gramjax.") if "._" not in module.name))')

# Runs the notebooks as someone does who has the wheel and no checkout: in an environment and a folder of their own.
# With ARGS=--overwrite it keeps their outputs, to be committed.
notebooks: $(VENV)/.installed
	rm -rf build/wheel
	$(BIN)/python -m build --wheel --outdir build/wheel .
	test -e $(VENV)-notebooks/bin/python || $(PYTHON) -m venv $(VENV)-notebooks
	$(VENV)-notebooks/bin/python -m pip install --quiet --disable-pip-version-check "$$(ls build/wheel/*.whl)[notebooks]"
	$(VENV)-notebooks/bin/python -m pip install --quiet --disable-pip-version-check --force-reinstall --no-deps build/wheel/*.whl
	folder=$$(mktemp -d) && cp notebooks/*.ipynb $$folder && \
	  (cd $$folder && $(abspath $(VENV))-notebooks/bin/python -m pytest -q -p no:cacheprovider --nbmake --nbmake-timeout=600 --durations=0 $(ARGS)) && \
	  $(if $(findstring --overwrite,$(ARGS)),cp $$folder/*.ipynb notebooks &&) rm -rf $$folder

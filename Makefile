# Two commands: `make demo` and `make test`. Each sets up .venv by itself; a second run finds it up to date.
# They need Python 3.11 or newer, make, and a network for the first run.

SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DELETE_ON_ERROR:
.PHONY: demo test check figures clean

# The first of these that runs and is new enough; 3.11 first: constraints.txt was resolved on it.
PYTHON ?= $(shell for python in python3.11 python3.12 python3.13 python3; do \
	"$$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo "$$python" && break; done)
EXTRAS := diffusers,report,search,openvino,trt,triton,kernels,dev
BIN := .venv/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
WHEEL := .venv/wheel-check
INSTALLED := .venv/installed
PACKAGE := __init__.py cli.py compiler exporters kernels passes quant runtime
SOURCES := $(shell find $(wildcard $(PACKAGE)) -not -path '*/__pycache__*')  # folders too: they change when a file goes
CHECKED := $(wildcard tests examples benchmarks)
OUTPUT := build/glyphs
PASSES := prune:count=2,cache:interval=4,quant,fold
DEMO := $(BIN)/dcompile examples/glyphs/model --passes $(PASSES) --judge examples/glyphs --gate 'accuracy_drop<=0.03' -o $(OUTPUT)

demo: $(INSTALLED)
	$(DEMO)
	$(BIN)/dcompile run $(OUTPUT) -n 36 --seed 0 -o $(OUTPUT).png
	@echo; echo "samples of the compiled model   $(OUTPUT).png"
	@echo "report with pictures            $(OUTPUT)/report.html"

# Two workers of one thread each: on two cores this takes half the time of one worker with two.
test: check
	OMP_NUM_THREADS=1 $(BIN)/pytest -q -n 2 --dist loadfile

check: $(INSTALLED) $(WHEEL)/dcompile
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy $(WHEEL)/dcompile $(CHECKED) | sed 's,^$(WHEEL)/dcompile/,,'
	$(BIN)/lint-imports --no-logo

figures: $(INSTALLED)
	for script in $(wildcard benchmarks/*.py); do $(BIN)/python "$$script"; done

clean:
	rm -rf .venv build dist *.egg-info .hypothesis .import_linter_cache .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# torch first and alone: everything else then resolves against the version that constraints.txt pins.
.venv/torch: constraints.txt
	@test -n "$(PYTHON)" || { echo "Python 3.11 or newer is needed; name it with make PYTHON=..." >&2; exit 1; }
	test -x $(BIN)/python || "$(PYTHON)" -m venv .venv
	$(PIP) install -q -c constraints.txt torch setuptools
	touch $@

$(INSTALLED): .venv/torch pyproject.toml
	$(PIP) install -q -c constraints.txt --no-build-isolation -e '.[$(EXTRAS)]'
	$(PIP) install -q -c constraints.txt --no-deps DeepCache cache-dit  # oracles; they ask for transformers, and do not use it
	touch $@

# The package as users get it, for the type checker, which cannot follow the package-dir mapping of an editable install.
# build/lib goes first: setuptools would pack what an earlier build left there.
$(WHEEL)/dcompile: $(INSTALLED) $(SOURCES) py.typed
	rm -rf build/lib build/bdist.* $(WHEEL)
	$(PIP) install -q --no-deps --no-build-isolation --target $(WHEEL) .
	touch $@

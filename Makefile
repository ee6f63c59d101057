# `make demo` and `make test` are all a newcomer needs; each installs what it needs into .venv.
PYTHON ?= python3
# An interpreter of one's choice gets an environment of its own.
VENV := $(if $(filter python3,$(PYTHON)),.venv,.venv-$(notdir $(PYTHON)))
BIN := $(VENV)/bin
RUN := PYTHONPATH=. $(BIN)/python
WORKDIR ?= runs/demo
ARGS ?=
# Tests are spread over the cores, but not over more processes than memory likes.
JOBS ?= $(shell n=$$(nproc 2>/dev/null || echo 2); echo $$(( n > 8 ? 8 : n )))

.PHONY: help install tpu-aot docs-env docs demo test middle long parity bench lint lock

help:
	@echo "make demo    train halonet_tiny on 4,000 digits and show what came of it (runs/demo)"
	@echo "make test    the tests, in minutes"
	@echo "make middle  the longer tests that CI adds"
	@echo "make long    the exhaustive ones; records their results in tests/records/"
	@echo "make parity  compares with timm, lucidrains and MindCV, installed apart (6 GB)"
	@echo "make tpu-aot install libtpu (210 MB): compiles for TPUs on any machine"
	@echo "make docs-env install what only docs and notebooks need"
	@echo "make docs    the documentation as a site of files: site/index.html"
	@echo "make bench   how fast, beside timm, lucidrains and kecam; writes docs/bench_peers_cpu.*"
	@echo "make lint    ruff, format and lint"
	@echo "make lock    resolve requirements.txt anew (needs uv)"
	@echo "PYTHON=python3.12 chooses the interpreter."

install: $(VENV)/installed

# What requirements.lock pins, in a folder of its own.
define environment
@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(0 if (3, 11) <= v < (3, 14) else \
  "error: Python %d.%d; it must be 3.11, 3.12 or 3.13: make PYTHON=python3.12 ..." % v)'
@echo "installing into $(1): a minute, once"
@$(PYTHON) -m venv $(1)
@if command -v uv >/dev/null; then \
  uv pip sync --quiet --python $(1)/bin/python --require-hashes requirements.lock; \
else \
  $(1)/bin/python -m pip install --quiet --disable-pip-version-check --require-hashes \
    -r requirements.lock; \
fi
endef

$(VENV)/installed: requirements.lock
	$(call environment,$(VENV))
	@touch $@

# The peers, for parity and benchmarks. pip in any case, as it prefers PyTorch's CPU build and goes
# on where its index is shut.
PEERS := $(VENV)-peers
MINDCV := $(VENV)-mindcv
PIP_INSTALL := -m pip install --quiet --disable-pip-version-check --retries 1

$(PEERS)/installed: requirements.lock tests/parity/requirements.txt
	$(call environment,$(PEERS))
	@$(PEERS)/bin/python $(PIP_INSTALL) --no-deps -r tests/parity/requirements.txt
	@touch $@

$(MINDCV)/installed: tests/parity/requirements-mindcv.txt
	@echo "installing into $(MINDCV): a minute, once"
	@$(PYTHON) -m venv $(MINDCV)
	@$(MINDCV)/bin/python $(PIP_INSTALL) -r tests/parity/requirements-mindcv.txt
	@touch $@

tpu-aot: $(VENV)/tpu-aot
docs-env: $(VENV)/docs

# What compiles for TPUs, and what docs and notebooks need: beside the rest, which does not move, and
# only where somebody asks for it.
$(VENV)/tpu-aot $(VENV)/docs: $(VENV)/%: requirements-%.txt $(VENV)/installed
	@if command -v uv >/dev/null; then \
	  uv pip install --quiet --python $(BIN)/python -r $<; \
	else \
	  $(BIN)/python $(PIP_INSTALL) -r $<; \
	fi
	@touch $@

# Fonts, scripts and pictures are all in site/, which any file server or a browser opens.
docs: docs-env
	@NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --quiet

demo: install
	@$(RUN) main.py --config=configs/demo.py --workdir=$(WORKDIR) $(ARGS)

test: install
	@$(RUN) -m pytest -q -n $(JOBS) --dist loadfile --no-loadscope-reorder \
	  -m "not middle and not long" $(ARGS)

middle: install
	@$(RUN) -m pytest -q -n $(JOBS) --dist loadfile --no-loadscope-reorder \
	  -m "middle and not long" $(ARGS)

long: install
	@$(RUN) -m pytest -q -n $(JOBS) -m long --record=tests/records/long.json $(ARGS)

parity: $(PEERS)/installed $(MINDCV)/installed
	@PYTHONPATH=tests $(MINDCV)/bin/python tests/parity/dump_mindcv.py .cache/parity
	@PYTHONPATH=. $(PEERS)/bin/python -m pytest -q tests/parity \
	  --record=tests/records/parity.json $(ARGS)

# For times to keep, on a machine that does nothing else. ARGS=--quick shows in minutes that it runs.
bench: $(PEERS)/installed
	@PYTHONPATH=. $(PEERS)/bin/python -m experiments.bench_peers $(ARGS)

lint: install
	@$(BIN)/ruff format --check . && $(BIN)/ruff check .

lock:
	uv pip compile --quiet --universal --python-version 3.11 --generate-hashes \
	  --no-emit-index-url --custom-compile-command "make lock" requirements-dev.txt \
	  --output-file requirements.lock

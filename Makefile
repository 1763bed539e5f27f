# Needs GNU make and Python 3.12 or newer; everything else is installed into .venv.
#
#   make train   the main job: a small DeepSeek-V3 on the Python standard library's source
#   make test    the tests                     make check   lint, format, types, import order
#   make setup   only .venv                    make lock    pin the newest releases (wants uv)
#
# make train WORKDIR=runs/other ARGS='--set training.seed=1'; make test ARGS='-k router'

WORKDIR ?= runs/tiny
ARGS    ?=
VENV    := .venv
PYTHON  := $(VENV)/bin/python
PYTHONS := python3.13 python3.12 python3
NEW     := import sys; sys.exit(sys.version_info < (3, 12))

.PHONY: train test check setup install lock $(VENV)

train: setup
	$(PYTHON) train.py configs/tiny.py --workdir $(WORKDIR) $(ARGS)

test: setup
	$(PYTHON) -m pytest -n 2 --dist loadfile $(ARGS)

check: setup
	$(PYTHON) -m ruff check
	$(PYTHON) -m ruff format --check
	$(PYTHON) -m pyrefly check
	$(PYTHON) -m pytest -q tests/test_architecture.py

# .venv is ready when its interpreter runs and holds what requirements.txt asks; a copy tells.
setup:
	@cmp -s requirements.txt $(VENV)/installed.txt && $(PYTHON) -c '$(NEW)' 2>/dev/null \
	  || $(MAKE) --no-print-directory install

install:
	@$(PYTHON) -c '$(NEW)' 2>/dev/null || $(MAKE) --no-print-directory $(VENV)
	@echo "Installing the pinned packages into $(VENV)"
	@if uv --version >/dev/null 2>&1; \
	  then uv pip install --compile-bytecode --python $(PYTHON) \
	    --require-hashes -r requirements.txt; \
	  else $(PYTHON) -m ensurepip >/dev/null \
	    && $(PYTHON) -m pip install --require-hashes -r requirements.txt; fi
	@cp requirements.txt $(VENV)/installed.txt

$(VENV):
	@for python in $(PYTHONS); do $$python -c '$(NEW)' 2>/dev/null && break; python=; done; \
	if [ -z "$$python" ]; then \
	  echo "error: dsv3 needs Python 3.12 or newer; found" \
	    "$$(python3 --version 2>/dev/null || echo no python3)." \
	    "Install one so that 'python3.12' or 'python3' runs it." >&2; exit 2; fi; \
	echo "Making $(VENV) with $$($$python --version)"; \
	$$python -m venv --clear $(VENV)

lock:
	uv pip compile --quiet --upgrade --python-version 3.12 --python-platform linux \
	  --extra test --extra lint --generate-hashes --no-emit-index-url --no-emit-find-links \
	  --custom-compile-command 'make lock' --output-file requirements.txt pyproject.toml

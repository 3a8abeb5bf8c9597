# make demo    the whole road on a tiny model
# make test    the tests
# make check   style, types, direction of imports
#
# Each does all set-up itself, from any state. Needs Python 3.11 or 3.12; PYTHON=/path/to/python names one.
# On Linux, plain torch brings several GB of CUDA along; pytorch.org says how to have its CPU build installed instead.

PYTHON := python3.11 python3.12 python3 python
OUT := runs/demo
VENV := .venv
IS_SUPPORTED := import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 12))
# Changes when the lock, the project's metadata or the folder's place does: then .venv is brought up to date.
STATE := $(shell (pwd && cat constraints.txt pyproject.toml) | cksum)

.DEFAULT_GOAL := help
.PHONY: help demo test check install

help:
	@sed -n '1,/^$$/s/^# \{0,1\}//p' Makefile

demo: install
	@$(VENV)/bin/nexusgen demo --out "$(OUT)"

test: install
	@$(VENV)/bin/python -m pytest

check: install
	$(VENV)/bin/ruff check
	$(VENV)/bin/ruff format --check
	$(VENV)/bin/mypy
	$(VENV)/bin/lint-imports

# A stamp, written last, says that an installation was finished. Without it, what is there is completed, and made anew
# if that fails: an interrupted installation, another Python, or a folder that was moved may have left anything.
install:
	@set -eu; \
	supported() { "$$1" -c '$(IS_SUPPORTED)' 2>/dev/null; }; \
	in_place() { case "$$($(VENV)/bin/pip --version 2>/dev/null)" in *"$$(pwd)/$(VENV)/"*) true;; *) false;; esac; }; \
	fill() { \
		$(VENV)/bin/python -m pip install --disable-pip-version-check -c constraints.txt pip setuptools && \
		$(VENV)/bin/python -m pip install --disable-pip-version-check -c constraints.txt -e '.[dev]' && \
		$(VENV)/bin/nexusgen --help >/dev/null; \
	}; \
	works() { $(VENV)/bin/nexusgen --help >/dev/null 2>&1; }; \
	if [ "$$(cat $(VENV)/.installed 2>/dev/null)" = '$(STATE)' ] && works; then exit 0; fi; \
	rm -f $(VENV)/.installed; \
	echo 'Installing what constraints.txt says into $(VENV): some minutes, once' >&2; \
	if ! { supported $(VENV)/bin/python && in_place && fill; }; then \
		found=; \
		for python in $(PYTHON); do if supported "$$python"; then found=$$python; break; fi; done; \
		if [ -z "$$found" ]; then \
			echo 'No Python 3.11 or 3.12 among: $(PYTHON). Install one, or name it: make PYTHON=/path/to/python3.11' >&2; \
			exit 1; \
		fi; \
		rm -rf $(VENV).old; \
		if [ -e $(VENV) ]; then mv $(VENV) $(VENV).old; fi; \
		if ! { "$$found" -m venv $(VENV) && fill; }; then \
			if [ -e $(VENV).old ]; then rm -rf $(VENV); mv $(VENV).old $(VENV); fi; \
			echo 'The installation failed, see above; is the package index reachable?' >&2; \
			exit 1; \
		fi; \
		rm -rf $(VENV).old; \
	fi; \
	echo '$(STATE)' > $(VENV)/.installed

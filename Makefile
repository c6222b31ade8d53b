# `make demo` and `make test` are all a new clone needs: each makes its own environment from PyPI.
PYTHON ?= python3
VENV := .venv
OLDEST := .venv-oldest
OLDEST_VERSIONS := torch==2.11.0 torchvision==0.26.0 transformers==5.17.0 av==16.0.0

.PHONY: help demo test test-oldest lint clean

help:
	@echo "make demo         a tiny model reads a clip and answers a question"
	@echo "make test         all tests, on the newest versions"
	@echo "make test-oldest  all tests, on the oldest: $(OLDEST_VERSIONS)"
	@echo "make lint         ruff"
	@echo "make clean        remove the environments"

demo: $(VENV)/demo.stamp
	$(VENV)/bin/python examples/demo.py

test: $(VENV)/test.stamp
	$(VENV)/bin/python -m pytest

test-oldest: $(OLDEST)/test.stamp
	$(OLDEST)/bin/python -m pytest

lint: $(VENV)/test.stamp
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .

clean:
	rm -rf $(VENV) $(OLDEST)

# install(environment, extra, further requirements)
define install
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=python3.11")'
	@echo "Installing into $(1) (PyTorch is several GB; a few minutes on a fast line)"
	$(PYTHON) -m venv $(1)
	$(1)/bin/python -m pip install --quiet --editable ".[$(2)]" $(3)
	@touch $@
endef

$(VENV)/demo.stamp: setup.cfg pyproject.toml
	$(call install,$(VENV),demo)

$(VENV)/test.stamp: setup.cfg pyproject.toml
	$(call install,$(VENV),test)

$(OLDEST)/test.stamp: setup.cfg pyproject.toml Makefile
	$(call install,$(OLDEST),test,$(OLDEST_VERSIONS))

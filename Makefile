# make        shows what there is
# make demo   is the shortest way to a fine-tuned model
# VENV=folder and PYTHON=python3.12 choose where things are installed and with which Python
VENV ?= .venv
PYTHON ?= python3
INSTALLED := $(VENV)/.finetune_nb-installed
FORMATS := $(VENV)/.finetune_nb-formats

.DEFAULT_GOAL := help
.PHONY: help install demo test docs torture bench

help:
	@echo "make install   make the virtual environment $(VENV) with everything pinned (once)"
	@echo "make demo      fine-tune the embedded model on the home task, on the CPU, and show what it gained"
	@echo "make test      run every notebook, then the tests"
	@echo "make docs      build the website into _docs, with quarto if it is installed, else with smalldocs"
	@echo "make torture   kill, damage and fill up: the long tests of checkpoints and resume (an hour or more)"
	@echo "make bench     compare speed with what was recorded: what got slower (ten minutes)"

install: $(INSTALLED)

# installed again only when one of these files has changed
$(INSTALLED): constraints.txt settings.ini setup.py pyproject.toml tools/install.sh
	PYTHON=$(PYTHON) tools/install.sh $(VENV)
	@touch $@

# llama.cpp comes as source and is compiled once. Only what makes or runs GGUF files needs it: `make demo` does not wait for it.
$(FORMATS): $(INSTALLED)
	@echo "== compiling llama.cpp (about five minutes on two cores, once)"
	$(VENV)/bin/python -m pip --disable-pip-version-check --quiet install --constraint constraints.txt --editable '.[gguf,compressed]'
	@touch $@

demo: install
	$(VENV)/bin/finetune-nb run --demo

test: $(FORMATS)
	$(VENV)/bin/nbdev-test --n-workers 2
	$(VENV)/bin/python -m pytest -q -n 2 --dist loadfile tests

docs: install
	$(VENV)/bin/python tools/docs.py

torture: install
	$(VENV)/bin/python bench/torture.py --notebooks 100 --two --harm --disk --at-once 20 --whole 2 --kills 100 --matrix 0 --out bench/results/$$(date +%F)-torture.json

bench: install
	$(VENV)/bin/python bench/regress.py

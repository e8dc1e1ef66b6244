# The course's commands. They need Python 3.11 or later, pip, make and git; everything else goes into .venv.
#   make course                   run every lesson and write _course/index.html
#   make course LESSONS="11 12"   run a choice
#   make test                     the tests: every notebook, then pytest
#   make lab                      JupyterLab on the course
PYTHON ?= python3
LESSONS ?=
# A constraints file for pip: CONSTRAINTS=tests/oldest.txt tests on the oldest allowed versions, in .venv-oldest.
CONSTRAINTS ?=
# Tests run as on a laptop with two cores: two processes of one thread each get more done than one of two.
WORKERS ?= 2
THREADS ?= 1

VENV := .venv$(if $(CONSTRAINTS),-$(basename $(notdir $(CONSTRAINTS))))
BIN := $(VENV)/bin
# What is installed is stamped with a sum of what was asked for: a second make has nothing to do.
SUM := $(firstword $(shell cat settings.ini setup.py $(CONSTRAINTS) | cksum))
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check $(if $(CONSTRAINTS),-c $(CONSTRAINTS))
SMALL := $(VENV)/course-$(SUM)
ALL := $(VENV)/dev-$(SUM)
export TOKENIZERS_PARALLELISM = false
# Notebooks run in their own folders: a path given from here must hold there.
ifneq ($(DM_COURSE_DATA),)
override DM_COURSE_DATA := $(abspath $(DM_COURSE_DATA))
export DM_COURSE_DATA
endif

.PHONY: course test lab readme export clean-notebooks oldest dist install check

course: $(SMALL)
	$(BIN)/python tools/course.py $(LESSONS)

test: $(ALL)
	OMP_NUM_THREADS=$(THREADS) MPLBACKEND=agg $(BIN)/nbdev_test --n_workers $(WORKERS) --do_print --timing
	OMP_NUM_THREADS=$(THREADS) MPLBACKEND=agg $(BIN)/python -m pytest tests -n $(WORKERS) --dist worksteal

lab: $(SMALL)
	$(BIN)/jupyter lab --notebook-dir nbs

install: $(ALL)

export: $(ALL)
	$(BIN)/nbdev_export

clean-notebooks: $(ALL)
	$(BIN)/nbdev_clean

readme: $(ALL)
	$(BIN)/python tools/readme.py

oldest: $(ALL)
	$(BIN)/python tools/oldest.py

dist: $(ALL)
	rm -rf build dist
	$(BIN)/python -m build

# Everything that .ci/run looks at besides the tests.
check: $(ALL)
	$(BIN)/ruff check
	$(BIN)/ruff check --select E9,F63,F7,F82 dm_course/*.py
	$(BIN)/ruff format --check
	$(BIN)/python tools/links.py
	$(BIN)/python tools/find_secrets.py
	$(BIN)/python tools/workflows.py

$(VENV)/made:
	$(PYTHON) -c 'import sys; sys.exit(None if sys.version_info >= (3, 11) else f"Python 3.11 or later is needed, this is {sys.version.split()[0]}: make PYTHON=python3.12 ...")'
	$(PYTHON) -m venv $(VENV)
	touch $@

$(SMALL): | $(VENV)/made
	@test -e $(ALL) || { echo "Installing the course into $(VENV): the first time this takes minutes."; $(PIP) -e ".[course]"; }
	@touch $@

$(ALL): | $(VENV)/made
	@echo "Installing the course and what its tests need into $(VENV): the first time this takes minutes."
	$(PIP) -e ".[dev]"
	@touch $@

# From a fresh clone: `make demo` shows what ditcast does, `make test` checks it.
# Both install what they need into .venv/ and need nothing but Python, make and git.

VENV := .venv
BIN := $(VENV)/bin
FIND_PYTHON := for p in python3.11 python3; do \
	"$$p" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo "$$p" && break; done
PYTHON ?= $(shell $(FIND_PYTHON))
INSTALL := $(BIN)/python -m pip install -qq --disable-pip-version-check -c constraints.txt

LABELS := country-flag face-smiling heart person-role animal-mammal food-fruit transport-ground clothing

.PHONY: help demo test lint

help:
	@echo "make demo  compile the embedded model, draw pictures with it, write a report"
	@echo "make test  everything that make lint checks, then the tests"
	@echo "make lint  style, types and size budget"

demo: $(VENV)/demo.stamp
	$(BIN)/ditcast compile emoji -o emoji.bundle
	$(BIN)/ditcast sample emoji.bundle -o out.png --labels $(LABELS) $(LABELS) --scale 4
	@echo "page:    emoji.bundle/reports/report.html"
	@echo "picture: out.png"

test: lint
	$(BIN)/python -m pytest -n auto --maxprocesses 4 --dist loadfile

lint: $(VENV)/test.stamp
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python tools/size_budget.py

$(VENV)/demo.stamp: EXTRAS := compile,openvino,report
$(VENV)/test.stamp: EXTRAS := compile,distances,openvino,report,tensorrt-rtx,tune,dev
$(VENV)/demo.stamp $(VENV)/test.stamp: $(VENV)/venv.stamp pyproject.toml constraints.txt
	@echo "installing ditcast[$(EXTRAS)] into $(VENV) (some minutes the first time)"
	@$(INSTALL) -e '.[$(EXTRAS)]'
	@touch $@

$(VENV)/venv.stamp:
	@if [ -z "$(PYTHON)" ]; then \
		echo "make: no Python 3.11 or later found; install one, or name it: make PYTHON=/path/to/python3" >&2; \
		exit 1; fi
	@if ! "$(PYTHON)" -c 'import ensurepip, venv' 2>/dev/null; then \
		echo "make: $(PYTHON) cannot make environments (no ensurepip); install the package that holds it" >&2; \
		echo "      (Debian, Ubuntu: python3-venv), or name another: make PYTHON=/path/to/python3" >&2; \
		exit 1; fi
	@"$(PYTHON)" -m venv $(VENV)
	@touch $@

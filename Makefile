# `make demo` and `make test` need nothing but make and a Python >= 3.12.
.DEFAULT_GOAL := help
.PHONY: help install demo test lint types check docs lowest clean

VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
TESTS ?= tests
SEED ?= 0
LOWEST_TESTS ?= tests/tasks/test_dinov2.py tests/datasets/table/test_layout.py tests/datasets/pairs

# The first interpreter that really runs (a pyenv shim may not), is new enough and can make a venv.
define FIND_PYTHON
works() { "$$1" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 12))' >/dev/null 2>&1; }; \
for python in $(PYTHON) python3.12 python3.13 python3.14 python3 python; do \
  if works "$$python"; then echo "$$python"; exit 0; fi; \
done; \
if command -v pyenv >/dev/null 2>&1; then \
  for version in $$(pyenv versions --bare | sort -V); do \
    python="$$(pyenv prefix "$$version" 2>/dev/null)/bin/python"; \
    if works "$$python"; then echo "$$python"; exit 0; fi; \
  done; \
fi; \
echo 'geofm needs Python >= 3.12 with the venv module, and none was found as python3.12,' >&2; \
echo 'python3.13, python3.14, python3 or through pyenv. Install one (e.g. `pyenv install 3.12`' >&2; \
echo 'or your system'"'"'s python3.12 and python3.12-venv), or name it: make PYTHON=/path/to/python' >&2; \
exit 1
endef

help:
	@echo 'make install   make .venv with the geofm command and pinned requirements'
	@echo 'make demo      write sample data, pretrain, evaluate, draw; prints the time of each step'
	@echo 'make test      lint, types and tests'
	@echo 'make docs      the documentation site, in site/'
	@echo 'make lowest    a smoke test with the oldest versions that pyproject.toml allows'

install: $(STAMP)

$(STAMP): pyproject.toml .ci/constraints.txt
	@python="$$($(FIND_PYTHON))" && echo "using $$python" && "$$python" -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade --constraint .ci/constraints.txt pip
	$(BIN)/python -m pip install --quiet --no-compile --constraint .ci/constraints.txt --editable '.[bench,lora,maps,mask2former,onnx,shards,xformers]' --group dev
	@# Unlike pip, compileall uses all cores. Some packages contain files that do not compile.
	@$(BIN)/python -m compileall -qq -j 0 $(VENV)/lib || true
	@touch $@

demo: install
	@# Threads that wait must sleep: beside other work, spinning makes each step many times slower.
	OMP_WAIT_POLICY=passive $(BIN)/python experiments/demo.py --seed $(SEED)

lint: install
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

types: install
	$(BIN)/mypy

# One thread per process, and one process more than cores, since some tests wait. Tests of one file
# run in one process, so that they share fixtures. Compiled files are kept for the many processes that
# tests start.
check: install
	cores="$$(nproc 2>/dev/null || getconf _NPROCESSORS_ONLN)" && \
	PYTHONDONTWRITEBYTECODE= OMP_NUM_THREADS=1 $(BIN)/pytest --numprocesses "$$((cores + 1))" \
	  --dist loadfile --no-loadscope-reorder $(TESTS)

# mypy runs on one core: beside the tests it costs least.
test: lint
	$(MAKE) --jobs=2 types check

# The oldest versions that pyproject.toml allows, without extras. Downloads some GB.
lowest: install
	$(BIN)/python -m pip install --quiet --constraint .ci/constraints.txt uv
	$(BIN)/uv venv --quiet --clear --python $(BIN)/python $(VENV)-lowest
	$(BIN)/uv pip install --quiet --python $(VENV)-lowest/bin/python --resolution lowest-direct \
	  --editable . 'pytest>=8.3' 'hypothesis>=6.100'
	$(VENV)-lowest/bin/python -m pytest --quiet $(LOWEST_TESTS)

# Every link and every docstring's name is checked.
docs: install
	$(BIN)/python -m pip install --quiet --constraint .ci/constraints.txt --editable '.[docs]'
	@# The notice of Material for MkDocs about its end of life is not about these pages.
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

clean:
	rm -rf $(VENV) $(VENV)-lowest build site *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis

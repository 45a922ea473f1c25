# Each target sets up .venv. The stamp file triggers another setup when the dependencies change.
PYTHON ?= python3
VENV ?= .venv
CONSTRAINTS ?= constraints.txt
EXTRAS ?= compress,gguf,onnx
DEV_EXTRAS ?= $(EXTRAS),openvino,coreml,trt-rtx,dev
DEMO ?= build/demo
DEMO_FLAGS ?=
FULL ?= build/full-size
BENCH_FLAGS ?= --quality 10
START_FLAGS ?= --at-most 0.5
MINUTES ?= 30
ONLY ?= rich-sd3 rich-flux
PYTEST_FLAGS ?= -n 2 --dist loadfile --no-loadscope-reorder

BIN := $(VENV)/bin
STAMP := $(VENV)/.stamp
DEV_STAMP := $(VENV)/.stamp-dev
# The oldest Python that is supported, if it is here.
OLDEST_PYTHON ?= $(or $(firstword $(wildcard /usr/bin/python3.10 $(HOME)/.pyenv/versions/3.10.*/bin/python3.10)),$(PYTHON))
OLDEST := build/matrix/oldest
OLDEST_STAMP := $(OLDEST)/.stamp
RUN := $(BIN)/edgeprune
OLDEST_EXTRAS := compress,gguf,onnx,openvino,coreml,trt-rtx,optimum,train,adamw8bit
OLDEST_TESTS := artefact cli/test_bad_input.py cli/test_choices.py cli/test_doctor.py cli/test_screen.py common/test_lock.py data export families metrics quantization runtimes stages training/test_eight_bit.py verify
CODE := edgeprune export runtimes targets tests

.DEFAULT_GOAL := help
.PHONY: help setup demo assets bench bench-full evidence test test-slow test-hard lint types check check-matrix check-browser check-gpu check-mac clean

help:
	@echo "make demo    compress, export and bench the built-in model"
	@echo "make bench   only the bench, on the export that make demo wrote; fails if edgeprune --help takes over 0.5 s"
	@echo "make bench-full   list the rows of docs/full-size.md and what they take here; ROW=name measures one"
	@echo "make evidence     list the rows of docs/evidence.md: methods compared on the teachers; ROW=name measures one"
	@echo "make assets       train the other teachers of shapes world from their seed, five hours; ONLY=name for one"
	@echo "make test    run the tests"
	@echo "make test-slow    run those that take minutes"
	@echo "make test-hard MINUTES=30   properties of what people bring, that long; kills; more than 100,000 damaged files"
	@echo "make check   format, lint, types, tests with coverage"
	@echo "make check-matrix   the oldest versions that are supported, and stock diffusers, optimum and OpenVINO GenAI"
	@echo "make check-browser   the user study in a real browser; needs chromium"
	@echo "make check-gpu   on one NVIDIA GPU, ten minutes: what was never executed (docs/gpu.md); make check-mac on a Mac"
	@echo "make clean   remove build/ and $(VENV)"

setup: $(DEV_STAMP)

pip = -m pip install -q --disable-pip-version-check
install = $(BIN)/python $(pip) $(if $(CONSTRAINTS),-c $(CONSTRAINTS)) -e

$(STAMP): pyproject.toml $(CONSTRAINTS)
	@echo "setting up $(VENV) (a minute or two) ..."
	@$(PYTHON) -m venv $(VENV)
	@$(install) '.[$(EXTRAS)]'
	@touch $@

$(DEV_STAMP): $(STAMP)
	@echo "adding what the tests need ..."
	@$(install) '.[$(DEV_EXTRAS)]'
	@touch $@

demo: $(STAMP)
	@$(RUN) compress -o $(DEMO)/compressed $(DEMO_FLAGS)
	@$(RUN) export $(DEMO)/compressed --target onnx -o $(DEMO)/onnx
	@$(MAKE) --no-print-directory bench START_FLAGS=
	@$(RUN) report -o $(DEMO)/compressed --bench $(DEMO)/bench.json
	@echo "next: open $(DEMO)/compressed/report.html, or: $(RUN) generate \"two red circles\" --model $(DEMO)/onnx -o out.png"

bench: $(STAMP)
	@$(RUN) bench $(DEMO)/onnx --runtime ort $(BENCH_FLAGS) --json $(DEMO)/bench.json
	@$(BIN)/python -m edgeprune.bench.start $(START_FLAGS)

# A row takes 45 minutes and 45 GB of disk at most. Run it again after an interruption and it resumes.
bench-full: $(DEV_STAMP)
	@$(BIN)/python -m edgeprune.experiments.full_size $(ROW) --out $(FULL) $(if $(ROW),--write docs/full-size.md)

# A row takes from ten minutes to two hours. Run it again after an interruption and it resumes.
evidence: $(STAMP)
	@$(BIN)/python -m edgeprune.experiments.evidence $(ROW) $(if $(ROW),--write docs/evidence.md)

# One after the other; each prints a forecast first. Run it again after an interruption and it resumes.
assets: $(STAMP)
	@$(foreach name,$(ONLY),$(BIN)/python -m edgeprune.demo.train $(name) --out assets/$(name) &&) true

test: $(DEV_STAMP)
	@$(BIN)/python -m pytest -q $(PYTEST_FLAGS)
	@echo "next: make check (format, lint, types, coverage), or make demo"

# What takes minutes, and costly variants of other tests, which CI leaves out: more than an hour on two cores.
test-slow: $(DEV_STAMP)
	@$(BIN)/python -m pytest -q -m slow $(PYTEST_FLAGS)

# Everything in tests/hard, one test at a time: MINUTES for the properties, about half an hour for the rest; then the
# coverage-guided fuzzer, where it can be installed.
test-hard: $(DEV_STAMP)
	@MINUTES=$(MINUTES) $(BIN)/python -m pytest -q -m "" tests/hard
	@if $(BIN)/python $(pip) 'atheris>=2.3'; then $(BIN)/python tests/hard/guided.py; else echo "atheris: no wheel for this system"; fi

lint: $(DEV_STAMP)
	@$(BIN)/ruff format --check -q $(CODE)
	@$(BIN)/ruff check -q $(CODE)

# Type checkers do not run import hooks: link the mapped folders into one tree.
types: $(DEV_STAMP)
	@rm -rf build/typed && mkdir -p build/typed/edgeprune
	@ln -s "$(CURDIR)"/edgeprune/* "$(CURDIR)"/export "$(CURDIR)"/runtimes "$(CURDIR)"/targets build/typed/edgeprune/
	@MYPYPATH=build/typed $(BIN)/mypy --no-error-summary -p edgeprune

check: lint types
	@$(BIN)/python -m pytest -q --cov --cov-report=term $(PYTEST_FLAGS)
	@echo "next: commit; .ci/run does the same without coverage"

$(OLDEST_STAMP): pyproject.toml tests/matrix/oldest.txt
	@echo "setting up $(OLDEST) (a few minutes, 7 GB) ..."
	@$(OLDEST_PYTHON) -m venv --clear $(OLDEST)
	@$(OLDEST)/bin/python $(pip) -c tests/matrix/oldest.txt -e '.[$(OLDEST_EXTRAS)]' hypothesis openvino-genai pytest pytest-xdist
	@touch $@

# The newest versions are those of the usual environment. The oldest are the floors of pyproject.toml: the tests that touch
# what they bind run there, where vendors' old releases warn about newer ones.
check-matrix: $(DEV_STAMP) $(OLDEST_STAMP)
	@$(OLDEST)/bin/python -m pytest -m clients tests/matrix
	@$(BIN)/python $(pip) $(if $(CONSTRAINTS),-c $(CONSTRAINTS)) openvino-genai
	@$(BIN)/python -m pytest -m clients tests/matrix/test_diffusers.py tests/matrix/test_openvino_genai.py
	@$(OLDEST)/bin/python -m pytest -q -o filterwarnings=ignore $(PYTEST_FLAGS) $(OLDEST_TESTS:%=tests/%)

# Uses the system's chromium, or the one that `playwright install chromium` installed.
check-browser: $(DEV_STAMP)
	@$(BIN)/python $(pip) 'playwright>=1.49'
	@$(BIN)/python -m pytest -q -m browser tests/user_study/test_study_browser.py

# Where a GPU or a Mac is at hand; installs nothing. PYTHON=… chooses the interpreter that has torch.
check-gpu check-mac:
	@$(if $(wildcard $(BIN)/python),$(BIN)/python,$(PYTHON)) -m edgeprune.experiments.hardware $(@:check-%=%)

clean:
	@rm -rf build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis $(VENV)
	@find . -name __pycache__ -type d -not -path './.git/*' -prune -exec rm -rf {} +

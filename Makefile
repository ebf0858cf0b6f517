# All of these work on a clean clone; only `setup` and `test-all` take minutes.
SUPPORTED := $(shell sed -n 's/.*Python :: \(3\.[0-9]*\)",/\1/p' pyproject.toml)
PYTHON ?= $(shell for p in python3 $(SUPPORTED:%=python%); do \
	$$p -c 'import sys, ensurepip; sys.exit("%d.%d" % sys.version_info[:2] not in "$(SUPPORTED)".split())' \
	2>/dev/null && { echo $$p; break; }; done)
BIN := .venv/bin
READY := .venv/.installed
# A process a core, at most eight: each holds both frameworks. What a core is left without, it takes.
PYTEST := HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -n logical --maxprocesses=8 --dist=worksteal
# Without bytecode every process that a test starts would compile its libraries again.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: setup demo mac-check test test-all test-browser fuzz lint bench analyses
.DELETE_ON_ERROR:

setup: $(READY)

# The stamp is newer than what it was installed from; another file means another install.
$(READY): pyproject.toml constraints.txt setup.py
	@test -n "$(PYTHON)" || { echo "make: needs Python $(SUPPORTED) with venv, as python3 or python3.N" \
		"(Debian and Ubuntu: apt install python3-venv), or PYTHON=/path/to/it" >&2; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	# Bytecode is made at a module's first import, which most of them never see: half the time.
	$(BIN)/python -m pip install -q --no-compile -c constraints.txt -e '.[mlx,cuda,dev]'
	touch $@

demo: setup
	$(BIN)/python -m mlx_coconut.run args/prosqa_coconut_eval.yaml

# Is this machine's MLX right, and how fast? See docs/on_a_mac.md.
mac-check: setup
	$(BIN)/python -m mlx_coconut mac-check $(ARGS)

# At least a case of every test file, both twins.
test: setup
	$(PYTEST) -m "not slow" --hypothesis-profile=fast $(ARGS)

test-all: setup
	$(PYTEST) $(ARGS)

# In a real browser: Debian's chromium and chromium-driver, or COCONUT_CHROMIUM and COCONUT_CHROMEDRIVER.
test-browser: setup
	$(BIN)/python -m pip install -q -c constraints.txt -e '.[browser]'
	BROWSER_TESTS=1 HF_HUB_OFFLINE=1 $(BIN)/python -m pytest tests/inside/test_browser.py $(ARGS)

# Mutated inputs, 10,000 unless N says how many; a quarter of an hour on two cores.
N ?= 10000
fuzz: setup
	$(BIN)/python tests/fuzz.py $(N) $(ARGS)

lint: setup
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

bench: setup
	$(BIN)/python -m bench $(ARGS)

# MODEL and DATA choose another checkpoint and its questions, ARGS adds options.
MODEL ?= data/checkpoints/prosqa
DATA ?= data/prosqa_made_test.json

analyses: setup
	$(BIN)/python -m mlx_coconut analyse all --model $(MODEL) --data $(DATA) --items 300 --out docs/analyses $(ARGS)

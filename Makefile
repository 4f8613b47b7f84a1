# `make demo` and `make test` need only Python 3.11 and pip.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt
OUT ?= demo

.PHONY: install demo test quick lint docs bench clean

install: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP) --editable '.[codec,examples,page,plots]'
	touch $@

$(VENV)/.tested: $(VENV)/.installed
	$(PIP) --editable '.[test]'
	touch $@

demo: install
	$(BIN)/ddpm sample digits -n 60 --class all --sampler unipc --steps 20 --out $(OUT)/packaged.png
	@echo "$(OUT)/packaged.png shows samples of the model in the package; now a model of your own is trained"
	$(BIN)/ddpm train digits --out $(OUT)/run
	$(BIN)/ddpm sample $(OUT)/run -n 100 --class all --steps 250 --out $(OUT)/digits.png
	$(BIN)/ddpm sample $(OUT)/run -n 8 --steps 250 --progressive --out $(OUT)/progressive.png
	$(BIN)/ddpm sample $(OUT)/run -n 200 --class all --steps 250 --out $(OUT)/samples.npz
	$(BIN)/python examples/digits_report.py $(OUT)/samples.npz --asked
	@echo "pictures: $(OUT)/digits.png, $(OUT)/progressive.png"

# With several threads in each of several processes, NumPy's linear algebra waits more than it computes.
test quick: export OMP_NUM_THREADS = 1
# Some machines turn Python's cache of compiled files off. Then each process of the suite compiles all of them again.
test quick: export PYTHONDONTWRITEBYTECODE =

# One process more than cores, since some tests wait for processes that they stopped. The files run in their order, since
# xdist would run those with the fewest tests last, and among them are the longest ones.
test: $(VENV)/.tested
	$(BIN)/python -m pytest -n $$(( $$(getconf _NPROCESSORS_ONLN) + 1 )) --dist loadscope --no-loadscope-reorder

# Lint, types, and the tests of the files that changed since the commit SINCE: about a minute.
SINCE ?= HEAD
quick: lint
	$(BIN)/python -m pytest -n auto -q $$($(BIN)/python tests/changed.py $(SINCE))

lint: $(VENV)/.tested
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

$(VENV)/.documented: $(VENV)/.installed
	$(PIP) --editable '.[docs]'
	touch $@

# The site, in build/docs. No warning is let through. A tutorial runs again when it has changed; `make clean` forgets all.
# DEMO=npm also puts the digits model in docs/demo.md, for which npm fetches onnxruntime-web and pip the extra onnx.
# DEMO=FOLDER takes an unpacked onnxruntime-web from there.
DEMO ?=
docs: $(VENV)/.documented
	$(BIN)/python docs/spelling.py
	$(if $(DEMO),$(PIP) --editable '.[onnx]')
	DEMO="$(DEMO)" OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} $(BIN)/python -m sphinx -q -W --keep-going -n -c docs . build/docs
	@echo "the site: build/docs/index.html"

# Measure the times again: about an hour on two cores. DATA=cifar10 QUALITY=program adds quality per hour, which takes an
# hour and a half. gpu.py exits with code 2 without a GPU; with one it resumes the record in benchmarks/cache/gpu.
bench: $(VENV)/.tested
	for script in speed profile_step sampling start scaling memory; do $(BIN)/python benchmarks/$$script.py || exit; done
	$(BIN)/python benchmarks/profile_step.py --plain
	$(BIN)/python benchmarks/gpu.py || test $$? = 2
	if [ -n "$(DATA)" ]; then \
		$(BIN)/python benchmarks/quality_per_hour.py --data "$(DATA)" $(if $(QUALITY),--quality "$(QUALITY)"); fi
	@echo "records: benchmarks/results; records of a GPU: benchmarks/cache/gpu"

clean:
	rm -rf docs/gallery docs/generated
	rm -rf $(VENV) $(OUT) build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis

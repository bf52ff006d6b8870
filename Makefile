# Needs python3 (3.10 to 3.13), pip and make; everything else is installed into .venv, at the versions of constraints.txt.
# Another interpreter: make test PYTHON=python3.12

PYTHON ?= python3
OUT ?= runs/demo
OUT_REAL ?= runs/demo-real
VENV := .venv
VENV_TL4 := .venv-tl4
TL4 := 4.3.0
VENV_NEWEST := .venv-newest
TORCH := $(shell grep '^torch==' constraints.txt)
EXTRAS := viz,test,browser,docs
NOTEBOOKS ?= $(wildcard notebooks/*.ipynb)

# Tests run in this many processes. A file stays in one of them: its tests share models, servers and browsers.
WORKERS ?= 2
IN_PARALLEL := -n $(WORKERS) --dist loadfile --no-loadscope-reorder

# Threads that spin while they wait for each other cost small models on busy machines several times the work itself.
export OMP_WAIT_POLICY ?= PASSIVE

# Where Python may not write bytecode, every process compiles what it imports of torch, transformers and Ray: 5 s each.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: help demo demo-real test test-all test-real test-notebooks notebooks lint format docs floors test-tl4 test-newest \
	demo-model bench pictures release-check clean

help: ## this list
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## / { printf "make %-14s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

demo: $(VENV)/.installed ## heads, split-softmax, directions and a report from the embedded model, into runs/demo
	$(VENV)/bin/focuslens demo --out $(OUT)

demo-real: $(VENV)/.installed ## the same without directions from a real model, SmolLM2-135M: a download of 93 MB, and about 8 minutes
	$(VENV)/bin/focuslens demo --model smollm2-135m-instruct --out $(OUT_REAL)

test: $(VENV)/.installed ## unit and parity tests but the slow ones: about sixteen minutes on two cores
	$(VENV)/bin/python -m pytest -q $(IN_PARALLEL) -m "not slow" tests/unit tests/parity

# Under coverage, tests of 6 s took 10 to 16 s of processor time on the slowest machine so far.
test-all: $(VENV)/.installed ## every test but those of real models, with the coverage, and then the notebooks
	$(VENV)/bin/python -m pytest -q $(IN_PARALLEL) -m "not download" --cov -o processor_seconds=30
	@$(MAKE) --no-print-directory test-notebooks

# The downloads (350 MB on disk) stay in this folder, by default the package's cache. The tests convert them anew.
FOCUSLENS_REAL_MODELS ?= $(shell $(VENV)/bin/python -c 'from focuslens.util import cache; print(cache.cache_folder())')
test-real: $(VENV)/.installed ## the tests of real models, which the first run downloads (330 MB)
	FOCUSLENS_REAL_MODELS='$(FOCUSLENS_REAL_MODELS)' $(VENV)/bin/python -m pytest -q $(IN_PARALLEL) -m download \
		--durations=0 --durations-min=1 tests/services

# A thread for each of the processes; tests see to theirs by themselves.
test-notebooks: export OMP_NUM_THREADS ?= 1
test-notebooks: $(VENV)/.installed ## run the notebooks, and throw away what they show
	$(VENV)/bin/python -m pytest -q $(IN_PARALLEL) --nbmake --nbmake-timeout=180 --durations=0 notebooks

notebooks: $(VENV)/.installed ## run the notebooks in place, so that they show what their code gives
	$(VENV)/bin/python experiments/run_notebooks.py $(NOTEBOOKS)

lint: $(VENV)/.installed-dev ## ruff, the floors of the imports, and pyright
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/lint-imports
	$(VENV)/bin/pyright --pythonpath $(VENV)/bin/python

format: $(VENV)/.installed-dev ## rewrite the sources as ruff would have them
	$(VENV)/bin/ruff check --fix-only .
	$(VENV)/bin/ruff format .

docs: $(VENV)/.installed ## the documentation's site, into build/docs, from where it opens; a warning is an error
	NO_MKDOCS_2_WARNING=1 $(VENV)/bin/mkdocs build --strict --quiet

floors: ## the picture of docs/architecture.md, from the package's imports
	$(PYTHON) experiments/draw_floors.py

test-tl4: $(VENV_TL4)/.installed ## the parity tests on TransformerLens 4, in an environment of their own
	$(VENV_TL4)/bin/python -m pytest -q $(IN_PARALLEL) tests/parity

# The newest versions when the environment was installed. `rm -r .venv-newest` makes the next run take newer ones.
test-newest: $(VENV_NEWEST)/.installed ## parity, the embedded model and a command on the newest versions that the ranges allow
	@$(VENV_NEWEST)/bin/python -m pip list --disable-pip-version-check | grep -E '^(torch|transformer|numpy|pandas)'
	$(VENV_NEWEST)/bin/python -m pytest -q $(IN_PARALLEL) tests/parity tests/unit/test_demo_model.py
	$(VENV_NEWEST)/bin/focuslens heads --samples 4 > $(VENV_NEWEST)/heads.txt
	@grep -A 3 'heads by relevant contextual score' $(VENV_NEWEST)/heads.txt

demo-model: $(VENV)/.installed ## train the embedded model again and measure it (hours; a stopped run goes on)
	$(VENV)/bin/python experiments/train_demo_model.py --resume --out focuslens/assets/demo
	$(VENV)/bin/python experiments/measure_demo_model.py --model focuslens/assets/demo

bench: $(VENV)/.installed ## FocusLens beside the plain model, the paper's procedure and TransformerLens, into runs/bench and docs
	$(VENV)/bin/python experiments/bench.py --out runs/bench --docs docs

pictures: $(VENV)/.installed ## the README's pictures, from the demo's run (needs chromium)
	@test -f $(OUT)/report.html || $(VENV)/bin/focuslens demo --out $(OUT)
	$(VENV)/bin/python experiments/readme_pictures.py --run $(OUT) --docs docs

release-check: $(VENV)/.installed-dev ## build the distributions, and try the wheel in an empty environment, without extras
	$(VENV)/bin/python experiments/check_release.py

clean: ## remove environments, builds and caches; runs/ stays
	rm -rf $(VENV) $(VENV_TL4) $(VENV_NEWEST) build dist .coverage .hypothesis .pytest_cache .ruff_cache
	find focuslens tests experiments -name __pycache__ -prune -exec rm -rf {} + 2>/dev/null || true

# $(call environment,VENV): a virtual environment with the pinned pip and build backends. Some distributions ship
# venv without ensurepip; there the system's own pip puts the first pip in.
define environment
	@test -x $(1)/bin/python && $(1)/bin/python -m pip --version > /dev/null 2>&1 \
		|| $(PYTHON) -m venv --clear $(1) > /dev/null 2>&1 \
		|| { $(PYTHON) -m venv --clear --without-pip $(1) \
			&& $(PYTHON) -m pip install --quiet --disable-pip-version-check -c constraints.txt pip \
				--target "$$($(1)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')"; }
	@$(1)/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt pip hatchling editables setuptools
endef

# $(call install,VENV,EXTRAS,ARGUMENTS) passes the arguments to pip. Building with the pinned backends instead of an
# isolated environment is both reproducible and quicker. pip would compile all of torch, which takes minutes. One run of a
# command compiles what the commands import. Where PYTHONDONTWRITEBYTECODE is set, nothing would keep what later runs
# compile.
define install
	@echo "installing focuslens[$(2)] into $(1) ..."
	@$(1)/bin/python -m pip install --quiet --disable-pip-version-check --no-compile --no-build-isolation $(3) -e '.[$(2)]'
	@$(1)/bin/python -m focuslens heads --samples 1 --max-new-tokens 2 --quiet > /dev/null
	@touch $@
endef

$(VENV)/.installed: pyproject.toml constraints.txt
	$(call environment,$(VENV))
	$(call install,$(VENV),$(EXTRAS),-c constraints.txt)

$(VENV)/.installed-dev: $(VENV)/.installed
	$(call install,$(VENV),all,-c constraints.txt)

$(VENV_TL4)/.installed: pyproject.toml constraints.txt
	$(call environment,$(VENV_TL4))
	@sed 's/^transformer-lens==.*/transformer-lens==$(TL4)/' constraints.txt > $(VENV_TL4)/constraints.txt
	$(call install,$(VENV_TL4),test,-c $(VENV_TL4)/constraints.txt)

# Only torch has a fixed version. Without one, pip takes the newest build, which brings gigabytes of CUDA. torch is
# installed first, and named again below, so that nothing replaces it.
$(VENV_NEWEST)/.installed: pyproject.toml constraints.txt
	$(call environment,$(VENV_NEWEST))
	@$(VENV_NEWEST)/bin/python -m pip install --quiet --disable-pip-version-check --no-compile $(TORCH)
	$(call install,$(VENV_NEWEST),test,$(TORCH))

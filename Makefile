# Everything a reader runs; `make help` lists it.
# Keeps to what GNU make 3.81 and the BSD tools of macOS understand.

PYTHON ?= python3
VENV := .venv
STAMP := $(VENV)/.diffoc-installed
SITE := $(VENV)/.diffoc-site-installed
APP := $(VENV)/.diffoc-app-installed
RUN := $(VENV)/bin/python -m

.PHONY: help reproduce test coverage lab app site notebooks figures ffhq portable clean

help: ## show this list
	@awk -F ': .*## ' '/^[a-z]+:.*## / {printf "  make %-10s %s\n", $$1, $$2}' Makefile
	@echo
	@echo 'The first of them installs into .venv, from Python 3.11 to 3.14: PYTHON=python3.12 names one.'
	@echo 'To work in an active environment of conda or your own instead, name it each time:'
	@echo '  make VENV="$$CONDA_PREFIX" test'

# The ledger is told whatever became of the notebooks.
reproduce: $(STAMP) ## execute every notebook, into build/; tell what each established
	@$(VENV)/bin/python tools/notebooks.py --out build; notebooks=$$?; \
	$(RUN) diffoc claims; claims=$$?; exit $$((notebooks || claims))

# The figures that the notebooks draw here go to build/, so that a test leaves the tree as it was.
# Each file is one worker's, and the notebooks, which take longest, come first: what is left at the
# end is short, and no worker waits long for the other. Types are checked beside the tests, and
# reported after them.
test: $(STAMP) ## check the style, the types, the unit tests and every notebook
	@$(RUN) ruff check
	@$(RUN) ruff format --check
	@mkdir -p build
	@$(RUN) mypy >build/types.txt 2>&1 & mypy=$$!; \
	DIFFOC_FIGURES="$(CURDIR)/build/figures" OMP_NUM_THREADS=1 $(RUN) pytest \
		--quiet --numprocesses 2 --dist loadfile --no-loadscope-reorder \
		--nbval-lax --nbval-current-env notebooks tests; \
	tests=$$?; wait $$mypy; types=$$?; cat build/types.txt; exit $$((tests | types))

coverage: $(STAMP) ## measure how much of the package the unit tests reach: 90 % at least
	@mkdir -p build
	@DIFFOC_FIGURES="$(CURDIR)/build/figures" OMP_NUM_THREADS=1 $(RUN) coverage run -m pytest \
		--quiet --ignore tests/test_site.py --ignore tests/test_widgets.py tests
	@$(RUN) coverage report

lab: $(STAMP) ## open the notebooks in JupyterLab
	@$(RUN) jupyterlab notebooks

app: $(APP) ## try the controller in a browser: buttons and sliders, no code
	@$(RUN) voila docs/app.ipynb

site: $(SITE) ## build the site from the notebooks as committed, into build/site
	@$(RUN) sphinx -E -W --keep-going -q -c docs . build/site
	@echo build/site/index.html

notebooks: $(STAMP) ## for maintainers: execute the notebooks in place; regenerate figures/
	@$(VENV)/bin/python tools/notebooks.py --in-place

figures: $(STAMP) ## draw the figures for print from the records, into figures/print
	@$(RUN) diffoc figures

# Tables on FFHQ. GPUS=4 takes four cards, a worker each; what was computed is not computed again. REHEARSE=1 runs the whole chain with random weights, two steps and the CPU.
ffhq: $(STAMP) ## say how to make the paper's tables on FFHQ, which take a GPU
	@echo 'make ffhq-preflight IMAGES=DIR   what is there, what it costs, what would fail'
	@echo 'make ffhq-table1 IMAGES=DIR      and -table3, -table4, -table5, -table6: run, measure, compare'
	@echo 'make ffhq-figures IMAGES=DIR     four images of Table 1, as pictures'
	@echo 'with REHEARSE=1 a trial without weights; DEVICE=cuda, GPUS=1, and ARGS="--last 100" as needed'

DEVICE ?= $(if $(REHEARSE),cpu,cuda)
GPUS ?= 1
IMAGES ?= $(if $(and $(REHEARSE),$(DIFFOC_DATA)),$(DIFFOC_DATA)/ffhq256_demo)
ffhq_images = $(if $(IMAGES),--images '$(IMAGES)') $(ARGS)
ffhq_run = $(RUN) diffoc ffhq $(1) $(if $(REHEARSE),--rehearse) $(ffhq_images)

ffhq-preflight: $(STAMP)
	@$(RUN) diffoc preflight $(if $(REHEARSE),--random-weights) $(ffhq_images) --device $(DEVICE)

ffhq-figures: $(STAMP)
	@$(call ffhq_run,table1) --device $(DEVICE) --last 4 --out build/$(if $(REHEARSE),rehearsal,ffhq)-figures

ffhq-table%: $(STAMP)
	@$(call ffhq_run,table$*) --device $(DEVICE) --jobs $(GPUS)

portable: $(STAMP) ## for maintainers: try other instruction sets, threads and jitters; takes hours
	@$(VENV)/bin/python tools/portable.py

clean: ## remove what the other targets made, except .venv
	rm -rf build diffoc.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis
	find diffoc tests notebooks \( -name __pycache__ -o -name .ipynb_checkpoints \) -prune \
		-exec rm -rf {} +

# The stamp is written last: without it an install was never finished, and .venv is begun anew
# (pip has kept the downloads). With it, changed pins are installed over the old ones.
install = $(RUN) pip install --disable-pip-version-check -c constraints.txt -e '.[notebooks,test]'

ifeq ($(VENV),.venv)

python_fits = $(shell $(PYTHON) -c 'import sys, ensurepip; print((3, 11) <= sys.version_info < (3, 15) or "")' 2>/dev/null)

# Linux: 6 GB of packages (torch brings CUDA), and 3 GB of downloads twice, in pip's cache and
# while they are unpacked. What an unfinished install takes counts as free.
gigabytes := $(if $(filter Darwin,$(shell uname -s)),4,12)
disk_fits = $(shell { df -Pk .; du -sk .venv; } 2>/dev/null | \
	awk 'NR == 2 {kb = $$4} NR == 3 {kb += $$1} END {if (kb >= $(gigabytes) * 1048576) print "yes"}')

$(STAMP): pyproject.toml constraints.txt
	@$(if $(or $(wildcard $@),$(python_fits)),,$(error $(PYTHON) is not a Python 3.11 to 3.14 with venv: install one (Debian and Ubuntu: apt install python3-venv), or name another, as in make PYTHON=python3.12))
	@$(if $(or $(wildcard $@),$(disk_fits)),,$(error too little disk space: installing needs $(gigabytes) GB free in this folder; free some and run make again))
	@test -e $@ || $(PYTHON) -m venv --clear .venv
	$(install)
	@touch $@

else

$(STAMP): pyproject.toml constraints.txt
	@$(if $(and $(VENV),$(wildcard $(VENV)/bin/python)),,$(error VENV="$(VENV)" is no environment: activate one and run make VENV="$$CONDA_PREFIX" or make VENV="$$VIRTUAL_ENV"))
	$(install)
	@touch $@

endif

$(SITE): extra := site
$(APP): extra := app
$(SITE) $(APP): $(STAMP)
	$(RUN) pip install --disable-pip-version-check -c constraints.txt -e '.[$(extra)]'
	@touch $@

.DEFAULT:
	@$(error there is no target '$@': make help lists the targets)

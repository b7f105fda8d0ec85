# The doors of the course. `make demo` is the first one; the README explains each.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: help demo lab report test masks soak format lint notebooks pictures results families real-int8 gpu constraints clean

help:
	@echo "make demo   run three notebooks headlessly on the bundled data, write an HTML report"
	@echo "make lab    open the notebooks in JupyterLab"
	@echo "make report run all notebooks into static pages, build/report"
	@echo "make test   the quick checks          make soak   the full fault counts and benchmarks"
	@echo "make masks  the engines and the notebooks as on processors without bf16"
	@echo "make format, lint, notebooks, pictures, results, families, gpu, constraints, clean: for those who change the course"

demo: $(BIN)/.vitdemo
	$(BIN)/vitdemo run 00 01 03

# The clone is the root of JupyterLab's file browser, so that it reaches runs/.
lab: $(BIN)/.vitdemo
	$(BIN)/jupyter lab --LabApp.default_url=/lab/tree/notebooks/00_tour.ipynb

# The executed course as pages that need nothing else, to be attached to a release or served; at most 12 MB.
report: $(BIN)/.vitdemo
	rm -rf build/report && $(BIN)/vitdemo run --out build/report
	cd build/report && rm -rf */ *.ipynb && test "$$(cat *.html | wc -c)" -le 12000000 && du -ch --apparent-size *.html

# The runtimes' own tests are a process apart: one that breaks it must not take the others along. What the first has
# built is there for the second.
test: $(BIN)/.vitdemo-dev
	cache=$$(mktemp -d) && trap 'rm -rf "$$cache"' EXIT && export VITDEMO_TEST_CACHE="$$cache" && \
	$(BIN)/python -m pytest -m "not soak" tests/engines tests/models tests/verification && \
	$(BIN)/python -m pytest -m "not soak" --ignore tests/engines --ignore tests/models --ignore tests/verification

# Processors that are not here, by variables that hide instructions: AVX512 with VNNI and without bf16 (Ice Lake), then
# AVX2 alone (laptops); where this processor has nothing to hide, `make test` is that run already. Each gets a cache of
# its own, as engines built for one are not the other's.
masks: $(BIN)/.vitdemo-dev
	set -e; for each in "avx512_bf16 ONEDNN_MAX_CPU_ISA=AVX512_CORE_VNNI" \
	  "avx512f|avx_vnni ONEDNN_MAX_CPU_ISA=AVX2 ATEN_CPU_CAPABILITY=avx2"; do \
	  hidden=$${each%% *} mask=$${each#* }; \
	  grep -qswE "$$hidden" /proc/cpuinfo || { echo "no $$hidden here, so $$mask would hide nothing"; continue; }; \
	  cache=$$(mktemp -d); trap 'rm -rf "$$cache"' EXIT; echo "under $$mask"; \
	  env $$mask VITDEMO_TEST_CACHE="$$cache" $(BIN)/python -m pytest -m "not soak" -rs tests/engines tests/verification tests/test_precisions.py; \
	  env $$mask VITDEMO_TEST_CACHE="$$cache" $(BIN)/python -m pytest -m "not soak" -rs tests/notebooks; \
	  rm -rf "$$cache"; \
	done

# In parts, each of at most 75 minutes on two slow cores.
soak: masks soak-benchmarks soak-engines soak-notebooks soak-others
soak-benchmarks: FOLDERS = benchmarks
soak-engines: FOLDERS = engines models verification
soak-notebooks: FOLDERS = browser course notebooks
soak-%: $(BIN)/.vitdemo-dev
	$(BIN)/python -m pytest -m soak $(FOLDERS:%=tests/%)

soak-others: $(BIN)/.vitdemo-dev
	$(BIN)/python -m pytest -m soak $(addprefix --ignore tests/,benchmarks engines models verification browser course notebooks)

format: $(BIN)/.vitdemo-dev
	$(BIN)/ruff check --fix . && $(BIN)/ruff format .

lint: $(BIN)/.vitdemo-dev
	$(BIN)/ruff check . && $(BIN)/ruff format --check .

notebooks: $(BIN)/.vitdemo-dev
	$(BIN)/nbstripout --keep-id --drop-empty-cells --extra-keys "metadata.widgets metadata.language_info" notebooks/*.ipynb
	$(BIN)/python -m pytest tests/notebooks/test_hygiene.py

# The README's figure, and the pictures that the notebooks open with, from a run of the course.
pictures: $(BIN)/.vitdemo
	$(BIN)/python -m notebooks.img.finding
	$(BIN)/python -m notebooks.img.renew

# The recorded tables of README.md and docs/numbers.md, measured on this machine into data/results/NAME.
results: $(BIN)/.vitdemo
	$(BIN)/python -m data.results.record --measure "$(NAME)"

# docs/families: which families of models convert, in which engines; about 20 minutes, it may be stopped and goes on.
families: $(BIN)/.vitdemo-dev
	$(BIN)/python -m tests.benchmarks.families

# What precisions cost two real models, on photographs named by wnid: make real-int8 PHOTOS=DIR
real-int8: $(BIN)/.vitdemo-dev
	$(BIN)/python -m tests.benchmarks.real_int8 "$(PHOTOS)"

# Whether the engines on CUDA can be accepted on the GPU here; PYTHON is one that has torch, timm and pandas.
gpu:
	$(PYTHON) -m tests.gpu

# The pins that the course is known to run with: what pip picks today, in an environment of its own.
constraints:
	rm -rf $(VENV)-constraints && $(PYTHON) -m venv $(VENV)-constraints
	$(VENV)-constraints/bin/python -m pip install --quiet --editable '.[dev]'
	$(VENV)-constraints/bin/python -m pip freeze --all --exclude-editable | grep -v ' @ \|^pip==' > $(VENV)-constraints/pins
	mv $(VENV)-constraints/pins constraints.txt
	$(VENV)-constraints/bin/python -m tests.test_project
	rm -rf $(VENV)-constraints

clean:
	rm -rf $(VENV) $(VENV)-constraints build *.egg-info

# The stamps are newer than what they were made from, so a second `make` installs nothing.
$(BIN)/.vitdemo: pyproject.toml constraints.txt | $(BIN)/pip
	$(BIN)/python -m pip install --disable-pip-version-check --quiet --constraint constraints.txt --editable '.[engines,parallel]'
	$(BIN)/jupyter labextension disable @jupyterlab/apputils-extension:announcements 2>/dev/null # a question about news
	@touch $@

$(BIN)/.vitdemo-dev: $(BIN)/.vitdemo
	$(BIN)/python -m pip install --disable-pip-version-check --quiet --constraint constraints.txt --editable '.[dev]'
	@touch $@

$(BIN)/pip: # what venv writes last, and uv's does not at all
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 15))' || \
	  { echo "Python 3.11 to 3.14 is needed; name it: make PYTHON=python3.12 …" >&2; exit 2; }
	if [ -x $(BIN)/python ]; then $(BIN)/python -m ensurepip --default-pip; \
	  else $(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); exit 1; }; fi # half an environment would look like a whole one
	@echo "installing into $(VENV): up to 7 GB and 3 minutes, once"

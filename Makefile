# make quickstart   environment, install, and the main jobs on real handwritten digits
# make test         environment, install, and all fast tests
# make slow         the tests that take minutes
# make buckets      the tests against emulators of S3 and Google Cloud Storage, in an environment of their own
# make reproduce    the paper's Figures 2 and 3 in small, about two hours; see launch/reproduce.sh
# make transfer     the paper's transfer in small: pretrained on some images, probed on others; see launch/transfer.sh
# make slurm        the SLURM files on a cluster of this machine; needs Debian's slurm-wlm and munge, and root
# make scaling      compiles the table of docs/scaling.md; GPU cells with CUDA_PYTHON=..., see there
# make faults       the fault tests alone, with those of habits (names, environment, streams); make faults-long: 200 kills and all the rest, an hour
# make wandb        the tests of Weights & Biases, with the real library, offline
# make notebook     runs docs/igpt_jax.ipynb with few steps
# make browser      the report and the demo in headless Chromium
# make environments fresh environments of Python 3.11, 3.12 and 3.13: quickstart and tests; writes docs/environments.md
# make lint         ruff
# make clean        removes the environment, caches and runs/quickstart

PYTHON ?= python3
VENV := .venv
INSTALLED := $(VENV)/.installed
INSTALLED_TEST := $(VENV)/.installed-test
# Without huggingface no torch, and the tests that need it are skipped.
TEST_EXTRAS ?= test,huggingface
INSTALL = $(VENV)/bin/python -m pip install --quiet --constraint constraints.txt --constraint constraints-torch.txt

export JAX_PLATFORMS := cpu
export EPATH_USE_TF := 0
export TF_CPP_MIN_LOG_LEVEL := 3
export JAX_COMPILATION_CACHE_DIR := $(CURDIR)/.cache/jax
export IGPT_CACHE := $(CURDIR)/.cache/igpt_jax

.PHONY: setup quickstart test slow reproduce transfer buckets slurm scaling faults faults-long wandb notebook browser environments lint clean

setup: $(INSTALLED_TEST)

# Stamps are newer than what they were made from, so a second run needs no network.
$(INSTALLED): setup.cfg pyproject.toml constraints.txt constraints-torch.txt
	$(PYTHON) -m venv $(VENV)
	$(INSTALL) setuptools wheel
	$(INSTALL) --no-build-isolation --editable .
	touch $@

$(INSTALLED_TEST): $(INSTALLED)
	$(INSTALL) --no-build-isolation --editable '.[$(TEST_EXTRAS)]'
	touch $@

quickstart: $(INSTALLED)
	launch/quickstart.sh $(VENV)/bin/python runs/quickstart

test: setup
	$(VENV)/bin/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder -m "not slow and not buckets and not slurm and not browser"

slow: setup
	$(VENV)/bin/python -m pytest -m slow

# s3fs and gcsfs need versions of their own of what constraints.txt pins for all others.
buckets:
	$(PYTHON) -m venv .venv-buckets
	grep -v -e ^fsspec= -e ^python-dateutil= constraints.txt | cat - constraints-buckets.txt > .venv-buckets/constraints.txt
	.venv-buckets/bin/pip install --quiet --constraint .venv-buckets/constraints.txt setuptools wheel
	.venv-buckets/bin/pip install --quiet --constraint .venv-buckets/constraints.txt --no-build-isolation --editable '.[$(TEST_EXTRAS),buckets]'
	.venv-buckets/bin/python -m pytest -m buckets

reproduce: $(INSTALLED)
	launch/reproduce.sh $(VENV)/bin/python runs/reproduce

transfer: $(INSTALLED)
	launch/transfer.sh $(VENV)/bin/python runs/transfer

slurm: setup
	$(VENV)/bin/python -m pytest -m slurm

scaling: $(INSTALLED)
	$(VENV)/bin/python -m pip install --quiet libtpu==0.0.51
	$(VENV)/bin/python benchmarks/scaling.py --python "$(CUDA_PYTHON)"

faults: setup
	$(VENV)/bin/python -m pytest -m fault

faults-long: $(INSTALLED)
	$(VENV)/bin/python -W ignore benchmarks/faults.py --json=runs/faults.json

# Sixteen packages that nothing else needs.
wandb: setup
	$(INSTALL) --no-build-isolation --editable '.[wandb]'
	$(VENV)/bin/python -m pytest tests/test_metric_writers.py

notebook: setup
	$(INSTALL) --no-build-isolation --editable '.[notebook]'
	$(VENV)/bin/python -m pytest -m slow tests/test_documents.py -k notebook

# Needs Chromium and its driver: apt-get install chromium chromium-driver.
browser: setup
	$(VENV)/bin/python -m pytest -m browser

# A fresh environment for each of Python 3.11 to 3.13: several GB of downloads, an hour.
environments:
	$(PYTHON) benchmarks/environments.py

lint: setup
	$(VENV)/bin/ruff check .

clean:
	rm -rf $(VENV) .venv-buckets .cache runs/quickstart .pytest_cache .ruff_cache *.egg-info

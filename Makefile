# make demo   set up, and run the main job: the same training plainly and patched
# make test   set up, and pass the tests, on every generation of torch that this machine has
# make check  lint and types
# make site   build the documentation
# make dist   build the packages, and check them
# make test-programs  other people's programs, natively and patched (docs/PROGRAMS.md)
# make demo-thermal  a detector of thermal images, trained patched on the CPU (examples/thermal_detection)

PYTHON ?= python3
# A smaller CPU build of torch, where it can be reached: make test TORCH='torch==2.13.0 --index-url ...'
TORCH ?= torch==2.13.0
# Compiles for AMD cards that are not here.
TRITON ?= triton==3.7.1
# A Python that has torch 1.13, the generation of the original (Debian 12: apt install python3-torch).
LEGACY_PYTHON ?= /usr/bin/python3.11

# Most tests wait for processes of their own; more at once than this would make them late.
PARALLEL ?= -n 2 --dist worksteal

VENV := .venv
LEGACY_VENV := .venv-torch113
PROGRAMS_VENV := .venv-programs
HAS_LEGACY := $(shell $(LEGACY_PYTHON) -c "import torch; print(torch.__version__.startswith('1.13'))" 2>/dev/null)

.PHONY: demo test check site dist clean
demo: $(VENV)/ready
	$(VENV)/bin/python examples/demo.py

test: $(VENV)/ready .triton/ready check
	rm -rf .outcomes
	$(VENV)/bin/python -m pytest $(PARALLEL) -m "not alone"
	$(VENV)/bin/python -m pytest -m alone
ifeq ($(HAS_LEGACY),True)
	$(MAKE) test-torch113
endif
	$(VENV)/bin/python tests/outcomes.py .outcomes

.PHONY: test-torch113
test-torch113: $(LEGACY_VENV)/ready
	$(LEGACY_VENV)/bin/python -m pytest $(PARALLEL) -m "not alone"
	$(LEGACY_VENV)/bin/python -m pytest -m alone

.PHONY: test-programs
test-programs: $(PROGRAMS_VENV)/ready
	$(PROGRAMS_VENV)/bin/python tests/programs/run.py --out .artifacts/programs_cpu.json $(PROGRAMS)

# The same as a user's commands in examples/thermal_detection/README.md. The torchvision of PyPI fits a torch for CUDA:
# torchvision_operators.py makes up for it beside another one.
.PHONY: demo-thermal
demo-thermal: .venv-programs/ready
	.venv-programs/bin/python -m pip install -q --no-deps -r examples/thermal_detection/requirements.txt
	site=$$(.venv-programs/bin/python -c "import sysconfig; print(sysconfig.get_path('purelib'))") && \
	cp benchmarks/torchvision_operators.py $$site && \
	echo 'import torchvision_operators; torchvision_operators.on_import()' > $$site/torchvision_operators.pth
	mkdir -p .artifacts/thermal
	cd .artifacts/thermal && VIRTUAL_ENV=$(CURDIR)/.venv-programs $(CURDIR)/.venv-programs/bin/python -m rocm_patch run \
		--backend cpu $(CURDIR)/examples/thermal_detection/train.py --small --device cpu

check: $(VENV)/ready
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

$(VENV)/ready: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install -q $(TORCH)
	$(VENV)/bin/python -m pip install -q -e '.[dev]'
	touch $@

# Not in an environment of its own: most tests are to find no Triton, as on a machine without one.
.triton/ready: Makefile
	rm -rf .triton
	$(PYTHON) -m pip install -q --no-deps --target .triton $(TRITON)
	touch $@

$(LEGACY_VENV)/ready: pyproject.toml
	$(LEGACY_PYTHON) -m venv --system-site-packages $(LEGACY_VENV)
	$(LEGACY_VENV)/bin/python -m pip install -q -e '.[test]' 'numpy<2'
	touch $@

# The documentation, in site/.
site: $(VENV)/ready
	NO_MKDOCS_2_WARNING=1 $(VENV)/bin/python -m mkdocs build --strict

# What an index would be sent, in dist/.
dist: $(VENV)/ready
	rm -rf dist
	$(VENV)/bin/python -m build --no-isolation
	$(VENV)/bin/twine check --strict dist/*
	$(VENV)/bin/check-wheel-contents dist/*.whl

# The runner brings what the programs need.
$(PROGRAMS_VENV)/ready: pyproject.toml
	$(PYTHON) -m venv $(PROGRAMS_VENV)
	$(PROGRAMS_VENV)/bin/python -m pip install -q $(TORCH)
	$(PROGRAMS_VENV)/bin/python -m pip install -q -e .
	touch $@

clean:
	rm -rf $(VENV) $(LEGACY_VENV) .outcomes .triton dist site $(PROGRAMS_VENV)

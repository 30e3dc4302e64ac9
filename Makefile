# The commands a newcomer needs. `make demo` and `make test` share one virtual environment.
PYTHON ?= python3
VENV ?= .venv
OUTPUT ?= demo-output
PEERS ?= build/peers
BENCH_FLAGS ?=
TEST_PROCESSES ?= 2
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: demo test test-peers test-native test-emulator test-triton bench lint install checkpoints clean help

help:  ## this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /: /'

demo: $(READY)  ## the main job: captioned videos in, a better text-to-video generator out, with pictures
	$(BIN)/pisces demo --output $(OUTPUT)

test: $(READY)  ## the Python tests, in TEST_PROCESSES processes of one thread each
	$(BIN)/python -m pytest --numprocesses $(TEST_PROCESSES) --dist loadfile

test-peers: $(READY)  ## POT's own published tests on our drop-in functions; downloads POT's source distributions to $(PEERS)
	$(BIN)/python tests/upstream/run_pot.py --download $(PEERS)

test-native: $(READY)  ## the CPU kernels alone: under sanitizers, and cross-compiled for aarch64 (downloads a compiler, 100 MB)
	$(BIN)/python tests/native/run.py
	$(BIN)/python -m pip install --quiet --constraint constraints.txt ziglang
	$(BIN)/python tests/native/run.py --aarch64

test-emulator: $(READY)  ## the CUDA kernels on the CPU: random schedules, sanitizers, known bugs that must be found; needs CUDA's headers
	$(BIN)/python tests/emulator/emulate.py

test-triton: $(READY)  ## the Triton kernels without a GPU: in Triton's interpreter, and compiled for five GPUs within their budget
	TRITON_INTERPRET=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/triton
	$(BIN)/python -m benchmarks.triton_static --check

bench: $(READY)  ## ours against its peers, about 20 minutes on an idle machine: docs/benchmarks.md (BENCH_FLAGS="--only cost --smoke")
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[test,bench]"
	$(BIN)/python -m benchmarks $(BENCH_FLAGS)

lint: $(READY)  ## style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy pisces pisces_kernels

checkpoints: $(READY)  ## train the small world's checkpoints again, from nothing (about an hour)
	$(BIN)/pisces world train-checkpoints --output checkpoints-new

install: $(READY)  ## the virtual environment with compiled kernels

KERNEL_SOURCES := $(shell find csrc -type f)
$(READY): pyproject.toml constraints.txt setup.py CMakeLists.txt $(KERNEL_SOURCES)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade "pip>=24,<27"
	$(BIN)/python -m pip install --constraint constraints.txt --editable ".[test,dev]"
	touch $(READY)

clean:  ## remove what was built; the virtual environment and the demo's output stay
	rm -rf build dist *.egg-info
	find . -name '*.so' -not -path './$(VENV)/*' -delete

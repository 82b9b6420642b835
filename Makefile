PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PROMPT ?=
OUT ?= runs/sample
PORT ?= 7860
export TOKENIZERS_PARALLELISM = false
# The small model's matrices are too small for threads, which beside other work cost more than they bring.
export OMP_NUM_THREADS ?= 1
# torchao, which transformers imports where it is installed, makes torch warn at every start.
export TORCH_LOGS = -torch.utils._pytree

.PHONY: sample demo test lint speedrun eval clean

$(VENV)/.installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	touch $@

sample: $(VENV)/.installed  ## pictures, answers, an edit and a story from the shipped checkpoint; PROMPT="..." draws your own
	$(BIN)/python -m demo.sample checkpoints/orthus-small --output $(OUT) $(if $(PROMPT),--prompt "$(PROMPT)")

demo: $(VENV)/.installed  ## the app in a browser at http://127.0.0.1:$(PORT), with the HTTP API under /v1
	$(BIN)/python -m demo.app checkpoints/orthus-small --port $(PORT)

test: $(VENV)/.installed  ## lint, types and the test suite; no network after installation
	$(BIN)/python -m ruff check .
	$(BIN)/python -m mypy
	$(BIN)/python -m pytest

lint: $(VENV)/.installed
	$(BIN)/python -m ruff check --fix .
	$(BIN)/python -m mypy

speedrun: $(VENV)/.installed  ## autoencoder -> base -> post-training -> scores, from nothing, on a CPU
	PATH="$(abspath $(BIN)):$$PATH" bash train/speedrun.sh

eval: $(VENV)/.installed  ## score the shipped checkpoint again
	$(BIN)/python -m eval.small_world model=checkpoints/orthus-small output=runs/eval-small
	$(BIN)/python -m eval.report --run runs/eval-small --html runs/eval-small/report.html
	$(BIN)/python -m eval.report --results checkpoints/orthus-small/results.json --beside docs/results/*.json \
		--measured docs/results/measured/*.json --speed docs/results/speed/*.json \
		--solvers docs/results/solvers/*.json --markdown docs/RESULTS.md

clean:
	rm -rf runs build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache

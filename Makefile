# Each target does its own set-up in .venv. Needs Python 3.10 or newer and make.
PYTHON ?= python3
PROMPT ?= a red circle above a blue square
BIN := .venv/bin

.venv/ready: requirements.txt pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/pip install -q -r requirements.txt
	$(BIN)/pip install -q --no-deps -e .
	touch $@

.PHONY: demo test test-interop test-scale test-site weights weights-all weights-gpu weights-further evaluate results bench notebooks site expected
demo: .venv/ready
	$(BIN)/minunclip demo "$(PROMPT)"

test: .venv/ready
	$(BIN)/ruff check minunclip tests benchmarks
	$(BIN)/ruff format --check minunclip tests benchmarks
	$(BIN)/mypy
	OMP_NUM_THREADS=1 TQDM_DISABLE=1 $(BIN)/pytest -q -n auto --dist loadscope --nbval-lax --nbval-cell-timeout=1500 tests notebooks

test-interop: .venv/ready
	$(BIN)/pip install -q "transformers>=5" "diffusers>=0.38" onnx onnxruntime
	$(BIN)/pip install -q --no-deps open_clip_torch  # for CLIP's vocabulary alone
	$(BIN)/pytest -q tests/test_interop.py tests/test_karlo.py tests/test_export.py

test-scale: .venv/ready
	$(BIN)/pip install -q -e ".[scale,track]"
	$(BIN)/pytest -q tests/test_distributed.py tests/test_tracking.py

weights: .venv/ready
	$(BIN)/minunclip train all --preset cpu --out runs/cpu
	$(BIN)/minunclip pack runs/cpu data/weights

weights-all:  # what ships, from nothing; on a GPU (two cores would take more than a day)
	$(MAKE) weights-gpu
	$(MAKE) weights-further

weights-gpu: .venv/ready  # what ships, but for the last steps of decoder, GLIDE and upsamplers
	$(BIN)/minunclip train clip --preset cpu --out runs/first --steps 2500
	$(BIN)/minunclip train upsampler2 --preset cpu --out runs/first --steps 1500
	$(BIN)/minunclip train checker --preset cpu --out runs/first --steps 6000
	mkdir -p runs/long
	for stage in clip upsampler2 checker; do cp -r runs/first/$$stage runs/long/ || exit; done
	for stage in upsampler1 prior ar-prior decoder glide dalle-vae dalle; do $(BIN)/minunclip train $$stage --preset long || exit; done
	$(BIN)/minunclip pack runs/long data/weights

weights-further: .venv/ready  # what ships: what weights-gpu has left, four of it trained further on two cores
	for stage in decoder glide; do \
		$(BIN)/minunclip train $$stage --preset cpu --init data/weights --out runs/further --steps 3600 --batch_size 128 --learning_rate 0.0005 || exit; \
	done
	for stage in upsampler1 upsampler2; do \
		$(BIN)/minunclip train $$stage --preset cpu --init data/weights --out runs/further --steps 6000 --batch_size 16 || exit; \
	done
	$(BIN)/minunclip pack runs/further data/weights

evaluate: .venv/ready
	mkdir -p results
	$(BIN)/minunclip evaluate --enlarged 1000 --json results/evaluation.json --samples results/samples.png

results: .venv/ready
	mkdir -p results
	$(BIN)/minunclip experiment all --seeds 3 --out results

bench: .venv/ready
	$(BIN)/python benchmarks/speed.py --json results/speed.json

expected: .venv/ready
	$(BIN)/python benchmarks/expected.py

notebooks: .venv/ready
	$(BIN)/jupyter lab notebooks

site: .venv/ready
	$(BIN)/pip install -q -e ".[site]"
	$(BIN)/sphinx-build -q -W --keep-going -c docs . out/site
	@echo "open out/site/index.html"

test-site: site  # its tests want a Chromium too
	$(BIN)/pytest -q tests/test_site.py

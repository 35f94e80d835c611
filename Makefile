# Every target sets up what it needs, so each works in a fresh clone.
PYTHON ?= python3
JOBS ?= 2
BIN := .venv/bin
PY := $(BIN)/python
READY := .venv/.ready

.PHONY: venv data demo test lint bench kernel-report gpu-check clean

venv: $(READY)

# torch first, by its pin: whatever asks for it afterwards finds it there and pulls no other build.
$(READY): pyproject.toml setup.py constraints.txt
	test -x $(PY) || $(PYTHON) -m venv .venv
	$(PY) -m pip install --quiet --constraint constraints.txt torch
	$(PY) -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

data: venv
	$(PY) -m benchmarks.data

demo: venv
	model=$$($(PY) -m benchmarks.data smollm2) && \
	$(BIN)/lora-init run "$$model" --method inilora -r 8 --out demo-out --overwrite

# One thread a worker, so that workers do not fight for the cores. The data is fetched before they
# start; where it cannot be had, the tests that need it are skipped.
test: venv
	-$(PY) -m benchmarks.data >/dev/null
	OMP_NUM_THREADS=1 $(PY) -m pytest -n $(JOBS) --dist loadgroup $(ARGS)

lint: venv
	$(PY) -m ruff check
	$(PY) -m ruff format --check
	$(PY) -m mypy

bench: venv
	$(PY) -m benchmarks.run $(ARGS)

# Every kernel configuration, compiled ahead of time for each architecture; no GPU needed.
kernel-report: venv
	$(PY) -m benchmarks.kernel_report
	$(PY) -m benchmarks.native_report

# What only a GPU can prove or measure, in under 9 minutes.
gpu-check: venv
	benchmarks/gpu_check.sh $(or $(OUT),gpu-check-out)

clean:
	rm -rf .venv .data build dist demo-out *.egg-info .*_cache .hypothesis lora_init/_C.*
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

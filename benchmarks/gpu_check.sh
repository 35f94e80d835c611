#!/usr/bin/env bash
# Everything that needs a GPU, in one command of less than 9 minutes:
#
#     benchmarks/gpu_check.sh OUT_DIR
#
# leaves gpu_check.json, summary.txt and log.txt in OUT_DIR; see benchmarks/gpu_check.py.
# Needs no registry: it installs this checkout with what is there, and wheels carried in .whl/.
# PYTHON names the interpreter. LORA_INIT_COMMIT names the commit where there is no .git.
# lora_init._C is built for sm_90a alone, or for LORA_INIT_CUDA_ARCHS.
#
# Where a GPU is lent for a quarter of an hour, its start included, and has no registry, all fits
# one loan:
#
#     python3 -m pip download --no-deps -d .whl platformdirs  # here: whatever is missing there
#     GPU_CHECK_SECONDS=480 benchmarks/gpu_check.sh OUT_DIR   # there
set -uo pipefail
if [ $# -ne 1 ]; then
  echo "usage: $0 OUT_DIR" >&2
  exit 2
fi
mkdir -p "$1" && out=$(cd "$1" && pwd) || exit 2
cd "$(dirname "$0")/.." || exit 2

python=${PYTHON:-}
if [ -z "$python" ]; then
  if [ -x .venv/bin/python ]; then python=.venv/bin/python; else python=python3; fi
fi

if compgen -G '.whl/*.whl' >/dev/null; then
  carried=$(mktemp -d)
  "$python" -m pip install --quiet --no-index --no-deps --target "$carried" .whl/*.whl
  export PYTHONPATH=$carried${PYTHONPATH:+:$PYTHONPATH}
fi

# Not whether it imports: what a part cannot import is that part's to report.
installed() {
  "$python" - <<'EOF' 2>/dev/null
import importlib.metadata, importlib.util, pathlib, sys

importlib.metadata.version("lora-init")
sys.path.remove("")  # a checkout in the working directory is not installed by that
places = importlib.util.find_spec("lora_init").submodule_search_locations
sys.exit(pathlib.Path("lora_init").resolve() not in [pathlib.Path(p).resolve() for p in places])
EOF
}
export LORA_INIT_CUDA_ARCHS=${LORA_INIT_CUDA_ARCHS:-90a-real}
installed || "$python" -m pip install --quiet --no-deps --no-build-isolation -e . ||
  echo "could not install lora-init: parts that need it will say so" >&2

exec "$python" -m benchmarks.gpu_check "$out"

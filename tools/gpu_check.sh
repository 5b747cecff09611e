#!/usr/bin/env bash
# All that only a GPU can show, in the order in which it is worth most: the tests, the kernels under compute-sanitizer,
# then figures. Each step says what it is; the first that fails ends it. Without a GPU it ends with one line and status 3.
#
#   GPU_CHECK_MODELS="minilm resnet50-uint8"   what bench.gpu measures (default: all but the small ones, and with TensorRT
#                                              where that is installed)
#   GPU_CHECK_SECONDS=5                        of each measurement
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON_BIN:-.venv/bin/python}
export PYTHONPATH=.:proto:server:kernels:clients/python

step() { printf '\n== %s\n' "$*"; }

$python - <<'END' || exit 3
import sys
from forno.kernels.devices import DeviceUnavailable, attached, open_device
try:
    device = open_device("cuda")
except DeviceUnavailable as error:
    sys.exit(f"gpu-check: {error}")
with attached(device):
    free, total = device.memory_bytes()
print(f"GPU: {device.architecture} at {device.bus_id}, {free >> 20} of {total >> 20} MiB free")
device.close()
END

step "tests: adapters, kernels and engines"
$python -m pytest -q -p no:cacheprovider tests/gpu

if command -v compute-sanitizer >/dev/null; then
  for tool in memcheck racecheck initcheck synccheck; do
    step "compute-sanitizer --tool $tool: adapters and kernels"
    FORNO_TEST_DEVICE=cuda compute-sanitizer --tool "$tool" --error-exitcode 9 --launch-timeout 120 \
      "$python" -m pytest -q -x -p no:cacheprovider -o timeout=1800 tests/gpu/test_on_gpu.py
  done
else
  step "compute-sanitizer is not installed: skipped"
fi

models="minilm resnet50-uint8 resnet50-fp16 resnet50"
if $python -c "import tensorrt" 2>/dev/null; then models+=" resnet50-uint8-tensorrt"; fi
for model in ${GPU_CHECK_MODELS:-$models}; do
  step "bench.gpu --model $model"
  $python -m bench.gpu --device cuda --model "$model" --rows 64 --seconds "${GPU_CHECK_SECONDS:-5}"
done

if command -v nsys >/dev/null; then
  step "trace of copies beside computing: build/gpu-overlap.nsys-rep"
  mkdir -p build
  nsys profile --force-overwrite true --trace cuda --output build/gpu-overlap \
    "$python" -m bench.gpu --device cuda --model minilm --rows 64 --seconds 0.5 --out build
  nsys stats --report cuda_gpu_trace build/gpu-overlap.nsys-rep | head -60
else
  step "nsys is not installed: no trace"
fi
step "all done"

#!/usr/bin/env bash
# Checks the CUDA kernels on a machine with an NVIDIA GPU, without network: the GPU tests, then the timings.
#
#     benchmarks/gpu_check.sh [--output FILE.json] [further options of benchmarks.gpu_check]
#
# Wants torch with CUDA, timm, pytest, cuda-bindings; nothing is installed and nothing is built ahead.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
PYTHON=${PYTHON:-python3}
export PYTHONPATH="$PWD:$PWD/causal_conv1d:$PWD/mamba-1p1p1${PYTHONPATH:+:$PYTHONPATH}"

tests=0
for file in causal_conv1d/tests/test_conv_cuda.py mamba-1p1p1/tests/test_scan_cuda.py; do
    "$PYTHON" -m pytest -q -p no:cacheprovider -m gpu "$file" || tests=$?
done
"$PYTHON" -m benchmarks.gpu_check "$@"
timings=$?
echo "GPU tests: $([ $tests -eq 0 ] && echo passed || echo "failed ($tests)")"
exit $((tests > timings ? tests : timings))

#!/usr/bin/env bash
# Checks the CUDA kernels on a machine with an NVIDIA GPU, without network, in at most ten minutes: parity with float64,
# GPU tests with the golden files, timings, sanitizer. The exit code is 0 if all of it passed; the reports are in the
# folder named first.
#
#     benchmarks/gpu_check.sh [FOLDER [further options of benchmarks.gpu_check]]
#
# Wants torch with CUDA, timm, pytest, cuda-bindings; nothing is installed and nothing is built ahead.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
PYTHON=${PYTHON:-python3}
export PYTHONPATH="$PWD:$PWD/causal_conv1d:$PWD/mamba-1p1p1${PYTHONPATH:+:$PYTHONPATH}"
folder=${1:-output/gpu}
shift || true
mkdir -p "$folder"
report="$folder/report.txt"
: > "$report"
failed=()

part() {  # part NAME SECONDS COMMAND...
    local name=$1 seconds=$2
    shift 2
    local start=$SECONDS
    echo "=== $name: $*" | tee -a "$report"
    timeout "$seconds" "$@" 2>&1 | tee -a "$report"
    local code=${PIPESTATUS[0]}
    echo "=== $name: exit code $code after $((SECONDS - start)) s" | tee -a "$report"
    [ "$code" -eq 0 ] || failed+=("$name ($code)")
}

part parity 150 "$PYTHON" -m benchmarks.gpu_parity --output "$folder/parity.json"
part tests 80 "$PYTHON" -m pytest -q -p no:cacheprovider -m gpu causal_conv1d/tests mamba-1p1p1/tests \
    tests/test_golden_models.py tests/test_host_reads.py tests/test_cuda_graph.py
part timings 200 "$PYTHON" -m benchmarks.gpu_check --budget 150 --output "$folder/timings.json" "$@"
sanitizer=${SANITIZER:-$(command -v compute-sanitizer || true)}
if [ -n "$sanitizer" ]; then
    for tool in memcheck racecheck synccheck initcheck; do
        # torch's allocator hands out parts of one piece, in which nothing is out of bounds
        PYTORCH_NO_CUDA_MEMORY_CACHING=1 part "sanitizer $tool" 40 "$sanitizer" --tool "$tool" --error-exitcode 9 \
            --kernel-name regex:"conv|scan_|norm_|pooled_|match|merge|reduce|probe" \
            "$PYTHON" -m benchmarks.gpu_parity --tiny --parts operators --dtypes float32
    done
else
    echo "=== sanitizer: there is no compute-sanitizer; NOT RUN" | tee -a "$report"
fi
if [ "${#failed[@]}" -gt 0 ]; then
    echo "FAILED: ${failed[*]}" | tee -a "$report"
    exit 1
fi
echo "all passed" | tee -a "$report"

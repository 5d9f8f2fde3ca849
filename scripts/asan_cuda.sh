#!/usr/bin/env bash
# The CUDA kernels on the emulator, under AddressSanitizer: a read or write outside a tensor or a shared array ends the run
# and says where. Wants GCC. Arguments, if any, go to pytest instead of what is run by default.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/setup.sh

# without those whose tensors are larger than 4 GiB, and those that provoke faults
[ $# -gt 0 ] || set -- causal_conv1d/tests/test_conv_cuda.py mamba-1p1p1/tests/test_*_cuda.py -m "not gpu" \
    -k "emulated and not 32_bit or merging"
# Python itself is built without, so that the library comes first by force; what Python keeps to the end is no leak
export LD_PRELOAD="$(g++ -print-file-name=libasan.so) $(g++ -print-file-name=libstdc++.so)"
export ASAN_OPTIONS=detect_leaks=0:abort_on_error=0:exitcode=99 CUDA_EMULATOR_SANITIZE=address
# a test that compiles a dozen kernels may take long beside other work
exec "$PYTHON" -m pytest -q -p no:cacheprovider -o timeout=1800 -s "$@"

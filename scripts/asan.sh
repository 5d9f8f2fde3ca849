#!/usr/bin/env bash
# The C++ kernels under AddressSanitizer: built with it in a scratch folder, then called with the fuzzed arguments, right
# and wrong, and by the kernels' tests. Wants GCC. Arguments, if any, go to pytest instead of what is run by default.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/setup.sh
source scripts/built_anew.sh

build_anew "-fsanitize=address -fno-omit-frame-pointer" "-fsanitize=address"
for library in "$scratch"/*/*/_cpu*; do
    # a build that takes its flags from elsewhere would find no fault in anything
    grep -q __asan_report_load "$library" || { echo "$0: $library is built without AddressSanitizer." >&2 && exit 1; }
done
[ $# -gt 0 ] || set -- tests/test_fuzz.py -k operators
# Python itself is built without, so that the library comes first by force; what Python keeps to the end is no leak
LD_PRELOAD="$(g++ -print-file-name=libasan.so) $(g++ -print-file-name=libstdc++.so)" \
    ASAN_OPTIONS=detect_leaks=0:abort_on_error=0:exitcode=99 FUZZED_CALLS=${FUZZED_CALLS:-300} \
    "$PYTHON" -m pytest -q -p no:cacheprovider -s "$@"

#!/usr/bin/env bash
# The C++ kernels under AddressSanitizer: built with it in a scratch folder, then called with the fuzzed arguments, right
# and wrong, and by the kernels' tests. Wants GCC. Arguments, if any, go to pytest instead of what is run by default.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/setup.sh

root=$PWD
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
# the second is built by the headers of the copied first, not of one that is installed
for package in causal_conv1d mamba-1p1p1; do
    cp -r "$package" "$folder/$package"
    find "$folder/$package" -name '*.so' -delete
    (cd "$folder/$package" &&
        PYTHONPATH=$folder/causal_conv1d CXX=${CXX:-g++} CFLAGS="-fsanitize=address -fno-omit-frame-pointer" LDFLAGS="-fsanitize=address" \
            "$PYTHON" setup.py --quiet build_ext --inplace)
    compgen -G "$folder/$package/*/_cpu*" >/dev/null || {
        echo "scripts/asan.sh: $package was not built; wanted g++ with its libasan." >&2
        exit 1
    }
done
[ $# -gt 0 ] || set -- "$root/tests/test_fuzz.py" -k operators
# Python itself is built without, so that the library comes first by force; what Python keeps to the end is no leak
export LD_PRELOAD="$(g++ -print-file-name=libasan.so) $(g++ -print-file-name=libstdc++.so)"
export ASAN_OPTIONS=detect_leaks=0:abort_on_error=0:exitcode=99 FUZZED_CALLS=${FUZZED_CALLS:-300}
export PYTHONPATH="$folder/causal_conv1d:$folder/mamba-1p1p1:$root"
exec "$PYTHON" -m pytest -q -p no:cacheprovider -s "$@"

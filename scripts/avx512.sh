#!/usr/bin/env bash
# The C++ kernels' code for AVX-512 on a processor with AVX2 alone: its sixteen lanes are made of twice eight
# (csrc/avx512_emulated.h), in a scratch folder, and the kernels' tests run with it. What a time says there is nothing.
# Wants GCC. Arguments, if any, go to pytest instead of what is run by default.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/setup.sh
source scripts/built_anew.sh

build_anew "-DAVX512_EMULATED -Wno-psabi"
"$PYTHON" -c '
from causal_conv1d import native
from causal_conv1d.kernels.cpp import library as convolution
from mamba_ssm.kernels.cpp import library as scan
with native.isa("avx512") as found:
    raise SystemExit(None if found == "avx512" else f"The kernels were built for {found} at most; wanted avx512.")'
[ $# -gt 0 ] || set -- causal_conv1d/tests mamba-1p1p1/tests -k "avx512"
"$PYTHON" -m pytest -q -p no:cacheprovider "$@"

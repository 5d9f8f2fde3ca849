#!/usr/bin/env bash
# Make .venv with everything pinned in vim_requirements.txt and both kernel packages, unless it already holds exactly that.
# Run it, or source it: afterwards $PYTHON is the interpreter to use.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

find_python() {
    local candidate
    for candidate in ${PYTHON:-} python3 python3.13 python3.12 python3.11 python3.10 python; do
        if "$candidate" -c 'import sys, venv; sys.exit(sys.version_info < (3, 10))' 2>/dev/null; then
            echo "$candidate"
            return
        fi
    done
    echo "No Python with venv found; wanted Python 3.10 or newer (on Debian: apt install python3 python3-venv)." >&2
    exit 2
}

# a disk that cannot hold the environment is told of before gigabytes are loaded onto it; only Linux's torch brings CUDA along
check_room() {
    local free wanted=2 hint=
    if [ "$(uname -s)" = Linux ] && [[ ${PIP_EXTRA_INDEX_URL:-} != */cpu ]]; then
        wanted=7
        hint=", or 2 with torch for CPUs alone: PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu bash scripts/setup.sh"
    fi
    free=$(df -Pk . | awk 'NR == 2 { print int($4 / 1024 / 1024) }')
    if [ "$free" -lt "$wanted" ]; then
        echo "$free GiB are free on the disk of $PWD; wanted $wanted for .venv$hint" >&2
        exit 2
    fi
}

# one whose first install did not end is made anew, with the Python that is asked for now
[ ! -e .venv/unfinished ] || rm -rf .venv
if [ ! -x .venv/bin/python ]; then
    check_room
    "$(find_python)" -m venv .venv
    touch .venv/unfinished
fi
PYTHON=$PWD/.venv/bin/python
export PYTHON

# everything an install depends on, the compiler that is at hand too; a change of any of these installs again
compiler=$(command -v "${CXX:-c++}" || command -v g++ || command -v clang++ || true)
stamp=.venv/installed-$({ echo "$compiler"; cat vim_requirements.txt scripts/setup.sh {causal_conv1d,mamba-1p1p1}/{setup.py,pyproject.toml} \
    causal_conv1d/causal_conv1d/csrc/*.{cpp,h} mamba-1p1p1/mamba_ssm/csrc/*.{cpp,h} 2>/dev/null; } | cksum | tr ' ' '-')
if [ ! -e "$stamp" ]; then
    echo "Installing into .venv (torch is large: this takes some minutes the first time) ..."
    # on a terminal pip shows how far it is
    quiet=--quiet
    [ ! -t 1 ] || quiet=
    # beside torch's wheels for CPUs (PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu) nothing of CUDA is wanted
    skip='^$'
    [[ ${PIP_EXTRA_INDEX_URL:-} != */cpu ]] || skip=^cuda-bindings
    grep -v "$skip" vim_requirements.txt >.venv/requirements.txt
    "$PYTHON" -m pip install $quiet --disable-pip-version-check -r .venv/requirements.txt
    "$PYTHON" -m pip install $quiet --disable-pip-version-check --no-build-isolation --no-deps \
        -e ./causal_conv1d
    "$PYTHON" -m pip install $quiet --disable-pip-version-check --no-build-isolation --no-deps \
        -e ./mamba-1p1p1
    for library in causal_conv1d/causal_conv1d/_cpu mamba-1p1p1/mamba_ssm/_cpu; do
        if ! compgen -G "$library*" >/dev/null; then
            echo "$library was not built, so the kernels run on torch alone, several times slower; wanted a C++17 compiler" \
                "(on Debian: apt install g++), then this script again." >&2
        fi
    done
    rm -f .venv/installed-* .venv/unfinished
    touch "$stamp"
fi

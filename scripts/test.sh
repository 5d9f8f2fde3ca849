#!/usr/bin/env bash
# Install what is missing, lint, and run the whole test suite. Arguments, if any, go to one run of pytest instead.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/setup.sh

"$PYTHON" -m ruff check .
"$PYTHON" -m ruff format --check .
if [ $# -gt 0 ]; then
    exec "$PYTHON" -m pytest "$@"
fi
# Three processes: after the operator checks of the kernel packages, torch.load has been seen to misread sizes in the
# same process, so what reads checkpoints runs before them, and the models after them on their own.
"$PYTHON" -m pytest -q tests/test_program_*.py tests/test_checkpoints.py tests/test_datasets.py
"$PYTHON" -m pytest -q causal_conv1d mamba-1p1p1
"$PYTHON" -m pytest -q tests --ignore-glob='*test_program_*' --ignore=tests/test_checkpoints.py \
    --ignore=tests/test_datasets.py

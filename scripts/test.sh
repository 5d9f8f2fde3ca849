#!/usr/bin/env bash
# Install what is missing, lint, and run the whole test suite, on up to four cores. Arguments, if any, go to pytest
# instead.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/setup.sh

"$PYTHON" -m ruff check .
"$PYTHON" -m ruff format --check .
# the files are shared out among processes of one thread each
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
[ $# -gt 0 ] || set -- -q -n auto --maxprocesses 4 --dist loadfile
exec "$PYTHON" -m pytest "$@"

#!/usr/bin/env bash
# Install what is missing, lint, and run the whole test suite. Arguments, if any, go to pytest instead.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/setup.sh

"$PYTHON" -m ruff check .
"$PYTHON" -m ruff format --check .
[ $# -gt 0 ] || set -- -q
exec "$PYTHON" -m pytest "$@"

#!/usr/bin/env bash
# The models of transformers, and peft's adapters, on these packages: make .venv-transformers, which is .venv with both
# beside, and test. Arguments, if any, go to pytest.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/setup.sh

VERSION=${TRANSFORMERS:-5.24.0} ADAPTERS=${PEFT:-0.21.2}
stamp=.venv-transformers/installed-$VERSION-$ADAPTERS
if [ ! -e "$stamp" ]; then
    rm -rf .venv-transformers
    "$PYTHON" -m venv .venv-transformers
    # what .venv has is seen from here; what transformers wants otherwise is installed over it
    "$PYTHON" -c 'import sysconfig; print("import site; site.addsitedir(%r)" % sysconfig.get_path("purelib"))' \
        >"$(.venv-transformers/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/base.pth"
    .venv-transformers/bin/python -m pip install --quiet --disable-pip-version-check "transformers==$VERSION" "peft==$ADAPTERS"
    touch "$stamp"
fi
exec .venv-transformers/bin/python -m pytest -q mamba-1p1p1/tests/test_transformers.py tests/test_adapters.py "$@"

"""The micro models, by their name in the tests.

`python tests/micro_models.py FLAGS...` is `python main.py FLAGS...` with these names added.
"""

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.micro_models import SIZES, default_cfgs, timm

__all__ = ["SIZES", "default_cfgs", "timm"]

if __name__ == "__main__":
    import main

    sys.exit(main.main())

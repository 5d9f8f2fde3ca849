"""What masked pre-training bought: `python -m benchmarks.few_labels OUTPUT_DIR` of `scripts/mae/digits.sh`.

Everything is read from what the runs wrote: `args.json` and `log.txt`.
"""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.command import command, parser
from benchmarks.summary import markdown, read_log

COLUMNS = {
    "run": "{name}",
    "labels": "{labels}",
    "seeds": "{seeds}",
    "test top-1, %": "{accuracy}",
    "training, s": "{seconds:.1f}",
}


def flags_of(folder: Path) -> dict[str, Any]:
    """The flags of the run in `folder`."""
    return json.loads((folder / "args.json").read_text(encoding="utf-8"))


def row(name: str, folders: Sequence[Path]) -> dict[str, object]:
    """One line for runs that differ in their seed: mean and deviation of their last accuracy."""
    logs = [read_log(folder) for folder in folders]
    accuracies = [log[-1]["test_acc1"] for log in logs]
    spread = f" ± {statistics.stdev(accuracies):.2f}" if len(logs) > 1 else ""
    return {
        "name": name,
        "labels": f"{flags_of(folders[0])['label_share']:.0%}",
        "seeds": len(logs),
        "accuracy": f"{statistics.mean(accuracies):.2f}{spread}",
        "seconds": statistics.mean(sum(line["seconds"] for line in log) for log in logs),
    }


@command("benchmarks.few_labels")
def main(argv: Sequence[str] | None = None) -> None:
    """Print how well patches are rebuilt, and a table of accuracies."""
    flags = parser("benchmarks.few_labels", __doc__)
    flags.add_argument("folder", type=Path, metavar="OUTPUT_DIR")
    folder = flags.parse_args(argv).folder
    kinds = {
        "pre-trained, fine-tuned": sorted(folder.glob("finetuned-*")),
        "from scratch": sorted(folder.glob("scratch-*")),
        "pre-trained, linear probe": sorted(folder.glob("probe")),
    }
    masked, steps = read_log(folder / "pretrain"), flags_of(folder / "pretrain")["iterations"]
    rows = [row(name, folders) for name, folders in kinds.items() if folders]
    seconds, last = sum(line["seconds"] for line in masked), masked[-1]
    print(
        f"Loss of hidden patches after {steps} steps and {seconds:.0f} s without labels: "
        f"{last['test_loss']:.4f}; of predicting each patch's mean: {last['test_loss_of_means']:.4f}.\n"
    )
    print(markdown(rows, COLUMNS))


if __name__ == "__main__":
    sys.exit(main())

"""Whether memory and open files stay flat over a long run: `python -m benchmarks.soak --task segment --steps 3000`.

A model of a second's size trains on a small data set of the task's own format, with an evaluation and a checkpoint
thirty times on the way. After each of them the process and its loader workers are looked at from outside: what is
resident (RSS) and how many files are open. The exit code is 1 if either grew after the first third, or the run failed.
"""

from __future__ import annotations

import json
import resource
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.command import command, parser, write_json
from benchmarks.faults import STEADY, epochs_in, exit_on_sigterm, launch, stop_all, succeed
from benchmarks.jobs import JOBS, Job
from benchmarks.program import go_on
from benchmarks.summary import markdown
from utils.flags import number

LOOKS = 30
# what may be more at the end than after the first third: allocators give back in pieces, and their use wanders
ALLOWED = 0.03
COLUMNS = {
    "task": "{task}",
    "steps": "{steps}",
    "RSS after a third, two thirds, all, MiB": "{first:.1f}, {second:.1f}, {last:.1f}",
    "growth over the last two thirds, MiB": "{growth:+.1f}",
    "open files": "{files_first} to {files_last}",
    "flat": "{flat}",
}


class Look(NamedTuple):
    """What a process held at one moment, with those that it started: MiB resident, and open files."""

    mib: float
    files: int


def family(process: int) -> list[int]:
    """`process` and those that it started, and so on."""
    parents = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                parents[int(entry.name)] = int(
                    (entry / "stat").read_text(encoding="utf-8").rpartition(")")[2].split()[1]
                )
            except (OSError, ValueError):
                continue
    found = [process]
    for parent in found:  # grows as it is walked
        found += [child for child, its in parents.items() if its == parent]
    return found


def look(process: int) -> Look:
    """At `process` and those that it started, as they are now."""
    pages = files = 0
    for each in family(process):
        try:
            pages += int(Path(f"/proc/{each}/statm").read_text(encoding="utf-8").split()[1])
            files += len(list(Path(f"/proc/{each}/fd").iterdir()))
        except OSError:  # it has just ended
            continue
    return Look(pages * resource.getpagesize() / 2**20, files)


def soak(job: Job, folder: Path, steps: int, workers: int = 0) -> dict[str, Any]:
    """Train `job` for `steps` steps under `folder`; returns a row of the table. Raises `faults.Lost` for a run that
    does not end well."""
    looks = min(LOOKS, steps)
    length = ("--iterations", steps // looks * looks, "--eval-interval", steps // looks)
    output = folder / "soak"
    flags = [*job.data(folder), *STEADY, *job.batches(), *length, "--num_workers", workers]
    process = launch(1, *flags, "--output_dir", output)
    seen: list[Look] = []
    try:
        while process.poll() is None:
            if epochs_in(output) > len(seen):
                seen.append(look(process.pid))
            go_on(process, 0.05)
        succeed(process)
    finally:
        stop_all(process)
    return dict(task=job.name, steps=steps // looks * looks) | judge(seen)


def judge(seen: Sequence[Look]) -> dict[str, Any]:
    """What is told of the looks, one after another, at a run."""
    seen = [each for each in seen if each.files]
    third = max(1, len(seen) // 3)
    # a single look may fall on a checkpoint that is being written
    first, second, last = (sorted(each.mib for each in part)[len(part) // 2] for part in parts(seen, third))
    # one may fall on the run's end, and several on an image that is being read: what leaked is open at the others, too
    files = [sorted(each.files for each in part)[min(1, len(part) - 1)] for part in parts(seen, third)]
    flat = last <= first * (1 + ALLOWED) and files[2] <= files[0]
    return dict(
        first=first,
        second=second,
        last=last,
        growth=last - first,
        files_first=files[0],
        files_last=files[2],
        flat="yes" if flat else "no",
        looks=[each.mib for each in seen],
    )


def parts(seen: Sequence[Look], third: int) -> tuple[Sequence[Look], ...]:
    """Five looks around the end of each third."""
    width = min(5, third)
    return tuple(seen[end - width : end] for end in (third, 2 * third, len(seen)))


@command("benchmarks.soak")
def main(argv: Sequence[str] | None = None) -> int:
    """Run the tasks one after another and print a table."""
    flags, count = parser("benchmarks.soak", __doc__), number(int, 1)
    flags.add_argument("--task", nargs="+", choices=[*JOBS], default=[*JOBS], help="default: all")
    flags.add_argument("--steps", type=count, default=3000, help="default: 3000")
    flags.add_argument("--workers", type=number(int, 0), default=0, help="loader workers (default: 0)")
    flags.add_argument("--out", type=Path, default=None, metavar="FILE", help="JSON file")
    args = flags.parse_args(argv)
    rows = []
    with exit_on_sigterm(), tempfile.TemporaryDirectory(prefix="soak_") as root:
        for name in args.task:
            folder = Path(root, name)
            folder.mkdir()
            rows.append(soak(JOBS[name], folder, args.steps, args.workers))
            print(json.dumps(rows[-1]), file=sys.stderr, flush=True)
    print(markdown(rows, COLUMNS))
    write_json(args.out, rows)
    return int(any(row["flat"] != "yes" for row in rows))


if __name__ == "__main__":
    sys.exit(main())

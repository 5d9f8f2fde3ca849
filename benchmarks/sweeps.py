"""Inputs that may be broken, drawn by the hundred, judged and counted; `benchmarks.bad_inputs` draws and judges."""

from __future__ import annotations

import contextlib
import multiprocessing
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import seed as seeded
from hypothesis import strategies as st

from benchmarks import bad_calls, bad_inputs
from benchmarks.bad_files import places
from benchmarks.jobs import Job


@dataclass
class Sweep:
    """Counts of one kind of input."""

    name: str
    accepted: int = 0
    refused: int = 0
    failures: list[str] = field(default_factory=list)

    @property
    def tried(self) -> int:
        """How many inputs there were."""
        return self.accepted + self.refused + len(self.failures)

    def row(self) -> dict[str, Any]:
        """A row of the table."""
        counts = dict(accepted=self.accepted, refused=self.refused, crashed=len(self.failures))
        return dict(name=self.name, tried=self.tried, **counts)


def sweep(
    name: str,
    inputs: st.SearchStrategy[Any],
    judge: Callable[[Any], str],
    count: int,
    seed: int,
    allowed: Sequence[str] = (bad_inputs.ACCEPTED, bad_inputs.REFUSED),
) -> Sweep:
    """Judge `count` inputs, in processes of their own, so that one that ends by a signal is counted too."""
    result, context, part = Sweep(name), multiprocessing.get_context("fork"), 0
    while result.tried < count and part < 10 * count:
        receiver, sender = context.Pipe(duplex=False)
        left = min(count - result.tried, 500)
        child = context.Process(target=_judge_all, args=(inputs, judge, left, seed * 1000 + part, sender))
        child.start()
        sender.close()
        last, before = "", result.tried
        with contextlib.suppress(EOFError):
            while True:
                drawn, verdict = receiver.recv()
                last = "" if verdict else drawn
                if verdict:
                    _count(result, drawn, verdict, allowed)
        child.join()
        if not last and child.exitcode:
            raise RuntimeError(f"The inputs of {name} cannot be drawn.")
        if last:
            result.failures.append(f"{name}: {last} ended the process ({child.exitcode})")
        elif result.tried == before:
            raise RuntimeError(f"No input of {name} was judged: exit code {child.exitcode}.")
        part += 1
    return result


def _count(result: Sweep, drawn: str, verdict: str, allowed: Sequence[str]) -> None:
    if verdict not in allowed:
        result.failures.append(f"{result.name}: {drawn}: {verdict}")
    elif verdict == bad_inputs.ACCEPTED:
        result.accepted += 1
    else:
        result.refused += 1


def _judge_all(inputs: st.SearchStrategy[Any], judge: Callable[[Any], str], count: int, seed: int, sender: Any) -> None:
    torch.set_num_threads(1)

    @seeded(seed)
    @settings(
        max_examples=count,
        deadline=None,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(inputs)
    def run(value: Any) -> None:
        drawn = repr(value)[:600]
        sender.send((drawn, ""))
        sender.send((drawn, judge(value)))

    run()
    sender.close()


def bad_inputs_of_all_kinds(job: Job, folder: Path, count: int, seed: int) -> list[Sweep]:
    """`count` inputs of every kind that `job` has; operators are tried with classification, since they know no task."""
    files = bad_inputs.Checkpoints.make(folder, job)
    common = [*files.flags, "--output_dir", folder / "output"]
    if job.name == "classify":
        torch.save({"model": files.run["model"]}, folder / "teacher.pth")
        common += ["--teacher-path", folder / "teacher.pth"]

    def judge_file(pair: tuple[bad_inputs.File, str]) -> str:
        return files.judge(*pair)

    def judge_flags(flags: list[str]) -> str:
        return bad_inputs.judge_program(*common, *flags)

    uses, resumed = bad_inputs.USES, st.sampled_from(["--resume", "--resume", "--eval --resume"])
    refused = (bad_inputs.REFUSED,)
    sweeps = [
        sweep("checkpoint bytes", st.tuples(files.damaged(), uses), judge_file, count, seed),
        sweep("checkpoints that call code", st.tuples(files.with_code(), uses), judge_file, count, seed, refused),
        sweep("checkpoints with odd entries", st.tuples(files.odd(), resumed), judge_file, count, seed),
        sweep("command lines", bad_inputs.flags_of(job.name), judge_flags, count, seed),
    ]
    for place in places(job, folder / "places"):
        sweeps.append(sweep(place.title, place.files(), place.judge, count, seed))
    for operator in bad_calls.OPERATORS if job.name == "classify" else ():
        calls = bad_calls.calls(operator)
        sweeps.append(sweep(f"arguments of `{operator}`", calls, bad_calls.judge_call, count, seed))
    return sweeps

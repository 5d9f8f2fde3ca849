"""Short forms of `python -m benchmarks.reliability`: kills at random moments, and two machines."""

from __future__ import annotations

import argparse
import contextlib
import math
import os
import random
import resource
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import strategies as st

import main as program
import run
from benchmarks import faults, reliability, sweeps
from benchmarks.bad_files import places
from benchmarks.bad_inputs import ACCEPTED, REFUSED, File
from benchmarks.jobs import JOBS
from benchmarks.program import EPOCH, call_program, finish, start
from benchmarks.small_data import write_shapes
from benchmarks.soak import Look, judge
from tasks.cells.pictures import draw_subsets
from tasks.cells.subsets import SubsetResult, write_csv
from tasks.detect.coco import CocoFile
from tasks.detect.evaluation import CocoEvaluator
from tasks.detect.task import Detect
from tasks.segment import task as segment_task
from tasks.task import Metric


def test_kills_at_random_moments(tmp_path: Path) -> None:
    """Every checkpoint loads, and in the end nothing differs from a run that was left alone."""
    tally = faults.kill(JOBS["classify"], tmp_path, 2, random.Random(0), workers=0)
    assert (tally.tried, tally.failures) == (2, [])


def test_a_run_that_says_more_than_a_pipe_holds_is_not_held_up(tmp_path: Path) -> None:
    file = tmp_path / "done"
    process = start("-c", f"print('x' * 10**6); open({str(file)!r}, 'w'); import time; time.sleep(1)")
    faults.wait_until(file.exists, process, "file")
    assert len(finish(process).out) == 10**6 + 1


@contextlib.contextmanager
def no_room() -> Iterator[None]:
    """A limit on the size of files stands for a disk that is full."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_what_an_evaluation_writes_may_find_no_room(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Its figures are there all the same, no half of a file is, and it is said."""
    truth = CocoFile(write_shapes(tmp_path / "shapes", 2, 2) / "annotations" / "instances_val2017.json")
    detector = CocoEvaluator(truth, tmp_path / "out" / "predictions.json")
    found = {"boxes": torch.ones(1, 4), "labels": torch.ones(1, dtype=torch.long), "scores": torch.ones(1)}
    detector.update([found | {"masks": torch.ones(1, 1, 64, 64)}], [{"image_id": 1}])
    segmenter = segment_task._Evaluator(["one", "two"], tmp_path / "out" / "maps")
    subsets = [SubsetResult((0,), 1, 2), SubsetResult((1,), 2, 2)]
    with no_room():
        assert detector.compute()["box_ap"] == 0
        segmenter.update([torch.zeros(8, 8, dtype=torch.long)] * 2, [(torch.zeros(8, 8), name) for name in "ab"])
        write_csv(subsets, ["a", "b"], tmp_path / "out" / "subsets.csv")
        draw_subsets({"a model": subsets}, tmp_path / "out" / "subsets.png")
    assert segmenter.compute()["aAcc"] == 100
    assert segmenter.folder is None  # the second was not tried
    assert caplog.text.count("could not be written") == 4
    assert [path.name for path in (tmp_path / "out").rglob("*")] == ["maps"]


def test_a_new_run_clears_what_a_killed_one_left_of_its_tasks_files(tmp_path: Path) -> None:
    for name in (".predictions.json.abc.tmp", ".checkpoint.pth.abc.tmp", ".mine.tmp"):
        (tmp_path / name).write_text("half", encoding="utf-8")
    run.claim_output(argparse.Namespace(output_dir=str(tmp_path)), Detect.written).close()
    assert {path.name for path in tmp_path.iterdir()} == {".lock", ".mine.tmp"}


def test_any_figure_is_better_than_none() -> None:
    assert Metric("loss", higher_is_better=False).is_better(2.0, math.nan)
    assert not Metric("acc1").is_better(math.nan, 2.0)


def test_two_machines(tmp_path: Path) -> None:
    """Over two network namespaces: the same bits as on one machine, and an end in seconds if a process dies."""
    tallies = faults.network(JOBS["classify"], tmp_path)
    if not tallies[0].tried:
        pytest.skip(tallies[0].notes)
    assert [(tally.tried, tally.failures) for tally in tallies] == [(1, []), (1, [])]


def test_inputs_are_counted() -> None:
    """Also those that end the process, after which the others go on."""

    def judge(value: int) -> str:
        if value:
            os._exit(5)
        return ACCEPTED

    found = sweeps.sweep("numbers", st.integers(0, 1), judge, 4, seed=0)
    assert found.tried == 4
    assert found.accepted == 4 - len(found.failures)
    assert any("1 ended the process (5)" in text for text in found.failures)


def test_page(tmp_path: Path) -> None:
    """Of two tasks, written one after the other; what is run again takes its own place."""
    tally, file = faults.Tally("a fault"), tmp_path / "results.json"
    with tally.trial():
        raise faults.Lost("weights")
    common = dict(failures=[], seconds=1, machine="a machine", day="today")
    lost = common | dict(rows=[dict(task="segment") | tally.row()], failures=tally.failures)
    reliability.keep(file, "segment", "kills", lost)
    inputs = sweeps.Sweep("an input", accepted=1, refused=2)
    reliability.keep(file, "detect", "inputs", common | dict(rows=[dict(task="detect") | inputs.row()]))
    run = dict(task="cells", model="Vim", dtype="float16", steps=3, bad=0, scaled=1, first=2.0, last=1.0, finite="yes")
    reliability.keep(file, "cells", "precision", common | dict(rows=[run]))
    looks = dict(task="cells", steps=30) | judge([Look(100.0, 5)] * 30)
    reliability.keep(file, "cells", "soak", common | dict(rows=[looks]))
    results = reliability.read(file)
    page = reliability.page(results)
    for told in (
        "Faults: 1 tried, 0 survived, 1 lost.",
        "Bad inputs: 3 tried, 2 refused cleanly, 1 accepted",
        "Mixed precision: 1 runs, 1 finite, 0 not. Long runs: 1, 1 flat.",
        "- segment, a fault: Lost: weights",
        "segment: signals, disk, processes, network, inputs, precision, soak; detect: kills,",
        "| cells | Vim | float16 |",
        "| cells | 30 | 100.0, 100.0, 100.0 | +0.0 | 5 to 5 | yes | today |",
    ):
        assert told in page
    assert reliability.is_bad(results)
    tally.failures.clear()
    reliability.keep(file, "segment", "kills", common | dict(rows=[dict(task="segment") | tally.row()]))
    assert not reliability.is_bad(reliability.read(file))


def test_what_grows_is_not_flat() -> None:
    assert judge([Look(100.0 + 0.01 * step, 5) for step in range(30)])["flat"] == "yes"
    assert judge([Look(100.0 + step, 5) for step in range(30)])["flat"] == "no"
    assert judge([Look(100.0, 5 + step) for step in range(30)])["flat"] == "no"
    # three of the last looks fell on an image that was being read, one on the end of the run; what leaked is there at
    # all but the end
    assert judge([Look(100.0, 4 if step == 29 else 5 + (step > 25)) for step in range(30)])["flat"] == "yes"
    assert judge([Look(100.0, 4 if step == 29 else 5 + (step > 20)) for step in range(30)])["flat"] == "no"


@pytest.mark.parametrize("name", ["pretrain", "cells", "segment", "detect"])
def test_every_task_has_a_small_run(name: str, tmp_path: Path, one_thread: None) -> None:
    """Its data can be written, its flags are taken, one epoch trains, and a broken file of its own is told of."""
    job = JOBS[name]
    output = tmp_path / "output"
    result = call_program(*job.data(tmp_path, 4), *EPOCH, *job.batches(), "--output_dir", output)
    assert result.code == 0, result.err
    assert faults.check_readable(output)["epoch"] == 0
    for place in places(job, tmp_path / "places"):
        assert place.judge(File(place.names[0], b"")) == REFUSED, place
    for flags in (["--task", name, *job.embedded, *own] for own in job.models.values()):
        program.parse([flag.format(Vim=__file__) for flag in flags])

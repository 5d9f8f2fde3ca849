"""Short forms of `python -m benchmarks.reliability`: kills at random moments, and two machines."""

from __future__ import annotations

import json
import os
import random
from pathlib import Path

import pytest
from hypothesis import strategies as st

from benchmarks import faults, reliability, sweeps
from benchmarks.bad_inputs import ACCEPTED


def test_kills_at_random_moments(tmp_path: Path) -> None:
    """Every checkpoint loads, and in the end nothing differs from a run that was left alone."""
    tally = faults.soak(tmp_path, 2, random.Random(0), workers=0)
    assert (tally.tried, tally.failures) == (2, [])


def test_two_machines(tmp_path: Path) -> None:
    """Over two network namespaces: the same bits as on one machine, and an end in seconds if a process dies."""
    tallies = faults.network(tmp_path)
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
    tallies = [faults.Tally("a fault")]
    with tallies[0].trial():
        raise faults.Lost("weights")
    counts = [sweeps.Sweep("an input", accepted=1, refused=2)]
    runs = [dict(model="Vim", dtype="float16", steps=3, bad=0, scaled=1, first=2.0, last=1.0, finite="yes")]
    page = reliability.report("command", tallies, counts, runs, {"kills": 1.0})
    assert "Faults: 1 tried, 0 survived, 1 lost." in page
    assert "Bad inputs: 3 tried, 2 refused cleanly, 1 accepted" in page
    assert "- a fault: Lost: weights" in page
    assert json.dumps(runs[0]["model"]).strip('"') in page

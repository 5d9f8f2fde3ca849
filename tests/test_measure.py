"""Time, memory, the machine and a model beside another."""

from __future__ import annotations

import time

import pytest
import timm
import torch

import models_mamba  # noqa: F401 (registers the models)
from measure import against, machine, memory, timing
from measure.clock import clock_hertz
from utils import RunError

CPU = torch.device("cpu")
MIB = 2**20


def test_calls_take_turns() -> None:
    seen: list[int] = []
    calls = [lambda number=number: (seen.append(number), time.sleep(0.06)) for number in range(3)]
    times = timing.time_in_turns(calls, CPU, 0.0, min_rounds=4)
    warm, timed = seen[:9], seen[9:]
    assert warm == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    assert [sorted(timed[at : at + 3]) for at in range(0, 12, 3)] == [[0, 1, 2]] * 4
    assert [len(taken) for taken in times] == [4, 4, 4]
    assert min(min(taken) for taken in times) >= 0.06


def test_short_calls_are_repeated_and_slow_ones_get_few_rounds() -> None:
    counts = {"short": 0, "slow": 0}

    def short() -> None:
        counts["short"] += 1

    def slow() -> None:
        counts["slow"] += 1
        time.sleep(0.03)

    options = dict(min_rounds=4, warm_up=1, block_seconds=0.0, slow_seconds=0.02)
    times = timing.time_in_turns([short, slow], CPU, **options)
    assert [len(taken) for taken in times] == [4, timing.SLOW_ROUNDS]
    assert counts == {"short": 5, "slow": 1 + timing.SLOW_ROUNDS}
    counts["short"] = 0
    (taken,) = timing.time_in_turns([short], CPU, min_rounds=2, warm_up=1, block_seconds=0.002)
    assert len(taken) == 2
    assert counts["short"] > 20, "a timing is many calls"
    assert max(taken) < 0.001, "and told per call"


def test_rounds_end_with_the_time_or_the_count() -> None:
    call = lambda: time.sleep(0.01)  # noqa: E731
    options = dict(warm_up=0, block_seconds=0.0)
    assert len(timing.time_in_turns([call], CPU, 60.0, min_rounds=1, max_rounds=3, **options)[0]) == 3
    assert 3 <= len(timing.time_in_turns([call], CPU, 0.05, min_rounds=1, **options)[0]) <= 6


def test_device_seconds_takes_the_sets_in_turn() -> None:
    seen: list[int] = []
    calls = [lambda number=number: (seen.append(number), time.sleep(0.002)) for number in range(2)]
    assert 0.002 <= timing.device_seconds(calls, CPU, 0.0) < 0.02
    assert seen == [0, 1, 0, *[0, 1, 0, 1, 0]], "each once, one to see how long it takes, then five"


def test_peak_memory_counts_every_byte() -> None:
    def call() -> None:
        first = torch.empty(1000, dtype=torch.uint8)
        second = torch.empty(500, dtype=torch.uint8)
        del first, second
        torch.empty(1200, dtype=torch.uint8)

    weights = torch.empty(77, dtype=torch.uint8)
    assert memory.peak_memory(call, CPU) == 1500
    assert memory.peak_memory(call, CPU, [weights, weights.view(7, 11)]) == 1577, "shared memory counts once"


def grab(mib: int) -> list[float]:
    """Holds 8 MiB, then takes `mib` for a while: MiB in use before, and at the peak."""
    held = torch.ones(8 * MIB // 4)
    before = memory.bytes_in_use(CPU)
    peak = memory.peak_in_use(lambda: torch.ones(mib * MIB // 4), CPU)
    return [before / MIB, peak / MIB, held.numel(), torch.get_num_threads()]


def test_peak_of_a_fresh_process() -> None:
    large = torch.ones(300 * MIB // 4)  # what this process holds is no part of it
    before, peak, _, threads = memory.in_fresh_process(grab, 64)
    assert 62 < peak - before < 70
    assert threads == torch.get_num_threads()
    assert large.sum() > 0


def fail(told: str) -> None:
    raise ValueError(told)


def test_a_fresh_process_that_fails_is_told_in_a_sentence() -> None:
    with pytest.raises(RunError, match="exit code 1: ValueError: no luck"):
        memory.in_fresh_process(fail, "no luck")


def test_shared_memory_counts_once() -> None:
    tensor = torch.zeros(10)
    assert memory.size_of([tensor, tensor[2:], None, torch.zeros(3)]) == 52


def test_machine_says_what_the_figures_depend_on() -> None:
    about = machine.machine(CPU)
    assert about["threads"] == torch.get_num_threads()
    assert about["isa"] in machine.LANES
    assert about["torch"] == torch.__version__
    assert about["cores"] >= 1
    assert f"isa {about['isa']}, " in machine.in_words(about)


def test_lowered_instructions_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    if machine.instruction_set() == "none":
        pytest.skip("no C++ kernels")
    monkeypatch.setenv("KERNEL_ISA", "plain")
    assert machine.instruction_set() == "plain"


def test_clock_is_one_of_this_century(monkeypatch: pytest.MonkeyPatch) -> None:
    hertz = clock_hertz()
    if hertz is not None:
        assert 0.3e9 < hertz < 10e9
    monkeypatch.setenv("CC", "false")
    assert clock_hertz() is None


def test_a_model_beside_another() -> None:
    one, two = (timm.create_model(f"{family}_nano_patch4_32", depth=2) for family in ("fastvim", "vim"))
    images = torch.randn(2, 3, 32, 32)
    lines = against.report(one, two, images, seconds=0.0, title="plain")
    assert len(lines) == 3
    assert lines[0].startswith("Images/s at batch 2: ")
    assert "plain" in lines[2]
    fewer = float(lines[2].rpartition(", ")[2].removesuffix("% fewer"))
    assert 0 < fewer < 100

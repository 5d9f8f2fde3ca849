"""How long calls take, in turns in one process, so that a machine that slows down slows down all of them."""

from __future__ import annotations

import math
import random
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

BLOCK_SECONDS = 0.05  # one timing is as many calls as take about this long
MIN_ROUNDS = 5
SLOW_ROUNDS = 2
Call = Callable[[], Any]


def synchronize(device: torch.device) -> None:
    """Wait until `device` has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds_of(call: Call, device: torch.device, repeats: int = 1) -> float:
    """Seconds that one of `repeats` calls takes, from an idle device to an idle device."""
    synchronize(device)
    start = time.perf_counter()
    for _ in range(repeats):
        call()
    synchronize(device)
    return (time.perf_counter() - start) / repeats


def time_in_turns(
    calls: Sequence[Call],
    device: torch.device,
    seconds: float = 0.0,
    *,
    min_rounds: int = MIN_ROUNDS,
    max_rounds: float = math.inf,
    warm_up: int = 3,
    block_seconds: float = BLOCK_SECONDS,
    slow_seconds: float = math.inf,
) -> list[list[float]]:
    """Seconds that each of `calls` takes: one list each, one entry a round.

    Rounds go on for about `seconds`, at least `min_rounds` and at most `max_rounds` of them, each in another order;
    what takes longer than `slow_seconds` is in the first `SLOW_ROUNDS` only. Every call is made `warm_up` times before.
    Short ones are repeated within a round until `block_seconds` are over, so that a clock's grain does not show; 0
    times single calls.
    """
    warm = [[seconds_of(call, device) for _ in range(warm_up)][-1:] for call in calls]
    repeats = [max(1, math.ceil(block_seconds / taken[0])) if taken else 1 for taken in warm]
    slow = {number for number, taken in enumerate(warm) if taken and taken[0] > slow_seconds}
    times: list[list[float]] = [[] for _ in calls]
    order = list(range(len(calls)))
    shuffle = random.Random(0).shuffle
    end, rounds = time.perf_counter() + seconds, 0
    while rounds < min_rounds or (rounds < max_rounds and time.perf_counter() < end):
        shuffle(order)
        for number in order:
            if number not in slow or rounds < SLOW_ROUNDS:
                times[number].append(seconds_of(calls[number], device, repeats[number]))
        rounds += 1
    return times


def device_seconds(calls: Sequence[Call], device: torch.device, seconds: float) -> float:
    """Median seconds of one call, for `calls` that do the same to different data, so that none finds its own in a
    cache.

    Measured for about `seconds`; on CUDA between events in the stream, so that what the host does is left out as long
    as it keeps ahead of the device.
    """
    for call in calls:
        call()
    count = max(5, min(1000, int(seconds / max(1e-6, seconds_of(calls[0], device)))))
    turns = [calls[number % len(calls)] for number in range(count)]
    if device.type != "cuda":
        return statistics.median(seconds_of(call, device) for call in turns)
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in turns]
    for call, (before, after) in zip(turns, events):
        before.record()
        call()
        after.record()
    synchronize(device)
    return 1e-3 * statistics.median(before.elapsed_time(after) for before, after in events)

"""Times that can be compared: cases take turns in one process, and the median of each is taken."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Mapping

import torch

SHORTEST = 0.005
"""Seconds that one sample lasts at least; a shorter case is repeated within its sample."""


def interleaved(cases: Mapping[str, Callable[[], object]], runs: int) -> dict[str, float]:
    """Median seconds of each case over `runs` rounds, in each of which every case has its turn.

    Slow spells of the machine thus fall on all cases alike. Each case runs once before the clock starts.
    """
    repeats: dict[str, int] = {}
    for name, case in cases.items():
        case()
        start = time.perf_counter()
        case()
        once = time.perf_counter() - start
        repeats[name] = max(1, round(SHORTEST / max(once, 1e-7)))
    samples: dict[str, list[float]] = {name: [] for name in cases}
    for _ in range(runs):
        for name, case in cases.items():
            start = time.perf_counter()
            for _ in range(repeats[name]):
                case()
            samples[name].append((time.perf_counter() - start) / repeats[name])
    return {name: statistics.median(times) for name, times in samples.items()}


def machine_load() -> dict[str, float | bool]:
    """`load`: processes that wanted a core in the last minute, this one included; `loaded`: more than there are."""
    load = os.getloadavg()[0]
    return {"load": round(load, 2), "loaded": load > (os.cpu_count() or 1) + 0.5}


class OneTorchThread:
    """Within this context torch computes on one thread, as the code that it is compared with."""

    def __enter__(self) -> None:
        self._threads = torch.get_num_threads()
        torch.set_num_threads(1)

    def __exit__(self, *_: object) -> None:
        torch.set_num_threads(self._threads)

"""Times that can be compared: cases take turns in one process, and the median of each is taken."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

SHORTEST = 0.005
"""Seconds that one sample lasts at least; a shorter case is repeated within its sample."""


@dataclass(frozen=True)
class Times:
    """Median seconds by case, and how undisturbed they are.

    Attributes:
        seconds: wall-clock seconds of one call.
        cpu_share: processor time over wall-clock time of all samples: 1 where one thread had a core to itself, less
            where other work of the machine interrupted it.
    """

    seconds: dict[str, float]
    cpu_share: float

    def __getitem__(self, name: str) -> float:
        return self.seconds[name]

    def conditions(self) -> dict[str, float | bool]:
        """For a row: `load` (the machine's load average of the last minute), `cpu_share`, and `loaded` if disturbed."""
        load = os.getloadavg()[0]
        return {"load": round(load, 2), "cpu_share": round(self.cpu_share, 3), "loaded": self.cpu_share < 0.95}


def interleaved(cases: Mapping[str, Callable[[], object]], runs: int) -> Times:
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
    wall, cpu = time.perf_counter(), time.process_time()
    for _ in range(runs):
        for name, case in cases.items():
            start = time.perf_counter()
            for _ in range(repeats[name]):
                case()
            samples[name].append((time.perf_counter() - start) / repeats[name])
    share = (time.process_time() - cpu) / max(time.perf_counter() - wall, 1e-9)
    return Times({name: statistics.median(times) for name, times in samples.items()}, min(share, 1.0))


class OneTorchThread:
    """Within this context torch computes on one thread, as the code that it is compared with."""

    def __enter__(self) -> None:
        self._threads = torch.get_num_threads()
        torch.set_num_threads(1)

    def __exit__(self, *_: object) -> None:
        torch.set_num_threads(self._threads)

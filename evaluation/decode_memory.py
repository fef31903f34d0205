"""Peak memory of a decode, measured in a process of its own.

The kernel keeps the highest resident size of a process (VmHWM) and forgets it on request. So: load everything, decode a
small object once (libraries, pools and tables are then there), forget the peak, then read the object from its file and
decode it. What the peak has grown by is output + object + scratch.
"""

from __future__ import annotations

import gc
import re
import tempfile
from collections.abc import Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from cachegen.codec import Codec
from cachegen.codecs import make_codec
from cachegen.fingerprint import Fingerprint
from cachegen.kv import KVChunk, KVSpec
from cachegen.profile import ModelProfile

PER_THREAD = 8_000_000


@dataclass(frozen=True)
class DecodePeak:
    """Bytes: growth of the peak, of the decoded chunk, and of the object."""

    peak: int
    output: int
    object: int
    threads: int

    @property
    def limit(self) -> float:
        """output + 1.25 x object + 8 MB a thread."""
        return self.output + 1.25 * self.object + PER_THREAD * self.threads

    @property
    def over_limit(self) -> float:
        return self.peak / self.limit


@dataclass(frozen=True)
class _Task:
    """What the new process needs, as plain data and files."""

    spec: KVSpec
    fingerprint: Fingerprint
    codec_id: str
    config: Mapping[str, Any]
    profile: Path | None
    small: Path
    whole: Path
    threads: int


def decode_peak(codec: Codec, chunk: KVChunk, threads: int = 1) -> DecodePeak | None:
    """Encode `chunk`, then decode it in a new process. None where the kernel doesn't say (no /proc)."""
    if not Path("/proc/self/clear_refs").exists():
        return None
    with tempfile.TemporaryDirectory() as folder:
        whole, small = Path(folder, "whole"), Path(folder, "small")
        whole.write_bytes(codec.encode(chunk).data)
        small.write_bytes(codec.encode(chunk.slice(0, min(32, chunk.num_tokens))).data)
        profile = codec.profile.save(Path(folder, "profile")) if codec.profile is not None else None
        inner = codec.codec
        task = _Task(codec.spec, codec.fingerprint, inner.codec_id, inner.get_config(), profile, small, whole, threads)
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
            peak = pool.submit(_growth, task).result()
        return DecodePeak(peak, chunk.nbytes, whole.stat().st_size, threads)


def _growth(task: _Task) -> int:
    profile = ModelProfile.load(task.profile) if task.profile is not None else None
    codec = Codec(task.spec, task.fingerprint, make_codec(task.codec_id, task.config, profile), profile)
    codec.decode(task.small.read_bytes(), threads=task.threads)
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")
    before = _status("VmRSS")
    codec.decode(task.whole.read_bytes(), threads=task.threads)
    return _status("VmHWM") - before


def _status(field: str) -> int:
    """Bytes of a field of this process' status."""
    found = re.search(rf"^{field}:\s+(\d+) kB$", Path("/proc/self/status").read_text(), re.MULTILINE)
    return int(found[1]) * 1024 if found else 0

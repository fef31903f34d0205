"""Peak memory of a decode, measured in a process of its own.

The kernel keeps the highest resident size of a process (VmHWM) and forgets it on request. So: load everything, decode a
small object once (libraries, pools and tables are then there), forget the peak, then read the object from its file and
decode it. What the peak has grown by is output + object + scratch.

    python -m cachegen.evaluation.decode_memory FOLDER THREADS      # what the new process runs
"""

from __future__ import annotations

import gc
import json
import re
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path

from cachegen.codec import Codec
from cachegen.codecs import make_codec
from cachegen.container import ObjectReader
from cachegen.fingerprint import Fingerprint
from cachegen.kv import KVChunk
from cachegen.profile import ModelProfile

PER_THREAD = 8_000_000
SMALL = 32
"""Tokens of the object that is decoded first."""


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


def decode_peak(codec: Codec, chunk: KVChunk, threads: int = 1) -> DecodePeak | None:
    """Encode `chunk`, then decode it in a new process. None where the kernel doesn't say (no /proc)."""
    if not Path("/proc/self/clear_refs").exists():
        return None
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        data = codec.encode(chunk).data
        (folder / "whole").write_bytes(data)
        (folder / "small").write_bytes(codec.encode(chunk.slice(0, min(SMALL, chunk.num_tokens))).data)
        (folder / "fingerprint").write_text(json.dumps(asdict(codec.fingerprint)), encoding="utf-8")
        if codec.profile is not None:
            codec.profile.save(folder / "profile")
        done = subprocess.run(
            [sys.executable, "-m", __name__, name, str(threads)], stdout=subprocess.PIPE, text=True, check=True
        )
        return DecodePeak(int(done.stdout), chunk.nbytes, len(data), threads)


def growth(folder: Path, threads: int) -> int:
    """Bytes by which decoding the folder's object raises this process' peak."""
    profile = ModelProfile.load(folder / "profile") if (folder / "profile").exists() else None
    fields = json.loads((folder / "fingerprint").read_text(encoding="utf-8"))
    fields.update({name: tuple(fields[name]) for name in ("k_dims", "v_dims")})
    small = (folder / "small").read_bytes()
    header = ObjectReader(small).header
    inner = make_codec(header.codecs[0].codec_id, header.codecs[0].config, profile)
    codec = Codec(header.spec, Fingerprint(**fields), inner, profile, threads)
    codec.decode(small)
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    before = _status("VmRSS")
    codec.decode((folder / "whole").read_bytes())
    return _status("VmHWM") - before


def _status(field: str) -> int:
    """Bytes of a field of this process' status."""
    found = re.search(rf"^{field}:\s+(\d+) kB$", Path("/proc/self/status").read_text("ascii", "replace"), re.MULTILINE)
    return int(found[1]) * 1024 if found else 0


if __name__ == "__main__":
    print(growth(Path(sys.argv[1]), int(sys.argv[2])))

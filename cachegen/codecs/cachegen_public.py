"""`cachegen_public`: what CacheGen's public code, and LMCache after it, do; a baseline.

No deltas: each token of a layer is scaled by its largest magnitude over heads and channels and rounded to an odd number
of steps; the number of steps goes by layer. Probability tables are counted on the chunk itself, one for each layer and
channel, and shipped with it, as in their format: [2 * layers, channels, bins + 1] entries of 16 bits. Segments:
docs/format-cachegen.md.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..entropy import rans
from ..entropy.rans import Dequant, MatrixSpec
from ..entropy.tables import ALPHABETS, PROB_SUM, TableBank, frequencies
from ..errors import CapacityError, FormatError, InputError, LevelError, Truncated
from ..kv import DTYPES, KVChunk, KVSpec
from ..quantize import uniform
from .base import ChunkCodec, ChunkInfo, EncodedGroups, Group, GroupSegments, LevelLoss, Targets

if TYPE_CHECKING:
    from ..profile import ModelProfile

LMCACHE = "lmcache"
"""LMCache's bins by layer: K 32 in the first ten layers, V 32 in the first two, else 16; all 32 below ten layers."""
LEVELS: tuple[int | str, ...] = (8, 16, LMCACHE, 32, 64, 128)
MAX_BINS = 256
GROUPS_AT_ONCE = 4
"""Groups that a decoding thread takes at once."""
_HEAD = struct.Struct("<HHI")
_DTYPES = ("bfloat16", "float16", "float32")
_INTEGERS = {2: torch.int16, 4: torch.int32}
"""Element types that can be coded, and integers for their bits."""


def bins_of(preset: int | str, name: str, layer: int, num_layers: int) -> int:
    """Bins of a tensor under a level's preset."""
    if isinstance(preset, int):
        return preset
    fine = num_layers if num_layers < 10 else (10 if name == "k" else 2)
    return 32 if layer < fine else 16


class CacheGenPublic(ChunkCodec):
    """The public code's codec, as a baseline. Immutable.

    Args:
        levels: bins of each level, coarsest first: an even number within 4..256 for every layer, or "lmcache".
    """

    codec_id: ClassVar[str] = "cachegen_public"

    def __init__(self, levels: Sequence[int | str] = LEVELS) -> None:
        for bins in levels:
            whole = isinstance(bins, int) and not isinstance(bins, bool) and 4 <= bins <= MAX_BINS and bins % 2 == 0
            if not whole and bins != LMCACHE:
                raise InputError(
                    f"levels: expected even numbers of bins within 4..{MAX_BINS} or {LMCACHE!r}; got {bins!r}"
                )
        if not 1 <= len(levels) <= 64:
            raise InputError(f"levels: expected 1..64 of them; got {len(levels)}")
        self.levels = tuple(levels)

    def get_config(self) -> dict[str, Any]:
        return {"levels": list(self.levels)}

    @classmethod
    def from_config(cls, config: Mapping[str, Any], profile: ModelProfile | None = None) -> CacheGenPublic:
        unknown = set(config) - {"levels"}
        levels = config.get("levels", LEVELS)
        if unknown or not isinstance(levels, (list, tuple)):
            raise FormatError(f"cachegen_public config: expected a list under 'levels'; got {dict(config)!r}")
        try:
            return cls(levels)
        except InputError as error:
            raise FormatError(f"cachegen_public config: {error.args[0]}") from error

    @property
    def num_levels(self) -> int:
        return len(self.levels)

    @property
    def default_level(self) -> int:
        """LMCache's preset where there is one."""
        return self.levels.index(LMCACHE) if LMCACHE in self.levels else self.num_levels - 1

    def groups(self, spec: KVSpec, head_range: tuple[int, int]) -> list[Group]:
        found = []
        for i, layer in enumerate(spec.layers):
            heads = (min(head_range[0], layer.kv_heads), min(head_range[1], layer.kv_heads))
            if layer.kind in self.kinds and heads[0] < heads[1]:
                found.append(Group((i, i + 1), heads, layer.names))
        return found

    # ------------------------------------------------------------------ encode
    def encode(self, chunk: KVChunk, groups: Sequence[Group], level: int, threads: int) -> EncodedGroups:
        if not 0 <= level < self.num_levels:
            raise LevelError(f"level: codec cachegen_public has 0..{self.num_levels - 1}; got {level}")
        tensors = [_Prepared.of(chunk, group, name, self.levels[level]) for group in groups for name in group.names]
        streams = iter(rans.encode([t.q for t in tensors], [t.spec for t in tensors], threads))
        prepared = iter(tensors)
        segments = [[b"".join(next(prepared).pack(next(streams)) for _ in group.names)] for group in groups]
        return EncodedGroups(segments, [LevelLoss(level)])

    # ------------------------------------------------------------------ decode
    def decode(self, info: ChunkInfo, parts: Sequence[GroupSegments], targets: Targets, threads: int) -> None:
        step = GROUPS_AT_ONCE * max(1, threads)  # every channel's table is built for one use: don't hold them all
        for first in range(0, len(parts), step):
            batch = [(part, name, c) for part in parts[first : first + step] for name, c in self._read(info, part)]
            rans.decode_dequant(
                [coded.stream for _, _, coded in batch],
                [coded.spec for _, _, coded in batch],
                [Dequant(None, coded.scale, None) for _, _, coded in batch],
                [targets[part.group.layers[0], name] for part, name, _ in batch],
                threads,
            )

    def _read(self, info: ChunkInfo, part: GroupSegments) -> list[tuple[str, _Coded]]:
        group, data = part.group, part.segments[-1] if part.segments else memoryview(b"")
        where = f"cachegen_public: group of layer {group.layers[0]}"
        layer = info.spec.layers[group.layers[0]]
        if group.layers[1] != group.layers[0] + 1 or group.names != layer.names or layer.kind not in self.kinds:
            raise FormatError(f"{where}: expected one attention layer with k and v; got {group.layers} {group.names}")
        if info.spec.dtype not in _DTYPES:
            raise FormatError(f"{where}: expected a dtype of {', '.join(_DTYPES)}; got {info.spec.dtype}")
        first, last = group.tokens or (0, info.num_tokens)
        found, at = [], 0
        for name in group.names:
            channels = (group.heads[1] - group.heads[0]) * layer.dim(name)
            coded, at = _read_tensor(where, data, at, last - first, channels, info.spec.dtype)
            found.append((name, coded))
        if at != len(data):
            raise FormatError(f"{where}: {len(data) - at} bytes left over after its tensors")
        return found


@dataclass(frozen=True)
class _Prepared:
    """A tensor ready to be coded: its integers, its tokens' largest magnitudes, its tables."""

    bins: int
    q: Tensor
    largest: Tensor
    cumulative: NDArray[np.uint16]
    spec: MatrixSpec

    @classmethod
    def of(cls, chunk: KVChunk, group: Group, name: str, preset: int | str) -> _Prepared:
        layer = group.layers[0]
        start = min(chunk.heads[0], chunk.spec.layers[layer].kv_heads)
        tensor = chunk.layers[layer].tensors[name][:, group.heads[0] - start : group.heads[1] - start]
        bins = bins_of(preset, name, layer, chunk.spec.num_layers)
        largest = tensor.abs().amax((1, 2))  # in the cache's dtype, as it is sent
        q = _quantise(tensor.to(torch.float32).flatten(1), largest.to(torch.float32), bins)
        cumulative = _count(q, bins, 1 + (preset if isinstance(preset, int) else 32))
        return cls(bins, q, largest, cumulative, _matrix(cumulative, bins, q.shape[0]))

    def pack(self, stream: bytes) -> bytes:
        head = _HEAD.pack(self.bins, self.cumulative.shape[1], len(stream))
        width = self.largest.element_size()
        sent = self.largest.contiguous().view(_INTEGERS[width]).numpy().astype(f"<i{width}")
        return b"".join((head, sent.tobytes(), self.cumulative.astype("<u2").tobytes(), stream))


@dataclass(frozen=True)
class _Coded:
    """A tensor of a segment: its matrix, fp32 [tokens] scales, and stream."""

    spec: MatrixSpec
    scale: Tensor
    stream: memoryview


def _read_tensor(where: str, data: memoryview, at: int, tokens: int, channels: int, dtype: str) -> tuple[_Coded, int]:
    """The tensor that starts at byte `at`, and where the next one does."""
    if at + _HEAD.size > len(data):
        raise Truncated(f"{where}: expected a tensor's head at {at}; the segment has {len(data)} bytes")
    bins, entries, length = _HEAD.unpack_from(data, at)
    if not 4 <= bins <= MAX_BINS or bins % 2 or not bins <= entries - 1 <= MAX_BINS:
        raise FormatError(
            f"{where}: expected an even number of bins within 4..{MAX_BINS}; got {bins}, {entries} entries"
        )
    width = DTYPES[dtype].itemsize
    scales = at + _HEAD.size
    tables = scales + width * tokens
    stream = tables + 2 * entries * channels
    if stream + length > len(data):
        raise Truncated(f"{where}: expected {stream + length} bytes; got {len(data)}")
    bits = torch.from_numpy(np.frombuffer(data[scales:tables], f"<i{width}").astype(f"i{width}"))
    largest = bits.view(DTYPES[dtype]).to(torch.float32)
    if not bool(torch.isfinite(largest).all()) or bool((largest < 0).any()):
        raise FormatError(f"{where}: expected finite magnitudes of tokens")
    cumulative = np.frombuffer(data[tables:stream], "<u2").astype(np.uint16).reshape(channels, entries)
    spec = _matrix(cumulative, bins, tokens)
    return _Coded(spec, largest / (bins // 2 - 1), data[stream : stream + length]), stream + length


# --------------------------------------------------------------------------- quantiser and tables
def _quantise(x: Tensor, largest: Tensor, bins: int) -> Tensor:
    """int32 [tokens, channels] within -C..C: round(x * C / max of the token), C = bins / 2 - 1."""
    steps = bins // 2 - 1
    step = (largest / steps)[:, None]
    q = uniform(x, torch.where(step > 0, step, torch.ones_like(step)))
    if int(q.abs().max()) > steps:
        raise CapacityError("cachegen_public: a token's magnitudes are too small to be scaled by the largest of them")
    return q


def _count(q: Tensor, bins: int, entries: int) -> NDArray[np.uint16]:
    """Cumulative frequencies, sum 4096, of each channel's symbols on this chunk: uint16 [channels, entries]."""
    symbols = bins - 1
    slot = q.to(torch.int64) + (bins // 2 - 1) + torch.arange(q.shape[1]) * symbols
    counts = torch.bincount(slot.flatten(), minlength=q.shape[1] * symbols).view(q.shape[1], symbols).numpy()
    freqs = counts * PROB_SUM // q.shape[0]
    freqs = np.maximum(freqs, counts > 0)
    rows, top = np.arange(len(freqs)), counts.argmax(1)
    freqs[rows, top] += PROB_SUM - freqs.sum(1)
    for row in np.flatnonzero(freqs[rows, top] < 1):  # many rare symbols and no frequent one
        freqs[row] = frequencies(counts[row], floor=0)
    alone = freqs[rows, top] == PROB_SUM  # a table has at least two symbols
    freqs[rows[alone], top[alone]] -= 1
    freqs[rows[alone], (top[alone] + 1) % symbols] += 1
    cumulative = np.full((len(freqs), entries), PROB_SUM, np.uint16)
    cumulative[:, 0] = 0
    cumulative[:, 1 : symbols + 1] = freqs.cumsum(1)
    return cumulative


def _matrix(cumulative: NDArray[np.uint16], bins: int, tokens: int) -> MatrixSpec:
    """A matrix whose component c has table c. Raises TableError if the entries aren't cumulative frequencies."""
    channels = cumulative.shape[0]
    freqs = np.diff(cumulative[:, :bins].astype(np.int64), axis=1)
    alphabet = next(size for size in ALPHABETS if size >= bins - 1)
    padded = np.zeros((channels, alphabet), np.int64)
    padded[:, : bins - 1] = np.where((freqs < 0) | (freqs >= PROB_SUM), PROB_SUM, freqs)  # the bank refuses these
    steps = bins // 2 - 1
    points = np.broadcast_to(np.arange(alphabet, dtype=np.float32) - steps, padded.shape)
    bank = TableBank(padded.astype(np.uint16), steps, np.zeros(channels, np.uint8), False, points.astype(np.float32))
    return MatrixSpec(tokens, channels, bank, np.arange(channels, dtype=np.uint16))

"""`channel`: lossy without calibration. Keys before RoPE; each channel's mean and deviation are measured on the chunk.

Every channel of a tensor is quantised by one step, relative to the tensor's typical deviation; a channel's deviation
chooses among the built-in tables. (Steps in proportion to each channel's own deviation cost .3 bit an element at equal
KL on SmolLM2.) Values are coded a little finer than keys, and tokens by importance (`transforms.channel`). The bytes:
docs/format-channel.md.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from ..errors import CapacityError, FormatError, LevelError
from ..kv import KVChunk, KVSpec, LayerKind
from ..rope import unrotate
from .base import ChunkCodec, ChunkInfo, EncodedGroups, Group, GroupSegments, LevelLoss, Targets
from .channel_bands import Band, band_edges, decode_bands, encode_band, read_segment

if TYPE_CHECKING:
    from ..profile import ModelProfile

STEPS = tuple(0.65 * 2.0 ** ((3 - level) / 2) for level in range(12))
"""Key step by level, in typical deviations."""
VALUE_STEP = 1.0
"""Value step / key step, each in its tensor's own typical deviations."""
BATCH = 1 << 18
"""Elements that a decoder takes at once: what it keeps beside its output."""


class Channel(ChunkCodec):
    """The codec for models that nobody calibrated. An object per level; 12 levels, half an octave of step apart."""

    codec_id = "channel"
    kinds: ClassVar[frozenset[LayerKind]] = frozenset({LayerKind.ATTENTION, LayerKind.SLIDING})
    unrotates = True

    def get_config(self) -> dict[str, Any]:
        return {}

    @classmethod
    def from_config(cls, config: Mapping[str, Any], profile: ModelProfile | None = None) -> Channel:
        if config:
            raise FormatError(f"channel: expected no options; got {', '.join(sorted(map(str, config)))}")
        return cls()

    @property
    def num_levels(self) -> int:
        return len(STEPS)

    @property
    def default_level(self) -> int:
        return 3

    def groups(self, spec: KVSpec, head_range: tuple[int, int]) -> list[Group]:
        """One group a layer: keys and values, all the heads that the chunk holds."""
        groups = []
        for i, layer in enumerate(spec.layers):
            heads = (min(head_range[0], layer.kv_heads), min(head_range[1], layer.kv_heads))
            if layer.kind in self.kinds and heads[0] < heads[1]:
                groups.append(Group((i, i + 1), heads, layer.names))
        return groups

    def encode(self, chunk: KVChunk, groups: Sequence[Group], level: int, threads: int) -> EncodedGroups:
        if not 0 <= level < len(STEPS):
            raise LevelError(f"channel: has levels 0..{len(STEPS) - 1}; got {level}")

        def write(group: Group) -> bytes:
            return b"".join(self._write_layer(chunk, group, layer, level) for layer in range(*group.layers))

        if threads > 1 and len(groups) > 1:
            with ThreadPoolExecutor(threads) as pool:
                segments = list(pool.map(write, groups))
        else:
            segments = [write(group) for group in groups]
        return EncodedGroups([[segment] for segment in segments], [LevelLoss(level)])

    def decode(self, info: ChunkInfo, parts: Sequence[GroupSegments], targets: Targets, threads: int) -> None:
        batches = _batches(info, parts, targets)
        if threads <= 1:
            for batch in batches:
                decode_bands(batch)
            return
        with ThreadPoolExecutor(threads) as pool:
            running: deque[Future[None]] = deque()
            for batch in batches:
                if len(running) > threads:
                    running.popleft().result()
                running.append(pool.submit(decode_bands, batch))
            while running:
                running.popleft().result()

    @staticmethod
    def _write_layer(chunk: KVChunk, group: Group, layer: int, level: int) -> bytes:
        heads = slice(group.heads[0] - chunk.heads[0], group.heads[1] - chunk.heads[0])
        first, last = chunk.layer_tokens(layer)
        tensors = chunk.layers[layer].tensors
        out = []
        channels = (heads.stop - heads.start) * tensors["k"].shape[2]
        for start, stop in band_edges(last - first, channels):
            positions = chunk.positions[first + start : first + stop]
            keys = unrotate(tensors["k"][start:stop, heads].float(), positions, chunk.spec.layers[layer].rope)
            values = tensors["v"][start:stop, heads].float()
            # A sum is finite only if all its numbers are, and cheap; finite numbers may overflow it.
            if not math.isfinite(float(keys.sum())) and not torch.isfinite(keys).all():
                raise CapacityError(f"channel: layer {layer} has keys too large to turn back by RoPE")
            starts_context = int(positions[0]) == 0
            steps = (STEPS[level], STEPS[level] * VALUE_STEP)
            out.append(encode_band(keys, values, steps, chunk.spec.torch_dtype, starts_context))
        return b"".join(out)


def _batches(info: ChunkInfo, parts: Sequence[GroupSegments], targets: Targets) -> Iterator[list[Band]]:
    """Bands to decode together, read as they are asked for: those to come take no memory yet."""
    batch: list[Band] = []
    room = BATCH
    for part in parts:
        if part.group.names != ("k", "v") or len(part.segments) != 1:
            raise FormatError(f"channel: expected groups of k and v, one segment each; got {part.group.names}")
        for band in read_segment(info, part, targets):
            if batch and band.elements > room:
                yield batch
                batch, room = [], BATCH
            batch.append(band)
            room -= band.elements
    if batch:
        yield batch

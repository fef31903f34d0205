"""`lossless`: every bit of every tensor. Exponents are entropy coded, sign and mantissa lie beside them as they are.

Takes all layer kinds and dtypes, NaN and Inf included, and fp8 scales. Keys are coded as given, after RoPE. With
`coder="zstd"` byte planes are compressed by zstandard instead. Whatever doesn't shrink is stored as it is. The bytes:
docs/format-lossless.md.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from ..errors import CorruptStream, DtypeError, FormatError, InputError, LevelError, LimitExceeded
from ..kv import DTYPE_NAMES, KVChunk, KVSpec, LayerKind
from ..native import lossless as native
from .base import ChunkCodec, ChunkInfo, EncodedGroups, Group, GroupSegments, LevelLoss, Targets
from .exponents import FLOAT_TYPES, FloatType
from .float_records import ZSTD, Cursor, Work, decode, fold, read_record, write_record

if TYPE_CHECKING:
    from ..profile import ModelProfile

MAX_ARRAY = 1 << 30
"""Bytes of a state tensor, at most."""
_DTYPES = {code: dtype for dtype, code in native.TYPES.items()}


class Lossless(ChunkCodec):
    """The exact codec.

    Args:
        coder: "rans" (exponents by measured tables), or "zstd" (byte planes by zstandard).
        level: zstandard's level, 1..22.
    Raises:
        InputError: no such coder or level.
    """

    codec_id = "lossless"
    kinds: ClassVar[frozenset[LayerKind]] = frozenset(LayerKind)
    exact = True

    def __init__(self, coder: str = "rans", level: int = 3) -> None:
        if coder not in ("rans", "zstd"):
            raise InputError(f"lossless: coder must be 'rans' or 'zstd'; got {coder!r}")
        if isinstance(level, bool) or not isinstance(level, int) or not 1 <= level <= 22:
            raise InputError(f"lossless: zstd level must be within 1..22; got {level!r}")
        self.coder = coder
        self.level = level

    def get_config(self) -> dict[str, Any]:
        return {"coder": "zstd", "level": self.level} if self.coder == "zstd" else {}

    @classmethod
    def from_config(cls, config: Mapping[str, Any], profile: ModelProfile | None = None) -> Lossless:
        unknown = set(config) - {"coder", "level"}
        if unknown:
            raise FormatError(f"lossless: expected the options coder and level; got {', '.join(sorted(unknown))}")
        try:
            return cls(**config)
        except InputError as error:
            raise FormatError(f"lossless: a bad config: {error.args[0]}") from error

    @property
    def num_levels(self) -> int:
        return 1

    def groups(self, spec: KVSpec, head_range: tuple[int, int]) -> list[Group]:
        """One group a layer: all its tensors, and all the heads that the chunk holds."""
        groups = []
        for i, layer in enumerate(spec.layers):
            heads = (0, max(1, layer.kv_heads))
            if layer.kind in (LayerKind.ATTENTION, LayerKind.SLIDING):
                heads = (min(head_range[0], layer.kv_heads), min(head_range[1], layer.kv_heads))
            groups.append(Group((i, i + 1), heads, layer.names))
        return groups

    def encode(self, chunk: KVChunk, groups: Sequence[Group], level: int, threads: int) -> EncodedGroups:
        if level != 0:
            raise LevelError(f"lossless: has level 0 only; got {level}")
        pool = ThreadPoolExecutor(max(1, threads)) if threads > 1 and len(groups) > 1 else None
        write = partial(self._write_group, chunk)
        try:
            segments = list((pool.map if pool else map)(write, groups))
        finally:
            if pool:
                pool.shutdown()
        return EncodedGroups([[segment] for segment in segments], [LevelLoss(0, 0.0)])

    def decode(self, info: ChunkInfo, parts: Sequence[GroupSegments], targets: Targets, threads: int) -> None:
        decode([work for part in parts for work in _read_group(info, part, targets)], threads)

    # ------------------------------------------------------------------ writing
    def _write(self, tensors: Sequence[Tensor]) -> bytes:
        return write_record(tensors, self.level if self.coder == "zstd" else None)

    def _write_group(self, chunk: KVChunk, group: Group) -> bytes:
        out: list[bytes] = []
        for i in range(*group.layers):
            layer = chunk.layers[i]
            if group.names:
                first = group.heads[0] - (chunk.heads[0] if layer.kind is not LayerKind.MLA else 0)
                heads = slice(first, first + group.heads[1] - group.heads[0])
                out.append(self._write([layer.tensors[name][:, heads] for name in group.names]))
                scaled = [name for name in group.names if name in layer.scales]
                out.append(bytes([len(scaled)]))
                for name in scaled:
                    scale = layer.scales[name]
                    if scale.dim() >= 2 and scale.shape[-2] == layer.tensors[name].shape[1]:
                        scale = scale[..., heads, :]
                    out += [bytes([group.names.index(name)]), self._array(f"layer {i} {name}.scale", scale)]
            else:
                out.append(struct.pack("<H", len(layer.tensors)))
                for name in sorted(layer.tensors):
                    text = name.encode()
                    if not 1 <= len(text) <= 255:
                        raise InputError(f"layer {i}: a state's name must have 1..255 bytes; got {name!r}")
                    out += [bytes([len(text)]), text, self._array(f"layer {i} {name}", layer.tensors[name])]
        return b"".join(out)

    def _array(self, where: str, tensor: Tensor) -> bytes:
        """A tensor that states its own dtype and shape."""
        if tensor.dtype not in native.TYPES:
            raise DtypeError(f"{where}: expected one of {', '.join(DTYPE_NAMES.values())}; got {tensor.dtype}")
        if tensor.dim() > 8 or tensor.numel() * tensor.element_size() > MAX_ARRAY:
            raise InputError(f"{where}: at most 8 dimensions and {MAX_ARRAY} bytes; got {list(tensor.shape)}")
        shape = tuple(tensor.shape)
        head = struct.pack(f"<BB{len(shape)}I", native.TYPES[tensor.dtype], len(shape), *shape)
        return head + self._write([fold(tensor.cpu().contiguous())])


# ---------------------------------------------------------------------- reading
def _read_group(info: ChunkInfo, part: GroupSegments, targets: Targets) -> Iterator[Work]:
    """The records of a segment; states and scales are given memory and put into `targets`."""
    group = part.group
    if len(part.segments) != 1:
        raise FormatError(f"lossless: expected one segment a group; got {len(part.segments)}")
    cursor = Cursor(part.segments[0])
    for i in range(*group.layers):
        if group.names:
            tensors = [targets[i, name] for name in group.names]
            yield from read_record(cursor, tensors)
            (scaled,) = cursor.unpack("B")
            if scaled > len(group.names):
                raise CorruptStream(f"lossless: layer {i} has {len(group.names)} tensors; got {scaled} scales")
            for _ in range(scaled):
                (index,) = cursor.unpack("B")
                if index >= len(group.names):
                    raise CorruptStream(f"lossless: a scale of tensor {index}; layer {i} has {len(group.names)}")
                name = group.names[index]
                scale, record = _read_array(cursor, max(1, targets[i, name].numel()))
                yield from record
                targets[i, name + ".scale"] = scale
        else:
            (states,) = cursor.unpack("H")
            for _ in range(states):
                (length,) = cursor.unpack("B")
                try:
                    name = bytes(cursor.take(length)).decode()
                except UnicodeDecodeError as error:
                    raise CorruptStream(f"lossless: a state's name in layer {i} isn't UTF-8") from error
                if not name or (i, name) in targets:
                    raise CorruptStream(f"lossless: layer {i} holds state {name!r} twice, or one without a name")
                tensor, record = _read_array(cursor, MAX_ARRAY)
                yield from record
                targets[i, name] = tensor
    cursor.end()


def _read_array(cursor: Cursor, limit: int) -> tuple[Tensor, Sequence[Work]]:
    """A tensor that states its dtype and shape; at most `limit` elements are given memory."""
    code, dims = cursor.unpack("BB")
    if code not in _DTYPES or dims > 8:
        raise CorruptStream(
            f"lossless: expected an element type below {len(_DTYPES)}, 8 dimensions; got {code}, {dims}"
        )
    shape = cursor.unpack(f"{dims}I")
    elements = 1
    for n in shape:
        elements *= n
    size = FLOAT_TYPES[code].size
    if elements > limit or elements * size > MAX_ARRAY:
        raise LimitExceeded(f"lossless: a tensor {list(shape)} is larger than the {min(limit, MAX_ARRAY)} allowed here")
    _check_claim(cursor, elements, FLOAT_TYPES[code])
    tensor = torch.empty(shape, dtype=_DTYPES[code])
    return tensor, read_record(cursor, [fold(tensor)])


def _check_claim(cursor: Cursor, elements: int, kind: FloatType) -> None:
    """Refuse a tensor that the bytes left can't hold, before it is given memory."""
    left = len(cursor.data) - cursor.at
    if left and cursor.data[cursor.at] != ZSTD and elements * kind.planes[0] > 8 * left:
        raise CorruptStream(f"lossless: {elements} elements can't be in the {left} bytes left of the segment")

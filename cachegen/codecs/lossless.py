"""`lossless`: every bit of every tensor. Exponents are entropy coded, sign and mantissa lie beside them as they are.

Takes all layer kinds and dtypes, NaN and Inf included, and fp8 scales. Keys are coded as given, after RoPE. With
`coder="zstd"` byte planes are compressed by zstandard instead. Whatever doesn't shrink is stored as it is. The bytes:
docs/format-lossless.md.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from ..errors import CorruptStream, DtypeError, FormatError, InputError, LevelError, LimitExceeded
from ..kv import DTYPE_NAMES, KVChunk, KVSpec, LayerKind
from ..native import lossless as native
from .base import ChunkCodec, ChunkInfo, EncodedGroups, Group, GroupSegments, LevelLoss, Targets
from .exponents import FLOAT_TYPES, FloatType
from .float_records import RANS, RAW, ZSTD, Cursor, Work, decode, fold, read_record, write_record

if TYPE_CHECKING:
    from ..profile import ModelProfile

MAX_ARRAY = 1 << 30
"""Bytes of a state tensor, at most."""
ARRAY_RATIO = 256
"""Bytes of an array that each byte of its record may stand for without drawing on `ARRAY_EXCESS`."""
ARRAY_EXCESS = 1 << 26
"""Bytes of all arrays of an object, at most, beyond 256 times their records: what forged bytes can claim."""
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
            written = list((pool.map if pool else map)(write, groups))
        finally:
            if pool:
                pool.shutdown()
        if sum(excess for _, excess in written) > ARRAY_EXCESS:  # of zeros, say; no reader would take them by zstd
            return Lossless().encode(chunk, groups, level, threads)
        return EncodedGroups([[segment] for segment, _ in written], [LevelLoss(0, 0.0)])

    def decode(self, info: ChunkInfo, parts: Sequence[GroupSegments], targets: Targets, threads: int) -> None:
        budget = _Budget()
        decode([work for part in parts for work in _read_group(info, part, targets, budget)], threads)

    # ------------------------------------------------------------------ writing
    def _write(self, tensors: Sequence[Tensor]) -> bytes:
        return write_record(tensors, self.level if self.coder == "zstd" else None)

    def _write_group(self, chunk: KVChunk, group: Group) -> tuple[bytes, int]:
        """A segment, and its arrays' excess."""
        out: list[bytes] = []
        excess = 0
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
                    array = self._array(f"layer {i} {name}.scale", scale)
                    out += [bytes([group.names.index(name)]), array]
                    excess += _excess(scale.numel() * scale.element_size(), len(array))
            else:
                out.append(struct.pack("<H", len(layer.tensors)))
                for name in sorted(layer.tensors):
                    text = name.encode()
                    if not 1 <= len(text) <= 255:
                        raise InputError(f"layer {i}: a state's name must have 1..255 bytes; got {name!r}")
                    tensor = layer.tensors[name]
                    array = self._array(f"layer {i} {name}", tensor)
                    out += [bytes([len(text)]), text, array]
                    excess += _excess(tensor.numel() * tensor.element_size(), len(array))
        return b"".join(out), excess

    def _array(self, where: str, tensor: Tensor) -> bytes:
        """A tensor that states its own dtype and shape."""
        if tensor.dtype not in native.TYPES:
            raise DtypeError(f"{where}: expected one of {', '.join(DTYPE_NAMES.values())}; got {tensor.dtype}")
        if tensor.dim() > 8 or tensor.numel() * tensor.element_size() > MAX_ARRAY:
            raise InputError(f"{where}: at most 8 dimensions and {MAX_ARRAY} bytes; got {list(tensor.shape)}")
        shape = tuple(tensor.shape)
        head = struct.pack(f"<BB{len(shape)}I", native.TYPES[tensor.dtype], len(shape), *shape)
        return head + self._write([fold(tensor.cpu().contiguous())])


def _excess(size: int, array: int) -> int:
    """Bytes of a tensor beyond what its array accounts for."""
    return max(0, size - ARRAY_RATIO * array)


# ---------------------------------------------------------------------- reading
@dataclass
class _Budget:
    """Bytes that the arrays of one decode may still have beyond 256 times their own."""

    left: int = ARRAY_EXCESS

    def claim(self, cursor: Cursor, start: int, elements: int, kind: FloatType) -> None:
        """Refuse an array, begun at `start`, that its record can't hold, before it is given memory."""
        record, left = cursor.data[cursor.at :], len(cursor.data) - cursor.at
        if left == 0 or elements == 0:
            return  # nothing is given memory, or the record is missing and the next read says so
        mode, stated = record[0], left
        if mode != RAW and left >= 5:
            stated = min(left, 5 + int.from_bytes(record[1:5], "little"))
        if mode == ZSTD:
            excess = _excess(elements * kind.size, cursor.at - start + stated)
            if excess > self.left:
                raise LimitExceeded(
                    f"lossless: zstd arrays may have {ARRAY_EXCESS} bytes beyond {ARRAY_RATIO} times their own; one of "
                    f"{stated} bytes states {elements * kind.size}, where {self.left} are left; "
                    "fetch the object again, or encode it by rANS"
                )
            self.left -= excess
        elif elements * (kind.planes[0] if mode == RANS else 8 * kind.size) > 8 * stated:
            raise CorruptStream(f"lossless: {elements} elements can't be in a record of {stated} bytes")


def _read_group(info: ChunkInfo, part: GroupSegments, targets: Targets, budget: _Budget) -> Iterator[Work]:
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
                scale, record = _read_array(cursor, max(1, targets[i, name].numel()), budget)
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
                tensor, record = _read_array(cursor, MAX_ARRAY, budget)
                yield from record
                targets[i, name] = tensor
    cursor.end()


def _read_array(cursor: Cursor, limit: int, budget: _Budget) -> tuple[Tensor, Sequence[Work]]:
    """A tensor that states its dtype and shape; at most `limit` elements are given memory."""
    start = cursor.at
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
    budget.claim(cursor, start, elements, FLOAT_TYPES[code])
    tensor = torch.empty(shape, dtype=_DTYPES[code])
    return tensor, read_record(cursor, [fold(tensor)])

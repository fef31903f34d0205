"""Selections: the part of an object that a reader wants, and where its tensors land."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import torch
from torch import Tensor

from .codecs.base import ChunkInfo, Group, Targets
from .container import ObjectHeader
from .errors import FormatError, RangeError, ShapeError
from .kv import KVChunk, KVSpec, LayerKind
from .rope import check_move


@dataclass(frozen=True)
class Selection:
    """The part of an object that a caller wants: its spec, and half-open ranges in the object's terms."""

    spec: KVSpec
    layers: tuple[int, int]
    heads: tuple[int, int]
    tokens: tuple[int, int]

    @classmethod
    def of(
        cls,
        header: ObjectHeader,
        layers: tuple[int, int] | None,
        heads: tuple[int, int] | None,
        tokens: tuple[int, int] | None,
    ) -> Selection:
        layers = _within("layers", layers, (0, header.spec.num_layers))
        heads = _within("heads", heads, header.head_range)
        tokens = _within("tokens", tokens, (0, header.num_tokens))
        return cls(replace(header.spec, layers=header.spec.layers[slice(*layers)]), layers, heads, tokens)

    def layer_heads(self, layer: int) -> tuple[int, int]:
        """The heads wanted of a layer, in the object's layer numbers."""
        spec = self.spec.layers[layer - self.layers[0]]
        if spec.kind in (LayerKind.MLA, LayerKind.STATE):
            return (0, max(1, spec.kv_heads))
        return (min(self.heads[0], spec.kv_heads), min(self.heads[1], spec.kv_heads))

    def touches(self, group: Group) -> bool:
        layers = range(max(group.layers[0], self.layers[0]), min(group.layers[1], self.layers[1]))
        return any(_overlap(group.heads, self.layer_heads(layer)) for layer in layers)

    def check_coverage(self, header: ObjectHeader) -> None:
        """Raise FormatError unless the object's groups hold every tensor of the selection."""
        held: dict[tuple[int, str], int] = {}
        for group in header.groups:
            for layer in range(max(group.layers[0], self.layers[0]), min(group.layers[1], self.layers[1])):
                want = self.layer_heads(layer)
                for name in group.names or ("",):
                    width = max(0, min(group.heads[1], want[1]) - max(group.heads[0], want[0]))
                    held[layer, name] = held.get((layer, name), 0) + width
        for layer in range(*self.layers):
            first, last = self.layer_heads(layer)
            for name in header.spec.layers[layer].names or ("",):
                if held.get((layer, name), 0) != last - first:
                    raise FormatError(f"the object's groups don't hold all heads of layer {layer} {name or 'state'}")

    def direct_targets(self, group: Group, out: KVChunk, info: ChunkInfo) -> Targets | None:
        """`out`'s own tensors for a group, if the group fits them exactly; else None (decode aside, then copy)."""
        if self.tokens != (0, info.num_tokens) or out.spec.dtype != info.spec.dtype:
            return None
        if group.layers[0] < self.layers[0] or group.layers[1] > self.layers[1] or not group.names:
            return None
        views: Targets = {}
        for layer in range(*group.layers):
            first, last = self.layer_heads(layer)
            if group.heads[0] < first or group.heads[1] > last:
                return None
            for name in group.names:
                tensor = out.layers[layer - self.layers[0]].tensors[name]
                if tensor.device.type != "cpu":
                    return None
                views[layer, name] = tensor[:, group.heads[0] - first : group.heads[1] - first]
        return views

    def copy(self, group: Group, scratch: Targets, out: KVChunk, info: ChunkInfo) -> None:
        """Copy the wanted part of a decoded group into `out`."""
        held = group.tokens or (0, info.num_tokens)
        start, stop = max(held[0], self.tokens[0]), min(held[1], self.tokens[1])
        for (layer, name), tensor in scratch.items():
            if not self.layers[0] <= layer < self.layers[1]:
                continue
            target = out.layers[layer - self.layers[0]]
            if name.endswith(".scale"):
                target.scales[name.removesuffix(".scale")] = _scale_rows(tensor, held, (start, stop))
                continue
            if not group.names:
                target.tensors[name] = tensor
                continue
            first, last = self.layer_heads(layer)
            a, b = max(group.heads[0], first), min(group.heads[1], last)
            rows = tensor[start - held[0] : max(start, stop) - held[0], a - group.heads[0] : b - group.heads[0]]
            target.tensors[name][:, a - first : b - first].copy_(rows)


def position_runs(positions: Tensor) -> tuple[tuple[int, int], ...]:
    """Runs (start, count) of consecutive positions."""
    breaks = (positions[1:] - positions[:-1] != 1).nonzero().flatten() + 1
    edges = [0, *breaks.tolist(), positions.shape[0]]
    return tuple((int(positions[a]), b - a) for a, b in pairwise(edges))


def expand_runs(runs: Sequence[tuple[int, int]]) -> Tensor:
    """Inverse of `position_runs`: int64 [tokens]."""
    return torch.cat([torch.arange(start, start + count) for start, count in runs])


def scratch_for(group: Group, info: ChunkInfo) -> Targets:
    """Memory of a group's own shape: [tokens, heads, dim] per (layer, name)."""
    start, stop = group.tokens or (0, info.num_tokens)
    return {
        (layer, name): torch.empty(
            stop - start,
            group.heads[1] - group.heads[0],
            info.spec.layers[layer].dim(name),
            dtype=info.spec.torch_dtype,
        )
        for layer in range(*group.layers)
        for name in group.names
    }


def _scale_rows(scale: Tensor, held: tuple[int, int], wanted: tuple[int, int]) -> Tensor:
    per_token = scale.dim() == 3 and scale.shape[0] == held[1] - held[0] and scale.shape[0] > 1
    return scale[wanted[0] - held[0] : wanted[1] - held[0]] if per_token else scale


def cut_windows(out: KVChunk, header: ObjectHeader, select: Selection) -> None:
    """Cut a fresh chunk's layers to the tokens that a sliding window left in the object."""
    for group in header.groups:
        if group.tokens is None:
            continue
        start = min(max(group.tokens[0], select.tokens[0]), select.tokens[1]) - select.tokens[0]
        stop = max(min(group.tokens[1], select.tokens[1]) - select.tokens[0], start)
        for layer in range(max(group.layers[0], select.layers[0]), min(group.layers[1], select.layers[1])):
            held = out.layers[layer - select.layers[0]]
            if held.tokens is None:
                held.tokens = (start, stop)
                held.tensors = {name: tensor[start:stop] for name, tensor in held.tensors.items()}


def check_out(out: KVChunk, select: Selection, header: ObjectHeader) -> None:
    select.spec.check(out.spec.with_dtype(select.spec.dtype))
    if out.heads != select.heads:
        raise ShapeError(f"out: expected heads {select.heads}; got {out.heads}")
    if out.num_tokens != select.tokens[1] - select.tokens[0]:
        raise ShapeError(f"out: expected {select.tokens[1] - select.tokens[0]} tokens; got {out.num_tokens}")
    for group in header.groups:
        held = group.tokens or (0, header.num_tokens)
        start = min(max(held[0], select.tokens[0]), select.tokens[1]) - select.tokens[0]
        stop = max(min(held[1], select.tokens[1]) - select.tokens[0], start)
        for layer in range(max(group.layers[0], select.layers[0]), min(group.layers[1], select.layers[1])):
            if group.names and out.layer_tokens(layer - select.layers[0]) != (start, stop):
                raise ShapeError(
                    f"out: layer {layer} holds tokens {start}..{stop} in the object; "
                    f"got {out.layer_tokens(layer - select.layers[0])}"
                )


def positions_for(asked: Tensor | Sequence[int] | int | None, stored: Tensor) -> Tensor:
    if asked is None:
        return stored
    if isinstance(asked, int):
        asked = torch.arange(asked, asked + stored.shape[0])
    positions = torch.as_tensor(asked, dtype=torch.int64)
    if positions.shape != stored.shape:
        raise ShapeError(f"positions: expected [{stored.shape[0]}], one per token; got {list(positions.shape)}")
    if int(positions.min()) < 0:
        raise RangeError(f"positions: expected >= 0; got {int(positions.min())}")
    return positions


def check_moves(spec: KVSpec, stored: Tensor, asked: Tensor) -> None:
    if torch.equal(stored, asked):
        return
    for rope in {layer.rope for layer in spec.layers if layer.rope is not None}:
        check_move(rope, stored, asked)


def _within(what: str, asked: tuple[int, int] | None, held: tuple[int, int]) -> tuple[int, int]:
    if asked is None:
        return held
    if not held[0] <= asked[0] < asked[1] <= held[1]:
        raise RangeError(f"{what}: the object holds {held[0]}..{held[1]}; got {asked[0]}..{asked[1]}")
    return asked


def _overlap(a: tuple[int, int], b: tuple[int, int]) -> bool:
    return max(a[0], b[0]) < min(a[1], b[1])

"""Routing: which codec carries which group of a chunk.

The chosen codec takes what it can. What it can't (a layer kind it doesn't know, non-finite values, fp8 tensors, values
beyond its integers) goes to `lossless`, layer by layer: nothing is dropped, and each case is named in `fallbacks`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from .codecs.base import ChunkCodec, Group, LevelLoss
from .errors import CapacityError
from .kv import FP8, KVChunk, LayerKind


@dataclass(frozen=True)
class Routed:
    """A chunk's groups with their segments (`segments[group][level]`); `Group.codec` indexes `codecs`."""

    codecs: tuple[ChunkCodec, ...]
    groups: list[Group]
    segments: list[list[bytes]]
    losses: list[LevelLoss]
    fallbacks: list[str]


def route(codec: ChunkCodec, lossless: ChunkCodec, chunk: KVChunk, level: int, threads: int) -> Routed:
    """Encode every tensor of a validated chunk, by `codec` where it can, else by `lossless`.

    Raises CapacityError if even `lossless` can't hold a value.
    """
    coders = (codec,) if codec.codec_id == lossless.codec_id else (codec, lossless)
    groups, fallbacks = _plan(coders, chunk)
    while True:
        segments: list[list[bytes]] = [[] for _ in groups]
        losses: list[LevelLoss] = []
        notes: list[str] = []
        try:
            for index, coder in enumerate(coders):
                mine = [i for i, group in enumerate(groups) if group.codec == index and not is_empty(group)]
                if not mine:
                    continue
                coded = coder.encode(chunk, [groups[i] for i in mine], level if index == 0 else 0, threads)
                for i, parts in zip(mine, coded.segments, strict=True):
                    segments[i] = parts
                if index == 0:
                    losses = coded.losses
                notes += coded.notes
        except CapacityError as error:
            carried = _hand_over(coders, groups, chunk, level, threads, error)
            fallbacks += [f"{_name(group)}: {error.args[0]}" for group in groups if group not in carried]
            groups = carried
            continue
        used = max(group.codec for group in groups) + 1
        return Routed(coders[:used], groups, segments, losses, fallbacks + notes)


def is_empty(group: Group) -> bool:
    """Whether a sliding window left none of the chunk's tokens in the group."""
    return group.tokens is not None and group.tokens[0] == group.tokens[1]


def _plan(coders: Sequence[ChunkCodec], chunk: KVChunk) -> tuple[list[Group], list[str]]:
    """Groups that cover the chunk, each with the codec that carries it, and the fallbacks taken."""
    codec, last = coders[0], len(coders) - 1
    groups: list[Group] = []
    fallbacks: list[str] = []
    covered: set[int] = set()
    for group in codec.groups(chunk.spec, chunk.heads):
        for part in _split_by_tokens(group, chunk):
            covered.update(range(*part.layers))
            reason = None if codec.exact else _why_lossless(part, chunk)
            if reason is None:
                groups.append(part)
            else:
                fallbacks.append(f"{_name(part)}: {reason}")
                groups += _single_layers(part, last)
    for i, layer in enumerate(chunk.spec.layers):
        if i not in covered:
            heads = (0, max(1, layer.kv_heads))
            if layer.kind in (LayerKind.ATTENTION, LayerKind.SLIDING):
                heads = (min(chunk.heads[0], layer.kv_heads), min(chunk.heads[1], layer.kv_heads))
            groups.append(Group((i, i + 1), heads, layer.names, chunk.layers[i].tokens, last))
            if last:
                fallbacks.append(f"{_name(groups[-1])}: {layer.kind.value} layers are carried by lossless")
    return sorted(groups, key=lambda group: (group.layers, group.names)), fallbacks


def _hand_over(
    coders: Sequence[ChunkCodec], groups: list[Group], chunk: KVChunk, level: int, threads: int, error: CapacityError
) -> list[Group]:
    """Give the groups whose values overflow the codec's integers to lossless. Re-raises if there is none such."""
    kept: list[Group] = []
    for group in groups:
        try:
            if group.codec == 0 and not is_empty(group):
                coders[0].encode(chunk, [group], level, threads)
            kept.append(group)
        except CapacityError:
            kept += _single_layers(group, len(coders) - 1)
    if len(coders) == 1 or kept == groups:
        raise error
    return kept


def _split_by_tokens(group: Group, chunk: KVChunk) -> list[Group]:
    """The group, cut where neighbouring layers hold different tokens (sliding windows of several sizes)."""
    parts: list[Group] = []
    for layer in range(*group.layers):
        held = chunk.layers[layer].tokens
        tokens = None if held == (0, chunk.num_tokens) else held
        if parts and parts[-1].tokens == tokens:
            parts[-1] = replace(parts[-1], layers=(parts[-1].layers[0], layer + 1))
        else:
            parts.append(replace(group, layers=(layer, layer + 1), tokens=tokens))
    return parts


def _why_lossless(group: Group, chunk: KVChunk) -> str | None:
    """Why a lossy codec can't take the group, or None."""
    if chunk.spec.dtype in FP8:
        return f"{chunk.spec.dtype} is carried by lossless"
    for layer in range(*group.layers):
        for name in group.names:
            tensor = chunk.layers[layer].tensors[name]
            if tensor.numel() and not all(math.isfinite(float(edge)) for edge in torch.aminmax(tensor)):
                return "non-finite values are carried by lossless"
    return None


def _single_layers(group: Group, codec: int) -> list[Group]:
    return [replace(group, layers=(i, i + 1), codec=codec) for i in range(*group.layers)]


def _name(group: Group) -> str:
    return f"layers {group.layers[0]}..{group.layers[1] - 1} {'+'.join(group.names) or 'state'}"

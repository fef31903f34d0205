"""Where a loaded context lands: one cache for all its tokens, handed to the decoder chunk by chunk as views.

A sliding layer keeps only the tokens that the next one can see, so a context of n tokens can be taken up only where
the stored chunks hold the last window - 1 tokens before n.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .container import ObjectHeader
from .errors import UnsupportedModel
from .kv import KVChunk, KVSpec, LayerKind, LayerKV

Held = list[tuple[int, int]]
"""By layer, the half-open range of a context's tokens that a chunk holds."""


def check_chunkable(spec: KVSpec) -> None:
    """Raise UnsupportedModel for caches that can't be cut into chunks: a state stands for all tokens before it."""
    for i, layer in enumerate(spec.layers):
        if layer.kind is LayerKind.STATE:
            raise UnsupportedModel(
                f"layer {i} holds a state, which can't be cut into chunks of tokens. Encode the whole cache as one "
                "object with Codec.encode, and store that under a key of your own"
            )


def has_windows(spec: KVSpec) -> bool:
    return any(layer.kind is LayerKind.SLIDING for layer in spec.layers)


class Placement:
    """Memory for the first `num_tokens` tokens of a context.

    Attributes:
        chunk: all of it, as one chunk: views of `cache` where there is one.
        cache: a transformers DynamicCache, or None.
    """

    def __init__(self, spec: KVSpec, ids: Tensor, num_tokens: int, model: Any = None) -> None:
        """Args:
        ids: int64, at least num_tokens: the context's.
        model: a transformers model or its config: allocate its cache; None: a chunk's own memory.
        """
        self.cache: Any = None
        if model is None:
            self.chunk = _own_memory(spec, ids[:num_tokens], num_tokens)
        else:
            from .engines.transformers import allocate_cache, chunk_from_cache

            device = getattr(model, "device", "cpu")
            self.cache = allocate_cache(model, spec, num_tokens, device=device)
            self.chunk = chunk_from_cache(self.cache, spec, ids[:num_tokens])

    def view(self, start: int, stop: int) -> KVChunk:
        """Tokens start..stop as a chunk to decode into."""
        view = self.chunk.slice(start, stop)
        view.positions = view.positions.clone()
        return view

    def cut(self, num_tokens: int) -> None:
        """Keep the first `num_tokens` tokens. Not for caches with windows: their rows are laid for one length."""
        if num_tokens == self.chunk.num_tokens:
            return
        if self.cache is not None:
            self.cache.crop(num_tokens - self.chunk.num_tokens)
        self.chunk = self.chunk.slice(0, num_tokens)


def _own_memory(spec: KVSpec, ids: Tensor, num_tokens: int) -> KVChunk:
    layers = []
    for want in spec.layers:
        first = 0
        if want.kind is LayerKind.SLIDING and want.window is not None:
            first = max(0, num_tokens - (want.window - 1))
        tensors = {
            name: torch.empty(num_tokens - first, want.kv_heads, want.dim(name), dtype=spec.torch_dtype)
            for name in want.names
        }
        layers.append(LayerKV(want.kind, tensors, (first, num_tokens) if first else None))
    return KVChunk(spec, torch.arange(num_tokens), layers, token_ids=ids)


def held_tokens(header: ObjectHeader, start: int) -> Held:
    """What a stored chunk holds, by layer, in the context's tokens; `start` is where the chunk begins."""
    held = [(start, start + header.num_tokens)] * header.spec.num_layers
    for group in header.groups:
        if group.tokens is not None:
            for layer in range(*group.layers):
                held[layer] = (start + group.tokens[0], start + group.tokens[1])
    return held


def usable_tokens(spec: KVSpec, chunks: Sequence[Held], stops: Sequence[int]) -> int:
    """The longest of the lengths `stops` (ascending) from which every sliding layer can go on; 0 if none.

    `chunks[i]` is what the chunk that ends at (or, the last one, beyond) `stops[i]` holds.
    """
    for count in range(len(stops), 0, -1):
        stop = stops[count - 1]
        if all(
            layer.kind is not LayerKind.SLIDING
            or layer.window is None
            or _covers([held[i] for held in chunks[:count]], max(0, stop - (layer.window - 1)), stop)
            for i, layer in enumerate(spec.layers)
        ):
            return stop
    return 0


def _covers(ranges: Sequence[tuple[int, int]], start: int, stop: int) -> bool:
    """Whether ascending ranges hold all of start..stop."""
    for first, last in ranges:
        if first <= start < last:
            start = last
    return start >= stop


def copy_held(source: KVChunk, target: KVChunk) -> None:
    """Copy the rows that both chunks of the same tokens hold."""
    for i, layer in enumerate(source.layers):
        a, b = source.layer_tokens(i)
        c, d = target.layer_tokens(i)
        first, last = max(a, c), min(b, d)
        if first < last:
            for name, rows in layer.tensors.items():
                target.layers[i].tensors[name][first - c : last - c].copy_(rows[first - a : last - a])

"""Rows of a chunk <-> paged KV caches, by slot mapping. Plain torch: CPU, and any device torch indexes.

A slot is a token's place: slot = block * block_size + offset. A negative slot means "no place": the row is skipped, as
in vLLM. Every layout is seen through one view, `[blocks, block_size, heads, dim]`, so that rows are written where the
engine reads them.

    NHD          k, v: [num_blocks, block_size, heads, dim]           vLLM (FlashAttention, one tensor each)
    HND          k, v: [num_blocks, heads, block_size, dim]           vLLM (FlashInfer and others)
    KV_FIRST     [2, num_blocks, block_size, heads, dim]              vLLM (K and V in one tensor)
    BLOCK_FIRST  [num_blocks, 2, block_size, heads, dim]              vLLM (K and V of a block together)
    LATENT       [num_blocks, block_size, latent + rope]              vLLM (latent attention)
    PAGE_FIRST   [2, size, layers, heads, dim]                        SGLang host pool, one tensor for all layers
    LAYER_FIRST  [2, layers, size, heads, dim]                        SGLang host pool, one tensor for all layers

vLLM's CPU backend packs its blocks by instruction set: write there through `layer.impl.do_kv_cache_update`.
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import Enum
from typing import Any

import torch
from torch import Tensor

from ..errors import DtypeError, RangeError, ShapeError
from ..kv import KVChunk, KVSpec, LayerKind, LayerKV


class Layout(str, Enum):
    """How an engine lays out its pages; see the module's table."""

    NHD = "nhd"
    HND = "hnd"
    KV_FIRST = "kv_first"
    BLOCK_FIRST = "block_first"
    LATENT = "latent"
    PAGE_FIRST = "page_first"
    LAYER_FIRST = "layer_first"


_POOLS = (Layout.PAGE_FIRST, Layout.LAYER_FIRST)
_DIMS = {
    Layout.NHD: 4,
    Layout.HND: 4,
    Layout.KV_FIRST: 5,
    Layout.BLOCK_FIRST: 5,
    Layout.LATENT: 3,
    Layout.PAGE_FIRST: 5,
    Layout.LAYER_FIRST: 5,
}


def slots_of_blocks(block_ids: Sequence[int] | Tensor, block_size: int, start: int, stop: int) -> Tensor:
    """Slots of a sequence's tokens start..stop, from its block table.

    Args:
        block_ids: the sequence's blocks in order: token t is in block_ids[t // block_size].
    Returns:
        int64 [stop - start].
    Raises:
        RangeError: tokens beyond the table, negative block ids.
    """
    table = torch.as_tensor(block_ids, dtype=torch.int64)
    if block_size < 1 or not 0 <= start <= stop <= table.numel() * block_size:
        raise RangeError(
            f"tokens: expected within the {table.numel()} blocks of {block_size}; got {start}..{stop}. "
            "Allocate blocks first"
        )
    if table.numel() and int(table.min()) < 0:
        raise RangeError(f"block_ids: expected >= 0; got {int(table.min())}")
    tokens = torch.arange(start, stop)
    return table[tokens // block_size] * block_size + tokens % block_size


def scatter(rows: Tensor, slots: Tensor, pages: Tensor) -> None:
    """Write rows into pages.

    Args:
        rows: [tokens, heads, dim], any strides.
        slots: int [tokens]; rows of negative slots are skipped; no slot twice.
        pages: [blocks, block_size, heads, dim] in rows' dtype, any strides (`PagedCache.pages`).
    Raises:
        ShapeError, DtypeError: the three don't fit each other.
        RangeError: a slot beyond the pages, or given twice. Nothing was written.
    """
    slots = _checked_slots(slots, pages)
    if tuple(rows.shape) != (slots.shape[0], *pages.shape[2:]):
        raise ShapeError(f"rows: expected {[slots.shape[0], *pages.shape[2:]]}; got {list(rows.shape)}")
    if rows.dtype != pages.dtype:
        raise DtypeError(f"rows: expected the pages' {pages.dtype}; got {rows.dtype}")
    kept = slots >= 0
    if not bool(kept.all()):
        rows, slots = rows[kept.to(rows.device)], slots[kept]
    if slots.unique().shape[0] != slots.shape[0]:
        raise RangeError("slots: expected each at most once; some came twice, which row wins would be left to chance")
    block, offset = _places(slots, pages)
    _indexable(pages)[block, offset] = _indexable(rows).to(pages.device)


def gather(pages: Tensor, slots: Tensor, out: Tensor | None = None) -> Tensor:
    """Read rows of pages: the inverse of `scatter`.

    Args:
        out: [tokens, heads, dim] to read into; its rows of negative slots stay as they are. Default: new, contiguous,
            with zeros there.
    Raises: as `scatter`; a slot may come twice.
    """
    slots = _checked_slots(slots, pages)
    shape = (slots.shape[0], *pages.shape[2:])
    if out is None:
        out = torch.zeros(shape, dtype=pages.dtype, device=pages.device)
    elif tuple(out.shape) != shape:
        raise ShapeError(f"out: expected {list(shape)}; got {list(out.shape)}")
    elif out.dtype != pages.dtype:
        raise DtypeError(f"out: expected the pages' {pages.dtype}; got {out.dtype}")
    kept = slots >= 0
    block, offset = _places(slots[kept], pages)
    _indexable(out)[kept.to(out.device)] = _indexable(pages)[block, offset].to(out.device)
    return out


class PagedCache:
    """An engine's paged cache, seen as `[blocks, block_size, heads, dim]` per layer and tensor."""

    def __init__(
        self,
        spec: KVSpec,
        layout: Layout,
        tensors: Any,
        *,
        head_range: tuple[int, int] | None = None,
    ) -> None:
        """
        Args:
            spec: the model's cache.
            layout: how `tensors` are laid out.
            tensors: for a pool layout the pool; for NHD and HND one (k, v) per layer; else one tensor per layer.
            head_range: which of the model's KV heads the pages hold (a tensor-parallel rank's).
        Raises:
            ShapeError: tensors that aren't as the layout and the spec say.
            DtypeError: tensors of another dtype than the spec's.
        """
        self.spec, self.layout = spec, Layout(layout)
        self.head_range = head_range or (0, spec.kv_heads)
        self._tensors = tensors
        for i, layer in enumerate(spec.layers):
            if layer.kind is LayerKind.STATE:
                raise ShapeError(f"layer {i} is a state, which isn't paged: carry it apart")
            if (layer.kind is LayerKind.MLA) != (self.layout is Layout.LATENT):
                raise ShapeError(f"layer {i}: {layer.kind.value} layers don't lie in layout {self.layout.value}")
        if self.layout not in _POOLS and len(tensors) != spec.num_layers:
            raise ShapeError(f"tensors: expected one entry per layer, {spec.num_layers}; got {len(tensors)}")
        sizes = {self.pages(i, name).shape[:2] for i, layer in enumerate(spec.layers) for name in layer.names}
        if len(sizes) != 1:
            raise ShapeError(f"pages: expected as many of one size in every layer; got {sorted(map(list, sizes))}")
        (self.num_blocks, self.block_size) = sizes.pop()

    @property
    def num_slots(self) -> int:
        return self.num_blocks * self.block_size

    def pages(self, layer: int, name: str) -> Tensor:
        """The view [blocks, block_size, heads, dim] of one layer's tensor. Pools have blocks of one token."""
        want, second = self.spec.layers[layer], name in ("v", "rope")
        if name not in want.names:
            raise RangeError(f"layer {layer}: expected one of {', '.join(want.names)}; got {name!r}")
        source = self._tensors if self.layout in _POOLS else self._tensors[layer]
        if self.layout in (Layout.NHD, Layout.HND):
            source = source[int(second)]
        if not isinstance(source, Tensor) or source.dim() != _DIMS[self.layout]:
            got = list(source.shape) if isinstance(source, Tensor) else type(source).__name__
            raise ShapeError(f"layer {layer}: layout {self.layout.value} has {_DIMS[self.layout]} dims; got {got}")
        view = self._view(source, layer, second)
        heads = min(self.head_range[1], want.kv_heads) - min(self.head_range[0], want.kv_heads)
        shape = [1 if want.kind is LayerKind.MLA else heads, want.dim(name)]
        if list(view.shape[2:]) != shape:
            raise ShapeError(f"layer {layer} {name}: expected pages of [heads, dim] = {shape}; got {list(view.shape)}")
        if view.dtype != self.spec.torch_dtype:
            raise DtypeError(f"layer {layer} {name}: the spec says {self.spec.dtype}; got {view.dtype}")
        return view

    def _view(self, source: Tensor, layer: int, second: bool) -> Tensor:
        layout, part = self.layout, int(second)
        if layout is Layout.NHD:
            return source
        if layout is Layout.HND:
            return source.transpose(1, 2)
        if layout is Layout.LATENT:
            split = self.spec.layers[layer].k_dim
            return (source[..., split:] if second else source[..., :split]).unsqueeze(2)
        axis = 1 if layout is Layout.BLOCK_FIRST else 0
        if source.shape[axis] != 2:
            raise ShapeError(f"layout {layout.value}: expected 2 (K, V) in dim {axis}; got {list(source.shape)}")
        if layout in _POOLS:
            layers_axis = 2 if layout is Layout.PAGE_FIRST else 1
            if source.shape[layers_axis] != self.spec.num_layers:
                raise ShapeError(
                    f"layout {layout.value}: expected {self.spec.num_layers} layers in dim {layers_axis}; "
                    f"got {list(source.shape)}"
                )
            return source[part].select(layers_axis - 1, layer).unsqueeze(1)
        return source.select(axis, part)

    def scatter(self, chunk: KVChunk, slots: Tensor) -> None:
        """Write a chunk's rows into the pages of every layer; `slots` int [tokens], negative ones skipped.

        Rows that a sliding layer doesn't hold are skipped. Raises as `scatter`; ShapeError and FingerprintMismatch
        where the chunk isn't of this cache's heads and spec.
        """
        self.spec.check(chunk.spec)
        if chunk.heads != self.head_range:
            raise ShapeError(f"chunk: expected heads {self.head_range}; got {chunk.heads}")
        if tuple(slots.shape) != (chunk.num_tokens,):
            raise ShapeError(f"slots: expected [{chunk.num_tokens}], one per token; got {list(slots.shape)}")
        for layer, name, rows in chunk.tensors():
            first, last = chunk.layer_tokens(layer)
            scatter(rows, slots[first:last], self.pages(layer, name))

    def gather(self, slots: Tensor, positions: Tensor, token_ids: Tensor | None = None) -> KVChunk:
        """A chunk of the rows at `slots`, copied. `positions` int64 [tokens]: what the keys are rotated to."""
        self._check_all_placed(slots)
        return self._chunk(slots, positions, token_ids, gather)

    def view(self, slots: Tensor, positions: Tensor, token_ids: Tensor | None = None) -> KVChunk | None:
        """A chunk of views: decode into it and nothing is copied. None where the slots aren't consecutive rows."""
        self._check_all_placed(slots)
        slots = slots.to(device="cpu", dtype=torch.int64)
        if slots.shape[0] == 0 or bool((slots[1:] - slots[:-1] != 1).any()):
            return None
        first = int(slots[0])
        if first + slots.shape[0] > self.num_slots:
            raise RangeError(f"slots: expected below {self.num_slots}; got {int(slots[-1])}")

        within = first // self.block_size == int(slots[-1]) // self.block_size
        for i, layer in enumerate(self.spec.layers):
            for name in layer.names:
                pages = self.pages(i, name)
                if not within and pages.stride(0) != self._row_stride(pages) * self.block_size:
                    return None

        def rows(pages: Tensor, _: Tensor) -> Tensor:
            block, offset = divmod(first, self.block_size)
            where = pages.storage_offset() + block * pages.stride(0) + offset * pages.stride(1)
            shape = (slots.shape[0], *pages.shape[2:])
            return pages.as_strided(shape, (self._row_stride(pages), *pages.stride()[2:]), where)

        return self._chunk(slots, positions, token_ids, rows)

    def _row_stride(self, pages: Tensor) -> int:
        """Numbers from one slot to the next within a block."""
        return pages.stride(0) if self.block_size == 1 else pages.stride(1)

    def _check_all_placed(self, slots: Tensor) -> None:
        if slots.dim() != 1 or (slots.numel() and int(slots.min()) < 0):
            raise RangeError("slots: expected one place per token, int [tokens] >= 0, to read a chunk from")

    def _chunk(self, slots: Tensor, positions: Tensor, token_ids: Tensor | None, read: Any) -> KVChunk:
        layers = [
            LayerKV(layer.kind, {name: read(self.pages(i, name), slots) for name in layer.names})
            for i, layer in enumerate(self.spec.layers)
        ]
        return KVChunk(self.spec, positions, layers, self.head_range, token_ids)


def _checked_slots(slots: Tensor, pages: Tensor) -> Tensor:
    if pages.dim() != 4:
        raise ShapeError(f"pages: expected [blocks, block_size, heads, dim]; got {list(pages.shape)}")
    if slots.dim() != 1 or slots.is_floating_point() or slots.dtype == torch.bool:
        raise ShapeError(f"slots: expected int [tokens]; got {slots.dtype} {list(slots.shape)}")
    slots = slots.to(device="cpu", dtype=torch.int64)
    limit = pages.shape[0] * pages.shape[1]
    if slots.numel() and int(slots.max()) >= limit:
        raise RangeError(
            f"slots: expected below {limit} ({pages.shape[0]} blocks of {pages.shape[1]}); got {int(slots.max())}"
        )
    return slots


def _places(slots: Tensor, pages: Tensor) -> tuple[Tensor, Tensor]:
    slots = slots.to(pages.device)
    return slots // pages.shape[1], slots % pages.shape[1]


def _indexable(tensor: Tensor) -> Tensor:
    """fp8 as bytes: torch doesn't index fp8 on every device."""
    return tensor.view(torch.uint8) if tensor.element_size() == 1 else tensor

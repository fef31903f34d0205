"""Scatter and gather in every layout, against plain loops over slots."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cachegen.engines.paged import Layout, PagedCache, gather, scatter, slots_of_blocks
from cachegen.errors import DtypeError, FingerprintMismatch, RangeError, ShapeError
from cachegen.kv import KVChunk, KVSpec, LayerKind, LayerKV, LayerSpec

H, D, BLOCKS, SIZE = 3, 4, 5, 4
LAYER = LayerSpec(LayerKind.ATTENTION, H, D, D)
SPEC = KVSpec("invented", "bfloat16", (LAYER, LAYER))
MLA = KVSpec("invented", "bfloat16", (LayerSpec(LayerKind.MLA, 1, 6, 2),) * 2)
POOLS = (Layout.PAGE_FIRST, Layout.LAYER_FIRST)


def empty(layout: Layout, dtype: torch.dtype = torch.bfloat16) -> Any:
    """An engine's memory in a layout, filled with a value no test writes."""
    shapes = {
        Layout.NHD: (BLOCKS, SIZE, H, D),
        Layout.HND: (BLOCKS, H, SIZE, D),
        Layout.KV_FIRST: (2, BLOCKS, SIZE, H, D),
        Layout.BLOCK_FIRST: (BLOCKS, 2, SIZE, H, D),
        Layout.LATENT: (BLOCKS, SIZE, 8),
        Layout.PAGE_FIRST: (2, BLOCKS * SIZE, 2, H, D),
        Layout.LAYER_FIRST: (2, 2, BLOCKS * SIZE, H, D),
    }
    shape = shapes[layout]
    if layout in POOLS:
        return torch.full(shape, -9.0).to(dtype)
    if layout in (Layout.NHD, Layout.HND):
        return [tuple(torch.full(shape, -9.0).to(dtype) for _ in range(2)) for _ in range(2)]
    return [torch.full(shape, -9.0).to(dtype) for _ in range(2)]


def element(memory: Any, layout: Layout, layer: int, name: str, slot: int, head: int, dim: int) -> float:
    """One number of the engine's memory by the layout's definition, one index at a time."""
    block, offset, second = slot // SIZE, slot % SIZE, int(name in ("v", "rope"))
    places = {
        Layout.NHD: lambda: memory[layer][second][block, offset, head, dim],
        Layout.HND: lambda: memory[layer][second][block, head, offset, dim],
        Layout.KV_FIRST: lambda: memory[layer][second, block, offset, head, dim],
        Layout.BLOCK_FIRST: lambda: memory[layer][block, second, offset, head, dim],
        Layout.LATENT: lambda: memory[layer][block, offset, dim + 6 * second],
        Layout.PAGE_FIRST: lambda: memory[second, slot, layer, head, dim],
        Layout.LAYER_FIRST: lambda: memory[second, layer, slot, head, dim],
    }
    return float(places[layout]())


def chunk_of(spec: KVSpec, tokens: int, seed: int = 0) -> KVChunk:
    chunk = KVChunk.empty(spec, torch.arange(tokens))
    generator = torch.Generator().manual_seed(seed)
    for _, _, tensor in chunk.tensors():
        tensor.copy_(torch.randn(tensor.shape, generator=generator).to(tensor.dtype))
    return chunk


@pytest.mark.parametrize("layout", list(Layout))
@given(
    slots=st.lists(st.integers(0, BLOCKS * SIZE - 1), min_size=1, max_size=BLOCKS * SIZE, unique=True), data=st.data()
)
@settings(max_examples=15, deadline=None)
def test_rows_land_where_the_layout_says(layout: Layout, slots: list[int], data: Any) -> None:
    slots = [-1 if data.draw(st.booleans()) and data.draw(st.booleans()) else slot for slot in slots]
    spec = MLA if layout is Layout.LATENT else SPEC
    memory = empty(layout)
    cache = PagedCache(spec, layout, memory)
    chunk = chunk_of(spec, len(slots))
    cache.scatter(chunk, torch.tensor(slots))
    written = {slot: t for t, slot in enumerate(slots) if slot >= 0}
    for layer, name, rows in chunk.tensors():
        for slot in range(BLOCKS * SIZE):
            for head in range(rows.shape[1]):
                for dim in range(rows.shape[2]):
                    want = float(rows[written[slot], head, dim]) if slot in written else -9.0
                    assert element(memory, layout, layer, name, slot, head, dim) == want
    if written:
        back = cache.gather(torch.tensor(list(written)), torch.arange(len(written)))
        for layer, name, rows in chunk.tensors():
            assert torch.equal(back.layers[layer].tensors[name], rows[list(written.values())])


@pytest.mark.parametrize("layout", list(Layout))
@pytest.mark.parametrize("slots", [range(5, 8), range(3, 17)])
def test_views_write_through(layout: Layout, slots: range) -> None:
    spec = MLA if layout is Layout.LATENT else SPEC
    memory = empty(layout)
    cache = PagedCache(spec, layout, memory)
    view = cache.view(torch.tensor(slots), torch.arange(len(slots)))
    spans_blocks = len(slots) > SIZE
    if view is None:
        assert spans_blocks
        assert layout in (Layout.HND, Layout.BLOCK_FIRST)
        return
    chunk = chunk_of(spec, len(slots))
    for layer, name, rows in chunk.tensors():
        view.layers[layer].tensors[name].copy_(rows)
    again = cache.gather(torch.tensor(slots), torch.arange(len(slots)))
    for layer, name, rows in chunk.tensors():
        assert torch.equal(again.layers[layer].tensors[name], rows)
    assert element(memory, layout, 1, cache.spec.layers[1].names[1], slots[0] - 1, 0, 0) == -9.0
    assert element(memory, layout, 1, cache.spec.layers[1].names[1], slots[-1] + 1, 0, 0) == -9.0


def test_scattered_slots_have_no_view() -> None:
    cache = PagedCache(SPEC, Layout.NHD, empty(Layout.NHD))
    assert cache.view(torch.tensor([4, 5, 7]), torch.arange(3)) is None
    with pytest.raises(RangeError, match="below 20"):
        cache.view(torch.tensor([18, 19, 20]), torch.arange(3))


@given(
    blocks=st.lists(st.integers(0, 40), min_size=1, max_size=6, unique=True),
    size=st.integers(1, 7),
    data=st.data(),
)
@settings(max_examples=40, deadline=None)
def test_slots_of_blocks(blocks: list[int], size: int, data: Any) -> None:
    stop = data.draw(st.integers(0, len(blocks) * size))
    start = data.draw(st.integers(0, stop))
    want = [blocks[t // size] * size + t % size for t in range(start, stop)]
    assert slots_of_blocks(blocks, size, start, stop).tolist() == want
    with pytest.raises(RangeError, match="Allocate blocks"):
        slots_of_blocks(blocks, size, 0, len(blocks) * size + 1)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float16, torch.float32])
def test_dtypes(dtype: torch.dtype) -> None:
    pages = torch.zeros(2, 4, H, D).to(dtype)
    rows = torch.randn(3, H, D).to(dtype)
    scatter(rows, torch.tensor([6, -1, 1]), pages)
    got = gather(pages, torch.tensor([1, 6, 1]))
    assert torch.equal(got.float(), rows[[2, 0, 2]].float())
    assert int((pages.float() != 0).any(-1).any(-1).sum()) == 2


def test_gather_leaves_skipped_rows_of_out() -> None:
    pages = torch.arange(2 * 4 * H * D, dtype=torch.float32).reshape(2, 4, H, D)
    out = torch.full((3, H, D), 5.0)
    gather(pages, torch.tensor([7, -1, 0]), out)
    assert torch.equal(out[0], pages[1, 3])
    assert bool((out[1] == 5.0).all())
    assert bool((gather(pages, torch.tensor([-1]))[0] == 0).all())


def test_window_layers_skip_what_they_dropped() -> None:
    spec = KVSpec("invented", "bfloat16", (LayerSpec(LayerKind.SLIDING, H, D, D, window=3), LAYER))
    memory = empty(Layout.NHD)
    chunk = chunk_of(spec, 4)
    held = LayerKV(LayerKind.SLIDING, {n: t[2:] for n, t in chunk.layers[0].tensors.items()}, (2, 4))
    chunk = KVChunk(spec, chunk.positions, [held, chunk.layers[1]])
    PagedCache(spec, Layout.NHD, memory).scatter(chunk, torch.tensor([0, 1, 2, 3]))
    assert bool((memory[0][0][0, :2] == -9.0).all())
    assert torch.equal(memory[0][0][0, 2:4], held.tensors["k"])
    assert torch.equal(memory[1][0][0, :4], chunk.layers[1].tensors["k"])


def test_a_rank_holds_some_heads() -> None:
    memory = [tuple(torch.zeros(BLOCKS, SIZE, 2, D, dtype=torch.bfloat16) for _ in range(2)) for _ in range(2)]
    cache = PagedCache(SPEC, Layout.NHD, memory, head_range=(1, 3))
    got = cache.gather(torch.tensor([3]), torch.tensor([0]))
    assert got.heads == (1, 3)
    with pytest.raises(ShapeError, match="heads"):
        cache.scatter(chunk_of(SPEC, 1), torch.tensor([3]))


def test_refusals_write_nothing() -> None:
    pages = torch.zeros(2, 4, H, D)
    rows = torch.ones(2, H, D)
    for slots, error in (
        (torch.tensor([0, 8]), RangeError),
        (torch.tensor([1, 1]), RangeError),
        (torch.tensor([1]), ShapeError),
        (torch.tensor([1.0, 2.0]), ShapeError),
        (torch.tensor([[1, 2]]), ShapeError),
    ):
        with pytest.raises(error, match=r"slots|rows"):
            scatter(rows, slots, pages)
    with pytest.raises(DtypeError, match="rows"):
        scatter(rows.half(), torch.tensor([0, 1]), pages)
    with pytest.raises(ShapeError, match="pages"):
        scatter(rows, torch.tensor([0, 1]), pages[0])
    assert not pages.any()
    with pytest.raises(ShapeError, match="out"):
        gather(pages, torch.tensor([0]), torch.zeros(2, H, D))
    with pytest.raises(DtypeError, match="out"):
        gather(pages, torch.tensor([0]), torch.zeros(1, H, D).half())


def test_memory_must_be_as_the_layout_says() -> None:
    with pytest.raises(ShapeError, match="dims"):
        PagedCache(SPEC, Layout.KV_FIRST, [torch.zeros(2, 3, 4)] * 2)
    with pytest.raises(ShapeError, match="2 \\(K, V\\)"):
        PagedCache(SPEC, Layout.KV_FIRST, [torch.zeros(BLOCKS, 2, SIZE, H, D)] * 2)
    with pytest.raises(ShapeError, match="layers in dim 2"):
        PagedCache(SPEC, Layout.PAGE_FIRST, torch.zeros(2, 20, 3, H, D, dtype=torch.bfloat16))
    with pytest.raises(ShapeError, match="one entry per layer"):
        PagedCache(SPEC, Layout.KV_FIRST, [torch.zeros(2, BLOCKS, SIZE, H, D)])
    with pytest.raises(ShapeError, match=r"\[heads, dim\]"):
        PagedCache(SPEC, Layout.NHD, empty(Layout.HND))
    with pytest.raises(DtypeError, match="bfloat16"):
        PagedCache(SPEC, Layout.NHD, empty(Layout.NHD, torch.float16))
    with pytest.raises(ShapeError, match="don't lie in"):
        PagedCache(MLA, Layout.NHD, empty(Layout.NHD))
    with pytest.raises(ShapeError, match="isn't paged"):
        PagedCache(KVSpec("m", "bfloat16", (LayerSpec(LayerKind.STATE, 0, 0, 0),)), Layout.NHD, [None])
    cache = PagedCache(SPEC, Layout.NHD, empty(Layout.NHD))
    with pytest.raises(RangeError, match="one of k, v"):
        cache.pages(0, "latent")
    with pytest.raises(RangeError, match="one place per token"):
        cache.gather(torch.tensor([-1]), torch.tensor([0]))
    with pytest.raises(FingerprintMismatch):
        cache.scatter(chunk_of(SPEC.with_dtype("float16"), 1), torch.tensor([0]))

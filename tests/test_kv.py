"""Chunks and specs: what is let in, views, slices, and hostile JSON."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cachegen.errors import (
    DeviceError,
    DtypeError,
    FormatError,
    InputError,
    LayoutError,
    LimitExceeded,
    RangeError,
    ShapeError,
)
from cachegen.kv import MAX_LAYERS, KVChunk, KVSpec, LayerKind, LayerKV, LayerSpec, Lineage
from cachegen.rope import Rope

ROPE = Rope((1.0, 0.1), rotary_dim=4)
ATTENTION = LayerSpec(LayerKind.ATTENTION, 4, 8, 6, ROPE)
SLIDING = LayerSpec(LayerKind.SLIDING, 4, 8, 8, window=5)
LATENT = LayerSpec(LayerKind.MLA, 1, 16, 4, ROPE)
STATE = LayerSpec(LayerKind.STATE, 0, 0, 0)
SPEC = KVSpec("invented", "bfloat16", (ATTENTION, SLIDING, LATENT))


def chunk_of(spec: KVSpec = SPEC, tokens: int = 10, **more: Any) -> KVChunk:
    chunk = KVChunk.empty(spec, torch.arange(20, 20 + tokens), **more)
    for i, (_, _, tensor) in enumerate(chunk.tensors()):
        values = torch.arange(tensor.numel()).reshape(tensor.shape) % 97 + 100 * i
        tensor.copy_(values.to(tensor.dtype))
    return chunk


def test_counts() -> None:
    chunk = chunk_of()
    assert chunk.elements == 10 * (4 * 14 + 4 * 16 + 20) == 10 * SPEC.elements_per_token()
    assert chunk.nbytes == 2 * chunk.elements
    assert SPEC.elements_per_token((1, 3)) == 2 * 14 + 2 * 16 + 20
    assert [(layer, name) for layer, name, _ in chunk.tensors()] == [
        (0, "k"), (0, "v"), (1, "k"), (1, "v"), (2, "latent"), (2, "rope"),
    ]  # fmt: skip


def test_a_rank_holds_its_heads() -> None:
    chunk = chunk_of(head_range=(1, 3))
    assert [chunk.layer_heads(i) for i in range(3)] == [2, 2, 1]  # latents aren't split
    mixed = KVSpec("invented", "bfloat16", (ATTENTION, replace(ATTENTION, kv_heads=2)))
    assert [chunk_of(mixed, head_range=(1, 4)).layer_heads(i) for i in range(2)] == [3, 1]


def test_views_are_not_copied() -> None:
    engine = torch.randn(4, 10, 8).to(torch.bfloat16)
    spec = KVSpec("invented", "bfloat16", (replace(ATTENTION, v_dim=8),))
    layer = LayerKV(LayerKind.ATTENTION, {"k": engine.transpose(0, 1), "v": engine.transpose(0, 1)})
    chunk = KVChunk(spec, torch.arange(10), [layer])
    assert chunk.slice(3, 5).layers[0].tensors["k"].data_ptr() == engine[0, 3].data_ptr()
    assert chunk.cpu() is chunk


def changed(change: Callable[[KVChunk], object]) -> KVChunk:
    chunk = chunk_of()
    change(chunk)
    return chunk


def tensor_changed(layer: int, name: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[KVChunk], None]:
    def apply(chunk: KVChunk) -> None:
        chunk.layers[layer].tensors[name] = change(chunk.layers[layer].tensors[name])

    return apply


CASES: dict[str, tuple[Callable[[KVChunk], object], type[InputError], str]] = {
    "fewer tokens": (tensor_changed(0, "k", lambda t: t[:9]), ShapeError, r"\[10, 4, 8\]"),
    "other heads": (tensor_changed(0, "v", lambda t: t[:, :3]), ShapeError, "layer 0 v"),
    "other dims": (tensor_changed(2, "rope", lambda t: t[..., :3]), ShapeError, "layer 2 rope"),
    "flat": (tensor_changed(1, "k", lambda t: t.reshape(10, -1)), ShapeError, "layer 1 k"),
    "dtype": (tensor_changed(0, "k", lambda t: t.half()), DtypeError, "with_dtype"),
    "unknown dtype": (tensor_changed(0, "k", lambda t: t.to(torch.int8)), DtypeError, "int8"),
    "device": (tensor_changed(0, "k", lambda t: t.to("meta")), DeviceError, "meta"),
    "strided last dim": (
        tensor_changed(0, "k", lambda t: torch.empty(10, 4, 16, dtype=t.dtype)[:, :, ::2]), LayoutError, "contiguous",
    ),
    "a tensor missing": (lambda c: c.layers[0].tensors.pop("v"), ShapeError, "expected tensors"),
    "a layer missing": (lambda c: c.layers.pop(), ShapeError, "spec has 3"),
    "another kind": (lambda c: setattr(c.layers[1], "kind", LayerKind.ATTENTION), ShapeError, "sliding"),
    "tokens backwards": (lambda c: setattr(c.layers[1], "tokens", (5, 3)), RangeError, "layer 1"),
    "tokens beyond": (lambda c: setattr(c.layers[1], "tokens", (5, 11)), RangeError, "layer 1"),
    "no positions": (lambda c: setattr(c, "positions", torch.empty(0, dtype=torch.int64)), ShapeError, "positions"),
    "positions 2-d": (lambda c: setattr(c, "positions", torch.zeros(10, 1).long()), ShapeError, "positions"),
    "negative positions": (lambda c: setattr(c, "positions", torch.arange(-1, 9)), RangeError, "positions"),
    "ids of other tokens": (lambda c: setattr(c, "token_ids", torch.arange(9)), ShapeError, "token_ids"),
    "no heads": (lambda c: setattr(c, "head_range", (2, 2)), RangeError, "head_range"),
    "heads beyond": (lambda c: setattr(c, "head_range", (0, 5)), RangeError, "head_range"),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_wrong_chunks(case: str) -> None:
    change, error, message = CASES[case]
    with pytest.raises(error, match=message):
        changed(change).validate()


def test_states() -> None:
    spec = KVSpec("invented", "bfloat16", (STATE, ATTENTION))
    state = LayerKV(LayerKind.STATE, {"recurrent.0": torch.randn(3, 7), "conv.0": torch.randn(2, 4).half()})
    chunk = KVChunk(spec, torch.arange(10), [state, chunk_of(replace(spec, layers=(ATTENTION,))).layers[0]])
    assert [name for layer, name, _ in chunk.tensors() if layer == 0] == ["conv.0", "recurrent.0"]
    with pytest.raises(RangeError, match="no tokens to slice"):
        chunk.slice(0, 5)
    only = KVSpec("invented", "bfloat16", (STATE,))
    assert KVChunk(only, torch.arange(3), [state]).heads == (0, 1)


@given(a=st.integers(0, 9), b=st.integers(1, 10), held=st.integers(0, 10))
def test_slices(a: int, b: int, held: int) -> None:
    """Every tensor of a slice holds exactly the rows of its tokens; a window's only those it has."""
    chunk = chunk_of(token_ids=torch.arange(50, 60))
    rows = {n: t[held:] for n, t in chunk.layers[1].tensors.items()}
    chunk.layers[1] = LayerKV(LayerKind.SLIDING, rows, (held, 10))
    chunk.previous_ids = (48, 49)
    whole = chunk_of()
    if a >= b:
        with pytest.raises(RangeError, match="slice"):
            chunk.slice(a, b)
        return
    part = chunk.slice(a, b)
    assert part.positions.tolist() == list(range(20 + a, 20 + b))
    assert part.token_ids is not None
    assert part.token_ids.tolist() == list(range(50 + a, 50 + b))
    assert part.previous_ids == (48 + a, 49 + a)
    for layer, name, tensor in part.tensors():
        first, last = part.layer_tokens(layer)
        assert torch.equal(tensor, whole.layers[layer].tensors[name][a + first : a + last])
    assert part.layer_tokens(1) == (min(max(held, a), b) - a, b - a)
    assert part.layer_tokens(0) == (0, b - a)


def test_scales_are_sliced_where_they_are_per_token() -> None:
    spec = KVSpec("invented", "float8_e4m3fn", (ATTENTION,))
    chunk = KVChunk.empty(spec, torch.arange(10))
    chunk.layers[0].scales = {"k": torch.arange(10.0).reshape(10, 1, 1), "v": torch.tensor(0.5)}
    part = chunk.slice(2, 6)
    assert part.layers[0].scales["k"].flatten().tolist() == [2.0, 3.0, 4.0, 5.0]
    assert part.layers[0].scales["v"] == 0.5


# --------------------------------------------------------------------------- specs
def test_specs_are_checked() -> None:
    with pytest.raises(DtypeError, match="int4"):
        KVSpec("m", "int4", (ATTENTION,))
    with pytest.raises(ShapeError, match="at least one layer"):
        KVSpec("m", "bfloat16", ())
    with pytest.raises(ShapeError, match="layer 1"):
        KVSpec("m", "bfloat16", (ATTENTION, replace(ATTENTION, k_dim=0)))


def test_json_runs() -> None:
    spec = KVSpec("m", "float16", (ATTENTION,) * 30 + (SLIDING, STATE, LATENT) + (ATTENTION,) * 2)
    assert [run["count"] for run in spec.to_json()["layers"]] == [30, 1, 1, 1, 2]
    assert KVSpec.from_json(spec.to_json()) == spec


GOOD = KVSpec("m", "bfloat16", (ATTENTION, SLIDING)).to_json()
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=9),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)


@given(data=st.data(), value=json_values)
@settings(max_examples=200, deadline=None)
def test_hostile_json_is_refused_or_read(data: Any, value: Any) -> None:
    if data.draw(st.booleans()):
        spec = {**GOOD, data.draw(st.sampled_from([*GOOD])): value}
    else:
        field = data.draw(st.sampled_from([*GOOD["layers"][0], "window"]))
        spec = {**GOOD, "layers": [{**GOOD["layers"][0], field: value}]}
    try:
        read = KVSpec.from_json(spec)
    except FormatError:
        return
    assert KVSpec.from_json(read.to_json()) == read


@pytest.mark.parametrize(
    ("field", "value", "error"),
    [
        ("count", MAX_LAYERS, LimitExceeded),
        ("count", 10**30, LimitExceeded),
        ("count", 0, FormatError),
        ("heads", 1 << 40, LimitExceeded),
        ("k_dim", 1 << 40, LimitExceeded),
        ("k_dim", 0, FormatError),
        ("k_dim", 2, FormatError),
        ("v_dim", -1, FormatError),
        ("v_dim", 4.0, FormatError),
        ("window", 0, FormatError),
        ("kind", "wavelet", FormatError),
        ("kind", ["mla"], FormatError),
        ("rope", {}, FormatError),
    ],
)
def test_hostile_fields(field: str, value: Any, error: type[Exception]) -> None:
    layers = [GOOD["layers"][1], {**GOOD["layers"][0], field: value}]
    with pytest.raises(error, match=r"spec|rope"):
        KVSpec.from_json({**GOOD, "layers": layers})


def test_lineage_json() -> None:
    for lineage in (Lineage("klt", 2, 0.01), Lineage("channel", 0)):
        assert Lineage.from_json(lineage.to_json()) == lineage


def test_importing_the_package_imports_no_engine() -> None:
    """`import cachegen` and the whole model side stay free of engines."""
    code = (
        "import sys, cachegen, cachegen.kv, cachegen.rope, cachegen.keys, cachegen.fingerprint, "
        "cachegen.engines.hf_config, cachegen.engines.transformers, cachegen.engines.paged\n"
        "print(sorted({'transformers', 'vllm', 'sglang', 'lmcache'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"

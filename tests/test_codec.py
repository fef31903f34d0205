"""The facade: selections, outputs, routing to lossless, refusals."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from cachegen.codec import Codec
from cachegen.container import ObjectReader
from cachegen.errors import (
    CacheGenError,
    DtypeError,
    FingerprintMismatch,
    LayoutError,
    LevelError,
    LimitExceeded,
    QualityUnavailable,
    RangeError,
    ShapeError,
    Truncated,
)
from cachegen.fingerprint import Fingerprint
from cachegen.kv import KVChunk, KVSpec, LayerKind, LayerKV, LayerSpec
from cachegen.rope import Rope, move

ROPE = Rope(inv_freq=(1.0, 0.3, 0.1, 0.01), rotary_dim=8)
LAYER = LayerSpec(LayerKind.ATTENTION, kv_heads=2, k_dim=8, v_dim=8, rope=ROPE)
SPEC = KVSpec("invented", "bfloat16", (LAYER, LAYER, LAYER))


def fingerprint(spec: KVSpec = SPEC, weights: str = "w0") -> Fingerprint:
    return Fingerprint(
        model_type=spec.model_type,
        weights=weights,
        dtype=spec.dtype,
        layers=spec.num_layers,
        kv_heads=spec.kv_heads,
        k_dims=tuple(layer.k_dim for layer in spec.layers),
        v_dims=tuple(layer.v_dim for layer in spec.layers),
        rope="r0",
        tokenizer="t0",
        adapter=None,
    )


def codec_for(spec: KVSpec = SPEC, codec: str = "lossless", weights: str = "w0") -> Codec:
    return Codec(spec, fingerprint(spec, weights), codec, threads=1)


def chunk_of(spec: KVSpec = SPEC, tokens: int = 40, seed: int = 0, start: int = 7) -> KVChunk:
    generator = torch.Generator().manual_seed(seed)
    chunk = KVChunk.empty(spec, torch.arange(start, start + tokens), token_ids=torch.arange(tokens))
    for _, _, tensor in chunk.tensors():
        tensor.copy_(torch.randn(tensor.shape, generator=generator))
    return chunk


def same(a: Tensor, b: Tensor) -> bool:
    return (
        a.dtype == b.dtype
        and a.shape == b.shape
        and torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))
    )


def assert_same(a: KVChunk, b: KVChunk) -> None:
    assert torch.equal(a.positions, b.positions)
    for (i, name, x), (j, other, y) in zip(a.tensors(), b.tensors(), strict=True):
        assert (i, name) == (j, other)
        assert same(x, y), f"layer {i} {name}"


def test_lossless_gives_back_every_bit_and_what_the_header_says() -> None:
    chunk = chunk_of()
    encoded = codec_for().encode(chunk)
    decoded = codec_for().decode(encoded.data)
    assert_same(chunk, decoded)
    assert decoded.token_ids is not None
    assert torch.equal(decoded.token_ids, torch.arange(40))
    assert encoded.report.nbytes == len(encoded.data)
    assert encoded.report.elements == 40 * 3 * 2 * 2 * 8


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_any_selection_equals_the_slice_of_the_whole(data: st.DataObject) -> None:
    def interval(stop: int) -> tuple[int, int]:
        a = data.draw(st.integers(0, stop - 1))
        return a, data.draw(st.integers(a + 1, stop))

    codec = codec_for(codec=data.draw(st.sampled_from(["lossless", "channel"])))
    encoded = codec.encode(chunk_of())
    whole = codec.decode(encoded.data)
    layers, heads, tokens = interval(3), interval(2), interval(40)
    part = codec.decode(encoded.data, layers=layers, heads=heads, tokens=tokens)
    assert part.spec.num_layers == layers[1] - layers[0]
    assert torch.equal(part.positions, whole.positions[slice(*tokens)])
    for i, name, tensor in part.tensors():
        expected = whole.layers[layers[0] + i].tensors[name][slice(*tokens), slice(*heads)]
        assert same(tensor, expected)


@pytest.mark.parametrize("codec", ["lossless", "channel"])
def test_decodes_into_strided_views_of_an_engine_cache(codec: str) -> None:
    coder, chunk = codec_for(codec=codec), chunk_of()
    encoded = coder.encode(chunk)
    fresh = coder.decode(encoded.data)
    memory = [[torch.zeros(2, 100, 8, dtype=torch.bfloat16) for _ in "kv"] for _ in range(3)]
    views = [
        LayerKV(LayerKind.ATTENTION, {n: m[:, 30:70].transpose(0, 1) for n, m in zip("kv", pair, strict=True)})
        for pair in memory
    ]
    out = KVChunk(SPEC, torch.arange(40), views)
    assert coder.decode(encoded.data, out=out) is out
    assert_same(fresh, out)
    for pair in memory:
        for m in pair:
            assert not m[:, :30].any()
            assert not m[:, 70:].any()


def test_out_of_another_dtype_is_a_cast() -> None:
    encoded = codec_for().encode(chunk_of())
    whole = codec_for().decode(encoded.data)
    out = KVChunk.empty(SPEC.with_dtype("float32"), torch.arange(40))
    codec_for().decode(encoded.data, out=out)
    for (_, _, a), (_, _, b) in zip(out.tensors(), whole.tensors(), strict=True):
        assert torch.equal(a, b.float())


@pytest.mark.parametrize("codec", ["lossless", "channel"])
def test_keys_move_to_new_positions_and_values_stay(codec: str) -> None:
    coder = codec_for(codec=codec)
    encoded = coder.encode(chunk_of())
    here, there = coder.decode(encoded.data), coder.decode(encoded.data, positions=1000)
    assert there.positions.tolist() == list(range(1000, 1040))
    for i in range(3):
        expected = move(here.layers[i].tensors["k"].float(), here.positions, there.positions, ROPE)
        error = (there.layers[i].tensors["k"].float() - expected).abs().max()
        assert error < 0.05
        assert (there.layers[i].tensors["k"].float() - here.layers[i].tensors["k"].float()).abs().max() > 0.5
        assert same(there.layers[i].tensors["v"], here.layers[i].tensors["v"])


def test_non_finite_layers_are_exact_and_the_report_says_so() -> None:
    chunk = chunk_of()
    chunk.layers[1].tensors["v"][3, 1, 2] = float("nan")
    chunk.layers[1].tensors["k"][4, 0, 1] = -float("inf")
    encoded = codec_for(codec="channel").encode(chunk)
    decoded = codec_for(codec="channel").decode(encoded.data)
    assert same(decoded.layers[1].tensors["v"], chunk.layers[1].tensors["v"])
    assert same(decoded.layers[1].tensors["k"], chunk.layers[1].tensors["k"])
    assert not same(decoded.layers[0].tensors["k"], chunk.layers[0].tensors["k"])
    assert any("non-finite" in note for note in encoded.report.fallbacks)


def test_unknown_layer_kinds_are_carried_not_dropped() -> None:
    state = LayerSpec(LayerKind.STATE, 0, 0, 0)
    latent = LayerSpec(LayerKind.MLA, 1, 16, 8, ROPE)
    spec = replace(SPEC, layers=(LAYER, state, latent))
    base = chunk_of(replace(SPEC, layers=(LAYER,)))
    layers = [
        base.layers[0],
        LayerKV(LayerKind.STATE, {"ssm": torch.randn(3, 4, 5), "conv": torch.randn(7).half()}),
        LayerKV(LayerKind.MLA, {"latent": torch.randn(40, 1, 16).bfloat16(), "rope": torch.randn(40, 1, 8).bfloat16()}),
    ]
    chunk = KVChunk(spec, base.positions, layers)
    encoded = codec_for(spec, "channel").encode(chunk)
    decoded = codec_for(spec, "channel").decode(encoded.data)
    for i in (1, 2):
        for name, tensor in layers[i].tensors.items():
            assert same(decoded.layers[i].tensors[name], tensor)
    assert any("state" in note for note in encoded.report.fallbacks)


def test_sliding_windows_hold_only_their_tokens() -> None:
    window = replace(LAYER, kind=LayerKind.SLIDING, window=16)
    spec = replace(SPEC, layers=(LAYER, window, window))
    chunk = chunk_of(spec)
    for i, (a, b) in ((1, (24, 40)), (2, (40, 40))):
        chunk.layers[i] = LayerKV(LayerKind.SLIDING, {n: t[a:b] for n, t in chunk.layers[i].tensors.items()}, (a, b))
    chunk.validate()
    coder = codec_for(spec, "channel")
    encoded = coder.encode(chunk)
    whole = coder.decode(encoded.data)
    assert whole.layers[1].tokens == (24, 40)
    assert whole.layers[2].tensors["k"].shape[0] == 0
    part = coder.decode(encoded.data, tokens=(20, 30))
    assert part.layers[1].tokens == (4, 10)
    assert same(part.layers[1].tensors["v"], whole.layers[1].tensors["v"][:6])


def test_fp8_caches_keep_their_scales() -> None:
    spec = SPEC.with_dtype("float8_e4m3fn")
    chunk = KVChunk.empty(spec, torch.arange(40))
    for layer in chunk.layers:
        for name, tensor in layer.tensors.items():
            tensor.copy_(torch.randn(tensor.shape))
            layer.scales[name] = torch.rand(1, 2, 1)
    decoded = codec_for(spec, "channel").decode(codec_for(spec, "channel").encode(chunk).data)
    assert_same(chunk, decoded)
    for a, b in zip(chunk.layers, decoded.layers, strict=True):
        for name in "kv":
            assert torch.equal(a.scales[name], b.scales[name])


def test_another_models_object_is_refused_with_the_fields() -> None:
    data = codec_for().encode(chunk_of()).data
    with pytest.raises(FingerprintMismatch, match="weights, tokenizer or adapter"):
        codec_for(weights="w1").decode(data)
    other = replace(SPEC, layers=(replace(LAYER, kv_heads=4),) * 3)
    with pytest.raises(FingerprintMismatch, match="kv_heads") as caught:
        codec_for(other).decode(data)
    assert caught.value.fields["layer 0 kv_heads"] == (4, 2)
    with pytest.raises(FingerprintMismatch, match="kv_heads"):
        codec_for(other).encode(chunk_of())


def test_missing_bytes_raise_or_are_said_to_be_missing() -> None:
    data = codec_for().encode(chunk_of()).data
    reader = ObjectReader(data[: ObjectReader(data).head_size])
    with pytest.raises(Truncated):
        codec_for().decode(reader)
    with pytest.raises(Truncated, match="lowest level"):
        codec_for().decode(reader, best_effort=True)


def test_wrong_inputs_say_what_was_expected() -> None:
    codec, chunk = codec_for(codec="channel"), chunk_of()
    data = codec.encode(chunk).data
    for arguments, error in [
        ({"level": 99}, LevelError),
        ({"layers": (0, 4)}, RangeError),
        ({"layers": (2, 2)}, RangeError),
        ({"heads": (1, 3)}, RangeError),
        ({"tokens": (0, 41)}, RangeError),
        ({"positions": [1, 2]}, ShapeError),
        ({"positions": -1}, RangeError),
        ({"max_tokens": 10}, LimitExceeded),
        ({"max_kl": 1e-9}, QualityUnavailable),
        ({"out": chunk_of(tokens=39)}, ShapeError),
    ]:
        with pytest.raises(error, match=r"\[CG\d+\]"):
            codec.decode(data, **arguments)
    with pytest.raises(LevelError):
        codec.encode(chunk, level=codec.num_levels)
    wrong = chunk_of()
    wrong.layers[0].tensors["k"] = wrong.layers[0].tensors["k"].float()
    with pytest.raises(DtypeError, match="float32"):
        codec.encode(wrong)
    wrong.layers[0].tensors["k"] = torch.zeros(40, 2, 16, dtype=torch.bfloat16)[:, :, ::2]
    with pytest.raises(LayoutError, match="contiguous"):
        codec.encode(wrong)
    wrong.layers[0].tensors["k"] = torch.zeros(40, 3, 8, dtype=torch.bfloat16)
    with pytest.raises(ShapeError, match="layer 0 k"):
        codec.encode(wrong)
    with pytest.raises(ShapeError, match="positions"):
        KVChunk.empty(SPEC, torch.arange(0))


@pytest.mark.parametrize("codec", ["lossless", "channel"])
@settings(max_examples=25, deadline=None)
@given(
    tokens=st.integers(1, 70),
    heads=st.integers(1, 3),
    k_dim=st.sampled_from([2, 8, 24]),
    v_dim=st.sampled_from([1, 8, 40]),
)
def test_every_shape_round_trips(codec: str, tokens: int, heads: int, k_dim: int, v_dim: int) -> None:
    spec = KVSpec("invented", "bfloat16", (LayerSpec(LayerKind.ATTENTION, heads, k_dim, v_dim),) * 2)
    chunk = chunk_of(spec, tokens)
    coder = codec_for(spec, codec)
    decoded = coder.decode(coder.encode(chunk).data)
    if codec == "lossless":
        assert_same(chunk, decoded)
    else:
        for (_, _, a), (_, _, b) in zip(chunk.tensors(), decoded.tensors(), strict=True):
            assert (a.float() - b.float()).abs().max() < 2.0


@pytest.mark.parametrize("codec", ["lossless", "channel"])
def test_flipped_bytes_give_a_typed_error_or_the_exact_tensors(codec: str) -> None:
    coder = codec_for(codec=codec)
    data = coder.encode(chunk_of(tokens=5)).data
    whole = coder.decode(data)
    for i in range(len(data)):
        hurt = bytearray(data)
        hurt[i] ^= 1 << (i % 8)
        try:
            assert_same(coder.decode(bytes(hurt)), whole)
        except CacheGenError:
            continue

"""The public code's codec: its quantiser, its bins by layer, its tables' size, and bad input."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cachegen.codecs import make_codec
from cachegen.codecs.base import ChunkInfo, Group, GroupSegments
from cachegen.codecs.cachegen_public import LEVELS, CacheGenPublic, bins_of
from cachegen.entropy.tables import PROB_SUM
from cachegen.errors import CapacityError, FormatError, InputError, LevelError, TableError, Truncated
from cachegen.kv import KVChunk, KVSpec, LayerKind, LayerKV, LayerSpec

SPEC = KVSpec("invented", "bfloat16", (LayerSpec(LayerKind.ATTENTION, 2, 8, 6),) * 2)


def invented(tokens: int, seed: int = 0, dtype: str = "bfloat16") -> KVChunk:
    random = torch.Generator().manual_seed(seed)
    spec = SPEC.with_dtype(dtype)
    layers = []
    for layer in spec.layers:
        shapes = {name: (tokens, layer.kv_heads, layer.dim(name)) for name in layer.names}
        layers.append(
            LayerKV(layer.kind, {n: torch.randn(s, generator=random).to(spec.torch_dtype) for n, s in shapes.items()})
        )
    return KVChunk(spec, torch.arange(tokens), layers)


def info(chunk: KVChunk) -> ChunkInfo:
    return ChunkInfo(chunk.spec, chunk.num_tokens, chunk.positions, None, (), 0)


def roundtrip(codec: CacheGenPublic, chunk: KVChunk, level: int) -> tuple[KVChunk, list[bytes]]:
    groups = codec.groups(chunk.spec, (0, 2))
    segments = [s[0] for s in codec.encode(chunk, groups, level, 1).segments]
    out = KVChunk.empty(chunk.spec, chunk.positions)
    targets = {(i, n): t for i, layer in enumerate(out.layers) for n, t in layer.tensors.items()}
    parts = [GroupSegments(g, [memoryview(s)]) for g, s in zip(groups, segments, strict=True)]
    codec.decode(info(chunk), parts, targets, 1)
    return out, segments


def as_the_public_code(x: torch.Tensor, bins: int) -> torch.Tensor:
    """x [tokens, heads, dim] through q = round(x * C / max), in fp64."""
    steps = bins // 2 - 1
    largest = x.double().abs().amax((1, 2), keepdim=True)
    return (x.double() * steps / largest).round() * largest / steps


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("bins", [4, 8, 16, 32, 64, 128, 256])
def test_values_are_those_of_the_public_quantiser(bins: int, dtype: str) -> None:
    chunk = invented(50, 1, dtype)
    out, _ = roundtrip(CacheGenPublic([bins]), chunk, 0)
    for mine, theirs in zip(out.layers, chunk.layers, strict=True):
        for name, x in theirs.tensors.items():
            want = as_the_public_code(x, bins)
            step = x.double().abs().amax((1, 2), keepdim=True) / (bins // 2 - 1)
            rounding = want.abs() * (0.0 if dtype == "float32" else 2.0**-8)
            off = ((mine.tensors[name].double() - want).abs() - rounding) / step
            # fp32 may fall on the other side of a bin's edge, once in a while
            assert float((off > 0.1).double().mean()) < 0.01
            assert float(off.max()) < 1.1


def test_bins_go_by_layer_as_in_lmcache() -> None:
    keys = [bins_of("lmcache", "k", layer, 32) for layer in range(32)]
    values = [bins_of("lmcache", "v", layer, 32) for layer in range(32)]
    assert keys == [32] * 10 + [16] * 22
    assert values == [32] * 2 + [16] * 30
    assert {bins_of("lmcache", name, layer, 9) for name in "kv" for layer in range(9)} == {32}
    assert bins_of(64, "v", 20, 32) == 64


def test_levels_sweep_bins() -> None:
    codec = CacheGenPublic()
    assert LEVELS[codec.default_level] == "lmcache"
    assert CacheGenPublic([8, 16]).default_level == 1
    chunk = invented(256, 2, "float32")
    errors = []
    for level in range(codec.num_levels):
        out, _ = roundtrip(codec, chunk, level)
        errors.append(
            sum(
                float((a.tensors["k"] - b.tensors["k"]).square().mean())
                for a, b in zip(out.layers, chunk.layers, strict=True)
            )
        )
    assert errors == sorted(errors, reverse=True)
    assert errors[0] > 50 * errors[-1]
    with pytest.raises(LevelError, match=r"0\.\.5; got 6"):
        codec.encode(chunk, codec.groups(SPEC, (0, 2)), 6, 1)


@pytest.mark.parametrize(("levels", "entries"), [([16], 17), ([32], 33), (["lmcache"], 33), ([128], 129)])
def test_tables_cost_what_theirs_do(levels: list[Any], entries: int) -> None:
    chunk = invented(40, 3)
    _, segments = roundtrip(CacheGenPublic(levels), chunk, 0)
    channels = 2 * (8 + 6)
    tables, largest, heads = 2 * entries * channels, 2 * 40 * 2, 2 * 8
    streams = int.from_bytes(segments[0][4:8], "little")
    assert len(segments[0]) > tables + largest + heads + streams
    symbols = 40 * channels
    assert len(segments[0]) - tables - largest - heads < symbols * np.log2(entries) / 8 + 2 * 32 * 4


def test_zero_rows_and_constant_channels() -> None:
    chunk = invented(40, 4)
    chunk.layers[0].tensors["k"][7] = 0
    chunk.layers[0].tensors["v"].zero_()
    chunk.layers[1].tensors["k"][:, 1, 3] = 1.5
    out, _ = roundtrip(CacheGenPublic(), chunk, 3)
    assert not out.layers[0].tensors["k"][7].any()
    assert not out.layers[0].tensors["v"].any()
    assert float((out.layers[1].tensors["k"][:, 1, 3].float() - 1.5).abs().max()) < 0.2


@pytest.mark.parametrize("tokens", [1, 2, 31, 33, 5000])
def test_any_number_of_tokens(tokens: int) -> None:
    chunk = invented(tokens, 5)
    out, _ = roundtrip(CacheGenPublic([256]), chunk, 0)
    worst = (out.layers[0].tensors["k"].float() - chunk.layers[0].tensors["k"].float()).abs().max()
    assert float(worst) < 0.05


def test_many_rare_symbols_still_make_a_table() -> None:
    spec = KVSpec("wide", "float32", (LayerSpec(LayerKind.ATTENTION, 1, 1, 2),))
    ramp = torch.cat([torch.arange(-127, 128), torch.arange(-60, 60).repeat(80)]).float()
    k, v = ramp[:, None, None] + 0.0, torch.stack([ramp, torch.full_like(ramp, 127.0)], 1)[:, None]
    chunk = KVChunk(spec, torch.arange(len(ramp)), [LayerKV(LayerKind.ATTENTION, {"k": k, "v": v})])
    codec = CacheGenPublic([256])
    groups = codec.groups(spec, (0, 1))
    segment = codec.encode(chunk, groups, 0, 1).segments[0][0]
    out = KVChunk.empty(spec, chunk.positions)
    targets = {(0, n): t for n, t in out.layers[0].tensors.items()}
    codec.decode(info(chunk), [GroupSegments(groups[0], [memoryview(segment)])], targets, 1)
    assert torch.allclose(out.layers[0].tensors["v"], v, atol=1e-3)


def test_config_round_trips_and_is_checked() -> None:
    config = CacheGenPublic([8, "lmcache"]).get_config()
    assert make_codec("cachegen_public", config).get_config() == config == {"levels": [8, "lmcache"]}
    for levels in ([], [7], [2], [258], [8.0], [True], ["x"], "lmcache", None, [8] * 65):
        with pytest.raises(FormatError):
            CacheGenPublic.from_config({"levels": levels})
    with pytest.raises(FormatError):
        CacheGenPublic.from_config({"bins": [8]})
    with pytest.raises(InputError, match="levels"):
        CacheGenPublic([9])


def test_magnitudes_too_small_to_scale_are_refused_or_zero() -> None:
    chunk = invented(4, 6, "float32")
    for tensor in chunk.layers[0].tensors.values():
        tensor.fill_(1e-45)
    codec = CacheGenPublic([128])
    try:
        out, _ = roundtrip(codec, chunk, 0)
    except CapacityError:
        return
    assert float(out.layers[0].tensors["k"].abs().max()) <= 2e-45


# --------------------------------------------------------------------------- hostile segments
def _decode(data: bytes, group: Group) -> None:
    chunk = invented(12, 3)
    layer = group.layers[0]
    targets = {(layer, n): torch.empty_like(t) for n, t in chunk.layers[layer].tensors.items()}
    CacheGenPublic().decode(info(chunk), [GroupSegments(group, [memoryview(data)])], targets, 1)


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_changed_segments_are_typed_errors_or_numbers(data: st.DataObject) -> None:
    codec = CacheGenPublic()
    group = codec.groups(SPEC, (0, 2))[0]
    segment = codec.encode(invented(12, 3), [group], data.draw(st.integers(0, 5)), 1).segments[0][0]
    if data.draw(st.booleans()):
        changed = segment[: data.draw(st.integers(0, len(segment) - 1))]
    else:
        at = data.draw(st.integers(0, len(segment) - 1))
        changed = segment[:at] + bytes([segment[at] ^ data.draw(st.integers(1, 255))]) + segment[at + 1 :]
    with suppress(FormatError):
        _decode(changed, group)


@pytest.mark.parametrize(
    ("at", "value", "error"),
    [
        (0, 5, FormatError),
        (0, 2, FormatError),
        (1, 255, FormatError),
        (3, 255, FormatError),
        (2, 8, FormatError),
        (7, 255, Truncated),
        (9, 0xFF, FormatError),  # a negative magnitude
        (8 + 24 + 2, 255, TableError),  # a cumulative frequency that falls
    ],
)
def test_parts_of_segments_are_checked(at: int, value: int, error: type[Exception]) -> None:
    codec = CacheGenPublic([8])
    group = codec.groups(SPEC, (0, 2))[0]
    segment = bytearray(codec.encode(invented(12, 3), [group], 0, 1).segments[0][0])
    _decode(bytes(segment), group)
    segment[at] = value
    if at == 8 + 24 + 2:
        segment[at + 1] = 255
    with pytest.raises(error):
        _decode(bytes(segment), group)
    with pytest.raises(FormatError, match="left over"):
        _decode(codec.encode(invented(12, 3), [group], 0, 1).segments[0][0] + b"\0", group)


def test_frequencies_sum_to_the_coders_total() -> None:
    codec = CacheGenPublic([16])
    segment = codec.encode(invented(100, 3), codec.groups(SPEC, (0, 2))[:1], 0, 1).segments[0][0]
    rows = np.frombuffer(segment, "<u2", 16 * 17, 8 + 200).reshape(16, 17)
    assert (rows[:, 0] == 0).all()
    assert (rows[:, 15:] == PROB_SUM).all()
    assert (np.diff(rows.astype(int), axis=1) >= 0).all()


def test_groups_of_other_codecs_are_refused() -> None:
    codec = CacheGenPublic()
    segment = codec.encode(invented(12, 3), codec.groups(SPEC, (0, 2))[:1], 0, 1).segments[0][0]
    for group in (Group((0, 2), (0, 2), ("k", "v")), Group((0, 1), (0, 2), ("v",))):
        with pytest.raises(FormatError, match="one attention layer"):
            _decode(segment, group)

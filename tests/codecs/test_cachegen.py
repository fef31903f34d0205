"""The paper's codec on an invented model: what it promises of errors, sizes, options, and bad input."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cachegen.codecs import make_codec
from cachegen.codecs.base import ChunkInfo, Group, GroupSegments
from cachegen.codecs.cachegen import CacheGen, ChannelMap
from cachegen.codecs.cachegen_fit import SCALES, Histogram, fit, share_tables
from cachegen.codecs.cachegen_public import CacheGenPublic
from cachegen.entropy.tables import ESCAPE_BITS
from cachegen.errors import (
    CapacityError,
    FormatError,
    InputError,
    LevelError,
    ProfileMismatch,
    ProfileMissing,
    Truncated,
)
from cachegen.fingerprint import Fingerprint
from cachegen.kv import KVChunk, KVSpec, LayerKind, LayerKV, LayerSpec
from cachegen.profile import Calibration, ModelProfile, Rung

ATTENTION = LayerSpec(LayerKind.ATTENTION, 2, 8, 6)
SPEC = KVSpec("invented", "float32", (ATTENTION, LayerSpec(LayerKind.STATE, 0, 0, 0), replace(ATTENTION, k_dim=4)))
FINGERPRINT = Fingerprint("invented", "00" * 32, "float32", 3, 2, (8, 0, 4), (6, 0, 6), "11" * 32)
STATE = LayerKV(LayerKind.STATE, {"s": torch.zeros(3)})


def invented(tokens: int, seed: int = 0, spec: KVSpec = SPEC, start: int = 0) -> KVChunk:
    """Neighbouring tokens alike, channels of means and deviations of their own."""
    random = torch.Generator().manual_seed(seed)
    constants = torch.Generator().manual_seed(99)
    layers = []
    for layer in spec.layers:
        tensors = {}
        for name in layer.names:
            shape = (layer.kv_heads, layer.dim(name))
            mean, spread = torch.randn(shape, generator=constants), 0.2 + torch.rand(shape, generator=constants)
            noise = torch.randn(tokens, *shape, generator=random)
            for t in range(1, tokens):
                noise[t] = 0.98 * noise[t - 1] + 0.2 * noise[t]
            tensors[name] = (mean + spread * noise).to(spec.torch_dtype)
        layers.append(LayerKV(layer.kind, tensors) if tensors else STATE)
    return KVChunk(spec, torch.arange(start, start + tokens), layers)


@cache
def profile(**options: Any) -> ModelProfile:
    def chunks() -> Iterator[KVChunk]:
        for seed in range(4):
            yield invented(256, 100 + seed)

    parameters, arrays = fit(chunks, SPEC, options)
    ladder = tuple(Rung(q, 1.0 + q, 0.1 / 4**q) for q in range(len(SCALES)))
    return ModelProfile("cachegen", FINGERPRINT, SPEC, Calibration(), ladder, parameters, arrays)


def roundtrip(codec: Any, chunk: KVChunk, level: int, heads: tuple[int, int] = (0, 2)) -> tuple[KVChunk, int]:
    """Encode all groups and decode them: the chunk that comes back, and the segments' bytes."""
    groups = codec.groups(chunk.spec, heads)
    coded = codec.encode(chunk, groups, level, 1)
    out = KVChunk.empty(chunk.spec, chunk.positions, chunk.head_range)
    targets = {(i, n): t for i, layer in enumerate(out.layers) for n, t in layer.tensors.items()}
    parts = [
        GroupSegments(g, [memoryview(s) for s in segments]) for g, segments in zip(groups, coded.segments, strict=True)
    ]
    codec.decode(info(chunk), parts, targets, 1)
    return out, sum(len(s) for segments in coded.segments for s in segments)


def info(chunk: KVChunk) -> ChunkInfo:
    return ChunkInfo(chunk.spec, chunk.num_tokens, chunk.positions, None, (), 0)


def flat(chunk: KVChunk, layer: int) -> torch.Tensor:
    return torch.cat([chunk.layers[layer].tensors[n].float().flatten(1) for n in ("k", "v")], 1)


def errors(a: KVChunk, b: KVChunk) -> float:
    return float(torch.cat([(flat(a, i) - flat(b, i)).flatten() for i in (0, 2)]).square().mean())


def spans() -> dict[int, slice]:
    return {0: slice(0, 28), 2: slice(28, 48)}


# --------------------------------------------------------------------------- what decodes
@pytest.mark.parametrize("tokens", [1, 2, 9, 10, 11, 21, 64, 256])
def test_every_value_is_within_its_bin(tokens: int) -> None:
    codec = CacheGen(profile())
    chunk = invented(tokens, 5)
    for q in (0, codec.default_level, codec.num_levels - 1):
        level = codec.model.levels[q]
        out, _ = roundtrip(codec, chunk, q)
        for layer, span in spans().items():
            error = (flat(out, layer) - flat(chunk, layer)).abs()
            owner = torch.arange(tokens) % 10 == 0
            assert (error[owner] <= 0.501 * level.anchor_step[span] + 1e-5).all()
            assert (error[~owner] <= 1.06 * level.delta_step[span] + 1e-5).all()


def test_bins_grow_with_the_layers_and_shrink_with_the_level() -> None:
    model = CacheGen(profile()).model
    per_layer = model.levels[0].delta_step / model.unit
    assert torch.allclose(per_layer[spans()[2]], 3 * per_layer[0])
    steps = [float(level.delta_step[0]) for level in model.levels]
    assert steps == sorted(steps, reverse=True)
    assert steps[0] / steps[-1] > 8


def test_finer_levels_cost_more_and_lose_less() -> None:
    codec = CacheGen(profile())
    results = [roundtrip(codec, invented(256, 5), q) for q in range(codec.num_levels)]
    losses = [errors(out, invented(256, 5)) for out, _ in results]
    sizes = [size for _, size in results]
    assert sizes == sorted(sizes)
    assert losses == sorted(losses, reverse=True)
    assert losses[0] > 10 * losses[-1]


def test_deltas_beat_the_public_codec_at_equal_error() -> None:
    chunk = invented(256, 5)
    public = [roundtrip(CacheGenPublic(), chunk, q) for q in range(6)]
    codec = CacheGen(profile())
    paper = [roundtrip(codec, chunk, q) for q in range(codec.num_levels)]
    for out, size in public[1:4]:
        good = [n for decoded, n in paper if errors(decoded, chunk) <= errors(out, chunk)]
        assert good
        assert min(good) < size / 1.4


@pytest.mark.parametrize(
    "options",
    [
        {"delta": False},
        {"group_length": 1},
        {"group_length": 4},
        {"group_length": 300},
        {"normalisation": "channel"},
        {"normalisation": "token"},
        {"normalisation": "token", "delta": False},
    ],
)
def test_options_round_trip(options: dict[str, Any]) -> None:
    codec = CacheGen(profile(**options))
    chunk = invented(70, 6)
    assert {k: codec.get_config()[k] for k in options} == options
    out, size = roundtrip(codec, chunk, codec.num_levels - 1)
    energy = torch.cat([flat(chunk, i).flatten() for i in (0, 2)]).var()
    assert errors(out, chunk) < 0.01 * float(energy)
    assert size < 2 * chunk.elements


def test_deltas_pay() -> None:
    chunk = invented(256, 5)
    sizes = {}
    for delta in (True, False):
        codec = CacheGen(profile(delta=delta))
        by_error = [(errors(out, chunk), size) for out, size in (roundtrip(codec, chunk, q) for q in range(8))]
        sizes[delta] = float(np.interp(np.log(0.01), *np.log(np.array(by_error[::-1])).T))
    assert sizes[True] < sizes[False] - 0.1


def test_errors_do_not_add_up_within_a_group() -> None:
    codec = CacheGen(profile())
    chunk = invented(256, 5)
    out, _ = roundtrip(codec, chunk, 2)
    error = (flat(out, 0) - flat(chunk, 0)).square().mean(1)
    place = torch.arange(256) % 10
    assert float(error[place == 9].mean()) < 2 * float(error[place == 1].mean())


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_other_dtypes(dtype: str) -> None:
    codec = CacheGen(profile())
    chunk = invented(40, 7, SPEC.with_dtype(dtype))
    out, _ = roundtrip(codec, chunk, 5)
    exact, _ = roundtrip(codec, KVChunk(SPEC, chunk.positions, [_wide(layer) for layer in chunk.layers]), 5)
    for layer in (0, 2):
        for name in ("k", "v"):
            assert torch.equal(
                out.layers[layer].tensors[name], exact.layers[layer].tensors[name].to(out.spec.torch_dtype)
            )


def _wide(layer: LayerKV) -> LayerKV:
    return LayerKV(layer.kind, {n: t.float() for n, t in layer.tensors.items()})


def test_outliers_go_by_the_escape() -> None:
    chunk = invented(40, 8)
    for row in (0, 3, 11):
        chunk.layers[0].tensors["k"][row, 1, 2] = 300.0 + row
    codec = CacheGen(profile())
    out, _ = roundtrip(codec, chunk, 7)
    for row in (0, 3, 11):
        assert abs(float(out.layers[0].tensors["k"][row, 1, 2]) - 300.0 - row) < 0.5


def test_constant_channels_and_zero_chunks() -> None:
    chunk = invented(40, 8)
    for layer in (0, 2):
        for tensor in chunk.layers[layer].tensors.values():
            tensor.zero_()
    for options in ({}, {"normalisation": "token"}, {"delta": False}):
        codec = CacheGen(profile(**options))
        out, _ = roundtrip(codec, chunk, 7)
        step = float(torch.maximum(codec.model.levels[7].anchor_step, codec.model.levels[7].delta_step).max())
        assert float(torch.cat([flat(out, 0), flat(out, 2)], 1).abs().max()) <= 1.6 * step


# --------------------------------------------------------------------------- parts
def test_targets_may_have_any_strides() -> None:
    codec = CacheGen(profile())
    chunk = invented(33, 9)
    plain, _ = roundtrip(codec, chunk, 4)
    groups = codec.groups(SPEC, (0, 2))
    coded = codec.encode(chunk, groups, 4, 1)
    targets = {}
    for layer in (0, 2):
        for name, tensor in chunk.layers[layer].tensors.items():
            heads_first = torch.full((3, 50, tensor.shape[2]), 7.0)
            targets[layer, name] = heads_first[:2].transpose(0, 1)[5:38]
    parts = [GroupSegments(g, [memoryview(s[0])]) for g, s in zip(groups, coded.segments, strict=True)]
    codec.decode(info(chunk), parts, targets, 1)
    for (layer, name), target in targets.items():
        assert torch.equal(target, plain.layers[layer].tensors[name])
        assert target._base is not None
        assert (target._base[2] == 7.0).all()
        assert (target._base[:, :5] == 7.0).all()
        assert (target._base[:, 38:] == 7.0).all()


def test_layers_and_ranks_decode_apart() -> None:
    codec = CacheGen(profile())
    chunk = invented(33, 9)
    whole, _ = roundtrip(codec, chunk, 4)
    groups = codec.groups(SPEC, (0, 2))
    assert [(g.layers, g.heads, g.names) for g in groups] == [
        ((0, 1), (0, 2), ("k", "v")),
        ((2, 3), (0, 2), ("k", "v")),
    ]
    coded = codec.encode(chunk, groups, 4, 1)
    targets = {(2, n): torch.empty_like(t) for n, t in chunk.layers[2].tensors.items()}
    codec.decode(info(chunk), [GroupSegments(groups[1], [memoryview(coded.segments[1][0])])], targets, 1)
    assert torch.equal(targets[2, "v"], whole.layers[2].tensors["v"])
    second = [LayerKV(x.kind, {n: t[:, 1:] if t.dim() == 3 else t for n, t in x.tensors.items()}) for x in chunk.layers]
    rank, _ = roundtrip(codec, KVChunk(SPEC, chunk.positions, second, (1, 2)), 4, (1, 2))
    for layer in (0, 2):
        for name in ("k", "v"):
            assert torch.equal(rank.layers[layer].tensors[name], whole.layers[layer].tensors[name][:, 1:])


def test_a_window_keeps_the_tokens_it_has() -> None:
    codec = CacheGen(profile())
    chunk = invented(33, 9)
    held = [
        LayerKV(x.kind, {n: t[5:] if t.dim() == 3 else t for n, t in x.tensors.items()}, (5, 33)) for x in chunk.layers
    ]
    held[1] = STATE
    window = KVChunk(SPEC, chunk.positions, held)
    groups = [replace(group, tokens=(5, 33)) for group in codec.groups(SPEC, (0, 2))]
    coded = codec.encode(window, groups, 4, 1)
    targets = {(i, n): torch.empty_like(held[i].tensors[n]) for i in (0, 2) for n in ("k", "v")}
    parts = [GroupSegments(g, [memoryview(s[0])]) for g, s in zip(groups, coded.segments, strict=True)]
    codec.decode(info(window), parts, targets, 1)
    alone, _ = roundtrip(codec, chunk.__class__(SPEC, chunk.positions[5:], [replace(x, tokens=None) for x in held]), 4)
    assert torch.equal(targets[2, "k"], alone.layers[2].tensors["k"])


def test_batches_and_threads_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    codec = CacheGen(profile())
    chunk = invented(64, 4)
    groups = codec.groups(SPEC, (0, 2))
    together = codec.encode(chunk, groups, 3, 2).segments
    monkeypatch.setattr("cachegen.codecs.cachegen.SCRATCH", 1)
    assert codec.encode(chunk, groups, 3, 1).segments == together


# --------------------------------------------------------------------------- levels, config, profile
def test_levels_and_losses_come_from_the_profile() -> None:
    codec = CacheGen(profile())
    assert codec.num_levels == len(SCALES)
    assert codec.default_level == 2  # the first of KL at most 0.01
    coded = codec.encode(invented(20), codec.groups(SPEC, (0, 2)), 2, 1)
    assert (coded.losses[0].level, coded.losses[0].predicted_kl) == (2, 0.1 / 16)
    poor = replace(profile(), ladder=tuple(Rung(q, 1.0, 0.5) for q in range(8)))
    assert CacheGen(poor).default_level == 7
    with pytest.raises(LevelError, match=r"0\.\.7; got 8"):
        codec.encode(invented(20), codec.groups(SPEC, (0, 2)), 8, 1)


def test_config_round_trips() -> None:
    for options in ({}, {"delta": False}, {"normalisation": "token"}):
        config = CacheGen(profile(**options)).get_config()
        assert make_codec("cachegen", config, profile(**options)).get_config() == config


def test_without_a_profile_the_error_names_the_command() -> None:
    with pytest.raises(ProfileMissing, match="cachegen calibrate --codec cachegen"):
        make_codec("cachegen", {}, None)


@pytest.mark.parametrize(
    "config",
    [
        {"coder": "huffman"},
        {"coder": 3},
        {"coder": []},
        {"speed": 11},
        {"profile": None},
        {"self": 1},
    ],
)
def test_configs_of_objects_are_checked(config: dict[str, Any]) -> None:
    with pytest.raises(FormatError):
        CacheGen.from_config(config, profile())


def test_options_must_be_the_profiles() -> None:
    with pytest.raises(ProfileMismatch, match="group_length: asked for 5"):
        CacheGen(profile(), group_length=5)
    with pytest.raises(ProfileMismatch, match="delta"):
        CacheGen(profile(), delta=False)
    with pytest.raises(InputError, match="speed"):
        CacheGen(profile(), speed=1)


@pytest.mark.parametrize(
    "options",
    [{"group_length": 0}, {"group_length": 2.5}, {"delta": 1}, {"normalisation": "x"}, {"group_length": True}],
)
def test_calibration_refuses_bad_options(options: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=next(iter(options))):
        fit(lambda: [invented(20)], SPEC, options)


def test_calibration_needs_something_to_learn_from() -> None:
    with pytest.raises(InputError, match="at least one chunk"):
        fit(list, SPEC, {})
    states = KVSpec("s", "float32", (LayerSpec(LayerKind.STATE, 0, 0, 0),))
    with pytest.raises(InputError, match="attention"):
        fit(list, states, {})


def _changed(change: Any) -> ModelProfile:
    base = profile()
    parameters, arrays = {**base.parameters}, {k: v.copy() for k, v in base.arrays.items()}
    change(parameters, arrays)
    return replace(base, parameters=parameters, arrays=arrays)


@pytest.mark.parametrize(
    "change",
    [
        lambda p, a: p.pop("options"),
        lambda p, a: p.update(options={"group_length": 0}),
        lambda p, a: p.update(options={"group_length": 2.5}),
        lambda p, a: p.update(levels=[]),
        lambda p, a: p.update(levels=[{"scale": 1.0, "anchor_range": float("inf")}]),
        lambda p, a: p.update(levels=[{"scale": -1.0, "anchor_range": 8.0}]),
        lambda p, a: p.update(bins=[]),
        lambda p, a: p.update(rounding=0.9),
        lambda p, a: a.pop("mean"),
        lambda p, a: a.update(unit=np.zeros(48, np.float32)),
        lambda p, a: a.update(deviation=np.full(48, np.nan, np.float32)),
        lambda p, a: a.update(mean=np.zeros(47, np.float32)),
        lambda p, a: a["delta_tables"].fill(255),
        lambda p, a: a.pop("anchor_bank.3"),
    ],
)
def test_profiles_are_checked(change: Any) -> None:
    with pytest.raises(ProfileMismatch):
        CacheGen(_changed(change))


def test_a_profile_of_another_codec_or_shape_is_refused() -> None:
    with pytest.raises(ProfileMismatch, match="klt"):
        CacheGen(replace(profile(), codec_id="klt"))
    other = KVSpec("invented", "float32", (replace(ATTENTION, k_dim=10), *SPEC.layers[1:]))
    codec = CacheGen(profile())
    with pytest.raises(ProfileMismatch, match="layer 0"):
        codec.encode(invented(20, spec=other), codec.groups(other, (0, 2)), 0, 1)


def test_values_beyond_the_integers_are_refused() -> None:
    chunk = invented(20)
    for row in (0, 3):
        for options in ({}, {"normalisation": "token"}):
            codec = CacheGen(profile(**options))
            broken = invented(20)
            broken.layers[0].tensors["k"][row, 0, 0] = 3e38
            if row == 0 or not options:
                with pytest.raises(CapacityError):
                    codec.encode(broken, codec.groups(SPEC, (0, 2)), 7, 1)
    assert chunk.num_tokens == 20


# --------------------------------------------------------------------------- torchac
@pytest.mark.long
@pytest.mark.parametrize("level", [0, 4, 7])
def test_torchac_codes_the_same_numbers(level: int) -> None:
    pytest.importorskip("torchac")
    chunk = invented(40, 8)
    chunk.layers[0].tensors["k"][3, 1, 2] = 300.0
    native, size = roundtrip(CacheGen(profile()), chunk, level)
    paper, paper_size = roundtrip(CacheGen(profile(), coder="torchac"), chunk, level)
    for layer in (0, 2):
        for name in ("k", "v"):
            assert torch.equal(paper.layers[layer].tensors[name], native.layers[layer].tensors[name])
    assert 0.5 * size < paper_size < size  # no lanes, so no states


@pytest.mark.long
def test_torchac_segments_are_checked() -> None:
    pytest.importorskip("torchac")
    codec = CacheGen(profile(), coder="torchac")
    group = codec.groups(SPEC, (0, 2))[0]
    segment = codec.encode(invented(12, 3), [group], 7, 1).segments[0][0]
    assert torch.isfinite(_decode(codec, segment, group)[0, "k"]).all()
    for size in (8, 9, 40, len(segment) - 1):
        with pytest.raises(FormatError):
            _decode(codec, segment[:size], group)
    with pytest.raises(FormatError):
        _decode(codec, segment + b"\0", group)
    broken = invented(12)
    broken.layers[0].tensors["k"][0, 0, 0] = 3e38
    with pytest.raises(CapacityError):
        codec.encode(broken, [group], 7, 1)


# --------------------------------------------------------------------------- hostile segments
def _decode(codec: Any, data: bytes, group: Group, tokens: int = 12) -> dict[tuple[int, str], torch.Tensor]:
    chunk = invented(tokens, 3)
    layer = group.layers[0]
    targets = {(layer, n): torch.full_like(t, 7.0) for n, t in chunk.layers[layer].tensors.items()}
    codec.decode(info(chunk), [GroupSegments(group, [memoryview(data)])], targets, 1)
    return targets


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_changed_segments_are_typed_errors_or_numbers(data: st.DataObject) -> None:
    codec = CacheGen(profile(**data.draw(st.sampled_from([{}, {"normalisation": "token"}, {"delta": False}]))))
    chunk = invented(12, 3)
    group = codec.groups(SPEC, (0, 2))[0]
    segment = codec.encode(chunk, [group], 4, 1).segments[0][0]
    if data.draw(st.booleans()):
        changed = segment[: data.draw(st.integers(0, len(segment) - 1))]
    else:
        at = data.draw(st.integers(0, len(segment) - 1))
        changed = segment[:at] + bytes([segment[at] ^ data.draw(st.integers(1, 255))]) + segment[at + 1 :]
    with suppress(FormatError):
        _decode(codec, changed, group)


def test_heads_of_segments_are_checked() -> None:
    codec = CacheGen(profile())
    group = codec.groups(SPEC, (0, 2))[0]
    segment = codec.encode(invented(12, 3), [group], 4, 1).segments[0][0]
    assert torch.isfinite(_decode(codec, segment, group)[0, "k"]).all()
    for at, value in [(0, 8), (1, 1), (2, 1), (3, 1)]:
        changed = bytearray(segment)
        changed[at] = value
        with pytest.raises(FormatError):
            _decode(codec, bytes(changed), group)
    with pytest.raises(Truncated):
        _decode(codec, segment[:7], group)
    with pytest.raises(Truncated):
        _decode(codec, segment[:4] + b"\xff\xff\xff\xff" + segment[8:], group)
    with pytest.raises(FormatError):
        _decode(codec, segment + b"\0\0", group)


def test_groups_of_other_codecs_are_refused() -> None:
    codec = CacheGen(profile())
    segment = codec.encode(invented(12, 3), codec.groups(SPEC, (0, 2))[:1], 4, 1).segments[0][0]
    for group in (Group((0, 2), (0, 2), ("k", "v")), Group((0, 1), (0, 2), ("k",)), Group((1, 2), (0, 1), ())):
        with pytest.raises(FormatError, match="one attention layer"):
            _decode(codec, segment, group)
    with pytest.raises(FormatError, match="heads"):
        _decode(codec, segment, Group((0, 1), (0, 3), ("k", "v")))


# --------------------------------------------------------------------------- tables
def test_channels_are_numbered_by_layer_tensor_head_and_dim() -> None:
    channels = ChannelMap(SPEC)
    assert channels.total == 2 * (8 + 6) + 2 * (4 + 6)
    group = Group((2, 3), (1, 2), ("k", "v"))
    assert channels.channels(group).tolist() == [*range(32, 36), *range(42, 48)]
    assert channels.layer_of().tolist() == [0] * 28 + [2] * 20


def test_alike_channels_share_tables_and_unlike_ones_do_not() -> None:
    rng = np.random.default_rng(0)
    histogram = Histogram.of_deltas(np.array([1.0] * 6 + [8.0] * 3))
    assert histogram.low_bits.tolist() == [0] * 6 + [1] * 3
    spreads = np.array([0.3, 0.3, 0.3, 2.0, 2.0, 2.0, 8.0, 8.0, 8.0])
    q = torch.from_numpy(np.round(rng.normal(0, spreads, (4000, 9))).astype(np.int32))
    histogram.add(np.arange(9), q, q.float())
    bank, ids = share_tables(histogram, 4)
    assert len(set(ids[:3])) == len(set(ids[3:6])) == len(set(ids[6:])) == 1
    assert len(set(ids.tolist())) == 3
    assert bank.low_bits[ids].tolist() == histogram.low_bits.tolist()
    bits = -np.log2(np.maximum(bank.freqs[ids] / 4096, 2.0**-ESCAPE_BITS))
    ideal = 0.0
    for counts in histogram.counts:
        p = counts[counts > 0] / counts.sum()
        ideal -= float((p * np.log2(p)).sum())
    measured = float((histogram.counts * bits).sum() / 4000)
    assert measured < ideal + 0.05 * 9


def test_calibration_is_deterministic() -> None:
    chunks = [invented(64, 1), invented(64, 2)]
    first, second = fit(lambda: chunks, SPEC, {}), fit(lambda: chunks, SPEC, {})
    assert first[0] == second[0]
    assert all(np.array_equal(first[1][name], second[1][name]) for name in first[1])

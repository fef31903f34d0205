"""`channel`: bounded error for any level and shape, keys at any positions, small chunks cheap, bad bytes refused."""

from __future__ import annotations

import math
import struct

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from cachegen.codecs.base import ChunkInfo, EncodedGroups, GroupSegments, Targets
from cachegen.codecs.channel import STEPS, Channel
from cachegen.codecs.channel_bands import BAND, band_edges
from cachegen.errors import CapacityError, FormatError, LevelError
from cachegen.kv import DTYPES, KVChunk, KVSpec, LayerKind, LayerKV, LayerSpec
from cachegen.rope import Rope, rotate, unrotate
from cachegen.transforms.channel import BLOCK, order_tokens, quantise, reference

CODEC = Channel()
LEVELS = range(CODEC.num_levels)


def rope_of(dim: int, interleaved: bool = False) -> Rope:
    freqs = tuple(float(np.float32(10000.0 ** (-2 * i / dim))) for i in range(dim // 2))
    return Rope(freqs, 1.0, dim // 2 * 2, interleaved)


def numbers(tokens: int, heads: int, dim: int, seed: int) -> Tensor:
    """float32 [tokens, heads, dim]: channels of their own mean and deviation."""
    gen = torch.Generator().manual_seed(seed)
    scale = torch.exp(torch.randn(1, heads, dim, generator=gen))
    mean = 2 * torch.randn(1, heads, dim, generator=gen)
    return (torch.randn(tokens, heads, dim, generator=gen) + mean) * scale


def chunk_of(keys: Tensor, values: Tensor, dtype: str = "float32", rope: Rope | None = None, start: int = 5) -> KVChunk:
    """A chunk of one layer from keys before RoPE."""
    positions = torch.arange(start, start + keys.shape[0])
    spec = KVSpec("toy", dtype, (LayerSpec(LayerKind.ATTENTION, keys.shape[1], keys.shape[2], values.shape[2], rope),))
    k = rotate(keys, positions, rope).to(DTYPES[dtype])
    return KVChunk(spec, positions, [LayerKV(LayerKind.ATTENTION, {"k": k, "v": values.to(DTYPES[dtype])})])


def encode(chunk: KVChunk, level: int = 3, threads: int = 1) -> EncodedGroups:
    return CODEC.encode(chunk, CODEC.groups(chunk.spec, chunk.heads), level, threads)


def size_of(encoded: EncodedGroups) -> int:
    return sum(len(segment[0]) for segment in encoded.segments)


def decode(
    chunk: KVChunk, encoded: EncodedGroups, positions: Tensor | None = None, threads: int = 1
) -> dict[tuple[int, str], Tensor]:
    info = ChunkInfo(chunk.spec, chunk.num_tokens, chunk.positions if positions is None else positions, None, (), 0)
    targets: Targets = {(i, name): torch.full_like(t, 77.0) for i, name, t in chunk.tensors()}
    groups = CODEC.groups(chunk.spec, chunk.heads)
    groups = [type(g)(g.layers, g.heads, g.names, chunk.layers[g.layers[0]].tokens) for g in groups]
    parts = [GroupSegments(g, [memoryview(s[0])]) for g, s in zip(groups, encoded.segments, strict=True)]
    CODEC.decode(info, parts, targets, threads)
    return dict(targets)


def unrotated(chunk: KVChunk, keys: Tensor) -> Tensor:
    return unrotate(keys.float(), chunk.positions, chunk.spec.layers[0].rope)


def relative_error(got: Tensor, want: Tensor) -> float:
    """Root mean square error over the typical deviation of channels."""
    spread = want.float().flatten(1).var(0).mean().sqrt()
    return float((got.float() - want.float()).square().mean().sqrt() / spread)


# ---------------------------------------------------------------------- error and size
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_levels_trade_error_for_bits(dtype: str) -> None:
    keys, values = numbers(256, 2, 32, 1), numbers(256, 2, 32, 2)
    chunk = chunk_of(keys, values, dtype, rope_of(32))
    sizes, errors = [], []
    for level in LEVELS:
        encoded = encode(chunk, level)
        got = decode(chunk, encoded)
        sizes.append(8 * size_of(encoded) / chunk.elements)
        errors.append(
            max(
                relative_error(unrotated(chunk, got[0, "k"]), unrotated(chunk, chunk.layers[0].tensors["k"])),
                relative_error(got[0, "v"], chunk.layers[0].tensors["v"]),
            )
        )
        # Uniform error of a step is step / sqrt(12); dead zones and low-rate channels add to it, bf16 has a floor.
        assert errors[-1] < 0.45 * STEPS[level] + 0.02
    assert sizes == sorted(sizes)
    assert errors == sorted(errors, reverse=True)
    assert sizes[0] < 2.2
    assert 5.5 < sizes[-1] < 8.5


def test_real_cache(smollm2_chunk: KVChunk) -> None:
    chunk = smollm2_chunk.slice(0, 256)
    assert 8 * size_of(encode(chunk, 0)) / chunk.elements < 1.8
    encoded = encode(chunk, CODEC.default_level)
    assert 8 * size_of(encoded) / chunk.elements < 3.2
    got = decode(chunk, encoded)
    for layer in (0, 12, 29):
        assert relative_error(got[layer, "v"], chunk.layers[layer].tensors["v"]) < 0.3
    assert 8 * size_of(encode(chunk, 11)) / chunk.elements < 7.5


def test_the_first_token_of_a_context_is_kept_exactly(smollm2_chunk: KVChunk) -> None:
    """The sink: its loss would grow every other token's."""
    chunk = smollm2_chunk.slice(0, 256)
    got = decode(chunk, encode(chunk, 3))
    first, others = [], []
    for layer in range(2, 30):
        error = (got[layer, "k"].float() - chunk.layers[layer].tensors["k"].float()).square().mean((1, 2))
        first.append(float(error[0]))
        others.append(float(error[32:].mean()))
    assert sum(first) < sum(others) / 50


def test_short_chunks_stay_cheap(smollm2_chunk: KVChunk) -> None:
    for start, stop, most in ((0, 1, 16.1), (50, 51, 6), (50, 58, 4.5), (40, 88, 3.8)):
        chunk = smollm2_chunk.slice(start, stop)
        assert 8 * size_of(encode(chunk, 3)) / chunk.elements < most
    for level in (6, 11):
        chunk = smollm2_chunk.slice(50, 51)
        assert size_of(encode(chunk, level)) <= chunk.nbytes + len(chunk.layers)


@settings(max_examples=80, deadline=None)
@given(
    tokens=st.integers(1, 90),
    heads=st.integers(1, 4),
    half=st.integers(1, 12),
    v_dim=st.integers(1, 20),
    level=st.sampled_from([0, 3, 7, 11]),
    dtype=st.sampled_from(["bfloat16", "float16", "float32"]),
    rope=st.sampled_from(["none", "half", "interleaved"]),
    start=st.sampled_from([0, 5]),
    seed=st.integers(0, 100),
)
def test_error_is_bounded_for_any_shape(
    tokens: int, heads: int, half: int, v_dim: int, level: int, dtype: str, rope: str, start: int, seed: int
) -> None:
    """No number is off by more than a step (1 - rounding of the zero bin), rounding and rotation apart."""
    keys, values = numbers(tokens, heads, 2 * half, seed), numbers(tokens, heads, v_dim, seed + 1)
    turn = None if rope == "none" else rope_of(2 * half, rope == "interleaved")
    chunk = chunk_of(keys, values, dtype, turn, start)
    encoded = encode(chunk, level)
    assert size_of(encoded) <= chunk.nbytes + 1
    got = decode(chunk, encoded)
    precision = {"bfloat16": 2.0**-7, "float16": 2.0**-10, "float32": 2.0**-18}[dtype]
    for name, want in (
        ("k", unrotated(chunk, chunk.layers[0].tensors["k"])),
        ("v", chunk.layers[0].tensors["v"].float()),
    ):
        have = unrotated(chunk, got[0, name]) if name == "k" else got[0, name].float()
        # Weights make tokens up to 2^(4 / 2) = 4 times coarser.
        most = 4 * 0.75 * STEPS[level] * float(want.flatten(1).abs().max())
        assert float((have - want).abs().max()) <= most + 4 * precision * float(want.abs().max())


@pytest.mark.parametrize("special", ["zeros", "constant", "outlier", "tiny", "huge", "one channel"])
def test_odd_numbers(special: str) -> None:
    keys = numbers(64, 2, 16, 3)
    if special == "zeros":
        keys = torch.zeros_like(keys)
    elif special == "constant":
        keys = torch.full_like(keys, -3.25)
    elif special == "outlier":
        keys[10, 1, 3] = 1e7
    elif special == "tiny":
        keys = keys * 1e-30
    elif special == "huge":
        keys = keys * 1e30
    else:
        keys[:, :, 1:] = 0
    chunk = chunk_of(keys, keys.clone())
    got = decode(chunk, encode(chunk, 6))
    for name in ("k", "v"):
        spread = float(keys.double().flatten(1).var(0).mean().sqrt())
        assert torch.isfinite(got[0, name]).all()
        assert float((got[0, name] - keys).abs().max()) <= 4 * STEPS[6] * spread + 2.0**-12 * float(keys.abs().max())


def test_numbers_that_no_integer_holds_are_refused() -> None:
    keys = numbers(64, 1, 8, 4)
    keys[3] = 3e38
    chunk = chunk_of(keys, keys.clone(), rope=rope_of(8))
    with pytest.raises(CapacityError):
        encode(chunk, 11)


# ---------------------------------------------------------------------- positions, layers, layouts
@pytest.mark.parametrize("tokens", [1, 20, 100])
def test_moved_positions_are_rotations_of_the_decoded_keys(tokens: int) -> None:
    rope = rope_of(32)
    chunk = chunk_of(numbers(tokens, 2, 32, 5), numbers(tokens, 2, 8, 6), rope=rope)
    encoded = encode(chunk)
    moved = torch.arange(1000, 1000 + 2 * tokens, 2)
    here, there = decode(chunk, encoded), decode(chunk, encoded, moved)
    expected = rotate(unrotated(chunk, here[0, "k"]), moved, rope)
    assert torch.allclose(there[0, "k"], expected, atol=1e-4 * float(expected.abs().max()))
    assert torch.equal(there[0, "v"], here[0, "v"])


def test_a_layer_decodes_alone_and_in_any_company() -> None:
    spec = KVSpec("toy", "bfloat16", tuple(LayerSpec(LayerKind.ATTENTION, 2, 16, 8, rope_of(16)) for _ in range(3)))
    layers = [
        LayerKV(LayerKind.ATTENTION, {"k": numbers(70, 2, 16, i).bfloat16(), "v": numbers(70, 2, 8, i + 9).bfloat16()})
        for i in range(3)
    ]
    chunk = KVChunk(spec, torch.arange(70), layers)
    encoded = encode(chunk, threads=2)
    everything = decode(chunk, encoded, threads=2)
    info = ChunkInfo(spec, 70, chunk.positions, None, (), 3)
    targets: Targets = {(1, n): torch.empty_like(layers[1].tensors[n]) for n in ("k", "v")}
    group = CODEC.groups(spec, (0, 2))[1]
    CODEC.decode(info, [GroupSegments(group, [memoryview(encoded.segments[1][0])])], targets, 1)
    for name in ("k", "v"):
        assert torch.equal(targets[1, name], everything[1, name])


def test_sliding_windows_rotate_by_their_own_tokens() -> None:
    rope = rope_of(16)
    keys, values = numbers(40, 2, 16, 7), numbers(40, 2, 16, 8)
    positions = torch.arange(100, 160)
    spec = KVSpec("toy", "float32", (LayerSpec(LayerKind.SLIDING, 2, 16, 16, rope, window=40),))
    held = {"k": rotate(keys, positions[20:], rope), "v": values}
    chunk = KVChunk(spec, positions, [LayerKV(LayerKind.SLIDING, held, (20, 60))])
    groups = [type(g)(g.layers, g.heads, g.names, (20, 60)) for g in CODEC.groups(spec, (0, 2))]
    encoded = CODEC.encode(chunk, groups, 11, 1)
    got = decode(chunk, encoded)
    assert relative_error(got[0, "k"], held["k"]) < 0.03
    assert relative_error(got[0, "v"], values) < 0.03


def test_strided_targets_and_a_rank_s_heads() -> None:
    spec = KVSpec("toy", "bfloat16", (LayerSpec(LayerKind.ATTENTION, 4, 16, 16, rope_of(16)),))
    k, v = numbers(70, 2, 16, 1).bfloat16(), numbers(70, 2, 16, 2).bfloat16()
    chunk = KVChunk(spec, torch.arange(70), [LayerKV(LayerKind.ATTENTION, {"k": k, "v": v})], head_range=(2, 4))
    assert CODEC.groups(spec, (2, 4))[0].heads == (2, 4)
    encoded = encode(chunk, 5)
    plain = decode(chunk, encoded)
    room = torch.full((2, 70, 40), 5.0, dtype=torch.bfloat16)
    targets: Targets = {(0, "k"): room[:, :, :16].transpose(0, 1), (0, "v"): room[:, :, 20:36].transpose(0, 1)}
    info = ChunkInfo(spec, 70, chunk.positions, None, (), 5)
    CODEC.decode(info, [GroupSegments(CODEC.groups(spec, (2, 4))[0], [memoryview(encoded.segments[0][0])])], targets, 1)
    assert torch.equal(room[:, :, :16].transpose(0, 1), plain[0, "k"])
    assert torch.equal(room[:, :, 20:36].transpose(0, 1), plain[0, "v"])
    assert (room[:, :, 16:20] == 5).all()
    assert (room[:, :, 36:] == 5).all()


def test_long_chunks_are_cut_into_bands() -> None:
    chunk = chunk_of(numbers(1100, 1, 16, 9), numbers(1100, 1, 8, 10))
    got = decode(chunk, encode(chunk, 8))
    assert relative_error(got[0, "k"], chunk.layers[0].tensors["k"]) < 0.1
    for tokens, channels in ((1, 8), (32, 8), (256, 1024), (481, 64), (5000, 64), (300, 1 << 20)):
        edges = list(band_edges(tokens, channels))
        assert [a for a, _ in edges] == [0, *(b for _, b in edges[:-1])]
        assert edges[-1][1] == tokens
        assert all(b - a <= BAND and (a % BLOCK == 0) for a, b in edges)
        assert all((b - a) * channels <= max(1 << 19, 32 * channels) for a, b in edges)


# ---------------------------------------------------------------------- transform
def test_tokens_are_ranked_by_how_far_they_point_from_the_mean_key() -> None:
    keys = numbers(100, 2, 32, 11)
    keys[41] = -20 * keys.mean(0)
    order = order_tokens(keys, starts_context=False)
    assert 41 in order.order[: order.outliers].tolist()
    assert order.outliers < 5
    assert sorted(order.order.tolist()) == list(range(100))
    assert len(order.weights) == 4
    assert list(order.weights) == sorted(order.weights, reverse=True)
    assert int(order_tokens(numbers(100, 2, 32, 11), starts_context=True).order[0]) == 0


def test_the_quantiser_has_a_dead_zone() -> None:
    x = torch.tensor([0.0, 0.61, -0.61, 0.63, -0.63, 1.61, 1.63, -100.0])
    assert quantise(x, torch.tensor(1.0), 0.38).tolist() == [0, 0, 0, 1, -1, 1, 2, -100]


def test_the_reference_is_the_typical_deviation() -> None:
    values = numbers(500, 1, 64, 12).flatten(1)
    assert reference(values) == pytest.approx(float(values.var(0).mean().sqrt()), rel=1e-4)
    assert reference(values * 1e30) == pytest.approx(1e30 * reference(values), rel=1e-4)
    assert reference(torch.zeros(3, 4)) == 1.0


# ---------------------------------------------------------------------- config and hostile segments
def test_config() -> None:
    assert isinstance(Channel.from_config(CODEC.get_config()), Channel)
    with pytest.raises(FormatError):
        Channel.from_config({"levels": 3})
    chunk = chunk_of(numbers(4, 1, 8, 1), numbers(4, 1, 8, 1))
    with pytest.raises(LevelError):
        encode(chunk, len(STEPS))
    assert 0 <= CODEC.default_level < CODEC.num_levels
    assert CODEC.num_levels >= 6


def survives(chunk: KVChunk, segment: bytes) -> bool:
    try:
        decode(chunk, EncodedGroups([[segment]]))
    except FormatError:
        return False
    return True


def hostile(tokens: int, level: int = 3) -> tuple[KVChunk, bytes]:
    chunk = chunk_of(numbers(tokens, 1, 8, 13), numbers(tokens, 1, 4, 14), "bfloat16", rope_of(8), start=0)
    return chunk, encode(chunk, level).segments[0][0]


@pytest.mark.parametrize("tokens", [1, 9, 70])
def test_truncations_and_longer_segments_are_refused(tokens: int) -> None:
    chunk, segment = hostile(tokens)
    for size in range(len(segment)):
        assert not survives(chunk, segment[:size])
    assert not survives(chunk, segment + b"\0")


@pytest.mark.parametrize("tokens", [1, 9, 70, 130])
def test_flips_give_an_error_or_a_tensor(tokens: int) -> None:
    chunk, segment = hostile(tokens)
    rng = np.random.default_rng(tokens)
    refused = 0
    for at in [*range(min(200, len(segment))), *rng.integers(0, len(segment), 200)]:
        flipped = bytearray(segment)
        flipped[at] ^= 1 << int(rng.integers(8))
        refused += not survives(chunk, bytes(flipped))
    assert refused > (20 if tokens > 32 else 0)


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 3), st.binary(max_size=120))
def test_garbage(mode: int, data: bytes) -> None:
    chunk, _ = hostile(9)
    header = bytes([mode, 0, 0]) + struct.pack("<2f", 0.5, 0.25)
    for segment in (bytes([mode]) + data, header + data):
        assert not survives(chunk, segment) or mode == 3


def test_steps_that_are_no_steps_are_refused() -> None:
    chunk, segment = hostile(70)
    for step in (0.0, -1.0, math.inf, math.nan, 2.0**101, 1e-40):
        for at in (3, 7):
            assert not survives(chunk, segment[:at] + struct.pack("<f", step) + segment[at + 4 :])

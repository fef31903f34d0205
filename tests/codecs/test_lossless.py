"""`lossless`: every bit back, for any dtype, shape, layer kind and strides; hostile segments refused."""

from __future__ import annotations

import struct
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from cachegen.codecs.base import ChunkInfo, EncodedGroups, GroupSegments, Targets
from cachegen.codecs.exponents import FLOAT_TYPES, fit
from cachegen.codecs.lossless import Lossless
from cachegen.errors import FormatError, InputError, LevelError, LimitExceeded
from cachegen.kv import DTYPES, KVChunk, KVSpec, LayerKind, LayerKV, LayerSpec

CODERS = [Lossless(), Lossless("zstd", 3)]
both = pytest.mark.parametrize("codec", CODERS, ids=["rans", "zstd"])
every_dtype = pytest.mark.parametrize("dtype", list(DTYPES))


def bits(tensor: Tensor) -> Tensor:
    return tensor.contiguous().reshape(-1).view(torch.uint8)


def chunk_of(k: Tensor, v: Tensor, dtype: str, kind: LayerKind = LayerKind.ATTENTION) -> KVChunk:
    """[layers, tokens, heads, dim] as a chunk."""
    spec = KVSpec("toy", dtype, tuple(LayerSpec(kind, k.shape[2], k.shape[3], v.shape[3]) for _ in range(len(k))))
    names = spec.layers[0].names
    layers = [LayerKV(kind, dict(zip(names, pair, strict=True))) for pair in zip(k, v, strict=True)]
    return KVChunk(spec, torch.arange(k.shape[1]), layers)


def noise(shape: tuple[int, ...], dtype: str, seed: int) -> Tensor:
    """Numbers like a cache's: channels of their own scale and mean."""
    gen = torch.Generator().manual_seed(seed)
    scale = torch.exp(torch.randn(*shape[:-3], 1, *shape[-2:], generator=gen))
    mean = torch.randn(*shape[:-3], 1, *shape[-2:], generator=gen)
    return ((torch.randn(shape, generator=gen) + mean) * scale).to(DTYPES[dtype])


def raw_bits(shape: tuple[int, ...], dtype: str, seed: int) -> Tensor:
    """Any bit patterns: NaN payloads, infinities, subnormals, -0."""
    size = torch.empty((), dtype=DTYPES[dtype]).element_size()
    gen = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (*shape[:-1], shape[-1] * size), dtype=torch.uint8, generator=gen).view(DTYPES[dtype])


def decode(codec: Lossless, chunk: KVChunk, encoded: EncodedGroups, threads: int = 1) -> Targets:
    groups = codec.groups(chunk.spec, chunk.heads)
    info = ChunkInfo(chunk.spec, chunk.num_tokens, chunk.positions, None, (), 0)
    targets: Targets = {
        (i, name): torch.empty_like(t) for i, name, t in chunk.tensors() if chunk.layers[i].kind is not LayerKind.STATE
    }
    parts = [GroupSegments(g, [memoryview(s[0])]) for g, s in zip(groups, encoded.segments, strict=True)]
    codec.decode(info, parts, targets, threads)
    return targets


def encode(codec: Lossless, chunk: KVChunk, threads: int = 1) -> EncodedGroups:
    return codec.encode(chunk, codec.groups(chunk.spec, chunk.heads), 0, threads)


def check(codec: Lossless, chunk: KVChunk, threads: int = 1) -> int:
    """Bytes of the segments, after all tensors and scales came back bit for bit."""
    encoded = encode(codec, chunk, threads)
    targets = decode(codec, chunk, encoded, threads)
    for i, name, tensor in chunk.tensors():
        got = targets[i, name]
        assert got.dtype == tensor.dtype
        assert got.shape == tensor.shape
        assert torch.equal(bits(got), bits(tensor)), (i, name)
        scale = chunk.layers[i].scales.get(name)
        if scale is not None:
            assert torch.equal(bits(targets[i, name + ".scale"]), bits(scale))
    return sum(len(segment[0]) for segment in encoded.segments)


@both
def test_real_cache_is_exact_and_small(codec: Lossless, smollm2_chunk: KVChunk) -> None:
    chunk = smollm2_chunk.slice(0, 256)
    ratio = check(codec, chunk) / chunk.nbytes
    assert ratio < (0.68 if codec.coder == "rans" else 0.75)


def test_small_chunks_of_a_real_cache_shrink_too(smollm2_chunk: KVChunk) -> None:
    for start, stop, most in ((0, 1, 0.8), (40, 41, 0.8), (64, 80, 0.72), (100, 148, 0.70)):
        chunk = smollm2_chunk.slice(start, stop)
        assert check(CODERS[0], chunk) / chunk.nbytes < most


@both
@every_dtype
def test_every_dtype(codec: Lossless, dtype: str) -> None:
    k, v = noise((2, 70, 3, 24), dtype, 1), noise((2, 70, 3, 16), dtype, 2)
    chunk = chunk_of(k, v, dtype)
    assert check(codec, chunk) < 0.93 * chunk.nbytes


@both
@every_dtype
def test_random_bits_are_exact_and_cost_a_few_bytes(codec: Lossless, dtype: str) -> None:
    chunk = chunk_of(raw_bits((2, 33, 2, 8), dtype, 3), raw_bits((2, 33, 2, 8), dtype, 4), dtype)
    assert check(codec, chunk) <= chunk.nbytes + 4 * len(chunk.layers)


@both
@every_dtype
def test_special_values_among_numbers(codec: Lossless, dtype: str) -> None:
    """Enough numbers that coding pays, so that the special values go through symbols, escapes and planes."""
    k = noise((1, 64, 2, 16), dtype, 5)
    special = raw_bits((k.numel() // 50,), dtype, 6)
    k.view(-1)[::50][: len(special)] = special
    k.view(-1)[1] = -0.0
    k[0, :, 0, 3] = 0.0
    check(codec, chunk_of(k, k.flip(1).clone(), dtype))


@settings(max_examples=60, deadline=None)
@given(
    shape=st.tuples(st.integers(1, 2), st.integers(1, 70), st.integers(1, 4), st.integers(1, 20)),
    v_dim=st.integers(1, 20),
    dtype=st.sampled_from(list(DTYPES)),
    seed=st.integers(0, 1000),
    odd=st.sampled_from(["numbers", "bits", "zeros", "constant"]),
    codec=st.sampled_from(CODERS),
)
def test_any_shape(
    shape: tuple[int, int, int, int], v_dim: int, dtype: str, seed: int, odd: str, codec: Lossless
) -> None:
    make: dict[str, Any] = {
        "numbers": noise,
        "bits": raw_bits,
        "zeros": lambda shape, dtype, _: torch.zeros(shape).to(DTYPES[dtype]),
        "constant": lambda shape, dtype, _: torch.full(shape, -1.5).to(DTYPES[dtype]),
    }
    k, v = make[odd](shape, dtype, seed), make[odd]((*shape[:3], v_dim), dtype, seed + 1)
    check(codec, chunk_of(k, v, dtype))


@both
def test_strided_views_in_and_out(codec: Lossless) -> None:
    """Engines hold [heads, tokens, dim], or interleave K and V: rows and heads have strides of their own."""
    pool = noise((1, 4, 80, 40), "bfloat16", 7)[0]
    k, v = pool[:, :64, :24].transpose(0, 1), pool[:, 16:, 24:].transpose(0, 1)
    chunk = chunk_of(k[None], v[None], "bfloat16")
    encoded = encode(codec, chunk)
    room = torch.zeros(64, 4, 64, dtype=torch.bfloat16)
    targets: Targets = {(0, "k"): room[:, :, :24], (0, "v"): room[:, :, 30:46]}
    info = ChunkInfo(chunk.spec, 64, chunk.positions, None, (), 0)
    codec.decode(
        info, [GroupSegments(codec.groups(chunk.spec, (0, 4))[0], [memoryview(encoded.segments[0][0])])], targets, 1
    )
    assert torch.equal(room[:, :, :24], k)
    assert torch.equal(room[:, :, 30:46], v)
    assert not room[:, :, 24:30].any()
    assert not room[:, :, 46:].any()


@both
def test_matrices_of_several_blocks_and_threads(codec: Lossless) -> None:
    k = noise((3, 300, 8, 256), "bfloat16", 8)  # 4096 columns: three blocks of 128 rows
    check(codec, chunk_of(k, k + 1, "bfloat16"), threads=3)


@both
def test_many_tokens_of_few_columns(codec: Lossless) -> None:
    k = noise((1, 5000, 1, 4), "bfloat16", 19)
    chunk = chunk_of(k, k, "bfloat16")
    assert check(codec, chunk) < 0.8 * chunk.nbytes


def test_bf16_widened_to_fp32_costs_what_bf16_does() -> None:
    k = noise((1, 128, 2, 32), "bfloat16", 9)
    narrow, wide = chunk_of(k, k, "bfloat16"), chunk_of(k.float(), k.float(), "float32")
    assert check(CODERS[0], wide) <= check(CODERS[0], narrow)


@both
def test_latent_and_sliding_layers(codec: Lossless) -> None:
    latent, rope = noise((2, 50, 1, 48), "bfloat16", 10), noise((2, 50, 1, 8), "bfloat16", 11)
    check(codec, chunk_of(latent, rope, "bfloat16", LayerKind.MLA))
    k = noise((1, 50, 2, 16), "float16", 12)
    chunk = chunk_of(k, k, "float16", LayerKind.SLIDING)
    chunk.layers[0] = LayerKV(LayerKind.SLIDING, {"k": k[0, 20:], "v": k[0, 20:]}, (20, 50))
    check(codec, chunk)


@both
def test_states_carry_their_own_names_shapes_and_dtypes(codec: Lossless) -> None:
    spec = KVSpec("ssm", "bfloat16", (LayerSpec(LayerKind.STATE, 1, 1, 1), LayerSpec(LayerKind.STATE, 1, 1, 1)))
    states = {
        "conv": noise((1, 1, 96, 4), "bfloat16", 13),
        "ssm": noise((2, 40, 3, 16), "float32", 14).transpose(0, 1),
        "wide": noise((1, 2, 1, 12000), "float16", 15).flatten(),
        "flag": torch.tensor(1.25),
        "none": torch.empty(0, 3, dtype=torch.float16),
        "größe": raw_bits((5, 3), "float8_e5m2", 16),
    }
    chunk = KVChunk(
        spec, torch.arange(7), [LayerKV(LayerKind.STATE, states), LayerKV(LayerKind.STATE, {"x": states["conv"]})]
    )
    encoded = encode(codec, chunk)
    targets = decode(codec, chunk, encoded)
    assert set(targets) == {*((0, name) for name in states), (1, "x")}
    for name, state in states.items():
        assert targets[0, name].shape == state.shape
        assert targets[0, name].dtype == state.dtype
        assert torch.equal(bits(targets[0, name].reshape(-1)), bits(state.reshape(-1)))


@both
def test_fp8_scales(codec: Lossless) -> None:
    k = noise((2, 40, 2, 16), "float8_e4m3fn", 17)
    chunk = chunk_of(k, k, "float8_e4m3fn")
    gen = torch.Generator().manual_seed(1)
    chunk.layers[0].scales = {"v": torch.rand(40, 2, 1, generator=gen), "k": torch.tensor(0.5)}
    chunk.layers[1].scales = {"k": torch.rand(1, 2, 1, generator=gen).to(torch.bfloat16)}
    check(codec, chunk)


def test_a_rank_codes_its_own_heads() -> None:
    spec = KVSpec("toy", "bfloat16", (LayerSpec(LayerKind.ATTENTION, 4, 8, 8),))
    k = noise((1, 32, 2, 8), "bfloat16", 18)[0]
    chunk = KVChunk(spec, torch.arange(32), [LayerKV(LayerKind.ATTENTION, {"k": k, "v": k})], head_range=(2, 4))
    assert CODERS[0].groups(spec, (2, 4))[0].heads == (2, 4)
    check(CODERS[0], chunk)


# ---------------------------------------------------------------------- config
def test_config_round_trip() -> None:
    for codec in (Lossless(), Lossless("zstd", 7)):
        again = Lossless.from_config(codec.get_config())
        assert (again.coder, again.get_config()) == (codec.coder, codec.get_config())
    assert Lossless.from_config({"coder": "zstd", "level": 7}).level == 7


@pytest.mark.parametrize(
    "config", [{"coder": "lzma"}, {"coder": "zstd", "level": 0}, {"coder": "zstd", "level": True}, {"size": 1}]
)
def test_bad_configs(config: dict[str, Any]) -> None:
    with pytest.raises(FormatError):
        Lossless.from_config(config)


def test_bad_arguments() -> None:
    with pytest.raises(InputError):
        Lossless("lzma")
    chunk = chunk_of(noise((1, 4, 1, 8), "bfloat16", 1), noise((1, 4, 1, 8), "bfloat16", 1), "bfloat16")
    with pytest.raises(LevelError):
        CODERS[0].encode(chunk, CODERS[0].groups(chunk.spec, chunk.heads), 1, 1)


# ---------------------------------------------------------------------- hostile segments
def survives(codec: Lossless, chunk: KVChunk, segment: bytes) -> bool:
    """Decode bytes that may be anything: a FormatError (False), or tensors of the right shapes (True)."""
    try:
        targets = decode(codec, chunk, EncodedGroups([[segment]]))
    except FormatError:
        return False
    for i, name, tensor in chunk.tensors():
        assert targets[i, name].shape == tensor.shape
    return True


def hostile_chunks() -> list[tuple[Lossless, KVChunk]]:
    chunks = []
    for dtype in ("bfloat16", "float16", "float32", "float8_e4m3fn"):
        k = noise((1, 40, 1, 16), dtype, 20)
        k.view(-1)[7] = 0.0
        chunk = chunk_of(k, k.flip(1).clone(), dtype)
        if dtype == "float8_e4m3fn":
            chunk.layers[0].scales = {"k": torch.rand(40, 1, 1)}
        chunks += [(codec, chunk) for codec in CODERS]
    return chunks


@pytest.mark.parametrize("index", range(8))
def test_truncations_and_longer_segments_are_refused(index: int) -> None:
    codec, chunk = hostile_chunks()[index]
    (segment,) = encode(codec, chunk).segments[0]
    for size in range(len(segment)):
        assert not survives(codec, chunk, segment[:size])
    assert not survives(codec, chunk, segment + b"\0")


@pytest.mark.parametrize("index", range(8))
def test_flips_give_an_error_or_a_tensor(index: int) -> None:
    """Without the container's checksums: whatever the bytes, nothing crashes, hangs or leaves its buffers."""
    codec, chunk = hostile_chunks()[index]
    (segment,) = encode(codec, chunk).segments[0]
    rng = np.random.default_rng(index)
    refused = 0
    for at in [*range(min(150, len(segment))), *rng.integers(0, len(segment), 250)]:
        flipped = bytearray(segment)
        flipped[at] ^= 1 << int(rng.integers(8))
        refused += not survives(codec, chunk, bytes(flipped))
    assert refused > 10


@settings(max_examples=100, deadline=None)
@given(st.binary(max_size=200), st.sampled_from([0, 1, 2]))
def test_garbage(data: bytes, mode: int) -> None:
    k = torch.zeros(1, 3, 1, 8, dtype=torch.bfloat16)
    assert not survives(CODERS[0], chunk_of(k, k, "bfloat16"), bytes([mode]) + data) or len(data) == 97


def test_huge_states_are_refused_before_memory_is_given() -> None:
    spec = KVSpec("ssm", "bfloat16", (LayerSpec(LayerKind.STATE, 1, 1, 1),))
    chunk = KVChunk(spec, torch.arange(1), [LayerKV(LayerKind.STATE, {})])
    for dims in ((1 << 31, 4), (1 << 16, 1 << 16, 1 << 16, 1 << 16), (1 << 27,)):
        array = struct.pack(f"<BB{len(dims)}I", 0, len(dims), *dims) + b"\x01\x00\x00\x00\x00"
        segment = struct.pack("<HB", 1, 1) + b"x" + array
        with pytest.raises((LimitExceeded, FormatError)):
            decode(CODERS[0], chunk, EncodedGroups([[segment]]))


def states_segment(arrays: list[bytes]) -> bytes:
    named = [struct.pack("<B", 2) + bytes([97 + i // 26, 97 + i % 26]) + array for i, array in enumerate(arrays)]
    return struct.pack("<H", len(arrays)) + b"".join(named)


@pytest.mark.parametrize(("mode", "body"), [(1, 4096), (2, 256)], ids=["rans", "zstd"])
def test_arrays_of_a_small_segment_cannot_claim_much_memory_together(
    mode: int, body: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each array passes for itself, as the bytes behind it, or its zstd frames, might hold it; their sum doesn't."""
    given = 0
    genuine = torch.empty

    def counting(*args: Any, **named: Any) -> Tensor:
        nonlocal given
        tensor = genuine(*args, **named)
        given += tensor.numel() * tensor.element_size()
        return tensor

    spec = KVSpec("ssm", "bfloat16", (LayerSpec(LayerKind.STATE, 1, 1, 1),))
    chunk = KVChunk(spec, torch.arange(1), [LayerKV(LayerKind.STATE, {})])
    elements = 1 << 24 if mode == 2 else 1 << 16
    record = struct.pack("<BI", mode, body) + b"\0" * body
    segment = states_segment([struct.pack("<BBI", 0, 1, elements) + record] * 40)
    monkeypatch.setattr("cachegen.codecs.lossless.torch.empty", counting)
    with pytest.raises((LimitExceeded, FormatError)):
        decode(CODERS[0], chunk, EncodedGroups([[segment]]))
    assert given <= 256 * len(segment) + (1 << 26)
    if mode == 1:
        assert given == 0


def test_states_of_zeros_beyond_the_budget_are_written_so_that_they_can_be_read() -> None:
    spec = KVSpec("ssm", "bfloat16", (LayerSpec(LayerKind.STATE, 1, 1, 1),))
    zeros = torch.zeros(9 << 12, 1 << 10, dtype=torch.bfloat16)  # 72 MiB; a few KB by zstd
    chunk = KVChunk(spec, torch.arange(1), [LayerKV(LayerKind.STATE, {"s": zeros})])
    encoded = encode(CODERS[1], chunk)
    assert torch.equal(decode(CODERS[1], chunk, encoded)[0, "s"].view(torch.int16), zeros.view(torch.int16))


def test_zstd_frames_that_state_another_size_are_refused() -> None:
    import zstandard

    k = torch.zeros(1, 4, 1, 8, dtype=torch.bfloat16)
    chunk = chunk_of(k, k, "bfloat16")
    bomb = zstandard.compress(b"\0" * (1 << 24))
    body = struct.pack("<2I", len(bomb), len(bomb)) + 2 * bomb
    assert not survives(CODERS[1], chunk, struct.pack("<BI", 2, len(body)) + body + b"\0")


# ---------------------------------------------------------------------- models of exponents
def test_models_cost_little_more_than_entropy() -> None:
    """Channels of two kinds: two clusters of tables are found, and tables are proper."""
    rng = np.random.default_rng(0)
    counts = np.zeros((64, 256), dtype=np.uint32)
    for c in range(64):
        depth = rng.geometric(0.5 if c % 2 else 0.15, 256) + 120 - c
        counts[c] = np.bincount(255 - np.minimum(depth, 255), minlength=256)
    model, bits_needed = fit(counts, np.array([0]), FLOAT_TYPES[0])
    ideal = 0.0
    for row in counts:
        p = row[row > 0] / 256
        ideal -= 256 * float((p * np.log2(p)).sum())
    assert bits_needed < 1.25 * ideal
    assert (model.freqs.sum(1) == 4096).all()
    assert model.freqs.max() < 4096

"""Baselines: their known errors and byte counts, on drawn caches."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from cachegen.evaluation.baselines import (
    BASELINES,
    Bf16,
    CodecScheme,
    Fp8,
    GroupwiseInt,
    Hadamard,
    Kivi,
    Scheme,
    Zstd,
    hadamard_rotation,
    join,
    lloyd_max,
    make_scheme,
    pieces,
)
from cachegen.evaluation.metrics import bits_per_element

from cachegen.codec import Codec
from cachegen.errors import InputError
from cachegen.fingerprint import Fingerprint
from cachegen.kv import KVChunk, KVSpec, LayerKind, LayerKV, LayerSpec

HEADS, DIM = 2, 64


def drawn(tokens: int = 300, layers: int = 2, seed: int = 0) -> KVChunk:
    generator = torch.Generator().manual_seed(seed)
    spec = KVSpec("llama", "bfloat16", (LayerSpec(LayerKind.ATTENTION, HEADS, DIM, DIM),) * layers)
    made = [
        LayerKV(
            LayerKind.ATTENTION,
            {n: torch.randn(tokens, HEADS, DIM, generator=generator).to(torch.bfloat16) for n in ("k", "v")},
        )
        for _ in range(layers)
    ]
    return KVChunk(spec, torch.arange(tokens), made)


def error(a: KVChunk, b: KVChunk, name: str = "k") -> float:
    """Mean squared error of one tensor, relative to its power."""
    x, y = a.layers[0].tensors[name].float(), b.layers[0].tensors[name].float()
    return float((x - y).square().mean() / x.square().mean())


@pytest.mark.parametrize("scheme", [baseline() for baseline in BASELINES], ids=lambda s: s.name)
def test_every_level_returns_a_chunk_like_the_original_and_leaves_that_alone(scheme: Scheme) -> None:
    chunk = drawn()
    before = [t.clone() for _, _, t in chunk.tensors()]
    for level in scheme.levels:
        coded = scheme.apply(chunk, level)
        coded.chunk.validate()
        assert coded.chunk.spec == chunk.spec
        assert coded.nbytes > 0
        assert error(chunk, coded.chunk) < 0.2
    assert all(torch.equal(a, b) for a, (_, _, b) in zip(before, chunk.tensors(), strict=True))
    with pytest.raises(InputError, match="levels are"):
        scheme.apply(chunk, "no such level")


def test_exact_ones_are_exact() -> None:
    chunk = drawn()
    for scheme in (Bf16(), Zstd()):
        coded = scheme.apply(chunk, scheme.levels[0])
        assert all(torch.equal(a[2], b[2]) for a, b in zip(chunk.tensors(), coded.chunk.tensors(), strict=True))
    assert Bf16().apply(chunk, "16").nbytes == chunk.nbytes
    assert Zstd().apply(chunk, "3").nbytes < chunk.nbytes


@pytest.mark.parametrize(
    ("scheme", "level", "bits"),
    [
        (GroupwiseInt(), "4/64", 4.5),
        (GroupwiseInt(), "4/32", 5.0),
        (GroupwiseInt(), "8/64", 8.5),
        (Hadamard(), "3", 3.25),
        (Fp8(), "tensor", 8 + 32 / (300 * HEADS * DIM)),
        (Fp8(), "head", 8 + 32 / (300 * DIM)),
        # 300 - 128 tokens make five groups of 32; the 140 others stay at 16 bits.
        (Kivi(), "2", (160 * 3 + 140 * 16) / 300),
        (Kivi(), "4", (160 * 5 + 140 * 16) / 300),
    ],
    ids=str,
)
def test_bits_are_those_of_the_format(scheme: Scheme, level: str, bits: float) -> None:
    chunk = drawn()
    assert bits_per_element(scheme.apply(chunk, level).nbytes, chunk.elements) == pytest.approx(bits, abs=1e-3)


def test_uniform_integers_err_by_a_step_over_the_root_of_twelve() -> None:
    spec = KVSpec("llama", "float32", (LayerSpec(LayerKind.ATTENTION, HEADS, DIM, DIM),))
    x = torch.rand(512, HEADS, DIM, generator=torch.Generator().manual_seed(2))
    x[:, :, 0], x[:, :, -1] = 0, 1  # every group of 64 spans exactly 0..1
    chunk = KVChunk(spec, torch.arange(512), [LayerKV(LayerKind.ATTENTION, {"k": x, "v": x.clone()})])
    decoded = GroupwiseInt().apply(chunk, "4/64").chunk.layers[0].tensors["k"]
    assert float((decoded - x).abs().max()) <= 1 / 30 + 1e-6
    assert float((decoded - x)[:, :, 1:-1].square().mean()) == pytest.approx((1 / 15) ** 2 / 12, rel=0.03)


def test_kivi_keeps_the_last_tokens_exact_and_codes_keys_by_channel() -> None:
    chunk = drawn()
    keys = chunk.layers[0].tensors["k"]
    keys[:, 0, 5] = 50.0  # a channel of outliers, as keys have: costs its own group only
    decoded = Kivi().apply(chunk, "2").chunk.layers[0].tensors["k"]
    assert torch.equal(decoded[160:], keys[160:])
    assert torch.equal(decoded[:160, 0, 5], keys[:160, 0, 5])
    others = [c for c in range(DIM) if c != 5]
    by_channel = (decoded - keys).float()[:160, 0, others].square().mean()
    by_token = (GroupwiseInt().apply(chunk, "4/64").chunk.layers[0].tensors["k"] - keys).float()[:160, 0, others]
    assert by_channel < 0.2 * by_token.square().mean()
    short = drawn(tokens=100)
    assert error(short, Kivi().apply(short, "2").chunk) == 0.0


@pytest.mark.parametrize(("bits", "distortion"), [(1, 0.3634), (2, 0.1175), (3, 0.03454), (4, 0.009497)])
def test_lloyd_max_reaches_the_known_distortion(bits: int, distortion: float) -> None:
    """Max, "Quantizing for minimum distortion", 1960, table I."""
    x = torch.randn(400_000, generator=torch.Generator().manual_seed(4))
    centres = lloyd_max(bits)
    decoded = centres[torch.bucketize(x, (centres[1:] + centres[:-1]) / 2)]
    assert float((x - decoded).square().mean()) == pytest.approx(distortion, rel=0.03)


@pytest.mark.parametrize("dim", [64, 96, 128, 80])
def test_the_rotation_is_orthogonal_and_spreads_an_outlier(dim: int) -> None:
    rotation = hadamard_rotation(dim)
    assert torch.allclose(rotation @ rotation.T, torch.eye(dim), atol=1e-5)
    spread = torch.zeros(dim).index_fill(0, torch.tensor(3), 1.0) @ rotation
    assert float(spread.abs().max()) == pytest.approx((dim & -dim) ** -0.5)


def test_errors_fall_with_bits() -> None:
    chunk = drawn()
    found = [error(chunk, Hadamard().apply(chunk, level).chunk) for level in Hadamard.levels]
    assert all(a > 2.5 * b for a, b in pairwise(found))
    assert found[0] == pytest.approx(0.1175, rel=0.1)


def codec_of(chunk: KVChunk, name: str) -> Codec:
    layers = len(chunk.spec.layers)
    fingerprint = Fingerprint("llama", "0" * 64, "bfloat16", layers, HEADS, (DIM,) * layers, (DIM,) * layers, "0" * 64)
    return Codec(chunk.spec, fingerprint, name)


def test_a_codec_runs_by_chunks_of_256_and_counts_whole_objects() -> None:
    chunk = drawn(tokens=300)
    codec = codec_of(chunk, "channel")
    scheme = CodecScheme("channel", codec)
    assert scheme.levels == tuple(str(level) for level in range(codec.num_levels))
    level = scheme.levels[-1]
    coded = scheme.apply(chunk, level)
    parts = [codec.encode(chunk.slice(a, b), level=int(level)).data for a, b in ((0, 256), (256, 300))]
    assert coded.nbytes == sum(map(len, parts))
    assert coded.chunk.num_tokens == 300
    assert error(chunk, coded.chunk) < error(chunk, scheme.apply(chunk, "0").chunk)
    assert coded.encode_s is not None
    assert not math.isnan(coded.encode_s)


def test_lossless_is_exact_across_chunks() -> None:
    chunk = drawn(tokens=300)
    coded = CodecScheme("lossless", codec_of(chunk, "lossless")).apply(chunk, "0")
    assert all(torch.equal(a[2], b[2]) for a, b in zip(chunk.tensors(), coded.chunk.tensors(), strict=True))


def test_pieces_and_join_are_inverse() -> None:
    chunk = drawn(tokens=600)
    parts = pieces(chunk)
    assert [part.num_tokens for part in parts] == [256, 256, 88]
    assert all(torch.equal(a[2], b[2]) for a, b in zip(chunk.tensors(), join(parts, chunk).tensors(), strict=True))


def test_baselines_go_by_name() -> None:
    made = [make_scheme(baseline.name, lambda name: pytest.fail(name)) for baseline in BASELINES]
    assert [type(scheme) for scheme in made] == list(BASELINES)

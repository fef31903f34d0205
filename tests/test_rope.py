"""Rotations: against transformers' own frequencies and rotations, against fp64, and against hostile JSON."""

from __future__ import annotations

import base64
import math
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cachegen.errors import FormatError, LimitExceeded, PositionError, ShapeError, UnsupportedModel
from cachegen.rope import BLOCK, MAX_ROTARY_DIM, WORK, Rope, check_move, move, rope_from_hf, rotate, unrotate

LLAMA = {"hidden_size": 128, "num_attention_heads": 2, "num_key_value_heads": 1, "num_hidden_layers": 1}
LONG = {"short_factor": [1.0 + i / 50 for i in range(32)], "long_factor": [2.0 + i / 7 for i in range(32)]}
KINDS: dict[str, dict[str, Any]] = {
    "default": {"rope_type": "default", "rope_theta": 10000.0},
    "big theta": {"rope_type": "default", "rope_theta": 500000.0},
    "integer theta": {"rope_type": "default", "rope_theta": 1000000},
    "linear": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 3.0},
    "dynamic": {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.5},
    "llama3": {
        "rope_type": "llama3",
        "rope_theta": 500000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
    "yarn": {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 4096},
    "yarn with its options": {
        "rope_type": "yarn",
        "rope_theta": 150000.0,
        "factor": 32.0,
        "beta_fast": 20.0,
        "beta_slow": 2.0,
        "truncate": False,
        "mscale": 1.0,
        "mscale_all_dim": 0.7,
        "original_max_position_embeddings": 4096,
    },
    "yarn with a given factor": {
        "rope_type": "yarn",
        "rope_theta": 10000.0,
        "factor": 4.0,
        "attention_factor": 1.25,
        "original_max_position_embeddings": 2048,
    },
    "longrope": {"rope_type": "longrope", "rope_theta": 10000.0, "original_max_position_embeddings": 4096, **LONG},
    "longrope with a factor": {
        "rope_type": "longrope",
        "rope_theta": 10000.0,
        "factor": 16.0,
        "original_max_position_embeddings": 1024,
        **LONG,
    },
    "partial": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5},
    "partial llama3": {
        "rope_type": "llama3",
        "rope_theta": 500000.0,
        "partial_rotary_factor": 0.25,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 4096,
    },
}


def config_of(params: dict[str, Any], **more: Any) -> Any:
    transformers = pytest.importorskip("transformers")
    return transformers.LlamaConfig(**LLAMA, max_position_embeddings=16384, rope_parameters=dict(params), **more)


@pytest.mark.parametrize("name", KINDS)
def test_frequencies_are_transformers_own(name: str) -> None:
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
    from transformers.models.glm.modeling_glm import GlmRotaryEmbedding
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    config = config_of(KINDS[name])
    rope = rope_from_hf(config)
    assert rope is not None
    # Only families with partial rotation read the partial factor of default RoPE.
    module = (GlmRotaryEmbedding if "partial" in name else LlamaRotaryEmbedding)(config)
    assert torch.equal(torch.tensor(rope.inv_freq), module.inv_freq)
    assert rope.attention_scaling == float(module.attention_scaling)
    assert rope.rotary_dim == 2 * len(rope.inv_freq)
    kind = KINDS[name]["rope_type"]
    if kind == "longrope":
        assert rope.switch_at is not None
        long, scaling = ROPE_INIT_FUNCTIONS[kind](config, None, seq_len=rope.switch_at + 1)
        assert torch.equal(torch.tensor(rope.long_inv_freq), long)
        assert scaling == rope.attention_scaling
        assert rope.long_inv_freq != rope.inv_freq
    elif kind == "dynamic":
        assert (rope.switch_at, rope.long_inv_freq) == (16384, None)
    else:
        assert rope.switch_at is None
    assert Rope.from_json(rope.to_json()) == rope


@pytest.mark.parametrize("name", [n for n in KINDS if "partial" not in n])
def test_rotating_equals_the_model(name: str) -> None:
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

    config = config_of(KINDS[name])
    rope = rope_from_hf(config)
    k = torch.randn(40, 3, 64, generator=torch.Generator().manual_seed(1))
    positions = torch.arange(900, 940)
    cos, sin = LlamaRotaryEmbedding(config)(k, positions[None])
    _, want = apply_rotary_pos_emb(k.transpose(0, 1)[None], k.transpose(0, 1)[None], cos, sin)
    got = rotate(k, positions, rope)
    assert (got - want[0].transpose(0, 1)).abs().max() < 2e-6
    assert (unrotate(want[0].transpose(0, 1), positions, rope) - k).abs().max() < 2e-6


def test_older_configs() -> None:
    """transformers 4 kept theta and scaling apart, Gemma 3 a second theta, and gave kinds other names."""
    params = {k: v for k, v in KINDS["llama3"].items() if k not in ("rope_theta", "rope_type")}
    base = {"hidden_size": 128, "num_attention_heads": 2, "head_dim": 64, "max_position_embeddings": 16384}
    old = SimpleNamespace(**base, rope_theta=500000.0, rope_scaling={"type": "llama3", **params})
    assert rope_from_hf(old) == rope_from_hf(config_of(KINDS["llama3"]))
    plain = SimpleNamespace(**base, rope_theta=10000.0, rope_scaling=None)
    assert rope_from_hf(plain) == rope_from_hf(config_of(KINDS["default"]))
    phi = SimpleNamespace(
        **base, original_max_position_embeddings=4096, rope_theta=10000.0, rope_scaling={"type": "su", **LONG}
    )
    assert rope_from_hf(phi) == rope_from_hf(config_of(KINDS["longrope"]))
    neox = SimpleNamespace(**base, rotary_pct=0.25, rotary_emb_base=10000)
    rope = rope_from_hf(neox)
    assert rope is not None
    assert rope.rotary_dim == 16
    linear = {"rope_type": "linear", "factor": 8.0}
    gemma = SimpleNamespace(**base, rope_theta=1000000.0, rope_local_base_freq=10000.0, rope_scaling=linear)
    assert rope_from_hf(gemma, "sliding_attention") == rope_from_hf(config_of(KINDS["default"]))
    assert rope_from_hf(gemma, "full_attention") == rope_from_hf(config_of({"rope_theta": 1000000.0, **linear}))


def test_two_bases_by_layer_type() -> None:
    transformers = pytest.importorskip("transformers")
    from transformers.models.gemma3.modeling_gemma3 import Gemma3RotaryEmbedding

    config = transformers.Gemma3TextConfig(num_hidden_layers=6, hidden_size=64, head_dim=32)
    module = Gemma3RotaryEmbedding(config)
    for layer_type in ("sliding_attention", "full_attention"):
        rope = rope_from_hf(config, layer_type)
        assert rope is not None
        assert torch.equal(torch.tensor(rope.inv_freq), getattr(module, f"{layer_type}_inv_freq"))
    assert rope_from_hf(config, "sliding_attention") != rope_from_hf(config, "full_attention")


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"rope_type": "spiral"}, "rope_type"),
        ({"rope_type": "linear"}, "factor"),
        ({"rope_type": "llama3", "factor": 2.0}, "low_freq_factor"),
        ({"rope_type": "longrope", "short_factor": [1.0], "long_factor": [1.0]}, "short_factor"),
        ({"rope_type": "default", "rope_theta": -1.0}, "rope_theta"),
        ({"rope_type": "default", "partial_rotary_factor": 0.01}, "rotary dims"),
        ({"rope_type": "yarn", "factor": 2.0, "rope_theta": 1.0}, "yarn"),
    ],
)
def test_unusable_configs_name_the_field(changes: dict[str, Any], field: str) -> None:
    config = SimpleNamespace(
        hidden_size=128, num_attention_heads=2, max_position_embeddings=64, rope_parameters=changes
    )
    with pytest.raises(UnsupportedModel, match=field):
        rope_from_hf(config)


# --------------------------------------------------------------------------- arithmetic
def reference(k: torch.Tensor, positions: torch.Tensor, rope: Rope, sign: int) -> torch.Tensor:
    """The rotation in fp64, pair by pair."""
    k, out = k.double(), k.double().clone()
    for i, frequency in enumerate(rope.inv_freq):
        a, b = (2 * i, 2 * i + 1) if rope.interleaved else (i, i + rope.rotary_dim // 2)
        angle = (positions.float() * torch.tensor(frequency, dtype=torch.float32)).double()[:, None]
        scale = rope.attention_scaling**sign
        cos, sin = torch.cos(angle) * scale, torch.sin(angle) * scale * sign
        out[:, :, a], out[:, :, b] = k[:, :, a] * cos - k[:, :, b] * sin, k[:, :, b] * cos + k[:, :, a] * sin
    return out


ropes = st.builds(
    lambda half, interleaved, scaling, seed: Rope(
        inv_freq=tuple(np.random.default_rng(seed).uniform(1e-5, 1, half).astype(np.float32).tolist()),
        attention_scaling=scaling,
        rotary_dim=2 * half,
        interleaved=interleaved,
    ),
    st.integers(1, 8),
    st.booleans(),
    st.sampled_from([1.0, 1.1386, 0.7]),
    st.integers(0, 99),
)


@given(
    rope=ropes,
    dtype=st.sampled_from([torch.bfloat16, torch.float16, torch.float32]),
    tokens=st.sampled_from([1, 7, BLOCK, BLOCK + 3]),
    passing=st.sampled_from([0, 3]),
    start=st.sampled_from([0, 5, 100_000]),
    seed=st.integers(0, 99),
)
@settings(max_examples=60, deadline=None)
def test_within_one_rounding(rope: Rope, dtype: torch.dtype, tokens: int, passing: int, start: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    k = torch.randn(tokens, 2, rope.rotary_dim + passing, generator=generator).to(dtype)
    positions = start + torch.randperm(tokens, generator=generator)
    # One rounding of the dtype at the magnitude of a head's numbers.
    unit = torch.finfo(dtype).eps * (
        k.double().abs().max() * 2 * max(rope.attention_scaling, 1 / rope.attention_scaling)
    )
    for function, sign in ((rotate, 1), (unrotate, -1)):
        got = function(k, positions, rope)
        assert got.dtype == dtype
        assert (got.double() - reference(k, positions, rope, sign)).abs().max() <= unit
        assert torch.equal(got[:, :, rope.rotary_dim :], k[:, :, rope.rotary_dim :])
        assert torch.equal(function(k.clone(), positions, rope, out=k.clone()), got)
    there = positions + 37
    moved = move(k, positions, there, rope)
    exact = reference(reference(k, positions, rope, -1), there, rope, 1)
    assert (moved.double() - exact).abs().max() <= unit
    assert torch.equal(move(k, positions, positions, rope), k)


def test_a_move_equals_unrotating_and_rotating() -> None:
    rope = rope_from_hf(config_of(KINDS["yarn"]))
    k = torch.randn(300, 2, 64)
    old, new = torch.arange(300), torch.arange(700, 1000)
    assert (move(k, old, new, rope) - rotate(unrotate(k, old, rope), new, rope)).abs().max() < 2e-6


def test_strided_and_in_place() -> None:
    rope = rope_from_hf(config_of(KINDS["default"]))
    engine = torch.randn(1, 3, 300, 64)  # [batch, heads, tokens, dim]
    rows, positions = engine[0].transpose(0, 1), torch.arange(300)
    want = rotate(rows.contiguous(), positions, rope)
    out = torch.zeros(3, 300, 80)[:, :, :64].transpose(0, 1)
    assert torch.equal(rotate(rows, positions, rope, out=out), want)
    assert rotate(rows, positions, rope, out=rows) is rows
    assert torch.equal(engine[0].transpose(0, 1), want)


def test_many_heads() -> None:
    """More heads than are rotated at once."""
    rope = rope_from_hf(config_of(KINDS["default"]))
    k, positions = torch.randn(5, 2 * WORK // (BLOCK * 64) + 1, 64), torch.arange(40, 45)
    got = rotate(k, positions, rope)
    assert rope is not None
    assert (got.double() - reference(k, positions, rope, 1)).abs().max() < 2e-6


def test_other_dtypes_for_out() -> None:
    rope = Rope((0.5, 0.1), rotary_dim=4)
    k, positions = torch.randn(5, 1, 4), torch.arange(5)
    narrow = rotate(k, positions, rope, out=torch.empty(5, 1, 4, dtype=torch.bfloat16))
    assert torch.equal(narrow, rotate(k, positions, rope).to(torch.bfloat16))
    eight = k.to(torch.float8_e4m3fn)
    assert torch.equal(
        unrotate(eight, positions, rope).float(), unrotate(eight.float(), positions, rope).to(eight.dtype).float()
    )


def test_no_rope_copies() -> None:
    k = torch.randn(4, 1, 8)
    got = rotate(k, torch.arange(4), None)
    assert torch.equal(got, k)
    assert got.data_ptr() != k.data_ptr()
    assert torch.equal(move(k, torch.arange(4), torch.arange(9, 13), None), k)


def test_long_frequencies_above_the_switch() -> None:
    short, long = Rope((0.5, 0.25), rotary_dim=4), Rope((0.05, 0.025), rotary_dim=4)
    both = Rope((0.5, 0.25), rotary_dim=4, kind="longrope", switch_at=8, long_inv_freq=(0.05, 0.025))
    k, positions = torch.randn(16, 1, 4), torch.arange(16)
    got = rotate(k, positions, both)
    assert torch.equal(got[:8], rotate(k[:8], positions[:8], short))
    assert torch.equal(got[8:], rotate(k[8:], positions[8:], long))
    # What is rotated in slices is what was rotated at once.
    assert torch.equal(got[4:12], rotate(k[4:12], positions[4:12], both))
    assert (unrotate(got, positions, both) - k).abs().max() < 1e-6


def test_moves_that_would_change_frequencies_are_refused() -> None:
    at = torch.tensor
    longrope = Rope((0.5,), rotary_dim=2, kind="longrope", switch_at=8, long_inv_freq=(0.05,))
    check_move(longrope, at([0, 7]), at([3, 5]))
    check_move(longrope, at([8, 90]), at([9, 17]))
    check_move(longrope, at([3, 12]), at([3, 12]))
    for source, target in (([0, 7], [0, 8]), ([8], [7])):
        with pytest.raises(PositionError, match=f"from {source[-1]} to {target[-1]}"):
            check_move(longrope, at(source), at(target))
        with pytest.raises(PositionError):
            move(torch.randn(len(source), 1, 2), at(source), at(target), longrope)
    dynamic = Rope((0.5,), rotary_dim=2, kind="dynamic", switch_at=8)
    check_move(dynamic, at([0, 7, 20]), at([1, 2, 20]))
    for source, target in ((9, 10), (7, 8), (8, 7)):
        with pytest.raises(PositionError, match=f"dynamic.* from {source} to {target}"):
            check_move(dynamic, at([source]), at([target]))
    check_move(Rope((0.5,), rotary_dim=2), at([0]), at([1 << 40]))
    check_move(None, at([0]), at([5]))
    with pytest.raises(ShapeError, match="one length"):
        check_move(None, at([0]), at([1, 2]))


def test_shapes_are_checked() -> None:
    rope = Rope((0.5, 0.1), rotary_dim=4)
    with pytest.raises(ShapeError, match="tokens, heads, dim"):
        rotate(torch.randn(3, 4), torch.arange(3), rope)
    with pytest.raises(ShapeError, match="tokens, heads, dim"):
        rotate(torch.ones(3, 1, 4, dtype=torch.int64), torch.arange(3), rope)
    with pytest.raises(ShapeError, match="one per token"):
        rotate(torch.randn(3, 1, 4), torch.arange(4), rope)
    with pytest.raises(ShapeError, match="at least 4 dims"):
        rotate(torch.randn(3, 1, 2), torch.arange(3), rope)
    with pytest.raises(ShapeError, match="out"):
        rotate(torch.randn(3, 1, 4), torch.arange(3), rope, out=torch.empty(3, 2, 4))


# --------------------------------------------------------------------------- hostile JSON
GOOD = Rope((0.5, 0.25), 1.5, 4, True, "longrope", 8, (0.1, 0.2)).to_json()
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)


@given(field=st.sampled_from([*GOOD, "other"]), value=json_values, drop=st.booleans())
@settings(max_examples=200, deadline=None)
def test_hostile_json_is_refused_or_read(field: str, value: Any, drop: bool) -> None:
    data = {**GOOD, field: value}
    if drop:
        del data[field]
    try:
        rope = Rope.from_json(data)
    except FormatError:
        return
    assert len(rope.inv_freq) * 2 == rope.rotary_dim
    assert Rope.from_json(rope.to_json()) == rope


@pytest.mark.parametrize(
    ("field", "value", "error"),
    [
        ("dim", MAX_ROTARY_DIM + 2, LimitExceeded),
        ("dim", 1 << 70, LimitExceeded),
        ("dim", 3, FormatError),
        ("dim", True, FormatError),
        ("dim", 6, FormatError),
        ("scaling", math.nan, FormatError),
        ("scaling", 0, FormatError),
        pytest.param("scaling", 10**400, FormatError, id="scaling-huge"),
        ("scaling", 1e-30, FormatError),
        ("inv_freq", "****", FormatError),
        ("inv_freq", base64.b64encode(np.array([1, np.inf], "<f4").tobytes()).decode(), FormatError),
        ("inv_freq", "é" * 12, FormatError),
        ("long_inv_freq", None, FormatError),
        ("switch_at", -1, FormatError),
        ("interleaved", 1, FormatError),
        ("kind", "x" * 65, FormatError),
    ],
)
def test_hostile_fields(field: str, value: Any, error: type[Exception]) -> None:
    with pytest.raises(error, match="rope"):
        Rope.from_json({**GOOD, field: value})
    with pytest.raises(FormatError, match="needs switch_at"):
        Rope.from_json({key: value for key, value in GOOD.items() if key != "switch_at"})
    with pytest.raises(FormatError, match="object"):
        Rope.from_json([])  # type: ignore[arg-type]

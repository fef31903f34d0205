"""Caches drawn like real ones, for shapes whose models are too large to run here.

What is drawn, and from where: per-channel scales, means and correlation along tokens as measured on SmolLM2-135M's
un-rotated keys and values (log-normal scales with a spread of 0.35; means of keys of about one deviation with heavy
tails, of values a third of that; neighbouring tokens correlated by 0.15; kurtosis about 3.5). Keys are then rotated to
their positions. Speeds depend on the data only through the share of each symbol, sizes depend on it more: a size
measured on synthetic data is no claim about a model.
"""

from __future__ import annotations

import torch
from torch import Tensor

from cachegen.fingerprint import Fingerprint
from cachegen.kv import KVChunk, KVSpec, LayerKind, LayerKV, LayerSpec
from cachegen.rope import Rope, rotate

CORRELATION = 0.15
SCALE, SCALE_SPREAD = 0.8, 0.35
MEANS = {"k": 1.3, "v": 0.35}


def attention_spec(name: str, layers: int, kv_heads: int, dim: int, theta: float = 500000.0) -> KVSpec:
    """The spec of a Llama-like model in bf16."""
    inv_freq = (1.0 / theta ** (torch.arange(0, dim, 2, dtype=torch.float32) / dim)).tolist()
    rope = Rope(inv_freq=tuple(inv_freq), rotary_dim=dim)
    layer = LayerSpec(LayerKind.ATTENTION, kv_heads, dim, dim, rope)
    return KVSpec(name, "bfloat16", (layer,) * layers)


def draw_chunk(spec: KVSpec, tokens: int, seed: int) -> KVChunk:
    """A chunk of `tokens` tokens of a spec of attention layers; the same seed draws the same chunk."""
    generator = torch.Generator().manual_seed(seed)
    positions = torch.arange(tokens)
    layers = []
    for layer in spec.layers:
        tensors = {}
        for name in layer.names:
            x = _draw(tokens, layer.kv_heads, layer.dim(name), MEANS.get(name, MEANS["v"]), generator)
            if name == "k" and layer.rope is not None:
                x = rotate(x, positions, layer.rope)
            tensors[name] = x.to(spec.torch_dtype)
        layers.append(LayerKV(layer.kind, tensors))
    ids = torch.randint(0, 32000, (tokens,), generator=generator)
    return KVChunk(spec, positions, layers, token_ids=ids)


def _draw(tokens: int, heads: int, dim: int, mean: float, generator: torch.Generator) -> Tensor:
    """float32 [tokens, heads, dim]."""
    noise = torch.randn(tokens, heads, dim, generator=generator)
    tail = torch.randn(tokens, heads, dim, generator=generator).abs_()
    noise *= 0.6 + 0.5 * tail
    noise[1:] += CORRELATION * noise[:-1]
    scale = SCALE * torch.exp(SCALE_SPREAD * torch.randn(heads, dim, generator=generator))
    u = torch.rand(heads, dim, generator=generator).sub_(0.5)
    centre = -mean * u.sign() * torch.log1p(-2 * u.abs()).clamp_min_(-8)  # Laplace
    return (noise + centre) * scale


def fingerprint(spec: KVSpec) -> Fingerprint:
    """A fingerprint for a spec that has no weights behind it."""
    return Fingerprint(
        model_type=spec.model_type,
        weights="synthetic",
        dtype=spec.dtype,
        layers=spec.num_layers,
        kv_heads=spec.kv_heads,
        k_dims=tuple(layer.k_dim for layer in spec.layers),
        v_dims=tuple(layer.v_dim for layer in spec.layers),
        rope="synthetic",
    )

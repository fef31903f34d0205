"""Write golden objects: python tests/vectors/make.py [NAME...]

Writes those that are missing, never over one that is there: once a format version is released, its vectors stay as they
are. To the object NAME.kvc belong NAME.npz, the tensors that it decodes to (arrays "LAYER.NAME", as the bits of the
dtype), and an entry of manifest.json. The model, its caches and its profiles (*.profile) are invented.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from cachegen.codec import Codec
from cachegen.codecs import make_codec
from cachegen.entropy.tables import TableBank, from_counts
from cachegen.fingerprint import Fingerprint
from cachegen.kv import KVChunk, KVSpec, LayerKind, LayerKV, LayerSpec
from cachegen.profile import Calibration, ModelProfile, Rung, bank_array
from cachegen.rope import Rope

HERE = Path(__file__).parent
BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32}

ROPE = Rope(tuple(float(np.float32(10000.0 ** (-i / 4))) for i in range(4)), rotary_dim=8)
LAYER = LayerSpec(LayerKind.ATTENTION, kv_heads=2, k_dim=8, v_dim=8, rope=ROPE)
SPEC = KVSpec("invented", "bfloat16", (LAYER, LAYER))
PARTLY = replace(ROPE, inv_freq=(1.0, 0.125), rotary_dim=4, interleaved=True, attention_scaling=1.25)
MIXED = KVSpec(
    "invented",
    "float16",
    (
        replace(LAYER, rope=PARTLY),
        replace(LAYER, kind=LayerKind.SLIDING, window=12),
        LayerSpec(LayerKind.MLA, 1, 8, 4),
        LayerSpec(LayerKind.STATE, 0, 0, 0),
        replace(LAYER, kv_heads=1),
    ),
)


def fingerprint(spec: KVSpec) -> Fingerprint:
    return Fingerprint(
        model_type=spec.model_type,
        weights="00" * 32,
        dtype=spec.dtype,
        layers=spec.num_layers,
        kv_heads=spec.kv_heads,
        k_dims=tuple(layer.k_dim for layer in spec.layers),
        v_dims=tuple(layer.v_dim for layer in spec.layers),
        rope="11" * 32,
    )


def invented_bank(spreads: list[float], low_bits: list[int], alphabet: int) -> TableBank:
    """Tables whose counts fall off geometrically on both sides of zero, with an escape."""
    offset = alphabet // 2 - 1
    away = np.abs(np.arange(alphabet - 1) - offset)
    counts = [[*(1 + (1e6 * spread**away).astype(np.int64)), 200] for spread in spreads]
    points = np.sign(np.arange(alphabet) - offset) * (np.abs(np.arange(alphabet) - offset) - 0.0625)
    return from_counts(counts, offset, low_bits=low_bits, escape=True, recon=points, escape_bias=0.125)


def profile(**options: object) -> ModelProfile:
    rng = np.random.default_rng(2)
    channels = 2 * 2 * 2 * 8
    arrays = {
        "mean": rng.normal(0, 1, channels).astype(np.float32),
        "deviation": rng.uniform(0.5, 2, channels).astype(np.float32),
        "unit": np.repeat(np.float32([0.5, 0.75, 0.625, 1.0]), channels // 4),
        "anchor_tables": rng.integers(0, 2, (2, channels), dtype=np.uint8),
        "delta_tables": rng.integers(0, 3, (2, channels), dtype=np.uint8),
    }
    for level in range(2):
        arrays[f"anchor_bank.{level}"] = bank_array(invented_bank([0.8, 0.9], [2, 3], 64))
        arrays[f"delta_bank.{level}"] = bank_array(invented_bank([0.5, 0.7, 0.8], [0, 0, 1 + level], 16))
    return ModelProfile(
        codec_id="cachegen",
        fingerprint=fingerprint(SPEC),
        spec=SPEC,
        calibration=Calibration((("invented", 0),)),
        ladder=(Rung(0, 3.0, 0.25), Rung(1, 4.0, 0.0078125)),
        parameters={
            "options": {"group_length": 10, "delta": True, "normalisation": "layer"} | options,
            "levels": [{"scale": 1.0, "anchor_range": 8.0}, {"scale": 0.25, "anchor_range": 4.0}],
            "bins": [0.5, 1.0, 1.5],
            "rounding": 0.45,
        },
        arrays=arrays,
    )


def chunk(spec: KVSpec = SPEC, tokens: int = 40, start: int = 5, seed: int = 0) -> KVChunk:
    """Channels with means and deviations of their own, a few large values."""
    rng = np.random.default_rng(seed)
    layers = []
    for i, layer in enumerate(spec.layers):
        held = (tokens - layer.window, tokens) if layer.window else None
        rows = tokens if held is None else held[1] - held[0]
        tensors = {}
        for name in layer.names:
            shape = (rows, layer.kv_heads, layer.dim(name))
            mean, spread = rng.normal(0, 1.5, shape[1:]), rng.uniform(0.25, 2, shape[1:])
            values = mean + spread * rng.laplace(0, 0.75, shape)
            values[rows // 3, 0, 1] = 40 + i
            tensors[name] = torch.from_numpy(values).to(spec.torch_dtype)
        layers.append(LayerKV(layer.kind, tensors, held))
    ids = torch.from_numpy(rng.integers(0, 50000, tokens))
    return KVChunk(spec, torch.arange(start, start + tokens), layers, token_ids=ids, previous_ids=(17, 4242))


def centred(tokens: int, seed: int) -> KVChunk:
    """Channels of mean zero and very different deviations."""
    rng = np.random.default_rng(seed)
    made = chunk(tokens=tokens)
    for layer in made.layers:
        for tensor in layer.tensors.values():
            tensor.copy_(torch.from_numpy(rng.normal(0, 1, tensor.shape) * 8.0 ** rng.uniform(-1, 1, tensor.shape[1:])))
    return made


def narrow() -> KVChunk:
    """One head of two dims, and more tokens than the channel codec takes at once."""
    layer = LayerSpec(LayerKind.ATTENTION, 1, 2, 2, Rope((1.0,), rotary_dim=2))
    return chunk(KVSpec("invented", "bfloat16", (layer,)), tokens=500, seed=10)


def mixed() -> KVChunk:
    """Every kind of layer, special values, and no token ids."""
    made = chunk(MIXED, tokens=26, seed=3)
    made.layers[0].tensors["k"][3, 1, :4] = torch.tensor([float("nan"), float("inf"), -0.0, 6e-8])
    state = torch.arange(24, dtype=torch.float32).reshape(2, 3, 4) / 7
    made.layers[3] = LayerKV(LayerKind.STATE, {"conv": state[0].to(torch.bfloat16), "ssm": state})
    return replace(made, token_ids=None, previous_ids=())


def rank() -> KVChunk:
    """The second of two heads, at positions that jump."""
    whole = chunk(tokens=36, seed=4)
    layers = [LayerKV(layer.kind, {n: t[:, 1:] for n, t in layer.tensors.items()}) for layer in whole.layers]
    positions = torch.cat([torch.arange(1000, 1030), torch.arange(6)])
    return KVChunk(SPEC, positions, layers, head_range=(1, 2), token_ids=whole.token_ids)


def fp32() -> KVChunk:
    return chunk(SPEC.with_dtype("float32"), tokens=18, seed=5)


def fp8() -> KVChunk:
    made = chunk(SPEC.with_dtype("float8_e4m3fn"), tokens=24, seed=6)
    for layer in made.layers:
        layer.scales["k"] = torch.full((1, 2, 1), 0.5)
    return made


# name: codec, its options, level, chunk
VECTORS: dict[str, tuple[str, dict[str, object], int, Callable[[], KVChunk]]] = {
    "lossless": ("lossless", {}, 0, lambda: chunk(tokens=34)),
    "lossless-zstd": ("lossless", {"coder": "zstd"}, 0, lambda: chunk(tokens=20)),
    "lossless-mixed": ("lossless", {}, 0, mixed),
    "lossless-fp32": ("lossless", {}, 0, fp32),
    "lossless-fp8": ("lossless", {}, 0, fp8),
    "channel": ("channel", {}, 3, chunk),
    "channel-long": ("channel", {}, 6, lambda: chunk(tokens=100, start=0, seed=7)),
    "channel-short": ("channel", {}, 3, lambda: chunk(tokens=12, seed=13)),
    "channel-one": ("channel", {}, 3, lambda: chunk(tokens=1, start=9, seed=8)),
    "channel-centred": ("channel", {}, 4, lambda: centred(48, seed=11)),
    "channel-mixed": ("channel", {}, 5, mixed),
    "channel-rank": ("channel", {}, 4, rank),
    "channel-bands": ("channel", {}, 2, narrow),
    "cachegen": ("cachegen", {}, 1, lambda: chunk(tokens=33)),
    "cachegen-coarse": ("cachegen", {}, 0, rank),
    "cachegen-token": ("cachegen", {"delta": False, "normalisation": "token"}, 1, lambda: chunk(tokens=25, seed=12)),
    "cachegen_public": ("cachegen_public", {}, 2, lambda: chunk(tokens=20)),
    "cachegen_public-fp16": ("cachegen_public", {}, 0, lambda: chunk(SPEC.with_dtype("float16"), tokens=27, seed=9)),
}
PROFILES = {"tiny": {}, "tiny-token": {"delta": False, "normalisation": "token"}}


def bits(chunk: KVChunk) -> dict[str, np.ndarray]:
    """Tensors and scales as unsigned integers."""
    found = {}
    for i, layer in enumerate(chunk.layers):
        scales = {f"{name}.scale": scale for name, scale in layer.scales.items()}
        for name, tensor in (layer.tensors | scales).items():
            array = tensor.contiguous().view(BITS[tensor.element_size()]).numpy()
            found[f"{i}.{name}"] = array.view(f"<u{tensor.element_size()}")
    return found


def profile_name(options: dict[str, object]) -> str:
    return "tiny-token" if options else "tiny"


def codec_of(codec_id: str, options: dict[str, object], spec: KVSpec) -> Codec:
    known = None
    if codec_id == "cachegen":
        known = ModelProfile.load(HERE / f"{profile_name(options)}.profile")
    return Codec(spec, fingerprint(spec), make_codec(codec_id, options, known), known, threads=1)


def make(name: str) -> None:
    codec_id, options, level, source = VECTORS[name]
    made = source()
    codec = codec_of(codec_id, options, made.spec)
    data = codec.encode(made, level).data
    decoded = bits(codec.decode(data))
    (HERE / f"{name}.kvc").write_bytes(data)
    np.savez_compressed(HERE / f"{name}.npz", **decoded)


def main(names: list[str]) -> None:
    for name, options in PROFILES.items():
        if not (HERE / f"{name}.profile").exists():
            (HERE / f"{name}.profile").write_bytes(profile(**options).to_bytes())
    for name in names or VECTORS:
        if not (HERE / f"{name}.kvc").exists():
            make(name)
            print("wrote", name)
    manifest = {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(HERE.iterdir())
        if path.suffix in (".kvc", ".npz", ".profile")
    }
    (HERE / "manifest.json").write_text(json.dumps(manifest, indent=1) + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])

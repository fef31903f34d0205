"""Whole codecs both ways, on one core, beside memcpy and the public code's host path.

Caches are SmolLM2's own where that is short enough to compute, else drawn like real ones in a model's shape; of a large
model, a few layers are measured. Rows say which.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch

from cachegen.codec import Codec
from cachegen.codecs import codec_class
from cachegen.codecs.cachegen_fit import fit
from cachegen.engines.transformers import chunk_from_cache
from cachegen.entropy import rans
from cachegen.fingerprint import Fingerprint
from cachegen.kv import KVChunk, KVSpec
from cachegen.profile import Calibration, ModelProfile

from . import public_host_path, synthetic
from .corpora import TEXTS
from .models import load, smollm2
from .timing import interleaved

PUBLIC_TOKENS = 256
"""Tokens of the piece that the public host path is measured on; its channels are one head's."""
FITTED_TOKENS = 64
Row = dict[str, Any]


@dataclass(frozen=True)
class Shape:
    """A model's cache: layers, KV heads, numbers a head, RoPE's base."""

    layers: int
    kv_heads: int
    dim: int
    theta: float = 500000.0

    def spec(self, name: str, layers: int) -> KVSpec:
        """The spec of the first `layers` layers."""
        return synthetic.attention_spec(name, layers, self.kv_heads, self.dim, self.theta)


SHAPES = {
    "SmolLM2-135M": Shape(30, 3, 64, 100000.0),
    "Llama-3.1-8B": Shape(32, 8, 128),
    "Llama-3.1-70B": Shape(80, 8, 128),
}


@dataclass(frozen=True)
class Subject:
    """A chunk, the model it is (taken to be) of, and the layers that the whole model has."""

    chunk: KVChunk
    fingerprint: Fingerprint
    layers: int

    def codec(self, codec_id: str) -> Codec:
        """A codec for the model; the paper's gets a profile fitted to the chunk's first tokens."""
        spec, profile = self.chunk.spec, None
        if codec_class(codec_id).needs_profile:
            first = self.chunk.slice(0, min(FITTED_TOKENS, self.chunk.num_tokens))
            parameters, arrays = fit(lambda: iter([first]), spec, {})
            seen = Calibration((("the chunk's first tokens", first.num_tokens),))
            profile = ModelProfile(codec_id, self.fingerprint, spec, seen, (), parameters, arrays)
        return Codec(spec, self.fingerprint, codec_id, profile, threads=1)


def drawn(name: str, tokens: int, megabytes: float, seed: int) -> Subject:
    """A cache in the shape of model `name`: as many of its layers as fit into `megabytes`, one at least."""
    shape = SHAPES[name]
    layer = 4 * shape.kv_heads * shape.dim * tokens
    spec = shape.spec(name, max(1, min(shape.layers, int(megabytes * 1e6 / layer))))
    return Subject(synthetic.draw_chunk(spec, tokens, seed), synthetic.fingerprint(spec), shape.layers)


@lru_cache(maxsize=1)
def real(tokens: int) -> Subject:
    """SmolLM2's bf16 cache of the first `tokens` tokens of a story."""
    model, tokenizer = load(smollm2(), torch.bfloat16)
    ids = torch.tensor([tokenizer((TEXTS / "alice-2.txt").read_text(encoding="utf-8"))["input_ids"][:tokens]])
    with torch.no_grad():
        cache = model(ids, use_cache=True, logits_to_keep=1).past_key_values
    spec = KVSpec.from_hf_config(model.config, torch.bfloat16)
    return Subject(chunk_from_cache(cache, spec, ids[0]), Fingerprint.from_model(model), spec.num_layers)


def measure(subject: Subject, codec: Codec, isas: Sequence[str], runs: int, torchac: Any) -> Iterator[Row]:
    """A row an ISA: GB/s of encoding, decoding, copying, and of the public host path, taking turns.

    Args:
        torchac: torchac's compiled backend, which the public host path codes with; None leaves it out.
    """
    chunk = subject.chunk
    encoded = codec.encode(chunk)
    out = KVChunk.empty(chunk.spec, chunk.positions, chunk.heads)
    codec.decode(encoded.data, out=out, threads=1)
    source = torch.cat([tensor.reshape(-1) for _, _, tensor in chunk.tensors()])
    target = torch.zeros_like(source)
    cases: dict[str, Callable[[], object]] = {"memcpy": lambda: target.copy_(source)}
    for isa in isas:
        cases[f"encode.{isa}"] = _on(isa, lambda: codec.encode(chunk))
        cases[f"decode.{isa}"] = _on(isa, lambda: codec.decode(encoded.data, out=out, threads=1))
    piece = chunk.layers[0].tensors["k"][:PUBLIC_TOKENS, :1]
    if torchac is not None:
        bins = public_host_path.bins_of(0, subject.layers, "k")
        cases["public_encode"], cases["public_decode"] = public_host_path.both_ways(piece, bins, torchac)
    times = interleaved(cases, runs)
    scaled = piece.numel() * 2 / 1e9
    for isa in isas:
        row: Row = {
            "tokens": chunk.num_tokens,
            "layers": subject.layers,
            "layers_measured": chunk.spec.num_layers,
            "codec": codec.codec.codec_id,
            "level": encoded.report.levels[-1].level,
            "isa": isa,
            "threads": 1,
            "ratio": chunk.nbytes / len(encoded.data),
            "bits_per_element": 8 * len(encoded.data) / chunk.elements,
            "encode_gbps": chunk.nbytes / times[f"encode.{isa}"] / 1e9,
            "decode_gbps": chunk.nbytes / times[f"decode.{isa}"] / 1e9,
            "memcpy_gbps": chunk.nbytes / times["memcpy"] / 1e9,
        }
        if torchac is not None:
            row["public_encode_gbps"] = scaled / times["public_encode"]
            row["public_decode_gbps"] = scaled / times["public_decode"]
            row["public_measured"] = f"{piece.shape[0]} tokens x {piece.shape[2]} channels, scaled"
        yield {**row, **times.conditions()}


def _on(isa: str, call: Callable[[], object]) -> Callable[[], object]:
    def run_there() -> None:
        with running_on(isa):
            call()

    return run_there


@contextmanager
def running_on(isa: str) -> Iterator[None]:
    """Within this context native code runs on instruction set `isa`."""
    before = os.environ.get(rans.ISA_VARIABLE)
    os.environ[rans.ISA_VARIABLE] = isa
    try:
        yield
    finally:
        if before is None:
            del os.environ[rans.ISA_VARIABLE]
        else:
            os.environ[rans.ISA_VARIABLE] = before

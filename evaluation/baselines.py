"""Schemes to compare: every codec of the project through its public API, and the field's quantisers as baselines.

A scheme has levels, its own parameter swept from coarse to fine, and `apply(chunk, level)`: what a reader gets back,
and the bytes that it must fetch, side information included. Baselines are written for clarity and count bytes as
their formats would lay them out; `CodecScheme` counts the bytes of real objects, 256 tokens each.
"""

from __future__ import annotations

import math
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import torch
import zstandard
from torch import Tensor

from cachegen.errors import InputError
from cachegen.kv import KVChunk, LayerKind, LayerKV

if TYPE_CHECKING:
    from cachegen.codec import Codec

CHUNK = 256
"""Tokens of a stored chunk."""


@dataclass(frozen=True)
class Coded:
    """A context as a reader has it back, and what that took.

    Attributes:
        chunk: the decoded cache, in the dtype of the original.
        nbytes: bytes a reader fetches.
        encode_s, decode_s: seconds, where a real codec ran (indicative: see the speed verb).
        notes: fallbacks taken, or what else to know.
    """

    chunk: KVChunk
    nbytes: int
    encode_s: float | None = None
    decode_s: float | None = None
    notes: tuple[str, ...] = field(default=())


class Scheme(ABC):
    """A way to make a cache smaller. `levels` name the settings of its parameter, the coarsest first."""

    name: str
    levels: tuple[str, ...]

    @abstractmethod
    def apply(self, chunk: KVChunk, level: str) -> Coded:
        """Encode and decode the cache of a whole context at one of `levels`."""

    def check(self, level: str) -> None:
        """Raise InputError unless `level` is one of this scheme's."""
        if level not in self.levels:
            raise InputError(f"scheme {self.name}: levels are {', '.join(self.levels)}; got {level!r}")


class Elementwise(Scheme):
    """A baseline that codes each tensor by itself, x fp32 [tokens, heads, dim]."""

    def apply(self, chunk: KVChunk, level: str) -> Coded:
        self.check(level)
        bits = 0.0

        def code(name: str, tensor: Tensor) -> Tensor:
            nonlocal bits
            if tensor.numel() == 0:
                return tensor.clone()
            decoded, spent = self.code(name, tensor.float(), level)
            bits += spent
            return decoded.to(tensor.dtype)

        decoded = map_tensors(chunk, code)
        return Coded(decoded, math.ceil(bits / 8))

    @abstractmethod
    def code(self, name: str, x: Tensor, level: str) -> tuple[Tensor, float]:
        """Decoded values and bits spent of one tensor."""


def map_tensors(chunk: KVChunk, change: Callable[[str, Tensor], Tensor]) -> KVChunk:
    """A chunk whose tensors are `change(name, tensor)`."""
    layers = [
        LayerKV(layer.kind, {n: change(n, t) for n, t in layer.tensors.items()}, layer.tokens, dict(layer.scales))
        for layer in chunk.layers
    ]
    return replace(chunk, layers=layers)


# ------------------------------------------------------------------------------------------------------------ baselines
class Bf16(Elementwise):
    """The engine's own cache, 16 bits a number."""

    name, levels = "bf16", ("16",)

    def code(self, name: str, x: Tensor, level: str) -> tuple[Tensor, float]:
        return x, 16.0 * x.numel()


class Fp8(Elementwise):
    """fp8 e4m3, scaled to the absolute maximum of the tensor or of each head (one fp32 scale each)."""

    name, levels = "fp8", ("tensor", "head")

    def code(self, name: str, x: Tensor, level: str) -> tuple[Tensor, float]:
        dims = (0, 1, 2) if level == "tensor" else (0, 2)
        scale = (x.abs().amax(dims, keepdim=True) / 448).clamp_min(1e-12)
        decoded = (x / scale).to(torch.float8_e4m3fn).float() * scale
        return decoded, 8.0 * x.numel() + 32 * scale.numel()


class GroupwiseInt(Elementwise):
    """Integers between the least and greatest of a group of channels of one token (two fp16 a group)."""

    name, levels = "int", ("4/64", "4/32", "4/16", "8/64", "8/32")

    def code(self, name: str, x: Tensor, level: str) -> tuple[Tensor, float]:
        bits, group = (int(part) for part in level.split("/"))
        return minmax(x.flatten(1), bits, _fitting(group, x[0].numel()), dim=1, shape=x.shape)


class Kivi(Elementwise):
    """KIVI: keys by channel in groups of 32 tokens, values by token in groups of 32 channels, the last 128 exact.

    The exact tail is counted like everything else, so short contexts pay more than the b + 1 bits of long ones.
    """

    name, levels = "kivi", ("2", "4")
    GROUP, RESIDUAL = 32, 128

    def code(self, name: str, x: Tensor, level: str) -> tuple[Tensor, float]:
        cut = max(0, x.shape[0] - self.RESIDUAL) // self.GROUP * self.GROUP
        old, tail = x[:cut].flatten(1), x[cut:]
        exact = 16.0 * tail.numel()
        if cut == 0:
            return x, exact
        dim, group = (0, self.GROUP) if name in ("k", "latent") else (1, _fitting(self.GROUP, old.shape[1]))
        decoded, spent = minmax(old, int(level), group, dim=dim, shape=x[:cut].shape)
        return torch.cat([decoded, tail]), spent + exact


class Hadamard(Elementwise):
    """Random-sign Hadamard rotation of each head, fp16 scale a token and head, Lloyd-Max quantiser of a Gaussian."""

    name, levels = "hadamard", ("2", "3", "4", "5")

    def code(self, name: str, x: Tensor, level: str) -> tuple[Tensor, float]:
        rotation = hadamard_rotation(x.shape[-1])
        centres = lloyd_max(int(level))
        z = x @ rotation
        scale = z.square().mean(-1, keepdim=True).sqrt().half().float().clamp_min(1e-8)
        edges = (centres[1:] + centres[:-1]) / 2
        decoded = centres[torch.bucketize((z / scale).contiguous(), edges)] * scale @ rotation.T
        return decoded, float(level) * x.numel() + 16 * scale.numel()


class Zstd(Scheme):
    """zstandard on the byte planes of the values as stored, 256 tokens at a time: exact."""

    name, levels = "zstd", ("3",)

    def apply(self, chunk: KVChunk, level: str) -> Coded:
        self.check(level)
        packer, nbytes = zstandard.ZstdCompressor(level=int(level)), 0
        for part in pieces(chunk):
            planes: list[list[bytes]] = []
            for _, _, tensor in part.tensors():
                raw = tensor.contiguous().view(torch.uint8).reshape(-1, tensor.element_size())
                planes.append([raw[:, i].contiguous().numpy().tobytes() for i in range(raw.shape[1])])
            for plane in zip(*planes, strict=True):
                nbytes += len(packer.compress(b"".join(plane)))
        return Coded(map_tensors(chunk, lambda _, tensor: tensor.clone()), nbytes)


def minmax(x: Tensor, bits: int, group: int, dim: int, shape: torch.Size) -> tuple[Tensor, float]:
    """Integers within groups of `group` along `dim` of x [tokens, channels]: (decoded as `shape`, bits spent)."""
    z = x.movedim(dim, -1).unflatten(-1, (-1, group))
    low, high = z.amin(-1, keepdim=True).half().float(), z.amax(-1, keepdim=True).half().float()
    step = ((high - low) / (2**bits - 1)).clamp_min(1e-8)
    decoded = ((z - low) / step).round().clamp(0, 2**bits - 1) * step + low
    spent = float(bits) * x.numel() + 32 * low.numel()
    return decoded.flatten(-2).movedim(-1, dim).reshape(shape), spent


def _fitting(group: int, channels: int) -> int:
    """The largest divisor of `channels` that is at most `group`."""
    return next(size for size in range(min(group, channels), 0, -1) if channels % size == 0)


@lru_cache(maxsize=8)
def hadamard_rotation(dim: int) -> Tensor:
    """Orthogonal [dim, dim]: Hadamard blocks of the largest power of two in `dim`, signs drawn with a fixed seed."""
    size = dim & -dim
    block = torch.ones(1, 1)
    while block.shape[0] < size:
        block = torch.cat([torch.cat([block, block], 1), torch.cat([block, -block], 1)])
    signs = torch.randint(0, 2, (dim,), generator=torch.Generator().manual_seed(0)).float() * 2 - 1
    blocks: Tensor = torch.block_diag(*[block / size**0.5] * (dim // size))
    return torch.diag(signs) @ blocks


@lru_cache(maxsize=8)
def lloyd_max(bits: int) -> Tensor:
    """The 2^bits centres that quantise a unit Gaussian with least squared error."""
    import numpy as np
    from scipy.stats import norm

    centres = norm.ppf((np.arange(2**bits) + 0.5) / 2**bits)
    for _ in range(500):
        edges = np.concatenate([[-np.inf], (centres[1:] + centres[:-1]) / 2, [np.inf]])
        centres = (norm.pdf(edges[:-1]) - norm.pdf(edges[1:])) / (norm.cdf(edges[1:]) - norm.cdf(edges[:-1]))
    return torch.from_numpy(centres).float()


# --------------------------------------------------------------------------------------------------------------- codecs
class CodecScheme(Scheme):
    """A codec of the project, by its public API: real objects of 256 tokens, headers and index counted."""

    def __init__(self, name: str, codec: Codec) -> None:
        self.name, self.codec = name, codec
        self.levels = tuple(str(level) for level in range(codec.num_levels))

    def apply(self, chunk: KVChunk, level: str) -> Coded:
        self.check(level)
        parts, nbytes, encode_s, decode_s, notes = [], 0, 0.0, 0.0, set()
        for part in pieces(chunk):
            began = time.perf_counter()
            encoded = self.codec.encode(part, level=int(level))
            encoded_at = time.perf_counter()
            parts.append(self.codec.decode(encoded.data, level=int(level)))
            decode_s += time.perf_counter() - encoded_at
            encode_s += encoded_at - began
            sizes = {entry.level: entry.nbytes for entry in encoded.report.levels}
            nbytes += sizes[int(level)]
            notes |= set(encoded.report.fallbacks)
        return Coded(join(parts, chunk), nbytes, encode_s, decode_s, tuple(sorted(notes)))


def pieces(chunk: KVChunk) -> list[KVChunk]:
    """A context's stored chunks: 256 tokens each, or all of it where a layer is a state, which has no tokens to cut."""
    if any(layer.kind is LayerKind.STATE for layer in chunk.layers):
        return [chunk]
    return [chunk.slice(start, min(start + CHUNK, chunk.num_tokens)) for start in range(0, chunk.num_tokens, CHUNK)]


def join(parts: list[KVChunk], like: KVChunk) -> KVChunk:
    """Consecutive chunks as one, shaped as `like`."""
    layers = []
    for i, layer in enumerate(like.layers):
        if layer.kind is LayerKind.STATE:
            layers.append(parts[-1].layers[i])
            continue
        tensors = {name: torch.cat([part.layers[i].tensors[name] for part in parts]) for name in layer.tensors}
        layers.append(LayerKV(layer.kind, tensors, layer.tokens))
    return replace(like, layers=layers)


BASELINES: tuple[type[Scheme], ...] = (Bf16, Fp8, GroupwiseInt, Kivi, Hadamard, Zstd)
CODECS = ("lossless", "channel", "cachegen", "cachegen_public")
DEFAULT_SCHEMES = (*(scheme.name for scheme in BASELINES), *CODECS)


def make_scheme(name: str, make_codec: Callable[[str], Any]) -> Scheme:
    """The scheme of a name: a baseline, or the codec that `make_codec(name)` makes.

    Raises InputError (UnknownCodec from `make_codec`) if there is none.
    """
    for baseline in BASELINES:
        if baseline.name == name:
            return baseline()
    return CodecScheme(name, make_codec(name))

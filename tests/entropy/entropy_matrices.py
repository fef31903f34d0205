"""Matrices that test everything about the coder: all alphabets, escapes, low bits, ragged shapes."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from cachegen.entropy.rans import MatrixSpec
from cachegen.entropy.tables import TableBank, from_counts


def make_bank(alphabet: int, escape: bool, low_bits: bool, tables: int = 9, floor: int = 1) -> TableBank:
    """Two-sided geometric tables from very narrow to nearly flat; with floor 0, narrow ones have zero frequencies."""
    offset = alphabet // 2 - 1
    distance = np.abs(np.arange(alphabet) - offset)
    weight = np.exp(-distance[None] / np.geomspace(0.2, alphabet / 6, tables)[:, None])
    counts = (weight / weight.sum(axis=1, keepdims=True) * 2**24).astype(np.int64)
    if escape:
        counts[:, -1] = 2**18
    recon = np.sign(np.arange(alphabet) - offset) * (distance + 0.12)
    return from_counts(
        counts,
        offset,
        low_bits=np.arange(tables) * 3 % 13 if low_bits else None,
        escape=escape,
        recon=recon,
        escape_bias=0.12,
        floor=floor,
    )


def make_matrix(
    bank: TableBank, tokens: int, components: int, seed: int, by_block: bool = False, wild: float = 0.02
) -> tuple[MatrixSpec, Tensor]:
    """A spec with random table ids, and int32 values drawn from its tables; where there is an escape, a share of
    `wild` values lies anywhere in the escape's 16 bits."""
    rng = np.random.default_rng(seed)
    blocks = (tokens + 31) // 32
    shape = (blocks, components) if by_block else (components,)
    ids = rng.integers(0, bank.tables, shape).astype(np.uint16)
    spec = MatrixSpec(tokens, components, bank, ids)
    full = np.repeat(np.broadcast_to(ids, (blocks, components)), 32, axis=0)[:tokens]
    cumulative = bank.freqs.cumsum(axis=1)
    draws = rng.integers(0, 4096, (tokens, components))
    high = (draws[..., None] >= cumulative[full]).sum(axis=-1) - bank.offset
    if bank.escape:
        other = rng.integers(-0x8000, 0x8000, high.shape)
        high = np.where((rng.random(high.shape) < wild) | (high == bank.alphabet - 1 - bank.offset), other, high)
    low_bits = bank.low_bits[full].astype(np.int64)
    q = (high << low_bits) + rng.integers(0, 1 << 12, high.shape) % (1 << low_bits)
    return spec, torch.from_numpy(q.astype(np.int32))


def input_types(q: Tensor, bank: TableBank) -> list[Tensor]:
    """The values in every dtype that holds them."""
    out = [q]
    if int(q.abs().max()) < 0x8000:
        out.append(q.to(torch.int16))
    if bank.simple:
        out.append((q + bank.offset).to(torch.uint8))
    return out

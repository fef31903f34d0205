"""The public CacheGen code's host path, written from its description: what one core does there to a chunk.

No delta coding. Per layer and token the largest magnitude over heads and dims is the scale, and q = round(x * C /
scale + C) with C = bins // 2 - 1; bins are 32 or 16 by layer, for keys and values apart. For every (layer, channel) the
distribution of the chunk's own symbols becomes a 16-bit cumulative table of 33 entries, shipped with the chunk, and is
one arithmetic-coded stream of the chunk's tokens (the reference host path compiles this loop; here torchac's C++ does
it, built with -O3, one call a stream). Decoding undoes it to the cache's dtype.

A baseline for time, not an interchange format: tables and streams stay in memory.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

TABLE = 33
"""Entries of every table, whatever the layer's bins."""


@dataclass(frozen=True)
class PublicPiece:
    """One layer's keys or values: int16 tables [channels, 33], float16 scales [tokens], a stream a channel."""

    tables: Tensor
    scales: Tensor
    streams: list[bytes]
    tokens: int
    bins: int

    @property
    def nbytes(self) -> int:
        fixed = self.tables.numel() * 2 + self.scales.numel() * self.scales.element_size()
        return fixed + sum(map(len, self.streams))


def bins_of(layer: int, layers: int, name: str) -> int:
    """Bins of a layer's keys or values: K 32 for layers 0-9, V 32 for 0-1, then 16; all 32 below ten layers."""
    if layers < 10:
        return 32
    return 32 if layer < (10 if name == "k" else 2) else 16


def encode(x: Tensor, bins: int, coder: Any) -> PublicPiece:
    """Encode [tokens, heads, dim] of one layer; `coder` is torchac's compiled backend."""
    tokens = x.shape[0]
    flat = x.reshape(tokens, -1).float()
    top = bins // 2 - 1
    scales = flat.abs().amax(dim=1).clamp_min(torch.finfo(torch.float16).tiny)
    symbols = (flat * (top / scales)[:, None] + top).round_().to(torch.int16)
    tables = measured_tables(symbols)
    by_channel = symbols.t().contiguous()
    streams = [
        coder.encode_cdf(tables[c].expand(tokens, TABLE).contiguous(), by_channel[c]) for c in range(len(by_channel))
    ]
    return PublicPiece(tables, scales.half(), streams, tokens, bins)


def decode(piece: PublicPiece, out: Tensor, coder: Any) -> None:
    """Decode into [tokens, heads, dim], whatever its strides and dtype."""
    top = piece.bins // 2 - 1
    by_channel = torch.stack(
        [
            coder.decode_cdf(piece.tables[c].expand(piece.tokens, TABLE).contiguous(), stream)
            for c, stream in enumerate(piece.streams)
        ]
    )
    values = (by_channel.t().float() - top) * (piece.scales.float() / top)[:, None]
    out.copy_(values.view(out.shape))


def measured_tables(symbols: Tensor) -> Tensor:
    """int16 [channels, 33]: each channel's cumulative counts as 16-bit fractions, strictly rising (torchac's form)."""
    tokens, channels = symbols.shape
    counts = torch.zeros(channels, TABLE - 1)
    counts.scatter_add_(1, symbols.t().long(), torch.ones(channels, tokens))
    cumulative = torch.zeros(channels, TABLE)
    cumulative[:, 1:] = counts.cumsum(1) / tokens
    steps = (cumulative * (2**16 - (TABLE - 1))).round_().to(torch.int32) + torch.arange(TABLE, dtype=torch.int32)
    return steps.to(torch.int16)


def both_ways(x: Tensor, bins: int, coder: Any) -> tuple[Callable[[], object], Callable[[], object]]:
    """Two calls to be timed: encode and decode of one layer's [tokens, heads, dim]."""
    piece = encode(x, bins, coder)
    out = torch.empty_like(x)
    return (lambda: encode(x, bins, coder)), (lambda: decode(piece, out, coder))

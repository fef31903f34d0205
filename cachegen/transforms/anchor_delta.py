"""Anchors and deltas (CacheGen paper, section 5.2): neighbouring tokens have similar keys and values.

Tokens are cut into groups of `length` neighbours. A group's first token is its *anchor*, coded on its own; every
other token is coded as its difference from the anchor as the decoder will have it, so that errors don't add up.
Rows of a matrix [tokens, ...] are tokens, all at the same distance in memory.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..errors import InputError


def num_anchors(tokens: int, length: int) -> int:
    """Anchors among `tokens` tokens: one a group, the last group perhaps shorter. Raises InputError on length < 1."""
    if length < 1:
        raise InputError(f"group length: expected at least 1 token; got {length}")
    return -(-tokens // length)


def anchors(rows: Tensor, length: int) -> Tensor:
    """The anchors' rows: a view [ceil(tokens / length), ...]."""
    return rows[::length]


def others(rows: Tensor, length: int) -> Tensor:
    """Rows of the tokens that aren't anchors, in their order: [tokens - anchors, ...], a copy."""
    full, width = rows.shape[0] // length, length - 1
    whole = rows[: full * length].view(full, length, *rows.shape[1:])[:, 1:].reshape(full * width, *rows.shape[1:])
    tail = rows[full * length + 1 :]
    return torch.cat([whole, tail]) if tail.shape[0] else whole.contiguous()


def subtract(values: Tensor, references: Tensor, length: int) -> Tensor:
    """Deltas: each row of `values` (as `others` gives them) less its anchor in `references`, in fp32."""
    owner = torch.arange(values.shape[0]) // max(1, length - 1)
    return values - references[owner]


def join(references: Tensor, deltas: Tensor, length: int, targets: Sequence[Tensor]) -> None:
    """Put anchors and anchor + delta in their rows, rounding once to the targets' dtype.

    Args:
        references: fp32 [anchors, components].
        deltas: fp32 [tokens - anchors, components], as `others` orders them; the sums are left in it.
        targets: tensors [tokens, heads, dim] with any row and head strides; their channels, one tensor after the
            other, are the components.
    """
    tokens = references.shape[0] + deltas.shape[0]
    full, width = tokens // length, length - 1
    if full and width:
        deltas[: full * width].view(full, width, -1).add_(references[:full, None])
    if tokens > full * length + 1:
        deltas[full * width :].add_(references[full])
    start = 0
    for target in targets:
        _, heads, dim = target.shape
        stop = start + heads * dim
        target[::length].copy_(references[:, start:stop].view(-1, heads, dim))
        sums = deltas[:, start:stop].view(-1, heads, dim)
        if full and width:
            inner = target[: full * length].view(full, length, heads, dim)[:, 1:]
            inner.copy_(sums[: full * width].view(full, width, heads, dim))
        target[full * length + 1 :].copy_(sums[full * width :])
        start = stop

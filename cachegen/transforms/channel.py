"""What the `channel` codec measures on a chunk: token weights, per-channel means and deviations, steps.

No calibration: all of it comes from the chunk itself. Keys are taken before RoPE, where a channel keeps its mean.

Tokens are not equal. The first token of a context (the *sink*, on which heads rest their attention) must be kept
exactly, or the loss grows fivefold; it shows by its key, which points away from the mean key. Among the other tokens
the same measure tells, weakly, who will be looked at.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import CapacityError

BLOCK = 32
"""Tokens that share a step: the coder's lanes."""
MAX_WEIGHT = 4
"""Half octaves by which a block's step may differ from the band's."""
_GAIN = 0.4  # octaves of step per deviation of the score
_OUTLIER = 6.0  # deviations
_LEAST_TOKENS = 16  # below, scores say nothing


@dataclass(frozen=True)
class TokenOrder:
    """Tokens by falling importance.

    Attributes:
        order: int64 [tokens], the token at each rank: outliers, then blocks of 32 (the last may be shorter).
        outliers: how many of them lead; they are kept exactly.
        weights: weight of each block, in half octaves: a block's step is step * 2^(-weight / 2).
    """

    order: Tensor
    outliers: int
    weights: tuple[int, ...]

    @property
    def natural(self) -> bool:
        """Tokens stand as they came, all of one weight."""
        return self.outliers == 0 and not any(self.weights)


def natural_order(tokens: int) -> TokenOrder:
    """All tokens as they came, of one weight."""
    return TokenOrder(torch.arange(tokens), 0, (0,) * -(-tokens // BLOCK))


def order_tokens(keys: Tensor, starts_context: bool) -> TokenOrder:
    """Rank the tokens of a chunk.

    Args:
        keys: float32 [tokens, heads, dim], before RoPE.
        starts_context: the first token is a context's first: an outlier whatever its key says.
    """
    tokens = int(keys.shape[0])
    if tokens == 1:
        return natural_order(1)
    score = _scores(keys) if tokens >= _LEAST_TOKENS else torch.zeros(tokens)
    outlier = score > _OUTLIER
    if starts_context:
        score[0], outlier[0] = math.inf, True
    order = torch.argsort(score, descending=True, stable=True)
    outliers = min(int(outlier.sum()), BLOCK, max(1, tokens // 8))
    main = order[outliers:]
    octaves = (_GAIN * score[main]).clamp(-2.0, 2.0)
    octaves -= octaves.mean()
    weights = tuple(max(-MAX_WEIGHT, min(MAX_WEIGHT, round(2 * float(part.mean())))) for part in octaves.split(BLOCK))
    blocks = main.split(BLOCK if any(weights) else tokens)
    main = torch.cat([block.sort().values for block in blocks])
    return TokenOrder(torch.cat([order[:outliers].sort().values, main]), outliers, weights)


def _scores(keys: Tensor) -> Tensor:
    """How far each key points away from the mean key, in robust deviations [tokens]."""
    mean = keys.mean(0, keepdim=True)
    away = -torch.nn.functional.cosine_similarity(keys, mean, dim=2).mean(1)
    middle = away.median()
    deviation = 1.4826 * (away - middle).abs().median()
    return (away - middle) / deviation.clamp_min(1e-6)


def reference(values: Tensor) -> float:
    """The scale that steps are multiples of: the typical deviation of a tensor's channels over the chunk's tokens.

    Args:
        values: float32 [tokens, channels], outliers left out.
    """
    tokens = values.shape[0]
    largest = max(map(abs, map(float, torch.aminmax(values)))) if values.numel() else 0.0
    if largest == 0.0:
        return 1.0
    # One token shows no deviation; keys vary about as much as their median, values somewhat more.
    if tokens == 1:
        spread = 0.75 * float(values.abs().median())
    else:
        centred = values.double()  # squares of any fp32 number fit
        centred -= centred.mean(0)
        squares = torch.dot(centred.view(-1), centred.view(-1))
        spread = math.sqrt(float(squares) / ((tokens - 1) * values.shape[1]))
    return max(spread, 2.0**-12 * largest)


def quantise(values: Tensor, steps: Tensor, rounding: float) -> Tensor:
    """Dead-zone quantiser: int32 sign(x) * floor(|x| / step + rounding). Raises CapacityError beyond 2^26 steps."""
    magnitude = (values.abs() / steps).add_(rounding).floor_()
    if not float(magnitude.max()) < 1 << 26:  # NaN included
        raise CapacityError(
            "channel: a number is beyond 2^26 steps of its channel's mean; carry this layer by lossless"
        )
    return magnitude.copysign_(values).to(torch.int32)

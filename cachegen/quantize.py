"""Uniform and dead-zone quantisers, and the paper's bins: pure functions from numbers to int32 and back.

Every operation is one fp32 operation of torch, in the order written, so two machines quantise alike.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .errors import InputError

THIRDS = (0.5, 1.0, 1.5)
"""Relative bin sizes of the first, middle and last third of a model's layers (paper, section 5.2)."""
LIMIT = float(1 << 30)
"""Magnitudes end here: far beyond what any coder takes, so that it refuses them, and well within int32."""


def uniform(x: Tensor, step: Tensor | float) -> Tensor:
    """Mid-tread quantiser: the integer nearest to x / step, ties to even.

    Args:
        x: any float tensor.
        step: positive, broadcasts over `x`.
    Returns:
        int32, shape of `x`.
    """
    return torch.round(x / step).clamp(-LIMIT, LIMIT).to(torch.int32)


def dead_zone(x: Tensor, step: Tensor | float, rounding: float = 0.38) -> Tensor:
    """Dead-zone quantiser: sign(x) * floor(|x| / step + rounding).

    The zero bin is 2 * (1 - rounding) steps wide, every other one a step. `rounding` 0.5 is the uniform quantiser;
    less saves more bits than it costs in error where values pile up at zero.

    Args:
        x: any float tensor.
        step: positive, broadcasts over `x`.
        rounding: within (0, 0.5].
    Returns:
        int32, shape of `x`.
    Raises:
        InputError: `rounding` is outside its range.
    """
    if not 0.0 < rounding <= 0.5:
        raise InputError(f"rounding: expected within (0, 0.5]; got {rounding}")
    scaled = x / step
    magnitude = torch.floor(scaled.abs() + rounding).clamp_max(LIMIT)
    return torch.copysign(magnitude, scaled).to(torch.int32)


def dequantise(q: Tensor, step: Tensor | float, bias: float = 0.0) -> Tensor:
    """(q + sign(q) * bias) * step in fp32: the reconstruction of either quantiser.

    Args:
        q: integers.
        step: broadcasts over `q`.
        bias: where in its bin a non-zero value is rebuilt, in steps: 0 is the bin's nominal centre, below 0 nearer
            to zero.
    """
    value = q.to(torch.float32)
    if bias:
        value = value + torch.sign(value) * bias
    return value * step


def layer_bins(num_layers: int, bins: tuple[float, ...] = THIRDS) -> tuple[float, ...]:
    """Bin size of each layer: `bins[i]` for the i-th of len(bins) equal parts of the layers, the first parts smaller.

    Raises InputError on no layers or no bins.
    """
    if num_layers < 1 or not bins:
        raise InputError(f"bins by layer: expected layers and bins; got {num_layers} layers, {len(bins)} bins")
    return tuple(bins[layer * len(bins) // num_layers] for layer in range(num_layers))

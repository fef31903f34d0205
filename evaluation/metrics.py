"""The measures of a compressed cache, as docs/guide/bench.md defines them.

Distributions are next-token distributions over the continuing tokens; logits are float [tokens, vocabulary].
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from cachegen.errors import ShapeError

ROWS = 32
"""Tokens whose distributions are held in double precision at once (a vocabulary can be 256k wide)."""


@dataclass(frozen=True)
class Divergence:
    """What one context's continuation shows.

    Attributes:
        kl: mean over tokens of KL(p_reference || p_decoded), nats.
        top1_agreement: share of tokens whose most likely next token is the same.
        nll_delta: mean over tokens of -log p_decoded(true) + log p_reference(true), nats.
        tokens: tokens evaluated.
    """

    kl: float
    top1_agreement: float
    nll_delta: float
    tokens: int


def divergence(reference: Tensor, decoded: Tensor, targets: Tensor) -> Divergence:
    """Compare logits [tokens, vocabulary] after the untouched and the decoded cache; `targets` int64 [tokens] are true.

    Raises ShapeError if the three don't belong together.
    """
    if reference.shape != decoded.shape or reference.dim() != 2 or targets.shape != reference.shape[:1]:
        raise ShapeError(
            "divergence: expected two [tokens, vocabulary] and targets [tokens]; "
            f"got {tuple(reference.shape)}, {tuple(decoded.shape)}, {tuple(targets.shape)}"
        )
    kl = agree = delta = 0.0
    for i in range(0, reference.shape[0], ROWS):
        p = torch.log_softmax(reference[i : i + ROWS].double(), dim=-1)
        q = torch.log_softmax(decoded[i : i + ROWS].double(), dim=-1)
        true = targets[i : i + ROWS, None]
        # log p of an impossible token is -inf and its term 0, not NaN.
        kl += float(torch.where(p > -math.inf, p.exp() * (p - q), 0.0).sum())
        agree += float((p.argmax(-1) == q.argmax(-1)).sum())
        delta += float((p.gather(1, true) - q.gather(1, true)).sum())
    n = reference.shape[0]
    return Divergence(max(kl / n, 0.0), agree / n, delta / n, n)


def bootstrap_interval(
    values: Sequence[float], clusters: Sequence[object] | None = None, seed: int = 0, rounds: int = 2000
) -> tuple[float, float]:
    """95 % interval of the mean of `values`, resampling whole clusters (default: every value its own cluster)."""
    if not values:
        return math.nan, math.nan
    labels = list(range(len(values))) if clusters is None else list(clusters)
    order: dict[object, int] = {}
    index = np.array([order.setdefault(label, len(order)) for label in labels])
    sums = np.bincount(index, weights=np.asarray(values, dtype=np.float64))
    counts = np.bincount(index).astype(np.float64)
    drawn = np.random.default_rng(seed).integers(0, len(sums), size=(rounds, len(sums)))
    means = sums[drawn].sum(1) / counts[drawn].sum(1)
    low, high = np.quantile(means, [0.025, 0.975])
    return float(low), float(high)


def bits_per_element(nbytes: int, elements: int) -> float:
    """8 x bytes that a reader must fetch / numbers of K and V that the engine would hold."""
    return 8 * nbytes / elements


def ratio(nbytes: int, raw_bytes: int) -> float:
    """Bytes of the untouched cache / bytes fetched."""
    return raw_bytes / nbytes


def bits_at_kl(points: Sequence[tuple[float, float]], kl: float) -> float | None:
    """Bits per element at which a scheme reaches `kl`, from its measured (bits, KL) points.

    Interpolates linearly in bits against log KL between the two neighbours in rate that bracket `kl` (of several such
    pairs the cheapest). None if no pair does: never extrapolated. A KL of 0 counts as 1e-12.
    """
    ordered = sorted((bits, max(value, 1e-12)) for bits, value in points)
    for (bits_a, kl_a), (bits_b, kl_b) in pairwise(ordered):
        if kl_a >= kl >= kl_b:
            if kl_a == kl_b:
                return bits_a
            share = (math.log(kl_a) - math.log(kl)) / (math.log(kl_a) - math.log(kl_b))
            return bits_a + share * (bits_b - bits_a)
    return None


@dataclass(frozen=True)
class Paired:
    """Answers of the same questions from the untouched and the decoded cache.

    Attributes:
        cases: pairs compared.
        reference, decoded: share of exact answers.
        lost, gained: answers that flipped from right to wrong, and from wrong to right.
        p: McNemar's exact two-sided p of as uneven flips by chance.
    """

    cases: int
    reference: float
    decoded: float
    lost: int
    gained: int
    p: float


def paired(reference: Sequence[bool], decoded: Sequence[bool]) -> Paired:
    """Compare paired exact-match outcomes. Raises ShapeError if their numbers differ."""
    if len(reference) != len(decoded):
        raise ShapeError(f"paired: expected as many outcomes on both sides; got {len(reference)} and {len(decoded)}")
    n = len(reference)
    lost = sum(a and not b for a, b in zip(reference, decoded, strict=True))
    gained = sum(b and not a for a, b in zip(reference, decoded, strict=True))
    if n == 0:
        return Paired(0, math.nan, math.nan, 0, 0, 1.0)
    return Paired(n, sum(reference) / n, sum(decoded) / n, lost, gained, mcnemar(lost, gained))


def mcnemar(lost: int, gained: int) -> float:
    """Exact two-sided McNemar test: the chance of flips at least as uneven if either way were equally likely."""
    from scipy.stats import binomtest

    flips = lost + gained
    return 1.0 if flips == 0 else float(binomtest(min(lost, gained), flips, 0.5).pvalue)


def first_divergence(reference: Sequence[int], decoded: Sequence[int]) -> int:
    """Index of the first token in which two generations differ; the shorter length if one begins the other."""
    for i, (a, b) in enumerate(zip(reference, decoded, strict=False)):
        if a != b:
            return i
    return min(len(reference), len(decoded))


def percentile(values: Sequence[float], share: float) -> float:
    """The `share` quantile (0..1) of values, linearly interpolated; NaN of none."""
    return float(np.quantile(np.asarray(values), share)) if values else math.nan

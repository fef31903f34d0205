"""Measures against values worked out by hand."""

from __future__ import annotations

import math

import pytest
import torch
from cachegen.evaluation.metrics import (
    bits_at_kl,
    bits_per_element,
    bootstrap_interval,
    divergence,
    first_divergence,
    mcnemar,
    paired,
    percentile,
    ratio,
)

from cachegen.errors import ShapeError


def test_divergence_by_hand() -> None:
    p = torch.tensor([[0.5, 0.5], [0.9, 0.1]])
    q = torch.tensor([[0.25, 0.75], [0.9, 0.1]])
    found = divergence(p.log() + 3, q.log() - 7, torch.tensor([0, 1]))  # logits: any constant may be added
    assert found.kl == pytest.approx((0.5 * math.log(2) + 0.5 * math.log(2 / 3)) / 2)
    assert found.nll_delta == pytest.approx(math.log(2) / 2)
    assert found.tokens == 2


def test_divergence_is_not_symmetric_in_its_arguments() -> None:
    p, q = torch.tensor([[0.9, 0.1]]).log(), torch.tensor([[0.5, 0.5]]).log()
    target = torch.tensor([0])
    assert divergence(p, q, target).kl == pytest.approx(0.9 * math.log(1.8) + 0.1 * math.log(0.2))
    assert divergence(q, p, target).kl == pytest.approx(0.5 * math.log(0.5 / 0.9) + 0.5 * math.log(5))


def test_divergence_counts_agreement_over_many_blocks() -> None:
    reference = torch.zeros(100, 5)
    reference[:, 2] = 4.0
    decoded = reference.clone()
    decoded[:25] = torch.tensor([9.0, 0, 0, 0, 0])
    assert divergence(reference, decoded, torch.zeros(100, dtype=torch.int64)).top1_agreement == 0.75


def test_equal_distributions_have_none_and_impossible_tokens_no_nan() -> None:
    logits = torch.randn(40, 30, generator=torch.Generator().manual_seed(1))
    logits[:, 3] = -math.inf
    found = divergence(logits, logits, torch.zeros(40, dtype=torch.int64))
    assert (found.kl, found.top1_agreement, found.nll_delta) == (0.0, 1.0, 0.0)


def test_divergence_refuses_what_does_not_belong_together() -> None:
    with pytest.raises(ShapeError, match="divergence"):
        divergence(torch.zeros(3, 4), torch.zeros(3, 5), torch.zeros(3))
    with pytest.raises(ShapeError, match="divergence"):
        divergence(torch.zeros(3, 4), torch.zeros(3, 4), torch.zeros(2))


def test_bits_and_ratio() -> None:
    assert bits_per_element(300, 800) == 3.0
    assert ratio(300, 1600) == pytest.approx(16 / 3)


def test_bits_at_kl_is_linear_in_log_kl() -> None:
    points = [(6.0, 0.001), (2.0, 0.1), (4.0, 0.01)]
    assert bits_at_kl(points, 0.01) == pytest.approx(4.0)
    assert bits_at_kl(points, 10**-1.5) == pytest.approx(3.0)
    assert bits_at_kl(points, 10**-2.25) == pytest.approx(4.5)


def test_bits_at_kl_never_extrapolates() -> None:
    points = [(2.0, 0.1), (4.0, 0.02)]
    assert bits_at_kl(points, 0.01) is None
    assert bits_at_kl(points, 0.2) is None
    assert bits_at_kl([(4.0, 0.01)], 0.01) is None
    assert bits_at_kl([], 0.01) is None


def test_bits_at_kl_with_an_exact_neighbour_stays_between_the_two() -> None:
    found = bits_at_kl([(4.0, 0.02), (10.0, 0.0)], 0.01)
    assert found is not None
    assert 4.0 < found < 5.0


def test_bits_at_kl_takes_the_cheapest_bracket_when_kl_is_not_monotone() -> None:
    assert bits_at_kl([(1.0, 0.1), (2.0, 0.001), (3.0, 0.1), (4.0, 0.001)], 0.01) == pytest.approx(1.5)


@pytest.mark.parametrize(
    ("lost", "gained", "p"),
    [(0, 0, 1.0), (1, 0, 1.0), (6, 0, 2 / 64), (0, 6, 2 / 64), (5, 5, 1.0), (8, 2, 2 * 56 / 1024)],
)
def test_mcnemar_exact(lost: int, gained: int, p: float) -> None:
    assert mcnemar(lost, gained) == pytest.approx(p)


def test_paired_counts_flips_both_ways() -> None:
    found = paired([True, True, True, False, False], [True, False, False, True, False])
    assert (found.cases, found.lost, found.gained) == (5, 2, 1)
    assert (found.reference, found.decoded) == (0.6, 0.4)
    with pytest.raises(ShapeError):
        paired([True], [])


def test_bootstrap_is_deterministic_and_covers_the_mean() -> None:
    values = [float(i % 7) for i in range(50)]
    low, high = bootstrap_interval(values, seed=3)
    assert (low, high) == bootstrap_interval(values, seed=3)
    assert low < sum(values) / 50 < high


def test_bootstrap_by_cluster_is_wider_when_clusters_agree_within() -> None:
    values = [0.0] * 20 + [1.0] * 20 + [2.0] * 20
    clusters = ["a"] * 20 + ["b"] * 20 + ["c"] * 20
    free, clustered = bootstrap_interval(values), bootstrap_interval(values, clusters)
    assert clustered[1] - clustered[0] > 2 * (free[1] - free[0])
    assert bootstrap_interval([5.0, 5.0]) == (5.0, 5.0)


def test_first_divergence() -> None:
    assert first_divergence([1, 2, 3], [1, 2, 4]) == 2
    assert first_divergence([1, 2, 3], [1, 2, 3]) == 3
    assert first_divergence([1, 2, 3], [1]) == 1
    assert first_divergence([5], [6]) == 0


def test_percentile() -> None:
    assert percentile([0.0, 1.0, 2.0, 3.0, 4.0], 0.95) == pytest.approx(3.8)
    assert math.isnan(percentile([], 0.5))

"""Quantisers and bins."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cachegen.errors import InputError
from cachegen.quantize import dead_zone, dequantise, layer_bins, uniform

values = st.floats(-1e4, 1e4, width=32)
steps = st.floats(0.015625, 128.0, width=32)


@given(values, steps)
def test_uniform_is_within_half_a_step(x: float, step: float) -> None:
    q = uniform(torch.tensor([x]), step)
    assert q.dtype == torch.int32
    assert abs(float(dequantise(q, step)[0]) - x) <= 0.5 * step + 1e-6 * abs(x)


@given(values, steps, st.sampled_from([0.25, 0.38, 0.5]))
def test_dead_zone_follows_its_definition(x: float, step: float, rounding: float) -> None:
    scaled = abs(float(torch.tensor(x) / torch.tensor(step)))
    q = int(dead_zone(torch.tensor([x]), step, rounding)[0])
    lowest, highest = math.floor(scaled + rounding - 1e-3), math.floor(scaled + rounding + 1e-3)
    assert lowest <= abs(q) <= highest
    assert q == 0 or (q > 0) == (x > 0)


def test_dead_zone_widens_only_the_zero_bin() -> None:
    x = torch.tensor([0.0, 0.61, -0.61, 0.63, -0.63, 1.61, 1.63, -2.7])
    assert dead_zone(x, 1.0, 0.38).tolist() == [0, 0, 0, 1, -1, 1, 2, -3]
    assert dead_zone(x, 1.0, 0.5).tolist() == uniform(x, 1.0).tolist()


def test_values_beyond_the_integers_stay_large() -> None:
    q = dead_zone(torch.tensor([3e38, -3e38]), 1e-3)
    assert q[0] > 1 << 29
    assert q[1] < -(1 << 29)
    assert uniform(torch.tensor([3e38]), 1e-3)[0] > 1 << 29


def test_steps_broadcast_by_channel() -> None:
    q = dead_zone(torch.tensor([[1.0, 1.0], [-4.0, -4.0]]), torch.tensor([1.0, 0.25]), 0.5)
    assert q.tolist() == [[1, 4], [-4, -16]]


def test_dequantise_moves_nonzero_values_by_the_bias() -> None:
    assert dequantise(torch.tensor([-2, 0, 3]), 0.5, -0.25).tolist() == [-0.875, 0.0, 1.375]


@pytest.mark.parametrize("rounding", [0.0, -0.1, 0.51, float("nan")])
def test_dead_zone_refuses_rounding_out_of_range(rounding: float) -> None:
    with pytest.raises(InputError, match="rounding"):
        dead_zone(torch.zeros(1), 1.0, rounding)


def test_bins_grow_by_thirds_of_the_layers() -> None:
    assert layer_bins(30) == (0.5,) * 10 + (1.0,) * 10 + (1.5,) * 10
    assert layer_bins(4) == (0.5, 0.5, 1.0, 1.5)
    assert layer_bins(1) == (0.5,)
    assert layer_bins(2, (1.0,)) == (1.0, 1.0)


@pytest.mark.parametrize(("layers", "bins"), [(0, (1.0,)), (3, ())])
def test_bins_need_layers_and_bins(layers: int, bins: tuple[float, ...]) -> None:
    with pytest.raises(InputError, match="bins by layer"):
        layer_bins(layers, bins)

"""Anchors and deltas: splitting rows and joining them again."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cachegen.errors import InputError
from cachegen.transforms.anchor_delta import anchors, join, num_anchors, others, subtract


def test_a_group_of_ten_has_one_anchor() -> None:
    rows = torch.arange(25.0)[:, None]
    assert anchors(rows, 10).flatten().tolist() == [0, 10, 20]
    assert others(rows, 10).flatten().tolist() == [t for t in range(25) if t % 10]
    assert num_anchors(25, 10) == 3
    assert num_anchors(20, 10) == 2


def test_deltas_are_against_the_anchor_and_not_the_neighbour() -> None:
    rows = torch.tensor([[1.0], [3.0], [6.0], [10.0], [15.0]])
    assert subtract(others(rows, 3), anchors(rows, 3), 3).flatten().tolist() == [2.0, 5.0, 5.0]


@given(st.integers(1, 45), st.integers(1, 50), st.sampled_from([torch.float32, torch.bfloat16, torch.float16]))
def test_joining_undoes_splitting(tokens: int, length: int, dtype: torch.dtype) -> None:
    rows = torch.randint(-100, 100, (tokens, 10), generator=torch.Generator().manual_seed(tokens)).float()
    references = anchors(rows, length).clone()
    deltas = subtract(others(rows, length), references, length)
    assert references.shape[0] == num_anchors(tokens, length)
    assert deltas.shape[0] == tokens - references.shape[0]
    heads_first = torch.full((2, tokens + 3, 3), 7.0, dtype=dtype)
    first = heads_first.transpose(0, 1)[1 : tokens + 1]
    second = torch.empty(tokens, 1, 4, dtype=dtype)
    join(references, deltas, length, [first, second])
    assert torch.equal(torch.cat([first.flatten(1), second.flatten(1)], 1).float(), rows)
    assert (heads_first[:, 0] == 7).all()
    assert (heads_first[:, tokens + 1 :] == 7).all()


def test_sums_are_rounded_once() -> None:
    target = torch.empty(2, 1, 1, dtype=torch.bfloat16)
    join(torch.tensor([[256.0]]), torch.tensor([[1.002]]), 2, [target])
    assert target.flatten().tolist() == [256.0, 258.0]  # rounding 1.002 first would give 257, and then 256


@pytest.mark.parametrize("length", [0, -1])
def test_groups_have_tokens(length: int) -> None:
    with pytest.raises(InputError, match="group length"):
        num_anchors(5, length)

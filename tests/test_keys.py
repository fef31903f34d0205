"""Keys: what they share and what they never do."""

from __future__ import annotations

import hashlib
import re
import struct
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from cachegen.errors import InputError, LevelError, LineageError, RangeError, ShapeError
from cachegen.keys import ChunkKey, chunk_keys, content_key, token_digest
from cachegen.kv import Lineage

F, G = bytes(32), bytes([1] * 32)
ids = st.lists(st.integers(0, 5), min_size=1, max_size=24)
sizes = st.integers(1, 9)
texts = st.text(max_size=6)
values = st.one_of(st.text(max_size=4), st.binary(max_size=4))


def names(*args: Any, **kwargs: Any) -> list[str]:
    return [key.name for key in chunk_keys(*args, **{"fingerprint": F, **kwargs})]


@given(ids=ids, size=sizes)
def test_chunks_cover_the_context(ids: list[int], size: int) -> None:
    keys = chunk_keys(ids, size, fingerprint=F)
    assert [key.start for key in keys] == list(range(0, len(ids), size))
    assert [key.stop for key in keys] == [min(s + size, len(ids)) for s in range(0, len(ids), size)]
    assert len({key.name for key in keys}) == len(keys)
    assert all(re.fullmatch(r"p-[0-9a-f]{64}", key.name) for key in keys)
    assert keys[0].hex == keys[0].digest.hex()


@given(ids=ids, size=sizes, salt=texts, other=texts)
def test_salts_separate(ids: list[int], size: int, salt: str, other: str) -> None:
    assert names(ids, size, salt=salt) == names(ids, size, salt=salt)
    if salt != other:
        assert not set(names(ids, size, salt=salt)) & set(names(ids, size, salt=other))
    assert not set(names(ids, size)) & set(names(ids, size, fingerprint=G))
    assert not set(names(ids, size)) & set(names(ids, size, codec="klt"))


@given(a=ids, b=ids, size=sizes)
def test_prefix_keys_are_equal_exactly_where_prefixes_are(a: list[int], b: list[int], size: int) -> None:
    for one, other in zip(chunk_keys(a, size, fingerprint=F), chunk_keys(b, size, fingerprint=F), strict=False):
        same = a[: one.stop] == b[: other.stop]
        assert (one.name == other.name) == same


@given(ids=ids, size=sizes, position=st.integers(0, 23), change=st.integers(1, 5))
def test_a_changed_token_changes_every_key_after_it(ids: list[int], size: int, position: int, change: int) -> None:
    position %= len(ids)
    other = list(ids)
    other[position] = (other[position] + change) % 7
    assume(other != ids)
    chunk = position // size
    before, after = names(ids, size), names(other, size)
    assert before[:chunk] == after[:chunk]
    assert not set(before[chunk:]) & set(after[chunk:])


@given(a=st.tuples(texts, texts, st.lists(values, max_size=3)), b=st.tuples(texts, texts, st.lists(values, max_size=3)))
@settings(max_examples=300)
def test_fields_never_run_into_each_other(a: Any, b: Any) -> None:
    """Equal keys mean equal salt, codec and extras, whatever bytes they hold."""
    one, other = (names([1, 2], 2, salt=s, codec=c, extras=e)[0] for s, c, e in (a, b))
    assert (one == other) == (a == b)


def test_text_and_bytes_differ() -> None:
    assert names([1], extras=["ab"]) != names([1], extras=[b"ab"])
    assert names([1], extras=["a", "b"]) != names([1], extras=["ab"])
    assert names([1], extras=["a", "b"]) != names([1], extras=["b", "a"])


def test_extras_with_a_position_enter_at_their_chunk() -> None:
    plain, image = names(range(12), 4), names(range(12), 4, extras=[(5, b"image")])
    assert plain[0] == image[0]
    assert plain[1] != image[1]
    assert plain[2] != image[2]
    assert image != names(range(12), 4, extras=[(6, b"image")])
    assert names(range(12), 4, extras=[b"image"])[0] != plain[0]
    with pytest.raises(RangeError, match="12 tokens"):
        names(range(12), 4, extras=[(12, b"image")])


def test_chunk_boundaries_dont_matter_to_a_shared_chunk() -> None:
    """The first 4 tokens are the same chunk whether the size is 4 or the context ends there."""
    assert names(range(8), 4)[0] == names(range(4), 256)[0]
    assert names(range(8), 8)[0] not in names(range(8), 4)


def test_content_keys_forget_the_prefix_but_not_the_start() -> None:
    a, b = [1, 2, 3, 4, 7, 7, 7, 7], [9, 9, 9, 9, 7, 7, 7, 7]
    one, other = chunk_keys(a, 4, fingerprint=F, mode="content"), chunk_keys(b, 4, fingerprint=F, mode="content")
    assert one[1] == other[1]
    assert one[1].name.startswith("c-")
    assert one[0].name == names(a, 4)[0]  # a context's first tokens keep their prefix key
    assert one[0].name != other[0].name
    assert one[1].name not in names(a, 4)
    assert content_key([7, 7, 7, 7], start=4, fingerprint=F) == one[1]
    assert content_key([7, 7, 7, 7], start=400, fingerprint=F).digest == one[1].digest
    assert content_key([7, 7, 7, 7], start=4, fingerprint=F, salt="s").digest != one[1].digest
    assert content_key([7, 7, 7, 7], start=4, fingerprint=F, codec="klt").digest != one[1].digest
    with_image = chunk_keys(b, 4, fingerprint=F, mode="content", extras=[(5, b"x")])[1]
    assert with_image != one[1]
    assert content_key([7] * 4, start=4, fingerprint=F, extras=[(5, b"x")]) == with_image
    with pytest.raises(RangeError, match="first tokens"):
        content_key([7, 7], start=0, fingerprint=F)
    with pytest.raises(RangeError, match="at least one"):
        content_key([], start=3, fingerprint=F)


@given(level=st.integers(0, 255), other=st.integers(0, 255))
def test_levels_have_names_of_their_own(level: int, other: int) -> None:
    key = chunk_keys([1, 2, 3], fingerprint=F)[0]
    assert key.with_level(level).name == f"{key.name}-q{level}"
    assert (key.with_level(level).name == key.with_level(other).name) == (level == other)
    assert len(key.with_level(level).name) <= 80


def test_levels_out_of_range() -> None:
    key = chunk_keys([1], fingerprint=F)[0]
    for level in (-1, 256, True, "1", 1.0):
        with pytest.raises(LevelError):
            key.with_level(level)  # type: ignore[arg-type]


def test_lossy_lineage_never_lands_on_exact_keys() -> None:
    key = chunk_keys([1, 2, 3], fingerprint=F)[0]
    lossy = {key.with_lineage(Lineage(codec, level)).name for codec in ("klt", "channel") for level in (0, 1)}
    assert len(lossy) == 4
    assert key.name not in lossy
    assert all(re.fullmatch(r"p-[0-9a-f]{64}-lossy", name) for name in lossy)
    assert not {name[:66] for name in lossy} & {key.name}
    assert key.with_lineage(None) is key
    assert key.with_lineage(Lineage("klt", 1, 0.01)).digest == key.with_lineage(Lineage("klt", 1, 0.02)).digest
    both = key.with_lineage(Lineage("klt", 1)).with_level(3)
    assert both.name.endswith("-lossy-q3")
    assert len(both.with_level(255).name) <= 80
    with pytest.raises(LineageError, match="without lineage"):
        both.with_lineage(Lineage("klt", 0))


def test_ids_in_any_form() -> None:
    want = chunk_keys([3, 1, 70000], fingerprint=F)
    for form in (
        (3, 1, 70000),
        torch.tensor([3, 1, 70000]),
        torch.tensor([3, 1, 70000], dtype=torch.int32),
        np.array([3, 1, 70000], dtype=np.uint32),
        np.array([3, 9, 1, 9, 70000])[::2],
        iter([3, 1, 70000]),
    ):
        assert chunk_keys(form, fingerprint=F) == want
    assert chunk_keys([], fingerprint=F) == []


@pytest.mark.parametrize(
    ("wrong", "error"),
    [
        ([-1], InputError),
        ([1 << 63], InputError),
        ([1 << 70], InputError),
        ([1.0], InputError),
        (["a"], InputError),
        ([True], InputError),
        ([[1, 2]], ShapeError),
        (7, ShapeError),
    ],
)
def test_wrong_ids(wrong: Any, error: type[Exception]) -> None:
    with pytest.raises(error, match="token ids"):
        chunk_keys(wrong, fingerprint=F)
    with pytest.raises(error, match="token ids"):
        token_digest(wrong)


def test_wrong_arguments() -> None:
    with pytest.raises(RangeError, match="chunk_size"):
        chunk_keys([1], 0, fingerprint=F)
    with pytest.raises(InputError, match="32 bytes"):
        chunk_keys([1], fingerprint=b"short")
    with pytest.raises(InputError, match="mode"):
        chunk_keys([1], fingerprint=F, mode="suffix")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="strings"):
        chunk_keys([1], fingerprint=F, salt=None)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="text, bytes"):
        chunk_keys([1], fingerprint=F, extras=[(0, 1.5)])  # type: ignore[list-item]


def test_token_digest_is_what_the_format_says() -> None:
    want = hashlib.sha256(b"cachegen.tokens\0" + struct.pack("<3q", 5, 0, 1 << 40)).digest()
    assert token_digest([5, 0, 1 << 40]) == want
    assert token_digest((5, 0, 1 << 40)) == want
    assert token_digest([5, 0]) != want


def test_keys_stay_as_they_are() -> None:
    """Stores keep objects under these names: a change here loses every stored context."""
    keys = chunk_keys([1, 2, 3, 4, 5], 2, fingerprint=G, salt="tenant", codec="klt", extras=["lora", (3, b"image")])
    assert [key.hex[:16] for key in keys] == GOLDEN
    assert isinstance(keys[0], ChunkKey)


GOLDEN = ["88d963f84ae6dab5", "9797290137482255", "b21167ee1cee6e40"]

"""JSON between machines: one way to write a value, no leniency in reading it."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cachegen import strict_json
from cachegen.errors import FormatError, InputError, LimitExceeded

VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**63 - 1)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(exclude_categories=("Cs",))),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text("abé\n", max_size=3), inner, max_size=4),
    max_leaves=20,
)


@settings(max_examples=100, deadline=None)
@given(st.dictionaries(st.text("abc", max_size=3), VALUES, max_size=4))
def test_what_is_written_is_read_and_written_alike(value):
    raw = strict_json.dumps(value, "it")
    assert strict_json.loads(raw, "it") == value
    assert strict_json.dumps(strict_json.loads(raw, "it"), "it") == raw
    assert json.loads(raw) == value


def test_the_canonical_form():
    assert strict_json.dumps({"b": [1, 2.5], "a": {"é": None}}, "it") == '{"a":{"é":null},"b":[1,2.5]}'.encode()
    assert strict_json.loads(b' { "a" : 1 } ', "it") == {"a": 1}


@pytest.mark.parametrize("value", [float("nan"), float("inf"), b"x", {1}, "\ud800", object()], ids=repr)
def test_what_json_cannot_hold(value):
    with pytest.raises(InputError, match="it: "):
        strict_json.dumps({"a": value}, "it")


@pytest.mark.parametrize(
    ("raw", "why"),
    [
        (b'{"a":1,"a":1}', "once"),
        (b'{"b":[{"a":1,"a":2}]}', "once"),
        (b'{"a":NaN}', "finite"),
        (b'{"a":Infinity}', "finite"),
        (b'{"a":[-Infinity]}', "finite"),
        (b'{"a":1e999}', "finite"),
        (b'{"a":-1e999}', "finite"),
        (b'{"a":9223372036854775808}', "64-bit"),
        (b'{"a":-9223372036854775809}', "64-bit"),
        (b'{"a":' + b"1" * 100_000 + b"}", "64-bit"),
        (b'{"a":"\\ud800"}', "surrogate"),
        (b'{"a":["\\udfff"]}', "surrogate"),
        (b'{"a":[["x\\udfff"]]}', "surrogate"),
        (b'{"\\ud800":1}', "surrogate"),
        (b'{"a":"\xff"}', "UTF-8"),
        (b"\xef\xbb\xbf{}", "JSON"),
        (b"{}{}", "JSON"),
        (b"{}\0", "JSON"),
        (b"{'a':1}", "JSON"),
        (b'{"a":1,}', "JSON"),
        (b'{"a":01}', "JSON"),
        (b'{"a":"\n"}', "JSON"),
        (b"", "JSON"),
        (b"[]", "object"),
        (b"3", "object"),
        (b"null", "object"),
    ],
)
def test_what_is_refused(raw, why):
    with pytest.raises(FormatError, match=why):
        strict_json.loads(raw, "it")


def test_what_is_at_the_limits():
    numbers = {"a": 2**63 - 1, "b": -(2**63), "c": 1.7976931348623157e308, "d": 5e-324, "e": "\U0001f9ca"}
    assert strict_json.loads(strict_json.dumps(numbers, "it"), "it") == numbers
    assert strict_json.loads(b'{"a":"\\ud83e\\uddca"}', "it") == {"a": "\U0001f9ca"}  # a pair is a character


@pytest.mark.parametrize(("opening", "closing"), [(b"[", b"]"), (b'{"a":', b"}")])
def test_nesting(opening, closing):
    def nested(levels: int) -> bytes:
        inner = b"1" if opening != b"[" else b""
        return b'{"a":' + opening * (levels - 1) + inner + closing * (levels - 1) + b"}"

    strict_json.loads(nested(strict_json.MAX_DEPTH), "it")
    for levels in (strict_json.MAX_DEPTH + 1, 500, 100_000):
        with pytest.raises(LimitExceeded, match="nesting"):
            strict_json.loads(nested(levels), "it")

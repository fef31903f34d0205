"""JSON between machines that needn't trust each other: one way to write a value, and no leniency in reading it.

Canonical form: sorted keys, no white space, UTF-8, no NaN or Infinity. Reading refuses what JSON parsers disagree on
(repeated keys, numbers beyond double or 64 bits, lone surrogates) and what is only there to exhaust one (depth).
"""

from __future__ import annotations

import json
import math
from typing import Any, NoReturn

from .errors import FormatError, InputError, LimitExceeded

MAX_DEPTH = 16


def dumps(value: Any, what: str) -> bytes:
    """Canonical bytes of `value`. Raises InputError if JSON can't hold it; `what` names it in messages."""
    try:
        text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
        return text.encode("utf-8")
    except (TypeError, ValueError, RecursionError) as error:
        raise InputError(f"{what}: expected a value that JSON can hold (no NaN, no bytes); got {error}") from error


def loads(raw: bytes | memoryview, what: str) -> dict[str, Any]:
    """The object that `raw` holds. Raises FormatError, or LimitExceeded beyond MAX_DEPTH; `what` names it."""
    try:
        value = json.loads(
            bytes(raw).decode("utf-8"),
            object_pairs_hook=_object,
            parse_constant=_constant,
            parse_float=_float,
            parse_int=_int,
        )
    except RecursionError as error:
        raise LimitExceeded(f"{what}: expected at most {MAX_DEPTH} levels of nesting; got more") from error
    except _Refused as error:
        raise FormatError(f"{what}: {error}") from error
    except ValueError as error:  # JSONDecodeError and UnicodeDecodeError are ValueErrors
        raise FormatError(f"{what}: expected JSON in UTF-8; got bytes that aren't ({error})") from error
    if not isinstance(value, dict):
        raise FormatError(f"{what}: expected a JSON object; got {type(value).__name__}")
    _check_depth(value, what)
    return value


class _Refused(ValueError):
    """A value that JSON's grammar allows and this reader doesn't."""


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise _Refused("expected every key once; one is repeated")
    for key, value in pairs:
        _check_text(key)
        if isinstance(value, str):
            _check_text(value)
    return found


def _check_text(text: str) -> None:
    if not text.isascii() and any("\ud800" <= char <= "\udfff" for char in text):
        raise _Refused("expected Unicode text; got a lone surrogate")


def _constant(name: str) -> NoReturn:
    raise _Refused(f"expected finite numbers; got {name}")


def _float(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise _Refused(f"expected finite numbers; got {text[:32]}")
    return value


def _int(text: str) -> int:
    if len(text) > 20 or not -(1 << 63) <= (value := int(text)) < 1 << 63:
        raise _Refused(f"expected 64-bit integers; got {text[:32]}")
    return value


def _check_depth(value: Any, what: str) -> None:
    """Bound the nesting, so that nothing downstream recurses without end; strings in lists are checked here too."""
    level: list[Any] = [value]
    for _ in range(MAX_DEPTH):
        below: list[Any] = []
        for item in level:
            for child in item.values() if isinstance(item, dict) else item:
                if isinstance(child, (dict, list)):
                    below.append(child)
                elif isinstance(child, str) and not child.isascii():
                    try:
                        _check_text(child)
                    except _Refused as error:
                        raise FormatError(f"{what}: {error}") from error
        if not below:
            return
        level = below
    raise LimitExceeded(f"{what}: expected at most {MAX_DEPTH} levels of nesting; got more")

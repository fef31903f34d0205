"""Store URLs: `scheme:path?option=value`, e.g. `file:/var/cache/kv?max_bytes=20GiB`. Grammar: docs/guide/stores.md."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from urllib.parse import parse_qsl, unquote, urlsplit

from ..errors import InputError

_SIZE = re.compile(r"(\d{1,18})\s*([kMGT]?i?B?)")
_UNITS = {"": 1, "k": 10**3, "M": 10**6, "G": 10**9, "T": 10**12, "ki": 2**10, "Mi": 2**20, "Gi": 2**30, "Ti": 2**40}


@dataclass(frozen=True)
class StoreURL:
    """A store URL taken apart.

    Attributes:
        text: the URL as given, for messages.
        scheme: what comes before the first ':'.
        host: what comes after '//' ('' where the URL has none).
        path: the path, percent-decoded.
        options: the query's names and values.
    """

    text: str
    scheme: str
    host: str
    path: str
    options: Mapping[str, str]

    @classmethod
    def parse(cls, text: str) -> StoreURL:
        """Raises InputError for what isn't a store URL."""
        parts = urlsplit(text)
        if not parts.scheme or parts.fragment:
            raise InputError(f"store URL: expected e.g. file:PATH, file:PATH?max_bytes=20GiB or memory:; got {text!r}")
        pairs = parse_qsl(parts.query, keep_blank_values=True)
        options = dict(pairs)
        if len(options) != len(pairs):
            raise InputError(f"{text}: each option may be given once")
        return cls(text, parts.scheme, unquote(parts.netloc), unquote(parts.path), options)

    def check_options(self, *known: str) -> None:
        """Raises InputError for an option that the store doesn't know."""
        for name in self.options:
            if name not in known:
                raise InputError(
                    f"{self.text}: unknown option {name!r}; {self.scheme}: takes {', '.join(known) or 'no options'}"
                )

    def size(self, option: str) -> int | None:
        """A number of bytes (`1000`, `20GiB`, `500MB`), or None where the option isn't given. Raises InputError."""
        text = self.options.get(option)
        if text is None:
            return None
        found = _SIZE.fullmatch(text)
        unit = None if found is None else _UNITS.get(found[2].removesuffix("B"))
        if found is None or unit is None or int(found[1]) == 0:
            raise InputError(f"{self.text}: {option}: expected bytes such as 1000, 500MB or 20GiB; got {text!r}")
        return int(found[1]) * unit

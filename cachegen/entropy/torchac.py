"""torchac, the paper's arithmetic coder, over our tables: an oracle for the native coder, and its baseline.

torchac is compiled at first use from the sources of the installed package (extra `torchac`: needs g++), with -O3; the
package's own import would compile it without any optimisation, twice as slow, which would flatter every comparison.
The result is cached by torch (TORCH_EXTENSIONS_DIR).

Only banks without escape and low bits can be coded: torchac knows symbols alone.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import CorruptStream, InputError, MissingExtra, ShapeError, Truncated
from .rans import LANES, MatrixSpec

PRECISION = 16
"""Bits of torchac's cumulative frequencies."""
_PART_ENTRIES = 1 << 24
_EXTRA = "install it with: pip install 'cachegen[torchac]' (and a C++ compiler)"


@cache
def backend() -> Any:
    """torchac's compiled functions `encode_cdf(cdf, symbols)` and `decode_cdf(cdf, bytes)`.

    Raises MissingExtra where torchac, ninja or a compiler is missing.
    """
    found = importlib.util.find_spec("torchac")
    if found is None or found.origin is None:
        raise MissingExtra(f"torchac isn't installed; {_EXTRA}")
    source = Path(found.origin).parent / "backend" / "torchac_backend.cpp"
    from torch.utils import cpp_extension

    try:
        with _scripts_on_path():
            return cpp_extension.load(name="cachegen_torchac_o3", sources=[str(source)], extra_cflags=["-O3"])
    except (OSError, RuntimeError) as error:
        raise MissingExtra(f"torchac can't be compiled ({error}); {_EXTRA}") from error


@contextmanager
def _scripts_on_path() -> Iterator[None]:
    """Ninja lies beside this interpreter, which needs no activated environment."""
    before = os.environ.get("PATH", "")
    os.environ["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), before])
    try:
        yield
    finally:
        os.environ["PATH"] = before


def expanded_cdf(spec: MatrixSpec, first: int = 0, last: int | None = None) -> Tensor:
    """Cumulative frequencies of every value of tokens first..last: int16 [tokens * components, A + 1], as torchac
    wants them (16 bits, 65536 written as 0). Raises InputError for banks with escape or low bits."""
    if not spec.bank.simple:
        raise InputError("torchac codes symbols only: expected a bank without escape and low bits")
    last = spec.tokens if last is None else last
    freqs = spec.bank.freqs.astype(np.int64) << (PRECISION - 12)
    cdf = np.concatenate([np.zeros((len(freqs), 1), np.int64), freqs.cumsum(axis=1)], axis=1)
    table = torch.from_numpy(cdf.astype(np.uint16).view(np.int16))
    ids = np.broadcast_to(spec.table_ids, (spec.blocks, spec.components))[np.arange(first, last) // LANES]
    return table[torch.from_numpy(ids.astype(np.int64))].reshape(-1, cdf.shape[1])


def encode_symbols(cdf: Tensor, symbols: Tensor) -> bytes:
    """torchac itself: symbols int16 [n] under cdf int16 [n, A + 1]."""
    return bytes(backend().encode_cdf(cdf, symbols))


def decode_symbols(cdf: Tensor, data: bytes) -> Tensor:
    """torchac itself: symbols int16 [n]. It can't tell damaged bytes from good ones."""
    symbols: Tensor = backend().decode_cdf(cdf, data)
    return symbols


def encode(values: Tensor, spec: MatrixSpec) -> bytes:
    """Encode uint8 symbols [tokens, components] (q + offset): parts of tokens, each a u32 LE length and its bytes.

    Raises MissingExtra, InputError, ShapeError.
    """
    if values.dtype is not torch.uint8 or tuple(values.shape) != (spec.tokens, spec.components):
        raise ShapeError(
            f"torchac: expected uint8 symbols [{spec.tokens}, {spec.components}]; "
            f"got {values.dtype} {list(values.shape)}"
        )
    if int(values.max()) >= spec.bank.alphabet:
        raise InputError(f"torchac: expected symbols below {spec.bank.alphabet}; got {int(values.max())}")
    out = []
    for first, last in _parts(spec):
        symbols = values[first:last].reshape(-1).to(torch.int16)
        part = encode_symbols(expanded_cdf(spec, first, last), symbols)
        out.append(len(part).to_bytes(4, "little") + part)
    return b"".join(out)


def decode(data: bytes, spec: MatrixSpec, out: Tensor) -> None:
    """Decode into `out`, uint8 [tokens, components]. Raises MissingExtra, InputError, ShapeError, FormatError kinds."""
    if out.dtype is not torch.uint8 or tuple(out.shape) != (spec.tokens, spec.components):
        raise ShapeError(
            f"torchac: expected uint8 [{spec.tokens}, {spec.components}] to decode to; "
            f"got {out.dtype} {list(out.shape)}"
        )
    at = 0
    for first, last in _parts(spec):
        size = int.from_bytes(data[at : at + 4], "little")
        if len(data) - at < 4 + size:
            raise Truncated(f"torchac: expected {size} bytes of tokens {first}..{last}; got {len(data) - at - 4}")
        symbols = decode_symbols(expanded_cdf(spec, first, last), bytes(data[at + 4 : at + 4 + size]))
        out[first:last] = symbols.reshape(last - first, spec.components).to(torch.uint8)
        at += 4 + size
    if at != len(data):
        raise CorruptStream(f"torchac: {len(data) - at} bytes left over")


def _parts(spec: MatrixSpec) -> list[tuple[int, int]]:
    """Token ranges whose expanded tables fit in memory."""
    rows = max(1, _PART_ENTRIES // (spec.components * (spec.bank.alphabet + 1)))
    return [(t, min(t + rows, spec.tokens)) for t in range(0, spec.tokens, rows)]

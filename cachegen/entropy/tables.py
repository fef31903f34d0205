"""Integer probability tables: frequencies that sum to 4096, and what their symbols mean.

A `TableBank` is a set of tables of one alphabet. Each table says how a signed value q maps to a symbol:

    q >> low_bits  =  symbol - offset        (arithmetic shift; low_bits raw bits follow the symbol)

The last symbol may be the *escape*: the value (q >> low_bits) then follows as a 16-bit word. Reconstruction points
turn symbols into numbers: recon[table, symbol] where low_bits is 0, else q + sign(q) * escape_bias.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

PROB_BITS = 12
PROB_SUM = 1 << PROB_BITS
ALPHABETS = (16, 32, 64, 256)
"""Alphabet sizes the coder is compiled for; smaller ones use the next size with zero frequencies."""


@dataclass(frozen=True)
class TableBank:
    """Tables of one alphabet size A.

    Attributes:
        freqs: uint16 [tables, A], each row sums to 4096, each entry 0..4095; a symbol of frequency 0 can't be coded.
        offset: the symbol of q = 0 (shift of zero), the same for every table.
        low_bits: uint8 [tables], 0..12 raw bits per value.
        escape: whether the last symbol (A - 1) is the escape.
        recon: float32 [tables, A], reconstruction point of each symbol (low_bits = 0), in steps.
        escape_bias: float, added to |q| of escaped values and of tables with low bits.
    """

    freqs: NDArray[np.uint16]
    offset: int
    low_bits: NDArray[np.uint8]
    escape: bool
    recon: NDArray[np.float32]
    escape_bias: float = 0.0

    @property
    def alphabet(self) -> int:
        return int(self.freqs.shape[1])

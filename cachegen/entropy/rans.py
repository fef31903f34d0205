"""32-lane interleaved rANS, native. The bitstream: docs/format.md, *Entropy coder*; plain twin: `reference`.

A *matrix* of values [tokens, components] is coded as one or more streams; lane = token of a 32-token block, stepping
over components, so every lane of a step shares one table: `table_ids[block, component]`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from .tables import TableBank


@dataclass(frozen=True)
class MatrixSpec:
    """What both sides know about a coded matrix.

    Attributes:
        tokens, components: its shape.
        bank: its tables.
        table_ids: uint16 [components] or [ceil(tokens / 32), components].
    """

    tokens: int
    components: int
    bank: TableBank
    table_ids: NDArray[np.uint16]


def encode(values: Sequence[Tensor], specs: Sequence[MatrixSpec], threads: int = 1) -> list[bytes]:
    """Encode matrices (int16 or int32 [tokens, components], C-contiguous), several streams in flight.

    Raises CapacityError if a value can't be coded (no escape, or beyond its 16 bits), TableError on a bad bank.
    """
    raise NotImplementedError


def decode(data: Sequence[bytes | memoryview], specs: Sequence[MatrixSpec], out: Sequence[Tensor], threads: int = 1) -> None:
    """Decode matrices to integers: `out[i]` is uint8 (symbols + 0 offset), int16 or int32 [tokens, components].

    Raises CorruptStream, Truncated, TableError; nothing outside `out` is written, and nothing outside `data` read.
    """
    raise NotImplementedError


@dataclass(frozen=True)
class Dequant:
    """Fused dequantisation: value = ((recon * scale[block, c]) * token_scale[t]) + bias[c], each an fp32 operation.

    Attributes:
        scale: float32 [components] or [blocks, components]; None = 1.
        token_scale: float32 [tokens] or None (skipped).
        bias: float32 [components] or None (skipped).
    """

    scale: Tensor | None = None
    token_scale: Tensor | None = None
    bias: Tensor | None = None


def decode_dequant(
    data: Sequence[bytes | memoryview],
    specs: Sequence[MatrixSpec],
    dequants: Sequence[Dequant],
    out: Sequence[Tensor],
    threads: int = 1,
) -> None:
    """Decode and dequantise: `out[i]` is bf16, fp16 or fp32, [tokens, components] or [tokens, heads, dim] with any
    token and head strides (last dim contiguous, heads * dim = components). Rounding to nearest even."""
    raise NotImplementedError

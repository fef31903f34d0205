"""The entropy coder alone: against torchac on the same symbols, against plain stores, against its tables' ideal.

Everything runs on one thread, on symbols drawn from the tables that code them: 16 symbols, 64 tables of generalised
Gaussians whose entropies span those of quantised caches, one table a channel, 256-token chunks of 1,024 channels.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cachegen.entropy import rans
from cachegen.entropy.rans import Dequant, MatrixSpec
from cachegen.entropy.tables import TableBank, from_counts, ideal_bits
from cachegen.entropy.torchac import expanded_cdf

from .timing import interleaved

ALPHABET, TABLES, CENTRE = 16, 64, 7
CHUNK, CHANNELS = 256, 1024
Row = dict[str, Any]


@dataclass(frozen=True)
class Workload:
    """Matrices of symbols uint8 [tokens, channels], what codes them, and how they are dequantised."""

    symbols: list[Tensor]
    specs: list[MatrixSpec]
    dequants: list[Dequant]

    @property
    def count(self) -> int:
        return sum(matrix.numel() for matrix in self.symbols)

    def repeated(self, times: int) -> Workload:
        """The same matrices `times` over."""
        return Workload(self.symbols * times, self.specs * times, self.dequants * times)


def draw_tables() -> tuple[np.ndarray[Any, np.dtype[np.float64]], TableBank]:
    """64 distributions over 16 symbols, and the bank that codes them."""
    offsets = np.linspace(-0.5, 0.5, 21)
    steps = np.abs(np.arange(ALPHABET)[:, None] - CENTRE + offsets)
    densities = [np.exp(-((steps / scale) ** 1.3)).sum(axis=1) for scale in np.geomspace(0.3, 3.2, TABLES)]
    shares = np.array([density / density.sum() for density in densities])
    return shares, from_counts(np.round(shares * 2**30).astype(np.int64), offset=CENTRE)


def draw_workload(matrices: int, seed: int, tokens: int = CHUNK, channels: int = CHANNELS) -> Workload:
    """`matrices` chunks of one layer's keys or values each."""
    rng = np.random.default_rng(seed)
    shares, bank = draw_tables()
    edges = shares.cumsum(axis=1)[:, :-1]
    symbols, specs, dequants = [], [], []
    for _ in range(matrices):
        ids = rng.integers(0, TABLES, channels)
        drawn = rng.random((tokens, channels))
        matrix = np.zeros((tokens, channels), np.uint8)
        for edge in edges[ids].T:
            matrix += drawn >= edge
        symbols.append(torch.from_numpy(matrix))
        specs.append(MatrixSpec(tokens, channels, bank, ids.astype(np.uint16)))
        scale = torch.from_numpy(rng.uniform(0.05, 0.5, channels).astype(np.float32))
        bias = torch.from_numpy(rng.normal(0, 0.5, channels).astype(np.float32))
        dequants.append(Dequant(scale=scale, bias=bias))
    return Workload(symbols, specs, dequants)


# --------------------------------------------------------------------------- against torchac
def against_torchac(work: Workload, isas: Sequence[str], runs: int, torchac: Any) -> tuple[list[Row], dict[str, float]]:
    """Rows of symbols a second and bits a symbol; summary of the ratios by ISA.

    Args:
        torchac: its compiled backend, or None to leave it out.
    """
    cases: dict[str, Callable[[], object]] = {}
    sizes: dict[str, int] = {}
    outs = [torch.empty_like(matrix) for matrix in work.symbols]
    data = rans.encode(work.symbols, work.specs)
    for isa in isas:
        cases[f"encode.{isa}"] = lambda isa=isa: rans.encode(work.symbols, work.specs, isa=isa)  # type: ignore[misc]
        cases[f"decode.{isa}"] = lambda isa=isa: rans.decode(data, work.specs, outs, isa=isa)  # type: ignore[misc]
        sizes[isa] = sum(map(len, data))
    if torchac is not None:
        tables = [expanded_cdf(spec).contiguous() for spec in work.specs]
        flat = [matrix.reshape(-1).to(torch.int16) for matrix in work.symbols]
        streams = [torchac.encode_cdf(t, s) for t, s in zip(tables, flat, strict=True)]
        cases["encode.torchac"] = lambda: [torchac.encode_cdf(t, s) for t, s in zip(tables, flat, strict=True)]
        cases["decode.torchac"] = lambda: [torchac.decode_cdf(t, s) for t, s in zip(tables, streams, strict=True)]
        sizes["torchac"] = sum(map(len, streams))
    times = interleaved(cases, runs)
    rows: list[Row] = []
    summary: dict[str, float] = {}
    for coder, size in sizes.items():
        rows.append(
            {
                "what": "coder",
                "coder": coder,
                "symbols": work.count,
                "encode_msymbols": work.count / times[f"encode.{coder}"] / 1e6,
                "decode_msymbols": work.count / times[f"decode.{coder}"] / 1e6,
                "bits_per_symbol": 8 * size / work.count,
                "dequantised": False,
                "threads": 1,
                **times.conditions(),
            }
        )
        if torchac is not None and coder != "torchac":
            for way in ("decode", "encode"):
                summary[f"rans_{way}_over_torchac.{coder}"] = times[f"{way}.torchac"] / times[f"{way}.{coder}"]
    return rows, summary


# --------------------------------------------------------------------------- against plain stores
def store_cases(buffer: Tensor) -> dict[str, Callable[[], object]]:
    """Ways of writing a constant to a contiguous bf16 buffer; none uses non-temporal stores below a few MB.

    torch's and numpy's loops use ordinary vector stores at any size. The C library's memset may turn to other
    instructions for large blocks, so it is called for 64 KiB at a time.
    """
    memset = ctypes.CDLL(None).memset
    memset.argtypes = [ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t]
    size, block = buffer.numel() * buffer.element_size(), 1 << 16
    start = buffer.data_ptr()
    pieces = [(start + at, min(block, size - at)) for at in range(0, size, block)]
    words = buffer.view(torch.int16).numpy()

    def blocks() -> None:
        for address, length in pieces:
            memset(address, 0x3C, length)

    return {"torch fill": lambda: buffer.fill_(1.5), "numpy fill": lambda: words.fill(7), "memset 64 KiB": blocks}


def against_stores(work: Workload, isas: Sequence[str], runs: int) -> tuple[list[Row], dict[str, float]]:
    """Fused decoding to bf16 against writing a constant to the same buffer, which has been written before."""
    tokens, channels = work.symbols[0].shape
    buffer = torch.zeros(len(work.symbols), tokens, channels, dtype=torch.bfloat16)
    outs = list(buffer)
    data = rans.encode(work.symbols, work.specs)
    stores = store_cases(buffer)
    cases = dict(stores)
    for isa in isas:
        cases[isa] = lambda isa=isa: rans.decode_dequant(data, work.specs, work.dequants, outs, isa=isa)  # type: ignore[misc]
    times = interleaved(cases, runs)
    nbytes = buffer.numel() * 2
    best = min(stores, key=times.__getitem__)
    rows: list[Row] = []
    ratios: dict[str, float] = {}
    for isa in isas:
        ratios[isa] = times[best] / times[isa]
        rows.append(
            {
                "what": "decode_dequant",
                "isa": isa,
                "buffer_mb": nbytes / 1e6,
                "gbps": nbytes / times[isa] / 1e9,
                "store_gbps": nbytes / times[best] / 1e9,
                "store": best,
                "over_store": ratios[isa],
                "threads": 1,
                **times.conditions(),
            }
        )
    return rows, ratios


# --------------------------------------------------------------------------- against the ideal
def overhead(symbols: Sequence[Tensor], specs: Sequence[MatrixSpec]) -> float:
    """Bits per symbol that the streams, with their states and lengths, spend above their tables' ideal."""
    spent = 8 * sum(map(len, rans.encode(symbols, specs)))
    ideal = sum(ideal_bits(matrix, spec) for matrix, spec in zip(symbols, specs, strict=True))
    return (spent - ideal) / sum(matrix.numel() for matrix in symbols)


def quantised(x: Tensor, bank: TableBank, step: float) -> tuple[Tensor, MatrixSpec]:
    """A layer's values [tokens, channels] in 16 symbols: centred, in steps of each channel's deviation, clipped.

    Each channel takes the table of the bank under which it costs least.
    """
    x = x.reshape(x.shape[0], -1).float()
    q = (x - x.mean(dim=0)) / (step * x.std(dim=0).clamp_min(1e-6))
    symbols = (q.round() + bank.offset).clamp_(0, bank.alphabet - 1).to(torch.uint8)
    counts = torch.nn.functional.one_hot(symbols.long(), bank.alphabet).sum(dim=0).double()
    costs = 12 - torch.from_numpy(bank.freqs.astype(np.float64)).log2()
    ids = (counts @ costs.t()).argmin(dim=1).numpy().astype(np.uint16)
    return symbols, MatrixSpec(symbols.shape[0], symbols.shape[1], bank, ids)

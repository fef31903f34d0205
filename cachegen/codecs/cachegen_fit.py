"""What the `cachegen` codec learns of a model: units of its bins, and probability tables by channel and level.

Two passes over calibration chunks: moments of every channel, then histograms of what the quantisers give at each
level. Channels of alike histograms share a table (k-means under the cost in bits), so that a profile stays small and a
level's tables stay in a core's first cache.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..entropy.tables import ESCAPE_BITS, MAX_LOW_BITS, PROB_BITS, PROB_SUM, TableBank, from_counts
from ..errors import InputError
from ..kv import KVChunk, KVSpec
from ..profile import bank_array
from ..quantize import THIRDS, dead_zone, layer_bins, uniform
from ..transforms.anchor_delta import anchors, others, subtract
from .base import Group
from .cachegen import ANCHOR_STEPS, ChannelMap, Options, group_rows, layer_groups

SCALES = (2.8, 2.0, 1.4, 1.0, 0.7, 0.5, 0.35, 0.18)
"""Bin scale of each level: four times the default's (0.7), to a quarter of it."""
ANCHOR_RANGE = 14.0
"""Deviations that an 8-bit anchor spans on either side of the mean where bins have scale 1; finer levels have less."""
ANCHOR_RANGES = (6.0, 16.0)
ROUNDING = 0.45
QUIET = 0.1
"""A tensor's unit is this quantile of its channels' deviations: loud channels would make it coarse for all."""
ALPHABETS = {"anchor": 256, "delta": 64}
TABLES = {"anchor": 16, "delta": 64}
"""Symbols of a table, and tables of a level."""
ROUNDS = 12
TABLE_TOKENS = 4096
"""Tokens that tables are counted on, spread over all chunks: more change a table's bits by less than a thousandth."""
REACH = 5.0
"""Deviations that direct symbols should cover; wider channels take low bits."""
RARE = 2e-5
"""Symbols less likely than this go by the escape."""

Chunks = Callable[[], Iterable[KVChunk]]
"""Yields the calibration chunks, in the same order each time it is called."""


@dataclass(frozen=True)
class Moments:
    """Of every channel: mean, deviation, and the deviation of deltas (or of x - mean, without deltas). fp64."""

    mean: NDArray[np.float64]
    deviation: NDArray[np.float64]
    delta: NDArray[np.float64]


def fit(
    chunks: Chunks,
    spec: KVSpec,
    options: Mapping[str, Any],
    progress: Callable[[int, int], None] | None = None,
) -> tuple[dict[str, Any], dict[str, NDArray[Any]]]:
    """A profile's parameters and arrays for the `cachegen` codec.

    Args:
        chunks: calibration chunks of one spec, whole heads.
        options: see `cachegen.Options`.
        progress: told (done, total).
    Raises:
        InputError: no chunks, or options that aren't.
    """
    chosen = Options.of(options)
    channels = ChannelMap(spec)
    groups = layer_groups(spec, (0, spec.kv_heads))
    moments = _moments(chunks, channels, groups, chosen)
    unit = _units(moments, channels, chosen)
    floor = max(float(np.median(moments.deviation)) * 1e-3, 1e-9)
    deviation = np.maximum(moments.deviation, floor).astype(np.float32)
    levels = [
        {"scale": scale, "anchor_range": float(np.clip(ANCHOR_RANGE * scale, *ANCHOR_RANGES))} for scale in SCALES
    ]
    arrays: dict[str, NDArray[Any]] = {
        "mean": moments.mean.astype(np.float32),
        "deviation": deviation,
        "unit": unit,
        "anchor_tables": np.zeros((len(levels), channels.total), np.uint8),
        "delta_tables": np.zeros((len(levels), channels.total), np.uint8),
    }
    stride = -(-sum(chunk.num_tokens for chunk in chunks()) // TABLE_TOKENS)
    for q, level in enumerate(levels):
        if progress is not None:
            progress(q, len(levels))
        histograms = _Histograms(channels, groups, chosen, moments, arrays, level["scale"], level["anchor_range"])
        for i, chunk in enumerate(chunks()):
            if i % stride == 0:
                histograms.add(chunk)
        for name, histogram in (("anchor", histograms.anchor), ("delta", histograms.delta)):
            bank, ids = share_tables(histogram, TABLES[name])
            arrays[f"{name}_bank.{q}"] = bank_array(bank)
            arrays[f"{name}_tables"][q] = ids
    if progress is not None:
        progress(len(levels), len(levels))
    parameters = {"options": asdict(chosen), "levels": levels, "bins": list(THIRDS), "rounding": ROUNDING}
    return parameters, arrays


# --------------------------------------------------------------------------- moments
def _moments(chunks: Chunks, channels: ChannelMap, groups: list[Group], options: Options) -> Moments:
    """First pass. The sequence's first token is left out: what attention sinks hold ruins any scale."""
    total = channels.total
    count, pairs = np.zeros(total), np.zeros(total)
    first, second, delta = np.zeros(total), np.zeros(total), np.zeros(total)
    for chunk, group, x in _rows_of(chunks, groups):
        index = channels.channels(group)
        skip = _sink_rows(chunk, group)
        kept = x[skip:].double()
        count[index] += kept.shape[0]
        first[index] += kept.sum(0).numpy()
        second[index] += kept.square().sum(0).numpy()
        if options.delta:
            pairs_here = subtract(
                others(x, options.group_length), anchors(x, options.group_length), options.group_length
            )
            pairs_here = pairs_here[options.group_length - 1 :] if skip else pairs_here
            pairs[index] += pairs_here.shape[0]
            delta[index] += pairs_here.double().square().sum(0).numpy()
    if not total:
        raise InputError("calibration: expected a model with attention layers; it has none that cachegen takes")
    if not count.min():
        raise InputError("calibration: expected at least one chunk of two tokens for every layer; got none")
    mean = first / np.maximum(count, 1)
    deviation = np.sqrt(np.maximum(second / np.maximum(count, 1) - mean**2, 0))
    spread = np.where(pairs > 0, np.sqrt(delta / np.maximum(pairs, 1)), deviation)
    return Moments(mean, deviation, spread)


def _units(moments: Moments, channels: ChannelMap, options: Options) -> NDArray[np.float32]:
    """What bins are relative to, by channel (see `Options.normalisation`)."""
    floor = max(float(np.median(moments.delta)) * 1e-3, 1e-9)
    spread = np.maximum(moments.delta, floor)
    if options.normalisation == "channel":
        return spread.astype(np.float32)
    unit = np.empty(channels.total)
    for layer, starts in zip(channels.spec.layers, channels.starts, strict=True):
        for name, start in starts.items():
            span = slice(start, start + layer.kv_heads * layer.dim(name))
            quiet = np.quantile(spread[span], QUIET)
            unit[span] = np.sqrt(np.mean(spread[span] ** 2)) if options.normalisation == "token" else quiet
    return unit.astype(np.float32)


def _rows_of(chunks: Chunks, groups: list[Group]) -> Iterator[tuple[KVChunk, Group, Tensor]]:
    for chunk in chunks():
        for group in groups:
            x = group_rows(chunk, group)
            if x.shape[0]:
                yield chunk, group, x


def _sink_rows(chunk: KVChunk, group: Group) -> int:
    """1 if the group's first row is the sequence's first token."""
    first = chunk.layer_tokens(group.layers[0])[0]
    return int(int(chunk.positions[first]) == 0)


# --------------------------------------------------------------------------- histograms
@dataclass
class Histogram:
    """Symbols by channel: low bits [channels], counts [channels, alphabet], and sums of the values behind them.

    `sums` is None where a symbol's reconstruction point is its own integer.
    """

    low_bits: NDArray[np.int64]
    counts: NDArray[np.float64]
    sums: NDArray[np.float64] | None

    @classmethod
    def of_anchors(cls, channels: int) -> Histogram:
        """An empty one for 8-bit integers."""
        return cls(np.zeros(channels, np.int64), np.zeros((channels, ALPHABETS["anchor"])), None)

    @classmethod
    def of_deltas(cls, spread: NDArray[np.float64]) -> Histogram:
        """An empty one for deltas whose channels have the given deviation in steps."""
        reach = ALPHABETS["delta"] // 2 - 1
        low = np.ceil(np.log2(np.maximum(REACH * spread / reach, 1e-9))).clip(0, MAX_LOW_BITS).astype(np.int64)
        shape = (len(spread), ALPHABETS["delta"])
        return cls(low, np.zeros(shape), np.zeros(shape))

    @property
    def alphabet(self) -> int:
        return int(self.counts.shape[1])

    @property
    def offset(self) -> int:
        """Symbol of zero."""
        return self.alphabet // 2 - 1

    def add(self, index: NDArray[np.int64], q: Tensor, value: Tensor) -> None:
        """Count integers q [rows, channels] that stand for `value` (in steps)."""
        low = torch.from_numpy(self.low_bits[index]).to(torch.int32)
        symbol = (q >> low) + self.offset
        symbol.masked_fill_((symbol < 0) | (symbol >= self.alphabet), self.alphabet - 1)
        slot = (symbol + torch.arange(len(index), dtype=torch.int32) * self.alphabet).flatten()
        size = len(index) * self.alphabet
        self.counts[index] += torch.bincount(slot, minlength=size).view(-1, self.alphabet).numpy()
        if self.sums is not None:
            sums = torch.bincount(slot, weights=value.flatten(), minlength=size)
            self.sums[index] += sums.view(-1, self.alphabet).numpy()


class _Histograms:
    """Anchors' and deltas' histograms at one level."""

    def __init__(
        self,
        channels: ChannelMap,
        groups: list[Group],
        options: Options,
        moments: Moments,
        arrays: Mapping[str, NDArray[Any]],
        scale: float,
        anchor_range: float,
    ) -> None:
        bins = np.array(layer_bins(channels.spec.num_layers, THIRDS), np.float32)
        self.channels, self.groups, self.options = channels, groups, options
        self.mean = torch.from_numpy(arrays["mean"])
        self.unit = torch.from_numpy(arrays["unit"])
        self.anchor_step = torch.from_numpy(arrays["deviation"]) * (anchor_range / ANCHOR_STEPS)
        self.delta_step = self.unit * (torch.from_numpy(bins)[torch.from_numpy(channels.layer_of())] * scale)
        self.anchor = Histogram.of_anchors(channels.total)
        normal = moments.delta / (self.unit.numpy() if options.normalisation == "token" else 1.0)
        step = self.delta_step.numpy() / (self.unit.numpy() if options.normalisation == "token" else 1.0)
        self.delta = Histogram.of_deltas(normal / step)

    def add(self, chunk: KVChunk) -> None:
        length = self.options.group_length
        for group in self.groups:
            x = group_rows(chunk, group)
            if not x.shape[0]:
                continue
            index = self.channels.channels(group)
            at = torch.from_numpy(index)
            mean, step = self.mean[at], self.anchor_step[at]
            if self.options.delta:
                centred = x[::3] - mean  # any token tells what an anchor in its place would be
                self.anchor.add(index, uniform(centred, step), centred / step)
                reference = uniform(anchors(x, length) - mean, step).to(torch.float32) * step + mean
                delta = subtract(others(x, length), reference, length)
            else:
                delta = x - mean
            if not delta.shape[0]:
                continue
            if self.options.normalisation == "token":
                delta = delta / (delta / self.unit[at]).square().mean(1, keepdim=True).sqrt().clamp_min(2.0**-14)
            step = self.delta_step[at]
            self.delta.add(index, dead_zone(delta, step, ROUNDING), delta / step)


# --------------------------------------------------------------------------- sharing tables
def share_tables(histogram: Histogram, tables: int) -> tuple[TableBank, NDArray[np.uint8]]:
    """A bank of at most `tables` tables that code the channels in few bits, and each channel's table, uint8.

    k-means whose distance is the channel's cost in bits; channels of different low bits share nothing. Deterministic.
    """
    counts, offset = histogram.counts + 0.0, histogram.offset
    counts[counts.sum(1) == 0, offset] = 1  # a channel never seen: the escape carries what comes
    ids = np.zeros(len(counts), np.int64)
    members: list[NDArray[np.int64]] = []
    classes, sizes = np.unique(histogram.low_bits, return_counts=True)
    for low, share in zip(classes, _shares(sizes, tables), strict=True):
        rows = np.flatnonzero(histogram.low_bits == low)
        local = _cluster(counts[rows], share)
        for cluster in np.unique(local):
            ids[rows[local == cluster]] = len(members)
            members.append(rows[local == cluster])
    pooled = np.stack([counts[rows].sum(0) for rows in members])
    recon = None
    if histogram.sums is not None:
        recon = _centroids(pooled, np.stack([histogram.sums[rows].sum(0) for rows in members]), offset)
    low_bits = [histogram.low_bits[rows[0]] for rows in members]
    bank = from_counts(_integer_counts(pooled), offset, low_bits=low_bits, escape=True, recon=recon, floor=0)
    return bank, ids.astype(np.uint8)


def _shares(sizes: NDArray[np.int64], tables: int) -> list[int]:
    """Tables for each class of channels: by the square root of its size, at least one each."""
    weight = np.sqrt(sizes)
    return [max(1, int(tables * w / weight.sum())) for w in weight]


def _cluster(counts: NDArray[np.float64], tables: int) -> NDArray[np.int64]:
    """Cluster of each row: start from rows sorted by spread, then assign to the cheapest and pool again."""
    alphabet = counts.shape[1]
    symbols = np.arange(alphabet) - (alphabet // 2 - 1)
    spread = (counts * symbols**2).sum(1) / counts.sum(1)
    ids = np.empty(len(counts), np.int64)
    ids[np.argsort(spread, kind="stable")] = np.arange(len(counts)) * tables // len(counts)
    extra = np.zeros(alphabet)
    extra[-1] = ESCAPE_BITS
    for _ in range(ROUNDS):
        pooled = np.zeros((tables, alphabet))
        np.add.at(pooled, ids, counts)
        pooled += 1e-3 * pooled.sum(0) / max(pooled.sum(), 1) + 1e-6
        p = np.maximum(pooled / pooled.sum(1, keepdims=True), 0.25 / PROB_SUM)
        cost = counts @ (extra - np.log2(p)).T
        new = cost.argmin(1)
        if (new == ids).all():
            break
        ids = new
    return ids


def _integer_counts(counts: NDArray[np.float64]) -> NDArray[np.int64]:
    """Counts whose rare symbols went to the escape, which has at least a share of its own."""
    share = counts / counts.sum(1, keepdims=True)
    share[:, :-1][share[:, :-1] < RARE] = 0
    share[:, -1] = np.maximum(1 - share[:, :-1].sum(1), 2.0**-PROB_BITS / 2)
    scaled: NDArray[np.int64] = np.round(share * 2.0**36).astype(np.int64)
    return scaled


def _centroids(counts: NDArray[np.float64], sums: NDArray[np.float64], offset: int) -> NDArray[np.float32]:
    """Mean value of each symbol, in steps, kept within its bin; the bin's middle where it was hardly seen."""
    middle = np.arange(counts.shape[1]) - float(offset)
    weight = counts + 4.0
    return np.clip((sums + 4.0 * middle) / weight, middle - 0.5, middle + 0.5).astype(np.float32)

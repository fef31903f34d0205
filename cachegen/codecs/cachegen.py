"""`cachegen`: the codec of the CacheGen paper (SIGCOMM 2024, section 5.2), as written there.

Tokens go in groups of ten: the first is an 8-bit anchor, the others are deltas against it, in bins that grow by thirds
of the layers, normalised by what calibration saw; each (layer, channel) has its own probability tables, for anchors
and for deltas, kept in the model's profile. Segments: docs/format-cachegen.md.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from functools import cached_property, lru_cache
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..entropy import rans
from ..entropy.rans import Dequant, MatrixSpec
from ..entropy.tables import TableBank
from ..errors import FormatError, InputError, LevelError, ProfileMismatch, ProfileMissing, Truncated
from ..kv import KVChunk, KVSpec, LayerKind, LayerSpec
from ..quantize import dead_zone, layer_bins, uniform
from ..transforms.anchor_delta import anchors, join, num_anchors, others, subtract
from . import torchac_matrix
from .base import ChunkCodec, ChunkInfo, EncodedGroups, Group, GroupSegments, LevelLoss, Targets
from .torchac_matrix import reconstruct

if TYPE_CHECKING:
    from ..profile import ModelProfile

CODERS = ("rans", "torchac")
NORMALISATIONS = ("layer", "channel", "token")
ANCHOR_STEPS = 127
"""Steps of an 8-bit anchor on either side of its channel's mean."""
SCRATCH = 4 << 20
"""Bytes of fp32 deltas that a decoding thread holds at once."""
PLANS = 512
"""Plans of groups that a codec remembers: the layers of a model, for a few lengths of chunks."""
MAX_GROUP = 1 << 16
TINY = 2.0**-14
"""Least token scale: fp16's smallest normal number."""
_HEAD = struct.Struct("<BBHI")


@dataclass(frozen=True)
class Options:
    """What a profile is calibrated for, and every object states.

    Attributes:
        group_length: tokens to an anchor (the paper: 10).
        delta: code deltas against anchors; else every token against its channel's calibrated mean, with no anchors.
        normalisation: what bins are relative to. "layer": one unit for each layer's K and V; "channel": the channel's
            own deviation; "token": as "layer", times the root mean square of the token's vector, which is sent.
    """

    group_length: int = 10
    delta: bool = True
    normalisation: str = "layer"

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> Options:
        """Options by name; those left out have their defaults. Raises InputError, also on names that aren't any."""
        known = [field.name for field in fields(cls)]
        for name in values:
            if name not in known:
                raise InputError(f"cachegen options: expected {', '.join(known)}; got {name!r}")
        return cls(**values)

    def __post_init__(self) -> None:
        if type(self.group_length) is not int or not 1 <= self.group_length <= MAX_GROUP:
            raise InputError(f"group_length: expected 1..{MAX_GROUP} tokens; got {self.group_length!r}")
        if not isinstance(self.delta, bool):
            raise InputError(f"delta: expected true or false; got {self.delta!r}")
        if self.normalisation not in NORMALISATIONS:
            raise InputError(f"normalisation: expected one of {', '.join(NORMALISATIONS)}; got {self.normalisation!r}")


@dataclass(frozen=True)
class ChannelMap:
    """Where a channel of the model stands in a profile's arrays: by layer, then k before v, then head, then dim.

    Layers of kinds that the codec doesn't take have no channels.
    """

    spec: KVSpec

    @cached_property
    def starts(self) -> tuple[dict[str, int], ...]:
        """First channel of each tensor of each layer."""
        found: list[dict[str, int]] = []
        at = 0
        for layer in self.spec.layers:
            found.append({})
            if layer.kind in CacheGen.kinds:
                for name in layer.names:
                    found[-1][name] = at
                    at += layer.kv_heads * layer.dim(name)
        return tuple(found)

    @cached_property
    def total(self) -> int:
        """Channels of the model."""
        return len(self.layer_of())

    def layer_of(self) -> NDArray[np.int64]:
        """Layer of each channel."""
        widths = [
            sum(layer.kv_heads * layer.dim(name) for name in starts)
            for layer, starts in zip(self.spec.layers, self.starts, strict=True)
        ]
        return np.repeat(np.arange(self.spec.num_layers), widths)

    def channels(self, group: Group) -> NDArray[np.int64]:
        """Indices of a group's channels, in the order of its matrices' components."""
        layer = group.layers[0]
        parts = []
        for name in group.names:
            dim, start = self.spec.layers[layer].dim(name), self.starts[layer][name]
            parts.append(np.arange(start + group.heads[0] * dim, start + group.heads[1] * dim))
        return np.concatenate(parts)


@dataclass(frozen=True)
class Level:
    """A level's constants, for every channel of the model. Arrays [channels]; steps are fp32."""

    anchor_step: Tensor
    delta_step: Tensor
    anchor_bank: TableBank
    delta_bank: TableBank
    anchor_tables: NDArray[np.uint16]
    delta_tables: NDArray[np.uint16]


class Model:
    """What a profile says to this codec, checked."""

    def __init__(self, profile: ModelProfile) -> None:
        if profile.codec_id != CacheGen.codec_id:
            raise ProfileMismatch(
                f"profile: expected one of codec {CacheGen.codec_id!r}; got {profile.codec_id!r}. Make one with "
                "`cachegen calibrate --codec cachegen --model DIR --text FILE --output P`"
            )
        self.map = ChannelMap(profile.spec)
        parameters, count = profile.parameters, self.map.total
        try:
            self.options = Options(**parameters["options"])
            self.rounding = float(parameters["rounding"])
            scales = [float(level["scale"]) for level in parameters["levels"]]
            ranges = [float(level["anchor_range"]) for level in parameters["levels"]]
            bins = tuple(float(b) for b in parameters["bins"])
        except (KeyError, TypeError, ValueError) as error:
            raise ProfileMismatch(f"profile: its cachegen parameters aren't well-formed ({error!r})") from error
        if (
            not all(0 < v < 1e6 for v in (*scales, *ranges, *bins))
            or not scales
            or not bins
            or not 0 < self.rounding <= 0.5
        ):
            raise ProfileMismatch("profile: expected levels, and positive scales, ranges, bins and rounding")
        self.mean = _positive(profile, "mean", count, least=None)
        self.unit = _positive(profile, "unit", count)
        deviation = _positive(profile, "deviation", count)
        by_layer = torch.tensor(layer_bins(profile.spec.num_layers, bins), dtype=torch.float32)
        bin_of = by_layer[torch.from_numpy(self.map.layer_of())]
        anchor_tables = profile.array("anchor_tables", "U8", (len(scales), count))
        delta_tables = profile.array("delta_tables", "U8", (len(scales), count))
        self.levels: list[Level] = []
        for q, (scale, spread) in enumerate(zip(scales, ranges, strict=True)):
            level = Level(
                deviation * (spread / ANCHOR_STEPS),
                self.unit * (bin_of * scale),
                profile.bank(f"anchor_bank.{q}"),
                profile.bank(f"delta_bank.{q}"),
                anchor_tables[q].astype(np.uint16),
                delta_tables[q].astype(np.uint16),
            )
            for bank, ids in ((level.anchor_bank, level.anchor_tables), (level.delta_bank, level.delta_tables)):
                if int(ids.max(initial=0)) >= bank.tables:
                    raise ProfileMismatch(f"profile: level {q} names table {int(ids.max())} of {bank.tables}")
            self.levels.append(level)
        self.ladder = {rung.level: rung.kl for rung in profile.ladder}


@dataclass(frozen=True)
class Plan:
    """A group's part of a level: everything that its matrices need."""

    tokens: int
    mean: Tensor
    unit: Tensor
    anchor_step: Tensor
    delta_step: Tensor
    anchors: MatrixSpec | None
    deltas: MatrixSpec | None


@dataclass(frozen=True)
class _Coded:
    """A segment: its group's plan, streams, and fp32 [rows] token scales."""

    plan: Plan
    anchors: memoryview
    scale: Tensor | None
    deltas: memoryview


class CacheGen(ChunkCodec):
    """The paper's codec. Immutable; needs a profile (`cachegen calibrate --codec cachegen`)."""

    codec_id: ClassVar[str] = "cachegen"
    needs_profile: ClassVar[bool] = True

    def __init__(self, profile: ModelProfile | None, coder: str = "rans", **options: Any) -> None:
        """
        Args:
            coder: "rans", or "torchac" for the paper's own arithmetic coder: slow, equal symbols.
            options: must be what the profile was calibrated for (see `Options`); those left out are taken from it.
        Raises:
            ProfileMissing, ProfileMismatch, InputError.
        """
        if profile is None:
            raise ProfileMissing(
                "codec 'cachegen' needs a profile calibrated for this model; none was given. Make one with "
                "`cachegen calibrate --codec cachegen --model DIR --text FILE --output P` and pass profile=P"
            )
        if coder not in CODERS:
            raise InputError(f"coder: expected one of {', '.join(CODERS)}; got {coder!r}")
        self.coder = coder
        self.model = Model(profile)
        self.options = self.model.options
        self._plans = lru_cache(maxsize=PLANS)(self._make_plan)
        known = asdict(self.options)
        for name, value in options.items():
            if name not in known:
                raise InputError(f"cachegen: expected options coder, {', '.join(known)}; got {name!r}")
            if value != known[name]:
                raise ProfileMismatch(
                    f"{name}: asked for {value!r}, but the profile was calibrated for {known[name]!r}. Calibrate one "
                    f"with options={{{name!r}: {value!r}}}"
                )

    def get_config(self) -> dict[str, Any]:
        return {"coder": self.coder, **asdict(self.options)}

    @classmethod
    def from_config(cls, config: Mapping[str, Any], profile: ModelProfile | None = None) -> CacheGen:
        try:
            return cls(profile, **config)
        except (InputError, TypeError) as error:
            if isinstance(error, ProfileMissing):
                raise
            raise FormatError(f"cachegen config: {error.args[0]}") from error

    @property
    def num_levels(self) -> int:
        return len(self.model.levels)

    @property
    def default_level(self) -> int:
        """The coarsest level whose calibrated KL is at most 0.01; the finest if none is."""
        good = [level for level, kl in self.model.ladder.items() if kl is not None and kl <= 0.01]
        return min(good, default=self.num_levels - 1)

    def groups(self, spec: KVSpec, head_range: tuple[int, int]) -> list[Group]:
        """One group a layer, K and V together: layers decode apart, and a 256-token chunk's streams are long enough."""
        return layer_groups(spec, head_range)

    # ------------------------------------------------------------------ encode
    def encode(self, chunk: KVChunk, groups: Sequence[Group], level: int, threads: int) -> EncodedGroups:
        if not 0 <= level < self.num_levels:
            raise LevelError(f"level: codec cachegen has 0..{self.num_levels - 1}; got {level}")
        segments: list[list[bytes]] = []
        for batch, _ in self._batches(groups, chunk.spec, chunk.num_tokens, threads):
            segments += [[segment] for segment in self._encode(chunk, batch, level, threads)]
        return EncodedGroups(segments, [LevelLoss(level, self.model.ladder.get(level))])

    def _encode(self, chunk: KVChunk, groups: Sequence[Group], level: int, threads: int) -> list[bytes]:
        length = self.options.group_length
        plans = [self._plan(chunk.spec, chunk.num_tokens, group, level) for group in groups]
        rows = [group_rows(chunk, group) for group in groups]
        references, anchor_streams = self._encode_anchors(rows, plans, threads)
        values, scales = [], []
        for x, plan, reference in zip(rows, plans, references, strict=True):
            if plan.deltas is None:
                continue
            delta = subtract(others(x, length), reference, length) if self.options.delta else x - plan.mean
            scale = self._token_scales(delta, plan)
            scales.append(b"" if scale is None else scale.numpy().tobytes())
            if scale is not None:
                delta = delta / scale.to(torch.float32)[:, None]
            values.append(dead_zone(delta, plan.delta_step, self.model.rounding))
        streams = iter(self._entropy_encode(values, [p.deltas for p in plans if p.deltas is not None], threads))
        sent = iter(scales)
        segments = []
        for plan, anchor in zip(plans, anchor_streams, strict=True):
            parts = (next(sent), next(streams)) if plan.deltas is not None else (b"", b"")
            segments.append(b"".join((_HEAD.pack(level, 0, 0, len(anchor)), parts[0], anchor, parts[1])))
        return segments

    def _encode_anchors(
        self, rows: Sequence[Tensor], plans: Sequence[Plan], threads: int
    ) -> tuple[list[Tensor], list[bytes]]:
        """Anchors as the decoder will have them, fp32 [anchors, components], and their streams."""
        integers, specs, references = [], [], []
        for x, plan in zip(rows, plans, strict=True):
            if plan.anchors is None:
                references.append(plan.mean)
                continue
            q = uniform(anchors(x, self.options.group_length) - plan.mean, plan.anchor_step)
            integers.append(q)
            specs.append(plan.anchors)
            references.append(reconstruct(q, plan.anchors) * plan.anchor_step + plan.mean)
        streams = iter(self._entropy_encode(integers, specs, threads))
        return references, [b"" if plan.anchors is None else next(streams) for plan in plans]

    def _token_scales(self, delta: Tensor, plan: Plan) -> Tensor | None:
        """fp16 [tokens]: root mean square of each token's vector in units; None unless they are sent."""
        if self.options.normalisation != "token":
            return None
        return (delta / plan.unit).square().mean(1).sqrt().clamp(TINY, 65504.0).to(torch.float16)

    # ------------------------------------------------------------------ decode
    def decode(self, info: ChunkInfo, parts: Sequence[GroupSegments], targets: Targets, threads: int) -> None:
        by_group = {id(part.group): part for part in parts}
        batches = list(self._batches([part.group for part in parts], info.spec, info.num_tokens, threads))
        memory = torch.empty(max((values for _, values in batches), default=0))
        for batch, _ in batches:
            self._decode(info, [by_group[id(group)] for group in batch], targets, threads, memory)

    def _decode(
        self, info: ChunkInfo, parts: Sequence[GroupSegments], targets: Targets, threads: int, memory: Tensor
    ) -> None:
        """Decode a batch of groups to fp32 in `memory`, then put anchors and deltas together in the targets."""
        read = [self._read(info, part) for part in parts]
        streams: list[memoryview] = []
        specs: list[MatrixSpec] = []
        dequants: list[Dequant] = []
        out: list[Tensor] = []
        for coded in read:
            plan, memory = coded.plan, _take(memory, coded.plan, out)
            if plan.anchors is not None:
                streams.append(coded.anchors)
                specs.append(plan.anchors)
                dequants.append(Dequant(plan.anchor_step, None, plan.mean))
            if plan.deltas is not None:
                streams.append(coded.deltas)
                specs.append(plan.deltas)
                dequants.append(Dequant(plan.delta_step, coded.scale, None if self.options.delta else plan.mean))
        coded_rows = [rows for rows in out if rows.shape[0]]
        self._entropy_decode(streams, specs, dequants, coded_rows, threads)
        for i, part in enumerate(parts):
            group = [targets[part.group.layers[0], name] for name in part.group.names]
            if self.options.delta:
                join(out[2 * i], out[2 * i + 1], self.options.group_length, group)
            else:
                _spread(out[2 * i + 1], group)

    def _read(self, info: ChunkInfo, part: GroupSegments) -> _Coded:
        """A segment, taken apart and checked."""
        group, data = part.group, part.segments[-1] if part.segments else memoryview(b"")
        where = f"cachegen: group of layer {group.layers[0]}"
        layer = info.spec.layers[group.layers[0]]
        if group.layers[1] != group.layers[0] + 1 or group.names != layer.names or layer.kind not in self.kinds:
            raise FormatError(f"{where}: expected one attention layer with k and v; got {group.layers} {group.names}")
        if not 0 <= group.heads[0] < group.heads[1] <= layer.kv_heads:
            raise FormatError(f"{where}: expected heads within 0..{layer.kv_heads}; got {group.heads}")
        if len(data) < _HEAD.size:
            raise Truncated(f"{where}: expected at least {_HEAD.size} bytes; got {len(data)}")
        level, flags, reserved, length = _HEAD.unpack_from(data)
        if level >= self.num_levels or flags or reserved:
            raise FormatError(f"{where}: expected a level below {self.num_levels} and no flags; got {level}, {flags}")
        plan = self._plan(info.spec, info.num_tokens, group, level)
        sent = 2 * plan.deltas.tokens if plan.deltas is not None and self.options.normalisation == "token" else 0
        start = _HEAD.size + sent
        if start + length > len(data):
            raise Truncated(f"{where}: expected {start + length} bytes of anchors and scales; got {len(data)}")
        if (plan.anchors is None and length) or (plan.deltas is None and start + length != len(data)):
            raise FormatError(f"{where}: bytes left over after its matrices")
        scale = None
        if sent:
            scale = torch.frombuffer(bytearray(data[_HEAD.size : start]), dtype=torch.float16).to(torch.float32)
            if not bool(torch.isfinite(scale).all()):
                raise FormatError(f"{where}: expected finite token scales")
        return _Coded(plan, data[start : start + length], scale, data[start + length :])

    # ------------------------------------------------------------------ entropy coders
    def _entropy_encode(self, values: Sequence[Tensor], specs: Sequence[MatrixSpec], threads: int) -> list[bytes]:
        if self.coder == "torchac":
            return torchac_matrix.encode(values, specs)
        return rans.encode(values, specs, threads)

    def _entropy_decode(
        self,
        data: Sequence[memoryview],
        specs: Sequence[MatrixSpec],
        dequants: Sequence[Dequant],
        out: Sequence[Tensor],
        threads: int,
    ) -> None:
        if self.coder == "torchac":
            torchac_matrix.decode_dequant(data, specs, dequants, out)
        else:
            rans.decode_dequant(data, specs, dequants, out, threads)

    # ------------------------------------------------------------------ plans
    def _plan(self, spec: KVSpec, num_tokens: int, group: Group, level: int) -> Plan:
        """What the group's matrices are, at a level. Raises ProfileMismatch if the profile is of another shape."""
        layer, ours = group.layers[0], self.model.map.spec.layers
        if layer >= len(ours) or _shape(ours[layer]) != _shape(spec.layers[layer]):
            raise ProfileMismatch(f"layer {layer}: the profile is of a model with other heads or dims here")
        first, last = group.tokens or (0, num_tokens)
        return self._plans(layer, group.heads, last - first, level)

    def _make_plan(self, layer: int, heads: tuple[int, int], tokens: int, level: int) -> Plan:
        model, constants = self.model, self.model.levels[level]
        names = model.map.spec.layers[layer].names
        channels = model.map.channels(Group((layer, layer + 1), heads, names))
        index, components = torch.from_numpy(channels), len(channels)
        coded = num_anchors(tokens, self.options.group_length) if self.options.delta else 0
        anchor_spec = delta_spec = None
        if coded:
            anchor_spec = MatrixSpec(coded, components, constants.anchor_bank, constants.anchor_tables[channels])
        if tokens > coded:
            delta_spec = MatrixSpec(tokens - coded, components, constants.delta_bank, constants.delta_tables[channels])
        return Plan(
            tokens,
            model.mean[index],
            model.unit[index],
            constants.anchor_step[index],
            constants.delta_step[index],
            anchor_spec,
            delta_spec,
        )

    def _batches(
        self, groups: Sequence[Group], spec: KVSpec, num_tokens: int, threads: int
    ) -> Iterator[tuple[Sequence[Group], int]]:
        """Groups in batches whose fp32 values fit in the scratch of `threads` threads, and how many values that is."""
        batch: list[Group] = []
        size = 0
        for group in groups:
            first, last = group.tokens or (0, num_tokens)
            layer = spec.layers[group.layers[0]]
            width = sum(layer.dim(name) for name in group.names) * (group.heads[1] - group.heads[0])
            need = (last - first) * width
            if batch and 4 * (size + need) > SCRATCH * max(1, threads):
                yield batch, size
                batch, size = [], 0
            batch.append(group)
            size += need
        if batch:
            yield batch, size


def _take(memory: Tensor, plan: Plan, out: list[Tensor]) -> Tensor:
    """Append to `out` a group's anchors and deltas, [rows, components] each, from `memory`; returns what is left."""
    components = plan.mean.shape[0]
    for spec in (plan.anchors, plan.deltas):
        rows = 0 if spec is None else spec.tokens
        out.append(memory[: rows * components].view(rows, components))
        memory = memory[rows * components :]
    return memory


def _spread(rows: Tensor, targets: Sequence[Tensor]) -> None:
    """Put rows [tokens, components] in targets [tokens, heads, dim], one after the other."""
    start = 0
    for target in targets:
        width = target.shape[1] * target.shape[2]
        target.copy_(rows[:, start : start + width].view(target.shape))
        start += width


def layer_groups(spec: KVSpec, head_range: tuple[int, int]) -> list[Group]:
    """A group for each layer's k and v, with the heads of a range that the layer has."""
    found = []
    for i, layer in enumerate(spec.layers):
        heads = (min(head_range[0], layer.kv_heads), min(head_range[1], layer.kv_heads))
        if layer.kind in CacheGen.kinds and heads[0] < heads[1]:
            found.append(Group((i, i + 1), heads, layer.names))
    return found


def group_rows(chunk: KVChunk, group: Group) -> Tensor:
    """A group's values, fp32 [tokens, components]: channels of k, then of v, head by head."""
    layer, (first, last) = group.layers[0], group.heads
    start = min(chunk.heads[0], chunk.spec.layers[layer].kv_heads)
    tensors = [chunk.layers[layer].tensors[name][:, first - start : last - start] for name in group.names]
    return torch.cat([tensor.to(torch.float32).flatten(1) for tensor in tensors], 1)


def _shape(layer: LayerSpec) -> tuple[LayerKind, int, int, int]:
    return layer.kind, layer.kv_heads, layer.k_dim, layer.v_dim


def _positive(profile: ModelProfile, name: str, count: int, least: float | None = 0.0) -> Tensor:
    """An fp32 array [channels] of the profile: finite, and above `least`."""
    values = torch.from_numpy(profile.array(name, "F32", (count,)).astype(np.float32))
    if not bool(torch.isfinite(values).all()) or (least is not None and not bool((values > least).all())):
        raise ProfileMismatch(f"profile array {name!r}: expected finite {'' if least is None else 'positive '}numbers")
    return values

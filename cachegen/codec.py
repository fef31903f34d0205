"""`Codec`: a KVChunk to an object's bytes and back, for one model.

The facade validates, decides which codec carries which group, writes and checks the header, and decodes straight into
the caller's tensors. Groups that the chosen codec can't take (a layer kind it doesn't know, non-finite values, fp8)
are carried by `lossless` in the same object: nothing is dropped, and the report says so.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .codecs import codec_class, make_codec
from .codecs.base import ChunkCodec, ChunkInfo, Group, GroupSegments, LevelLoss, Targets
from .container import MAX_TOKENS, CodecEntry, ObjectHeader, ObjectReader, write_object
from .errors import (
    FingerprintMismatch,
    LevelError,
    LimitExceeded,
    MissingExtra,
    ProfileMismatch,
    ProfileMissing,
    QualityUnavailable,
    ShapeError,
    Truncated,
)
from .fingerprint import Fingerprint
from .keys import token_digest
from .kv import FP8, KVChunk, KVSpec
from .rope import move
from .routing import is_empty, route
from .selection import (
    Selection,
    check_moves,
    check_out,
    cut_windows,
    expand_runs,
    position_runs,
    positions_for,
    scratch_for,
)

if TYPE_CHECKING:
    from .profile import ModelProfile

DEFAULT_CODEC = "channel"
ROTATED = ("k", "rope")
"""Tensors that carry RoPE."""


@dataclass(frozen=True)
class LevelReport:
    """What a reader of one level fetches, and loses."""

    level: int
    nbytes: int
    bits_per_element: float
    predicted_kl: float | None


@dataclass(frozen=True)
class EncodeReport:
    """What encoding did: sizes and stated loss by level, and fallbacks taken."""

    codec: str
    num_tokens: int
    elements: int
    nbytes: int
    levels: tuple[LevelReport, ...]
    fallbacks: tuple[str, ...]

    @property
    def bits_per_element(self) -> float:
        return 8 * self.nbytes / self.elements if self.elements else math.nan


@dataclass(frozen=True)
class Encoded:
    """An object's bytes and the report of how they came about."""

    data: bytes
    report: EncodeReport


class Codec:
    """Encodes and decodes chunks of one model's cache. Immutable; safe to share between threads.

    Attributes:
        spec: the model's cache.
        fingerprint: what makes caches of this model interchangeable.
        codec: the codec that encodes.
        profile: what was calibrated for the model, or None.
        threads: threads of native code per call (environment CACHEGEN_THREADS; default all cores).
    """

    def __init__(
        self,
        spec: KVSpec,
        fingerprint: Fingerprint,
        codec: ChunkCodec | str = DEFAULT_CODEC,
        profile: ModelProfile | None = None,
        threads: int | None = None,
        **config: Any,
    ) -> None:
        if isinstance(codec, str):
            cls = codec_class(codec)
            if cls.needs_profile and profile is None:
                raise ProfileMissing(
                    f"codec {codec!r} needs a profile calibrated for this model; none was given. Make one with "
                    f"`cachegen calibrate --codec {codec} --model DIR --text FILE --output P` and pass profile=P"
                )
            codec = make_codec(codec, config, profile)
        if profile is not None:
            profile.check(fingerprint)
        self.spec = spec
        self.fingerprint = fingerprint
        self.codec = codec
        self.profile = profile
        self.threads = threads or int(os.environ.get("CACHEGEN_THREADS") or os.cpu_count() or 1)
        self._lossless = make_codec("lossless", {})

    @classmethod
    def for_model(
        cls,
        model: Any,
        codec: ChunkCodec | str = DEFAULT_CODEC,
        profile: ModelProfile | Path | str | None = None,
        *,
        dtype: str | torch.dtype | None = None,
        adapter: str | None = None,
        threads: int | None = None,
        **config: Any,
    ) -> Codec:
        """A codec for a transformers model, or for the folder that holds one.

        Args:
            model: a `PreTrainedModel`, or the path of a transformers or GGUF folder.
            codec: id of a registered codec, or an instance.
            profile: what `cachegen calibrate` wrote for this model, or its path.
            dtype: the cache's dtype, where it isn't the model's.
            adapter: name and revision of an active adapter.
            config: the codec's own options.
        Raises:
            UnsupportedModel, UnknownCodec, ProfileMissing, ProfileMismatch, MissingExtra.
        """
        if isinstance(model, (str, Path)):
            hf_config = _folder_config(Path(model))
            fingerprint = Fingerprint.from_folder(Path(model), adapter=adapter)
        else:
            hf_config = model.config
            fingerprint = Fingerprint.from_model(model, adapter=adapter)
            dtype = dtype or model.dtype
        spec = KVSpec.from_hf_config(hf_config, dtype)
        fingerprint = replace(fingerprint, dtype=spec.dtype)
        if isinstance(profile, (str, Path)):
            from .profile import ModelProfile

            profile = ModelProfile.load(profile)
        return cls(spec, fingerprint, codec, profile, threads, **config)

    @property
    def num_levels(self) -> int:
        return self.codec.num_levels

    @property
    def default_level(self) -> int:
        return self.codec.default_level

    @property
    def embedded(self) -> bool:
        """One object holds every level (else `level` is chosen at encode)."""
        return self.codec.embedded

    @cached_property
    def _digest(self) -> bytes:
        return self.fingerprint.digest()

    # ------------------------------------------------------------------ encode
    def encode(self, chunk: KVChunk, level: int | None = None) -> Encoded:
        """Encode a chunk into a .kvc object.

        Args:
            chunk: tensors of the spec's dtype, on the CPU or copied there layer by layer.
            level: the quality to write, for a codec that isn't embedded; default `default_level`.
        Raises:
            ShapeError, DtypeError, LayoutError, RangeError, LevelError: the chunk isn't one of this model's.
        """
        level = self._level_to_write(level)
        chunk.validate()
        self.spec.check(chunk.spec)
        chunk = chunk.cpu()
        coded = route(self.codec, self._lossless, chunk, level, self.threads)
        losses = tuple(coded.losses) or (LevelLoss(level),)
        if not self.embedded and losses[0].level != level:
            raise LevelError(f"codec {self.codec.codec_id}: asked for level {level}, wrote {losses[0].level}")
        ids = chunk.token_ids
        header = ObjectHeader(
            codecs=tuple(CodecEntry(c.codec_id, c.get_config()) for c in coded.codecs),
            fingerprint=self._digest,
            profile=self.profile.hash if self.profile is not None and self.codec.needs_profile else None,
            spec=chunk.spec,
            num_tokens=chunk.num_tokens,
            positions=position_runs(chunk.positions),
            head_range=chunk.heads,
            groups=tuple(coded.groups),
            losses=losses,
            token_digest=None if ids is None else token_digest(ids.tolist()),
            token_ids=None if ids is None else tuple(ids.tolist()),
            previous_ids=chunk.previous_ids,
            lineage=chunk.lineage,
        )
        data = write_object(header, coded.segments)
        return Encoded(data, self._report(chunk, data, coded.fallbacks))

    def _level_to_write(self, level: int | None) -> int:
        if level is None:
            return self.default_level
        if not 0 <= level < self.num_levels:
            raise LevelError(f"level: codec {self.codec.codec_id} has 0..{self.num_levels - 1}; got {level}")
        return level

    def _report(self, chunk: KVChunk, data: bytes, fallbacks: list[str]) -> EncodeReport:
        reader, elements = ObjectReader(data), max(1, chunk.elements)
        levels = tuple(
            LevelReport(loss.level, size, 8 * size / elements, loss.predicted_kl)
            for i, loss in enumerate(reader.header.losses)
            for size in (reader.level_size(i),)
        )
        return EncodeReport(self.codec.codec_id, chunk.num_tokens, chunk.elements, len(data), levels, tuple(fallbacks))

    # ------------------------------------------------------------------ decode
    def decode(
        self,
        data: bytes | bytearray | memoryview | ObjectReader,
        *,
        level: int | None = None,
        max_kl: float | None = None,
        layers: tuple[int, int] | None = None,
        heads: tuple[int, int] | None = None,
        tokens: tuple[int, int] | None = None,
        positions: Tensor | Sequence[int] | int | None = None,
        out: KVChunk | None = None,
        best_effort: bool = False,
        threads: int | None = None,
        max_tokens: int = MAX_TOKENS,
    ) -> KVChunk:
        """Decode an object, or a part of one.

        Args:
            data: the object's bytes (or a reader that has fetched some of them).
            level: levels 0..level are decoded; default all that the object holds.
            max_kl: take the lowest level whose stated KL is at most this.
            layers, heads, tokens: half-open ranges; heads are the model's, tokens the chunk's. Default all.
            positions: where the decoded tokens will stand: [tokens], or the first of consecutive ones. Default: where
                they stood.
            out: a chunk of the selection's shape to decode into (views of an engine's cache); its dtype may differ
                from the object's. Its positions are overwritten.
            best_effort: if bytes are missing or damaged, decode the highest complete level instead of raising.
            max_tokens: refuse larger chunks, before anything is allocated.
        Returns:
            `out`, or a new chunk. A selection of layers yields a chunk whose spec has just those.
        Raises:
            FormatError kinds, FingerprintMismatch, ProfileMismatch, ProfileMissing, LevelError, RangeError,
            PositionError, QualityUnavailable.
        """
        reader = data if isinstance(data, ObjectReader) else ObjectReader(data)
        header = reader.header
        if header.num_tokens > max_tokens:
            raise LimitExceeded(f"chunk: at most {max_tokens} tokens are decoded at once; got {header.num_tokens}")
        self.check_object(header)
        select = Selection.of(header, layers, heads, tokens)
        chosen = [i for i, g in enumerate(header.groups) if select.touches(g)]
        select.check_coverage(header)
        top = self._level_to_read(reader, chosen, level, max_kl, best_effort)
        stored = expand_runs(header.positions)
        target_positions = positions_for(positions, stored[slice(*select.tokens)])
        check_moves(select.spec, stored[slice(*select.tokens)], target_positions)
        if out is None:
            out = KVChunk.empty(select.spec, target_positions, select.heads)
            cut_windows(out, header, select)
        else:
            check_out(out, select, header)
            out.positions = target_positions
        ids = header.token_ids
        if ids is not None:
            out.token_ids = torch.tensor(ids[slice(*select.tokens)], dtype=torch.int64)
        out.lineage = header.lineage
        whole = stored.clone()
        whole[slice(*select.tokens)] = target_positions
        info = ChunkInfo(
            spec=header.spec,
            num_tokens=header.num_tokens,
            positions=whole,
            token_ids=None if ids is None else torch.tensor(ids, dtype=torch.int64),
            previous_ids=header.previous_ids,
            level=header.losses[top].level,
        )
        self._decode_groups(reader, chosen, top, select, info, stored, out, threads or self.threads)
        return out

    def check_object(self, header: ObjectHeader) -> None:
        """Raise FingerprintMismatch, ProfileMismatch or ProfileMissing unless this codec may decode the object."""
        if header.fingerprint != self._digest:
            fields = self.spec.differences(header.spec)
            listed = "; ".join(f"{name}: expected {want}, got {got}" for name, (want, got) in fields.items())
            raise FingerprintMismatch(
                "the object is the cache of another model: expected fingerprint "
                f"{self._digest.hex()[:16]}, got {header.fingerprint.hex()[:16]} "
                f"({listed or 'same shape, but other weights, tokenizer or adapter'}). "
                "Use the codec of the model that wrote it",
                fields,
            )
        self.spec.check(header.spec)
        if header.profile is not None:
            if self.profile is None:
                raise ProfileMissing(
                    f"the object needs profile {header.profile[:16]}; none was given. Pass profile= the file that the "
                    "writer used (stores carry profiles under their hash)"
                )
            if self.profile.hash != header.profile:
                raise ProfileMismatch(
                    f"the object needs profile {header.profile[:16]}; got {self.profile.hash[:16]}. Load the profile "
                    "of that hash"
                )

    def _level_to_read(
        self, reader: ObjectReader, chosen: list[int], level: int | None, max_kl: float | None, best_effort: bool
    ) -> int:
        """Index of the top level to decode, checked against what the object states and holds."""
        losses = reader.header.losses
        if max_kl is not None:
            good = [i for i, loss in enumerate(losses) if loss.predicted_kl is not None and loss.predicted_kl <= max_kl]
            if not good:
                stated = ", ".join(f"level {x.level}: {x.predicted_kl}" for x in losses)
                raise QualityUnavailable(f"no level states a KL of at most {max_kl}; the object states {stated}")
            top = good[0]
        elif level is None:
            top = reader.num_levels - 1
        else:
            stored = [loss.level for loss in losses]
            if level not in stored:
                raise LevelError(f"level: the object holds {stored[0]}..{stored[-1]}; got {level}")
            top = stored.index(level)
        if best_effort:
            complete = reader.complete_level(chosen)
            if complete is None:
                raise Truncated("not even the lowest level is complete and intact", None)
            top = min(top, complete)
        return top

    def _decode_groups(
        self,
        reader: ObjectReader,
        chosen: list[int],
        top: int,
        select: Selection,
        info: ChunkInfo,
        stored: Tensor,
        out: KVChunk,
        threads: int,
    ) -> None:
        header = reader.header
        for index, entry in enumerate(header.codecs):
            coder = self._coder(entry)
            direct: list[GroupSegments] = []
            targets: Targets = {}
            for i in chosen:
                group = header.groups[i]
                if group.codec != index or is_empty(group):
                    continue
                part = GroupSegments(group, [reader.segment(q, i) for q in range(top + 1)])
                views = select.direct_targets(group, out, info)
                if views is not None and not (coder.exact and header.spec.dtype in FP8):
                    direct.append(part)
                    targets.update(views)
                else:
                    scratch = scratch_for(group, info)
                    coder.decode(info, [part], scratch, threads)
                    self._move_keys(coder, scratch, group, stored, info)
                    select.copy(group, scratch, out, info)
            if direct:
                coder.decode(info, direct, targets, threads)
                for part in direct:
                    self._move_keys(coder, targets, part.group, stored, info)

    def _coder(self, entry: CodecEntry) -> ChunkCodec:
        if entry.codec_id == self.codec.codec_id and _same_config(entry.config, self.codec.get_config()):
            return self.codec
        return make_codec(entry.codec_id, entry.config, self.profile)

    @staticmethod
    def _move_keys(coder: ChunkCodec, targets: Targets, group: Group, stored: Tensor, info: ChunkInfo) -> None:
        """Rotate keys of a codec that codes them as given from where they stood to where they will stand."""
        if coder.unrotates or torch.equal(stored, info.positions):
            return
        held = slice(*(group.tokens or (0, info.num_tokens)))
        for layer in range(*group.layers):
            rope = info.spec.layers[layer].rope
            for name in group.names:
                if rope is not None and name in ROTATED:
                    keys = targets[layer, name]
                    move(keys, stored[held], info.positions[held], rope, out=keys)


def _folder_config(folder: Path) -> Any:
    try:
        from transformers import AutoConfig
    except ImportError as error:
        raise MissingExtra("reading a model folder needs transformers: pip install 'cachegen[transformers]'") from error
    if not folder.is_dir():
        raise ShapeError(f"model: expected a model object or a folder; {folder} is no folder")
    ggufs = sorted(folder.glob("*.gguf"))
    extra = {"gguf_file": ggufs[0].name} if ggufs and not (folder / "config.json").exists() else {}
    return AutoConfig.from_pretrained(folder, local_files_only=True, **extra)


def _same_config(a: Any, b: Any) -> bool:
    return json.dumps(a, sort_keys=True) == json.dumps(b, sort_keys=True)

"""What a codec is.

A codec turns *groups* of a chunk into *segments* and back. It knows nothing of files, stores or headers: the
facade (`cachegen.codec.Codec`) decides which codec carries which group, the container writes and verifies bytes.

    class ChunkCodec: codec_id, kinds, embedded, unrotates; get_config / from_config; groups; encode; decode

Codec ids are registered in `cachegen.codecs` (third parties: entry-point group `cachegen.codecs`). Two classes
share an id only if each reads what the other writes.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, MutableMapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

from torch import Tensor

from ..kv import KVChunk, KVSpec, LayerKind

if TYPE_CHECKING:
    from ..profile import ModelProfile

Targets = MutableMapping[tuple[int, str], Tensor]
"""Where to decode to: (layer, tensor name) -> [tokens, heads, dim] in the spec's dtype, any row and head strides."""


@dataclass(frozen=True)
class Group:
    """The unit of coding: a range of layers x a range of the model's KV heads x named tensors.

    Attributes:
        layers: half-open range.
        heads: half-open range of the *model's* KV heads.
        names: the tensors coded together, e.g. ("k",), ("v",) or ("k", "v"); () for a state layer's tensors.
        tokens: the chunk's tokens that these layers hold; None means all.
        codec: index into the object's list of codecs.
    """

    layers: tuple[int, int]
    heads: tuple[int, int]
    names: tuple[str, ...]
    tokens: tuple[int, int] | None = None
    codec: int = 0


@dataclass(frozen=True)
class LevelLoss:
    """What a reader loses at a level: mean KL in nats that the profile predicts (None: unknown)."""

    level: int
    predicted_kl: float | None = None


@dataclass
class EncodedGroups:
    """A codec's output: `segments[i][q]` are the bytes that level q adds to group i (non-embedded: one per group).

    `losses` by level where the codec can state them; `notes` are fallbacks taken, for the report.
    """

    segments: list[list[bytes]]
    losses: list[LevelLoss] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class GroupSegments:
    """A group with its verified bytes, levels 0..q."""

    group: Group
    segments: Sequence[memoryview]


@dataclass(frozen=True)
class ChunkInfo:
    """What a decoder knows about the chunk besides segments.

    Attributes:
        spec: the model's cache.
        num_tokens: tokens of the whole chunk.
        positions: int64 [num_tokens] to rotate keys to, for codecs that un-rotate (else the stored ones).
        token_ids: int64 [num_tokens] or None.
        previous_ids: up to two ids before the chunk.
        level: quality level asked for (embedded) or that the object was written at.
    """

    spec: KVSpec
    num_tokens: int
    positions: Tensor
    token_ids: Tensor | None
    previous_ids: tuple[int, ...]
    level: int


class ChunkCodec(ABC):
    """Base of all codecs; instances are immutable and safe to share between threads."""

    codec_id: ClassVar[str]
    kinds: ClassVar[frozenset[LayerKind]] = frozenset({LayerKind.ATTENTION, LayerKind.SLIDING})
    embedded: ClassVar[bool] = False
    """One object holds every level (segments by level) rather than an object per level."""
    unrotates: ClassVar[bool] = False
    """Codes keys before RoPE, so that decode rotates them to any positions at no extra cost."""
    exact: ClassVar[bool] = False
    """Takes non-finite values, any dtype and fp8 scales, and returns every bit."""
    needs_profile: ClassVar[bool] = False

    @abstractmethod
    def get_config(self) -> dict[str, Any]:
        """JSON-able parameters a decoder needs; written into every object. Never the profile itself."""

    @classmethod
    @abstractmethod
    def from_config(cls, config: Mapping[str, Any], profile: ModelProfile | None = None) -> ChunkCodec:
        """Inverse of `get_config`. The config may come from a hostile object: validate, raise FormatError."""

    @property
    @abstractmethod
    def num_levels(self) -> int:
        """Quality levels, 0 the coarsest."""

    @property
    def default_level(self) -> int:
        """The level for callers who don't say: the default plan's (definitions: KL about 0.01)."""
        return self.num_levels - 1

    @abstractmethod
    def groups(self, spec: KVSpec, head_range: tuple[int, int]) -> list[Group]:
        """Groups for the layers whose kind is in `kinds`; the facade carries the others by `lossless`."""

    @abstractmethod
    def encode(self, chunk: KVChunk, groups: Sequence[Group], level: int, threads: int) -> EncodedGroups:
        """Encode `groups` of a validated chunk, whose values are finite unless `exact`.

        Args:
            level: for a codec that isn't embedded, the level to write; an embedded one writes all.
            threads: how many threads native code may use.
        """

    @abstractmethod
    def decode(self, info: ChunkInfo, parts: Sequence[GroupSegments], targets: Targets, threads: int) -> None:
        """Decode whole groups into `targets`, which hold every (layer, name) of `parts`.

        Target tensors have the group's tokens and heads. A codec with kind STATE, and one that carries fp8 scales,
        inserts what it decodes: (layer, name) and (layer, name + ".scale").

        Raises:
            FormatError kinds on malformed segments; never reads or writes outside its buffers.
        """

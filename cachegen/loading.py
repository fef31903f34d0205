"""One load of a context: chunks are fetched some ahead while the one before is decoded, straight into its place.

`KVStore` finds which chunks to load; a `Load` opens each, checks that it is what its key says, reads the level wanted,
and decodes. A chunk that can't be used ends the prefix there.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Awaitable, Callable, Coroutine, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar

from torch import Tensor

from .container import HEAD_READ, ObjectHeader, ObjectReader
from .errors import (
    CacheGenError,
    FormatError,
    IdentityError,
    LevelError,
    LimitExceeded,
    LineageError,
    PositionError,
    ProfileMissing,
    QualityUnavailable,
    RangeError,
    RangeNotSatisfiable,
    ShapeError,
    StoreError,
    TokenMismatch,
    Truncated,
    UnknownCodec,
)
from .keys import ChunkKey, token_digest
from .kv import KVChunk, Lineage
from .placement import Held, Placement, copy_held, has_windows, held_tokens, usable_tokens
from .stores import Store

if TYPE_CHECKING:
    from .codec import Codec

Progress = Callable[[int, int], None]
"""Called with (tokens done, tokens in all), from the store's own thread."""
T = TypeVar("T")

AHEAD = 4
"""Chunks being fetched or written while one is decoded or encoded: bounds the memory that they take."""
_SLACK_BYTES = 1 << 20
_DAMAGED = (
    *(FormatError, IdentityError, StoreError),
    *(LevelError, PositionError, ProfileMissing, QualityUnavailable, RangeError, ShapeError, UnknownCodec),
)
"""Errors that say that a stored chunk can't be used; any other is a fault of the call, and raised."""


@dataclass(frozen=True)
class Problem:
    """Why the chunk of tokens start..stop, stored under `key`, wasn't used."""

    key: str
    start: int
    stop: int
    error: CacheGenError

    def __str__(self) -> str:
        return f"tokens {self.start}..{self.stop} ({self.key}): {self.error}"


@dataclass(frozen=True)
class Loaded:
    """What a load found: falsy if nothing.

    Attributes:
        num_tokens: leading tokens of the ids that were loaded.
        chunk: their KV as one chunk; views of `cache` where there is one. None on a miss.
        cache: a transformers DynamicCache, if a model was given; ready for `generate` on all ids.
        level: the level read (the lowest, where chunks differ), or None on a miss.
        predicted_kl: the largest KL that the chunks state, in nats; None if one doesn't.
        lineage: what KV computed on top of this stands on; None if it is exact. Pass it to `save`.
        bytes_read: bytes fetched from the store.
        seconds: by stage: probe, fetch and decode (which overlap, each summed over chunks), total.
        problems: why the prefix ended, where a chunk was stored but couldn't be used.
    """

    num_tokens: int
    chunk: KVChunk | None = None
    cache: Any = None
    level: int | None = None
    predicted_kl: float | None = None
    lineage: Lineage | None = None
    bytes_read: int = 0
    seconds: dict[str, float] = field(default_factory=dict)
    problems: tuple[Problem, ...] = ()

    def __bool__(self) -> bool:
        return self.num_tokens > 0


@dataclass
class Clock:
    """Seconds by stage."""

    seconds: dict[str, float]
    started: float = field(default_factory=time.perf_counter)

    @classmethod
    def of(cls, *stages: str) -> Clock:
        return cls(dict.fromkeys(stages, 0.0))

    async def time(self, stage: str, work: Awaitable[T]) -> T:
        start = time.perf_counter()
        try:
            return await work
        finally:
            self.seconds[stage] += time.perf_counter() - start

    def stop(self) -> dict[str, float]:
        return {**self.seconds, "total": time.perf_counter() - self.started}


class Load:
    """One load: chunks are fetched some ahead while the one before is decoded, straight into the placement."""

    def __init__(
        self,
        codec: Codec,
        store: Store,
        threads: int | None,
        ids: Tensor,
        limit: int,
        level: int,
        max_kl: float | None,
        strict: bool,
        progress: Progress | None,
    ) -> None:
        self.codec, self.store, self.threads = codec, store, threads
        self.ids, self.limit, self.level, self.max_kl = ids, limit, level, max_kl
        self.strict, self.progress = strict, progress
        self.clock = Clock.of("probe", "fetch", "decode")
        self.problems: list[Problem] = []
        self.levels: list[tuple[int, float | None, Lineage | None]] = []
        """Of each chunk decoded: level, stated KL, lineage."""
        self.bytes_read = 0
        self._opened: dict[str, _PartReader] = {}

    async def run(self, parts: Sequence[ChunkKey], model: Any) -> Loaded:
        windows = has_windows(self.codec.spec)
        place: Placement | None = None
        while parts:
            num_tokens = min(parts[-1].stop, self.limit)
            if windows:
                parts, num_tokens = await self._with_windows(parts)
                if not parts:
                    break
            self.levels = []
            place = Placement(self.codec.spec, self.ids, num_tokens, model)
            await self._decode_all(parts, place)
            if len(self.levels) == len(parts):
                break
            parts = parts[: len(self.levels)]
            if parts and not windows:  # rows of a window are laid for one length: there, lay and decode anew
                place.cut(parts[-1].stop)
                break
        if not parts or place is None:
            self.levels = []
            return Loaded(0, bytes_read=self.bytes_read, seconds=self.clock.stop(), problems=tuple(self.problems))
        kls = [kl for _, kl, _ in self.levels]
        known = [kl for kl in kls if kl is not None]
        return Loaded(
            num_tokens=place.chunk.num_tokens,
            chunk=place.chunk,
            cache=place.cache,
            level=min(level for level, _, _ in self.levels),
            predicted_kl=max(known) if len(known) == len(kls) else None,
            lineage=self._lineage(),
            bytes_read=self.bytes_read,
            seconds=self.clock.stop(),
            problems=tuple(self.problems),
        )

    def _lineage(self) -> Lineage | None:
        """What KV computed on top of this would stand on: the coarsest chunk."""
        inherited = [lineage for _, _, lineage in self.levels if lineage is not None]
        if self.codec.codec.exact:
            return inherited[0] if inherited else None
        level, kl, _ = min(self.levels, key=lambda entry: entry[0])
        return Lineage(self.codec.codec.codec_id, level, kl)

    # ------------------------------------------------------------------ fetch
    async def _decode_all(self, parts: Sequence[ChunkKey], place: Placement) -> None:
        fetches: deque[asyncio.Task[tuple[ObjectReader, int]]] = deque()
        waiting = deque(parts)
        try:
            for key in parts:
                while waiting and len(fetches) < AHEAD:
                    fetches.append(asyncio.create_task(self.clock.time("fetch", self._fetch(waiting.popleft()))))
                try:
                    reader, top = await fetches.popleft()
                    await self.clock.time("decode", asyncio.to_thread(self._decode, key, reader, top, place))
                except _DAMAGED as error:
                    self._ends_at(key, error)
                    return
                loss = reader.header.losses[top]
                self.levels.append((loss.level, loss.predicted_kl, reader.header.lineage))
                if self.progress is not None:
                    self.progress(min(key.stop, place.chunk.num_tokens), place.chunk.num_tokens)
        finally:
            await cancel(fetches)

    def _ends_at(self, key: ChunkKey, error: CacheGenError) -> None:
        if self.strict:
            raise error
        self.problems.append(Problem(key.name, key.start, key.stop, error))

    async def _fetch(self, key: ChunkKey) -> tuple[ObjectReader, int]:
        """A reader that has the head and every level up to the one wanted, and that level's place in the object."""
        reader = self._opened.pop(key.name, None) or await self._open(key)
        top = self._top(reader.header)
        first, size = reader.bytes_held, reader.level_size(top)
        raw = key.num_tokens * reader.header.spec.elements_per_token() * reader.header.spec.torch_dtype.itemsize
        if size > 2 * raw + _SLACK_BYTES:
            raise LimitExceeded(f"object: expected fewer bytes than twice the KV's {raw}; it states {size}")
        if first < size:
            reader.add(first, await self._read(key, first, size))
        return reader, top

    async def stated_loss(self, key: ChunkKey) -> float | None:
        """The KL that a chunk's object states for its finest level; None if it states none or can't be used."""
        try:
            reader = await self._open(key)
        except _DAMAGED:  # met again, and reported, if this level is loaded
            return None
        self._opened[key.name] = reader
        return reader.header.losses[-1].predicted_kl

    async def _open(self, key: ChunkKey) -> _PartReader:
        data = await self._read(key, 0, HEAD_READ)
        need = ObjectReader.size_of_head(data)
        if need > len(data):
            data += await self._read(key, len(data), need)
        reader = _PartReader(data)
        self._check(key, reader.header)
        return reader

    async def _read(self, key: ChunkKey, start: int, stop: int) -> bytes:
        try:
            data = await self.store.get_range(key.name, start, stop)
        except RangeNotSatisfiable as error:
            raise Truncated(f"object: expected {stop} bytes or more; it ends at {error.details['size']}") from error
        self.bytes_read += len(data)
        return data

    def _check(self, key: ChunkKey, header: ObjectHeader) -> None:
        """Raise IdentityError kinds, or RangeError, unless this is the chunk that the key names."""
        self.codec.check_object(header)
        if header.token_digest != token_digest(self.ids[key.start : key.stop]):
            raise TokenMismatch(
                f"the object under {key.name} holds other tokens than {key.start}..{key.stop} of the ids asked for. "
                "Delete it: it isn't what its key says"
            )
        if header.positions != ((key.start, key.num_tokens),) or header.head_range != (0, header.spec.kv_heads):
            raise RangeError(
                f"expected all heads of positions {key.start}..{key.stop}; the object holds heads "
                f"{header.head_range} of positions {header.positions}"
            )
        stated = header.lineage and (header.lineage.codec, header.lineage.level)
        if stated != (key.lineage and (key.lineage.codec, key.lineage.level)):
            raise LineageError(f"the object under {key.name} states lineage {header.lineage}, its key {key.lineage}")

    def _top(self, header: ObjectHeader) -> int:
        losses = header.losses
        if self.max_kl is not None:
            for i, loss in enumerate(losses):
                if loss.predicted_kl is not None and loss.predicted_kl <= self.max_kl:
                    return i
            stated = ", ".join(f"level {loss.level}: {loss.predicted_kl}" for loss in losses)
            raise QualityUnavailable(f"no level states a KL of at most {self.max_kl}; the object states {stated}")
        for i, loss in enumerate(losses):
            if loss.level >= self.level:
                return i
        raise LevelError(f"level: the object holds {losses[0].level}..{losses[-1].level}; asked for {self.level}")

    # ------------------------------------------------------------------ decode
    def _decode(self, key: ChunkKey, reader: ObjectReader, top: int, place: Placement) -> None:
        stop = min(key.stop, place.chunk.num_tokens)
        view = place.view(key.start, stop)
        tokens = (0, stop - key.start)
        level = reader.header.losses[top].level
        if _lays_alike(view, reader.header, tokens):
            self.codec.decode(reader, level=level, tokens=tokens, out=view, threads=self.threads)
        else:
            copy_held(self.codec.decode(reader, level=level, tokens=tokens, threads=self.threads), view)

    # ------------------------------------------------------------------ windows
    async def _with_windows(self, parts: Sequence[ChunkKey]) -> tuple[Sequence[ChunkKey], int]:
        """The chunks, and tokens, that a cache with sliding layers can be taken up from."""
        gate = asyncio.Semaphore(AHEAD)

        async def opened(key: ChunkKey) -> _PartReader | CacheGenError:
            async with gate:
                try:
                    return self._opened.get(key.name) or await self._open(key)
                except _DAMAGED as error:
                    return error

        held: list[Held] = []
        for key, reader in zip(parts, await gathered(opened(key) for key in parts), strict=True):
            if isinstance(reader, CacheGenError):
                self._ends_at(key, reader)
                break
            self._opened[key.name] = reader
            held.append(held_tokens(reader.header, key.start))
        stops = [min(key.stop, self.limit) for key in parts[: len(held)]]
        num_tokens = usable_tokens(self.codec.spec, held, stops)
        if stops and num_tokens < stops[-1]:
            lost = parts[stops.index(num_tokens) + 1 if num_tokens else 0]
            self._ends_at(
                lost,
                RangeError(
                    f"sliding layers can't go on after token {stops[-1]}: the chunks were saved from a longer cache, "
                    f"whose window had moved on. {num_tokens} tokens can be loaded"
                ),
            )
        return [key for key, stop in zip(parts, stops, strict=False) if stop <= num_tokens], num_tokens


class _PartReader(ObjectReader):
    """A reader that knows how many of its leading bytes are here."""

    def __init__(self, data: bytes) -> None:
        super().__init__(data)
        self.bytes_held = len(data)


def _lays_alike(view: KVChunk, header: ObjectHeader, tokens: tuple[int, int]) -> bool:
    """Whether the view's layers hold the same tokens as the object's, so that it can be decoded into."""
    for layer, (first, last) in enumerate(held_tokens(header, 0)):
        start = min(max(first, tokens[0]), tokens[1])
        if view.layer_tokens(layer) != (start, max(min(last, tokens[1]), start)):
            return False
    return True


async def gathered(work: Iterable[Coroutine[Any, Any, T]]) -> list[T]:
    """Results in order; on the first error the others are cancelled and awaited before it is raised."""
    tasks = [asyncio.create_task(one) for one in work]
    try:
        return list(await asyncio.gather(*tasks))
    finally:
        await cancel(tasks)


async def cancel(tasks: Iterable[asyncio.Task[Any]]) -> None:
    left = list(tasks)
    for task in left:
        task.cancel()
    with suppress(asyncio.CancelledError):
        await asyncio.gather(*left, return_exceptions=True)

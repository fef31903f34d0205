"""`KVStore`: contexts saved and loaded by chunks; what is loaded is the longest stored prefix.

    store = KVStore(codec, "file:cache")
    store.save(ids, cache)                              # a transformers cache, or a KVChunk
    hit = store.load(prompt_ids, model=model)           # falsy on a miss
    model.generate(prompt_ids, cache=hit.cache)         # past_key_values=hit.cache in older transformers

Chunks are named by everything that shapes their KV (`keys.py`). Each is verified on the way in: fingerprint, token
digest, checksums. One that is missing, damaged or another's ends the prefix there, and is named in `Loaded.problems`.
The work runs on an event loop of the store's own; `asave` and `aload` await it from any other.
"""

from __future__ import annotations

import asyncio
import json
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from . import tails
from .errors import (
    InputError,
    KeyNotFound,
    LevelError,
    LineageError,
    PositionError,
    RangeError,
    RangeNotSatisfiable,
    ShapeError,
    StoreError,
    TokenMismatch,
)
from .keys import CHUNK_SIZE, ChunkKey, Extra, chunk_keys
from .kv import KVChunk, Lineage
from .loading import AHEAD, Clock, Load, Loaded, Progress, cancel, gathered
from .placement import check_chunkable
from .stores import BackgroundLoop, Store, open_store

if TYPE_CHECKING:
    from .codec import Codec, EncodeReport

_PROBES = 32
"""Existence checks under way at once."""


@dataclass(frozen=True)
class Saved:
    """What a save did.

    Attributes:
        num_tokens: leading tokens that are stored now.
        stored: chunks written; the others were there.
        skipped: chunks that were there.
        bytes_written: bytes of the chunks written.
        reports: the codec's report for each chunk written.
        seconds: by stage: probe, encode and store (which overlap, each summed over chunks), total.
    """

    num_tokens: int
    stored: int
    skipped: int
    bytes_written: int
    reports: tuple[EncodeReport, ...]
    seconds: dict[str, float]


class KVStore:
    """Contexts of one model in a store.

    Args:
        codec: encodes and decodes; its id, options and profile are part of every key.
        store: a `Store`, or its URL (`file:PATH?max_bytes=20GiB`, `memory:`). A store opened from a URL is closed with
            this object; a `Store` must be usable from an event loop other than the caller's.
        chunk_size: tokens in a chunk. Readers find only what was saved with the same.
        salt: separates tenants; it must come from the server, not from the request.
        level: the quality to write (codecs with an object per level) and to read; default the codec's.
        extras: what besides tokens shapes the KV of every context here (`keys.Extra`).
        threads: threads of native code when decoding; default the codec's.

    Raises:
        UnsupportedModel: the model's cache can't be cut into chunks (states).
        LevelError, StoreError kinds, InputError.
    """

    def __init__(
        self,
        codec: Codec,
        store: Store | str,
        *,
        chunk_size: int = CHUNK_SIZE,
        salt: str = "",
        level: int | None = None,
        extras: Sequence[Extra] = (),
        threads: int | None = None,
    ) -> None:
        check_chunkable(codec.spec)
        self.codec = codec
        self.chunk_size = chunk_size
        self.salt = salt
        self.level = self._checked_level(level)
        self.extras = tuple(map(_checked_extra, extras))
        self.threads = threads
        self._fingerprint = codec.fingerprint.digest()
        self._name = _codec_name(codec)
        self._keys_of([0], ())  # a bad salt, chunk size or extra is heard of now
        self._owns_store = isinstance(store, str)
        self.store = open_store(store) if isinstance(store, str) else store
        self._loop = BackgroundLoop()
        self._hints = asyncio.Lock()

    # ------------------------------------------------------------------ save
    def save(
        self,
        ids: Any,
        cache: Any,
        *,
        level: int | None = None,
        extras: Sequence[Extra] = (),
        batch_index: int = 0,
        lineage: Lineage | None = None,
        allow_lossy: bool = False,
        progress: Progress | None = None,
    ) -> Saved:
        """Save the KV of a context's leading tokens: as many as both `ids` and `cache` have. Stored chunks are kept.

        Args:
            ids: the context's token ids from its first token, int [tokens] or [1, tokens].
            cache: a transformers cache (DynamicCache, StaticCache), or a KVChunk of positions 0, 1, ... It is read
                until this returns.
            level: for a codec with an object per level, the level to write; default this store's.
            extras: of this context, after the store's own.
            batch_index: which sequence of the cache.
            lineage: what the KV was computed on, if that came from a lossy load (`Loaded.lineage`).
            allow_lossy: store such KV, under names of its own that only `load(lineage=...)` finds.
        Raises:
            LineageError: KV of lossy lineage, and `allow_lossy` isn't set.
            ShapeError, DtypeError, RangeError, PositionError: the cache isn't one of this model's.
            StoreFull, StoreDenied, StoreUnavailable: chunks stored until then stay, and are a prefix or unused.
        """
        args = (ids, cache, level, extras, batch_index, lineage, allow_lossy, progress)
        return self._loop.run(self._save(*args))

    async def asave(
        self,
        ids: Any,
        cache: Any,
        *,
        level: int | None = None,
        extras: Sequence[Extra] = (),
        batch_index: int = 0,
        lineage: Lineage | None = None,
        allow_lossy: bool = False,
        progress: Progress | None = None,
    ) -> Saved:
        """`save`, awaited from any event loop. The cache must not change until this returns."""
        args = (ids, cache, level, extras, batch_index, lineage, allow_lossy, progress)
        return await self._loop.wait(self._save(*args))

    async def _save(
        self,
        ids: Any,
        cache: Any,
        level: int | None,
        extras: Sequence[Extra],
        batch_index: int,
        lineage: Lineage | None,
        allow_lossy: bool,
        progress: Progress | None,
    ) -> Saved:
        clock = Clock.of("probe", "encode", "store")
        level = self.level if level is None else self._checked_level(level)
        ids = _flat(ids)
        part_of = _cutter(cache, self.codec, ids, batch_index)
        ids = ids[: part_of.num_tokens]
        if isinstance(cache, KVChunk):
            lineage = lineage or cache.lineage
        if lineage is not None and not allow_lossy:
            raise LineageError(
                f"this KV was computed on a prefix of codec {lineage.codec}, level {lineage.level}, so it isn't what "
                "its tokens' exact key promises. Recompute it on the exact prefix, or pass allow_lossy=True to store "
                "it apart (load(lineage=...) finds it)"
            )
        chunks = [self._named(key, level) for key in self._keys_of(ids, extras)]
        there = await clock.time("probe", self._stored(chunks, lineage))
        missing = [key for key, found in zip(chunks, there, strict=True) if found is None]
        if lineage is not None:
            missing = [key.with_lineage(lineage) for key in missing]
        written, reports, done = 0, [], sum(key.num_tokens for key in chunks) - sum(key.num_tokens for key in missing)
        puts: deque[asyncio.Task[None]] = deque()

        def tell(tokens: int) -> None:
            if progress is not None:
                progress(tokens, len(ids))

        async def put(key: ChunkKey, data: bytes) -> None:
            await clock.time("store", self.store.put(key.name, data))
            if key.num_tokens < self.chunk_size:
                await self._leave_hint(key, ids, extras, level)

        tell(done)
        try:
            for key in missing:
                chunk = part_of(key.start, key.stop, lineage)
                encoded = await clock.time("encode", asyncio.to_thread(self.codec.encode, chunk, level))
                written += len(encoded.data)
                reports.append(encoded.report)
                while len(puts) >= AHEAD:
                    await puts.popleft()
                puts.append(asyncio.create_task(put(key, encoded.data)))
                done += key.num_tokens
                tell(done)
            while puts:
                await puts.popleft()
        finally:
            await cancel(puts)
        await self._mark_used([found or key for key, found in zip(chunks, there, strict=True)])
        skipped = len(chunks) - len(missing)
        return Saved(len(ids), len(missing), skipped, written, tuple(reports), clock.stop())

    async def _leave_hint(self, key: ChunkKey, ids: Tensor, extras: Sequence[Extra], level: int) -> None:
        name = self._hint_name(ids, key.start, extras, level, key.lineage)
        async with self._hints:
            before = await self._hint(name)
            after = tails.added(before, key.num_tokens)
            if after != before:
                await self.store.put(name, after)

    # ------------------------------------------------------------------ load
    def load(
        self,
        ids: Any,
        *,
        model: Any = None,
        level: int | None = None,
        max_kl: float | None = None,
        max_tokens: int | None = None,
        extras: Sequence[Extra] = (),
        lineage: Lineage | None = None,
        strict: bool = False,
        progress: Progress | None = None,
    ) -> Loaded:
        """Load the longest stored prefix of a context.

        Args:
            ids: the prompt's token ids from its first token, int [tokens] or [1, tokens].
            model: a transformers model (or its config): load into a cache of its kind, which covers at most
                len(ids) - 1 tokens, so that `generate` on all ids computes the last token itself.
                None: load into a KVChunk.
            level: the quality to read; default this store's.
            max_kl: instead of a level, take the lowest one stored that states a KL of at most this.
            max_tokens: load at most this many tokens.
            extras: of this context, after the store's own.
            lineage: also take chunks that were saved with this lineage.
            strict: raise the first problem instead of ending the prefix before it.
        Returns:
            What was found; falsy on a miss. Problems with stored chunks are listed, not raised, unless `strict`.
        Raises:
            StoreUnavailable, StoreDenied: the store can't be asked at all.
            LevelError, InputError: no such level, or both a level and max_kl.
        """
        args = (ids, model, level, max_kl, max_tokens, extras, lineage, strict, progress)
        return self._loop.run(self._load(*args))

    async def aload(
        self,
        ids: Any,
        *,
        model: Any = None,
        level: int | None = None,
        max_kl: float | None = None,
        max_tokens: int | None = None,
        extras: Sequence[Extra] = (),
        lineage: Lineage | None = None,
        strict: bool = False,
        progress: Progress | None = None,
    ) -> Loaded:
        """`load`, awaited from any event loop."""
        args = (ids, model, level, max_kl, max_tokens, extras, lineage, strict, progress)
        return await self._loop.wait(self._load(*args))

    async def _load(
        self,
        ids: Any,
        model: Any,
        level: int | None,
        max_kl: float | None,
        max_tokens: int | None,
        extras: Sequence[Extra],
        lineage: Lineage | None,
        strict: bool,
        progress: Progress | None,
    ) -> Loaded:
        if level is not None and max_kl is not None:
            raise InputError("load: expected level or max_kl; got both")
        ids = _flat(ids)
        limit = len(ids) if max_tokens is None else min(max_tokens, len(ids))
        if model is not None:
            limit = min(limit, len(ids) - 1)
        wanted = level if level is not None else self.level
        work = Load(
            self.codec, self.store, self.threads, ids, limit, self._checked_level(wanted), max_kl, strict, progress
        )
        if max_kl is not None and not self.codec.embedded:
            work.level = await work.clock.time("probe", self._lowest_level(work, extras, lineage, max_kl))
        parts = await work.clock.time("probe", self._find(ids, extras, work.level, lineage, limit))
        loaded = await work.run(parts, model)
        await self._mark_used(parts[: len(work.levels)])
        return loaded

    async def _find(
        self, ids: Tensor, extras: Sequence[Extra], level: int, lineage: Lineage | None, limit: int
    ) -> list[ChunkKey]:
        """Keys of stored chunks that make a prefix of `ids`; chunks from `limit` on aren't looked for."""
        found: list[ChunkKey] = []
        asked = [self._named(key, level) for key in self._keys_of(ids, extras) if key.start < limit]
        for first in range(0, len(asked), _PROBES):
            there = await self._stored(asked[first : first + _PROBES], lineage)
            found += there[: there.index(None)] if None in there else there  # type: ignore[arg-type]
            if None in there:
                break
        start = found[-1].stop if found else 0
        if start < limit:
            tail = await self._find_tail(ids, start, extras, level, lineage)
            found += [tail] if tail is not None else []
        return found

    async def _lowest_level(self, work: Load, extras: Sequence[Extra], lineage: Lineage | None, max_kl: float) -> int:
        """Of levels stored as objects of their own, the lowest whose first chunk states a KL of at most `max_kl`.

        If none does, the finest stored (its chunks then are problems that say so), or this store's level.
        """
        best = work.level
        for level in range(self.codec.num_levels):
            first = await self._find(work.ids, extras, level, lineage, min(1, work.limit))
            loss = await work.stated_loss(first[0]) if first else None
            if loss is not None:
                best = level
                if loss <= max_kl:
                    break
        return best

    async def _find_tail(
        self, ids: Tensor, start: int, extras: Sequence[Extra], level: int, lineage: Lineage | None
    ) -> ChunkKey | None:
        """The longest stored chunk from `start` on that a shorter context ended with, and that `ids` goes on from."""
        best: ChunkKey | None = None
        for known in (None, lineage) if lineage is not None else (None,):
            hint = await self._hint(self._hint_name(ids, start, extras, level, known))
            lengths = {n for n in tails.unpack(hint) if 0 < n <= min(len(ids) - start, self.chunk_size - 1)}
            for length in sorted(lengths, reverse=True):
                if best is not None and length <= best.num_tokens:
                    break
                key = self._named(self._keys_of(ids[: start + length], extras)[-1], level).with_lineage(known)
                if await self.store.exists(key.name):
                    best = key
                    break
        return best

    # ------------------------------------------------------------------ names
    def _keys_of(self, ids: Any, extras: Sequence[Extra]) -> list[ChunkKey]:
        length = len(ids)
        known = [e for e in (*self.extras, *map(_checked_extra, extras)) if not isinstance(e, tuple) or e[0] < length]
        return chunk_keys(
            ids, self.chunk_size, salt=self.salt, fingerprint=self._fingerprint, extras=known, codec=self._name
        )

    def _named(self, key: ChunkKey, level: int) -> ChunkKey:
        return key if self.codec.embedded else key.with_level(level)

    def _hint_name(self, ids: Tensor, start: int, extras: Sequence[Extra], level: int, lineage: Lineage | None) -> str:
        first_token = self._keys_of(ids[: start + 1], extras)[-1]
        return tails.hint_name(self._named(first_token, level).with_lineage(lineage))

    def _checked_level(self, level: int | None) -> int:
        if level is None:
            return self.codec.default_level
        if not 0 <= level < self.codec.num_levels:
            raise LevelError(
                f"level: codec {self.codec.codec.codec_id} has 0..{self.codec.num_levels - 1}; got {level}"
            )
        return level

    # ------------------------------------------------------------------ the store
    async def _stored(self, keys: Sequence[ChunkKey], lineage: Lineage | None) -> list[ChunkKey | None]:
        """For each key the one that is stored: itself, or that of the lineage; else None."""
        gate = asyncio.Semaphore(_PROBES)

        async def probe(key: ChunkKey) -> ChunkKey | None:
            async with gate:
                if await self.store.exists(key.name):
                    return key
                if lineage is not None and await self.store.exists(key.with_lineage(lineage).name):
                    return key.with_lineage(lineage)
                return None

        return await gathered(probe(key) for key in keys)

    async def _hint(self, name: str) -> bytes:
        try:
            return await self.store.get_range(name, 0, 4 * tails.MAX_TAILS + 1)
        except (KeyNotFound, RangeNotSatisfiable):
            return b""

    async def _mark_used(self, keys: Sequence[ChunkKey]) -> None:
        """Use counts backwards, so that a store which evicts takes a context's end before its beginning."""
        with suppress(StoreError):  # a hint: what was loaded or saved stands without it
            await self.store.touch([key.name for key in reversed(keys)])

    # ------------------------------------------------------------------ life
    def close(self) -> None:
        """Stop what runs, and close the store if it was opened here. Closing twice is no error."""
        if self._owns_store:
            self._loop.run(self.store.close())
        self._loop.close()

    def __enter__(self) -> KVStore:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class _Cutter:
    """Chunks of a context's tokens, cut from an engine's cache or from one large chunk."""

    def __init__(self, num_tokens: int, cut: Callable[[int, int], KVChunk]) -> None:
        self.num_tokens = num_tokens
        self._cut = cut

    def __call__(self, start: int, stop: int, lineage: Lineage | None) -> KVChunk:
        chunk = self._cut(start, stop)
        chunk.lineage = lineage
        return chunk


def _cutter(cache: Any, codec: Codec, ids: Tensor, batch_index: int) -> _Cutter:
    if isinstance(cache, KVChunk):
        if cache.positions.tolist() != list(range(cache.num_tokens)):
            raise PositionError(
                "save: expected a chunk of positions 0, 1, 2, ..., since its key names the context from its first "
                f"token; got positions {int(cache.positions[0])}..{int(cache.positions[-1])}"
            )
        if cache.heads != (0, cache.spec.kv_heads):
            raise ShapeError(f"save: expected all {cache.spec.kv_heads} KV heads; got {cache.heads}")
        codec.spec.check(cache.spec)
        num_tokens = min(len(ids), cache.num_tokens)
        if cache.token_ids is not None and not torch.equal(cache.token_ids[:num_tokens], ids[:num_tokens]):
            raise TokenMismatch(
                "save: the chunk's token_ids aren't the ids given. Pass the ids that it was computed on"
            )
        whole = cache.slice(0, num_tokens)
        whole.token_ids = ids[:num_tokens]
        return _Cutter(num_tokens, whole.slice)
    if not hasattr(cache, "layers") or not hasattr(cache, "get_seq_length"):
        raise InputError(f"save: expected a transformers cache or a KVChunk; got {type(cache).__name__}")
    from .engines.transformers import cache_length, chunk_from_cache

    num_tokens = min(len(ids), cache_length(cache))
    if num_tokens < 1:
        raise RangeError("save: expected at least one token; the cache or the ids are empty")
    return _Cutter(
        num_tokens,
        lambda start, stop: chunk_from_cache(cache, codec.spec, ids, start=start, stop=stop, batch_index=batch_index),
    )


def _flat(ids: Any) -> Tensor:
    """Token ids as int64 [tokens]."""
    flat = torch.as_tensor(ids).detach().cpu()
    if flat.dim() == 2 and flat.shape[0] == 1:
        flat = flat[0]
    if flat.dim() != 1 or flat.is_floating_point() or flat.shape[0] < 1:
        raise ShapeError(
            f"ids: expected at least one integer, [tokens] or [1, tokens]; got {flat.dtype} {list(flat.shape)}"
        )
    return flat.to(torch.int64)


def _checked_extra(extra: Any) -> Extra:
    valued = extra[1] if isinstance(extra, tuple) and len(extra) == 2 and isinstance(extra[0], int) else extra
    if not isinstance(valued, (str, bytes)):
        raise InputError(f"extras: expected text, bytes, or (token position, text or bytes); got {extra!r}")
    return extra  # type: ignore[no-any-return]


def _codec_name(codec: Codec) -> str:
    """Names codec, options and profile in keys: objects that differ in any are other objects."""
    profile = codec.profile.hash if codec.profile is not None and codec.codec.needs_profile else None
    named = {"id": codec.codec.codec_id, "config": codec.codec.get_config(), "profile": profile}
    return json.dumps(named, sort_keys=True, separators=(",", ":"))

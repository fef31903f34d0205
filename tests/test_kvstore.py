"""Contexts saved and loaded by chunks: longest prefixes, what ends them, levels, windows, lineage, interruption."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cachegen.codec import Codec
from cachegen.codecs import register
from cachegen.codecs.base import ChunkCodec, ChunkInfo, EncodedGroups, Group, GroupSegments, LevelLoss, Targets
from cachegen.container import HEAD_READ, ObjectReader, write_object
from cachegen.engines.transformers import cache_keyword
from cachegen.errors import (
    ChecksumError,
    DtypeError,
    FingerprintMismatch,
    FormatError,
    InputError,
    LevelError,
    LimitExceeded,
    LineageError,
    NotAnObject,
    PositionError,
    QualityUnavailable,
    RangeError,
    ShapeError,
    StoreFull,
    StoreUnavailable,
    TokenMismatch,
    Truncated,
    UnsupportedModel,
)
from cachegen.fingerprint import Fingerprint
from cachegen.kv import KVChunk, KVSpec, LayerKind, LayerKV, LayerSpec, Lineage
from cachegen.kvstore import KVStore, Loaded
from cachegen.stores import MemoryStore, Store, SyncStore

ATTENTION = LayerSpec(LayerKind.ATTENTION, 2, 8, 8)
SPEC = KVSpec("toy", "bfloat16", (ATTENTION, ATTENTION, ATTENTION))


def fingerprint(spec: KVSpec, weights: str = "w") -> Fingerprint:
    dims = tuple(layer.k_dim for layer in spec.layers)
    return Fingerprint("toy", weights, spec.dtype, spec.num_layers, spec.kv_heads, dims, dims, "none")


class Bytes(ChunkCodec):
    """bf16 in two levels: high bytes, then low bytes; level 0 alone leaves the low byte zero."""

    def get_config(self) -> dict[str, Any]:
        return {}

    @classmethod
    def from_config(cls, config: Mapping[str, Any], profile: Any = None) -> ChunkCodec:
        return cls()

    @property
    def num_levels(self) -> int:
        return 2

    def groups(self, spec: KVSpec, head_range: tuple[int, int]) -> list[Group]:
        return [Group((i, i + 1), head_range, ("k", "v")) for i in range(spec.num_layers)]

    def parts(self, chunk: KVChunk, group: Group) -> tuple[bytes, bytes]:
        rows = torch.stack([chunk.layers[group.layers[0]].tensors[n] for n in ("k", "v")])
        pairs = rows.contiguous().view(torch.uint8).flatten()
        return bytes(pairs[1::2].tolist()), bytes(pairs[0::2].tolist())

    def decode(self, info: ChunkInfo, parts: Sequence[GroupSegments], targets: Targets, threads: int) -> None:
        for part in parts:
            layer = part.group.layers[0]
            high, low = self.planes(part, info)
            pairs = torch.stack([low, high], 1).flatten()
            shape = (2, info.num_tokens, part.group.heads[1] - part.group.heads[0], info.spec.layers[layer].k_dim)
            rows = pairs.view(torch.bfloat16).reshape(shape)
            for name, tensor in zip(("k", "v"), rows, strict=True):
                targets[layer, name].copy_(tensor)

    def planes(self, part: GroupSegments, info: ChunkInfo) -> tuple[torch.Tensor, torch.Tensor]:
        planes = [torch.frombuffer(bytearray(segment), dtype=torch.uint8) for segment in part.segments]
        return planes[0], planes[1] if len(planes) > 1 and len(planes[1]) else torch.zeros_like(planes[0])


@register
class Embedded(Bytes):
    codec_id = "test.embedded"
    embedded = True

    def encode(self, chunk: KVChunk, groups: Sequence[Group], level: int, threads: int) -> EncodedGroups:
        segments = [list(self.parts(chunk, group)) for group in groups]
        return EncodedGroups(segments, [LevelLoss(0, 0.25), LevelLoss(1, 0.0)])


@register
class ByLevel(Bytes):
    codec_id = "test.bylevel"

    def encode(self, chunk: KVChunk, groups: Sequence[Group], level: int, threads: int) -> EncodedGroups:
        parts = [self.parts(chunk, group) for group in groups]
        segments = [[high + (low if level else b"")] for high, low in parts]
        return EncodedGroups(segments, [LevelLoss(level, 0.0 if level else 0.25)])

    def planes(self, part: GroupSegments, info: ChunkInfo) -> tuple[torch.Tensor, torch.Tensor]:
        plane = torch.frombuffer(bytearray(part.segments[0]), dtype=torch.uint8)
        if info.level == 0:
            return plane, torch.zeros_like(plane)
        return plane[: len(plane) // 2], plane[len(plane) // 2 :]


def codec_for(name: str = "lossless", spec: KVSpec = SPEC, weights: str = "w") -> Codec:
    return Codec(spec, fingerprint(spec, weights), name, threads=1)


def context(tokens: int, seed: int = 0, spec: KVSpec = SPEC) -> KVChunk:
    """A context's whole cache; token i's rows depend on `seed` and i only, as a causal model's would."""
    rows = torch.Generator().manual_seed(seed)
    layers = []
    for layer in spec.layers:
        first = max(0, tokens - ((layer.window or tokens + 1) - 1))
        tensors = {}
        for name in layer.names:
            data = torch.randn(600, layer.kv_heads, layer.dim(name), generator=rows).to(spec.torch_dtype)
            tensors[name] = data[first:tokens]
        layers.append(LayerKV(layer.kind, tensors, (first, tokens) if first else None))
    return KVChunk(spec, torch.arange(tokens), layers, token_ids=ids(tokens, seed))


def ids(tokens: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 50_000, (600,), generator=torch.Generator().manual_seed(seed + 100))[:tokens]


def equal(found: KVChunk | None, wanted: KVChunk) -> bool:
    """Whether a loaded chunk holds the first tokens of `wanted`, bit for bit."""
    assert found is not None
    for i, layer in enumerate(found.layers):
        first, last = found.layer_tokens(i)
        start = wanted.layer_tokens(i)[0]
        for name, tensor in layer.tensors.items():
            if not torch.equal(tensor, wanted.layers[i].tensors[name][first - start : last - start]):
                return False
    return torch.equal(found.positions, torch.arange(found.num_tokens))


@pytest.fixture
def memory() -> MemoryStore:
    return MemoryStore()


@pytest.fixture
def objects(memory: MemoryStore) -> SyncStore:
    """The store's own bytes, to look at and damage."""
    return SyncStore(memory)


def chunk_names(objects: SyncStore) -> list[str]:
    """Names of stored chunks in the order of their tokens."""
    start = {name: ObjectReader(objects.get(name)).header.positions[0][0] for name in objects.list("p-")}
    return sorted(start, key=start.__getitem__)


def make(
    store: Store | str, name: str = "lossless", spec: KVSpec = SPEC, weights: str = "w", **options: Any
) -> KVStore:
    return KVStore(codec_for(name, spec, weights), store, chunk_size=options.pop("chunk_size", 16), **options)


# ---------------------------------------------------------------------- prefixes
@pytest.mark.parametrize("tokens", [1, 15, 16, 17, 48, 50])
def test_returns_what_was_saved(memory: MemoryStore, tokens: int) -> None:
    with make(memory) as store:
        saved = store.save(ids(tokens), context(tokens))
        assert (saved.num_tokens, saved.skipped) == (tokens, 0)
        assert saved.stored == len(saved.reports) == -(-tokens // 16)
        hit = store.load(ids(tokens))
        assert hit
        assert hit.num_tokens == tokens
        assert equal(hit.chunk, context(tokens))
        assert hit.chunk is not None
        assert hit.chunk.token_ids is not None
        assert torch.equal(hit.chunk.token_ids, ids(tokens))
        assert hit.problems == ()
        assert hit.bytes_read == saved.bytes_written
        assert {"probe", "fetch", "decode", "total"} == set(hit.seconds)
        assert hit.predicted_kl == 0.0
        assert hit.lineage is None


def test_a_fresh_process_finds_it(tmp_path: Path) -> None:
    with make(f"file:{tmp_path}/kv") as store:
        store.save(ids(40), context(40))
    with make(f"file:{tmp_path}/kv") as store:
        assert equal(store.load(ids(40)).chunk, context(40))


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    saved=st.lists(st.integers(1, 80), min_size=1, max_size=3), asked=st.integers(1, 100), shared=st.integers(0, 100)
)
def test_longest_stored_prefix(saved: list[int], asked: int, shared: int) -> None:
    """Against the definition: whole chunks, then the longest tail, whose tokens are the prompt's."""
    prompt = torch.cat([ids(shared), ids(600, seed=7)])[:asked]
    shared = min(shared, asked)
    with make(MemoryStore()) as store:
        for tokens in saved:
            store.save(ids(tokens), context(tokens))
        hit = store.load(prompt)
    ends = {end for tokens in saved for end in (*range(16, tokens + 1, 16), tokens) if end <= shared}
    assert hit.num_tokens == max(ends, default=0)
    if hit:
        assert equal(hit.chunk, context(80))


def test_a_longer_prompt_finds_the_tail(memory: MemoryStore, objects: SyncStore) -> None:
    with make(memory) as store:
        for tokens in (20, 27, 23):
            store.save(ids(tokens), context(tokens))
        assert store.load(ids(60)).num_tokens == 27
        assert store.load(ids(25)).num_tokens == 23
        (longest,) = (n for n in chunk_names(objects) if ObjectReader(objects.get(n)).header.num_tokens == 11)
        objects.delete(longest)
        assert store.load(ids(60)).num_tokens == 23, "a hint to a chunk that is gone is passed over"


def test_only_so_many_tails_are_remembered(memory: MemoryStore, objects: SyncStore) -> None:
    with make(memory, chunk_size=100) as store:
        for tokens in range(1, 70):
            store.save(ids(tokens), context(tokens))
        (hint,) = objects.list("t-")
        assert objects.size(hint) == 4 * 64
        assert store.load(ids(100)).num_tokens == 69


def test_a_damaged_hint_hides_the_tail_only(memory: MemoryStore, objects: SyncStore) -> None:
    with make(memory) as store:
        store.save(ids(20), context(20))
        (hint,) = objects.list("t-")
        for damage in (b"abc", b"\xff" * 4, b"\x00" * 4, bytes(10_000), b""):
            objects.put(hint, damage)
            assert store.load(ids(40)).num_tokens == 16
        store.save(ids(22), context(22))
        assert store.load(ids(40)).num_tokens == 22


def test_concurrent_saves_keep_all_hints() -> None:
    class Slow(MemoryStore):
        async def _get_ranges(self, key: str, ranges: Sequence[tuple[int, int]]) -> Sequence[bytes]:
            found = await super()._get_ranges(key, ranges)
            await asyncio.sleep(0.002)
            return found

    slow = Slow()
    objects = SyncStore(slow)
    with make(slow) as store:

        async def main() -> None:
            await asyncio.gather(*(store.asave(ids(tokens), context(tokens)) for tokens in range(17, 32)))

        asyncio.run(main())
        (hint,) = objects.list("t-")
        assert objects.size(hint) == 4 * 15


def test_other_tokens_miss(memory: MemoryStore) -> None:
    with make(memory) as store:
        store.save(ids(40), context(40))
        miss = store.load(ids(40, seed=1))
        assert not miss
        assert (miss.num_tokens, miss.chunk, miss.cache, miss.level) == (0, None, None, None)


@pytest.mark.parametrize(
    "other",
    [
        {"salt": "other"},
        {"extras": ("image",)},
        {"chunk_size": 8},
        {"weights": "other"},
        {"name": "test.embedded"},
    ],
    ids=str,
)
def test_what_keys_hold_apart(memory: MemoryStore, other: dict[str, Any]) -> None:
    with make(memory, salt="tenant") as store, make(memory, **{"salt": "tenant", **other}) as stranger:
        store.save(ids(40), context(40))
        assert not stranger.load(ids(40))
    with make(memory, salt="tenant") as friend:
        assert friend.load(ids(40)).num_tokens == 40


def test_extras_of_a_context(memory: MemoryStore) -> None:
    with make(memory, extras=("adapter",)) as store:
        store.save(ids(40), context(40), extras=[(20, b"picture")])
        assert store.load(ids(40), extras=[(20, b"picture")]).num_tokens == 40
        assert store.load(ids(40), extras=[(20, b"another")]).num_tokens == 16, "chunks before the picture are shared"
        assert store.load(ids(40)).num_tokens == 16


def test_max_tokens_cuts_inside_a_chunk(memory: MemoryStore) -> None:
    with make(memory) as store:
        store.save(ids(40), context(40))
        for limit in (40, 39, 33, 32, 5, 1):
            hit = store.load(ids(40), max_tokens=limit)
            assert hit.num_tokens == limit
            assert equal(hit.chunk, context(40))
        assert not store.load(ids(40), max_tokens=0)


def test_saving_again_writes_nothing(memory: MemoryStore) -> None:
    with make(memory) as store:
        store.save(ids(40), context(40))
        again = store.save(ids(60), context(60))
        assert (again.stored, again.skipped) == (2, 2)
        assert store.save(ids(60), context(60)).stored == 0
        assert store.load(ids(60)).num_tokens == 60


def test_ids_and_cache_of_different_lengths(memory: MemoryStore) -> None:
    with make(memory) as store:
        assert store.save(ids(60), context(40)).num_tokens == 40
        assert store.save(ids(20), context(40)).num_tokens == 20
        assert store.load(ids(60)).num_tokens == 40


def test_takes_ids_in_many_forms(memory: MemoryStore) -> None:
    with make(memory) as store:
        store.save(ids(20)[None], context(20))
        assert store.load(ids(20).tolist()).num_tokens == 20
        assert store.load(ids(20).to(torch.int32)).num_tokens == 20
        for bad in ([], [[1, 2], [3, 4]], torch.tensor([1.5]), torch.tensor(3)):
            with pytest.raises(ShapeError):
                store.load(bad)


def test_progress_goes_up_to_all_tokens(memory: MemoryStore) -> None:
    seen: list[tuple[int, int]] = []
    with make(memory) as store:
        store.save(ids(40), context(40), progress=lambda done, total: seen.append((done, total)))
        assert seen == [(0, 40), (16, 40), (32, 40), (40, 40)]
        seen.clear()
        store.load(ids(40), progress=lambda done, total: seen.append((done, total)))
        assert seen == [(16, 40), (32, 40), (40, 40)]


# ---------------------------------------------------------------------- levels
def test_embedded_levels_are_read_by_prefix(memory: MemoryStore, objects: SyncStore) -> None:
    wide = KVSpec("toy", "bfloat16", (LayerSpec(LayerKind.ATTENTION, 2, 256, 256),) * 3)
    whole = context(64, spec=wide)
    with make(memory, "test.embedded", wide, chunk_size=32) as store:
        store.save(ids(64), whole)
        names = chunk_names(objects)
        sizes = [ObjectReader(objects.get(name)) for name in names]
        assert sizes[0].level_size(0) > HEAD_READ
        low = store.load(ids(64), level=0)
        assert (low.level, low.predicted_kl) == (0, 0.25)
        assert low.bytes_read == sum(reader.level_size(0) for reader in sizes)
        assert low.lineage == Lineage("test.embedded", 0, 0.25)
        assert low.chunk is not None
        assert not equal(low.chunk, whole)
        for (_, _, found), (_, _, wanted) in zip(low.chunk.tensors(), whole.tensors(), strict=True):
            assert torch.equal(found.view(torch.int16), wanted.contiguous().view(torch.int16) & -256)
        high = store.load(ids(64))
        assert (high.level, high.predicted_kl) == (1, 0.0)
        assert high.bytes_read == sum(reader.total_size for reader in sizes)
        assert equal(high.chunk, whole)


def test_max_kl_takes_the_lowest_level_that_promises_it(memory: MemoryStore) -> None:
    with make(memory, "test.embedded") as store:
        store.save(ids(40), context(40))
        assert store.load(ids(40), max_kl=0.3).level == 0
        assert store.load(ids(40), max_kl=0.1).level == 1
        with pytest.raises(InputError):
            store.load(ids(40), max_kl=0.1, level=1)


def test_a_quality_nobody_promises_is_a_problem(memory: MemoryStore) -> None:
    with make(memory, "test.bylevel") as store:
        store.save(ids(40), context(40), level=0)
        assert store.load(ids(40), level=0, strict=True).num_tokens == 40
        assert not store.load(ids(40)), "another level is another object"
        miss = store.load(ids(40), max_kl=0.1)
        assert not miss
        assert isinstance(miss.problems[0].error, QualityUnavailable)
        assert not make(memory, "test.bylevel", salt="other").load(ids(40), max_kl=0.1).problems


def test_max_kl_among_objects_of_a_level_each(memory: MemoryStore, objects: SyncStore) -> None:
    with make(memory, "test.bylevel") as store:
        store.save(ids(40), context(40), level=0)
        store.save(ids(60), context(60), level=1)
        low = store.load(ids(60), max_kl=0.3)
        assert (low.level, low.num_tokens, low.predicted_kl) == (0, 40, 0.25)
        high = store.load(ids(60), max_kl=0.1)
        assert (high.level, high.num_tokens, high.predicted_kl) == (1, 60, 0.0)
        assert high.bytes_read == sum(objects.size(n) for n in chunk_names(objects) if n.endswith("-q1")) + min(
            HEAD_READ, objects.size(next(n for n in chunk_names(objects) if n.endswith("-q0")))
        )
        assert store.load(ids(5), max_kl=0.3).num_tokens == 0


def test_levels_of_their_own_objects(memory: MemoryStore, objects: SyncStore) -> None:
    with make(memory, "test.bylevel") as store:
        assert store.save(ids(40), context(40), level=0).stored == 3
        assert store.save(ids(40), context(40)).stored == 3
        assert len(chunk_names(objects)) == 6
        assert equal(store.load(ids(60)).chunk, context(40))
        assert store.load(ids(60), level=0).num_tokens == 40


def test_levels_that_are_none(memory: MemoryStore) -> None:
    for level in (-1, 2):
        with pytest.raises(LevelError):
            make(memory, "test.bylevel", level=level)
        with make(memory, "test.bylevel") as store:
            with pytest.raises(LevelError):
                store.load(ids(40), level=level)
            with pytest.raises(LevelError):
                store.save(ids(40), context(40), level=level)


# ---------------------------------------------------------------------- what ends a prefix
def damage(data: bytes, at: int) -> bytes:
    return data[:at] + bytes([data[at] ^ 0x10]) + data[at + 1 :]


@pytest.mark.parametrize(
    ("change", "error"),
    [
        (lambda data: damage(data, len(data) - 40), ChecksumError),
        (lambda data: damage(data, 70), FormatError),
        (lambda data: data[:-100], FormatError),
        (lambda data: data[:30], FormatError),
        (lambda data: data + b"x", FormatError),
        (lambda data: b"", Truncated),
        (lambda data: b"something else altogether, and long enough to be one of those objects of ours", NotAnObject),
    ],
    ids=["payload", "header", "short", "stub", "long", "empty", "foreign"],
)
def test_a_damaged_chunk_ends_the_prefix(memory: MemoryStore, objects: SyncStore, change: Any, error: Any) -> None:
    with make(memory) as store:
        store.save(ids(50), context(50))
        name = chunk_names(objects)[2]
        objects.put(name, change(objects.get(name)))
        hit = store.load(ids(50))
        assert hit.num_tokens == 32
        assert equal(hit.chunk, context(50))
        (problem,) = hit.problems
        assert (problem.key, problem.start, problem.stop) == (name, 32, 48)
        assert isinstance(problem.error, error)
        assert name in str(problem)
        with pytest.raises(error):
            store.load(ids(50), strict=True)


def test_a_damaged_first_chunk_is_a_miss_with_a_reason(memory: MemoryStore, objects: SyncStore) -> None:
    with make(memory) as store:
        store.save(ids(50), context(50))
        name = chunk_names(objects)[0]
        objects.put(name, damage(objects.get(name), 200))
        miss = store.load(ids(50))
        assert not miss
        assert miss.chunk is None
        assert len(miss.problems) == 1


@settings(max_examples=60, deadline=None)
@given(chunk=st.integers(0, 3), at=st.integers(0, 1 << 20), bit=st.integers(0, 7), cut=st.booleans())
def test_any_damage_leaves_the_exact_prefix(chunk: int, at: int, bit: int, cut: bool) -> None:
    memory = MemoryStore()
    objects = SyncStore(memory)
    with make(memory) as store:
        store.save(ids(50), context(50))
        name = chunk_names(objects)[chunk]
        data = bytearray(objects.get(name))
        at %= len(data)
        data[at] ^= 1 << bit
        objects.put(name, bytes(data[:at]) if cut else bytes(data))
        hit = store.load(ids(50))
        assert hit.num_tokens in (16 * chunk, 50), "the chunk is refused, or the damage is in padding"
        assert hit.num_tokens == 50 or len(hit.problems) == 1
        if hit:
            assert equal(hit.chunk, context(50))
    objects.close()


def test_a_missing_chunk_ends_the_prefix(memory: MemoryStore, objects: SyncStore) -> None:
    with make(memory) as store:
        store.save(ids(80), context(80))
        objects.delete(chunk_names(objects)[3])
        hit = store.load(ids(80))
        assert (hit.num_tokens, hit.problems) == (48, ())
        assert store.save(ids(80), context(80)).stored == 1
        assert store.load(ids(80)).num_tokens == 80


def test_swapped_chunks_are_found_out(memory: MemoryStore, objects: SyncStore) -> None:
    with make(memory) as store:
        store.save(ids(48), context(48))
        names = chunk_names(objects)
        objects.put(names[1], objects.get(names[2]))
        hit = store.load(ids(48))
        assert hit.num_tokens == 16
        assert isinstance(hit.problems[0].error, TokenMismatch)


def test_the_same_tokens_at_another_place_are_found_out(memory: MemoryStore, objects: SyncStore) -> None:
    twice = torch.cat([ids(16), ids(16)])
    whole = context(32)
    whole.token_ids = twice
    with make(memory) as store:
        store.save(twice, whole)
        first, second = chunk_names(objects)
        objects.put(second, objects.get(first))
        hit = store.load(twice)
        assert hit.num_tokens == 16
        assert isinstance(hit.problems[0].error, RangeError)


def test_another_models_object_is_found_out(memory: MemoryStore, objects: SyncStore) -> None:
    with make(memory) as store:
        store.save(ids(16), context(16))
        (name,) = chunk_names(objects)
        foreign = KVSpec("toy", "bfloat16", (LayerSpec(LayerKind.ATTENTION, 2, 512, 512),))
        objects.put(name, codec_for(spec=foreign).encode(context(16, spec=foreign)).data)
        miss = store.load(ids(16))
        assert isinstance(miss.problems[0].error, FingerprintMismatch)
        assert miss.bytes_read == HEAD_READ < objects.size(name), "found out from the head"


def test_an_object_without_tokens_is_found_out(memory: MemoryStore, objects: SyncStore) -> None:
    with make(memory) as store:
        store.save(ids(16), context(16))
        (name,) = chunk_names(objects)
        objects.put(name, store.codec.encode(replace(context(16), token_ids=None)).data)
        assert isinstance(store.load(ids(16)).problems[0].error, TokenMismatch)


class Flaky(MemoryStore):
    """Fails reads of the keys named, and can be told to hold them up."""

    def __init__(self) -> None:
        super().__init__()
        self.broken: set[str] = set()
        self.held: threading.Event | None = None
        self.cancelled = 0

    async def _get_ranges(self, key: str, ranges: Sequence[tuple[int, int]]) -> Sequence[bytes]:
        if key in self.broken:
            raise StoreUnavailable("the network is gone")
        if self.held is not None:
            try:
                self.held.set()
                await asyncio.sleep(60)
            except asyncio.CancelledError:
                self.cancelled += 1
                raise
        return await super()._get_ranges(key, ranges)


def test_a_store_that_fails_midway_ends_the_prefix() -> None:
    flaky = Flaky()
    with make(flaky) as store:
        store.save(ids(80), context(80))
        flaky.broken = {chunk_names(SyncStore(flaky))[3]}
        hit = store.load(ids(80))
        assert hit.num_tokens == 48
        assert isinstance(hit.problems[0].error, StoreUnavailable)


def test_a_prefix_that_ends_leaves_no_fetch_behind() -> None:
    flaky = Flaky()
    with make(flaky) as store:
        store.save(ids(80), context(80))
        flaky.broken = {chunk_names(SyncStore(flaky))[0]}
        flaky.held = threading.Event()
        assert not store.load(ids(80))
        assert flaky.cancelled == 3


def test_an_object_of_absurd_size_is_not_fetched(memory: MemoryStore, objects: SyncStore) -> None:
    with make(memory) as store:
        store.save(ids(16), context(16))
        (name,) = chunk_names(objects)
        header = ObjectReader(objects.get(name)).header
        objects.put(name, write_object(header, [[bytes(1_000_000)] for _ in header.groups]))
        miss = store.load(ids(16))
        assert isinstance(miss.problems[0].error, LimitExceeded)
        assert miss.bytes_read == HEAD_READ


def test_a_store_that_can_not_be_asked_is_an_error() -> None:
    class Gone(MemoryStore):
        async def _exists(self, key: str) -> bool:
            raise StoreUnavailable("gone")

    with make(Gone()) as store:
        with pytest.raises(StoreUnavailable):
            store.load(ids(16))
        with pytest.raises(StoreUnavailable):
            store.save(ids(16), context(16))


def test_a_full_store_keeps_what_it_has(memory: MemoryStore) -> None:
    class Full(MemoryStore):
        puts = 0

        async def _put(self, key: str, data: Any) -> None:
            self.puts += 1
            if self.puts > 2:
                raise StoreFull("no room")
            await super()._put(key, data)

    with make(Full()) as store:
        with pytest.raises(StoreFull):
            store.save(ids(80), context(80))
        hit = store.load(ids(80))
        assert hit.num_tokens == 32
        assert equal(hit.chunk, context(80))


def test_eviction_takes_a_context_from_its_end() -> None:
    with make(MemoryStore()) as probe:
        size = probe.save(ids(96), context(96)).bytes_written
    limited = MemoryStore(max_bytes=size + 64)
    with make(limited) as store:
        store.save(ids(96), context(96))
        store.load(ids(96))
        store.save(ids(32, seed=1), context(32, seed=1))
        assert store.load(ids(32, seed=1)).num_tokens == 32
        assert store.load(ids(96)).num_tokens == 64, "not 0: its beginning went last"


# ---------------------------------------------------------------------- lineage
def test_kv_on_a_lossy_prefix_is_stored_apart(memory: MemoryStore) -> None:
    with make(memory, "test.embedded") as store:
        store.save(ids(32), context(32))
        hit = store.load(ids(32), level=0)
        assert hit.lineage == Lineage("test.embedded", 0, 0.25)
        derived = context(70)
        with pytest.raises(LineageError, match="allow_lossy"):
            store.save(ids(70), derived, lineage=hit.lineage)
        saved = store.save(ids(70), derived, lineage=hit.lineage, allow_lossy=True)
        assert (saved.stored, saved.skipped) == (3, 2)
        assert store.load(ids(70)).num_tokens == 32, "exact readers don't see it"
        both = store.load(ids(90), lineage=hit.lineage)
        assert both.num_tokens == 70
        assert both.lineage is not None
        assert store.save(ids(70), derived, lineage=hit.lineage, allow_lossy=True).stored == 0
        assert not store.load(ids(90)[16:], lineage=hit.lineage)


def test_a_chunk_that_carries_its_lineage(memory: MemoryStore) -> None:
    with make(memory) as store:
        derived = replace(context(20), lineage=Lineage("test.embedded", 0, 0.25))
        with pytest.raises(LineageError):
            store.save(ids(20), derived)
        store.save(ids(20), derived, allow_lossy=True)
        assert not store.load(ids(20))
        hit = store.load(ids(20), lineage=Lineage("test.embedded", 0))
        assert hit.num_tokens == 20
        assert hit.lineage == Lineage("test.embedded", 0, 0.25), "lossless adds no loss, and hides none"


def test_a_lossy_object_under_an_exact_key_is_found_out(memory: MemoryStore, objects: SyncStore) -> None:
    with make(memory) as store:
        store.save(ids(16), context(16))
        (name,) = chunk_names(objects)
        objects.put(name, store.codec.encode(replace(context(16), lineage=Lineage("x", 0))).data)
        assert isinstance(store.load(ids(16)).problems[0].error, LineageError)


# ---------------------------------------------------------------------- sliding windows
SLIDING = KVSpec("toy", "bfloat16", (ATTENTION, LayerSpec(LayerKind.SLIDING, 2, 8, 8, window=11), ATTENTION))


def test_a_window_is_restored(memory: MemoryStore) -> None:
    whole = context(50, spec=SLIDING)
    with make(memory, spec=SLIDING) as store:
        store.save(ids(50), whole)
        for asked in (50, 70):
            hit = store.load(ids(asked))
            assert hit.num_tokens == 50
            assert hit.chunk is not None
            assert hit.chunk.layer_tokens(1) == (40, 50)
            assert equal(hit.chunk, whole)


def test_a_prefix_whose_window_was_dropped_is_not_loaded(memory: MemoryStore) -> None:
    with make(memory, spec=SLIDING) as store:
        store.save(ids(50), context(50, spec=SLIDING))
        miss = store.load(torch.cat([ids(48), ids(20, seed=9)]))
        assert not miss
        assert "sliding" in str(miss.problems[0])
        store.save(ids(8), context(8, spec=SLIDING))
        short = store.load(torch.cat([ids(8), ids(20, seed=9)]))
        assert short.num_tokens == 8


def test_windows_cut_by_max_tokens(memory: MemoryStore) -> None:
    whole = context(20, spec=SLIDING)
    full = LayerKV(LayerKind.SLIDING, dict(context(20).layers[1].tensors))
    whole.layers[1] = full  # a writer that kept every row: the reader may stop anywhere
    whole = KVChunk(SLIDING, whole.positions, whole.layers, token_ids=whole.token_ids)
    with make(memory, spec=SLIDING) as store:
        store.save(ids(20), whole)
        for limit in (20, 19, 17, 16, 9):
            hit = store.load(ids(20), max_tokens=limit)
            assert hit.num_tokens == limit
            assert hit.chunk is not None
            assert hit.chunk.layer_tokens(1) == (max(0, limit - 10), limit)
            assert equal(hit.chunk, whole)


def test_a_damaged_chunk_among_windows(memory: MemoryStore, objects: SyncStore) -> None:
    whole = KVChunk(
        SLIDING,
        torch.arange(48),
        [LayerKV(layer.kind, dict(context(48).layers[i].tensors)) for i, layer in enumerate(SLIDING.layers)],
        token_ids=ids(48),
    )
    with make(memory, spec=SLIDING) as store:
        store.save(ids(48), whole)
        name = chunk_names(objects)[2]
        objects.put(name, damage(objects.get(name), objects.size(name) - 40))
        hit = store.load(ids(48))
        assert hit.num_tokens == 32
        assert hit.chunk is not None
        assert hit.chunk.layer_tokens(1) == (22, 32)
        assert equal(hit.chunk, whole)
        assert len(hit.problems) == 1


# ---------------------------------------------------------------------- the caller's input
@pytest.mark.parametrize("name", ["lossless", "channel"])
def test_takes_caches_computed_with_gradients_on(memory: MemoryStore, name: str) -> None:
    whole = context(20)
    for layer in whole.layers:
        layer.tensors = {n: t.clone().requires_grad_() for n, t in layer.tensors.items()}
    with make(memory, name) as store:
        store.save(ids(20), whole)
        hit = store.load(ids(20))
        assert hit.num_tokens == 20
        assert hit.chunk is not None
        assert not any(tensor.requires_grad for _, _, tensor in hit.chunk.tensors())


def test_refuses_what_it_can_not_save(memory: MemoryStore, objects: SyncStore) -> None:
    with make(memory) as store:
        with pytest.raises(InputError, match="expected a transformers cache or a KVChunk"):
            store.save(ids(16), {"k": 1})
        with pytest.raises(PositionError):
            store.save(ids(16), context(32).slice(16, 32))
        with pytest.raises(TokenMismatch):
            store.save(ids(16, seed=3), context(16))
        with pytest.raises(FingerprintMismatch):
            store.save(ids(16), context(16, spec=SLIDING))
        heads = KVChunk(
            SPEC,
            torch.arange(4),
            [LayerKV(layer.kind, {n: t[:4, :1] for n, t in layer.tensors.items()}) for layer in context(16).layers],
            (0, 1),
        )
        with pytest.raises(ShapeError, match="all 2 KV heads"):
            store.save(ids(4), heads)
        assert list(objects.list()) == []


def test_refuses_states(memory: MemoryStore) -> None:
    spec = KVSpec("toy", "bfloat16", (ATTENTION, LayerSpec(LayerKind.STATE, 0, 0, 0)))
    with pytest.raises(UnsupportedModel, match="state"):
        make(memory, spec=spec)


@pytest.mark.parametrize("options", [{"chunk_size": 0}, {"salt": 5}, {"extras": (7,)}], ids=str)
def test_refuses_options(memory: MemoryStore, options: dict[str, Any]) -> None:
    with pytest.raises(InputError):
        make(memory, **options)


# ---------------------------------------------------------------------- async, interruption
def test_async_twins_in_a_callers_loop(memory: MemoryStore) -> None:
    async def main() -> Loaded:
        with make(memory) as store:
            await store.asave(ids(40), context(40))
            hits = await asyncio.gather(*(store.aload(ids(40)) for _ in range(4)))
            assert all(equal(hit.chunk, context(40)) for hit in hits)
            return store.load(ids(40))  # sync, inside a running loop

    assert asyncio.run(main()).num_tokens == 40


def test_cancelled_loads_cancel_their_fetches() -> None:
    flaky = Flaky()
    with make(flaky) as store:
        store.save(ids(80), context(80))
        flaky.held = threading.Event()

        async def main() -> None:
            task = asyncio.create_task(store.aload(ids(80)))
            await asyncio.to_thread(flaky.held.wait, 10)  # type: ignore[union-attr]
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task

        asyncio.run(main())
        flaky.held = None
        assert store.load(ids(80)).num_tokens == 80
        assert flaky.cancelled >= 1


def test_fetches_run_ahead_of_decoding_but_not_far() -> None:
    class Counting(MemoryStore):
        open = most = 0

        async def _get_ranges(self, key: str, ranges: Sequence[tuple[int, int]]) -> Sequence[bytes]:
            self.open += 1
            self.most = max(self.most, self.open)
            await asyncio.sleep(0.002)
            self.open -= 1
            return await super()._get_ranges(key, ranges)

    counting = Counting()
    with make(counting) as store:
        store.save(ids(320), context(320))
        store.load(ids(320))
        assert 2 <= counting.most <= 4


def test_encoding_runs_ahead_of_writing_but_not_far() -> None:
    class Counting(MemoryStore):
        open = most = 0

        async def _put(self, key: str, data: Any) -> None:
            self.open += 1
            self.most = max(self.most, self.open)
            await asyncio.sleep(0.05)
            self.open -= 1
            await super()._put(key, data)

    counting = Counting()
    with make(counting) as store:
        store.save(ids(320), context(320))
        assert 2 <= counting.most <= 4


def test_a_store_given_stays_open(memory: MemoryStore, objects: SyncStore) -> None:
    with make(memory) as store:
        store.save(ids(16), context(16))
    assert len(list(objects.list("p-"))) == 1
    store.close()


def test_a_store_of_its_own_is_closed(tmp_path: Path) -> None:
    store = make(f"file:{tmp_path}/kv")
    store.save(ids(16), context(16))
    store.close()
    with pytest.raises(StoreUnavailable):
        store.load(ids(16))
    store.close()


def test_list_is_all_names_it_writes(memory: MemoryStore) -> None:
    async def names() -> AsyncIterator[str]:
        async for name in memory.list():
            yield name

    async def gather() -> list[str]:
        return sorted([name async for name in names()])

    with make(memory) as store:
        store.save(ids(20), context(20))
    assert [name[:2] for name in asyncio.run(gather())] == ["p-", "p-", "t-"]


# ---------------------------------------------------------------------- transformers
def computed(network: Any, token_ids: torch.Tensor) -> Any:
    """The untouched cache."""
    with torch.no_grad():
        output = network(token_ids[None], use_cache=True)
    return output.cache if "cache" in output else output.past_key_values


def test_dtype_of_the_cache_must_be_the_codecs(memory: MemoryStore) -> None:
    with make(memory) as store, pytest.raises((DtypeError, FingerprintMismatch)):
        store.save(ids(16), context(16, spec=SPEC.with_dtype("float32")))


def test_generation_goes_on_from_a_loaded_cache(
    model: tuple[Any, Any], smollm2_ids: torch.Tensor, tmp_path: Path
) -> None:
    """A context saved by one KVStore and loaded by another answers as the untouched cache does, token for token."""
    network, tokenizer = model
    context_ids = smollm2_ids[:160]
    question = torch.as_tensor(tokenizer("\nQuestion: what did Peter teach the goat?\nAnswer:")["input_ids"])
    prompt = torch.cat([context_ids, question])[None]
    cache = computed(network, context_ids)
    codec = Codec.for_model(network, "lossless")
    with KVStore(codec, f"file:{tmp_path}/kv", chunk_size=96) as store:
        saved = store.save(context_ids, cache)
        assert (saved.num_tokens, saved.stored) == (160, 2)
    keyword = cache_keyword(network)
    greedy = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    with KVStore(codec, f"file:{tmp_path}/kv", chunk_size=96) as store:
        hit = store.load(prompt, model=network)
        assert hit.num_tokens == 160
        again = store.load(context_ids, model=network)
        assert again.num_tokens == 159, "generate computes the prompt's last token itself"
    for layer, untouched in zip(hit.cache.layers, cache.layers, strict=True):
        assert torch.equal(layer.keys, untouched.keys)
        assert torch.equal(layer.values, untouched.values)
    assert torch.equal(again.cache.layers[7].keys, cache.layers[7].keys[:, :, :159])
    expected = network.generate(prompt, **{keyword: cache}, **greedy)
    assert torch.equal(network.generate(prompt, **{keyword: hit.cache}, **greedy), expected)
    scratch = network.generate(context_ids[None], **greedy)
    assert torch.equal(network.generate(context_ids[None], **{keyword: again.cache}, **greedy), scratch)


def test_a_damaged_chunk_crops_the_cache(model: tuple[Any, Any], smollm2_ids: torch.Tensor) -> None:
    network = model[0]
    cache = computed(network, smollm2_ids[:100])
    memory = MemoryStore()
    with KVStore(Codec.for_model(network, "lossless"), memory, chunk_size=32) as store:
        store.save(smollm2_ids[:100], cache)
        objects = SyncStore(memory)
        name = chunk_names(objects)[2]
        objects.put(name, damage(objects.get(name), objects.size(name) - 40))
        hit = store.load(smollm2_ids[:100], model=network)
    assert hit.num_tokens == hit.cache.get_seq_length() == 64
    assert torch.equal(hit.cache.layers[3].values, cache.layers[3].values[:, :, :64])
    assert hit.chunk is not None
    assert hit.chunk.num_tokens == 64


def test_generation_goes_on_from_loaded_windows() -> None:
    """Gemma 2's alternation of full and sliding layers, tiny and random."""
    from transformers import Gemma2Config, Gemma2ForCausalLM

    torch.manual_seed(0)
    sizes = {"vocab_size": 99, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 4, "head_dim": 16}
    config = Gemma2Config(**sizes, num_attention_heads=2, num_key_value_heads=1, sliding_window=12, pad_token_id=0)
    network = Gemma2ForCausalLM(config).eval()
    prompt = torch.randint(1, 99, (60,), generator=torch.Generator().manual_seed(1))
    greedy = {"max_new_tokens": 6, "do_sample": False}
    with KVStore(Codec.for_model(network, "lossless"), MemoryStore(), chunk_size=16) as store:
        cache = computed(network, prompt[:50])
        store.save(prompt[:50], cache)
        hit = store.load(prompt, model=network)
        assert hit.num_tokens == 50
        assert hit.chunk is not None
        assert hit.chunk.layer_tokens(0) == (39, 50)
        keyword = cache_keyword(network)
        found = network.generate(prompt[None], **{keyword: hit.cache}, **greedy)
        assert torch.equal(found, network.generate(prompt[None], **{keyword: cache}, **greedy))
        short = store.load(prompt[:50], model=network)
        assert not short, "49 tokens: the window of the 49th was dropped, so nothing can go on from there"
        assert "sliding" in str(short.problems[0])


def test_sequences_of_a_batch_and_static_caches(memory: MemoryStore) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM, StaticCache

    torch.manual_seed(0)
    sizes = {"vocab_size": 99, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2}
    network = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=2, num_key_value_heads=1)).eval()
    batch = torch.randint(1, 99, (2, 40), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        dynamic = network(batch, use_cache=True)
        dynamic = dynamic.cache if "cache" in dynamic else dynamic.past_key_values
        static = StaticCache(config=network.config, max_cache_len=64)
        network(batch[:1], use_cache=True, **{cache_keyword(network): static})
    with KVStore(Codec.for_model(network, "lossless"), memory, chunk_size=16) as store:
        for index in (0, 1):
            assert store.save(batch[index], dynamic, batch_index=index).stored == 3
            hit = store.load(batch[index])
            assert hit.chunk is not None
            for layer, untouched in zip(hit.chunk.layers, dynamic.layers, strict=True):
                assert torch.equal(layer.tensors["k"].transpose(0, 1), untouched.keys[index])
        assert store.save(batch[0], static).skipped == 3, "the same tokens, by another kind of cache"
        with pytest.raises(RangeError):
            store.save(batch[0, :7], dynamic, batch_index=2)
    with KVStore(Codec.for_model(network, "lossless"), MemoryStore(), chunk_size=16) as store:
        store.save(batch[0], static)
        hit = store.load(batch[0], model=network, max_tokens=24)
        assert torch.equal(hit.cache.layers[1].values, static.layers[1].values[:, :, :24])

"""The .kvc object: what is written is read, by any ranges, and nothing else is written."""

from __future__ import annotations

import mmap
import struct
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cachegen.codecs.base import Group, LevelLoss
from cachegen.container import (
    HEAD_READ,
    ByteRange,
    CodecEntry,
    ObjectHeader,
    ObjectReader,
    trim,
    verify,
    write_object,
)
from cachegen.errors import (
    CapacityError,
    ChecksumError,
    FormatError,
    InputError,
    LevelError,
    RangeError,
    Truncated,
)
from cachegen.header import header_json, parse_header
from cachegen.inspection import describe
from cachegen.keys import token_digest
from cachegen.kv import KVSpec, LayerKind, LayerSpec, Lineage
from cachegen.native import crc32c
from cachegen.rope import Rope
from cachegen.token_block import pack, unpack

ROPE = Rope(inv_freq=(1.0, 0.25), rotary_dim=4, kind="default")
ATTENTION = LayerSpec(LayerKind.ATTENTION, 2, 8, 8, ROPE)


def tiny(levels: int = 1, layers: int = 2, tokens: int = 40, **changes) -> ObjectHeader:
    groups = tuple(Group((i, i + 1), (0, 2), (name,)) for i in range(layers) for name in ("k", "v"))
    losses = tuple(LevelLoss(q, 0.1 / (q + 1)) for q in range(levels)) if levels > 1 else (LevelLoss(3),)
    header = ObjectHeader(
        codecs=(CodecEntry("channel", {"step": 0.5, "names": ["k", "v"]}),),
        fingerprint=bytes(range(32)),
        profile=None,
        spec=KVSpec("tiny", "bfloat16", (ATTENTION,) * layers),
        num_tokens=tokens,
        positions=((0, tokens),),
        head_range=(0, 2),
        groups=groups,
        losses=losses,
    )
    return replace(header, **changes)


def with_ids(header: ObjectHeader, ids: tuple[int, ...]) -> ObjectHeader:
    return replace(header, token_ids=ids, token_digest=token_digest(ids))


def random_segments(header: ObjectHeader, sizes=(0, 1, 15, 16, 17, 700), seed: int = 0) -> list[list[bytes]]:
    rng = np.random.default_rng(seed)
    return [[rng.bytes(int(rng.choice(sizes))) for _ in header.losses] for _ in header.groups]


FULL = with_ids(
    tiny(
        levels=3,
        positions=((100, 30), (7, 10)),
        codecs=(CodecEntry("klt", {"a": [1, 2.5, None, True, "é"]}), CodecEntry("lossless", {})),
        profile="ab" * 32,
        previous_ids=(5, 4_000_000_000),
        lineage=Lineage("cachegen", 2, 0.015625),
        losses=(LevelLoss(0, 0.5), LevelLoss(1, None), LevelLoss(2, 1e-9)),
    ),
    tuple(range(1000, 1040)),
)


class TestRoundTrip:
    @pytest.mark.parametrize(
        "header", [tiny(), tiny(levels=4), FULL, tiny(layers=30)], ids=["one", "four", "full", "30"]
    )
    def test_header_and_segments_come_back(self, header):
        segments = random_segments(header)
        reader = ObjectReader(write_object(header, segments))
        assert reader.header == header
        assert reader.num_levels == len(header.losses)
        found = [[bytes(reader.segment(q, g)) for q in range(reader.num_levels)] for g in range(len(header.groups))]
        assert found == segments

    @settings(max_examples=60, deadline=None)
    @given(st.data())
    def test_any_sizes_and_levels(self, data):
        levels = data.draw(st.integers(1, 16))
        header = tiny(levels=levels)
        segments = [
            data.draw(st.lists(st.binary(max_size=40), max_size=levels), label="levels of a group")
            for _ in header.groups
        ]
        raw = write_object(header, segments)
        verify(raw)
        reader = ObjectReader(raw)
        for g, group in enumerate(segments):
            want = group + [b""] * (levels - len(group))
            assert [bytes(reader.segment(q, g)) for q in range(levels)] == want

    def test_layer_kinds_windows_and_heads_of_a_rank(self):
        spec = KVSpec(
            "mixed",
            "float16",
            (
                ATTENTION,
                LayerSpec(LayerKind.SLIDING, 4, 8, 8, ROPE, window=16),
                LayerSpec(LayerKind.MLA, 1, 32, 8),
                LayerSpec(LayerKind.STATE, 0, 0, 0),
                LayerSpec(LayerKind.ATTENTION, 1, 8, 8),
            ),
        )
        groups = (
            Group((0, 1), (1, 2), ("k", "v")),
            Group((1, 2), (1, 2), ("k",), (24, 40)),
            Group((1, 2), (2, 3), ("k",), (24, 40)),
            Group((1, 2), (1, 3), ("v",), (24, 40)),
            Group((2, 3), (0, 1), ("latent", "rope"), None, 1),
            Group((3, 4), (0, 1), (), None, 1),
            Group((4, 5), (1, 1), ("k", "v")),
        )
        codecs = (CodecEntry("channel", {}), CodecEntry("lossless", {}))
        header = tiny(spec=spec, groups=groups, head_range=(1, 3), codecs=codecs)
        reader = ObjectReader(write_object(header, [[b"x"]] * 6 + [[]]))
        assert reader.header == header

    def test_equal_headers_have_equal_bytes(self):
        header = replace(FULL, codecs=(CodecEntry("klt", {"b": 1, "a": 2}),))
        other = replace(FULL, codecs=(CodecEntry("klt", {"a": 2, "b": 1}),))
        assert write_object(header, random_segments(header)) == write_object(other, random_segments(header))

    def test_segments_may_be_any_contiguous_bytes(self):
        header = tiny()
        raw = write_object(header, [[bytearray(b"abc")], [memoryview(b"de")], [b""], [b"f"]])
        assert raw == write_object(header, [[b"abc"], [b"de"], [b""], [b"f"]])


class TestLayout:
    def test_prelude_by_the_table(self):
        raw = write_object(FULL, random_segments(FULL))
        magic, version, must, may, levels, shift, head, tokens, index, groups, total = struct.unpack_from(
            "<8sHHHBBIIIIQ", raw
        )
        header_crc, tokens_crc, index_crc, reserved, crc = struct.unpack_from("<IIIQI", raw, 40)
        assert magic == b"\x89KVC\r\n\x1a\n"
        assert (version, must, may, levels, groups, total, reserved) == (1, 0, 0, 3, 4, len(raw), 0)
        assert shift in (2, 4)
        assert index == 8 * levels * groups
        assert crc == crc32c(raw[:60])
        at = 64
        for size, want in ((head, header_crc), (tokens, tokens_crc), (index, index_crc)):
            assert crc32c(raw[at : at + size]) == want
            at += size
        assert raw[64 : 64 + head] == header_json(FULL)
        assert ObjectReader(raw).head_size == -(-at // 16) * 16

    def test_crc32c_is_castagnoli(self):
        assert crc32c(b"123456789") == crc32c(memoryview(b"123456789")) == crc32c(bytearray(b"123456789")) == 0xE3069283
        assert crc32c(b"6789", crc32c(b"12345")) == 0xE3069283
        assert crc32c(memoryview(b"")) == crc32c(b"") == 0

    @pytest.mark.parametrize(("size", "unit"), [(20_000, 16), (50, 4)])
    def test_segments_are_aligned_and_level_major(self, size, unit):
        header = tiny(levels=3)
        reader = ObjectReader(write_object(header, random_segments(header, sizes=(size, size + 1, size + 3))))
        assert 1 << reader.shift == unit
        order = [reader.segment_range(q, g) for q in range(3) for g in range(4)]
        assert all(where.start % unit == 0 for where in order)
        assert all(0 <= b.start - a.stop < unit for a, b in pairwise(order))
        assert order[0].start == reader.head_size

    def test_small_objects_stay_small(self):
        """16 tokens of SmolLM2 at 2 bits an element, each layer's K and V apart: segments of about 768 bytes."""
        header = tiny(layers=30)
        segments = random_segments(header, sizes=(761, 768, 777))
        raw = write_object(header, segments)
        reader = ObjectReader(raw)
        padding = sum(p.stop - p.start for p in reader.paddings())
        assert padding + reader.parts["index"] < 0.02 * sum(len(s) for group in segments for s in group)

    def test_a_first_read_holds_the_head_of_a_large_model(self):
        """80 layers, 8 ranks' heads apart, four levels: 1280 groups, 256 token ids."""
        rope = Rope(tuple(float(np.float32(500000.0 ** (-i / 64))) for i in range(64)), rotary_dim=128)
        spec = KVSpec("llama", "bfloat16", (LayerSpec(LayerKind.ATTENTION, 8, 128, 128, rope),) * 80)
        groups = tuple(
            Group((i, i + 4), (h, h + 1), (name,)) for i in range(0, 80, 4) for name in ("k", "v") for h in range(8)
        )
        header = with_ids(
            tiny(levels=4, spec=spec, groups=groups, head_range=(0, 8), tokens=256, positions=((0, 256),)),
            tuple(int(i) for i in np.random.default_rng(0).integers(0, 128256, 256)),
        )
        head = ObjectReader.size_of_head(write_object(header, [[b""]] * len(groups)))
        assert head <= HEAD_READ


class TestGroups:
    @pytest.mark.parametrize(
        "order",
        [
            [(i, n, h) for i in range(6) for n in "kv" for h in range(2)],
            [(i, n, h) for n in "kv" for i in range(6) for h in range(2)],
            [(i, n, h) for h in range(2) for n in "vk" for i in (3, 1, 2, 0, 5, 4)],
        ],
        ids=["layers first", "names first", "shuffled"],
    )
    def test_any_order_survives(self, order):
        groups = tuple(Group((i, i + 1), (h, h + 1), (n,)) for i, n, h in order)
        header = tiny(layers=6, groups=groups)
        assert parse_header(header_json(header), 1, len(groups)).groups == groups

    def test_equal_parts_are_written_once(self):
        assert len(header_json(tiny(layers=60))) - len(header_json(tiny(layers=2))) < 8

    def test_elements(self):
        header = tiny(groups=(Group((0, 2), (0, 1), ("k", "v"), (8, 40)), Group((0, 2), (1, 2), ("k", "v"), (8, 40))))
        assert header.group_elements(0) == 32 * 1 * (8 + 8) * 2


class TestRefusals:
    """A writer refuses what a reader would refuse: each header contradicts itself in one way."""

    HEADERS = {  # noqa: RUF012
        "no groups": {"groups": ()},
        "a layer in no group": {"groups": tiny().groups[:2]},
        "a head in no group": {"groups": (*tiny().groups[:3], Group((1, 2), (0, 1), ("v",)))},
        "a tensor in two groups": {"groups": (*tiny().groups, Group((1, 2), (1, 2), ("v",)))},
        "layers beyond the spec": {"groups": (*tiny().groups[:2], Group((1, 3), (0, 2), ("k", "v")))},
        "heads beyond the spec": {"groups": (*tiny().groups[:3], Group((1, 2), (0, 3), ("v",)))},
        "heads beyond the object's": {"head_range": (0, 1)},
        "an empty group of heads that the layer doesn't hold": {
            "spec": KVSpec("t", "bfloat16", (ATTENTION, replace(ATTENTION, kv_heads=1))),
            "head_range": (1, 2),
            "groups": (Group((0, 1), (1, 2), ("k", "v")), Group((1, 2), (0, 0), ("k", "v"))),
        },
        "no heads": {"head_range": (1, 1), "groups": tuple(replace(g, heads=(1, 1)) for g in tiny().groups)},
        "a name of another kind": {"groups": (*tiny().groups[:3], Group((1, 2), (0, 2), ("latent",)))},
        "a name too many": {"groups": (*tiny().groups[:3], Group((1, 2), (0, 2), ("v", "w")))},
        "no names": {"groups": (*tiny().groups[:3], Group((1, 2), (0, 2), ()))},
        "a name twice": {"groups": (*tiny().groups[:3], Group((1, 2), (0, 2), ("v", "v")))},
        "tokens beyond the chunk": {"groups": tuple(replace(g, tokens=(0, 41)) for g in tiny().groups)},
        "tokens backwards": {"groups": tuple(replace(g, tokens=(9, 8)) for g in tiny().groups)},
        "k and v of other tokens": {"groups": (replace(tiny().groups[0], tokens=(8, 40)), *tiny().groups[1:])},
        "an unknown codec": {"groups": (replace(tiny().groups[0], codec=1), *tiny().groups[1:])},
        "a codec without a name": {"codecs": (CodecEntry("", {}),)},
        "no codec": {"codecs": ()},
        "a config with NaN": {"codecs": (CodecEntry("channel", {"x": float("nan")}),)},
        "a config with bytes": {"codecs": (CodecEntry("channel", {"x": b""}),)},
        "a short fingerprint": {"fingerprint": bytes(31)},
        "a short profile hash": {"profile": "ab"},
        "a profile hash in capitals": {"profile": "AB" * 32},
        "positions of fewer tokens": {"positions": ((0, 39),)},
        "an empty run": {"positions": ((0, 40), (50, 0))},
        "a negative position": {"positions": ((-1, 40),)},
        "no tokens": {"num_tokens": 0, "positions": ()},
        "a negative loss": {"losses": (LevelLoss(0, -1.0),)},
        "an infinite loss": {"losses": (LevelLoss(0, float("inf")),)},
        "levels out of order": {"losses": (LevelLoss(1), LevelLoss(0))},
        "no level": {"losses": ()},
        "a level beyond a byte": {"losses": (LevelLoss(256),)},
        "three ids before": {"previous_ids": (1, 2, 3)},
        "a negative id before": {"previous_ids": (-1,)},
        "ids without a digest": {"token_ids": tuple(range(40))},
        "ids of another digest": {"token_ids": tuple(range(40)), "token_digest": bytes(32)},
        "fewer ids than tokens": {"token_ids": tuple(range(39)), "token_digest": token_digest(tuple(range(39)))},
        "more rotary dims than dims": {"spec": KVSpec("t", "bfloat16", (replace(ATTENTION, k_dim=2),) * 2)},
    }

    @pytest.mark.parametrize("case", HEADERS)
    def test_contradictions(self, case):
        header = tiny(**self.HEADERS[case])
        with pytest.raises(InputError):
            write_object(header, [[b"x"] for _ in header.groups])

    @pytest.mark.parametrize("levels", [17, 300])
    def test_too_many_levels(self, levels):
        header = tiny(losses=tuple(LevelLoss(q) for q in range(levels)))
        with pytest.raises(InputError, match="16"):
            write_object(header, [[b"x"]] * 4)

    def test_a_header_of_other_types(self):
        with pytest.raises(InputError, match="survive"):
            write_object(tiny(positions=[[0, 40]]), [[b"x"]] * 4)

    def test_a_segment_beyond_32_bits(self):
        with mmap.mmap(-1, 1 << 32) as untouched, pytest.raises(CapacityError, match="smaller chunks"):
            write_object(tiny(), [[untouched], [b"x"], [b"x"], [b"x"]])

    def test_segments_of_another_shape(self):
        with pytest.raises(InputError, match="4 groups"):
            write_object(tiny(), [[b"x"]] * 3)
        with pytest.raises(InputError, match="at most 1 level"):
            write_object(tiny(), [[b"x", b"y"]] * 4)

    def test_ids_beyond_32_bits(self):
        ids = (1 << 32, *range(39))
        with pytest.raises(InputError, match="token ids"):
            write_object(tiny(token_ids=ids, token_digest=bytes(32)), [[b"x"]] * 4)


class TestRanges:
    def reader(self, levels: int = 3) -> tuple[bytes, ObjectReader]:
        header = tiny(levels=levels)
        raw = write_object(header, random_segments(header, sizes=(30, 40, 50)))
        return raw, ObjectReader(raw)

    def test_a_level_prefix_is_one_range(self):
        raw, reader = self.reader()
        for level in range(3):
            (only,) = reader.ranges(level)
            assert only == ByteRange(reader.head_size, reader.level_size(level))
        assert reader.level_size(2) == reader.total_size == len(raw)

    def test_ranges_of_groups_hold_just_these(self):
        raw, reader = self.reader()
        found = reader.ranges(1, [1, 2])
        assert len(found) == 2
        part = ObjectReader(raw[: reader.head_size])
        for where in found:
            part.add(where.start, raw[where.start : where.stop])
        for level in (0, 1):
            for group in (1, 2):
                assert part.segment(level, group) == reader.segment(level, group)
        assert part.complete_level([1, 2]) == 1
        assert part.complete_level() is None
        with pytest.raises(Truncated) as missing:
            part.segments(2, [1, 2])
        assert missing.value.highest_complete_level == 1
        with pytest.raises(Truncated) as missing:
            part.segment(0, 0)
        assert missing.value.highest_complete_level is None

    @settings(max_examples=50, deadline=None)
    @given(st.data())
    def test_bytes_in_any_pieces_and_order(self, data):
        raw, whole = self.reader()
        cuts = sorted(
            {whole.head_size, *data.draw(st.lists(st.integers(whole.head_size, len(raw)), max_size=8)), len(raw)}
        )
        pieces = data.draw(st.permutations(list(pairwise(cuts))))
        reader = ObjectReader(raw[: whole.head_size])
        for start, stop in pieces:
            overlap = data.draw(st.integers(0, 20))
            reader.add(max(0, start - overlap), raw[max(0, start - overlap) : stop])
        for q in range(3):
            for g in range(4):
                assert reader.segment(q, g) == whole.segment(q, g)

    def test_segments_are_views_of_what_was_handed_over(self):
        raw, reader = self.reader()
        assert reader.segment(0, 1).obj is raw

    def test_truncation_names_the_highest_complete_level(self):
        raw, reader = self.reader()
        for size in range(reader.head_size, len(raw)):
            part = ObjectReader(raw[:size])
            want = max((q for q in range(3) if self.last(reader, q) <= size), default=None)
            assert part.complete_level() == want
            if want != 2:
                with pytest.raises(Truncated) as missing:
                    part.segments(2)
                assert missing.value.highest_complete_level == want

    @staticmethod
    def last(reader: ObjectReader, level: int) -> int:
        return reader.segment_range(level, 3).stop

    def test_damage_is_found_once_read_and_mended_by_fetching_again(self):
        raw, whole = self.reader()
        where = whole.segment_range(1, 2)
        bad = bytearray(raw)
        bad[where.start] ^= 1
        reader = ObjectReader(bytes(bad))
        assert reader.segment(0, 2) == whole.segment(0, 2)
        with pytest.raises(ChecksumError):
            reader.segment(1, 2)
        assert reader.complete_level() == 0
        reader.add(where.start, raw[where.start : where.stop])
        assert reader.segment(1, 2) == whole.segment(1, 2)
        assert reader.complete_level() == 2

    def test_size_of_head_from_the_first_bytes(self):
        raw, reader = self.reader()
        assert ObjectReader.size_of_head(raw[:64]) == reader.head_size
        with pytest.raises(Truncated) as short:
            ObjectReader(raw[:100])
        assert short.value.details["need"] == reader.head_size

    def test_outside_the_object(self):
        raw, reader = self.reader()
        with pytest.raises(LevelError):
            reader.segment(3, 0)
        with pytest.raises(LevelError):
            reader.ranges(-1)
        with pytest.raises(LevelError):
            reader.level_size(3)
        with pytest.raises(RangeError):
            reader.segment(0, 4)
        with pytest.raises(RangeError):
            reader.ranges(0, [-1])
        with pytest.raises(FormatError):
            reader.add(len(raw) - 1, b"xy")
        with pytest.raises(FormatError):
            reader.add(-1, b"xy")
        with pytest.raises(FormatError):
            ObjectReader(raw + b"\0")
        with pytest.raises(InputError):
            ObjectReader("text")


class TestTrim:
    @pytest.mark.parametrize("header", [tiny(levels=3), FULL], ids=["tiny", "full"])
    def test_a_trimmed_object_is_an_object(self, header):
        segments = random_segments(header)
        raw = write_object(header, segments)
        for level in range(3):
            cut = trim(raw, level)
            verify(cut)
            reader = ObjectReader(cut)
            assert reader.num_levels == level + 1
            assert reader.header == replace(header, losses=header.losses[: level + 1])
            for g, group in enumerate(segments):
                assert [bytes(reader.segment(q, g)) for q in range(level + 1)] == group[: level + 1]
        assert trim(raw, 2) == raw

    def test_trimming_needs_no_more_than_the_level(self):
        header = tiny(levels=3)
        raw = write_object(header, random_segments(header))
        size = ObjectReader(raw).level_size(0)
        assert trim(raw[:size], 0) == trim(raw, 0)
        with pytest.raises(Truncated):
            trim(raw[: size - 16], 0)

    def test_no_such_level(self):
        raw = write_object(tiny(), [[b"x"]] * 4)
        for level in (1, -1):
            with pytest.raises(LevelError):
                trim(raw, level)


class TestTokenBlock:
    @settings(max_examples=100, deadline=None)
    @given(st.integers(0, 32).flatmap(lambda bits: st.lists(st.integers(0, (1 << bits) - 1), min_size=1, max_size=300)))
    def test_ids_come_back(self, ids):
        assert unpack(pack(ids), len(ids)) == tuple(ids)

    def test_prompts_shrink(self):
        ids = tuple(int(i) for i in np.random.default_rng(1).zipf(1.3, 256) % 49152)
        assert len(pack(ids)) < 2 * len(ids)


class TestDescribe:
    def test_it_adds_up_and_is_json(self):
        import json

        segments = random_segments(FULL)
        raw = write_object(FULL, segments)
        shown = describe(ObjectReader(raw[: ObjectReader.size_of_head(raw)]))
        json.dumps(shown, allow_nan=False)
        assert shown["bytes"] == len(raw) == shown["levels"][-1]["bytes_to_read"]
        assert shown["elements"] == 2 * 2 * 40 * 2 * 8
        assert shown["levels"][2]["bits_per_element"] == 8 * len(raw) / shown["elements"]
        assert sum(level["segment_bytes"] for level in shown["levels"]) == shown["parts"]["segments"]
        assert [group["bytes"] for group in shown["groups"]] == [[len(s) for s in group] for group in segments]
        parts = shown["parts"]
        assert shown["head_bytes"] + parts["segments"] + parts["padding"] == len(raw)
        assert "1039" not in json.dumps(shown)

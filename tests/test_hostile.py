"""Objects from a store that one doesn't trust: a typed error or the exact bytes, never a crash, a hang or a big bill.

`forge` writes objects with good checksums around any contents, as an attacker would.
"""

from __future__ import annotations

import copy
import importlib.util
import json
import random
import struct
import tracemalloc
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import zstandard
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cachegen.codec import Codec
from cachegen.codecs.base import Group, LevelLoss
from cachegen.container import CodecEntry, ObjectHeader, ObjectReader, trim, verify, write_object
from cachegen.errors import (
    ChecksumError,
    FormatError,
    LimitExceeded,
    NotAnObject,
    ProfileMismatch,
    ProfileMissing,
    Truncated,
    UnknownCodec,
    VersionError,
)
from cachegen.header import header_json
from cachegen.keys import token_digest
from cachegen.kv import KVSpec, LayerKind, LayerSpec
from cachegen.native import crc32c
from cachegen.rope import Rope
from cachegen.token_block import pack

IDS = tuple(range(300, 310))
LAYER = LayerSpec(LayerKind.ATTENTION, 2, 4, 4, Rope((1.0, 0.25), rotary_dim=4))
HEADER = ObjectHeader(
    codecs=(CodecEntry("channel", {"step": 0.5}),),
    fingerprint=bytes(range(32)),
    profile="cd" * 32,
    spec=KVSpec("tiny", "bfloat16", (LAYER, LAYER)),
    num_tokens=10,
    positions=((0, 10),),
    head_range=(0, 2),
    groups=tuple(Group((i, i + 1), (0, 2), (name,)) for i in range(2) for name in ("k", "v")),
    losses=(LevelLoss(0, 0.5), LevelLoss(1, 0.25)),
    token_digest=token_digest(IDS),
    token_ids=IDS,
    previous_ids=(7, 8),
)
SEGMENTS = [[b"abcde", b"fg"], [b"hijk", b""], [b"", b"lmnopqr"], [b"s", b"tuv"]]
OBJECT = write_object(HEADER, SEGMENTS)
JSON = json.loads(header_json(HEADER))
ENTRIES = b"".join(
    struct.pack("<II", len(SEGMENTS[g][q]), crc32c(SEGMENTS[g][q])) for q in range(2) for g in range(len(SEGMENTS))
)
PAYLOAD = b"".join(SEGMENTS[g][q] + bytes(-len(SEGMENTS[g][q]) % 4) for q in range(2) for g in range(len(SEGMENTS)))


def forge(
    text: Any = JSON, block: bytes = pack(IDS), entries: bytes = ENTRIES, payload: bytes = PAYLOAD, **lies: int
) -> bytes:
    """An object with good checksums; `lies` replace fields of the prelude."""
    text = text if isinstance(text, bytes) else json.dumps(text, separators=(",", ":")).encode()
    body = text + block + entries
    body += bytes(-(64 + len(body)) % 16)
    fields = {
        "version": 1,
        "must": 0,
        "may": 0,
        "levels": 2,
        "shift": 2,
        "header": len(text),
        "tokens": len(block),
        "index": len(entries),
        "groups": len(SEGMENTS),
        "total": 64 + len(body) + len(payload),
        "header_crc": crc32c(text),
        "tokens_crc": crc32c(block),
        "index_crc": crc32c(entries),
        "reserved": 0,
    } | lies
    prelude = struct.pack("<8sHHHBBIIIIQIIIQ", b"\x89KVC\r\n\x1a\n", *fields.values())
    return prelude + struct.pack("<I", crc32c(prelude)) + body + payload


def edited(path: list[Any], value: Any) -> dict[str, Any]:
    """The header's JSON with one value replaced."""
    data = copy.deepcopy(JSON)
    at = data
    for key in path[:-1]:
        at = at[key]
    at[path[-1]] = value
    return data


def read_all(raw: bytes) -> list[list[bytes]]:
    reader = ObjectReader(raw)
    return [[bytes(reader.segment(q, g)) for q in range(reader.num_levels)] for g in range(len(reader.header.groups))]


def test_forge_writes_what_write_object_writes():
    assert forge(header_json(HEADER)) == OBJECT


class TestDamage:
    def test_every_flipped_bit_is_found(self):
        for at in range(len(OBJECT)):
            for bit in range(8):
                bad = bytearray(OBJECT)
                bad[at] ^= 1 << bit
                with pytest.raises(FormatError):
                    verify(bad)

    def test_reading_through_any_flipped_byte_gives_an_error_or_the_exact_bytes(self):
        exact = 0
        for at in range(len(OBJECT)):
            bad = bytearray(OBJECT)
            bad[at] ^= 0xFF
            try:
                assert read_all(bytes(bad)) == SEGMENTS
                exact += 1
            except FormatError:
                pass
        padding = sum(p.stop - p.start for p in ObjectReader(OBJECT).paddings())
        assert exact == padding  # only padding may be damaged unnoticed, and verify() finds that too

    def test_every_truncation_is_found(self):
        end = ObjectReader(OBJECT).segment_range(1, 3).stop
        for size in range(len(OBJECT)):
            with pytest.raises(Truncated):
                verify(OBJECT[:size])
            if size < end:
                with pytest.raises(Truncated):
                    read_all(OBJECT[:size])
            else:
                assert read_all(OBJECT[:size]) == SEGMENTS

    def test_best_effort_yields_whole_lower_levels(self):
        reader = ObjectReader(OBJECT)
        for at in range(reader.head_size, len(OBJECT)):
            bad = bytearray(OBJECT)
            bad[at] ^= 1
            found = ObjectReader(bytes(bad))
            level = found.complete_level()
            if level is not None:
                for part, want in zip(found.segments(level), SEGMENTS, strict=True):
                    assert [bytes(s) for s in part.segments] == want[: level + 1]
            assert level == 1 or at < reader.level_size(1)

    def test_damage_is_told_from_a_newer_version(self):
        bad = bytearray(OBJECT)
        bad[8] = 2
        with pytest.raises(ChecksumError):
            ObjectReader(bytes(bad))
        with pytest.raises(VersionError, match="version 2"):
            ObjectReader(forge(version=2))

    @settings(max_examples=200, deadline=None)
    @given(st.data())
    def test_several_damages_at_once(self, data):
        bad = bytearray(OBJECT)
        for _ in range(data.draw(st.integers(1, 6))):
            at = data.draw(st.integers(0, len(bad)))
            cut = data.draw(st.integers(0, 20))
            bad[at : at + cut] = data.draw(st.binary(max_size=20))
        with suppress(FormatError):
            assert read_all(bytes(bad)) == SEGMENTS


class TestForeign:
    @pytest.mark.parametrize(
        "raw",
        [
            b"\x89PNG\r\n\x1a\n" + bytes(100),
            b"PK\x03\x04" + bytes(100),
            b"GGUF\x03\0\0\0" + bytes(100),
            b'\x40\0\0\0\0\0\0\0{"__metadata__":{}}' + bytes(100),
            b"{}",
            b"x",
            bytes(1000),
        ],
        ids=["png", "zip", "gguf", "safetensors", "json", "one byte", "zeros"],
    )
    def test_other_formats(self, raw):
        for read in (ObjectReader, verify, ObjectReader.size_of_head, lambda data: trim(data, 0)):
            with pytest.raises(NotAnObject):
                read(raw)

    @pytest.mark.parametrize(
        "damage",
        [
            lambda raw: raw.replace(b"\r\n", b"\n"),
            lambda raw: raw.replace(b"\n", b"\r\n"),
            lambda raw: raw.replace(b"\n", b"\r"),
            lambda raw: bytes(byte & 127 for byte in raw),
            lambda raw: raw.decode("latin1").encode("utf-8"),
        ],
        ids=["crlf to lf", "lf to crlf", "lf to cr", "7 bits", "utf-8"],
    )
    def test_text_mode_transfers(self, damage):
        with pytest.raises(NotAnObject):
            ObjectReader(damage(OBJECT))

    def test_nothing(self):
        with pytest.raises(Truncated):
            ObjectReader(b"")


class TestVersions:
    def test_a_later_version(self):
        for version in (0, 2, 65535):
            with pytest.raises(VersionError):
                ObjectReader(forge(version=version))

    @pytest.mark.parametrize("bit", range(16))
    def test_flags(self, bit):
        with pytest.raises(VersionError):
            ObjectReader(forge(must=1 << bit))
        assert read_all(forge(may=1 << bit)) == SEGMENTS

    def test_keys_that_must_be_understood(self):
        assert ObjectReader(forge(JSON | {"colour": [1, {"a": 2}]})).header == HEADER
        assert ObjectReader(forge(JSON | {"must": ["tokens", "spec"]})).header == HEADER
        with pytest.raises(VersionError, match="colour"):
            ObjectReader(forge(JSON | {"colour": 1, "must": ["colour"]}))

    @pytest.mark.parametrize("must", [None, 1, "spec", [1], [[1]], [{"a": 1}], [1, "x"], ["spec", "spec"], ["a"] * 17])
    def test_must_lists_names(self, must):
        with pytest.raises(FormatError):
            ObjectReader(forge(JSON | {"must": must}))

    def test_reserved_bytes(self):
        with pytest.raises(FormatError):
            ObjectReader(forge(reserved=1))


class TestSizes:
    @pytest.mark.parametrize(
        "lies",
        [
            {"header": 2**32 - 1},
            {"header": (1 << 20) + 1},
            {"header": 0},
            {"tokens": 2**32 - 1},
            {"index": 2**32 - 1},
            {"groups": 0},
            {"groups": 2**32 - 1},
            {"groups": 2**29 + 4},
            {"groups": 65537, "index": 65537 * 16},
            {"levels": 0},
            {"levels": 17},
            {"levels": 255, "index": 255 * 4 * 8},
            {"levels": 1},
            {"shift": 5},
            {"shift": 255},
            {"total": 0},
            {"total": 2**64 - 1},
            {"total": len(OBJECT) - 1},
            {"total": len(OBJECT) + 1},
            {"total": len(OBJECT) + 16},
        ],
        ids=str,
    )
    def test_sizes_that_lie(self, lies):
        raw = forge(**lies)
        tracemalloc.start()
        try:
            with pytest.raises(FormatError):
                ObjectReader(raw)
            assert tracemalloc.get_traced_memory()[1] < 1 << 20
        finally:
            tracemalloc.stop()

    @pytest.mark.parametrize(
        "lies",
        [
            {"header": (1 << 20) + 1},
            {"tokens": 1 << 24},
            {"groups": 65537},
            {"levels": 17},
            {"levels": 0},
            {"shift": 5},
            {"total": (1 << 44) + 16},
        ],
        ids=str,
    )
    def test_sizes_beyond_the_limits(self, lies):
        with pytest.raises(LimitExceeded):
            ObjectReader(forge(**lies))

    @pytest.mark.parametrize(
        "entries", [ENTRIES[:-1], ENTRIES[:-8], ENTRIES + bytes(3), ENTRIES + bytes(8), b""], ids=len
    )
    def test_an_index_of_other_length(self, entries):
        with pytest.raises(FormatError, match="8 bytes a level and group"):
            ObjectReader(forge(entries=entries))

    def test_segments_longer_than_the_object(self):
        huge = struct.pack("<II", 2**32 - 1, 0) * 8
        with pytest.raises(FormatError, match="index"):
            ObjectReader(forge(entries=huge))
        reader = ObjectReader(forge(entries=huge, total=len(OBJECT) - len(PAYLOAD) + 8 * 2**32))
        assert reader.complete_level() is None
        with pytest.raises(Truncated):
            reader.segments(1)

    def test_the_largest_index_is_read(self):
        groups, levels = 65536, 15
        raw = forge(b"{}", b"", bytes(groups * levels * 8), b"", groups=groups, levels=levels)
        with pytest.raises(FormatError, match="expected fields"):
            ObjectReader(raw)

    def test_chunks_too_large_to_decode(self):
        wide = edited(["spec", "layers", 0, "k_dim"], 65536)
        wide["spec"]["layers"][0]["v_dim"] = 65536
        wide["spec"]["layers"][0]["heads"] = 1024
        wide["tokens"] = 1 << 20
        with pytest.raises(LimitExceeded):
            ObjectReader(forge(wide))

    @pytest.mark.parametrize("name", ["heads", "k_dim", "v_dim"])
    @pytest.mark.parametrize("value", [2**31, 2**62, 10**6])
    def test_huge_dims(self, name, value):
        with pytest.raises(FormatError):
            ObjectReader(forge(edited(["spec", "layers", 0, name], value)))


class TestJson:
    @pytest.mark.parametrize(
        "text",
        [
            b"[" * 100_000 + b"]" * 100_000,
            b'{"a":' * 100_000 + b"1" + b"}" * 100_000,
            b'{"a":' + b"[" * 20 + b"]" * 20 + b"}",
            b'{"tokens":1,"tokens":2}',
            b'{"a":NaN}',
            b'{"a":-Infinity}',
            b'{"a":1e999}',
            b'{"a":' + b"9" * 500_000 + b"}",
            b'{"a":9223372036854775808}',
            b'{"a":"\\ud800"}',
            b'{"a":["\\udfff"]}',
            b'{"\\ud800":1}',
            b'{"a":"\xff"}',
            b"\xef\xbb\xbf{}",
            b"\xff\xfe{\0}\0",
            b"[]",
            b'"text"',
            b"null",
            b"{} {}",
            b"{}\0",
            b"{'a':1}",
            b'{"a":1,}',
            b'{"a":"' + b'\\"' * 200_000 + b"}",
            b"{}",
        ],
        ids=range(24),
    )
    def test_what_is_no_header(self, text):
        with pytest.raises(FormatError):
            ObjectReader(forge(text))

    @pytest.mark.parametrize("key", sorted(set(JSON) - {"digest", "profile", "previous"}))
    def test_every_field_is_needed(self, key):
        with pytest.raises(FormatError):
            ObjectReader(forge({k: v for k, v in JSON.items() if k != key}))

    def test_ids_need_their_digest(self):
        with pytest.raises(FormatError, match="digest"):
            ObjectReader(forge({k: v for k, v in JSON.items() if k != "digest"}))

    NONSENSE = (None, True, -1, 1.5, 2**62, "x", "", [], {}, [[]], [1], [0, 2**40], [-1, 1], {"x": 1}, [{}], "é" * 100)

    @staticmethod
    def paths(data: Any, at: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
        """Paths of every value inside a JSON value."""
        keys = data.items() if isinstance(data, dict) else enumerate(data) if isinstance(data, list) else ()
        found = [at] if at else []
        for key, value in keys:
            found += TestJson.paths(value, (*at, key))
        return found

    def test_nonsense_in_every_place(self):
        for path in self.paths(JSON):
            for value in self.NONSENSE:
                raw = forge(edited(list(path), value))
                try:
                    reader = ObjectReader(raw)
                except FormatError:
                    continue
                assert write_object(reader.header, SEGMENTS)  # whatever is accepted is consistent

    @settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
    @given(st.data())
    def test_random_edits(self, data):
        value = st.recursive(
            st.none()
            | st.booleans()
            | st.integers(-4, 4)
            | st.integers()
            | st.floats(allow_nan=False)
            | st.text(max_size=4),
            lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=2),
            max_leaves=5,
        )
        text: Any = copy.deepcopy(JSON)
        for _ in range(data.draw(st.integers(1, 3))):
            path = data.draw(st.sampled_from(self.paths(text)))
            at = text
            for key in path[:-1]:
                at = at[key]
            if data.draw(st.booleans()):
                at[path[-1]] = data.draw(value)
            elif isinstance(at, dict):
                del at[path[-1]]
            else:
                at.insert(path[-1], data.draw(st.sampled_from(at)))
            if not self.paths(text):
                break
        try:
            raw = forge(text)
        except UnicodeEncodeError:
            return
        try:
            reader = ObjectReader(raw)
        except FormatError:
            return
        assert write_object(reader.header, SEGMENTS)


class TestSpec:
    """What `KVSpec.from_json` would quietly convert or ignore is refused."""

    @pytest.mark.parametrize(
        ("path", "value"),
        [
            (["colour"], 1),
            (["layers", 0, "colour"], 1),
            (["layers", 0, "rope", "colour"], 1),
            (["layers", 0, "heads"], "2"),
            (["layers", 0, "heads"], 2.5),
            (["layers", 0, "count"], 2.5),
            (["layers", 0, "count"], True),
            (["layers", 0, "window"], None),
            (["model_type"], 5),
            (["dtype"], "int8"),
            (["layers", 0, "kind"], "other"),
            (["layers"], []),
        ],
        ids=str,
    )
    def test_other_forms(self, path, value):
        with pytest.raises(FormatError):
            ObjectReader(forge(edited(["spec", *path], value)))

    def test_true_is_not_one(self):
        text = edited(["spec", "layers", 0, "count"], 1)
        text["groups"][0]["layers"][1] = 1
        lone = ENTRIES[:16] + ENTRIES[32:48]
        assert ObjectReader(forge(text, entries=lone, payload=PAYLOAD[:16], groups=2)).header.spec.num_layers == 1
        text["spec"]["layers"][0]["count"] = True
        with pytest.raises(FormatError, match="spec"):
            ObjectReader(forge(text, entries=lone, payload=PAYLOAD[:16], groups=2))

    def test_neighbours_that_are_alike(self):
        layer = JSON["spec"]["layers"][0]
        with pytest.raises(FormatError, match="spec"):
            ObjectReader(forge(edited(["spec", "layers"], [layer | {"count": 1}] * 2)))


class TestGroupBombs:
    """Few bytes of runs that stand for very many groups, or take very long to check."""

    def runs(self, layers: list[int], parts: list[dict[str, Any]]) -> dict[str, Any]:
        return {"codec": 0, "layers": layers, "parts": parts}

    def test_more_groups_than_the_prelude_says(self):
        part = {"heads": [0, 2], "names": ["k"]}
        text = edited(["groups"], [self.runs([0, 2, 1], [part] * 4)] * 4)
        with pytest.raises(FormatError, match="groups"):
            ObjectReader(forge(text))

    def test_few_bytes_that_stand_for_half_a_million_groups(self):
        text = edited(["spec", "layers", 0, "count"], 1024)
        text["groups"] = [self.runs([0, 1024, 1], [{"heads": [0, 0], "names": ["k"]}] * 500)]
        raw = forge(text, entries=bytes(8 * 2 * 600), payload=b"", groups=600)
        tracemalloc.start()
        try:
            with pytest.raises(FormatError, match="groups"):
                ObjectReader(raw)
            assert tracemalloc.get_traced_memory()[1] < 8 << 20
        finally:
            tracemalloc.stop()

    @pytest.mark.parametrize(
        "layers", [[0, 2, 0], [0, 2, 3], [1, 1, 1], [2, 0, 1], [0, 0, 0], [0, 2], [0, 3, 1]], ids=str
    )
    def test_layer_ranges_that_are_none(self, layers):
        part = [{"heads": [0, 2], "names": ["k"]}, {"heads": [0, 2], "names": ["v"]}]
        assert ObjectReader(forge(edited(["groups"], [self.runs([0, 2, 1], part)]))).header == HEADER
        with pytest.raises(FormatError, match="layers"):
            ObjectReader(forge(edited(["groups"], [self.runs(layers, part)])))

    def test_fewer_groups_than_the_prelude_says(self):
        raw = forge(entries=ENTRIES + struct.pack("<II", 0, 0) * 2, groups=5)
        with pytest.raises(FormatError, match="groups"):
            ObjectReader(raw)

    def test_many_overlapping_groups_of_many_layers(self):
        text = edited(["spec", "layers", 0, "count"], 1024)
        parts = [{"heads": [0, 2], "names": ["k", "v"]}] * 15000
        text["groups"] = [self.runs([0, 1024, 1024], parts)]
        raw = forge(text, entries=bytes(8 * 2 * 15000), payload=b"", groups=15000)
        with pytest.raises(FormatError, match="two groups"):
            ObjectReader(raw)

    def test_many_empty_groups(self):
        parts = [{"heads": [0, 0], "names": ["k", "v"]}] * 15000
        text = edited(["groups"], [self.runs([0, 2, 2], parts)])
        with pytest.raises(FormatError, match="two groups"):
            ObjectReader(forge(text, entries=bytes(8 * 2 * 15000), payload=b"", groups=15000))


class TestTokenBombs:
    def block(self, body: bytes, width: int = 2, coding: int = 1) -> bytes:
        return bytes([width, coding, 0, 0]) + body

    @pytest.mark.parametrize(
        "block",
        [
            b"\x02",
            b"\x02\x01\0",
            b"\0\0\0\0",
            b"\x05\0\0\0" + bytes(50),
            b"\x02\x02\0\0" + bytes(20),
            b"\x02\0\x01\0" + bytes(20),
            b"\x02\0\0\x01" + bytes(20),
            b"\x02\0\0\0" + bytes(19),
            b"\x02\0\0\0" + bytes(21),
            b"\x02\x01\0\0",
            b"\x02\x01\0\0not zstandard",
        ],
        ids=range(11),
    )
    def test_malformed(self, block):
        with pytest.raises(FormatError):
            ObjectReader(forge(block=block))

    def test_a_bomb_is_not_expanded(self):
        bomb = zstandard.ZstdCompressor(level=3).compress(bytes(256 << 20))
        assert len(bomb) < 1 << 16
        raw = forge(block=self.block(bomb))
        tracemalloc.start()
        try:
            with pytest.raises(LimitExceeded):
                ObjectReader(raw)
            assert tracemalloc.get_traced_memory()[1] < 4 << 20
        finally:
            tracemalloc.stop()

    def test_a_frame_that_states_no_size(self):
        frame = zstandard.ZstdCompressor(write_content_size=False).compress(bytes(1 << 20))
        with pytest.raises(LimitExceeded):
            ObjectReader(forge(block=self.block(frame)))

    def test_a_frame_that_lies_about_its_size(self):
        frame = bytearray(zstandard.ZstdCompressor().compress(bytes(200)))
        where = frame.index(200)
        frame[where] = 20
        assert zstandard.get_frame_parameters(bytes(frame)).content_size == 20
        with pytest.raises(FormatError):
            ObjectReader(forge(block=self.block(bytes(frame))))

    def test_more_than_one_frame(self):
        frame = zstandard.ZstdCompressor().compress(bytes(20))
        with pytest.raises(FormatError):
            ObjectReader(forge(block=self.block(frame + frame)))
        with pytest.raises(FormatError):
            ObjectReader(forge(block=self.block(b"\x50\x2a\x4d\x18\x04\0\0\0abcd" + frame)))

    def test_truncated_frames(self):
        frame = zstandard.ZstdCompressor().compress(bytes(range(20)))
        for size in range(len(frame)):
            with pytest.raises(FormatError):
                ObjectReader(forge(block=self.block(frame[:size])))

    def test_other_ids_than_the_digest_says(self):
        with pytest.raises(FormatError, match="digest"):
            ObjectReader(forge(block=pack(tuple(reversed(IDS)))))


# --------------------------------------------------------------------------- through the codecs
VECTORS = Path(__file__).parent / "vectors"
NAMES = sorted(path.stem for path in VECTORS.glob("*.kvc"))


@pytest.fixture(scope="module")
def make() -> ModuleType:
    """tests/vectors/make.py, which knows the model that the golden objects are of."""
    spec = importlib.util.spec_from_file_location("make_vectors", VECTORS / "make.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def golden(make: ModuleType, name: str) -> tuple[Codec, ObjectHeader, list[list[bytes]]]:
    reader = ObjectReader((VECTORS / f"{name}.kvc").read_bytes())
    codec_id, options, *_ = make.VECTORS[name]
    codec = make.codec_of(codec_id, options, reader.header.spec)
    return codec, reader.header, [[bytes(s) for s in part.segments] for part in reader.segments(reader.num_levels - 1)]


class TestDecoding:
    def same(self, make: ModuleType, codec: Codec, raw: bytes, want: dict[str, np.ndarray]) -> bool:
        """Whether an object decodes to the wanted tensors; False if it is refused, as it may be."""
        try:
            found = make.bits(codec.decode(raw))
        except FormatError:
            return False
        assert found.keys() == want.keys()
        for key, array in want.items():
            np.testing.assert_array_equal(found[key], array, err_msg=key)
        return True

    @pytest.mark.parametrize("name", ["channel-one", "lossless-fp8"])
    def test_every_flipped_byte_and_every_truncation(self, make, name):
        codec, _, _ = golden(make, name)
        raw = (VECTORS / f"{name}.kvc").read_bytes()
        want = make.bits(codec.decode(raw))
        for at in range(len(raw)):
            self.same(make, codec, raw[:at], want)
            bad = bytearray(raw)
            bad[at] ^= 1 << at % 8
            self.same(make, codec, bytes(bad), want)

    @pytest.mark.parametrize("name", NAMES)
    def test_some_flipped_bytes_and_truncations(self, make, name):
        codec, _, _ = golden(make, name)
        raw = (VECTORS / f"{name}.kvc").read_bytes()
        want = make.bits(codec.decode(raw))
        assert self.same(make, codec, raw, want)
        for at in random.Random(name).sample(range(len(raw)), 25):
            assert not self.same(make, codec, raw[:at], want) or at > len(raw) - 16
            bad = bytearray(raw)
            bad[at] ^= 0x55
            self.same(make, codec, bytes(bad), want)

    @pytest.mark.parametrize("forgeries", [40, pytest.param(2000, marks=pytest.mark.long)])
    @pytest.mark.parametrize("name", NAMES)
    def test_forged_segments(self, make, name, forgeries):
        """Segments altered under good checksums: refused, or decoded to some tensors; never anything else."""
        codec, header, segments = golden(make, name)
        rng = random.Random(name)
        refused = 0
        for _ in range(forgeries):
            forged = [list(group) for group in segments]
            group = rng.randrange(len(forged))
            forged[group][0] = altered(forged[group][0], rng)
            try:
                codec.decode(write_object(header, forged))
            except FormatError:
                refused += 1
        assert refused > forgeries // 10

    @pytest.mark.parametrize("name", [n for n in NAMES if "-" not in n])
    def test_segments_of_other_codecs(self, make, name):
        codec, header, segments = golden(make, name)
        for other in ("lossless", "channel", "cachegen_public", "cachegen"):
            if other != header.codecs[0].codec_id:
                forged = replace(header, codecs=(CodecEntry(other, {}), *header.codecs[1:]))
                with pytest.raises((FormatError, ProfileMissing)):
                    codec.decode(write_object(forged, segments))

    def test_unknown_codecs(self, make):
        codec, header, segments = golden(make, "channel")
        forged = replace(header, codecs=(CodecEntry("nobody.codec", {}),))
        with pytest.raises(UnknownCodec):
            codec.decode(write_object(forged, segments))

    @pytest.mark.parametrize("name", [n for n in NAMES if "-" not in n])
    def test_nonsense_in_configs(self, make, name):
        codec, header, segments = golden(make, name)
        config = dict(header.codecs[0].config)
        for key in (*config, "coder", "level", "levels", "profile", "self", "é"):
            for value in TestJson.NONSENSE:
                entry = CodecEntry(header.codecs[0].codec_id, config | {key: value})
                raw = write_object(replace(header, codecs=(entry, *header.codecs[1:])), segments)
                with suppress(FormatError, ProfileMismatch):
                    codec.decode(raw)


def altered(data: bytes, rng: random.Random) -> bytes:
    """Bytes changed in one of the ways that break parsers."""
    out = bytearray(data)
    if not out or rng.random() < 0.1:
        return bytes(out) + rng.randbytes(rng.randrange(1, 40))
    if rng.random() < 0.2:
        return bytes(out[: rng.randrange(len(out))])
    near = min(len(out), rng.choice((8, 64, len(out))))  # heads and tables, more often than streams
    for _ in range(rng.choice((1, 1, 2, 6))):
        at = rng.randrange(min(near, len(out)))
        if rng.random() < 0.7:
            out[at] = rng.choice((out[at] ^ 1 << rng.randrange(8), 0, 255, rng.randrange(256)))
        else:
            size = rng.randrange(1, 30)
            out[at : at + size] = out[(start := rng.randrange(len(out))) : start + size]
    return bytes(out)

"""Golden objects, and the plain decoder that reads them from docs/format.md alone."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from cachegen.codecs.base import Group, LevelLoss
from cachegen.container import CodecEntry, ObjectHeader, write_object
from cachegen.keys import token_digest
from cachegen.kv import KVSpec, LayerKind, LayerSpec, Lineage
from cachegen.rope import Rope

HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def reference() -> ModuleType:
    import sys

    spec = importlib.util.spec_from_file_location("reference_decoder", HERE / "reference_decoder.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def headers() -> list[ObjectHeader]:
    rope = Rope((1.0, 0.25), rotary_dim=4)
    attention = LayerSpec(LayerKind.ATTENTION, 3, 4, 6, rope)
    plain = ObjectHeader(
        codecs=(CodecEntry("channel", {}),),
        fingerprint=bytes(32),
        profile=None,
        spec=KVSpec("tiny", "float16", (attention, attention)),
        num_tokens=12,
        positions=((3, 12),),
        head_range=(0, 3),
        groups=tuple(Group((i, i + 1), (0, 3), (name,)) for i in range(2) for name in ("k", "v")),
        losses=(LevelLoss(7),),
    )
    ids = tuple(range(65530, 65542))
    mixed = ObjectHeader(
        codecs=(CodecEntry("klt", {"x": ["é", 1.5]}), CodecEntry("lossless", {})),
        fingerprint=bytes(range(32)),
        profile="0f" * 32,
        spec=KVSpec(
            "mixed",
            "bfloat16",
            (
                attention,
                LayerSpec(LayerKind.SLIDING, 2, 4, 4, None, window=4),
                LayerSpec(LayerKind.MLA, 1, 16, 4),
                LayerSpec(LayerKind.STATE, 0, 0, 0),
                LayerSpec(LayerKind.ATTENTION, 1, 4, 4),
            ),
        ),
        num_tokens=12,
        positions=((100, 2), (0, 10)),
        head_range=(1, 3),
        groups=(
            Group((0, 1), (1, 2), ("k", "v")),
            Group((0, 1), (2, 3), ("k", "v")),
            Group((1, 2), (1, 2), ("k", "v"), (8, 12)),
            Group((2, 3), (0, 1), ("latent", "rope"), None, 1),
            Group((3, 4), (0, 1), (), None, 1),
            Group((4, 5), (1, 1), ("k", "v")),
        ),
        losses=tuple(LevelLoss(q, 0.5**q) for q in range(3)),
        token_digest=token_digest(ids),
        token_ids=ids,
        previous_ids=(9,),
        lineage=Lineage("cachegen", 1),
    )
    return [plain, mixed]


@pytest.mark.parametrize("header", headers(), ids=["plain", "mixed"])
@pytest.mark.parametrize("size", [5, 5000])
def test_the_plain_decoder_reads_every_object(reference, header, size):
    rng = np.random.default_rng(size)
    segments = [[rng.bytes(int(rng.integers(size))) for _ in header.losses] for _ in header.groups]
    raw = write_object(header, segments)
    found = reference.read_object(raw)
    assert found.segments == segments
    assert found.token_ids == (None if header.token_ids is None else list(header.token_ids))
    assert found.positions == [start + i for start, count in header.positions for i in range(count)]
    want = [(g.layers, g.heads, g.names, g.tokens or (0, 12), g.codec) for g in header.groups]
    assert [(g.layers, g.heads, g.names, g.tokens, g.codec) for g in found.groups] == want
    assert [layer["kind"] for layer in found.layers] == [layer.kind.value for layer in header.spec.layers]
    assert found.header["levels"][0]["level"] == header.losses[0].level


def test_the_plain_decoder_refuses_damage(reference):
    header = headers()[1]
    raw = write_object(header, [[b"abc", b"", b"defgh"]] * len(header.groups))
    for at in range(len(raw)):
        bad = bytearray(raw)
        bad[at] ^= 0x10
        with pytest.raises(reference.Refused):
            reference.read_object(bytes(bad))
    with pytest.raises(reference.Refused):
        reference.read_object(raw[:-1])

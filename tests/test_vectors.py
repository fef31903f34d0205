"""Golden objects, and the plain decoder that reads them from docs/format.md alone."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import re
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch

from cachegen.codecs.base import Group, LevelLoss
from cachegen.container import CodecEntry, ObjectHeader, ObjectReader, verify, write_object
from cachegen.inspection import describe
from cachegen.keys import token_digest
from cachegen.kv import KVSpec, LayerKind, LayerSpec, Lineage
from cachegen.rope import Rope

HERE = Path(__file__).parent


def load(name: str, path: Path) -> ModuleType:
    """A module from a file that isn't in a package."""
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def reference() -> ModuleType:
    return load("reference_decoder", HERE / "reference_decoder.py")


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


# --------------------------------------------------------------------------- golden objects
VECTORS = HERE / "vectors"
NAMES = sorted(path.stem for path in VECTORS.glob("*.kvc"))
ULPS = 1
"""Units in the last place of a pair's larger number, by which rotated keys may differ between decoders."""


@pytest.fixture(scope="module")
def make() -> ModuleType:
    """tests/vectors/make.py: the invented model, and what each vector was made with."""
    return load("make_vectors", VECTORS / "make.py")


def expected(name: str) -> dict[str, np.ndarray]:
    with np.load(VECTORS / f"{name}.npz", allow_pickle=False) as arrays:
        return dict(arrays)


def test_vectors_are_as_they_were_made():
    manifest = json.loads((VECTORS / "manifest.json").read_text())
    for name, digest in manifest.items():
        assert hashlib.sha256((VECTORS / name).read_bytes()).hexdigest() == digest, name
    assert {f"{name}.kvc" for name in NAMES} | {f"{name}.npz" for name in NAMES} <= set(manifest)


def test_the_example_of_the_document_is_a_vector():
    text = (HERE.parent / "docs" / "format.md").read_text().split("## Example")[1]
    raw = (VECTORS / "channel-one.kvc").read_bytes()
    lines = re.findall(r"^    ([0-9a-f]{4})  ([0-9a-f ]+)$", text, re.MULTILINE)
    assert len(lines) > 8
    for at, shown in lines:
        part = bytes.fromhex(shown)
        assert raw[int(at, 16) :][: len(part)] == part, at


def test_every_codec_has_vectors(make):
    assert sorted(make.VECTORS) == NAMES
    assert {codec for codec, *_ in make.VECTORS.values()} >= {"cachegen", "cachegen_public", "channel", "lossless"}


@pytest.mark.parametrize("name", NAMES)
def test_the_package_decodes_what_it_decoded_when_they_were_made(make, name):
    data = (VECTORS / f"{name}.kvc").read_bytes()
    codec_id, options, *_ = make.VECTORS[name]
    verify(data)
    chunk = make.codec_of(codec_id, options, ObjectReader(data).header.spec).decode(data)
    close(make.bits(chunk), expected(name), chunk.spec)


@pytest.mark.parametrize("name", NAMES)
def test_the_plain_decoder_decodes_them_too(reference, make, name):
    data = (VECTORS / f"{name}.kvc").read_bytes()
    codec_id, options, *_ = make.VECTORS[name]
    profile = None
    if codec_id == "cachegen":
        profile = (VECTORS / f"{make.profile_name(options)}.profile").read_bytes()
    found = reference.decode(data, profile)
    close(
        {f"{layer}.{name}": array for (layer, name), array in found.items()},
        expected(name),
        ObjectReader(data).header.spec,
    )


@pytest.mark.parametrize("name", NAMES)
def test_their_descriptions_add_up(name):
    reader = ObjectReader((VECTORS / f"{name}.kvc").read_bytes())
    shown = json.loads(json.dumps(describe(reader), allow_nan=False))
    tensors = {key.split(".", 1)[1]: 0 for key in expected(name)}
    for key, array in expected(name).items():
        tensors[key.split(".", 1)[1]] += array.size
    assert shown["elements"] == sum(tensors.get(tensor, 0) for tensor in ("k", "v", "latent", "rope"))
    assert shown["levels"][0]["bytes_to_read"] == shown["bytes"] == (VECTORS / f"{name}.kvc").stat().st_size


@pytest.mark.parametrize("name", [name for name in NAMES if name.startswith("lossless")])
def test_lossless_vectors_hold_what_was_encoded(make, name):
    original = make.bits(make.VECTORS[name][3]())
    assert original.keys() == expected(name).keys()
    for key, array in expected(name).items():
        np.testing.assert_array_equal(array, original[key], err_msg=key)


def close(found: dict[str, np.ndarray], want: dict[str, np.ndarray], spec: KVSpec) -> None:
    """Equal bit for bit, but for keys that were rotated: these within ULPS of their pair's larger number."""
    assert found.keys() == want.keys()
    for key, array in want.items():
        layer, name = key.split(".", 1)
        assert found[key].dtype == array.dtype
        if name != "k" or np.array_equal(found[key], array):
            np.testing.assert_array_equal(found[key], array, err_msg=key)
            continue
        rope = spec.layers[int(layer)].rope
        a, b = (
            torch.from_numpy(x.astype(x.dtype.str.replace("u", "i"))).view(spec.torch_dtype).double()
            for x in (found[key], array)
        )
        pair = b.abs()
        half = rope.rotary_dim // 2
        pairs = pair[..., : 2 * half]
        pairs = pairs.unflatten(-1, (half, 2) if rope.interleaved else (2, half))
        largest = pairs.amax(-1 if rope.interleaved else -2, keepdim=True).expand_as(pairs)
        bound = ULPS * torch.finfo(spec.torch_dtype).eps * largest.flatten(-2)
        assert ((a - b).abs()[..., : 2 * half] <= bound).all(), key
        assert torch.equal(a[..., 2 * half :], b[..., 2 * half :]), key

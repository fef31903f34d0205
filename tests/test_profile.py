"""Profiles: round trips, identity, and refusals of files that aren't what they say."""

from __future__ import annotations

import json
import struct
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cachegen.entropy.tables import from_counts
from cachegen.errors import (
    CacheGenError,
    ChecksumError,
    FormatError,
    InputError,
    LimitExceeded,
    NotAnObject,
    ProfileMismatch,
    TableError,
    Truncated,
    VersionError,
)
from cachegen.fingerprint import Fingerprint
from cachegen.kv import KVSpec, LayerKind, LayerSpec
from cachegen.profile import HASH, MAX_HEADER, METADATA, Calibration, ModelProfile, Rung, bank_array

SPEC = KVSpec("tiny", "bfloat16", (LayerSpec(LayerKind.ATTENTION, 2, 8, 6),) * 2)
FINGERPRINT = Fingerprint("tiny", "ab" * 32, "bfloat16", 2, 2, (8, 8), (6, 6), "cd" * 32, "ef" * 32)


def make(**changes: Any) -> ModelProfile:
    arrays = {
        "steps": np.arange(6, dtype=np.float32).reshape(2, 3),
        "ids": np.arange(5, dtype=np.uint8),
        "bank": bank_array(from_counts(np.ones((3, 16), np.int64), 7)),
        "none": np.zeros((0, 4), np.int16),
    }
    profile = ModelProfile(
        "cachegen",
        FINGERPRINT,
        SPEC,
        Calibration((("a.txt", 100), ("b.txt", 50)), seed=3),
        (Rung(0, 2.0, 0.1), Rung(1, 4.0, None)),
        {"scale": 0.5, "names": ["x"]},
        arrays,
    )
    return replace(profile, **changes)


def rewritten(change: Any) -> bytes:
    """A profile's file with its header changed by `change(header)`, and the description's hash as it was."""
    data = make().to_bytes()
    (length,) = struct.unpack_from("<Q", data)
    header = json.loads(data[8 : 8 + length])
    change(header)
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data[8 + length :]


def test_a_file_gives_the_profile_back(tmp_path: Path) -> None:
    profile = make()
    path = profile.save(tmp_path / "deep" / "p.safetensors")
    loaded = ModelProfile.load(path)
    assert loaded.hash == profile.hash
    assert (loaded.fingerprint, loaded.spec, loaded.calibration) == (FINGERPRINT, SPEC, profile.calibration)
    assert (loaded.ladder, dict(loaded.parameters)) == (profile.ladder, dict(profile.parameters))
    assert loaded.calibration.tokens == 150
    for name, array in profile.arrays.items():
        assert loaded.arrays[name].dtype == array.dtype
        assert np.array_equal(loaded.arrays[name], array)
    assert [p.name for p in path.parent.iterdir()] == ["p.safetensors"]


def test_the_file_is_a_safetensors_file() -> None:
    from safetensors.numpy import load

    arrays = load(make().to_bytes())
    assert np.array_equal(arrays["steps"], make().arrays["steps"])


def test_the_hash_is_of_the_content() -> None:
    base = make()
    assert base.hash == make().hash
    assert len(base.hash) == 64
    others = [
        make(codec_id="other"),
        make(fingerprint=replace(FINGERPRINT, weights="00" * 32)),
        make(ladder=()),
        make(parameters={"scale": 0.25, "names": ["x"]}),
        make(arrays={**base.arrays, "steps": base.arrays["steps"] + 1}),
        make(arrays={**base.arrays, "steps": base.arrays["steps"].reshape(3, 2)}),
        make(arrays={**base.arrays, "ids": base.arrays["ids"].astype(np.int8)}),
        make(arrays={k if k != "ids" else "idz": v for k, v in base.arrays.items()}),
    ]
    assert len({base.hash, *(p.hash for p in others)}) == 1 + len(others)


def test_the_hash_does_not_depend_on_byte_order_or_layout() -> None:
    arrays = dict(make().arrays)
    arrays["steps"] = np.asfortranarray(arrays["steps"].astype(">f4"))
    assert make(arrays=arrays).hash == make().hash


def test_arrays_are_checked_when_asked_for() -> None:
    profile = make()
    assert profile.array("steps", "F32", (2, None)).shape == (2, 3)
    for name, dtype, shape in [
        ("steps", "F32", (3, 2)),
        ("steps", "F16", (2, 3)),
        ("steps", "F32", (6,)),
        ("x", "U8", ()),
    ]:
        with pytest.raises(ProfileMismatch, match=name):
            profile.array(name, dtype, shape)


def test_banks_are_checked_when_asked_for() -> None:
    profile = make()
    assert profile.bank("bank").tables == 3
    broken = np.array(profile.arrays["bank"])
    broken[-200:] = 255
    with pytest.raises(TableError):
        make(arrays={"bank": broken}).bank("bank")
    with pytest.raises(TableError):
        profile.bank("ids")
    with pytest.raises(ProfileMismatch):
        profile.bank("steps")


def test_check_names_what_differs() -> None:
    make().check(FINGERPRINT)
    make().check(replace(FINGERPRINT, dtype="float16", tokenizer=None))
    with pytest.raises(ProfileMismatch, match=r"weights: the profile has abab.*calibrate --codec cachegen") as caught:
        make().check(replace(FINGERPRINT, weights="11" * 32))
    assert caught.value.details["fields"] == {"weights": ("ab" * 32, "11" * 32)}


def test_other_element_types_are_refused() -> None:
    with pytest.raises(InputError, match="float64"):
        make(arrays={"x": np.zeros(3)})


def test_a_failed_save_leaves_the_old_file(tmp_path: Path) -> None:
    path = make().save(tmp_path / "p")
    before = path.read_bytes()
    with pytest.raises(InputError):
        make(parameters={"x": float("nan")}).save(path)
    assert path.read_bytes() == before
    assert len(list(tmp_path.iterdir())) == 1


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="nowhere"):
        ModelProfile.load(tmp_path / "nowhere")


@pytest.mark.parametrize("size", [0, 7, 8, 20, -1])
def test_truncation_is_a_typed_error(size: int) -> None:
    with pytest.raises((Truncated, FormatError)):
        ModelProfile.from_bytes(make().to_bytes()[:size])


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_a_changed_byte_never_goes_unnoticed(data: st.DataObject) -> None:
    whole = make().to_bytes()
    at = data.draw(st.integers(0, len(whole) - 1))
    flip = data.draw(st.integers(1, 255))
    changed = whole[:at] + bytes([whole[at] ^ flip]) + whole[at + 1 :]
    try:
        profile = ModelProfile.from_bytes(changed)
    except CacheGenError:
        return
    assert profile.hash == make().hash  # white space of the header, say
    assert profile.to_bytes() == whole


def test_other_files_are_told_apart() -> None:
    from safetensors.numpy import save

    with pytest.raises(NotAnObject, match=METADATA):
        ModelProfile.from_bytes(save({"x": np.zeros(3, np.float32)}))
    with pytest.raises(NotAnObject):
        ModelProfile.from_bytes(struct.pack("<Q", MAX_HEADER + 1) + b"{}")


def _described(header: dict[str, Any], **changes: Any) -> None:
    """Change the description and leave its hash."""
    described = json.loads(header["__metadata__"][METADATA])
    described.update(changes)
    header["__metadata__"][METADATA] = json.dumps(described, sort_keys=True, separators=(",", ":"))


def _set(name: str, field: str, value: Any) -> Any:
    return lambda header: header[name].update({field: value})


@pytest.mark.parametrize(
    ("change", "error"),
    [
        (lambda h: _described(h, codec="other"), ChecksumError),
        (lambda h: h["__metadata__"].update({HASH: "00" * 32}), ChecksumError),
        (lambda h: h["__metadata__"].update({HASH: 5}), FormatError),
        (lambda h: h["__metadata__"].pop(METADATA), NotAnObject),
        (lambda h: h.pop("ids"), FormatError),
        (_set("ids", "dtype", "F64"), FormatError),
        (_set("ids", "dtype", []), FormatError),
        (_set("ids", "shape", [6]), FormatError),
        (_set("ids", "shape", [-5]), FormatError),
        (_set("ids", "shape", [1 << 40, 1 << 40]), FormatError),
        (_set("ids", "shape", "5"), FormatError),
        (_set("ids", "shape", [True] * 3), FormatError),
        (_set("ids", "data_offsets", [0, 5]), FormatError),
        (_set("ids", "data_offsets", [1 << 30, (1 << 30) + 5]), FormatError),
        (_set("ids", "data_offsets", [5]), FormatError),
        (lambda h: h.update(ids=7), FormatError),
        (lambda h: h.update({f"a{i}": h["ids"] for i in range(5000)}), LimitExceeded),
    ],
)
def test_malformed_headers_are_typed_errors(change: Any, error: type[CacheGenError]) -> None:
    with pytest.raises(error):
        ModelProfile.from_bytes(rewritten(change))


def signed(**changes: Any) -> bytes:
    """A profile whose description is changed and hashed anew, as a forger would."""
    from cachegen import strict_json
    from cachegen.profile import _content_hash

    profile = make()
    described = strict_json.loads(profile._described(), "profile")
    described.update(changes)
    text = strict_json.dumps(described, "profile")
    data = profile.to_bytes()
    (length,) = struct.unpack_from("<Q", data)
    header = json.loads(data[8 : 8 + length])
    header["__metadata__"] = {METADATA: text.decode(), HASH: _content_hash(text, profile.arrays)}
    packed = json.dumps(header).encode()
    return struct.pack("<Q", len(packed)) + packed + data[8 + length :]


def test_signed_is_sound() -> None:
    assert ModelProfile.from_bytes(signed()).hash == make().hash


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        ({"format": 2}, VersionError),
        ({"format": None}, VersionError),
        ({"fingerprint": {}}, FormatError),
        ({"fingerprint": 3}, FormatError),
        ({"spec": {"model_type": "x", "dtype": "bfloat16", "layers": []}}, FormatError),
        ({"spec": {}}, FormatError),
        ({"ladder": [{"level": 1, "bits_per_element": 2.0, "kl": 0.1}]}, FormatError),
        ({"ladder": [{}]}, FormatError),
        ({"ladder": [{"level": i, "bits_per_element": 2.0, "kl": 0.1} for i in range(100)]}, LimitExceeded),
        ({"calibration": None}, FormatError),
        ({"parameters": 5}, FormatError),
        ({"extra": 1}, FormatError),
    ],
)
def test_malformed_descriptions_are_typed_errors(changes: dict[str, Any], error: type[CacheGenError]) -> None:
    with pytest.raises(error):
        ModelProfile.from_bytes(signed(**changes))

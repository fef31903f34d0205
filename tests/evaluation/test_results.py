"""Result documents and the rows that let a run resume."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
from cachegen.evaluation.results import Result, RowCache, digest, portable

from cachegen.errors import InputError


def test_round_trip(tmp_path: Path) -> None:
    result = Result.new("quality", {"model": tmp_path / "SmolLM2", "tokens": 1024})
    result.rows = [{"scheme": "int", "kl": 0.5, "notes": ["a"]}]
    result.summary = {"bits_at_kl_0.01.int": 4.74, "bits_at_kl_0.003.int": None}
    result.write(tmp_path / "deep" / "r.json")
    assert Result.read(tmp_path / "deep" / "r.json") == result


def test_document_has_the_agreed_fields_and_no_paths(tmp_path: Path) -> None:
    result = Result.new(
        "demo", {"model": tmp_path / "m", "files": [str(tmp_path / "a.txt")], "nested": {"x": tmp_path}}
    )
    data = json.loads(result.to_json())
    assert set(data) == {"bench", "version", "git", "host", "config", "rows", "summary"}
    assert set(data["host"]) == {"cpu", "isa", "cores", "memory", "device"}
    assert data["config"] == {"model": "m", "files": ["a.txt"], "nested": {"x": tmp_path.name}}
    assert str(tmp_path) not in result.to_json()


def test_numbers_that_are_not_finite_become_null() -> None:
    result = Result.new("x", {})
    result.rows = [{"a": math.nan, "b": math.inf}]
    assert json.loads(result.to_json())["rows"] == [{"a": None, "b": None}]


@pytest.mark.parametrize("text", ["", "[]", '{"bench": "x"}', '{"bench": 1'])
def test_other_files_are_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "r.json").write_text(text)
    with pytest.raises(InputError, match=r"r\.json"):
        Result.read(tmp_path / "r.json")
    with pytest.raises(InputError, match="doesn't exist"):
        Result.read(tmp_path / "missing.json")


def test_rows_survive_an_interruption(tmp_path: Path) -> None:
    config = {"tokens": 5}
    rows = RowCache(tmp_path, "quality", config)
    rows.put("a/1", {"kl": 1.5})
    rows.put("a/2", {"kl": 2.5})
    assert rows.path is not None
    with rows.path.open("a") as file:
        file.write('{"key": "a/3", "row": {"kl"')  # cut short
    again = RowCache(tmp_path, "quality", config)
    assert list(again) == ["a/1", "a/2"]
    again.put("a/3", {"kl": 3.5})
    assert RowCache(tmp_path, "quality", config).get("a/3") == {"kl": 3.5}
    assert len(RowCache(tmp_path, "quality", {"tokens": 6})) == 0
    again.forget()
    assert len(RowCache(tmp_path, "quality", config)) == 0


def test_digest_ignores_order() -> None:
    assert digest({"a": 1, "b": 2}) == digest({"b": 2, "a": 1}) != digest({"a": 1, "b": 3})


def test_portable_keeps_what_is_no_path() -> None:
    assert portable({"a": ("x/y", 3, None)}) == {"a": ["x/y", 3, None]}

"""README's table of figures: what `docs/results/render.py` makes of documents."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def render() -> ModuleType:
    spec = importlib.util.spec_from_file_location("render", ROOT / "docs" / "results" / "render.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_table_names_figure_target_and_source(render: ModuleType) -> None:
    document = {
        "git": "abc",
        "host": {"cpu": "a CPU", "cores": 2, "isa": "avx2"},
        "summary": {"rans_decode_over_torchac.avx2": 41.6, "bits_at_kl_0.01.channel": None, "unknown": 1.0},
    }
    text = render.table({"speed.json": document})
    source = "[speed.json](docs/results/speed.json)"
    assert f"| rANS decode over torchac -O3, avx2 | 42 x | >= 40 | {source} |" in text
    assert f"| bits per element at KL 0.01, `channel` | not bracketed |  | {source} |" in text
    assert "unknown" not in text
    assert "speed.json: a CPU, 2 cores, avx2, revision abc." in text


def test_readme_has_the_section_once(render: ModuleType) -> None:
    assert len(render.SECTION.findall((ROOT / "README.md").read_text(encoding="utf-8"))) == 1

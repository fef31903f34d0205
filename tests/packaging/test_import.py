"""What `import cachegen` brings along."""

from __future__ import annotations

import subprocess
import sys

import pytest

import cachegen

ENGINES_AND_TOOLS = ("transformers", "vllm", "sglang", "lmcache", "aiohttp", "typer", "rich", "pydantic", "torchac")


def imported_by(statement: str) -> set[str]:
    """Top-level modules in a new Python after `statement`."""
    code = f"{statement}\nimport sys\nprint(*sorted({{name.split('.')[0] for name in sys.modules}}))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(done.stdout.split())


def test_the_codec_brings_no_engine() -> None:
    found = imported_by("import cachegen; cachegen.Codec, cachegen.KVChunk, cachegen.KVStore, cachegen.ModelProfile")
    assert "torch" in found
    assert not found & set(ENGINES_AND_TOOLS)


def test_the_command_line_starts_without_an_engine() -> None:
    assert not imported_by("import cachegen.cli") & {"transformers", "vllm", "sglang", "lmcache"}


@pytest.mark.parametrize("name", [name for name in cachegen.__all__ if name != "__version__"])
def test_public_names_are_there(name: str) -> None:
    assert getattr(cachegen, name).__name__ == name


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'Kodec'"):
        _ = cachegen.Kodec

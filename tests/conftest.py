"""Fixtures that several rooms' tests share: the real model, and a chunk of its cache."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import settings

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
torch.set_num_threads(1)
# A change lands or not by the same cases each time; anyone's own runs go on looking for new ones.
settings.register_profile("ci", derandomize=True)
if os.environ.get("CI"):
    settings.load_profile("ci")

TEXT = """The lighthouse at Carrow Head was built in 1868, after two winters in which eleven ships were lost on the
reef. Its lamp burned colza oil at first, then paraffin, and from 1931 an electric arc that could be seen for
twenty-two nautical miles. The keepers lived in three rooms below the lantern with their families, a goat and
a small library. Every night one of them climbed the 142 steps, trimmed the wick, wound the clockwork that
turned the lens, and wrote the weather in a log: the wind, the barometer, the passing sails, and sometimes a
line about what the children had found on the shore. When the station was automated, the last keeper, Margaret
Oule, carried forty volumes of the log down the stairs herself, two at a time, and gave them to the county
archive. They are the longest unbroken record of weather on that coast, and people who study storms still ask
for them.

Reading the log, you notice how the hand changes. The first keeper wrote in tall, slanted letters and never
used a full stop. His daughter, who took over in 1889, drew the clouds in the margin. By 1940 the entries are
typed, and the paper is thin. "Wind NE 7, rain, visibility poor," says the page for the third of March 1953.
"The relief boat could not land. We have bread for four days and coal for ten. Peter has taught the goat to
open the coal shed, which is not a thing we wanted it to know." There is no entry for the fourth. On the
fifth, in pencil, somebody has written: "Boat came. Goat well." """
"""About 340 tokens of prose, written for these tests."""


@pytest.fixture(scope="session")
def smollm2_folder() -> Path:
    """A transformers folder of SmolLM2-135M-Instruct in bf16; skips where its package isn't installed."""
    from cachegen.evaluation.models import smollm2

    from cachegen.errors import MissingExtra

    try:
        return smollm2()
    except MissingExtra as error:
        pytest.skip(str(error))


@pytest.fixture(scope="session")
def model(smollm2_folder: Path) -> tuple[Any, Any]:
    """(model, tokenizer): SmolLM2 in fp32, eval mode. Don't change it: the session shares it."""
    from cachegen.evaluation.models import load

    return load(smollm2_folder)


@pytest.fixture(scope="session")
def smollm2_ids(model: tuple[Any, Any]) -> torch.Tensor:
    """int64 [T]: the token ids of TEXT, about 340."""
    return torch.as_tensor(model[1](TEXT)["input_ids"], dtype=torch.int64)


@pytest.fixture(scope="session")
def smollm2_chunk(model: tuple[Any, Any], smollm2_ids: torch.Tensor) -> Any:
    """A bf16 KVChunk of 300 tokens of TEXT, computed by the model in fp32; ids known. Don't write into it."""
    from cachegen.kv import KVChunk, KVSpec, LayerKind, LayerKV

    ids = smollm2_ids[:300]
    with torch.no_grad():
        output = model[0](ids[None], use_cache=True)
    cache = output.cache if "cache" in output else output.past_key_values
    layers = [
        LayerKV(LayerKind.ATTENTION, {"k": _rows(layer.keys), "v": _rows(layer.values)}) for layer in cache.layers
    ]
    spec = KVSpec.from_hf_config(model[0].config, "bfloat16")
    return KVChunk(spec, torch.arange(len(ids)), layers, token_ids=ids)


def _rows(tensor: torch.Tensor) -> torch.Tensor:
    """[1, heads, tokens, dim] as bf16 [tokens, heads, dim], strided as the engine has it."""
    return tensor[0].to(torch.bfloat16).transpose(0, 1)

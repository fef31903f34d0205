"""Calibration: passages, a whole run on a tiny model, resuming, and refusals; on the real model in the long tests."""

from __future__ import annotations

import copy
import functools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from cachegen.calibrate import CONTEXT, FOLLOWING, calibrate, choose_passages
from cachegen.codec import Codec
from cachegen.engines.transformers import chunk_from_cache
from cachegen.errors import InputError, ProfileMismatch, ProfileMissing, UnknownCodec
from cachegen.fingerprint import Fingerprint
from cachegen.kv import KVSpec
from cachegen.profile import ModelProfile

WORDS = [f"w{i}" for i in range(40)]


def text(seed: int, words: int) -> str:
    random = np.random.default_rng(seed)
    return " ".join(random.choice(WORDS, words))


class Tokenizer:
    """A token a word."""

    def __call__(self, content: str, **_: Any) -> dict[str, list[int]]:
        return {"input_ids": [WORDS.index(word) for word in content.split()]}

    def get_vocab(self) -> dict[str, int]:
        return {word: i for i, word in enumerate(WORDS)}


@pytest.fixture(scope="module")
def tiny() -> Any:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=len(WORDS),
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=2048,
    )
    return transformers.LlamaForCausalLM(config).eval()


def run(tiny: Any, output: Path | None = None, **options: Any) -> ModelProfile:
    arguments: dict[str, Any] = {"tokens": 600, "chunk_size": 64, **options}
    return calibrate(tiny, {"a": text(0, 400), "b": text(1, 300)}, output, tokenizer=Tokenizer(), **arguments)


@pytest.fixture(scope="module")
def profile(tiny: Any) -> ModelProfile:
    return run(tiny)


# --------------------------------------------------------------------------- passages
def test_passages_come_from_all_texts_and_some_are_held_out() -> None:
    texts = {name: list(range(i * 10000, i * 10000 + 5000)) for i, name in enumerate("abcd")}
    passages = choose_passages(texts, 10000, 0)
    assert {p.text for p in passages} == set("abcd")
    assert 10000 <= sum(len(p.ids) for p in passages) < 10000 + CONTEXT + FOLLOWING
    held = [p for p in passages if p.held_out]
    assert len(held) == 1
    assert all((len(p.ids), p.context) == (CONTEXT + FOLLOWING, CONTEXT) for p in held)
    assert all(p.context == len(p.ids) for p in passages if not p.held_out)
    tokens = [t for p in passages for t in p.ids]
    assert len(set(tokens)) == len(tokens)


def test_passages_depend_on_the_seed_alone() -> None:
    texts = {name: list(range(i * 10000, i * 10000 + 5000)) for i, name in enumerate("ab")}
    assert choose_passages(texts, 4000, 7) == choose_passages(texts, 4000, 7)
    assert choose_passages(texts, 4000, 7) != choose_passages(texts, 4000, 8)


def test_one_short_text_still_gives_both_kinds() -> None:
    passages = choose_passages({"a": list(range(340))}, 8192, 0)
    assert sum(p.held_out for p in passages) == 1
    assert len(passages) == 2
    assert all(p.context >= 64 for p in passages)


@pytest.mark.parametrize("texts", [{}, {"a": []}, {"a": list(range(100))}])
def test_too_little_text_is_refused(texts: dict[str, list[int]]) -> None:
    with pytest.raises(InputError, match="at least 160 tokens"):
        choose_passages(texts, 8192, 0)


# --------------------------------------------------------------------------- a whole run
def test_the_profile_says_what_it_saw_and_serves_the_codec(tiny: Any, profile: ModelProfile) -> None:
    assert profile.codec_id == "cachegen"
    assert {name for name, _ in profile.calibration.texts} == {"a", "b"}
    assert profile.calibration.tokens >= 600
    assert profile.spec.dtype == "bfloat16"
    profile.check(Fingerprint.from_model(tiny, Tokenizer()))
    bits = [rung.bits_per_element for rung in profile.ladder]
    kls = [rung.kl for rung in profile.ladder]
    assert bits == sorted(bits)
    assert all(kl is not None and kl > 0 for kl in kls)
    assert kls[-1] < 0.2 * kls[0]

    codec = Codec.for_model(tiny, "cachegen", profile, dtype="bfloat16")
    ids = torch.tensor(Tokenizer()(text(5, 200))["input_ids"])
    with torch.no_grad():
        cache = copy.deepcopy(tiny).to(torch.bfloat16)(ids[None], use_cache=True).past_key_values
    chunk = chunk_from_cache(cache, KVSpec.from_hf_config(tiny.config, "bfloat16"), ids)
    encoded = codec.encode(chunk, 7)
    decoded = codec.decode(encoded.data)
    assert encoded.report.levels[0].predicted_kl == kls[7]
    assert encoded.report.fallbacks == ()
    for got, want in zip(decoded.layers, chunk.layers, strict=True):
        x, y = got.tensors["k"].float(), want.tensors["k"].float()
        assert float((x - y).square().mean()) < 0.05 * float(y.var())


def test_equal_inputs_give_equal_profiles(tiny: Any, profile: ModelProfile) -> None:
    assert run(tiny).hash == profile.hash
    assert run(tiny, seed=1).hash != profile.hash


def test_options_reach_the_codec(tiny: Any) -> None:
    profile = run(tiny, options={"delta": False, "normalisation": "channel"})
    codec = Codec.for_model(tiny, "cachegen", profile, dtype="bfloat16")
    assert codec.codec.get_config()["delta"] is False
    with pytest.raises(ProfileMismatch, match="delta"):
        Codec.for_model(tiny, "cachegen", profile, dtype="bfloat16", delta=True)


def test_progress_is_told_in_stages(tiny: Any) -> None:
    calls: list[tuple[str, int, int]] = []
    run(tiny, progress=lambda stage, done, total: calls.append((stage, done, total)))
    assert list(dict.fromkeys(stage for stage, _, _ in calls)) == ["prefill", "fit", "ladder"]
    for stage in ("prefill", "fit", "ladder"):
        done = [(d, n) for s, d, n in calls if s == stage]
        assert [d for d, _ in done] == sorted(d for d, _ in done)
        assert done[-1][0] == done[-1][1]


def test_an_interrupted_run_goes_on(tiny: Any, tmp_path: Path, profile: ModelProfile) -> None:
    output = tmp_path / "p"
    reads = 0
    forward = tiny.forward

    def stop_in_the_ladder(stage: str, done: int, total: int) -> None:
        if stage == "ladder" and done == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(tiny, output, progress=stop_in_the_ladder)
    assert not output.exists()
    assert [p.name for p in tmp_path.iterdir()] == ["p.calibrating"]

    @functools.wraps(forward)
    def counted(*arguments: Any, **named: Any) -> Any:
        nonlocal reads
        reads += 1
        return forward(*arguments, **named)

    tiny.forward = counted
    try:
        resumed = run(tiny, output)
        levels = len(profile.ladder)
        assert reads == 1 + levels - 3  # no text is read again, three levels aren't measured again
        assert resumed.hash == profile.hash
        assert ModelProfile.load(output).hash == profile.hash
        assert [p.name for p in tmp_path.iterdir()] == ["p"]
        reads = 0
        run(tiny, output)
        assert reads > 1 + levels  # nothing was left to go on from
    finally:
        tiny.forward = forward


def test_stages_of_other_inputs_are_not_used(tiny: Any, tmp_path: Path, profile: ModelProfile) -> None:
    output = tmp_path / "p"

    def stop(stage: str, done: int, total: int) -> None:
        if stage == "fit":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(tiny, output, seed=5, progress=stop)
    assert run(tiny, output).hash == profile.hash


# --------------------------------------------------------------------------- refusals
def test_refusals_say_what_to_do(tiny: Any, tmp_path: Path) -> None:
    with pytest.raises(UnknownCodec, match="cachegen"):
        run(tiny, codec="lossless")
    with pytest.raises(UnknownCodec, match="cachegen"):
        run(tiny, codec="mp3")
    with pytest.raises(InputError, match="256 tokens"):
        run(tiny, tokens=10)
    with pytest.raises(InputError, match="group_length"):
        run(tiny, options={"group_length": 0})
    with pytest.raises(InputError, match="speed"):
        run(tiny, options={"speed": 1})
    with pytest.raises(InputError, match="tokenizer"):
        calibrate(tiny, [text(0, 400)])
    with pytest.raises(InputError, match="one string"):
        calibrate(tiny, text(0, 400), tokenizer=Tokenizer())  # type: ignore[arg-type]
    with pytest.raises(InputError, match=r"missing\.txt"):
        calibrate(tiny, [tmp_path / "missing.txt"], tokenizer=Tokenizer())
    with pytest.raises(InputError, match="no folder"):
        calibrate(tmp_path / "nowhere", [text(0, 400)])
    with pytest.raises(ProfileMissing, match="cachegen calibrate"):
        Codec.for_model(tiny, "cachegen", dtype="bfloat16")


def test_files_are_read(tiny: Any, tmp_path: Path) -> None:
    path = tmp_path / "log.txt"
    path.write_text(text(0, 400))
    profile = calibrate(tiny, [path], tokenizer=Tokenizer(), tokens=300, chunk_size=64)
    assert profile.calibration.texts[0][0] == "log.txt"


# --------------------------------------------------------------------------- the real model
@pytest.mark.long
def test_smollm2(smollm2_folder: Path, tmp_path: Path) -> None:
    import pydoc_data.topics as topics

    texts = ["\n\n".join(topics.topics[name] for name in sorted(topics.topics)[i::4]) for i in range(4)]
    profile = calibrate(smollm2_folder, texts, tmp_path / "p", tokens=4096)
    by_kl = {rung.level: rung.kl for rung in profile.ladder}
    codec = Codec.for_model(smollm2_folder, "cachegen", tmp_path / "p")
    assert 0.001 < by_kl[codec.default_level] <= 0.01
    assert profile.ladder[codec.default_level].bits_per_element < 4.2
    assert max(kl for kl in by_kl.values() if kl is not None) > 0.05
    assert (tmp_path / "p").stat().st_size < 1 << 20

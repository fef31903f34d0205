"""The quality verb on a tiny model: what it measures, keeps and sums up."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from cachegen.evaluation.baselines import CodecScheme
from cachegen.evaluation.quality import Plan, default_level, parse_scheme, run, summarise
from cachegen.evaluation.results import Result
from cachegen.evaluation.runner import Runner, fork
from cachegen.evaluation.tasks import Question

from cachegen.errors import InputError

PLAN = Plan(contexts=2, tokens=96, following=16, cases=10, free_running=1, calibration_tokens=1024)


@pytest.fixture(scope="module")
def result(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Result:
    return run(tiny_model, ["bf16", "int", "channel"], PLAN, quiet=True, folder=tmp_path_factory.mktemp("rows"))


def test_a_row_for_every_level_and_one_for_the_noise_floor(result: Result) -> None:
    keys = [(row["scheme"], row["level"]) for row in result.rows]
    assert keys[:2] == [("noise_floor", "fp32"), ("bf16", "16")]
    assert {scheme for scheme, _ in keys} == {"noise_floor", "bf16", "int", "channel"}
    assert len(keys) == len(set(keys)) > 10
    assert all(row["contexts"] == 2 for row in result.rows)
    assert all(row["kl_low"] <= row["kl"] <= row["kl_high"] <= row["kl_worst"] + 1e-12 for row in result.rows)


def test_the_untouched_cache_loses_nothing_and_coarse_levels_lose_more_than_fine_ones(result: Result) -> None:
    rows = {(row["scheme"], row["level"]): row for row in result.rows}
    assert rows["bf16", "16"]["kl"] == 0.0
    assert rows["bf16", "16"]["top1_agreement"] == 1.0
    assert rows["bf16", "16"]["bits_per_element"] == 16.0
    assert rows["int", "4/64"]["kl"] > 10 * rows["int", "8/64"]["kl"] > 0
    assert rows["int", "8/64"]["kl"] < 100 * rows["noise_floor", "fp32"]["kl"] + 1e-4
    channel = [row for row in result.rows if row["scheme"] == "channel"]
    assert channel[0]["kl"] > channel[-1]["kl"]
    assert channel[0]["bits_per_element"] < channel[-1]["bits_per_element"]
    assert channel[0]["encode_s"] > 0


def test_summary_names_what_definitions_ask_for(result: Result) -> None:
    assert {"bits_at_kl_0.01.int", "bits_at_kl_0.003.channel", "noise_floor_kl"} <= set(result.summary)
    assert result.config["texts"]["kinds"] == {"prose": 1, "technical": 1}
    assert result.config["model"] == "tiny-llama"
    assert "needle_cases" in result.summary


def test_an_interrupted_run_goes_on_where_it_stopped(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, result: Result
) -> None:
    measured: list[str] = []
    original = CodecScheme.apply

    def apply(self: CodecScheme, chunk: Any, level: str) -> Any:
        if len(measured) == 5:
            raise KeyboardInterrupt
        measured.append(level)
        return original(self, chunk, level)

    monkeypatch.setattr(CodecScheme, "apply", apply)
    with pytest.raises(KeyboardInterrupt):
        run(tiny_model, ["bf16", "int", "channel"], PLAN, quiet=True, folder=tmp_path)
    assert list(tmp_path.glob("*.jsonl"))
    prefills: list[int] = []
    prefill = Runner.prefill

    def counted(self: Runner, ids: Any) -> Any:
        prefills.append(len(ids))
        return prefill(self, ids)

    monkeypatch.setattr(CodecScheme, "apply", original)
    monkeypatch.setattr(Runner, "prefill", counted)
    again = run(tiny_model, ["bf16", "int", "channel"], PLAN, quiet=True, folder=tmp_path)
    assert [row["kl"] for row in again.rows] == pytest.approx([row["kl"] for row in result.rows])
    assert again.summary == pytest.approx(result.summary, nan_ok=True)
    assert not list(tmp_path.glob("*.jsonl"))
    assert prefills  # what was missing was measured


def test_unknown_schemes_are_named_before_anything_is_measured(tiny_model: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="nonsense"):
        run(tiny_model, ["bf16", "nonsense"], PLAN, quiet=True, folder=tmp_path)


def test_scheme_options() -> None:
    assert parse_scheme("channel") == ("channel", {})
    assert parse_scheme("cachegen:delta=false:normalisation=token:group_length=5") == (
        "cachegen",
        {"delta": False, "normalisation": "token", "group_length": 5},
    )
    with pytest.raises(InputError, match="OPTION=VALUE"):
        parse_scheme("cachegen:delta")


def rows_of(scheme: str, *points: tuple[float, float]) -> list[dict[str, Any]]:
    return [{"scheme": scheme, "level": str(i), "bits_per_element": b, "kl": k} for i, (b, k) in enumerate(points)]


def test_default_level_is_the_cheapest_below_a_hundredth() -> None:
    assert default_level(rows_of("a", (2, 0.1), (3, 0.009), (4, 0.001))) == "1"
    assert default_level(rows_of("a", (2, 0.1))) is None


def test_summary_compares_the_papers_codec_with_the_public_one() -> None:
    rows = rows_of("cachegen", (2, 0.1), (4, 0.001)) + rows_of("cachegen_public", (4, 0.1), (8, 0.001))
    summary = summarise(rows)
    assert summary["bits_at_kl_0.01.cachegen"] == pytest.approx(3.0)
    assert summary["cachegen_over_public_at_equal_kl"] == pytest.approx(0.5)
    rows = rows_of("cachegen", (2, 0.1), (4, 0.001)) + rows_of("cachegen_public", (4, 0.1))
    assert summarise(rows)["cachegen_over_public_at_equal_kl"] is None


def test_a_forked_cache_grows_alone(tiny_model: Path) -> None:
    runner = Runner.load(tiny_model)
    cache = runner.cache_of(runner.engine_chunk(runner.prefill(range(100, 140))))
    first = runner.continuation(cache, range(200, 211))
    assert first.shape == (10, 49152)
    assert torch.equal(first, runner.continuation(cache, range(200, 211)))
    grown = fork(cache)
    runner.forward([5], grown, keep=1)
    assert (cache.get_seq_length(), grown.get_seq_length()) == (40, 41)


def test_continuing_from_a_cache_is_reading_the_whole_text(tiny_model: Path) -> None:
    runner = Runner.load(tiny_model)
    ids = list(range(300, 360))
    with torch.inference_mode():
        whole = runner.model(torch.tensor([ids])).logits[0, 40:59]
    computed = runner.prefill(ids[:40])
    assert torch.allclose(runner.continuation(runner.cache_of(computed), ids[40:]), whole, atol=1e-3)
    greedy = runner.greedy(runner.cache_of(computed), ids[40:], 3, stop=False)
    assert greedy[0] == int(runner.forward(ids, None, keep=1)[-1].argmax())


def test_a_device_that_is_not_there_is_a_typed_error(tiny_model: Path) -> None:
    with pytest.raises(InputError, match="--device"):
        Runner.load(tiny_model, "meta-physical")


def test_questions_asked_together_get_the_answers_they_get_alone(tiny_model: Path) -> None:
    runner = Runner.load(tiny_model)
    cache = runner.cache_of(runner.prefill(range(100, 140)))
    prompts = [tuple(range(200, 200 + length)) for length in (3, 9, 5)]
    greedy = [tuple(runner.greedy(cache, prompt, 3, stop=False)) for prompt in prompts]
    asked = [Question("t", prompt, answer) for prompt, answer in zip(prompts, greedy, strict=True)]
    wrong = [Question("t", q.prompt, (*q.answer[:-1], (q.answer[-1] + 1) % 49152)) for q in asked]
    together = runner.answers(cache, [*asked, *wrong])
    assert together == [True] * 3 + [False] * 3
    assert cache.get_seq_length() == 40

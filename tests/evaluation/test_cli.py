"""`cachegen-bench` from the outside: help, options, files."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from cachegen.evaluation import cli, demo
from cachegen.evaluation.plot import pareto, points
from cachegen.evaluation.report import page
from cachegen.evaluation.results import Result
from typer.testing import CliRunner

from cachegen.errors import InputError

VERBS = ("demo", "quality", "speed", "plot", "plot-pareto", "report")


def bench(*arguments: str | Path, code: int = 0) -> str:
    done = CliRunner().invoke(cli.build(), [str(a) for a in arguments], env={"COLUMNS": "200", "TERM": "dumb"})
    assert done.exit_code == code, (done.output, done.exception)
    return re.sub(r"\x1b\[[0-9;]*m", "", done.output)


@pytest.fixture
def measured(tmp_path: Path) -> Path:
    result = Result.new("quality", {"model": "tiny<b>", "contexts": 2, "tokens": 96})
    result.rows = [
        {"scheme": "noise_floor", "level": "fp32", "kl": 1e-6, "top1_agreement": 1.0},
        {"scheme": "int", "level": "4", "bits_per_element": 4.5, "kl": 0.01, "top1_agreement": 0.95},
        {"scheme": "int", "level": "8", "bits_per_element": 8.5, "kl": 0.0001, "top1_agreement": 0.99},
        {"scheme": "klt", "level": "0", "bits_per_element": 1.0, "kl": 0.02, "top1_agreement": 0.9},
        {"scheme": "klt", "level": "1", "bits_per_element": 2.0, "kl": 0.005, "top1_agreement": 0.97},
        {"scheme": "lossless", "level": "0", "bits_per_element": 10.5, "kl": 0.0, "top1_agreement": 1.0},
    ]
    result.summary = {"bits_at_kl_0.01.<script>": 1.5, "bits_at_kl_0.003.int": None}
    result.write(tmp_path / "quality.json")
    return tmp_path / "quality.json"


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_teaches_by_example(verb: str) -> None:
    assert verb in bench("--help")
    text = bench(verb, "--help")
    assert f"cachegen-bench {verb}" in text
    for option in ("--output", "--config", "--export-config", "--quiet"):
        assert option in text
    if verb in ("demo", "quality", "speed"):
        assert "--format" in text
        assert "--seed" in text


@pytest.mark.parametrize("verb", ["plot", "plot-pareto"])
def test_plots_are_pngs(verb: str, measured: Path, tmp_path: Path) -> None:
    bench(verb, measured, "--output", tmp_path / "made" / "x.png")
    assert (tmp_path / "made" / "x.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")


def test_points_and_frontier(measured: Path) -> None:
    rows = Result.read(measured).rows
    assert list(points(rows)) == ["int", "klt", "lossless"]
    assert [name for _, _, name in pareto(rows)] == ["klt 0", "klt 1", "int 8", "lossless 0"]
    assert points(rows, "top1_disagreement")["int"][0][1] == pytest.approx(0.05)


def test_nothing_to_plot_is_said(tmp_path: Path) -> None:
    Result.new("speed", {}).write(tmp_path / "speed.json")
    done = CliRunner().invoke(cli.build(), ["plot", str(tmp_path / "speed.json")])
    assert isinstance(done.exception, InputError)
    done = CliRunner().invoke(cli.build(), ["plot", str(tmp_path / "speed.json"), "--measure", "beauty"])
    assert "beauty" in str(done.exception)


def test_the_report_stands_alone_and_is_escaped(measured: Path, tmp_path: Path) -> None:
    bench("report", measured, "--output", tmp_path / "report.html")
    html = (tmp_path / "report.html").read_text()
    assert html.count("data:image/png;base64,") == 2
    assert "<script>" not in html
    assert "&lt;script&gt;" in html
    assert "<b>" not in html
    assert not re.search(r'(src|href)="(?!data:)', html)
    assert html == page([Result.read(measured)])


def test_options_come_from_a_file_and_the_command_line_wins(tmp_path: Path) -> None:
    (tmp_path / "c.json").write_text('{"contexts": 3, "tokens": 500, "schemes": "int"}')
    bench("quality", "--config", tmp_path / "c.json", "--tokens", "77", "--export-config", tmp_path / "out.json")
    exported = json.loads((tmp_path / "out.json").read_text())
    assert (exported["contexts"], exported["tokens"], exported["schemes"], exported["seed"]) == (3, 77, "int", 0)
    bench("quality", "--config", tmp_path / "out.json", "--export-config", tmp_path / "again.json")
    assert json.loads((tmp_path / "again.json").read_text()) == exported


@pytest.mark.parametrize("text", ['{"colour": 1}', "[1]", "{", None])
def test_bad_config_files_are_usage_errors(text: str | None, tmp_path: Path) -> None:
    if text is not None:
        (tmp_path / "c.json").write_text(text)
    said = bench("quality", "--config", tmp_path / "c.json", code=2)
    assert "c.json" in said or "--config" in said


def test_quality_runs_from_the_command_line(tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CACHEGEN_HOME", str(tmp_path / "home"))
    arguments = [
        "--model",
        tiny_model,
        "--quick",
        "--contexts",
        "1",
        "--tokens",
        "64",
        "--following",
        "8",
        "--cases",
        "0",
    ]
    said = bench("quality", *arguments, "--schemes", "fp8,zstd", "--output", tmp_path / "q.json", "-q")
    assert said == ""
    result = Result.read(tmp_path / "q.json")
    assert [row["scheme"] for row in result.rows] == ["noise_floor", "fp8", "fp8", "zstd"]
    assert result.config["quick"] is True
    assert json.loads(bench("quality", *arguments, "--schemes", "zstd", "--format", "json", "-q"))["bench"] == "quality"
    assert "zstd" in bench("quality", *arguments, "--schemes", "zstd")


def test_errors_are_one_line_and_a_status(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("sys.argv", ["cachegen-bench", "report", "nowhere.json"])
    with pytest.raises(SystemExit) as left:
        cli.main()
    assert left.value.code == 1
    assert "nowhere.json" in capsys.readouterr().err


def test_demo_on_a_text_of_ones_own(tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CACHEGEN_HOME", str(tmp_path / "home"))
    monkeypatch.setattr("cachegen.evaluation.models.smollm2", lambda: tiny_model)
    monkeypatch.setattr(demo, "ANSWER_TOKENS", 4)
    (tmp_path / "notes.txt").write_text("The cat is called Ada. " * 40)
    said = bench(
        *("demo", "--codecs", "lossless,channel", "--text-file", tmp_path / "notes.txt"),
        *("--question", "What is the cat called?", "--output", tmp_path / "d.json"),
    )
    assert "untouched" in said
    result = Result.read(tmp_path / "d.json")
    untouched, lossless, *channel = result.rows
    assert (lossless["codec"], lossless["kl"], lossless["same_answers"]) == ("lossless", 0.0, 1)
    assert lossless["answers"] == untouched["answers"]
    assert [row["codec"] for row in channel] == ["channel"] * len(channel)
    assert all(row["bytes"] < lossless["bytes"] for row in channel)
    assert sum(row["default"] for row in channel) == 1
    assert result.summary["ratio.lossless.0"] == pytest.approx(untouched["bytes"] / lossless["bytes"])


def test_demo_wants_questions_with_a_text(tmp_path: Path) -> None:
    done = CliRunner().invoke(cli.build(), ["demo", "--text-file", str(tmp_path / "x.txt")])
    assert "--question" in str(done.exception)


def test_an_interruption_has_a_status_of_its_own(monkeypatch: pytest.MonkeyPatch, tiny_model: Path) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("cachegen.evaluation.quality.run", interrupted)
    assert "goes on from there" in bench("quality", "--model", tiny_model, code=130)

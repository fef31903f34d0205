"""The `cachegen` command: what it prints, its exit status, and its one-line errors."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from typer.testing import CliRunner, Result

from cachegen.cli import app
from cachegen.codec import Codec
from cachegen.fingerprint import Fingerprint
from cachegen.kv import KVChunk, KVSpec, LayerKind, LayerKV, LayerSpec
from cachegen.profile import Calibration, ModelProfile, Rung

SPEC = KVSpec("toy", "bfloat16", (LayerSpec(LayerKind.ATTENTION, 2, 8, 8),) * 2)
FINGERPRINT = Fingerprint("toy", "w" * 8, "bfloat16", 2, 2, (8, 8), (8, 8), "none")


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.fixture
def kvc(tmp_path: Path) -> Path:
    """An object of 20 tokens at positions 100..120."""
    rows = torch.Generator().manual_seed(0)
    layers = [
        LayerKV(layer.kind, {n: torch.randn(20, 2, 8, generator=rows).to(torch.bfloat16) for n in layer.names})
        for layer in SPEC.layers
    ]
    chunk = KVChunk(SPEC, torch.arange(100, 120), layers, token_ids=torch.arange(20) + 31_337)
    path = tmp_path / "context.kvc"
    path.write_bytes(Codec(SPEC, FINGERPRINT, "lossless", threads=1).encode(chunk).data)
    return path


@pytest.fixture
def profile(tmp_path: Path) -> Path:
    made = ModelProfile(
        "cachegen",
        FINGERPRINT,
        SPEC,
        Calibration((("prose.txt", 700), ("code.py", 324)), seed=5),
        (Rung(0, 1.5, 0.125), Rung(1, 2.5)),
        {},
        {"steps": np.ones(4, dtype=np.float32)},
    )
    return made.save(tmp_path / "toy.profile")


# ---------------------------------------------------------------------- inspect
def test_inspect_tells_what_an_object_holds(kvc: Path) -> None:
    result = run("inspect", kvc, "--groups")
    assert result.exit_code == 0
    for wanted in ("lossless", "toy, bfloat16, 2 layers (2 attention)", "100..120", "20 held", "groups", "k"):
        assert wanted in result.stdout
    assert "31337" not in result.stdout, "token ids are the prompt"


def test_inspect_as_json(kvc: Path, tmp_path: Path) -> None:
    result = run("inspect", kvc, "--format", "json", "--output", tmp_path / "out.json")
    found = json.loads(result.stdout)
    assert found == json.loads((tmp_path / "out.json").read_text())
    assert (found["kind"], found["codec"], found["tokens"]) == ("object", "lossless", 20)
    assert found["bytes"] == kvc.stat().st_size
    assert found["positions"] == [[100, 120]]


def test_inspect_reads_the_head_only(kvc: Path) -> None:
    data = kvc.read_bytes()
    size = json.loads(run("inspect", kvc, "--format", "json").stdout)["head_bytes"]
    kvc.write_bytes(data[:size])
    assert run("inspect", kvc).exit_code == 0


def test_inspect_reads_a_head_beyond_the_first_read(tmp_path: Path) -> None:
    """Token ids are in the head; so many make it longer than 16 KiB."""
    spec = KVSpec("toy", "bfloat16", (LayerSpec(LayerKind.ATTENTION, 1, 2, 2),))
    zeros = torch.zeros(10_000, 1, 2, dtype=torch.bfloat16)
    ids = torch.randint(0, 1 << 20, (10_000,), generator=torch.Generator().manual_seed(0))
    chunk = KVChunk(spec, torch.arange(10_000), [LayerKV(LayerKind.ATTENTION, {"k": zeros, "v": zeros})], token_ids=ids)
    fingerprint = Fingerprint("toy", "w", "bfloat16", 1, 1, (2,), (2,), "none")
    path = tmp_path / "long.kvc"
    path.write_bytes(Codec(spec, fingerprint, "lossless", threads=1).encode(chunk).data)
    found = json.loads(run("inspect", path, "--format", "json").stdout)
    assert found["token_ids"] == 10_000
    assert found["head_bytes"] > 16 * 1024


def test_inspect_tells_what_a_profile_holds(profile: Path) -> None:
    result = run("inspect", profile)
    assert result.exit_code == 0
    for wanted in ("profile for cachegen", "1,024 tokens", "prose.txt (700)", "0.125", "not measured"):
        assert wanted in result.stdout
    found = json.loads(run("inspect", profile, "--format", "json").stdout)
    assert found["ladder"] == [
        {"level": 0, "bits_per_element": 1.5, "kl": 0.125},
        {"level": 1, "bits_per_element": 2.5, "kl": None},
    ]
    assert found["hash"] == ModelProfile.load(profile).hash


def test_quiet_prints_nothing(kvc: Path) -> None:
    for verb in ("inspect", "verify"):
        result = run(verb, kvc, "-q")
        assert (result.exit_code, result.output) == (0, "")


# ---------------------------------------------------------------------- errors
def test_typed_errors_are_one_line_without_traceback(tmp_path: Path, kvc: Path) -> None:
    foreign = tmp_path / "foreign [bold]"
    foreign.write_bytes(b"not one of ours, but long enough to hold a prelude of sixty-four bytes or so")
    short = tmp_path / "short"
    short.write_bytes(kvc.read_bytes()[:100])
    for path, code in ((foreign, "[CG201]"), (short, "[CG204]")):
        result = run("inspect", path)
        assert (result.exit_code, result.stdout) == (1, "")
        assert result.stderr.startswith("error: ")
        assert code in result.stderr
        assert result.stderr.count("\n") == 1
        assert "Traceback" not in result.stderr


def test_an_output_that_can_not_be_written(kvc: Path, tmp_path: Path) -> None:
    result = run("inspect", kvc, "--output", tmp_path / "no" / "such" / "out.json")
    assert result.exit_code == 1
    assert "--output: expected a file that can be written" in result.stderr


@pytest.mark.parametrize(
    "arguments",
    [
        ["inspect"],
        ["inspect", "missing.kvc"],
        ["verify"],
        ["verify", "missing.kvc"],
        ["codecs", "--format", "xml"],
        ["calibrate"],
        ["nonsense"],
        ["inspect", "--nonsense"],
    ],
    ids=" ".join,
)
def test_wrong_commands_are_status_2(arguments: list[str]) -> None:
    result = run(*arguments)
    assert result.exit_code == 2
    assert "Usage:" in result.stderr


@pytest.mark.parametrize("verb", ["inspect", "verify", "codecs", "calibrate"])
def test_every_help_has_an_example_and_the_exit_status(verb: str) -> None:
    result = run(verb, "--help")
    assert result.exit_code == 0
    assert f"Example: cachegen {verb}" in result.stdout
    assert "Exit status: 0 done, 1 failed" in " ".join(result.stdout.split())


# ---------------------------------------------------------------------- verify
def test_verify_passes_whole_files(kvc: Path, profile: Path) -> None:
    result = run("verify", kvc, profile)
    assert result.exit_code == 0
    assert result.stdout.splitlines() == [f"ok {kvc}", f"ok {profile}"]


def test_verify_fails_damaged_ones_and_goes_on(kvc: Path, profile: Path, tmp_path: Path) -> None:
    damaged = tmp_path / "damaged.kvc"
    data = bytearray(kvc.read_bytes())
    data[-20] ^= 1
    damaged.write_bytes(data)
    cut = tmp_path / "cut.profile"
    cut.write_bytes(profile.read_bytes()[:-1])
    empty = tmp_path / "empty"
    empty.touch()
    result = run("verify", damaged, kvc, cut, empty, "--format", "json")
    assert result.exit_code == 1
    found = json.loads(result.stdout)
    assert not found["ok"]
    assert [row["ok"] for row in found["files"]] == [False, True, False, False]
    assert found["files"][0]["error"]["name"] == "ChecksumError"
    assert found["files"][0]["error"]["code"] == 203
    shown = run("verify", damaged).stdout
    assert shown.startswith(f"FAILED {damaged}: ")
    assert shown.count("\n") == 1


@pytest.mark.parametrize("step", [97])
def test_verify_finds_every_flipped_byte(kvc: Path, step: int) -> None:
    data = kvc.read_bytes()
    for at in range(0, len(data), step):
        kvc.write_bytes(data[:at] + bytes([data[at] ^ 0x40]) + data[at + 1 :])
        assert run("verify", kvc, "-q").exit_code == 1, f"byte {at}"


# ---------------------------------------------------------------------- codecs
def test_codecs_lists_all(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "120")
    result = run("codecs")
    assert result.exit_code == 0
    rows = {row["id"]: row for row in json.loads(run("codecs", "--format", "json").stdout)}
    assert {"cachegen", "channel", "lossless"} <= set(rows)
    assert all(codec_id in result.stdout for codec_id in rows)
    assert rows["lossless"]["exact"]
    assert rows["cachegen"]["needs_profile"]
    assert rows["cachegen"]["levels"] is None
    assert rows["lossless"]["levels"] == 1


def test_a_codec_that_can_not_be_loaded_is_listed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules["cachegen.codecs"]._BUILTIN, "broken", "cachegen.no_such_module:Codec")
    result = run("codecs")
    assert result.exit_code == 0
    assert "can't be loaded" in " ".join(result.stdout.split())


# ---------------------------------------------------------------------- calibrate
class Calls(list[dict[str, Any]]):
    """What `calibrate` was called with; may be told to fail."""

    failing: BaseException | None = None

    def __call__(self, model: Any, texts: Any, output: Any, **options: Any) -> ModelProfile:
        self.append({"model": model, "texts": texts, "output": output, **options})
        options["progress"]("prefill", 1, 2)
        if self.failing is not None:
            raise self.failing
        options["progress"]("fit", 1, 1)
        return ModelProfile("cachegen", FINGERPRINT, SPEC, Calibration((("a", 9),), 3, 64), (Rung(0, 2.0, 0.5),))


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Calls:
    import cachegen.calibrate

    calls = Calls()
    monkeypatch.setattr(cachegen.calibrate, "calibrate", calls)
    return calls


@pytest.fixture
def command(tmp_path: Path) -> list[object]:
    for name in ("a.txt", "b.txt", "c.txt"):
        (tmp_path / name).write_text("text")
    a, b, c = (tmp_path / name for name in ("a.txt", "b.txt", "c.txt"))
    return ["calibrate", "--model", tmp_path, "--text", a, b, "--text", c, "--output", tmp_path / "p"]


def test_calibrate_hands_its_options_over(calls: Calls, command: list[object], tmp_path: Path) -> None:
    more = ["--tokens", 512, "--seed", 3, "--chunk-size", 64, "--restart", "--option", "delta=false"]
    result = run(*command, *more, "--option", 'name="x"', "--option", "plain=word")
    assert result.exit_code == 0, result.stderr
    (call,) = calls
    assert call.pop("progress")
    assert sorted(call.pop("texts")) == [tmp_path / "a.txt", tmp_path / "b.txt", tmp_path / "c.txt"]
    assert call == {
        "model": tmp_path,
        "output": tmp_path / "p",
        "codec": "cachegen",
        "tokens": 512,
        "seed": 3,
        "chunk_size": 64,
        "options": {"delta": False, "name": "x", "plain": "word"},
        "resume": False,
    }
    for wanted in ("profile for cachegen", "9 tokens", "ladder", "2.000"):
        assert wanted in result.stdout
    assert "prefill" in result.stderr


def test_calibrate_as_json(calls: Calls, command: list[object]) -> None:
    result = run(*command, "--format", "json")
    found = json.loads(result.stdout)
    assert found["calibrated_on"] == {
        "texts": [{"name": "a", "tokens": 9}],
        "tokens": 9,
        "seed": 3,
        "chunk_size": 64,
    }
    assert result.stderr == ""


def test_calibrate_interrupted(calls: Calls, command: list[object]) -> None:
    calls.failing = KeyboardInterrupt()
    result = run(*command)
    assert result.exit_code == 130
    assert "run the same command to go on" in result.stderr


def test_calibrate_with_a_wrong_option(calls: Calls, command: list[object]) -> None:
    assert run(*command, "--option", "delta").exit_code == 2
    assert calls == []


def test_calibrate_of_a_codec_that_learns_nothing(command: list[object]) -> None:
    result = run(*command, "--codec", "lossless")
    assert result.exit_code == 1
    assert "[CG117]" in result.stderr


# ---------------------------------------------------------------------- as a program
def test_as_a_program(kvc: Path) -> None:
    command = [sys.executable, "-m", "cachegen.cli", "verify", str(kvc)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (0, f"ok {kvc}\n", "")


def test_ctrl_c_is_status_130_without_traceback(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    command = [sys.executable, "-m", "cachegen.cli", "verify", str(pipe)]
    program = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # whoever runs the tests may ignore it
    )
    with pipe.open("wb"):  # opens when the program reads
        program.send_signal(signal.SIGINT)
        out, err = program.communicate(timeout=60)
    assert (program.returncode, out, err) == (130, "", "error: interrupted\n")


def test_importing_cachegen_does_not_import_the_command() -> None:
    script = "import sys, cachegen; print(sorted({'typer', 'rich', 'transformers', 'aiohttp'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert done.stdout == "[]\n"

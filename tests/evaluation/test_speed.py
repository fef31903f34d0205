"""`cachegen-bench speed`: what a document says, and that its parts compute what they claim. Nothing is timed."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import typer
from cachegen.evaluation import codec_speed, coder_speed, public_host_path, synthetic
from cachegen.evaluation.decode_memory import DecodePeak
from cachegen.evaluation.results import Result
from cachegen.evaluation.speed import SpeedConfig, command, run
from cachegen.evaluation.timing import interleaved
from typer.testing import CliRunner

from cachegen.entropy import rans
from cachegen.errors import InputError

TINY = SpeedConfig(
    runs=1,
    codecs=("lossless",),
    isas=("scalar",),
    shapes=("SmolLM2-135M",),
    tokens=(256,),
    real_tokens=0,
    megabytes=4.0,
    matrices=1,
    torchac=False,
    memory_tokens=64,
)


@pytest.fixture(scope="module")
def result() -> Result:
    return run(TINY)


def test_document_is_valid(result: Result, tmp_path: Path) -> None:
    result.write(tmp_path / "speed.json")
    again = Result.read(tmp_path / "speed.json")
    assert again.bench == "speed"
    assert again.summary == pytest.approx(result.summary)
    assert again.config["codecs"] == ["lossless"]


def test_summary_has_the_expected_names(result: Result) -> None:
    assert set(result.summary) == {
        "rans_decode_over_store_bandwidth.scalar",
        "rans_decode_over_store_bandwidth_in_cache.scalar",
        "coder_overhead",
        "coder_overhead.drawn",
        "coder_overhead.synthetic",
        "decode_peak_over_limit",
        "decode_peak_over_limit.lossless",
        "import_seconds",
        "import_seconds_with_codec",
    }
    assert all(value is not None and value > 0 for value in result.summary.values())


def test_rows_say_what_was_measured(result: Result) -> None:
    assert {row["what"] for row in result.rows} == {"coder", "decode_dequant", "overhead", "codec", "memory", "import"}
    row = next(row for row in result.rows if row["what"] == "codec")
    assert (row["shape"], row["data"], row["tokens"], row["isa"]) == ("SmolLM2-135M", "drawn", 256, "scalar")
    assert (row["layers"], row["layers_measured"]) == (30, 20)
    assert row["ratio"] > 1
    assert row["loaded"] == (row["cpu_share"] < 0.95)


def test_decode_memory_is_output_object_and_scratch(result: Result) -> None:
    row = next(row for row in result.rows if row["what"] == "memory")
    assert row["output"] > row["object"] > 0
    assert row["peak"] > row["object"]
    assert row["over_limit"] == result.summary["decode_peak_over_limit"]


@pytest.mark.parametrize(
    "wrong", [{"isas": ("avx1024",)}, {"shapes": ("GPT-9",)}, {"tokens": (0,)}, {"codecs": ("x",)}]
)
def test_unknown_choices_are_refused(wrong: dict[str, tuple[str, ...]]) -> None:
    with pytest.raises(InputError, match="expected"):
        run(SpeedConfig(**wrong))  # type: ignore[arg-type]


def test_verb_writes_json(tmp_path: Path) -> None:
    target = tmp_path / "speed.json"
    arguments = ["speed", "--sections", "overhead", "--no-torchac", "--no-real", "-q"]
    config = tmp_path / "config.json"
    config.write_text(json.dumps({"runs": 1}))
    app = typer.Typer()
    app.callback()(lambda: None)
    command(app)
    done = CliRunner().invoke(app, [*arguments, "--config", str(config), "--output", str(target)])
    assert done.exit_code == 0, done.output
    result = Result.read(target)
    assert result.config["runs"] == 1
    assert set(result.summary) == {"coder_overhead", "coder_overhead.drawn", "coder_overhead.synthetic"}


def test_overhead_counts_what_streams_spend_beyond_their_tables() -> None:
    """A uniform source costs exactly 4 bits a symbol, so what is left over is the streams' states and lengths."""
    uniform = rans.MatrixSpec(64, 96, coder_speed.from_counts(np.ones((1, 16), np.int64), 7), np.zeros(96, np.uint16))
    symbols = torch.randint(0, 16, (64, 96), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    spent = 8 * len(rans.encode([symbols], [uniform])[0])
    assert coder_speed.overhead([symbols], [uniform]) == pytest.approx(spent / symbols.numel() - 4, abs=1e-9)


def test_drawn_symbols_follow_their_tables() -> None:
    work = coder_speed.draw_workload(1, 0)
    spent = coder_speed.ideal_bits(work.symbols[0], work.specs[0]) / work.count
    shares = work.specs[0].bank.freqs / 4096
    entropy = -(shares * np.log2(shares)).sum(axis=1)[work.specs[0].table_ids].mean()
    assert spent == pytest.approx(entropy, rel=0.01)


def test_drawn_chunks_depend_on_the_seed_alone() -> None:
    spec = synthetic.attention_spec("tiny", 2, 2, 16)
    first, again, other = (synthetic.draw_chunk(spec, 8, seed) for seed in (1, 1, 2))
    for (_, _, a), (_, _, b), (_, _, c) in zip(first.tensors(), again.tensors(), other.tensors(), strict=True):
        assert torch.equal(a, b)
        assert not torch.equal(a, c)


def test_every_case_takes_its_turn() -> None:
    calls: list[str] = []
    times = interleaved({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, runs=2)
    turns = [name for i, name in enumerate(calls) if i == 0 or calls[i - 1] != name]
    assert turns == ["a", "b"] * 3
    assert set(times.seconds) == {"a", "b"}


def test_isa_is_put_back() -> None:
    with codec_speed.running_on("scalar"):
        assert rans.isa() == "scalar"
        with codec_speed.running_on(rans.available_isas()[-1]):
            assert rans.isa() == rans.available_isas()[-1]
        assert rans.isa() == "scalar"


def test_limit_of_decode_memory() -> None:
    peak = DecodePeak(peak=20_000_000, output=10_000_000, object=1_600_000, threads=1)
    assert peak.limit == 20_000_000
    assert peak.over_limit == 1


class PlainCoder:
    """Stands in for torchac's backend: keeps symbols as bytes."""

    @staticmethod
    def encode_cdf(tables: torch.Tensor, symbols: torch.Tensor) -> bytes:
        assert tables.shape == (len(symbols), 33)
        return symbols.numpy().tobytes()

    @staticmethod
    def decode_cdf(tables: torch.Tensor, stream: bytes) -> torch.Tensor:
        return torch.frombuffer(bytearray(stream), dtype=torch.int16)


@pytest.mark.parametrize(("bins", "error"), [(32, 0.5 / 15), (16, 0.5 / 7)])
def test_public_host_path_is_within_half_a_bin(bins: int, error: float) -> None:
    x = torch.randn(24, 2, 8, generator=torch.Generator().manual_seed(0))
    piece = public_host_path.encode(x, bins, PlainCoder)
    out = torch.empty_like(x)
    public_host_path.decode(piece, out, PlainCoder)
    largest = x.abs().amax(dim=(1, 2), keepdim=True)
    assert ((out - x).abs() <= largest * error * 1.01).all()
    assert len(piece.streams) == 16


def test_public_host_path_measures_its_tables_on_the_chunk() -> None:
    symbols = torch.tensor([[0, 5], [0, 5], [1, 5], [0, 6]], dtype=torch.int16)
    tables = public_host_path.measured_tables(symbols)
    steps = tables.to(torch.int32) % 65536
    assert (steps[:, 1:-1].diff(dim=1) > 0).all()
    assert steps[0, 1].item() == round(0.75 * (2**16 - 32)) + 1
    assert steps[1, 5].item() == 5


@pytest.mark.parametrize(
    ("layer", "layers", "name", "bins"),
    [(0, 32, "k", 32), (9, 32, "k", 32), (10, 32, "k", 16), (1, 32, "v", 32), (2, 32, "v", 16), (8, 9, "v", 32)],
)
def test_public_bins_by_layer(layer: int, layers: int, name: str, bins: int) -> None:
    assert public_host_path.bins_of(layer, layers, name) == bins

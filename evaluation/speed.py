"""`cachegen-bench speed`: the entropy coder and the codecs, in GB/s, against torchac, memory and the public host path.

One process; whatever is compared takes turns, and medians are taken (`timing`). 1 GB = 10^9 bytes of 16-bit cache.
What each name of the summary means: docs/results/README.md.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, replace
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from cachegen.codecs import codec_ids
from cachegen.entropy import rans
from cachegen.errors import InputError

from . import codec_speed, coder_speed
from .codec_speed import SHAPES, Subject
from .decode_memory import decode_peak
from .options import ConfigFile, ExportConfig, Format, Output, OutputFormat, Quiet, Seed, export, finish, progress
from .results import Host, Result
from .timing import OneTorchThread

CHUNK = 256
"""Tokens of a chunk as stores use them."""
HEADLINE = "Llama-3.1-8B"
"""The drawn cache whose figures are quoted. At CHUNK tokens it and the real one are measured on every ISA."""
SECTIONS = ("coder", "overhead", "codecs", "memory", "import")
Row = dict[str, Any]
Advance = Callable[[str], None]


@dataclass(frozen=True)
class SpeedConfig:
    """What to measure.

    Attributes:
        seed: of symbols and synthetic caches.
        runs: rounds of each comparison.
        sections: which of SECTIONS.
        isas: instruction sets; empty means all that this processor runs.
        codecs: ids; empty means all that are installed.
        shapes: names of SHAPES.
        tokens: chunk lengths.
        real_tokens: longest chunk of SmolLM2's real cache; 0 leaves the model out.
        megabytes: how much of a synthetic cache is measured; larger ones by a few layers, said in the rows.
        matrices: 256 x 1024 matrices of symbols in the comparison with torchac.
        torchac: whether to compare with torchac, which is compiled on its first use (a minute or two).
        memory_tokens: tokens of the chunk whose decoding is watched for its peak memory.
    """

    seed: int = 0
    runs: int = 5
    sections: tuple[str, ...] = SECTIONS
    isas: tuple[str, ...] = ()
    codecs: tuple[str, ...] = ()
    shapes: tuple[str, ...] = tuple(SHAPES)
    tokens: tuple[int, ...] = (16, 64, 256, 1024, 4096)
    real_tokens: int = 1024
    megabytes: float = 17.0
    matrices: int = 8
    torchac: bool = True
    memory_tokens: int = 512

    def quick(self) -> SpeedConfig:
        """A glance: fewer lengths, rounds and data."""
        return SpeedConfig(
            **{
                **asdict(self),
                "runs": 5,
                "tokens": tuple(t for t in self.tokens if t in (16, 256)) or self.tokens[:1],
                "real_tokens": min(self.real_tokens, 256),
                "megabytes": min(self.megabytes, 9.0),
                "matrices": min(self.matrices, 4),
            }
        )


@dataclass
class _Run:
    """A run on its way: its configuration with defaults filled in, and what has been found so far."""

    config: SpeedConfig
    isas: tuple[str, ...]
    codecs: tuple[str, ...]
    rows: list[Row] = field(default_factory=list)
    summary: dict[str, float | None] = field(default_factory=dict)


def run(config: SpeedConfig, quiet: bool = True) -> Result:
    """Measure, with a progress bar unless `quiet`.

    Raises:
        InputError: an unknown section, shape, ISA or length.
        MissingExtra: torchac is wanted and isn't installed.
    """
    _check(config)
    best = rans.available_isas()
    state = _Run(config, config.isas or best, config.codecs or tuple(codec_ids()))
    sections: dict[str, Callable[[_Run, Advance], None]] = {
        "coder": _coder,
        "overhead": _overhead,
        "codecs": _codecs,
        "memory": _memory,
        "import": _import,
    }
    with OneTorchThread(), progress(quiet) as bar:
        task = bar.add_task("speed", total=_steps(state))

        def advance(what: str) -> None:
            bar.update(task, description=what, advance=1)

        for name in config.sections:
            sections[name](state, advance)
    result = Result.new("speed", asdict(config), Host.here(isa=best[-1]))
    result.rows, result.summary = state.rows, state.summary
    return result


def _check(config: SpeedConfig) -> None:
    for what, given, known in (
        ("section", config.sections, SECTIONS),
        ("shape", config.shapes, tuple(SHAPES)),
        ("isa", config.isas, rans.available_isas()),
        ("codec", config.codecs, tuple(codec_ids())),
    ):
        unknown = [name for name in given if name not in known]
        if unknown:
            raise InputError(f"{what}: expected some of {', '.join(known)}; got {', '.join(unknown)}")
    if min(config.tokens, default=0) < 1 or config.runs < 1 or config.matrices < 1:
        raise InputError(f"tokens, runs, matrices: expected at least 1 of each; got {config}")


def _steps(state: _Run) -> int:
    config, counts = state.config, {"coder": 4, "overhead": 1, "import": 1}
    counts["codecs"] = len(list(_cases(config))) * len(state.codecs)
    counts["memory"] = len(state.codecs)
    return sum(counts[name] for name in config.sections)


# --------------------------------------------------------------------------- the coder
BUFFERS = {"": 256, "_in_cache": 8}
"""Matrices decoded into one buffer, by suffix of the summary's name: 134 MB (beyond any cache), and 4.2 MB."""


def _coder(state: _Run, advance: Advance) -> None:
    config = state.config
    backend = _torchac() if config.torchac else None
    advance("against torchac")
    work = coder_speed.draw_workload(config.matrices, config.seed)
    rows, summary = coder_speed.against_torchac(work, state.isas, config.runs, backend)
    state.rows += rows
    state.summary.update(summary)
    advance("against stores")
    small = coder_speed.draw_workload(8, config.seed)
    for suffix, matrices in BUFFERS.items():
        repeated = small.repeated(min(matrices, 32 * config.matrices) // 8)
        rows, ratios = coder_speed.against_stores(repeated, state.isas, config.runs)
        state.rows += rows
        state.summary.update({f"rans_decode_over_store_bandwidth{suffix}.{isa}": r for isa, r in ratios.items()})
        advance("against stores")


def _torchac() -> Any:
    from cachegen.entropy import torchac

    return torchac.backend()


def _overhead(state: _Run, advance: Advance) -> None:
    """Above the ideal on a real cache: 256 tokens, one level, a layer's keys or values a matrix."""
    config = state.config
    bank = coder_speed.draw_tables()[1]
    advance("overhead")
    real = 0 < CHUNK <= config.real_tokens
    chunk = _subject("SmolLM2-135M", CHUNK, real, config).chunk
    coded = [coder_speed.quantised(tensor, bank, 0.5) for _, _, tensor in chunk.tensors()]
    found = {"real" if real else "drawn": coder_speed.overhead([s for s, _ in coded], [spec for _, spec in coded])}
    work = coder_speed.draw_workload(4, config.seed)
    found["synthetic"] = coder_speed.overhead(work.symbols, work.specs)
    for data, bits in found.items():
        state.rows.append({"what": "overhead", "data": data, "tokens": CHUNK, "bits_per_symbol": bits})
        state.summary[f"coder_overhead.{data}"] = bits
    state.summary["coder_overhead"] = max(found.values())


# --------------------------------------------------------------------------- whole codecs
def _cases(config: SpeedConfig) -> Iterator[tuple[str, int, bool]]:
    """(shape, tokens, whether it is the model's own cache)."""
    for tokens in config.tokens:
        if tokens <= config.real_tokens:
            yield "SmolLM2-135M", tokens, True
        for shape in config.shapes:
            yield shape, tokens, False


def _subject(shape: str, tokens: int, is_real: bool, config: SpeedConfig) -> Subject:
    if not is_real:
        return codec_speed.drawn(shape, tokens, config.megabytes, config.seed)
    whole = codec_speed.real(config.real_tokens)
    return replace(whole, chunk=whole.chunk.slice(0, tokens))


def _codecs(state: _Run, advance: Advance) -> None:
    config = state.config
    backend = _torchac() if config.torchac else None
    for shape, tokens, is_real in _cases(config):
        subject = _subject(shape, tokens, is_real, config)
        every = tokens == CHUNK and (is_real or shape == HEADLINE)
        isas = state.isas if every else state.isas[-1:]
        for codec_id in state.codecs:
            advance(f"{codec_id}, {shape}{' (real)' * is_real}, {tokens} tokens")
            for measured in codec_speed.measure(subject, subject.codec(codec_id), isas, config.runs, backend):
                row = {"what": "codec", "shape": shape, "data": "real" if is_real else "drawn", **measured}
                state.rows.append(row)
                _summarise(state, row)


def _summarise(state: _Run, row: Row) -> None:
    """Figures at the chunk length that stores use: of a drawn Llama-3.1-8B cache; for `lossless`, of the real one."""
    if row["tokens"] != CHUNK:
        return
    name = f"{row['codec']}.{row['isa']}"
    if row["codec"] == "lossless" and row["data"] == "real":
        state.summary["lossless_ratio"] = 1 / row["ratio"]
        state.summary[f"lossless_decode_gbps.{row['isa']}"] = row["decode_gbps"]
        state.summary[f"lossless_encode_gbps.{row['isa']}"] = row["encode_gbps"]
    elif row["shape"] == HEADLINE:
        for way in ("encode", "decode"):
            state.summary[f"{way}_gbps.{name}"] = row[f"{way}_gbps"]
            if f"public_{way}_gbps" in row:
                state.summary[f"{way}_over_public.{name}"] = row[f"{way}_gbps"] / row[f"public_{way}_gbps"]


# --------------------------------------------------------------------------- memory and import
def _memory(state: _Run, advance: Advance) -> None:
    config = state.config
    subject = _subject(HEADLINE, config.memory_tokens, False, config)
    worst = None
    for codec_id in state.codecs:
        advance(f"memory of {codec_id}")
        peak = decode_peak(subject.codec(codec_id), subject.chunk, threads=1)
        if peak is not None:
            worst = max(worst or 0.0, peak.over_limit)
            row = {"what": "memory", "codec": codec_id, **asdict(peak), "over_limit": peak.over_limit}
            state.rows.append(row)
            state.summary[f"decode_peak_over_limit.{codec_id}"] = peak.over_limit
    state.summary["decode_peak_over_limit"] = worst


IMPORTING = """
import time, torch
start = time.perf_counter()
import cachegen
alone = time.perf_counter()
cachegen.Codec, cachegen.KVStore, cachegen.ModelProfile
print(alone - start, time.perf_counter() - start)
"""


def _import(state: _Run, advance: Advance) -> None:
    """Seconds of `import cachegen` in a new process after `import torch`: alone, and with what first use loads."""
    advance("import")
    times = []
    for _ in range(state.config.runs):
        done = subprocess.run([sys.executable, "-c", IMPORTING], capture_output=True, text=True, check=True)
        times.append([float(seconds) for seconds in done.stdout.split()])
    alone, used = (statistics.median(column) for column in zip(*times, strict=True))
    found = {"import_seconds": alone, "import_seconds_with_codec": used}
    state.rows.append({"what": "import", **found})
    state.summary.update(found)


# --------------------------------------------------------------------------- the verb
def show(result: Result, console: Console) -> None:
    """Tables of a result, for people."""
    figures = Table("figure", "value", title="speed")
    for name, value in result.summary.items():
        figures.add_row(name, "-" if value is None else f"{value:.4g}")
    console.print(figures)
    table = Table(title="codecs, one core, GB/s of 16-bit cache")
    for heading in ("codec", "cache", "tokens", "isa", "ratio", "encode", "decode", "memcpy"):
        table.add_column(heading, no_wrap=True)
    for row in result.rows:
        if row["what"] == "codec":
            numbers = (row[name] for name in ("ratio", "encode_gbps", "decode_gbps", "memcpy_gbps"))
            cache = f"{row['shape']}, {row['data']}"
            table.add_row(row["codec"], cache, str(row["tokens"]), row["isa"], *(f"{n:.3g}" for n in numbers))
    if table.row_count:
        console.print(table)
    if any(row.get("loaded") for row in result.rows):
        console.print("[yellow]The machine was busy with other work during some of the rows (`loaded`).[/]")


def _names(text: str | None) -> tuple[str, ...]:
    return tuple(part.strip() for part in (text or "").split(",") if part.strip())


def command(app: typer.Typer) -> None:
    """Add the verb `speed`."""

    @app.command()
    def speed(
        context: typer.Context,
        quick: Annotated[bool, typer.Option("--quick", help="A glance: fewer lengths, rounds and data.")] = False,
        sections: Annotated[str | None, typer.Option(help=f"Some of {','.join(SECTIONS)}.")] = None,
        codecs: Annotated[str | None, typer.Option(help="Codec ids, by commas. Default: all installed.")] = None,
        shapes: Annotated[str | None, typer.Option(help=f"Some of {','.join(SHAPES)}.")] = None,
        tokens: Annotated[str | None, typer.Option(help="Chunk lengths, by commas.")] = None,
        isas: Annotated[str | None, typer.Option(help="Some of scalar,avx2,avx512. Default: all of this CPU.")] = None,
        runs: Annotated[int, typer.Option(min=1, help="Rounds of each comparison; medians are taken.")] = 5,
        torchac: Annotated[bool, typer.Option(help="Compare with torchac and the public host path.")] = True,
        real: Annotated[bool, typer.Option(help="Measure on SmolLM2's own cache too, not only on drawn ones.")] = True,
        seed: Seed = 0,
        format: Format = OutputFormat.TERMINAL,
        output: Output = None,
        config: ConfigFile = None,
        export_config: ExportConfig = None,
        quiet: Quiet = False,
    ) -> None:
        """Encode and decode speed on one core, against torchac, memcpy, plain stores and the public host path.

        Everything that is compared takes turns in one process; medians are shown, for every instruction set of this
        CPU. Larger models' caches are drawn, and measured by a few layers: rows say so. A full run takes about
        ten minutes, --quick about two. For figures worth keeping, leave the machine alone meanwhile.

        cachegen-bench speed --quick

        cachegen-bench speed --sections codecs --codecs channel,lossless --tokens 256 --output speed.json
        """
        export(context, export_config)
        try:
            lengths = tuple(int(part) for part in _names(tokens))
        except ValueError:
            raise InputError(f"--tokens: expected numbers by commas; got {tokens!r}") from None
        given: dict[str, Any] = {
            "sections": _names(sections),
            "codecs": _names(codecs),
            "shapes": _names(shapes),
            "isas": _names(isas),
            "tokens": lengths,
        }
        if not real:
            given["real_tokens"] = 0
        settings = SpeedConfig(seed=seed, runs=runs, torchac=torchac, **{k: v for k, v in given.items() if v != ()})
        result = run(settings.quick() if quick else settings, quiet)
        finish(result, format, output, lambda console: show(result, console), quiet)

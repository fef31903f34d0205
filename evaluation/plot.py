"""`cachegen-bench plot` and `plot-pareto`: bits per element against KL, from results of `quality`."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cachegen.errors import InputError, MissingExtra

from .options import ConfigFile, ExportConfig, Quiet, export
from .results import Result

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

LEAST_KL = 1e-6
"""Lossless schemes are drawn here: a logarithmic axis has no zero."""
OURS = ("cachegen", "channel", "klt", "lossless")
"""The project's codecs: drawn bold, baselines thin."""
COLOURS = (
    *("#4269d0", "#efb118", "#ff725c", "#6cc5b0", "#3ca951", "#a463f2", "#97bbf5", "#9c6b4e", "#ff8ab7", "#5d6c7a"),
    *("#b2912f", "#2b7a78"),
)
MARKERS = "osD^vP*X<>ph"
MEASURES = {
    "kl": "KL to the untouched cache, nats",
    "kl_worst": "KL of the worst context, nats",
    "kl_p95": "KL, 95th percentile of contexts, nats",
    "top1_disagreement": "tokens whose most likely successor changes",
}


def points(rows: Sequence[Mapping[str, Any]], measure: str = "kl") -> dict[str, list[tuple[float, float, str]]]:
    """(bits, loss, level) by scheme, cheapest first, of the rows that have both."""
    found: dict[str, list[tuple[float, float, str]]] = {}
    for row in rows:
        loss = 1 - row["top1_agreement"] if measure == "top1_disagreement" else row.get(measure)
        if row.get("bits_per_element") is not None and loss is not None:
            entry = (float(row["bits_per_element"]), float(loss), str(row["level"]))
            found.setdefault(str(row["scheme"]), []).append(entry)
    return {scheme: sorted(entries) for scheme, entries in found.items()}


def pareto(rows: Sequence[Mapping[str, Any]], measure: str = "kl") -> list[tuple[float, float, str]]:
    """(bits, loss, "scheme level") of the settings that no other beats in both, cheapest first."""
    everything = sorted(
        (bits, loss, f"{scheme} {level}")
        for scheme, entries in points(rows, measure).items()
        for bits, loss, level in entries
    )
    best: list[tuple[float, float, str]] = []
    for entry in everything:
        if not best or entry[1] < best[-1][1]:
            best.append(entry)
    return best


def figure(results: Sequence[Result], measure: str = "kl", frontier: bool = False) -> Figure:
    """The chart of every scheme in `results`; `frontier` draws the settings that none beats, and greys the others.

    Raises InputError if there is nothing to draw, MissingExtra without matplotlib.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingExtra("plots need matplotlib: pip install 'cachegen[plot]'") from error
    rows = [row for result in results for row in result.rows]
    by_scheme = points(rows, measure)
    if not by_scheme:
        raise InputError("plot: expected results of `cachegen-bench quality`; these have no rows with bits and KL")
    drawing = Figure(figsize=(9.5, 6), dpi=150, layout="constrained")
    axes = drawing.subplots()
    for i, (scheme, entries) in enumerate(by_scheme.items()):
        own = scheme.partition(":")[0] in OURS
        colour = "#b8bcc4" if frontier else COLOURS[i % len(COLOURS)]
        axes.plot(
            [bits for bits, _, _ in entries],
            [max(loss, LEAST_KL) for _, loss, _ in entries],
            color=colour,
            marker=MARKERS[i % len(MARKERS)],
            markersize=6 if own else 5,
            linewidth=2.4 if own else 1.2,
            linestyle="-" if own else "--",
            label=scheme if not frontier else None,
            zorder=3 if own else 2,
        )
    if frontier:
        _draw_frontier(axes, pareto(rows, measure))
    floor = [row["kl"] for row in rows if row["scheme"] == "noise_floor"]
    if floor and measure != "top1_disagreement":
        axes.axhline(max(max(floor), LEAST_KL), color="#5d6c7a", linewidth=1, linestyle=":")
        axes.annotate(
            "noise floor (bf16 against fp32)",
            (1, max(max(floor), LEAST_KL)),
            xycoords=("axes fraction", "data"),
            xytext=(-4, 4),
            textcoords="offset points",
            ha="right",
            fontsize=8,
            color="#5d6c7a",
        )
    if measure == "kl":
        for target in (0.01, 0.003):
            axes.axhline(target, color="#c9ccd2", linewidth=1, zorder=1)
            axes.annotate(
                f"KL {target}",
                (0, target),
                xycoords=("axes fraction", "data"),
                xytext=(4, 3),
                textcoords="offset points",
                fontsize=8,
                color="#7d828c",
            )
    _finish_axes(axes, results, measure)
    if not frontier:
        axes.legend(frameon=False, fontsize=9, ncols=2 if len(by_scheme) > 8 else 1)
    return drawing


def _draw_frontier(axes: Axes, best: Sequence[tuple[float, float, str]]) -> None:
    axes.plot(
        [bits for bits, _, _ in best],
        [max(loss, LEAST_KL) for _, loss, _ in best],
        color="#4269d0",
        marker="o",
        linewidth=2.2,
        zorder=4,
    )
    for bits, loss, name in best:
        axes.annotate(
            name,
            (bits, max(loss, LEAST_KL)),
            xytext=(-7, -11),
            textcoords="offset points",
            ha="right",
            fontsize=8,
            color="#2c3e80",
        )


def _finish_axes(axes: Axes, results: Sequence[Result], measure: str) -> None:
    rows = [row for result in results for row in result.rows]
    axes.set_yscale("log")
    axes.set_xlabel("bits per element, all bytes a reader fetches")
    axes.set_ylabel(MEASURES[measure])
    axes.set_xlim(left=0)
    if any(loss <= LEAST_KL for entries in points(rows, measure).values() for _, loss, _ in entries):
        axes.set_ylim(bottom=LEAST_KL / 2)
        axes.annotate(
            "exact (0)",
            (0, LEAST_KL),
            xycoords=("axes fraction", "data"),
            xytext=(4, -3),
            textcoords="offset points",
            fontsize=8,
            color="#7d828c",
        )
    config = results[0].config
    models = ", ".join(dict.fromkeys(str(result.config.get("model")) for result in results))
    axes.set_title(
        f"{models}: {config.get('contexts')} contexts of {config.get('tokens')} tokens", loc="left", fontsize=11
    )
    axes.grid(True, which="major", color="#eceef1", linewidth=0.8)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)


def png(drawing: Figure) -> bytes:
    """A figure's PNG bytes."""
    buffer = io.BytesIO()
    drawing.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()


def _write(files: Sequence[Path], output: Path, measure: str, frontier: bool, quiet: bool) -> None:
    if measure not in MEASURES:
        raise InputError(f"--measure: expected one of {', '.join(MEASURES)}; got {measure!r}")
    data = png(figure([Result.read(file) for file in files], measure, frontier))
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_bytes(data)
    if not quiet:
        typer.echo(f"wrote {output}")


Files = Annotated[list[Path], typer.Argument(help="Results that `cachegen-bench quality --output` wrote.")]
Measure = Annotated[str, typer.Option("--measure", help=f"One of {', '.join(MEASURES)}.")]
Png = Annotated[Path, typer.Option("--output", help="The PNG to write.")]


def command(app: typer.Typer) -> None:
    """Add the verbs `plot` and `plot-pareto`."""

    @app.command()
    def plot(
        context: typer.Context,
        files: Files,
        measure: Measure = "kl",
        output: Png = Path("quality.png"),
        config: ConfigFile = None,
        export_config: ExportConfig = None,
        quiet: Quiet = False,
    ) -> None:
        """Draw bits against loss, every scheme of one or more results.

        cachegen-bench plot quality.json --output quality.png

        cachegen-bench plot quality.json --measure kl_worst --output worst.png
        """
        export(context, export_config)
        _write(files, output, measure, frontier=False, quiet=quiet)

    @app.command("plot-pareto")
    def plot_pareto(
        context: typer.Context,
        files: Files,
        measure: Measure = "kl",
        output: Png = Path("pareto.png"),
        config: ConfigFile = None,
        export_config: ExportConfig = None,
        quiet: Quiet = False,
    ) -> None:
        """Draw the settings that no other beats in both bits and loss.

        cachegen-bench plot-pareto quality.json --output pareto.png
        """
        export(context, export_config)
        _write(files, output, measure, frontier=True, quiet=quiet)

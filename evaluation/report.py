"""`cachegen-bench report`: results of any verbs as one HTML file that needs nothing else."""

from __future__ import annotations

import base64
import json
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Annotated, Any

import typer

from cachegen.errors import InputError

from .options import ConfigFile, ExportConfig, Quiet, export
from .results import Result, write_text

STYLE = """
:root { color-scheme: light dark; --line: #d5d9e0; --soft: #f4f5f8; --ink: #1c2230; --dim: #667085; --paper: #fff }
@media (prefers-color-scheme: dark) {
  :root { --line: #39404d; --soft: #20252f; --ink: #e6e9ef; --dim: #9aa4b5; --paper: #161a21 } }
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 76rem; padding: 0 1rem;
  color: var(--ink); background: var(--paper) }
h1 { font-size: 1.6rem } h2 { margin-top: 2.5rem; font-size: 1.25rem } p.dim { color: var(--dim); margin: .2rem 0 }
.scroll { overflow-x: auto } img { max-width: 100%; background: #fff; border-radius: 6px }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: 13px; margin: .6rem 0 }
th, td { padding: .25rem .6rem; border-bottom: 1px solid var(--line); text-align: right; white-space: nowrap }
th { background: var(--soft); position: sticky; top: 0 } th.text, td.text { text-align: left }
td.long { white-space: normal; min-width: 14rem; text-align: left }
details { margin: .6rem 0 } pre { background: var(--soft); padding: .8rem; overflow-x: auto; font-size: 12px }
"""


def page(results: Sequence[Result]) -> str:
    """The HTML of a report. Every text from a result is escaped."""
    sections = "\n".join(_section(result) for result in results)
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>CacheGen results</title>\n<style>{STYLE}</style>\n</head>\n<body>\n<h1>CacheGen results</h1>\n"
        f"{sections}\n</body>\n</html>\n"
    )


def _section(result: Result) -> str:
    host = result.host
    parts = [
        f"<h2>{escape(result.bench)}</h2>",
        f'<p class="dim">version {escape(result.version)}, revision {escape(result.git)}; {escape(host.cpu)}, '
        f"{escape(host.isa)}, {host.cores} cores, {host.memory:g} GiB, {escape(host.device)}</p>",
    ]
    parts += [_picture(result, frontier) for frontier in (False, True)]
    parts.append(_summary(result))
    parts.append(_rows(result))
    config = escape(json.dumps(result.config, indent=1, default=str))
    parts.append(f"<details><summary>configuration</summary><pre>{config}</pre></details>")
    return "\n".join(part for part in parts if part)


def _picture(result: Result, frontier: bool) -> str:
    from .plot import figure, png, points

    if result.bench != "quality" or not points(result.rows):
        return ""
    data = base64.b64encode(png(figure([result], frontier=frontier))).decode("ascii")
    name = "settings that none beats in both" if frontier else "bits per element against KL"
    return f'<p><img alt="{name}" src="data:image/png;base64,{data}"></p>'


def _summary(result: Result) -> str:
    if not result.summary:
        return ""
    rows = "".join(
        f'<tr><td class="text">{escape(name)}</td><td>{escape(_number(value))}</td></tr>'
        for name, value in result.summary.items()
    )
    table = f'<table><tr><th class="text">figure</th><th>value</th></tr>{rows}</table>'
    return f'<details open><summary>summary</summary><div class="scroll">{table}</div></details>'


def _rows(result: Result) -> str:
    if not result.rows:
        return ""
    columns = list(dict.fromkeys(name for row in result.rows for name in row))
    text = {name for name in columns if any(isinstance(row.get(name), (str, list, dict)) for row in result.rows)}
    head = "".join(f'<th class="text">{escape(c)}</th>' if c in text else f"<th>{escape(c)}</th>" for c in columns)
    body = "".join(f"<tr>{''.join(_cell(row.get(name), name in text) for name in columns)}</tr>" for row in result.rows)
    table = f"<table><tr>{head}</tr>{body}</table>"
    return f'<details open><summary>rows</summary><div class="scroll">{table}</div></details>'


def _cell(value: Any, text: bool) -> str:
    if isinstance(value, dict):
        shown = ", ".join(f"{name} {_number(number)}" for name, number in value.items())
    elif isinstance(value, list):
        shown = "; ".join(str(item) for item in value)
    else:
        shown = _number(value)
    kind = "long" if len(shown) > 40 else "text" if text else ""
    return f'<td class="{kind}">{escape(shown)}</td>' if kind else f"<td>{escape(shown)}</td>"


def _number(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:.5g}" if isinstance(value, float) else str(value)


def command(app: typer.Typer) -> None:
    """Add the verb `report`."""

    @app.command()
    def report(
        context: typer.Context,
        files: Annotated[list[Path], typer.Argument(help="Results that any verb wrote with --output.")],
        output: Annotated[Path, typer.Option("--output", help="The HTML file to write.")] = Path("report.html"),
        config: ConfigFile = None,
        export_config: ExportConfig = None,
        quiet: Quiet = False,
    ) -> None:
        """Gather results into one HTML file: charts, figures and rows, nothing to load from elsewhere.

        cachegen-bench report quality.json speed.json --output report.html
        """
        export(context, export_config)
        if not files:
            raise InputError("report: expected at least one result file; got none")
        write_text(output, page([Result.read(file) for file in files]))
        if not quiet:
            typer.echo(f"wrote {output}")

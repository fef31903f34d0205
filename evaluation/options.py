"""Options that every verb of `cachegen-bench` has, and how a verb hands over its result.

A verb takes `Format, Output, ConfigFile, ExportConfig, Seed, Quiet` as the types of its last parameters and ends with
`finish(result, format, output, show)`. `--config FILE` gives defaults from JSON or TOML (keys are the options' names);
what is typed on the command line wins. `--export-config FILE` writes the options in force and leaves.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from cachegen.errors import InputError

from .results import Result, portable, write_text

OWN = ("config", "export_config", "format", "output", "quiet")
"""Options that say where results go, not what is run: left out of a result's config."""


class OutputFormat(str, Enum):
    """How a result is printed."""

    TERMINAL = "terminal"
    JSON = "json"


def read_config(path: Path) -> dict[str, Any]:
    """Options from a JSON or TOML file. Raises InputError if it holds anything but a table."""
    try:
        text = path.read_text(encoding="utf-8")
        data = _toml(text) if path.suffix == ".toml" else json.loads(text)
    except OSError as error:
        raise InputError(f"--config: expected a JSON or TOML file; {path.name} can't be read") from error
    except ValueError as error:
        raise InputError(f"--config: {path.name} isn't valid {path.suffix.lstrip('.') or 'json'}: {error}") from error
    if not isinstance(data, dict):
        raise InputError(f"--config: expected a table of options; {path.name} holds a {type(data).__name__}")
    return {key.replace("-", "_"): value for key, value in data.items()}


def _toml(text: str) -> dict[str, Any]:
    try:
        import tomllib
    except ImportError as error:
        raise InputError("--config: TOML needs Python 3.11 or newer; write the options as JSON") from error
    return tomllib.loads(text)


def _load_defaults(context: typer.Context, path: Path | None) -> Path | None:
    if path is not None:
        try:
            data = read_config(path)
        except InputError as error:
            raise typer.BadParameter(str(error)) from error
        known = {parameter.name for parameter in context.command.params}
        unknown = sorted(set(data) - known)
        if unknown:
            raise typer.BadParameter(f"{path.name} names options that this verb doesn't have: {', '.join(unknown)}")
        context.default_map = {**(context.default_map or {}), **data}
    return path


Format = Annotated[OutputFormat, typer.Option("--format", help="Tables for people, or the JSON document.")]
Output = Annotated[Path | None, typer.Option("--output", help="Write the JSON document to this file.")]
ConfigFile = Annotated[
    Path | None,
    typer.Option("--config", help="Defaults from a JSON or TOML file.", is_eager=True, callback=_load_defaults),
]
ExportConfig = Annotated[Path | None, typer.Option("--export-config", help="Write the options in force, and leave.")]
Seed = Annotated[int, typer.Option("--seed", help="Same seed, same texts, tasks and noise.")]
Quiet = Annotated[bool, typer.Option("-q", "--quiet", help="No progress bars, no tables.")]


def options_in_force(context: typer.Context) -> dict[str, Any]:
    """The options of a run by name, without those that only say where results go."""
    kept = {k: v for k, v in context.params.items() if k not in OWN}
    return {k: v.value if isinstance(v, Enum) else v for k, v in kept.items()}


def is_default(context: typer.Context, name: str) -> bool:
    """Was option `name` neither typed nor in a --config file?"""
    source = context.get_parameter_source(name)
    return source is None or source.name == "DEFAULT"


def export(context: typer.Context, path: Path | None) -> None:
    """If `path` is given, write the options in force there as JSON and leave the program."""
    if path is None:
        return
    options = {k: v for k, v in options_in_force(context).items() if v is not None}
    write_text(path, json.dumps(options, indent=1, default=str) + "\n")
    raise typer.Exit()


def finish(
    result: Result,
    format: OutputFormat,
    output: Path | None,
    show: Callable[[Console], None],
    quiet: bool = False,
) -> None:
    """Write `result` to `output` if given, and print it: JSON, or what `show` prints unless `quiet`."""
    if output is not None:
        result.write(output)
    if format is OutputFormat.JSON:
        typer.echo(result.to_json(), nl=False)
    elif not quiet:
        show(Console())


class _Progress(Progress):
    """Bars on a terminal; elsewhere (a log, CI) a line as each stage begins."""

    def add_task(self, description: str, *args: Any, **fields: Any) -> TaskID:
        if not self.console.is_terminal and not self.disable:
            self.console.print(description, markup=False, highlight=False)
        return super().add_task(description, *args, **fields)


def progress(quiet: bool = False) -> Progress:
    """A progress bar on stderr, so that results can be piped."""
    return _Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=Console(stderr=True),
        transient=True,
        disable=quiet,
    )


def calibration_bars(bar: Progress) -> Callable[[str, int, int], None]:
    """A callback for calibration that gives each of its stages a bar of its own."""
    tasks: dict[str, TaskID] = {}

    def tell(stage: str, done: int, total: int) -> None:
        if stage not in tasks:
            tasks[stage] = bar.add_task(f"calibrating: {stage}", total=total)
        bar.update(tasks[stage], completed=done, total=total)

    return tell


__all__ = [
    "ConfigFile",
    "ExportConfig",
    "Format",
    "Output",
    "OutputFormat",
    "Quiet",
    "Seed",
    "calibration_bars",
    "export",
    "finish",
    "is_default",
    "options_in_force",
    "portable",
    "progress",
    "read_config",
]

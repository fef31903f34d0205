"""`cachegen`: look into objects, check them, list codecs, calibrate. `cachegen-bench` measures.

Exit status: 0 done; 1 an object failed verification, or a typed error, printed as one line; 2 the command was wrong;
130 interrupted. Nothing heavier than typer and rich is imported before a verb runs.
"""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from .errors import CacheGenError, FormatError, InputError, NotAnObject

if TYPE_CHECKING:
    from .profile import ModelProfile

F = TypeVar("F", bound=Callable[..., None])

STATUS = "Exit status: 0 done, 1 failed verification or a typed error, 2 wrong command, 130 interrupted."

app = typer.Typer(
    name="cachegen",
    help="Look into CacheGen's objects and profiles, check them, and calibrate codecs for a model.",
    epilog=f"{STATUS} To measure codecs: cachegen-bench.",
    no_args_is_help=True,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    add_completion=False,
)


class OutputFormat(str, Enum):
    """How a result is printed."""

    TERMINAL = "terminal"
    JSON = "json"


Format = Annotated[OutputFormat, typer.Option("--format", help="Tables for people, or one JSON document.")]
Output = Annotated[Path | None, typer.Option("--output", help="Write the JSON document to this file too.")]
Quiet = Annotated[bool, typer.Option("-q", "--quiet", help="No tables, no progress bar.")]
InFile = Annotated[Path, typer.Argument(exists=True, dir_okay=False, metavar="FILE", show_default=False)]
InFiles = Annotated[list[Path], typer.Argument(exists=True, dir_okay=False, metavar="FILE", show_default=False)]


def main() -> None:
    """Entry point."""
    app(prog_name="cachegen")


def _guarded(verb: F) -> F:
    """Typed errors as one line, Ctrl-C without a traceback."""

    @functools.wraps(verb)
    def run(*args: Any, **kwargs: Any) -> None:
        try:
            verb(*args, **kwargs)
        except CacheGenError as error:
            _complain(str(error))
            raise typer.Exit(1) from None
        except KeyboardInterrupt:
            _complain("interrupted")
            raise typer.Exit(130) from None

    return run  # type: ignore[return-value]


def _complain(message: str) -> None:
    console = Console(stderr=True)
    console.print("[bold red]error:[/]", end=" ")
    console.print(" ".join(message.split()), markup=False, highlight=False, soft_wrap=True)


def _finish(
    document: Any, format: OutputFormat, output: Path | None, quiet: bool, show: Callable[[Console], None]
) -> None:
    """Write and print a verb's result."""
    text = json.dumps(document, indent=1, allow_nan=False) + "\n"
    if output is not None:
        try:
            output.write_text(text, encoding="utf-8")
        except OSError as error:
            raise InputError(f"--output: expected a file that can be written; {output}: {error.strerror}") from error
    if format is OutputFormat.JSON:
        typer.echo(text, nl=False)
    elif not quiet:
        show(Console())


# ---------------------------------------------------------------------- inspect
@app.command(epilog=STATUS)
@_guarded
def inspect(
    file: InFile,
    groups: Annotated[bool, typer.Option("--groups", help="List every group too.")] = False,
    format: Format = OutputFormat.TERMINAL,
    output: Output = None,
    quiet: Quiet = False,
) -> None:
    """Say what an object (.kvc) or a profile holds. Only an object's head is read and verified.

    Which codec wrote it, for which model, which tokens and positions; where its bytes go; what each level costs and
    what loss it states. Token ids are counted, never shown: they are the prompt.

    **Example:** `cachegen inspect context.kvc --groups`
    """
    from .container import HEAD_READ, ObjectReader
    from .inspection import describe

    with _reading(file), file.open("rb") as source:
        head = source.read(HEAD_READ)
        try:
            need = ObjectReader.size_of_head(head)
        except NotAnObject:
            profile = _profile(file)
            if profile is None:
                raise
            found = _profile_document(profile)
            _finish(found, format, output, quiet, functools.partial(_show_profile, found))
            return
        if need > len(head):
            head += source.read(need - len(head))
    described = {"kind": "object", **describe(ObjectReader(head))}
    _finish(described, format, output, quiet, functools.partial(_show_object, described, groups))


@contextmanager
def _reading(file: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise InputError(f"expected a file that can be read; {file}: {error.strerror}") from error


def _profile(file: Path) -> ModelProfile | None:
    """The profile in a file, or None if it holds something else."""
    from .profile import ModelProfile

    try:
        return ModelProfile.load(file)
    except FormatError:
        return None


def _show_object(found: Mapping[str, Any], groups: bool, console: Console) -> None:
    facts = _facts(found["codec"])
    kinds = ", ".join(f"{run['layers']} {run['kind']}" for run in found["layer_kinds"])
    rows = {
        "model": f"{found['model_type']}, {found['dtype']}, {found['layers']} layers ({kinds})",
        "KV heads": f"{found['head_range'][0]}..{found['head_range'][1]} of {found['kv_heads']}",
        "tokens": f"{found['tokens']}, at positions {_ranges(found['positions'])}",
        "token ids": f"{found['token_ids']} held" if found["token_ids"] else "not held",
        "token digest": found["token_digest"] or "none",
        "fingerprint": found["fingerprint"],
        "profile": found["profile"] or "none needed",
        "lineage": json.dumps(found["lineage"]) if found["lineage"] else "exact KV",
        "bytes": f"{found['bytes']:,} of {found['raw_bytes']:,} raw",
        "of these": ", ".join(f"{name.replace('_', ' ')} {size:,}" for name, size in found["parts"].items()),
    }
    for name, value in rows.items():
        facts.add_row(name, value)
    console.print(facts)
    levels = Table(title="levels")
    for column in ("level", "KL stated", "bytes to read", "bits/element", "ratio"):
        levels.add_column(column, justify="right")
    for level in found["levels"]:
        kl = level["predicted_kl"]
        levels.add_row(
            str(level["level"]),
            "unknown" if kl is None else f"{kl:.4g}",
            f"{level['bytes_to_read']:,}",
            _number(level["bits_per_element"]),
            _number(level["ratio"]),
        )
    console.print(levels)
    if groups:
        table = Table(title="groups")
        for column in ("layers", "heads", "tensors", "tokens", "codec", "bytes by level", "bits/element"):
            table.add_column(column)
        for group in found["groups"]:
            table.add_row(
                _ranges([group["layers"]]),
                _ranges([group["heads"]]),
                "+".join(group["names"]) or "state",
                "all" if group["tokens"] is None else _ranges([group["tokens"]]),
                group["codec"],
                " + ".join(f"{size:,}" for size in group["bytes"]),
                _number(group["bits_per_element"]),
            )
        console.print(table)


def _facts(title: str) -> Table:
    table = Table(title=title, show_header=False)
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    return table


def _ranges(ranges: list[list[int]]) -> str:
    shown = ", ".join(f"{start}..{stop}" for start, stop in ranges[:4])
    return shown if len(ranges) <= 4 else f"{shown}, ... ({len(ranges)} runs)"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


# ---------------------------------------------------------------------- verify
@app.command(epilog=STATUS)
@_guarded
def verify(
    files: InFiles,
    format: Format = OutputFormat.TERMINAL,
    output: Output = None,
    quiet: Quiet = False,
) -> None:
    """Check objects (.kvc) and profiles byte for byte: every checksum, every size, all padding.

    Needs neither the model nor a profile. The exit status is 1 if any file fails.

    **Example:** `cachegen verify kv-cache/objects/*/p-*`
    """
    rows = [_verified(file) for file in files]
    passed = all(row["ok"] for row in rows)

    def show(console: Console) -> None:
        for row in rows:
            verdict = "[green]ok[/]" if row["ok"] else "[bold red]FAILED[/]"
            console.print(verdict, end=" ")
            reason = "" if row["ok"] else f": {row['error']['message']}"
            console.print(f"{row['file']}{reason}", markup=False, highlight=False, soft_wrap=True)

    _finish({"ok": passed, "files": rows}, format, output, quiet, show)
    if not passed:
        raise typer.Exit(1)


def _verified(file: Path) -> dict[str, Any]:
    from .container import verify as verify_object
    from .profile import ModelProfile

    row: dict[str, Any] = {"file": str(file), "ok": True, "kind": "object"}
    try:
        with _reading(file):
            data = file.read_bytes()
        row["bytes"] = len(data)
        try:
            verify_object(data)
        except NotAnObject:
            if _profile(file) is None:
                raise
            ModelProfile.from_bytes(data)
            row["kind"] = "profile"
    except CacheGenError as error:
        row["ok"] = False
        row["error"] = {"code": error.code, "name": type(error).__name__, "message": str(error)}
    return row


# ---------------------------------------------------------------------- codecs
_TRAITS = {"embedded": "embedded", "unrotates": "moves", "exact": "exact", "needs_profile": "profile"}


@app.command(epilog=STATUS)
@_guarded
def codecs(
    format: Format = OutputFormat.TERMINAL,
    output: Output = None,
    quiet: Quiet = False,
) -> None:
    """List the codecs of this installation, those of other packages included.

    *embedded*: one object holds every level. *moves*: keys can be decoded at other positions for free. *exact*: every
    bit comes back, of any layer kind and dtype. *profile*: needs `cachegen calibrate` first.

    **Example:** `cachegen codecs --format json`
    """
    from .codecs import codec_ids

    rows = [_codec_row(codec_id) for codec_id in codec_ids()]

    def show(console: Console) -> None:
        table = Table()
        table.add_column("codec", no_wrap=True)
        for column in ("levels", "traits", "what it is"):
            table.add_column(column)
        for row in rows:
            if "error" in row:
                table.add_row(row["id"], "-", "-", f"can't be loaded: {row['error']}")
                continue
            levels = "by profile" if row["levels"] is None else f"{row['levels']}, default {row['default_level']}"
            traits = [word for flag, word in _TRAITS.items() if row[flag]]
            table.add_row(row["id"], levels, ", ".join(traits) or "-", row["about"])
        console.print(table)

    _finish(rows, format, output, quiet, show)


def _codec_row(codec_id: str) -> dict[str, Any]:
    from .codecs import codec_class, make_codec

    try:
        cls = codec_class(codec_id)
        codec = None if cls.needs_profile else make_codec(codec_id, {})
    except (CacheGenError, ImportError, AttributeError) as error:  # another package's; the others still list
        return {"id": codec_id, "error": str(error)}
    return {
        "id": codec_id,
        "about": (cls.__doc__ or "").strip().split("\n")[0],
        "levels": codec.num_levels if codec else None,
        "default_level": codec.default_level if codec else None,
        "kinds": sorted(kind.value for kind in cls.kinds),
        "embedded": cls.embedded,
        "unrotates": cls.unrotates,
        "exact": cls.exact,
        "needs_profile": cls.needs_profile,
        "class": f"{cls.__module__}.{cls.__qualname__}",
    }


# ---------------------------------------------------------------------- calibrate
@app.command(epilog=STATUS)
@_guarded
def calibrate(
    model: Annotated[Path, typer.Option("--model", exists=True, file_okay=False, help="A transformers folder.")],
    text: Annotated[list[Path], typer.Option("--text", exists=True, dir_okay=False, help="A text file (UTF-8).")],
    profile: Annotated[Path, typer.Option("--output", dir_okay=False, help="Where to write the profile.")],
    more: Annotated[
        list[Path] | None,
        typer.Argument(exists=True, dir_okay=False, metavar="FILE", help="More text files.", show_default=False),
    ] = None,
    codec: Annotated[str, typer.Option("--codec", help="The codec to calibrate for.")] = "cachegen",
    tokens: Annotated[int, typer.Option("--tokens", min=256, help="Tokens to learn and measure from.")] = 8192,
    chunk_size: Annotated[int, typer.Option("--chunk-size", min=1, help="Tokens in a chunk.")] = 256,
    seed: Annotated[int, typer.Option("--seed", help="Chooses the passages; same seed, same profile.")] = 0,
    option: Annotated[
        list[str] | None,
        typer.Option("--option", metavar="NAME=JSON", help="An option of the codec's, e.g. delta=false."),
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume/--restart", help="Go on from what an interrupted run left beside the output.")
    ] = True,
    format: Format = OutputFormat.TERMINAL,
    quiet: Quiet = False,
) -> None:
    """Learn what a codec needs to know of a model, from text, and measure every level on text held out.

    Takes text like that which the model will read; variety matters more than amount. Interrupted, the same command
    goes on where it stopped. At the end stands what was seen, and the ladder of levels: bits, and loss as KL in nats.

    **Example:** `cachegen calibrate --model models/my-model --text prose.txt code.py --output my-model.profile`
    """
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")  # transformers' own bars would break into this one
    from .calibrate import calibrate as learn

    options = _options(option or [])
    try:
        with _progress(quiet or format is OutputFormat.JSON) as progress:
            found = learn(
                model,
                [*text, *(more or [])],
                profile,
                codec=codec,
                tokens=tokens,
                seed=seed,
                chunk_size=chunk_size,
                options=options,
                progress=progress,
                resume=resume,
            )
    except KeyboardInterrupt:
        _complain("interrupted: finished stages are kept; run the same command to go on")
        raise typer.Exit(130) from None
    document = {"output": str(profile), **_profile_document(found)}
    _finish(document, format, None, quiet, functools.partial(_show_profile, document))


def _options(pairs: list[str]) -> dict[str, Any]:
    options: dict[str, Any] = {}
    for pair in pairs:
        name, equals, value = pair.partition("=")
        if not equals or not name:
            raise typer.BadParameter(f"--option: expected NAME=JSON, e.g. delta=false; got {pair!r}")
        try:
            options[name] = json.loads(value)
        except ValueError:
            options[name] = value
    return options


@contextmanager
def _progress(hidden: bool) -> Iterator[Callable[[str, int, int], None]]:
    """A bar on stderr for each stage."""
    bars = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=Console(stderr=True),
        disable=hidden,
    )
    stages: dict[str, Any] = {}

    def tell(stage: str, done: int, total: int) -> None:
        if stage not in stages:
            stages[stage] = bars.add_task(stage, total=total)
        bars.update(stages[stage], completed=done, total=total)

    with bars:
        yield tell


def _profile_document(profile: ModelProfile) -> dict[str, Any]:
    seen = profile.calibration
    return {
        "kind": "profile",
        "codec": profile.codec_id,
        "hash": profile.hash,
        "model_type": profile.spec.model_type,
        "layers": profile.spec.num_layers,
        "kv_heads": profile.spec.kv_heads,
        "weights": profile.fingerprint.weights,
        "array_bytes": profile.nbytes,
        "calibrated_on": {
            "texts": [{"name": name, "tokens": count} for name, count in seen.texts],
            "tokens": seen.tokens,
            "seed": seen.seed,
            "chunk_size": seen.chunk_size,
        },
        "ladder": [
            {"level": rung.level, "bits_per_element": rung.bits_per_element, "kl": rung.kl} for rung in profile.ladder
        ],
    }


def _show_profile(found: Mapping[str, Any], console: Console) -> None:
    facts = _facts(f"profile for {found['codec']}")
    seen = found["calibrated_on"]
    texts = ", ".join(f"{text['name']} ({text['tokens']:,})" for text in seen["texts"][:8])
    more = f", ... ({len(seen['texts'])} texts)" if len(seen["texts"]) > 8 else ""
    facts.add_row("model", f"{found['model_type']}, {found['layers']} layers, {found['kv_heads']} KV heads")
    facts.add_row("weights", found["weights"])
    facts.add_row("hash", found["hash"])
    facts.add_row("arrays", f"{found['array_bytes']:,} bytes")
    facts.add_row("saw", f"{seen['tokens']:,} tokens: {texts}{more}")
    facts.add_row("seed", f"{seen['seed']}, chunks of {seen['chunk_size']} tokens")
    if "output" in found:
        facts.add_row("written to", found["output"])
    console.print(facts)
    ladder = Table(title="ladder, measured on text held out")
    for column in ("level", "bits/element", "KL (nats)"):
        ladder.add_column(column, justify="right")
    for rung in found["ladder"]:
        kl = rung["kl"]
        ladder.add_row(
            str(rung["level"]), _number(rung["bits_per_element"]), "not measured" if kl is None else f"{kl:.4g}"
        )
    console.print(ladder)


if __name__ == "__main__":
    main()

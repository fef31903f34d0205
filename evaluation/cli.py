"""`cachegen-bench`: what the codecs lose, how small they make a cache, and how fast they are.

Each verb lives in a module of its own that has `command(app)`, which adds the verb to the typer app.
"""

from __future__ import annotations

import sys
from importlib import import_module

import typer
from rich.console import Console
from rich.markup import escape

from cachegen.errors import CacheGenError

VERBS = ("demo", "quality", "speed", "plot", "report")
"""Modules of this package with `command(app)`, in the order in which --help lists their verbs."""


def build() -> typer.Typer:
    """The typer app with every verb."""
    app = typer.Typer(
        name="cachegen-bench",
        help="Measure KV-cache codecs: quality against size, speed, and a demonstration on a real model.",
        no_args_is_help=True,
        rich_markup_mode="markdown",
        pretty_exceptions_enable=False,
        add_completion=False,
    )
    for name in VERBS:
        import_module(f"{__package__}.{name}").command(app)
    return app


def main() -> None:
    """Entry point. Typed errors become one line and exit status 1; Ctrl-C status 130."""
    try:
        build()()
    except CacheGenError as error:
        Console(stderr=True).print(f"[bold red]error:[/] {escape(str(error))}", highlight=False)
        sys.exit(1)
    except KeyboardInterrupt:
        Console(stderr=True).print("interrupted: finished rows are kept, run the same command to go on")
        sys.exit(130)


if __name__ == "__main__":
    main()

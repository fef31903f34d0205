"""`cachegen-bench`: what the codecs lose, how small they make a cache, and how fast they are.

Each verb lives in a module of its own that has `command(app)`, which adds the verb to the typer app.
"""

from __future__ import annotations

import sys
from importlib import import_module
from typing import Any

import typer
from rich.console import Console
from rich.markup import escape
from typer.core import TyperGroup

from cachegen.errors import CacheGenError

VERBS = ("demo", "quality", "speed", "plot", "report")
"""Modules of this package with `command(app)`, in the order in which --help lists their verbs."""


class Interruptible(TyperGroup):
    """Verbs that leave with status 130 when interrupted, and say how to go on."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            said = "interrupted: finished measurements are kept, the same command goes on from there"
            Console(stderr=True).print(said, highlight=False)
            raise typer.Exit(130) from None


def build() -> typer.Typer:
    """The typer app with every verb."""
    app = typer.Typer(
        name="cachegen-bench",
        cls=Interruptible,
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
    """Entry point. Typed errors become one line and exit status 1."""
    try:
        build()()
    except CacheGenError as error:
        Console(stderr=True).print(f"[bold red]error:[/] {escape(str(error))}", highlight=False)
        sys.exit(1)


if __name__ == "__main__":
    main()

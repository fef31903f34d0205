"""Remakes builtin_data.py, the built-in bank's integers: `python -m cachegen.entropy.make_builtin`. Needs scipy."""

from __future__ import annotations

import base64
import zlib
from collections.abc import Sequence
from pathlib import Path

from .tables import BUILTIN_ROUNDING, BUILTIN_SHAPES, BUILTIN_TABLES, Density, TableBank, builtin_sigma, density_bank

SHAPE_PARAMETERS = dict(zip(BUILTIN_SHAPES, (1.0, 1.4, 2.0), strict=True))
WIDTH = 100


def make(shape: str, indices: Sequence[int] = range(BUILTIN_TABLES)) -> TableBank:
    """The built-in bank of a shape (or some of its tables), computed anew."""
    sigmas = [builtin_sigma(i) for i in indices]
    return density_bank(Density.generalized_gaussian(SHAPE_PARAMETERS[shape]), sigmas, BUILTIN_ROUNDING)


def main() -> None:
    lines = [
        '"""The built-in banks: TableBank.to_bytes(), compressed, as text. Made by make_builtin.py; don\'t edit."""',
        "",
        "from __future__ import annotations",
        "",
        "BANKS: dict[str, tuple[str, ...]] = {",
    ]
    for shape in BUILTIN_SHAPES:
        text = base64.b85encode(zlib.compress(make(shape).to_bytes(), 9)).decode("ascii")
        lines.append(f'    "{shape}": (')
        lines += [f'        "{text[i : i + WIDTH]}",' for i in range(0, len(text), WIDTH)]
        lines.append("    ),")
    lines.append("}")
    Path(__file__).with_name("builtin_data.py").write_text("\n".join(lines) + "\n", encoding="ascii")


if __name__ == "__main__":
    main()

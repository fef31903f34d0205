"""Rotary position embedding as data: per-layer inverse frequencies, attention factor, rotary dim and pairing.

`Rope` is what a layer's keys were rotated with. `rotate` and `unrotate` move keys to and from positions;
`from_hf_config` reproduces transformers' own inverse frequencies bit for bit.
"""

from __future__ import annotations

import base64
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Rope:
    """A layer's rotation.

    Attributes:
        inv_freq: fp32 inverse frequencies, `rotary_dim / 2` of them, as used below `switch_at` tokens.
        attention_scaling: factor on cos and sin (YaRN, longrope); cached keys carry it.
        rotary_dim: leading dims of a head that rotate; the rest pass through.
        interleaved: pairs are (2i, 2i+1) (GPT-J) rather than (i, i + rotary_dim/2) (NeoX, Llama).
        kind: default, linear, dynamic, llama3, yarn, longrope ... for messages.
        switch_at: sequence length above which the frequencies change (dynamic, longrope); None if they never do.
        long_inv_freq: the frequencies above `switch_at`, where they are fixed (longrope); None where they depend on
            the length itself (dynamic).
    """

    inv_freq: tuple[float, ...]
    attention_scaling: float = 1.0
    rotary_dim: int = 0
    interleaved: bool = False
    kind: str = "default"
    switch_at: int | None = None
    long_inv_freq: tuple[float, ...] | None = None

    def to_json(self) -> dict[str, Any]:
        """JSON-able form; frequencies as base64 of little-endian fp32 (format.md, *Spec*)."""
        data: dict[str, Any] = {
            "inv_freq": _pack(self.inv_freq),
            "scaling": self.attention_scaling,
            "dim": self.rotary_dim,
            "kind": self.kind,
        }
        if self.interleaved:
            data["interleaved"] = True
        if self.switch_at is not None:
            data["switch_at"] = self.switch_at
        if self.long_inv_freq is not None:
            data["long_inv_freq"] = _pack(self.long_inv_freq)
        return data

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Rope:
        switch, long = data.get("switch_at"), data.get("long_inv_freq")
        return cls(
            inv_freq=_unpack(data["inv_freq"]),
            attention_scaling=float(data["scaling"]),
            rotary_dim=int(data["dim"]),
            interleaved=bool(data.get("interleaved", False)),
            kind=str(data["kind"]),
            switch_at=None if switch is None else int(switch),
            long_inv_freq=None if long is None else _unpack(long),
        )


def _pack(values: tuple[float, ...]) -> str:
    return base64.b64encode(np.asarray(values, dtype="<f4").tobytes()).decode("ascii")


def _unpack(text: str) -> tuple[float, ...]:
    return tuple(float(v) for v in np.frombuffer(base64.b64decode(text, validate=True), dtype="<f4"))

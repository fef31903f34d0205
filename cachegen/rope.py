"""Rotary position embedding as data: per-layer inverse frequencies, attention factor, rotary dim and pairing.

`Rope` is what a layer's keys were rotated with. `rotate`, `unrotate` and `move` take keys to, from and between
positions, `check_move` refuses moves that would change their frequencies, and `rope_from_hf` reads a transformers
config. A rotation (RoFormer, arXiv 2104.09864) turns each pair (a, b) of a head's rotary dims by position * frequency:

    a' = scaling * (a cos - b sin)        b' = scaling * (b cos + a sin)

The angle is an fp32 product, as engines compute it; its cosine and sine are taken in fp64 and kept in fp32. Arithmetic
on keys is fp32, rounded once to the keys' dtype.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .errors import FormatError, LimitExceeded, PositionError, ShapeError, UnsupportedModel, describe

MAX_ROTARY_DIM = 4096
MAX_SWITCH = 1 << 40
MAX_SCALING = 1 << 20
MAX_FREQUENCY = 1 << 10
BLOCK = 256
"""Tokens rotated at once: keeps each cached table small (128 KB at 128 rotary dims)."""
WORK = 1 << 18
"""Numbers rotated at once, at most, where there are many heads: 1 MB of fp32, and as much again of temporaries."""


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

    def __post_init__(self) -> None:
        # Frequencies are fp32 by definition; a value that isn't would not survive being written and read.
        object.__setattr__(self, "inv_freq", _fp32(self.inv_freq))
        if self.long_inv_freq is not None:
            object.__setattr__(self, "long_inv_freq", _fp32(self.long_inv_freq))
        # Every rotation looks its tables up by rope; the hash of all frequencies is worth keeping.
        fields = (self.inv_freq, self.attention_scaling, self.rotary_dim, self.interleaved, self.kind, self.switch_at)
        object.__setattr__(self, "_hash", hash((fields, self.long_inv_freq)))

    def __hash__(self) -> int:
        return int(self.__dict__["_hash"])

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
        """Inverse of `to_json`, for data that may be hostile.

        Raises:
            LimitExceeded: more dims than MAX_ROTARY_DIM; nothing was allocated for them.
            FormatError: anything else that no writer of this format makes.
        """
        if not isinstance(data, Mapping):
            raise FormatError(f"rope: expected an object; got {type(data).__name__}")
        unknown = set(data) - {"inv_freq", "scaling", "dim", "kind", "interleaved", "switch_at", "long_inv_freq"}
        if unknown:
            raise FormatError(f"rope: unknown fields {describe(sorted(map(str, unknown)))}")
        dim = _integer(data, "dim", 2, MAX_ROTARY_DIM)
        if dim % 2:
            raise FormatError(f"rope: dim must be even; got {dim}")
        scaling = data.get("scaling")
        if isinstance(scaling, bool) or not isinstance(scaling, (int, float)):
            raise FormatError(f"rope: scaling must be a number; got {scaling!r}")
        if not 1 / MAX_SCALING <= scaling <= MAX_SCALING:
            raise FormatError(f"rope: scaling must be a number within 1/{MAX_SCALING}..{MAX_SCALING}; got {scaling!r}")
        interleaved, kind = data.get("interleaved", False), data.get("kind")
        if not isinstance(interleaved, bool):
            raise FormatError(f"rope: interleaved must be true or false; got {interleaved!r}")
        if not isinstance(kind, str) or not 1 <= len(kind) <= 64:
            raise FormatError("rope: kind must be a string of 1 to 64 characters")
        switch = _integer(data, "switch_at", 0, MAX_SWITCH) if "switch_at" in data else None
        long = _unpack(data["long_inv_freq"], "long_inv_freq", dim // 2) if "long_inv_freq" in data else None
        if long is not None and switch is None:
            raise FormatError("rope: long_inv_freq needs switch_at")
        return cls(
            _unpack(data.get("inv_freq"), "inv_freq", dim // 2), float(scaling), dim, interleaved, kind, switch, long
        )

    def digest(self) -> str:
        """SHA-256 (hex) of `to_json` in canonical form: what fingerprints compare."""
        text = json.dumps(self.to_json(), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()


def _integer(data: Mapping[str, Any], name: str, low: int, high: int) -> int:
    value = data.get(name)
    if isinstance(value, bool) or not isinstance(value, int) or value < low:
        raise FormatError(f"rope: {name} must be an integer of at least {low}; got {value!r}")
    if value > high:
        raise LimitExceeded(f"rope: {name} must be at most {high}; got {value}")
    return value


def _fp32(values: tuple[float, ...]) -> tuple[float, ...]:
    return tuple(np.asarray(values, dtype=np.float32).tolist())


def _pack(values: tuple[float, ...]) -> str:
    return base64.b64encode(np.asarray(values, dtype="<f4").tobytes()).decode("ascii")


def _unpack(text: Any, name: str, count: int) -> tuple[float, ...]:
    if not isinstance(text, str) or len(text) != (count * 4 + 2) // 3 * 4:
        raise FormatError(f"rope: {name} must be the base64 of {count} fp32 numbers")
    try:
        raw = base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError) as error:
        raise FormatError(f"rope: {name} isn't base64: {error}") from error
    if len(raw) != count * 4:
        raise FormatError(f"rope: {name} must hold {count} fp32 numbers; got {len(raw)} bytes")
    values = np.frombuffer(raw, dtype="<f4")
    if not (np.abs(values) <= MAX_FREQUENCY).all():  # NaN isn't either
        raise FormatError(f"rope: {name} must hold numbers of at most {MAX_FREQUENCY}")
    return tuple(float(v) for v in values)


# --------------------------------------------------------------------------- rotating keys
def rotate(k: Tensor, positions: Tensor, rope: Rope | None, out: Tensor | None = None) -> Tensor:
    """Keys as an engine caches them at `positions`, from keys before RoPE.

    Positions at or above `rope.switch_at` take the long frequencies where those are fixed (longrope). For dynamic
    scaling, whose frequencies there depend on the length, the base ones are taken: `rotate` is the inverse of
    `unrotate` at any position, and `check_move` says where a key may go.

    Args:
        k: [tokens, heads, dim] in any floating dtype, any strides.
        positions: int64 [tokens], on any device.
        rope: the layer's rotation; None (the layer has none) copies.
        out: where to write: same shape, any floating dtype, may be `k` itself. Default: a new tensor like `k`.
    Returns:
        `out`: each pair within one rounding, at the pair's magnitude, of the exact rotation.
    Raises:
        ShapeError: shapes disagree, or `rope.rotary_dim` exceeds the head's dims.
    """
    return _apply(k, rope, out, positions, None)


def unrotate(k: Tensor, positions: Tensor, rope: Rope | None, out: Tensor | None = None) -> Tensor:
    """Keys before RoPE, from keys cached at `positions`; `attention_scaling` is divided away. See `rotate`."""
    return _apply(k, rope, out, None, positions)


def move(
    k: Tensor, from_positions: Tensor, to_positions: Tensor, rope: Rope | None, out: Tensor | None = None
) -> Tensor:
    """Keys cached at `from_positions` as they would be at `to_positions`: one rotation by the angles' difference.

    Args and shapes as in `rotate`. Raises PositionError where `check_move` does, ShapeError as `rotate`.
    """
    check_move(rope, from_positions, to_positions)
    return _apply(k, rope, out, to_positions, from_positions)


def check_move(rope: Rope | None, from_positions: Tensor, to_positions: Tensor) -> None:
    """Refuse moves between positions whose effective frequencies differ.

    Staying is always allowed. With dynamic scaling no token moves to or from `switch_at` and beyond; with longrope no
    token crosses it. A sequence longer than `switch_at` may have had *all* its keys rotated by the long frequencies,
    which positions can't tell: whoever moves chunks of such a model between sequences keeps to one side of the switch.

    Args:
        rope: the layer's rotation; None never refuses.
        from_positions: int64 [tokens], where the keys are.
        to_positions: int64 [tokens], where they go.
    Raises:
        PositionError: names the first token that can't move.
        ShapeError: the two differ in shape.
    """
    if from_positions.shape != to_positions.shape or from_positions.dim() != 1:
        raise ShapeError(
            f"positions: expected two int64 [tokens] of one length; got {list(from_positions.shape)} "
            f"and {list(to_positions.shape)}"
        )
    if rope is None or rope.switch_at is None:
        return
    source, target = from_positions.cpu(), to_positions.cpu()
    above, lands_above = source >= rope.switch_at, target >= rope.switch_at
    refused = (above | lands_above) if rope.long_inv_freq is None else (above != lands_above)
    refused &= source != target
    if bool(refused.any()):
        first = int(refused.nonzero()[0])
        raise PositionError(
            f"keys with {rope.kind} RoPE: expected to move within positions 0..{rope.switch_at - 1}, where frequencies "
            f"don't change; got a move from {int(source[first])} to {int(target[first])}. Recompute this chunk instead"
        )


def _apply(k: Tensor, rope: Rope | None, out: Tensor | None, to: Tensor | None, back: Tensor | None) -> Tensor:
    """Rotate `k` to positions `to` and back from positions `back`, either of them None."""
    if k.dim() != 3 or not k.is_floating_point():
        raise ShapeError(f"keys: expected floating [tokens, heads, dim]; got {k.dtype} {list(k.shape)}")
    for positions in (to, back):
        if positions is not None and tuple(positions.shape) != (k.shape[0],):
            raise ShapeError(f"positions: expected [{k.shape[0]}], one per token; got {list(positions.shape)}")
    if out is None:
        out = torch.empty_like(k)
    elif out.shape != k.shape:
        raise ShapeError(f"out: expected {list(k.shape)}; got {list(out.shape)}")
    if rope is None:
        return out.copy_(k)
    dim = rope.rotary_dim
    if dim > k.shape[2]:
        raise ShapeError(f"keys: expected at least {dim} dims, all of which rotate; got {k.shape[2]}")
    if rope.interleaved:
        first, second = slice(0, dim, 2), slice(1, dim, 2)
    else:
        first, second = slice(0, dim // 2), slice(dim // 2, dim)
    if dim < k.shape[2] and out is not k:
        out[:, :, dim:].copy_(k[:, :, dim:])
    heads = max(1, WORK // (BLOCK * dim))
    for start in range(0, k.shape[0], BLOCK):
        rows = slice(start, start + BLOCK)
        cos, sin = _tables(rope, _key(to, rows), _key(back, rows), k.device)
        for head in range(0, k.shape[1], heads):
            part = (rows, slice(head, head + heads), slice(0, dim))
            work = k[part].to(torch.float32, copy=True)  # whole heads: halves of them read at a third of the speed
            a, b = work[:, :, first], work[:, :, second]
            turned = (a * cos).addcmul_(b, sin, value=-1)
            b.mul_(cos).addcmul_(a, sin)
            a.copy_(turned)
            out[part].copy_(work)
    return out


def _key(positions: Tensor | None, rows: slice) -> bytes | None:
    if positions is None:
        return None
    block = positions[rows].to(device="cpu", dtype=torch.int64)
    return block.numpy().tobytes()


@lru_cache(maxsize=32)
def _tables(rope: Rope, to: bytes | None, back: bytes | None, device: torch.device) -> tuple[Tensor, Tensor]:
    """fp32 (cos, sin) [tokens, 1, rotary_dim / 2] of the turn from `back` to `to` (int64 bytes), scaling included."""
    angle, scale = 0.0, 1.0
    if to is not None:
        angle, scale = _angles(rope, to), rope.attention_scaling
    if back is not None:
        angle, scale = angle - _angles(rope, back), scale / rope.attention_scaling
    tables = []
    for values in (np.cos(angle), np.sin(angle)):
        tables.append(torch.from_numpy((values * scale).astype(np.float32)).unsqueeze(1).to(device))
    return tables[0], tables[1]


def _angles(rope: Rope, raw: bytes) -> Any:
    """fp64 [tokens, rotary_dim / 2]: the fp32 products of positions and frequencies."""
    positions = np.frombuffer(raw, dtype=np.int64)[:, None]
    inv_freq = np.asarray(rope.inv_freq, dtype=np.float32)[None, :]
    if rope.long_inv_freq is not None and rope.switch_at is not None:
        long = np.asarray(rope.long_inv_freq, dtype=np.float32)[None, :]
        inv_freq = np.where(positions >= rope.switch_at, long, inv_freq)
    return (positions.astype(np.float32) * inv_freq).astype(np.float64)


# --------------------------------------------------------------------------- transformers configs
def rope_from_hf(
    config: Any, layer_type: str | None = None, *, interleaved: bool = False, head_dim: int | None = None
) -> Rope | None:
    """The rotation of a transformers config, its inverse frequencies bit-equal to transformers' own.

    Reads `rope_parameters` (transformers 5, flat or by layer type), or `rope_theta`, `rope_scaling`,
    `rope_local_base_freq` (4), and the partial rotary factor wherever a family keeps it.

    Args:
        config: a `PretrainedConfig`, or any object with its attributes (a text config, not a multimodal one).
        layer_type: `full_attention`, `sliding_attention`: for families whose layers rotate differently (Gemma 3).
        interleaved: the family pairs dims (2i, 2i+1); configs don't say.
        head_dim: dims of the rotated part, where it isn't the config's head dim (latent attention).
    Returns:
        None if the layer type has no rotation.
    Raises:
        UnsupportedModel: an unknown `rope_type`, or a field missing or out of range; names it.
    """
    params = _parameters(config, layer_type)
    if params is None:
        return None
    kind = str(params.get("rope_type") or params.get("type") or "default")
    kind = {"su": "longrope"}.get(kind, kind)
    if kind not in _KINDS:
        raise UnsupportedModel(f"rope_type: expected one of {', '.join(sorted(_KINDS))}; got {kind!r}")
    try:
        return _KINDS[kind](_Reader(config, params, kind, interleaved, head_dim))
    except (TypeError, ValueError, ZeroDivisionError, OverflowError) as error:
        raise UnsupportedModel(f"rope parameters of kind {kind!r} can't be used: {params}: {error}") from error


def _parameters(config: Any, layer_type: str | None) -> Mapping[str, Any] | None:
    """The flat parameters that apply to a layer type, theta and partial factor filled in; None if it has none."""
    params = getattr(config, "rope_parameters", None)
    if params is None:
        params = getattr(config, "rope_scaling", None) or {}
        if layer_type == "sliding_attention" and getattr(config, "rope_local_base_freq", None) is not None:
            params = {"rope_theta": config.rope_local_base_freq}  # Gemma 3 as transformers 4 wrote it
    nested = [key for key, value in params.items() if isinstance(value, Mapping) or key == layer_type]
    if nested:
        wanted = layer_type if layer_type is not None else "full_attention"
        if wanted not in params:
            raise UnsupportedModel(f"rope_parameters: expected an entry {wanted!r}; got {describe(sorted(params))}")
        if params[wanted] is None:
            return None
        params = params[wanted]
    flat = {key: value for key, value in params.items() if value is not None}
    theta = getattr(config, "rope_theta", None) or getattr(config, "rotary_emb_base", None)
    flat.setdefault("rope_theta", 10000.0 if theta is None else theta)
    for name in ("partial_rotary_factor", "rotary_pct"):
        if getattr(config, name, None) is not None:
            flat.setdefault("partial_rotary_factor", getattr(config, name))
    return flat


class _Reader:
    """A config's RoPE fields, each checked as it is asked for."""

    def __init__(
        self, config: Any, params: Mapping[str, Any], kind: str, interleaved: bool, head_dim: int | None
    ) -> None:
        self.config, self.params, self.kind, self.interleaved = config, params, kind, interleaved
        self.base = self.number("rope_theta")
        self.head_dim = hf_head_dim(config) if head_dim is None else head_dim
        fixed = getattr(config, "rotary_dim", None)  # GPT-J, CodeGen
        self.dim = int(self.head_dim * float(params.get("partial_rotary_factor", 1.0))) if fixed is None else int(fixed)
        if not 2 <= self.dim <= self.head_dim or self.dim % 2:
            raise UnsupportedModel(f"rotary dims: expected even and within 2..{self.head_dim}; got {self.dim}")

    def number(self, name: str) -> Any:
        """A required positive number; kept as int or float, which transformers' arithmetic does too."""
        value = self.params.get(name)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < math.inf:
            raise UnsupportedModel(f"rope_parameters.{name}: expected a positive number; got {value!r}")
        return value

    def optional(self, name: str) -> Any:
        return None if self.params.get(name) is None else self.number(name)

    @property
    def max_positions(self) -> int:
        return _positive_int(self.config, "max_position_embeddings")

    @property
    def original_positions(self) -> int:
        """Length of pretraining: the config's own field first (Phi 3 keeps it there), then the parameters'."""
        if getattr(self.config, "original_max_position_embeddings", None) is not None:
            return _positive_int(self.config, "original_max_position_embeddings")
        return int(self.optional("original_max_position_embeddings") or self.max_positions)

    def exponents(self) -> Tensor:
        return torch.arange(0, self.dim, 2, dtype=torch.int64).to(torch.float32) / self.dim

    def plain(self, base: Any = None) -> Tensor:
        inv_freq: Tensor = 1.0 / ((self.base if base is None else base) ** self.exponents())
        return inv_freq

    def rope(
        self, inv_freq: Tensor, scaling: float = 1.0, switch: int | None = None, long: Tensor | None = None
    ) -> Rope:
        return Rope(
            inv_freq=tuple(inv_freq.tolist()),
            attention_scaling=float(scaling),
            rotary_dim=2 * inv_freq.shape[0],
            interleaved=self.interleaved,
            kind=self.kind,
            switch_at=switch,
            long_inv_freq=None if long is None else tuple(long.tolist()),
        )


def hf_head_dim(config: Any) -> int:
    """Numbers per head: the config's `head_dim`, else hidden size over heads (under any of their usual names)."""
    explicit = getattr(config, "head_dim", None)
    if explicit is not None:
        return int(explicit)
    for hidden, heads in (("hidden_size", "num_attention_heads"), ("n_embd", "n_head")):
        if getattr(config, hidden, None) and getattr(config, heads, None):
            return int(getattr(config, hidden)) // int(getattr(config, heads))
    raise UnsupportedModel("head_dim: expected it, or hidden_size and num_attention_heads, in the config; got neither")


def _positive_int(config: Any, name: str) -> int:
    value = getattr(config, name, None)
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise UnsupportedModel(f"{name}: expected a positive integer; got {value!r}")
    return value


def _default(read: _Reader) -> Rope:
    return read.rope(read.plain())


def _linear(read: _Reader) -> Rope:
    """Position interpolation (arXiv 2306.15595)."""
    return read.rope(read.plain() / read.number("factor"))


def _dynamic(read: _Reader) -> Rope:
    """Dynamic NTK: default up to `max_position_embeddings`, then a base that grows with the length."""
    read.number("factor")
    longest, factor = read.max_positions, read.params["factor"]
    # At this length the growth is factor - (factor - 1), which rounds to 1 only nearly: follow transformers' steps.
    base = read.base * ((factor * longest / longest) - (factor - 1)) ** (read.dim / (read.dim - 2))
    return read.rope(read.plain(base), switch=longest)


def _llama3(read: _Reader) -> Rope:
    """Llama 3.1: long wavelengths divided by the factor, a smooth ramp between."""
    inv_freq, factor, context = read.plain(), read.number("factor"), read.original_positions
    low, high = read.number("low_freq_factor"), read.number("high_freq_factor")
    longest, shortest = context / low, context / high
    wavelength = 2 * math.pi / inv_freq
    scaled = torch.where(wavelength > longest, inv_freq / factor, inv_freq)
    smooth = (context / wavelength - low) / (high - low)
    ramp = (1 - smooth) * scaled / factor + smooth * scaled
    between = ~(wavelength < shortest) * ~(wavelength > longest)
    return read.rope(torch.where(between, ramp, scaled))


def _yarn(read: _Reader) -> Rope:
    """YaRN (arXiv 2309.00071): interpolate slow dims, keep fast ones, a linear ramp between; scale attention."""
    dim, context = read.dim, read.original_positions
    factor = read.optional("factor") or read.max_positions / context
    slow, fast = read.optional("beta_slow") or 1, read.optional("beta_fast") or 32

    def magnitude(weight: float = 1) -> float:
        return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0

    scaling = read.optional("attention_factor")
    if scaling is None:
        one, other = read.params.get("mscale"), read.params.get("mscale_all_dim")
        scaling = float(magnitude(one) / magnitude(other)) if one and other else magnitude()

    def dims_at(rotations: float) -> float:
        return (dim * math.log(context / (rotations * 2 * math.pi))) / (2 * math.log(read.base))

    low, high = dims_at(fast), dims_at(slow)
    if read.params.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    if low == high:
        high += 0.001  # as transformers: no division by zero
    ramp = torch.clamp((torch.arange(dim // 2, dtype=torch.float32) - low) / (high - low), 0, 1)
    kept = 1 - ramp
    wavelengths = read.base ** read.exponents()
    inv_freq = 1.0 / (factor * wavelengths) * (1 - kept) + 1.0 / wavelengths * kept
    return read.rope(inv_freq, scaling)


def _longrope(read: _Reader) -> Rope:
    """LongRoPE (arXiv 2402.13753): a factor per dim, one set for short sequences and one for long."""
    context = read.original_positions
    factor = read.optional("factor") or read.max_positions / context
    scaling = read.optional("attention_factor")
    if scaling is None:
        scaling = 1.0 if factor <= 1.0 else math.sqrt(1 + math.log(factor) / math.log(context))
    sets = []
    for name in ("short_factor", "long_factor"):
        factors = read.params.get(name)
        if not isinstance(factors, (list, tuple)) or len(factors) != read.dim // 2:
            raise UnsupportedModel(f"rope_parameters.{name}: expected a list of {read.dim // 2} numbers")
        sets.append(1.0 / (torch.tensor(factors, dtype=torch.float32) * read.base ** read.exponents()))
    return read.rope(sets[0], scaling, context, sets[1])


def _proportional(read: _Reader) -> Rope:
    """Gemma 4: frequencies of the whole head, the last of them zero, so that only a share of the dims turns."""
    turning = int(float(read.params.get("partial_rotary_factor", 1.0)) * read.head_dim // 2)
    exponents = torch.arange(0, 2 * turning, 2, dtype=torch.int64).to(torch.float32) / read.head_dim
    still = torch.zeros(read.head_dim // 2 - turning, dtype=torch.float32)
    inv_freq = torch.cat((1.0 / (read.base**exponents), still)) / read.params.get("factor", 1.0)
    return read.rope(inv_freq)


_KINDS: dict[str, Callable[[_Reader], Rope]] = {
    "default": _default,
    "linear": _linear,
    "dynamic": _dynamic,
    "llama3": _llama3,
    "yarn": _yarn,
    "longrope": _longrope,
    "proportional": _proportional,
}

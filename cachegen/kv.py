"""The data model: what a KV cache is made of, and a chunk of one.

`KVSpec` describes a model's cache, layer by layer. `KVChunk` is a range of tokens of one sequence: one `LayerKV`
per layer, whose tensors are *views* of the engine's memory, `[tokens, heads, dim]`, in any strides whose last
dimension is contiguous. Keys in a chunk are as the engine holds them, that is after RoPE.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from enum import Enum
from typing import Any

import torch
from torch import Tensor

from .errors import (
    DeviceError,
    DtypeError,
    FingerprintMismatch,
    FormatError,
    InputError,
    LayoutError,
    LimitExceeded,
    RangeError,
    ShapeError,
)
from .rope import Rope

DTYPES: dict[str, torch.dtype] = {
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float32": torch.float32,
    "float8_e4m3fn": torch.float8_e4m3fn,
    "float8_e5m2": torch.float8_e5m2,
}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
FP8 = frozenset({"float8_e4m3fn", "float8_e5m2"})


class LayerKind(str, Enum):
    """What a layer's cache holds. Lossy codecs say which kinds they take; any other is carried by `lossless`."""

    ATTENTION = "attention"  # k [T, H, Dk], v [T, H, Dv]
    SLIDING = "sliding"  # the same, for the window's tokens only
    MLA = "mla"  # latent [T, 1, R], rope [T, 1, Dr]
    STATE = "state"  # any tensors, no token dimension (state-space models)


@dataclass(frozen=True)
class LayerSpec:
    """One layer of a model: its kind, the *model's* KV heads, dims and RoPE (None: no rotation)."""

    kind: LayerKind
    kv_heads: int
    k_dim: int
    v_dim: int
    rope: Rope | None = None
    window: int | None = None

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the layer's token tensors, in their order in the bitstream."""
        if self.kind is LayerKind.STATE:
            return ()
        return ("latent", "rope") if self.kind is LayerKind.MLA else ("k", "v")

    def dim(self, name: str) -> int:
        """Numbers per head and token of tensor `name`."""
        return self.k_dim if name in ("k", "latent") else self.v_dim


@dataclass(frozen=True)
class KVSpec:
    """What a model's KV cache looks like. `dtype` names the cache's element type (a key of DTYPES)."""

    model_type: str
    dtype: str
    layers: tuple[LayerSpec, ...]

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise DtypeError(f"cache dtype: expected one of {', '.join(DTYPES)}; got {self.dtype!r}")
        if not self.layers:
            raise ShapeError("a KVSpec needs at least one layer; got none")
        for i, layer in enumerate(self.layers):
            if layer.kind is not LayerKind.STATE and min(layer.kv_heads, layer.k_dim, layer.v_dim) < 1:
                raise ShapeError(
                    f"layer {i}: kv_heads, k_dim and v_dim must be positive; got "
                    f"{layer.kv_heads}, {layer.k_dim}, {layer.v_dim}"
                )

    @property
    def torch_dtype(self) -> torch.dtype:
        return DTYPES[self.dtype]

    @property
    def num_layers(self) -> int:
        return len(self.layers)

    @property
    def kv_heads(self) -> int:
        """KV heads of the model: the widest layer's (layers of one model nearly always agree); 1 if all are states."""
        return max(1, *(layer.kv_heads for layer in self.layers))

    def elements_per_token(self, head_range: tuple[int, int] | None = None) -> int:
        """Numbers of K and V (or latent) that one token adds to the cache."""
        total = 0
        for layer in self.layers:
            if layer.kind is not LayerKind.STATE:
                total += _heads(layer, head_range) * (layer.k_dim + layer.v_dim)
        return total

    def with_dtype(self, dtype: str) -> KVSpec:
        return replace(self, dtype=dtype)

    def differences(self, found: KVSpec) -> dict[str, tuple[Any, Any]]:
        """Fields in which `found` differs: name -> (expected, found); of the layers, the first that does."""
        fields: dict[str, tuple[Any, Any]] = {}
        for name in ("model_type", "dtype", "num_layers"):
            if getattr(self, name) != getattr(found, name):
                fields[name] = (getattr(self, name), getattr(found, name))
        for i, (want, got) in enumerate(zip(self.layers, found.layers, strict=False)):
            if want == got:
                continue
            for name in ("kind", "kv_heads", "k_dim", "v_dim", "window", "rope"):
                if getattr(want, name) != getattr(got, name):
                    fields[f"layer {i} {name}"] = (getattr(want, name), getattr(got, name))
            break
        return fields

    def check(self, found: KVSpec) -> None:
        """Raise FingerprintMismatch, field by field, unless both describe the same cache."""
        fields = self.differences(found)
        if fields:
            listed = "; ".join(f"{name}: expected {want}, got {got}" for name, (want, got) in fields.items())
            raise FingerprintMismatch(f"the cache isn't this model's: {listed}", fields)

    def to_json(self) -> dict[str, Any]:
        """JSON-able form; equal neighbours are written once, with a count (format.md, *Spec*)."""
        runs: list[dict[str, Any]] = []
        for layer in self.layers:
            entry: dict[str, Any] = {
                "kind": layer.kind.value,
                "heads": layer.kv_heads,
                "k_dim": layer.k_dim,
                "v_dim": layer.v_dim,
            }
            if layer.rope is not None:
                entry["rope"] = layer.rope.to_json()
            if layer.window is not None:
                entry["window"] = layer.window
            if runs and {k: v for k, v in runs[-1].items() if k != "count"} == entry:
                runs[-1]["count"] += 1
            else:
                runs.append({**entry, "count": 1})
        return {"model_type": self.model_type, "dtype": self.dtype, "layers": runs}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> KVSpec:
        """Inverse of `to_json`, for data that may be hostile; sizes are bounded by MAX_LAYERS, MAX_HEADS and MAX_DIM.

        Raises:
            LimitExceeded: a size beyond those bounds; nothing was allocated for it.
            FormatError: anything else that no writer of this format makes.
        """
        if not isinstance(data, Mapping) or not isinstance(data.get("layers"), (list, tuple)):
            raise FormatError("spec: expected an object with a list of layers")
        layers: list[LayerSpec] = []
        for run in data["layers"]:
            if not isinstance(run, Mapping):
                raise FormatError(f"spec: expected each entry of layers to be an object; got {type(run).__name__}")
            count = _integer(run, "count", 1, MAX_LAYERS - len(layers))
            layers.extend([_layer_from_json(run)] * count)
        model_type, dtype = data.get("model_type"), data.get("dtype")
        if not isinstance(model_type, str) or len(model_type) > 256 or not isinstance(dtype, str):
            raise FormatError("spec: model_type (of at most 256 characters) and dtype must be strings")
        try:
            return cls(model_type, dtype, tuple(layers))
        except InputError as error:
            raise FormatError(f"spec: {error.args[0]}") from error

    @classmethod
    def from_hf_config(cls, config: Any, dtype: str | torch.dtype | None = None) -> KVSpec:
        """The spec of a transformers model from its config (see `engines.hf_config`).

        Args:
            config: a `PretrainedConfig` (Llama, Qwen2/3, Mistral, Gemma 2/3, Phi, GPT-NeoX families).
            dtype: the cache's dtype where it isn't the config's.
        Raises:
            UnsupportedModel: the config describes a cache that can't be described here; says which field.
        """
        from .engines.hf_config import spec_from_config

        return spec_from_config(config, dtype)


MAX_LAYERS = 1024
MAX_HEADS = 1024
MAX_DIM = 1 << 16


def _integer(data: Mapping[str, Any], name: str, low: int, high: int) -> int:
    value = data.get(name)
    if isinstance(value, bool) or not isinstance(value, int) or value < low:
        raise FormatError(f"spec: {name} must be an integer of at least {low}; got {value!r}")
    if value > high:
        raise LimitExceeded(f"spec: {name} must be at most {high}; got {value}")
    return value


def _layer_from_json(run: Mapping[str, Any]) -> LayerSpec:
    kinds = {kind.value: kind for kind in LayerKind}
    if not isinstance(run.get("kind"), str) or run["kind"] not in kinds:
        raise FormatError(f"spec: kind must be one of {', '.join(kinds)}; got {run.get('kind')!r}")
    layer = LayerSpec(
        kind=kinds[run["kind"]],
        kv_heads=_integer(run, "heads", 0, MAX_HEADS),
        k_dim=_integer(run, "k_dim", 0, MAX_DIM),
        v_dim=_integer(run, "v_dim", 0, MAX_DIM),
        rope=None if run.get("rope") is None else Rope.from_json(run["rope"]),
        window=None if run.get("window") is None else _integer(run, "window", 1, 1 << 40),
    )
    rotated = layer.dim("rope" if layer.kind is LayerKind.MLA else "k")
    if layer.rope is not None and layer.rope.rotary_dim > rotated:
        raise FormatError(f"spec: {layer.rope.rotary_dim} dims can't rotate in heads of {rotated}")
    return layer


def _heads(layer: LayerSpec, head_range: tuple[int, int] | None) -> int:
    if head_range is None or layer.kind is LayerKind.MLA:
        return layer.kv_heads
    return min(head_range[1], layer.kv_heads) - min(head_range[0], layer.kv_heads)


@dataclass
class LayerKV:
    """One layer's tensors in a chunk: views `[tokens, heads, dim]` by name (`k`, `v`; `latent`, `rope`; or a state's).

    `tokens` is the half-open range of the chunk's tokens that the tensors hold (a sliding window may have dropped
    the first ones); None means all. `scales` holds the fp8 scale of a tensor: a float tensor that broadcasts over it.
    """

    kind: LayerKind
    tensors: dict[str, Tensor]
    tokens: tuple[int, int] | None = None
    scales: dict[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Lineage:
    """What a chunk's KV was computed on, if not on exact KV: the codec and level of the prefix, and its stated loss."""

    codec: str
    level: int
    predicted_kl: float | None = None

    def to_json(self) -> dict[str, Any]:
        return {"codec": self.codec, "level": self.level, "predicted_kl": self.predicted_kl}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Lineage:
        kl = data.get("predicted_kl")
        return cls(str(data["codec"]), int(data["level"]), None if kl is None else float(kl))


@dataclass
class KVChunk:
    """A token range of one sequence.

    Attributes:
        spec: the model's cache.
        positions: int64 [T], the tokens' absolute positions (K is rotated to them).
        layers: one LayerKV per layer of the spec.
        head_range: which of the model's KV heads the tensors hold (a tensor-parallel rank holds some).
        token_ids: int64 [T] or None where the caller doesn't know them.
        previous_ids: the ids just before the chunk (up to two), for codecs that predict from tokens.
        lineage: set if the chunk was computed on top of a lossy prefix.
    """

    spec: KVSpec
    positions: Tensor
    layers: list[LayerKV]
    head_range: tuple[int, int] | None = None
    token_ids: Tensor | None = None
    previous_ids: tuple[int, ...] = ()
    lineage: Lineage | None = None

    def __post_init__(self) -> None:
        if self.head_range is None:
            self.head_range = (0, self.spec.kv_heads)
        self.positions = torch.as_tensor(self.positions, dtype=torch.int64)
        if self.token_ids is not None:
            self.token_ids = torch.as_tensor(self.token_ids, dtype=torch.int64)
        self.validate()

    @property
    def num_tokens(self) -> int:
        return int(self.positions.shape[0])

    @property
    def heads(self) -> tuple[int, int]:
        """The head range, never None."""
        assert self.head_range is not None
        return self.head_range

    def layer_tokens(self, layer: int) -> tuple[int, int]:
        """The half-open range of the chunk's tokens that layer `layer` holds."""
        return self.layers[layer].tokens or (0, self.num_tokens)

    def layer_heads(self, layer: int) -> int:
        """Heads of the layer's tensors in this chunk."""
        return _heads(self.spec.layers[layer], self.heads)

    @property
    def elements(self) -> int:
        """Numbers of K and V that the engine holds for this chunk (definitions: *element*)."""
        return sum(t.numel() for layer in self.layers for t in layer.tensors.values())

    @property
    def nbytes(self) -> int:
        """Bytes of those numbers in the engine's memory."""
        return sum(t.numel() * t.element_size() for layer in self.layers for t in layer.tensors.values())

    def tensors(self) -> Iterator[tuple[int, str, Tensor]]:
        """(layer, name, tensor) of every tensor, in the bitstream's order."""
        for i, layer in enumerate(self.layers):
            names = self.spec.layers[i].names or tuple(sorted(layer.tensors))
            for name in names:
                yield i, name, layer.tensors[name]

    def validate(self) -> None:
        """Check every tensor against the spec. Raises Shape-, Dtype-, Device-, Layout- or RangeError."""
        spec, tokens = self.spec, self.positions.shape[0] if self.positions.dim() == 1 else -1
        if tokens < 1:
            raise ShapeError(f"positions: expected int64 [tokens >= 1]; got shape {tuple(self.positions.shape)}")
        if int(self.positions.min()) < 0:
            raise RangeError(f"positions: expected >= 0; got {int(self.positions.min())}")
        if self.token_ids is not None and tuple(self.token_ids.shape) != (tokens,):
            raise ShapeError(f"token_ids: expected [{tokens}], one per position; got {tuple(self.token_ids.shape)}")
        first, last = self.heads
        if not 0 <= first < last <= spec.kv_heads:
            raise RangeError(f"head_range: expected within 0..{spec.kv_heads} and not empty; got {self.heads}")
        if len(self.layers) != spec.num_layers:
            raise ShapeError(f"layers: the spec has {spec.num_layers}; got {len(self.layers)}")
        for i, layer in enumerate(self.layers):
            self._validate_layer(i, layer, tokens)

    def _validate_layer(self, i: int, layer: LayerKV, tokens: int) -> None:
        want = self.spec.layers[i]
        if layer.kind is not want.kind:
            raise ShapeError(f"layer {i}: the spec says {want.kind.value}; got {layer.kind.value}")
        if want.kind is not LayerKind.STATE and tuple(sorted(layer.tensors)) != tuple(sorted(want.names)):
            raise ShapeError(f"layer {i}: expected tensors {want.names}; got {tuple(layer.tensors)}")
        start, stop = layer.tokens or (0, tokens)
        if not 0 <= start <= stop <= tokens:
            raise RangeError(f"layer {i}: token range must lie in 0..{tokens}; got {(start, stop)}")
        for name, tensor in layer.tensors.items():
            where = f"layer {i} {name}"
            if tensor.dtype not in DTYPE_NAMES:
                raise DtypeError(f"{where}: expected one of {', '.join(DTYPES)}; got {tensor.dtype}")
            if want.kind is LayerKind.STATE:
                continue
            if DTYPE_NAMES[tensor.dtype] != self.spec.dtype:
                raise DtypeError(
                    f"{where}: the spec says {self.spec.dtype}; got {tensor.dtype}. Convert the cache, "
                    f"or pass spec.with_dtype({DTYPE_NAMES[tensor.dtype]!r})"
                )
            if tensor.device.type not in ("cpu", "cuda"):
                raise DeviceError(f"{where}: expected a cpu or cuda tensor; got {tensor.device}")
            shape = (stop - start, self.layer_heads(i), want.dim(name))
            if tuple(tensor.shape) != shape:
                raise ShapeError(f"{where}: expected [tokens, heads, dim] = {list(shape)}; got {list(tensor.shape)}")
            if tensor.shape[2] > 1 and tensor.stride(2) != 1:
                raise LayoutError(f"{where}: the last dimension must be contiguous; got strides {tensor.stride()}")

    def cpu(self) -> KVChunk:
        """The chunk with its tensors on the CPU and out of autograd's sight (itself where they are already)."""
        if all(tensor.device.type == "cpu" and not tensor.requires_grad for _, _, tensor in self.tensors()):
            return self
        layers = [
            LayerKV(
                layer.kind,
                {name: tensor.detach().cpu() for name, tensor in layer.tensors.items()},
                layer.tokens,
                {name: scale.detach().cpu() for name, scale in layer.scales.items()},
            )
            for layer in self.layers
        ]
        return replace(self, layers=layers)

    def slice(self, start: int, stop: int) -> KVChunk:
        """Tokens start..stop as a chunk of its own (views, no copy). States can't be sliced and are refused."""
        if not 0 <= start < stop <= self.num_tokens:
            raise RangeError(f"slice: expected within 0..{self.num_tokens}; got {start}..{stop}")
        layers = []
        for i, layer in enumerate(self.layers):
            if layer.kind is LayerKind.STATE:
                raise RangeError(f"layer {i} holds a state, which has no tokens to slice")
            first, last = self.layer_tokens(i)
            a = min(max(start, first), stop)  # a range before the window holds none of its tokens
            b = max(min(stop, last), a)
            tensors = {n: t[a - first : b - first] for n, t in layer.tensors.items()}
            tokens = None if (a, b) == (start, stop) else (a - start, b - start)
            scales = {
                n: s[a - first : b - first] if s.dim() == 3 and s.shape[0] == last - first and s.shape[0] > 1 else s
                for n, s in layer.scales.items()
            }
            layers.append(LayerKV(layer.kind, tensors, tokens, scales))
        before = self.previous_ids
        if self.token_ids is not None and start > 0:
            before = tuple(int(t) for t in self.token_ids[max(0, start - 2) : start])
            before = (self.previous_ids + before)[-2:]
        ids = None if self.token_ids is None else self.token_ids[start:stop]
        return KVChunk(self.spec, self.positions[start:stop], layers, self.head_range, ids, before, self.lineage)

    @classmethod
    def empty(
        cls,
        spec: KVSpec,
        positions: Tensor,
        head_range: tuple[int, int] | None = None,
        token_ids: Tensor | None = None,
        device: torch.device | str = "cpu",
    ) -> KVChunk:
        """A chunk of uninitialised, contiguous memory for attention-like layers: a decoder's default `out`."""
        positions = torch.as_tensor(positions, dtype=torch.int64)
        layers = []
        for want in spec.layers:
            shape = (positions.shape[0], _heads(want, head_range))
            tensors = {
                name: torch.empty(*shape, want.dim(name), dtype=spec.torch_dtype, device=device) for name in want.names
            }
            layers.append(LayerKV(want.kind, tensors))
        return cls(spec, positions, layers, head_range, token_ids)

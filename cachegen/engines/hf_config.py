"""What a model's cache looks like, from its transformers config. Imports no transformers.

Configs don't say how a family pairs the dims it rotates, nor which of its layers rotate, so families are listed here;
tests hold each against the model transformers builds.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from ..errors import DtypeError, FormatError, MissingExtra, StoreUnavailable, UnsupportedModel, describe
from ..kv import DTYPE_NAMES, DTYPES, MAX_LAYERS, KVSpec, LayerKind, LayerSpec
from ..rope import Rope, hf_head_dim, rope_from_hf

_HALF = [
    "arcee",
    "exaone4",
    "gemma",
    "gemma2",
    "gemma3_text",
    "gemma3",
    "gpt_neox",
    "gpt_oss",
    "granite",
    "granitemoe",
    "llama",
    "ministral",
    "mistral",
    "mixtral",
    "olmo",
    "olmo2",
    "olmo3",
    "olmoe",
    "phi",
    "phi3",
    "qwen2",
    "qwen2_moe",
    "qwen3",
    "qwen3_moe",
    "seed_oss",
    "smollm3",
    "stablelm",
    "starcoder2",
]
_INTERLEAVED = ["cohere", "cohere2", "ernie4_5", "glm", "glm4", "helium"]
_LATENT = {"deepseek_v2": True, "deepseek_v3": False}
"""Families with latent attention -> whether the cached rope part is interleaved (V3 sorts its pairs into halves)."""
_STATES = ["mamba", "mamba2", "falcon_mamba"]
_UNROTATED = ["jamba"]
FAMILIES = tuple(sorted({*_HALF, *_INTERLEAVED, *_LATENT, *_STATES, *_UNROTATED}))
"""Every `model_type` (of a text config) that `spec_from_config` takes."""

_KINDS = {
    "full_attention": LayerKind.ATTENTION,
    "attention": LayerKind.ATTENTION,
    "sliding_attention": LayerKind.SLIDING,
    "linear_attention": LayerKind.STATE,
    "mamba": LayerKind.STATE,
    "conv": LayerKind.STATE,
}


class RawConfig:
    """A config.json with attributes, for where transformers isn't installed: no defaults but the file's."""

    def __init__(self, data: Mapping[str, Any]) -> None:
        self.__dict__.update({str(key): value for key, value in data.items()})
        if isinstance(data.get("text_config"), Mapping):
            self.text_config = RawConfig(data["text_config"])


def load_config(folder: Path | str) -> Any:
    """The config of a model's folder: its config.json, or where there is none, that of its first GGUF file.

    transformers 5 writes every field, so that its files are read as they are; older files lean on defaults of the
    model's class and are read by transformers where it is installed.

    Raises:
        StoreUnavailable: no readable config.json or GGUF file there.
        FormatError: it isn't JSON with a `model_type`.
        MissingExtra: a GGUF file, and transformers isn't installed.
        UnsupportedModel: transformers can't read it.
    """
    path = Path(folder) / "config.json"
    ggufs = sorted(Path(folder).glob("*.gguf"))
    if ggufs and not path.exists():
        if find_spec("transformers") is None:
            raise MissingExtra("GGUF files: expected transformers: pip install 'cachegen[transformers]'")
        return _auto_config(folder, gguf_file=ggufs[0].name)
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise StoreUnavailable(f"model folder: expected a readable {path}: {error.strerror or error}") from error
    except ValueError as error:
        raise FormatError(f"{path}: expected JSON: {error}") from error
    if not isinstance(data, dict) or not isinstance(data.get("model_type"), str):
        raise FormatError(f"{path}: expected an object with a model_type")
    written_by = str(data.get("transformers_version") or "0").partition(".")[0]
    if (written_by.isdigit() and int(written_by) >= 5) or find_spec("transformers") is None:
        return RawConfig(data)
    return _auto_config(folder)


def _auto_config(folder: Path | str, **kwargs: Any) -> Any:
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(str(folder), local_files_only=True, **kwargs)
    except ValueError as error:
        raise UnsupportedModel(f"{folder}: transformers can't read its config: {error}") from error


def text_config(config: Any) -> Any:
    """The language model's part of a config (itself where it isn't multimodal)."""
    nested = getattr(config, "text_config", None)
    if nested is None:
        return config
    return RawConfig(nested) if isinstance(nested, Mapping) else nested


def spec_from_config(config: Any, dtype: str | torch.dtype | None = None) -> KVSpec:
    """The spec of a model's cache, as transformers keeps it.

    Other engines keep the same numbers, with one exception among these families: vLLM leaves the rope part of
    DeepSeek-V3's latent cache interleaved, so that its specs need `interleaved=True` in the layers' ropes.

    Args:
        config: a `PretrainedConfig`, a `RawConfig` or the mapping of a config.json; multimodal ones by their text part.
        dtype: the cache's dtype where it isn't the config's.
    Raises:
        UnsupportedModel: a family or a cache that can't be described; names the config's field.
        DtypeError: no known dtype.
    """
    if isinstance(config, Mapping):
        config = RawConfig(config)
    text = text_config(config)
    family = str(getattr(text, "model_type", None))
    if family not in FAMILIES:
        raise UnsupportedModel(
            f"model_type: expected one of {', '.join(FAMILIES)}; got {family!r}. For others, build a KVSpec by hand"
        )
    for field, why in (
        ("is_encoder_decoder", "decoders only"),
        ("kv_sharing_modes", "a cache per layer"),
        ("num_kv_shared_layers", "a cache per layer"),
    ):
        if getattr(text, field, None):
            raise UnsupportedModel(f"{field}: this package describes {why}; got {getattr(text, field)!r}")
    count = _positive(text, "num_hidden_layers")
    if count > MAX_LAYERS:
        raise UnsupportedModel(f"num_hidden_layers: expected at most {MAX_LAYERS}; got {count}")
    types = _layer_types(text, family, count)
    ropes = {kind: _rope(text, family, kind) for kind in set(types)}
    layers = tuple(_layer(text, family, i, kind, ropes[kind]) for i, kind in enumerate(types))
    return KVSpec(family, _dtype_name(dtype, text, config), layers)


def _layer_types(config: Any, family: str, count: int) -> list[str]:
    """`layer_types`, or what transformers infers where the config has none."""
    if family in _STATES:
        return ["linear_attention"] * count
    types = getattr(config, "layer_types", None) or getattr(config, "layers_block_type", None)
    if types is None:
        types = _inferred_types(config, family, count)
    if len(types) != count:
        raise UnsupportedModel(f"layer_types: expected {count}, as num_hidden_layers says; got {len(types)}")
    unknown = sorted({str(t) for t in types} - set(_KINDS))
    if unknown:
        raise UnsupportedModel(f"layer_types: expected among {', '.join(_KINDS)}; got {describe(unknown)}")
    return [str(t) for t in types]


def _inferred_types(config: Any, family: str, count: int) -> list[str]:
    full, sliding = "full_attention", "sliding_attention"
    period = getattr(config, "attn_layer_period", None)
    if period:
        offset = int(getattr(config, "attn_layer_offset", 0))
        return [full if i % int(period) == offset else "linear_attention" for i in range(count)]
    if not getattr(config, "sliding_window", None) or getattr(config, "use_sliding_window", None) is False:
        return [full] * count
    if family == "gemma2":
        return [sliding if i % 2 == 0 else full for i in range(count)]
    pattern = getattr(config, "sliding_window_pattern", None) or getattr(config, "_sliding_window_pattern", None)
    if pattern or family in ("gemma3", "gemma3_text", "cohere2"):
        every = int(pattern or (4 if family == "cohere2" else 6))
        return [full if (i + 1) % every == 0 else sliding for i in range(count)]
    first = int(getattr(config, "max_window_layers", 0)) if getattr(config, "use_sliding_window", False) else 0
    return [sliding if i >= first else full for i in range(count)]


def _rope(config: Any, family: str, layer_type: str) -> Rope | None:
    """The rotation of a layer type; None for layers that never rotate."""
    if _KINDS[layer_type] is LayerKind.STATE or family in _UNROTATED:
        return None
    if family == "cohere2" and layer_type != "sliding_attention":
        return None
    if family == "exaone4" and getattr(config, "sliding_window", None) and layer_type != "sliding_attention":
        return None
    if family in _LATENT:
        rope_dim = _positive(config, "qk_rope_head_dim")
        return rope_from_hf(config, layer_type, interleaved=_LATENT[family], head_dim=rope_dim)
    return rope_from_hf(config, layer_type, interleaved=family in _INTERLEAVED)


def _layer(config: Any, family: str, index: int, layer_type: str, rope: Rope | None) -> LayerSpec:
    kind = _KINDS[layer_type]
    if kind is LayerKind.STATE:
        return LayerSpec(kind, 0, 0, 0)
    rotated = getattr(config, "no_rope_layers", None)  # SmolLM3: 1 where a layer rotates
    if rotated is not None and not rotated[index]:
        rope = None
    if family in _LATENT:
        return LayerSpec(
            LayerKind.MLA, 1, _positive(config, "kv_lora_rank"), _positive(config, "qk_rope_head_dim"), rope
        )
    window = _positive(config, "sliding_window") if kind is LayerKind.SLIDING else None
    heads = _positive(config, "num_attention_heads")
    if getattr(config, "num_key_value_heads", None) is not None:
        heads = _positive(config, "num_key_value_heads")
    dim = hf_head_dim(config)
    return LayerSpec(kind, heads, dim, dim, rope, window)


def _positive(config: Any, name: str) -> int:
    value = getattr(config, name, None)
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise UnsupportedModel(f"{name}: expected a positive integer in the config; got {value!r}")
    return value


def _dtype_name(dtype: str | torch.dtype | None, *configs: Any) -> str:
    """A key of DTYPES, from the argument or the first config that states one."""
    for config in configs:
        for name in ("dtype", "torch_dtype"):
            if dtype is None:
                dtype = getattr(config, name, None)
    if dtype is None:
        raise DtypeError("dtype: the config names none; pass the cache's, e.g. dtype='bfloat16'")
    name = DTYPE_NAMES.get(dtype, str(dtype)) if isinstance(dtype, torch.dtype) else str(dtype).removeprefix("torch.")
    if name not in DTYPES:
        raise DtypeError(f"dtype: expected one of {', '.join(DTYPES)}; got {name!r}")
    return name

"""Specs from transformers configs, held against tiny models of every family: what the cache really looks like."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch

from cachegen.engines.hf_config import FAMILIES, RawConfig, load_config, spec_from_config
from cachegen.engines.transformers import cache_keyword, chunk_from_cache
from cachegen.errors import DtypeError, FormatError, StoreUnavailable, UnsupportedModel
from cachegen.kv import KVSpec, LayerKind
from cachegen.rope import unrotate

transformers = pytest.importorskip("transformers")

SMALL = {
    "hidden_size": 64,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 64,
    "pad_token_id": 0,
    "eos_token_id": 1,
    "bos_token_id": 1,
    "max_position_embeddings": 256,
}
WINDOW = {"sliding_window": 12, "layer_types": ["sliding_attention", "full_attention"] * 2}
EXPERTS = {"num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
LATENT = {
    "kv_lora_rank": 16,
    "q_lora_rank": None,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 16,
    "v_head_dim": 16,
    "num_key_value_heads": 4,
    "first_k_dense_replace": 4,
    "n_routed_experts": 4,
    "n_group": 1,
    "topk_group": 1,
    "moe_intermediate_size": 16,
}
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "original_max_position_embeddings": 128,
    "short_factor": [1.0 + i / 9 for i in range(8)],
    "long_factor": [3.0 + i for i in range(8)],
}
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 64}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "arcee": ("Arcee", {}),
    "cohere": ("Cohere", {}),
    "cohere2": ("Cohere2", WINDOW),
    "deepseek_v2": ("DeepseekV2", LATENT),
    "deepseek_v3": ("DeepseekV3", {**LATENT, "rope_parameters": {**YARN, "mscale": 1.0, "mscale_all_dim": 0.5}}),
    "ernie4_5": ("Ernie4_5", {"head_dim": 16}),
    "exaone4": ("Exaone4", WINDOW),
    "falcon_mamba": ("FalconMamba", {"state_size": 4}),
    "gemma": ("Gemma", {"head_dim": 16}),
    "gemma2": ("Gemma2", {"head_dim": 16, **WINDOW}),
    "gemma3_text": ("Gemma3", {"head_dim": 16, **WINDOW}),
    "glm": ("Glm", {"head_dim": 16}),
    "glm4": ("Glm4", {"head_dim": 16}),
    "gpt_neox": ("GPTNeoX", {"num_key_value_heads": None}),
    "gpt_oss": ("GptOss", {"head_dim": 16, **WINDOW, **EXPERTS, "rope_parameters": {**YARN, "truncate": False}}),
    "granite": ("Granite", {}),
    "granitemoe": ("GraniteMoe", EXPERTS),
    "helium": ("Helium", {"head_dim": 16}),
    "jamba": ("Jamba", {**EXPERTS, "attn_layer_period": 2, "attn_layer_offset": 0, "use_mamba_kernels": False}),
    "llama": ("Llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 5000.0, "factor": 2.0}}),
    "mamba": ("Mamba", {"state_size": 4}),
    "mamba2": ("Mamba2", {"state_size": 4, "num_heads": 4, "head_dim": 32, "n_groups": 1}),
    "ministral": ("Ministral", {"head_dim": 16, "sliding_window": 12}),
    "mistral": ("Mistral", {"sliding_window": 12}),
    "mixtral": ("Mixtral", {**EXPERTS, "sliding_window": None}),
    "olmo": ("Olmo", {}),
    "olmo2": ("Olmo2", {}),
    "olmo3": ("Olmo3", WINDOW),
    "olmoe": ("Olmoe", EXPERTS),
    "phi": ("Phi", {"rope_parameters": {"rope_theta": 10000.0, "partial_rotary_factor": 0.5}}),
    "phi3": ("Phi3", {"rope_parameters": LONGROPE, "original_max_position_embeddings": 128}),
    "qwen2": ("Qwen2", {"use_sliding_window": True, "max_window_layers": 2, "sliding_window": 12}),
    "qwen2_moe": ("Qwen2Moe", {**EXPERTS, "shared_expert_intermediate_size": 16}),
    "qwen3": ("Qwen3", {"head_dim": 24}),
    "qwen3_moe": ("Qwen3Moe", {**EXPERTS, "head_dim": 16}),
    "seed_oss": ("SeedOss", {"head_dim": 16}),
    "smollm3": ("SmolLM3", {"no_rope_layers": [1, 0, 1, 0]}),
    "stablelm": ("StableLm", {"rope_parameters": {"rope_theta": 10000.0, "partial_rotary_factor": 0.25}}),
    "starcoder2": ("Starcoder2", {"sliding_window": None}),
}
IDS = torch.tensor([5, 9, 3, 9, 22, 41, 5, 9, 3, 60, 9, 12, 5, 5, 31, 9])
"""Token 9 stands at 1, 3, 7, 10 and 15."""


def config_of(name: str) -> Any:
    cls, changes = MODELS[name]
    kind = f"{'Gemma3Text' if cls == 'Gemma3' else cls}Config"
    return getattr(transformers, kind)(**{**SMALL, **changes})


def model_of(name: str) -> Any:
    torch.manual_seed(0)
    return getattr(transformers, f"{MODELS[name][0]}ForCausalLM")(config_of(name)).eval().requires_grad_(False)


def cache_of(model: Any) -> Any:
    cache = transformers.DynamicCache(config=model.config)
    model(IDS[None], use_cache=True, **{cache_keyword(model): cache})
    return cache


def test_every_family_is_tested() -> None:
    assert sorted([*MODELS, "gemma3"]) == sorted(FAMILIES)


@pytest.mark.parametrize("name", MODELS)
def test_real_caches_fit_and_unrotate(name: str) -> None:
    """The spec takes the model's own cache; layer 0's keys, un-rotated, depend on their token alone."""
    model = model_of(name)
    spec = KVSpec.from_hf_config(model.config, "float32")
    assert spec.model_type == name
    chunk = chunk_from_cache(cache_of(model), spec, IDS)  # validates shapes, dtypes, kinds
    layer, want = chunk.layers[0], spec.layers[0]
    if want.kind is LayerKind.STATE:
        assert set(layer.tensors) <= {"conv.0", "recurrent.0"}
        return
    first, last = chunk.layer_tokens(0)
    tensor = layer.tensors["rope" if want.kind is LayerKind.MLA else "k"]
    nines = [t - first for t in range(first, last) if IDS[t] == 9]
    assert len(nines) >= 3
    plain = unrotate(tensor, torch.arange(first, last), want.rope)[nines]
    assert (plain - plain[:1]).abs().max() < 1e-5 * plain.abs().max()
    if want.rope is not None:  # and they did depend on the position before
        assert (tensor[nines] - tensor[nines][:1]).abs().max() > 1e-2 * plain.abs().max()
    values = layer.tensors["latent" if want.kind is LayerKind.MLA else "v"][nines]
    assert (values - values[:1]).abs().max() < 1e-5 * values.abs().max()


@pytest.mark.parametrize("name", ["cohere2", "exaone4", "gemma3_text", "smollm3"])
def test_layers_that_rotate_differently(name: str) -> None:
    """Layer 1 differs from layer 0 in these families. Its input is made position-free by a context of one token."""
    model = model_of(name)
    spec = KVSpec.from_hf_config(model.config, "float32")
    assert spec.layers[0].rope != spec.layers[1].rope
    token = torch.full((1, 10), 7)
    cache = transformers.DynamicCache(config=model.config)
    model(token, use_cache=True, **{cache_keyword(model): cache})
    tensor = chunk_from_cache(cache, spec).layers[1].tensors["k"]
    plain = unrotate(tensor, torch.arange(10), spec.layers[1].rope)
    assert (plain - plain[:1]).abs().max() < 1e-4 * plain.abs().max()


@pytest.mark.parametrize("name", MODELS)
def test_config_files_read_like_configs(name: str, tmp_path: Any) -> None:
    config = config_of(name)
    config.save_pretrained(tmp_path)
    loaded = load_config(tmp_path)
    assert isinstance(loaded, RawConfig)
    assert spec_from_config(loaded, "bfloat16") == spec_from_config(config, "bfloat16")


@pytest.mark.parametrize("name", ["llama", "gemma3_text", "deepseek_v3", "jamba", "gpt_oss"])
def test_specs_survive_json(name: str) -> None:
    spec = spec_from_config(config_of(name), "float16")
    assert KVSpec.from_json(spec.to_json()) == spec


@pytest.mark.parametrize("name", ["gemma2", "gemma3_text", "llama", "qwen2"])
def test_older_config_files_take_the_class_defaults(name: str, tmp_path: Any) -> None:
    """Files of transformers 4 leave out what their class fills in: rope_parameters, layer_types."""
    config = config_of(name)
    data = {key: value for key, value in config.to_dict().items() if key not in ("rope_parameters", "layer_types")}
    data.update(transformers_version="4.40.0", rope_theta=10000.0)
    (tmp_path / "config.json").write_text(json.dumps(data))
    loaded = load_config(tmp_path)
    assert isinstance(loaded, type(config))
    spec = spec_from_config(loaded, "bfloat16")
    assert len(spec.layers) == 4
    ropes = [layer.rope for layer in spec.layers]
    kinds = {layer.kind for layer in spec.layers}
    assert all(rope is not None for rope in ropes)
    assert (LayerKind.SLIDING in kinds) == (name != "llama")


def test_kinds_and_windows() -> None:
    qwen = spec_from_config(config_of("qwen2"), "bfloat16")
    assert [layer.window for layer in qwen.layers] == [None, None, 12, 12]
    gemma = spec_from_config(config_of("gemma3_text"), "bfloat16")
    assert [layer.kind.value for layer in gemma.layers] == ["sliding", "attention"] * 2
    latent = spec_from_config(config_of("deepseek_v3"), "bfloat16")
    assert (latent.layers[0].kv_heads, latent.layers[0].k_dim, latent.layers[0].v_dim) == (1, 16, 8)
    jamba = spec_from_config(config_of("jamba"), "bfloat16")
    assert [layer.kind.value for layer in jamba.layers] == ["attention", "state"] * 2
    assert {layer.rope for layer in jamba.layers} == {None}
    assert spec_from_config(config_of("mamba"), "bfloat16").kv_heads == 1
    phi = spec_from_config(config_of("phi3"), "bfloat16").layers[0].rope
    assert phi is not None
    assert (phi.kind, phi.switch_at, phi.rotary_dim) == ("longrope", 128, 16)


def test_layer_types_of_older_configs() -> None:
    """Before `layer_types`, each family had its own rule."""
    base = {**SMALL, "head_dim": 16, "rope_theta": 10000.0, "sliding_window": 12}
    rules = {
        "gemma2": ["sliding", "attention", "sliding", "attention"],
        "cohere2": ["sliding", "sliding", "sliding", "attention"],
        "gemma3_text": ["sliding"] * 4,
        "mistral": ["sliding"] * 4,
    }
    for family, kinds in rules.items():
        spec = spec_from_config({**base, "model_type": family}, "bfloat16")
        assert [layer.kind.value for layer in spec.layers] == kinds
    pattern = spec_from_config({**base, "model_type": "gemma3_text", "sliding_window_pattern": 2}, "bfloat16")
    assert [layer.kind.value for layer in pattern.layers] == ["sliding", "attention"] * 2
    off = {**base, "model_type": "qwen2", "use_sliding_window": False, "max_window_layers": 2}
    assert {layer.kind.value for layer in spec_from_config(off, "bfloat16").layers} == {"attention"}
    on = spec_from_config({**off, "use_sliding_window": True}, "bfloat16")
    assert [layer.kind.value for layer in on.layers] == ["attention", "attention", "sliding", "sliding"]
    jamba = {**base, "model_type": "jamba", "attn_layer_period": 4, "attn_layer_offset": 3}
    assert [layer.kind.value for layer in spec_from_config(jamba, "bfloat16").layers] == ["state"] * 3 + ["attention"]


def test_text_part_of_multimodal_configs() -> None:
    text = config_of("gemma3_text")
    spec = spec_from_config(text, "bfloat16")
    outer = transformers.Gemma3Config(text_config=text)
    assert spec_from_config(outer, "bfloat16") == spec
    assert spec_from_config({"model_type": "gemma3", "text_config": text.to_dict()}, "bfloat16") == spec


def test_dtypes_from_config_or_caller() -> None:
    config = config_of("llama")
    with pytest.raises(DtypeError, match="dtype="):
        spec_from_config(config)
    config.dtype = torch.bfloat16
    assert spec_from_config(config).dtype == "bfloat16"
    assert spec_from_config(config, torch.float16).dtype == "float16"
    assert spec_from_config({**SMALL, "model_type": "llama", "torch_dtype": "bfloat16"}).dtype == "bfloat16"
    with pytest.raises(DtypeError, match="int8"):
        spec_from_config(config, "int8")


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"model_type": "bert"}, "model_type"),
        ({"model_type": None}, "model_type"),
        ({"is_encoder_decoder": True}, "is_encoder_decoder"),
        ({"num_kv_shared_layers": 2}, "num_kv_shared_layers"),
        ({"num_hidden_layers": "4"}, "num_hidden_layers"),
        ({"num_hidden_layers": 1 << 20}, "num_hidden_layers"),
        ({"num_key_value_heads": 0}, "num_key_value_heads"),
        ({"layer_types": ["full_attention"]}, "layer_types"),
        ({"layer_types": ["full_attention", "wavelet"] * 2}, "layer_types"),
        ({"hidden_size": None}, "head_dim"),
        ({"layer_types": ["sliding_attention"] * 4, "sliding_window": None}, "sliding_window"),
    ],
)
def test_refusals_name_the_field(changes: dict[str, Any], field: str) -> None:
    with pytest.raises(UnsupportedModel, match=field):
        spec_from_config({**SMALL, "model_type": "llama", **changes}, "bfloat16")


def test_unreadable_folders(tmp_path: Any) -> None:
    with pytest.raises(StoreUnavailable, match=r"config\.json"):
        load_config(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(FormatError, match="JSON"):
        load_config(tmp_path)
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(FormatError, match="model_type"):
        load_config(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "no-such-model"}')
    with pytest.raises(UnsupportedModel, match="transformers can't read"):
        load_config(tmp_path)

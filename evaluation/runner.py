"""A model and its caches: prefill a context once, then go on from it with any version of its cache.

The model runs in fp32. `prefill` keeps its cache as computed; `engine_chunk` is that cache as an engine would hold it
(bf16), the reference that schemes encode; `cache_of` brings a chunk back into a cache that the model reads.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cachegen.engines.transformers import cache_from_chunks, cache_keyword, chunk_from_cache
from cachegen.errors import InputError
from cachegen.kv import KVChunk, KVSpec, LayerKind, LayerKV

from .models import load
from .tasks import Question

ENGINE_DTYPE = "bfloat16"


class Runner:
    """A causal language model in fp32, its tokenizer, and its cache's spec as an engine holds it (bf16).

    Attributes:
        spec: the engine's cache.
        device: where the model runs.
    """

    def __init__(self, model: Any, tokenizer: Any) -> None:
        self.model, self.tokenizer = model, tokenizer
        self.spec = KVSpec.from_hf_config(model.config, ENGINE_DTYPE)
        self.device = model.device

    @classmethod
    def load(cls, folder: Path, device: str = "cpu") -> Runner:
        """The model of a transformers or GGUF folder, on a device. Raises InputError if there is no such device."""
        model, tokenizer = load(folder)
        try:
            return cls(model.to(device), tokenizer)
        except (RuntimeError, AssertionError) as error:
            raise InputError(f"--device: expected a device that torch can use here; got {device!r}: {error}") from error

    @torch.inference_mode()
    def forward(self, ids: Iterable[int], cache: Any, keep: int) -> Tensor:
        """Feed ids to the model on top of `cache`, which grows; logits fp32 [keep, vocabulary] of the last `keep`."""
        return self._run(torch.tensor([list(ids)], device=self.device), cache, keep)[0]

    def _run(self, batch: Tensor, cache: Any, keep: int) -> Tensor:
        arguments = {cache_keyword(self.model): cache, "use_cache": True, "logits_to_keep": keep}
        logits: Tensor = self.model(input_ids=batch, **arguments).logits
        return logits

    def prefill(self, ids: Sequence[int]) -> KVChunk:
        """The fp32 cache of a context, as computed."""
        from transformers import DynamicCache

        cache = DynamicCache(config=self.model.config)
        self.forward(ids, cache, keep=1)
        return chunk_from_cache(cache, self.spec.with_dtype("float32"), torch.tensor(list(ids)))

    def engine_chunk(self, computed: KVChunk) -> KVChunk:
        """A cache as the engine holds it: rounded to bf16."""
        return cast(computed, self.spec)

    def cache_of(self, chunk: KVChunk) -> Any:
        """A transformers cache, fp32, with the values of a chunk that starts its sequence."""
        return cache_from_chunks([cast(chunk, self.spec.with_dtype("float32"))], self.model.config, device=self.device)

    def continuation(self, cache: Any, ids: Sequence[int]) -> Tensor:
        """Logits [len(ids) - 1, vocabulary]: what the model expects after each of ids but the last. `cache` is kept."""
        return self.forward(ids[:-1], fork(cache), keep=len(ids) - 1)

    @torch.inference_mode()
    def answers(self, cache: Any, questions: Sequence[Question]) -> list[bool]:
        """For each question: would greedy decoding after it give exactly the answer's tokens? `cache` is kept.

        The questions are one batch, padded at the right, where causal attention never looks.
        """
        rows = [[*question.prompt, *question.answer[:-1]] for question in questions]
        width = max(map(len, rows))
        batch = torch.tensor([[*row, *[row[-1]] * (width - len(row))] for row in rows], device=self.device)
        cache = fork(cache)
        cache.batch_repeat_interleave(len(rows))
        best = self._run(batch, cache, width).argmax(-1)
        return [
            best[i, len(row) - len(question.answer) : len(row)].tolist() == list(question.answer)
            for i, (row, question) in enumerate(zip(rows, questions, strict=True))
        ]

    def greedy(self, cache: Any, prompt: Sequence[int], tokens: int, stop: bool = True) -> list[int]:
        """Up to `tokens` ids decoded greedily after `prompt`; ends before an end-of-text token if `stop`."""
        cache = fork(cache)
        ends = set(self._end_ids()) if stop else set()
        found: list[int] = []
        feed: Sequence[int] = prompt
        while len(found) < tokens:
            token = int(self.forward(feed, cache, keep=1)[-1].argmax())
            if token in ends:
                break
            found.append(token)
            feed = [token]
        return found

    def _end_ids(self) -> list[int]:
        ids = self.model.generation_config.eos_token_id
        if ids is None:
            return []
        return list(ids) if isinstance(ids, (list, tuple)) else [int(ids)]


def cast(chunk: KVChunk, spec: KVSpec) -> KVChunk:
    """A chunk's values in the dtype of `spec`, on the CPU, in memory of its own (states keep their dtype)."""
    layers = [
        LayerKV(
            layer.kind,
            {
                name: tensor.to("cpu", tensor.dtype if layer.kind is LayerKind.STATE else spec.torch_dtype, copy=True)
                for name, tensor in layer.tensors.items()
            },
            layer.tokens,
        )
        for layer in chunk.layers
    ]
    return KVChunk(spec, chunk.positions, layers, chunk.head_range, chunk.token_ids, chunk.previous_ids)


def fork(cache: Any) -> Any:
    """A cache that can grow without the original noticing: growing layers share tensors, states are copied."""
    twin = copy.copy(cache)
    twin.layers = [
        copy.deepcopy(layer) if hasattr(layer, "conv_states") else copy.copy(layer) for layer in cache.layers
    ]
    return twin

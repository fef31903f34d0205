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
    def load(cls, folder: Path) -> Runner:
        """The model of a transformers or GGUF folder."""
        return cls(*load(folder))

    @torch.inference_mode()
    def forward(self, ids: Iterable[int], cache: Any, keep: int) -> Tensor:
        """Feed ids to the model on top of `cache`, which grows; logits fp32 [keep, vocabulary] of the last `keep`."""
        row = torch.tensor([list(ids)], device=self.device)
        out = self.model(input_ids=row, use_cache=True, logits_to_keep=keep, **{cache_keyword(self.model): cache})
        logits: Tensor = out.logits[0]
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

    def answers(self, cache: Any, question: Question) -> bool:
        """Would greedy decoding after the question give exactly the answer's tokens? `cache` is kept."""
        size = len(question.answer)
        logits = self.forward((*question.prompt, *question.answer[:-1]), fork(cache), keep=size)
        return logits.argmax(-1).tolist() == list(question.answer)

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
    """A chunk's values in the dtype of `spec`, in memory of its own (states keep their dtype)."""
    layers = [
        LayerKV(
            layer.kind,
            {
                name: tensor.clone() if layer.kind is LayerKind.STATE else tensor.to(spec.torch_dtype, copy=True)
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

"""transformers caches <-> chunks: views of `DynamicCache` and `StaticCache`, and caches allocated up front.

    chunk = chunk_from_cache(cache, spec, ids)              # views, no copy
    cache = allocate_cache(model.config, spec, tokens)      # decode(..., out=chunk_from_cache(cache, spec, ...))
    cache = cache_from_chunks(chunks, model.config)         # or: copied from chunks at hand
    crop_for_generation(cache, ids)
    model.generate(ids, **{cache_keyword(model): cache})    # past_key_values=cache, or cache=cache in newer versions

READ ME FIRST: `generate` computes the last prompt token itself. A cache that covers every prompt token makes it
compute that token again, one position too far, and the answer is silently wrong: `crop_for_generation`.

A layer holds `keys` and `values` [batch, heads, tokens, dim]; with latent attention they are the latents and the
shared rotated part. A sliding layer holds only the tokens that the next one can see.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..errors import LayoutError, RangeError, ShapeError, UnsupportedModel
from ..kv import KVChunk, KVSpec, LayerKind, LayerKV, LayerSpec

_STATES = ("conv", "recurrent")


def cache_keyword(model: Any) -> str:
    """The argument that hands a cache to a model: `cache`, or what versions before called it."""
    arguments = inspect.signature(model.forward).parameters
    for name in ("cache", "past_key_values", "cache_params"):
        if name in arguments:
            return name
    raise UnsupportedModel(f"{type(model).__name__}.forward: expected an argument for a cache; it has none")


def cache_length(cache: Any) -> int:
    """Tokens that a cache has seen (a sliding layer holds fewer). 0 for an empty one."""
    lengths = {int(layer.get_seq_length()) for layer in cache.layers if hasattr(layer, "get_seq_length")}
    if len(lengths) > 1:
        raise ShapeError(f"cache: expected layers of one length; got {sorted(lengths)}")
    return lengths.pop() if lengths else 0


def chunk_from_cache(
    cache: Any,
    spec: KVSpec,
    ids: Any = None,
    *,
    start: int = 0,
    stop: int | None = None,
    batch_index: int = 0,
    positions: Tensor | None = None,
) -> KVChunk:
    """Tokens start..stop of one sequence of a cache, as views of the cache's memory.

    Args:
        cache: a DynamicCache or StaticCache, filled by the model (or `allocate_cache`).
        spec: the model's cache in the dtype it has here (`KVSpec.from_hf_config(config, dtype)`).
        ids: token ids of the whole sequence from its first token, int [>= stop], or None.
        start, stop: half-open range of the cache's tokens; default all. Where a layer is a state, which stands for
            everything before it, only the whole sequence will do.
        batch_index: which sequence.
        positions: int64 [stop - start], where they aren't start..stop-1 (left padding).
    Raises:
        RangeError: tokens or a sequence that the cache doesn't hold; part of a state.
        ShapeError, DtypeError: the cache isn't as the spec says.
        LayoutError: a kind of cache whose memory can't be viewed (quantised ones).
    """
    if len(cache.layers) != spec.num_layers:
        raise ShapeError(f"cache: the spec has {spec.num_layers} layers; got {len(cache.layers)}")
    total = _states_length(ids, stop) if _only_states(spec) else cache_length(cache)
    stop = total if stop is None else stop
    if not 0 <= start < stop <= total:
        raise RangeError(f"tokens: expected a range within the cache's 0..{total}; got {start}..{stop}")
    layers = [
        _layer_view(f"layer {i}", layer, spec.layers[i], (start, stop), total, batch_index)
        for i, layer in enumerate(cache.layers)
    ]
    token_ids, before = _ids_of(ids, start, stop)
    if positions is None:
        positions = torch.arange(start, stop)
    return KVChunk(spec, positions, layers, token_ids=token_ids, previous_ids=before)


def allocate_cache(
    config: Any,
    spec: KVSpec,
    num_tokens: int,
    *,
    batch_size: int = 1,
    max_cache_len: int | None = None,
    device: torch.device | str = "cpu",
) -> Any:
    """A cache that counts as filled with `num_tokens` tokens, of uninitialised memory.

    Decode into views of it (`chunk_from_cache`): rows then land where the model reads them. Layers that are states
    stay empty until `set_states`.

    Args:
        config: the model's config, or the model.
        spec: the cache's layers and dtype.
        max_cache_len: make a StaticCache with room for so many tokens: the first new token then copies nothing,
            where a DynamicCache copies everything. Default: a DynamicCache.
    Raises:
        RangeError: no tokens or sequences, or more tokens than max_cache_len.
        ShapeError: the config's layers aren't the spec's.
        UnsupportedModel: the config asks for a kind of layer that can't be allocated here, or a StaticCache would
            have to hold a sliding window that has moved on.
    """
    from transformers import DynamicCache, StaticCache

    if num_tokens < 1 or batch_size < 1:
        raise RangeError(f"cache: expected at least 1 token and 1 sequence; got {num_tokens} and {batch_size}")
    config = getattr(config, "config", config)
    if max_cache_len is not None and num_tokens > max_cache_len:
        raise RangeError(f"max_cache_len: expected room for {num_tokens} tokens; got {max_cache_len}")
    cache: Any
    cache = DynamicCache(config=config) if max_cache_len is None else StaticCache(config, max_cache_len=max_cache_len)
    if len(cache.layers) != spec.num_layers:
        raise ShapeError(f"config: the spec has {spec.num_layers} layers; got {len(cache.layers)}")
    for i, (layer, want) in enumerate(zip(cache.layers, spec.layers, strict=True)):
        if want.kind is LayerKind.STATE:
            if not hasattr(layer, "conv_states"):
                raise ShapeError(f"layer {i}: the spec says state; the config {type(layer).__name__}")
            continue
        if not hasattr(layer, "keys") or hasattr(layer, "conv_states"):
            raise UnsupportedModel(f"layer {i}: can't allocate a {type(layer).__name__}")
        _allocate_layer(f"layer {i}", layer, want, spec, num_tokens, batch_size, device)
    return cache


def set_states(cache: Any, chunks: Sequence[KVChunk]) -> None:
    """Put the state tensors of one chunk per sequence (each its sequence's last) into a cache's state layers."""
    for i, layer in enumerate(cache.layers):
        held = [chunk.layers[i] for chunk in chunks]
        if held[0].kind is not LayerKind.STATE:
            continue
        for name in held[0].tensors:
            kind, _, index = name.partition(".")
            if kind not in _STATES or not index.isdigit() or int(index) >= layer.number_of_states:
                raise ShapeError(f"layer {i}: expected states conv.N and recurrent.N; got {name!r}")
            state = torch.stack([one.tensors[name] for one in held])
            if kind == "conv":
                layer.lazy_initialization(conv_states=state, state_idx=int(index))
                layer.conv_states[int(index)].copy_(state)
            else:
                layer.lazy_initialization(recurrent_states=state, state_idx=int(index))
                layer.recurrent_states[int(index)].copy_(state)
            layer.has_previous_state[int(index)] = True


def cache_from_chunks(
    chunks: Sequence[KVChunk] | Sequence[Sequence[KVChunk]],
    config: Any,
    *,
    num_tokens: int | None = None,
    device: torch.device | str = "cpu",
) -> Any:
    """A DynamicCache with the tokens of consecutive chunks, copied.

    Args:
        chunks: one sequence's chunks in order from its first token, or a list of such lists, one per sequence of the
            batch, all of one length in tokens.
        config: the model's config, or the model.
        num_tokens: leading tokens to keep; default all. Give `len(prompt) - 1` or less to generate from it.
    Raises:
        ShapeError: no chunks, chunks of different specs, sequences of different lengths, part of the heads.
        RangeError: more tokens than the chunks have; chunks that aren't consecutive; a sliding layer whose window
            isn't held (it was stored from a longer cache); a state asked for at another length than its own.
    """
    batch: list[Sequence[KVChunk]] = [chunks] if chunks and isinstance(chunks[0], KVChunk) else list(chunks)  # type: ignore[list-item, arg-type]
    lengths = {sum(chunk.num_tokens for chunk in sequence) for sequence in batch}
    if not batch or 0 in lengths:
        raise ShapeError("chunks: expected at least one per sequence; got none")
    if len(lengths) > 1:
        raise ShapeError(
            f"batch: expected sequences of one length, since a cache has no padding; got {sorted(lengths)} tokens. "
            "Load them into caches of their own, or crop with num_tokens each"
        )
    total = lengths.pop()
    num_tokens = total if num_tokens is None else num_tokens
    if not 1 <= num_tokens <= total:
        raise RangeError(f"num_tokens: expected within 1..{total}, which the chunks hold; got {num_tokens}")
    spec = batch[0][0].spec
    for sequence in batch:
        _check_sequence(sequence, spec)
    cache = allocate_cache(config, spec, num_tokens, batch_size=len(batch), device=device)
    for b, sequence in enumerate(batch):
        for i, layer in enumerate(cache.layers):
            if spec.layers[i].kind is not LayerKind.STATE:
                _fill(f"layer {i}", layer, spec.layers[i], i, sequence, num_tokens, b)
    if any(layer.kind is LayerKind.STATE for layer in spec.layers):
        if num_tokens != total:
            raise RangeError(f"num_tokens: states stand for all {total} tokens; can't take {num_tokens} of them")
        set_states(cache, [sequence[-1] for sequence in batch])
    return cache


def crop_for_generation(cache: Any, ids: Any) -> int:
    """Crop a cache so that `generate(ids, past_key_values=cache)` computes at least the last prompt token.

    Args:
        cache: holds a prefix of the prompt, maybe all of it.
        ids: the whole prompt, int [tokens] or [batch, tokens].
    Returns:
        Tokens that the cache covers now: at most len(ids) - 1.
    Raises:
        RangeError: the cache would have to give up a token that it can't (a full sliding window has already dropped
            what it would need again; a state can't go back). Load one token less instead.
    """
    length = int(torch.as_tensor(ids).shape[-1])
    held = cache_length(cache)
    if length < 1:
        raise RangeError("ids: expected at least one token to generate from; got none")
    surplus = held - (length - 1)
    if surplus <= 0:
        return held
    for i, layer in enumerate(cache.layers):
        full = bool(getattr(layer, "is_sliding", False)) and held >= int(layer.get_max_length())
        if hasattr(layer, "conv_states") or full:
            raise RangeError(
                f"cache: expected at most {length - 1} tokens for a prompt of {length}; got {held}, and layer {i} "
                f"({type(layer).__name__}) can't give tokens back. Load at most {length - 1} tokens"
            )
    if surplus == held:
        cache.reset()
    else:
        cache.crop(-surplus)
    return length - 1


# --------------------------------------------------------------------------- parts
def _allocate_layer(
    where: str, layer: Any, want: LayerSpec, spec: KVSpec, num_tokens: int, batch_size: int, device: torch.device | str
) -> None:
    static, sliding = hasattr(layer, "max_cache_len"), bool(getattr(layer, "is_sliding", False))
    window = int(layer.sliding_window) if sliding and not static else None  # a static layer keeps its rows' number only
    if sliding != (want.kind is LayerKind.SLIDING) or window not in (None, want.window):
        raise ShapeError(f"{where}: the spec says {want.kind.value} {want.window or ''}; the config disagrees")
    rows = num_tokens
    if static:
        rows = int(layer.max_cache_len)
        if num_tokens > rows:
            raise UnsupportedModel(f"{where}: a StaticCache can't start with {num_tokens} tokens in a window of {rows}")
    elif window is not None:
        rows = min(num_tokens, window - 1)
    first, second = (
        torch.empty(batch_size, want.kv_heads, rows, want.dim(name), dtype=spec.torch_dtype, device=device)
        for name in want.names
    )
    layer.lazy_initialization(first, second)
    if static:  # keeps its own memory, whose address compiled graphs may know
        layer.cumulative_length.fill_(num_tokens)
        if sliding:
            layer.cumulative_length_int = num_tokens
        return
    layer.keys, layer.values = first, second
    if sliding:
        layer.cumulative_length = num_tokens


def _only_states(spec: KVSpec) -> bool:
    return all(layer.kind is LayerKind.STATE for layer in spec.layers)


def _states_length(ids: Any, stop: int | None) -> int:
    """Tokens behind a cache of states alone, which doesn't count them."""
    if stop is None and ids is None:
        raise RangeError("tokens: a cache of states doesn't know its length; pass ids or stop")
    return stop if stop is not None else int(torch.as_tensor(ids).shape[0])


def _layer_view(
    where: str, layer: Any, want: LayerSpec, tokens: tuple[int, int], total: int, batch_index: int
) -> LayerKV:
    if want.kind is LayerKind.STATE:
        return _state_view(where, layer, tokens, total, batch_index)
    keys, values = _buffers(where, layer)
    if not 0 <= batch_index < keys.shape[0]:
        raise RangeError(f"batch_index: expected within the cache's 0..{keys.shape[0] - 1}; got {batch_index}")
    held = _held(layer, keys, total)
    start, stop = min(max(tokens[0], held[0]), tokens[1]), tokens[1]
    rows = slice(start - held[0], stop - held[0])
    views = {name: t[batch_index, :, rows].transpose(0, 1) for name, t in zip(want.names, (keys, values), strict=True)}
    inside = None if (start, stop) == tokens else (start - tokens[0], stop - tokens[0])
    return LayerKV(want.kind, views, inside)


def _buffers(where: str, layer: Any) -> tuple[Tensor, Tensor]:
    keys, values = getattr(layer, "keys", None), getattr(layer, "values", None)
    if hasattr(layer, "_quantized_keys") or hasattr(layer, "conv_states"):
        raise LayoutError(f"{where}: expected plain keys and values; got a {type(layer).__name__}")
    if not isinstance(keys, Tensor) or not isinstance(values, Tensor) or keys.dim() != 4 or values.dim() != 4:
        raise ShapeError(f"{where}: expected keys and values [batch, heads, tokens, dim]; the cache holds none")
    return keys, values


def _held(layer: Any, keys: Tensor, total: int) -> tuple[int, int]:
    """The sequence's tokens that a layer's buffer holds: row 0 is the first of them."""
    rows = int(keys.shape[2])
    if hasattr(layer, "max_cache_len"):  # static: rows beyond the length are unused until a sliding window wraps
        return (0, total) if total <= rows else (total - rows, total)
    return (total - rows, total)


def _state_view(where: str, layer: Any, tokens: tuple[int, int], total: int, batch_index: int) -> LayerKV:
    if tokens != (0, total):
        raise RangeError(f"{where} is a state of all {total} tokens: expected that range; got {tokens[0]}..{tokens[1]}")
    tensors = {}
    for kind in _STATES:
        for index, state in getattr(layer, f"{kind}_states").items():
            if state is not None:
                if not 0 <= batch_index < state.shape[0]:
                    raise RangeError(f"batch_index: expected within 0..{state.shape[0] - 1}; got {batch_index}")
                tensors[f"{kind}.{index}"] = state[batch_index]
    return LayerKV(LayerKind.STATE, tensors)


def _ids_of(ids: Any, start: int, stop: int) -> tuple[Tensor | None, tuple[int, ...]]:
    """(ids of start..stop, the two before) from a whole sequence's ids."""
    if ids is None:
        return None, ()
    ids = torch.as_tensor(ids, dtype=torch.int64)
    if ids.dim() != 1 or ids.shape[0] < stop:
        raise ShapeError(
            f"ids: expected the whole sequence's, at least [{stop}], from its first token; got {list(ids.shape)}"
        )
    return ids[start:stop], tuple(int(i) for i in ids[max(0, start - 2) : start])


def _check_sequence(sequence: Sequence[KVChunk], spec: KVSpec) -> None:
    after = None
    for chunk in sequence:
        spec.check(chunk.spec)
        if chunk.heads != (0, spec.kv_heads):
            raise ShapeError(f"chunks: expected all {spec.kv_heads} heads; got {chunk.heads}")
        first = int(chunk.positions[0])
        if after is not None and first != after:
            raise RangeError(f"chunks: expected consecutive ones; got position {first} after {after - 1}")
        after = int(chunk.positions[-1]) + 1


def _fill(
    where: str, layer: Any, want: LayerSpec, index: int, sequence: Sequence[KVChunk], num_tokens: int, b: int
) -> None:
    """Copy the rows that a layer holds (all, or a window's) from chunks into sequence `b` of its buffers."""
    first = num_tokens - layer.keys.shape[2]
    begin = 0
    for chunk in sequence:
        end = min(begin + chunk.num_tokens, num_tokens)
        lo, hi = chunk.layer_tokens(index)
        a, z = max(begin, first), end
        if a < z:
            if begin + lo > a or begin + hi < z:
                raise RangeError(
                    f"{where}: needs tokens {a}..{z} to go on after {num_tokens}; the chunk holds {begin + lo}.."
                    f"{begin + hi} (it was stored from a longer cache). Load more tokens, or recompute"
                )
            for name, buffer in zip(want.names, (layer.keys, layer.values), strict=True):
                rows = chunk.layers[index].tensors[name][a - begin - lo : z - begin - lo]
                buffer[b, :, a - first : z - first].copy_(rows.transpose(0, 1))
        begin += chunk.num_tokens
        if begin >= num_tokens:
            break

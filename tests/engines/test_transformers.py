"""transformers caches <-> chunks, on SmolLM2 and on tiny models with random weights."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from cachegen.engines.transformers import (
    allocate_cache,
    cache_from_chunks,
    cache_keyword,
    cache_length,
    chunk_from_cache,
    crop_for_generation,
    set_states,
)
from cachegen.errors import DtypeError, LayoutError, RangeError, ShapeError, UnsupportedModel
from cachegen.kv import KVChunk, KVSpec, LayerKind

transformers = pytest.importorskip("transformers")


def tiny(name: str, **changes: Any) -> Any:
    """A model of a family with random weights, about 100 thousand of them."""
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(
        **{
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "vocab_size": 64,
            "pad_token_id": 0,
            **changes,
        }
    )
    return getattr(transformers, f"{name}ForCausalLM")(config).eval().requires_grad_(False)


def prefill(model: Any, ids: torch.Tensor, cache: Any = None) -> Any:
    """The cache after a forward pass over ids [batch, tokens]."""
    cache = transformers.DynamicCache(config=model.config) if cache is None else cache
    model(ids, use_cache=True, **cache_argument(model, cache))
    return cache


def cache_argument(model: Any, cache: Any) -> dict[str, Any]:
    return {cache_keyword(model): cache}


def next_logits(model: Any, ids: torch.Tensor, cache: Any) -> torch.Tensor:
    """Logits after the last of ids [batch, tokens], of which the cache covers a prefix."""
    return model(ids[:, cache_length(cache) :], use_cache=True, **cache_argument(model, cache)).logits[:, -1]


def copied(chunk: KVChunk) -> KVChunk:
    """The same chunk in memory of its own."""
    layers = [
        type(layer)(layer.kind, {n: t.clone() for n, t in layer.tensors.items()}, layer.tokens)
        for layer in chunk.layers
    ]
    return KVChunk(chunk.spec, chunk.positions.clone(), layers, token_ids=chunk.token_ids)


@pytest.fixture(scope="module")
def llama() -> Any:
    return tiny("Llama")


IDS = torch.arange(3, 43) % 64


def test_smollm2_generates_the_same_from_copied_chunks(model: Any, smollm2_ids: torch.Tensor) -> None:
    lm, _ = model
    ids = smollm2_ids[:120]
    spec = KVSpec.from_hf_config(lm.config, lm.dtype)
    want = lm.generate(ids[None], max_new_tokens=12, do_sample=False)
    cache = prefill(lm, ids[None])
    chunks = [copied(chunk_from_cache(cache, spec, ids, start=a, stop=min(a + 50, 120))) for a in (0, 50, 100)]
    for _, _, tensor in chunk_from_cache(cache, spec).tensors():
        tensor.zero_()  # what is generated below can't come from the old cache
    again = cache_from_chunks(chunks, lm)
    assert cache_length(again) == 120
    assert crop_for_generation(again, ids) == 119
    got = lm.generate(ids[None], max_new_tokens=12, do_sample=False, **cache_argument(lm, again))
    assert got.tolist() == want.tolist()


def test_full_cache_uncropped_is_the_trap(model: Any, smollm2_ids: torch.Tensor) -> None:
    """What crop_for_generation is for: without it the first token's distribution is another."""
    lm, _ = model
    ids = smollm2_ids[None, :60]
    want = lm(ids).logits[0, -1].log_softmax(-1)
    cropped, full = prefill(lm, ids), prefill(lm, ids)
    crop_for_generation(cropped, ids)
    right = next_logits(lm, ids, cropped)[0].log_softmax(-1)
    wrong = lm(ids[:, -1:], use_cache=True, **cache_argument(lm, full)).logits[0, -1].log_softmax(-1)
    assert (right - want).abs().max() < 1e-3
    assert (wrong - want).abs().max() > 1e-1


def test_chunks_are_views(llama: Any) -> None:
    cache = prefill(llama, IDS[None])
    chunk = chunk_from_cache(cache, KVSpec.from_hf_config(llama.config, "float32"), IDS, start=5, stop=17)
    chunk.layers[1].tensors["v"][2, 1, 3] = 77.0
    assert cache.layers[1].values[0, 1, 7, 3] == 77.0
    assert chunk.layers[0].tensors["k"].data_ptr() == cache.layers[0].keys[0, 0, 5].data_ptr()
    assert chunk.previous_ids == (int(IDS[3]), int(IDS[4]))
    assert chunk.token_ids is not None
    assert chunk.token_ids.tolist() == IDS[5:17].tolist()
    assert chunk.positions.tolist() == list(range(5, 17))


def test_decode_into_an_allocated_cache(llama: Any) -> None:
    """Rows written through chunk views of an allocated cache are what the model then reads."""
    spec = KVSpec.from_hf_config(llama.config, "float32")
    source = prefill(llama, IDS[None])
    target = allocate_cache(llama, spec, 39)
    for start, stop in ((0, 20), (20, 39)):
        out = chunk_from_cache(target, spec, start=start, stop=stop)
        for layer, name, tensor in chunk_from_cache(source, spec, start=start, stop=stop).tensors():
            out.layers[layer].tensors[name].copy_(tensor)
    want = llama(IDS[None]).logits[:, -1]
    assert torch.allclose(next_logits(llama, IDS[None], target), want, atol=1e-5)


def test_decode_into_a_static_cache() -> None:
    for lm in (tiny("Llama"), tiny("Gemma2", head_dim=8, **{**SLIDING, "sliding_window": 50})):
        spec = KVSpec.from_hf_config(lm.config, "float32")
        source = prefill(lm, IDS[None])
        target = allocate_cache(lm, spec, 39, max_cache_len=64)
        assert isinstance(target, transformers.StaticCache)
        out = chunk_from_cache(target, spec)
        for layer, name, tensor in chunk_from_cache(source, spec, stop=39).tensors():
            out.layers[layer].tensors[name].copy_(tensor)
        want = lm.generate(IDS[None], max_new_tokens=4, do_sample=False)
        got = lm.generate(IDS[None], max_new_tokens=4, do_sample=False, **cache_argument(lm, target))
        assert got.tolist() == want.tolist()


def test_static_caches_of_other_sizes_are_refused(llama: Any) -> None:
    with pytest.raises(RangeError, match="max_cache_len"):
        allocate_cache(llama, KVSpec.from_hf_config(llama.config, "float32"), 39, max_cache_len=38)
    lm = tiny("Gemma2", head_dim=8, **SLIDING)
    with pytest.raises(UnsupportedModel, match="window of 16"):
        allocate_cache(lm, KVSpec.from_hf_config(lm.config, "float32"), 39, max_cache_len=64)


def test_config_and_spec_must_agree(llama: Any) -> None:
    gemma = tiny("Gemma2", head_dim=8, **SLIDING)
    with pytest.raises(ShapeError, match="the config disagrees"):
        allocate_cache(gemma, KVSpec.from_hf_config(llama.config, "float32"), 10)
    other = tiny("Gemma2", head_dim=8, **{**SLIDING, "sliding_window": 17})
    with pytest.raises(ShapeError, match="sliding 17"):
        allocate_cache(gemma, KVSpec.from_hf_config(other.config, "float32"), 10)


def test_batches(llama: Any) -> None:
    spec = KVSpec.from_hf_config(llama.config, "float32")
    ids = torch.stack([IDS, IDS.flip(0), (IDS * 5) % 64])
    cache = prefill(llama, ids)
    one = prefill(llama, ids[1:2])
    second = chunk_from_cache(cache, spec, ids[1], batch_index=1)
    for layer, name, tensor in chunk_from_cache(one, spec).tensors():
        assert torch.allclose(second.layers[layer].tensors[name], tensor, atol=1e-5)
    again = cache_from_chunks([[chunk_from_cache(cache, spec, batch_index=b)] for b in range(3)], llama, num_tokens=39)
    assert torch.allclose(next_logits(llama, ids, again), llama(ids).logits[:, -1], atol=1e-5)


def test_ragged_batches_are_refused(llama: Any) -> None:
    spec = KVSpec.from_hf_config(llama.config, "float32")
    cache = prefill(llama, IDS[None])
    a, b = chunk_from_cache(cache, spec, stop=10), chunk_from_cache(cache, spec, stop=12)
    with pytest.raises(ShapeError, match="one length"):
        cache_from_chunks([[a], [b]], llama)


def test_static_cache(llama: Any) -> None:
    spec = KVSpec.from_hf_config(llama.config, "float32")
    static = prefill(llama, IDS[None], transformers.StaticCache(config=llama.config, max_cache_len=64))
    chunk = chunk_from_cache(static, spec, IDS)
    assert chunk.num_tokens == len(IDS)
    for layer, name, tensor in chunk_from_cache(prefill(llama, IDS[None]), spec).tensors():
        assert torch.allclose(chunk.layers[layer].tensors[name], tensor, atol=1e-5)


SLIDING = {"sliding_window": 16, "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]}


@pytest.mark.parametrize("static", [False, True])
def test_sliding_layers_hold_their_window(static: bool) -> None:
    lm = tiny("Gemma2", head_dim=8, **SLIDING)
    spec = KVSpec.from_hf_config(lm.config, "float32")
    assert [layer.window for layer in spec.layers] == [16, None, 16]
    cache = transformers.StaticCache(config=lm.config, max_cache_len=64) if static else None
    cache = prefill(lm, IDS[None], cache)
    held = 16 if static else 15
    chunk = chunk_from_cache(cache, spec, IDS)
    assert chunk.layer_tokens(0) == (40 - held, 40)
    assert chunk.layer_tokens(1) == (0, 40)
    # Rows must be those of the positions they claim: compare with a cache that keeps everything.
    everything = transformers.DynamicCache()
    prefill(lm, IDS[None], everything)
    for i in (0, 2):
        want = everything.layers[i].keys[0, :, 40 - held :].transpose(0, 1)
        assert torch.allclose(chunk.layers[i].tensors["k"], want, atol=1e-5)
    early = chunk_from_cache(cache, spec, IDS, start=0, stop=20)
    assert early.layers[0].tensors["k"].shape[0] == 0
    late = chunk_from_cache(cache, spec, IDS, start=20, stop=30)
    assert late.layer_tokens(0) == (10 - (30 - (40 - held)), 10)


def test_sliding_cache_goes_on_from_chunks() -> None:
    lm = tiny("Gemma2", head_dim=8, **SLIDING)
    spec = KVSpec.from_hf_config(lm.config, "float32")
    prompt = torch.cat([IDS, torch.tensor([9, 8])])
    cache = prefill(lm, IDS[None])
    chunks = [copied(chunk_from_cache(cache, spec, IDS, start=a, stop=a + 10)) for a in (0, 10, 20, 30)]
    again = cache_from_chunks(chunks, lm)
    assert torch.allclose(next_logits(lm, prompt[None], again), lm(prompt[None]).logits[:, -1], atol=1e-5)
    with pytest.raises(RangeError, match="stored from a longer cache"):
        cache_from_chunks(chunks, lm, num_tokens=30)
    with pytest.raises(RangeError, match="can't give tokens back"):
        crop_for_generation(cache_from_chunks(chunks, lm), IDS)


def test_states_travel() -> None:
    lm = tiny("Mamba", state_size=4, num_hidden_layers=2)
    spec = KVSpec.from_hf_config(lm.config, "float32")
    assert {layer.kind for layer in spec.layers} == {LayerKind.STATE}
    cache = transformers.DynamicCache(config=lm.config)
    lm(IDS[None, :-1], use_cache=True, **cache_argument(lm, cache))
    want = lm(IDS[None]).logits[:, -1]
    chunk = copied(chunk_from_cache(cache, spec, IDS[:-1]))
    assert set(chunk.layers[0].tensors) == {"conv.0", "recurrent.0"}
    again = cache_from_chunks([chunk], lm)
    got = lm(IDS[None, -1:], use_cache=True, **cache_argument(lm, again)).logits[:, -1]
    assert torch.allclose(got, want, atol=1e-4)
    with pytest.raises(RangeError, match="is a state"):
        chunk_from_cache(cache, spec, IDS, start=4)


def test_hybrid_of_states_and_attention() -> None:
    lm = tiny(
        "Jamba",
        num_hidden_layers=4,
        attn_layer_period=2,
        attn_layer_offset=1,
        num_experts=2,
        use_mamba_kernels=False,
        mamba_d_state=4,
    )
    spec = KVSpec.from_hf_config(lm.config, "float32")
    assert [layer.kind.value for layer in spec.layers] == ["state", "attention"] * 2
    cache = prefill(lm, IDS[None, :-1])
    again = cache_from_chunks([copied(chunk_from_cache(cache, spec, IDS))], lm)
    assert torch.allclose(next_logits(lm, IDS[None], again), lm(IDS[None]).logits[:, -1], atol=1e-4)
    with pytest.raises(RangeError, match="can't give tokens back"):
        crop_for_generation(again, IDS[:20])


def test_refusals(llama: Any) -> None:
    spec = KVSpec.from_hf_config(llama.config, "float32")
    cache = prefill(llama, IDS[None])
    with pytest.raises(RangeError, match=r"0\.\.40"):
        chunk_from_cache(cache, spec, stop=41)
    with pytest.raises(RangeError, match="batch_index"):
        chunk_from_cache(cache, spec, batch_index=1)
    with pytest.raises(DtypeError, match="with_dtype"):
        chunk_from_cache(cache, spec.with_dtype("bfloat16"))
    with pytest.raises(ShapeError, match="whole sequence"):
        chunk_from_cache(cache, spec, IDS[:5], start=5, stop=10)
    with pytest.raises(ShapeError, match="layers"):
        chunk_from_cache(cache, KVSpec("llama", "float32", spec.layers[:2]))
    a, b = chunk_from_cache(cache, spec, stop=10), chunk_from_cache(cache, spec, start=11)
    with pytest.raises(RangeError, match="consecutive"):
        cache_from_chunks([a, b], llama)
    with pytest.raises(RangeError, match="num_tokens"):
        cache_from_chunks([a], llama, num_tokens=11)
    with pytest.raises(ShapeError, match="at least one"):
        cache_from_chunks([], llama)
    with pytest.raises(RangeError, match=r"0\.\.0"):
        chunk_from_cache(transformers.DynamicCache(config=llama.config), spec)


def test_quantised_caches_are_refused(llama: Any) -> None:
    spec = KVSpec.from_hf_config(llama.config, "float32")
    cache = prefill(llama, IDS[None])
    cache.layers[0]._quantized_keys = cache.layers[0].keys
    with pytest.raises(LayoutError, match="plain keys"):
        chunk_from_cache(cache, spec)


def test_crop_leaves_short_caches_alone(llama: Any) -> None:
    cache = prefill(llama, IDS[None, :10])
    assert crop_for_generation(cache, IDS[:30]) == 10
    assert cache_length(cache) == 10
    assert crop_for_generation(cache, IDS[:1]) == 0
    assert cache_length(cache) == 0


def test_unknown_state_names_are_refused() -> None:
    lm = tiny("Mamba", state_size=4, num_hidden_layers=1)
    spec = KVSpec.from_hf_config(lm.config, "float32")
    cache = transformers.DynamicCache(config=lm.config)
    lm(IDS[None], use_cache=True, **cache_argument(lm, cache))
    chunk = chunk_from_cache(cache, spec, IDS)
    chunk.layers[0].tensors["other.0"] = chunk.layers[0].tensors.pop("conv.0")
    with pytest.raises(ShapeError, match=r"conv\.N"):
        set_states(cache, [chunk])

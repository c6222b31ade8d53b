"""The last layer computes only the tokens whose outputs are read: same logits, same cache, fewer rows."""

import copy
import pickle

import pytest
import torch
from transformers import DynamicCache

from prompts import IMAGE, MIXED, VIDEO, assert_close, generate, load, logits, make_inputs, pack
from videonsa.transformers_compat import CACHE


@pytest.fixture(params=["paper", "merged", "released", "merged on Qwen3-VL"])
def variant(request, checkpoints, inputs_for):
    name, _, backbone = request.param.partition(" on ")
    backbone = backbone or "Qwen2.5-VL"
    inputs_for(backbone)
    return load(checkpoints[backbone], nsa_variant=name)


def count_rows(model) -> list:
    """Of each call of the last layer's MLP from now on, how many tokens of a row it computes."""
    mlp, rows = model.model.language_model.layers[-1].mlp, []
    forward = mlp.forward

    def counted(x):
        rows.append(x.shape[1])
        return forward(x)

    mlp.forward = counted
    return rows


def keys_and_values(cache):
    return [x for layer in cache.layers for x in (layer.keys, layer.values)]


def compare(model, inputs, keep):
    """The logits of the last tokens with and without the others, and that the caches are the same."""
    rows, caches = count_rows(model), [DynamicCache(), DynamicCache()]
    full = logits(model, inputs, **{CACHE: caches[0]})
    read = logits(model, inputs, **{CACHE: caches[1]}, logits_to_keep=keep)
    assert_close(read, full[:, -keep:], 1e-6)
    for ours, expected in zip(*map(keys_and_values, caches), strict=True):
        assert torch.equal(ours, expected)
    length = full.shape[1]
    assert rows == [length, length if model.config.nsa_variant == "released" else keep]


@pytest.mark.parametrize("keep", [1, 12, 60])
def test_logits_that_are_read_and_the_cache_do_not_change(variant, keep):
    """The last 12 tokens of the batch have text and vision before them, and the last 60 have vision."""
    compare(variant, make_inputs(VIDEO, IMAGE, MIXED), keep)


def test_a_last_layer_that_deepstack_adds_to_computes_all_tokens(models, inputs_for):
    inputs_for("Qwen3-VL")
    model, inputs = copy.deepcopy(models["Qwen3-VL"]), make_inputs(VIDEO)
    model.model.language_model.layers = model.model.language_model.layers[:1]
    rows = count_rows(model)
    assert_close(logits(model, inputs, logits_to_keep=1), logits(model, inputs)[:, -1:], 1e-6)
    assert rows == [inputs["input_ids"].shape[1]] * 2


def test_packed_samples_keep_their_own_keys(small):
    compare(small, pack(small, [VIDEO, IMAGE]), 20)


def test_prompts_that_end_in_a_video(small):
    compare(small, make_inputs(VIDEO[:-1]), 1)
    compare(small, make_inputs(VIDEO[:-1]), 30)


@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_generation_computes_the_last_layer_of_the_prompt_at_one_token(small, cache):
    inputs = make_inputs(VIDEO, MIXED)
    rows = count_rows(small)
    out = generate(small, inputs, cache_implementation=None if cache == "dynamic" else cache)
    assert set(rows) == {1}
    expected = generate(small, inputs, output_hidden_states=True)
    assert max(rows) == inputs["input_ids"].shape[1]
    assert torch.equal(out.sequences, expected.sequences)
    assert_close(out.logits, expected.logits)


def test_prefill_in_chunks_computes_the_last_layer_at_the_last_token_of_each(small):
    inputs = make_inputs(VIDEO)
    length = inputs["input_ids"].shape[1]  # 205: the last chunk is text alone, on the stock path
    positions, _ = small.model.get_rope_index(**inputs)
    embeds = small.get_input_embeddings()(inputs["input_ids"])
    expected = logits(small, {"inputs_embeds": embeds, "mm_token_type_ids": inputs["mm_token_type_ids"]},
                      position_ids=positions)  # fmt: skip
    rows, cache = count_rows(small), DynamicCache()
    for start in range(0, length, 50):
        part = slice(start, start + 50)
        chunk = {"inputs_embeds": embeds[:, part], "mm_token_type_ids": inputs["mm_token_type_ids"][:, part]}
        out = logits(small, chunk, position_ids=positions[..., part], logits_to_keep=1, **{CACHE: cache})
        end = min(start + 50, length)
        assert_close(out, expected[:, end - 1 : end])
    assert rows == [1] * 4 + [5]


def test_all_tokens_are_computed_where_somebody_may_read_them(small):
    inputs, rows = make_inputs(VIDEO), count_rows(small)
    length = inputs["input_ids"].shape[1]
    short = {"logits_to_keep": 1}

    outputs = small(**inputs, **short, output_hidden_states=True)
    assert outputs.hidden_states[-1].shape[1] == length
    # What records hidden states stays in the layers for good.
    for module in small.modules():
        module._forward_hooks.clear()
    logits(small, inputs)
    small(**inputs, **short, output_gates=True)
    small(**inputs, **short, observe=lambda attention, q, k, v, gates, layout: gates)
    small(**inputs, logits_to_keep=torch.tensor([length - 1]))
    seen = []
    hook = small.model.language_model.layers[-1].register_forward_hook(lambda *x: seen.append(x[2].shape[1]))
    small(**inputs, **short)
    hook.remove()
    small.train()(**inputs, **short)
    assert rows == [length] * 7 and seen == [length]

    small.eval()(**inputs, **short, use_cache=False)
    assert rows[7:] == [1]


@torch.no_grad()
def test_hooks_around_the_last_layer_get_all_tokens(model):
    inputs, rows, seen = make_inputs(VIDEO, MIXED), count_rows(model), []
    decoder = model.model.language_model
    length = inputs["input_ids"].shape[1]

    def steer(module, args):
        seen.append(args[0].shape[1])
        return (args[0] + torch.arange(args[0].shape[-1]).sin(),)

    for other in (copy.deepcopy(model), model):
        handle = other.model.language_model.layers[-1].register_forward_pre_hook(steer)
        few, whole = logits(other, inputs, logits_to_keep=1), logits(other, inputs)[:, -1:]
        assert_close(few, whole, 1e-5)
        handle.remove()
        assert (few - logits(other, inputs, logits_to_keep=1)).abs().max() > 0.1
    assert seen == [length] * 4 and rows == [1, length, 1] * 2

    for module in (decoder.norm, decoder, model.model):
        handle = module.register_forward_hook(lambda module, args, output: seen.append(output[0].shape[-2]))
        model(**inputs, logits_to_keep=1)
        handle.remove()
        assert seen.pop() == length == rows.pop()


def test_copies_of_a_model_compute_as_few(small):
    for other in (copy.deepcopy(small), pickle.loads(pickle.dumps(small))):
        rows = count_rows(other)
        other(**make_inputs(VIDEO), logits_to_keep=1)
        assert rows == [1]


def test_text_alone_takes_the_stock_path(small):
    rows = count_rows(small)
    logits(small, make_inputs([9]), logits_to_keep=1)
    assert rows == [9]

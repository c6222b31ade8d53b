"""nsa_variant="merged": one softmax over the text before a query and its chosen blocks, in nsa_torch.py, nsa_triton.py,
the model, its loading, and `convert.py`.

Streams are laid out by runs, "v" vision and "t" text tokens of a sample in their order. Choices of blocks alone are
tested here where `test_nsa_torch.py` does not: windows and estimates by variances.
"""

import math
import sys
from copy import deepcopy
from itertools import accumulate

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText, DynamicCache

import convert
from prompts import (
    IMAGE,
    MIXED,
    TEXT,
    VIDEO,
    assert_close,
    embed,
    generate,
    load,
    logits,
    make_inputs,
    pack,
    text_model,
    unpad,
)
from videonsa import nsa_merged, nsa_softmax, nsa_torch
from videonsa.configuration_videonsa import VideoNSAConfig, VideoNSATextConfig
from videonsa.modeling_videonsa import VideoNSAForConditionalGeneration
from videonsa.transformers_compat import CACHE

# ----------------------------------------------------------------------------------------------------------------------
# The attention against masks written out
# ----------------------------------------------------------------------------------------------------------------------

# runs of each sample, query heads, KV heads, options; n is 1, 63, 64, 65 and more
CASES = {
    "group 7, text before, between and after": (["t3 v40 t2 v60 t4"], 7, 1, {"block_count": 4, "window_size": 20}),
    "lengths 1, 63, 64, 65, one without text": (
        ["t1 v1", "v63", "t2 v64 t1", "v30 t5 v35"], 7, 1, {"block_count": 3, "window_size": 1}),
    "group 1": (["t2 v100"], 2, 2, {"block_count": 5, "window_size": 33}),
    "group 16, blocks of 32": (["v70 t2 v60"], 16, 1, {"block_count": 3, "window_size": 30, "block_size": 32}),
    "group 4": (["t2 v150", "t9 v90"], 8, 2, {"block_count": 4, "window_size": 17}),
    "group 7, two KV heads": (["t2 v200", "v20 t1 v16"], 14, 2, {"block_count": 10, "window_size": 17}),
    "a scale": (["t2 v150"], 7, 1, {"block_count": 6, "window_size": 17, "scale": 0.4}),
    "the remainder": (["t2 v100 t1 v30", "v70"], 4, 2, {"block_count": 3, "window_size": 7, "remainder": True}),
    "importance by means": (["t3 v100 t1 v30", "v70"], 14, 2, {"block_count": 4, "window_size": 7, "spread": False}),
    "each head for itself": (
        ["t3 v100 t1 v30", "v70"], 14, 2, {"block_count": 4, "window_size": 7, "per_head": True, "remainder": True}),
    "strong logits, far and near": (["t3 v130"], 7, 1, {"block_count": 4, "window_size": 7, "scale": 1.5}),
    "dense": (["t2 v50 t1 v30", "t1 v5"], 7, 1, {"block_count": 32, "window_size": 5}),
}  # fmt: skip
BLOCK = {"block_size": 16}


def cumulate(lengths):
    return torch.tensor([0, *accumulate(lengths)], dtype=torch.int32)


def lay_out(samples):
    """Per sample a bool list, True for vision; text_seen, and where samples start in vision and text."""
    kinds = [[c for run in sample.split() for c in [run[0] == "v"] * int(run[1:])] for sample in samples]
    seen = [sum(not v for v in row[:t]) for row in kinds for t, vision in enumerate(row) if vision]
    lengths = cumulate([sum(row) for row in kinds]), cumulate([len(row) - sum(row) for row in kinds])
    return kinds, (torch.tensor(seen, dtype=torch.int32), *lengths)


def make_tensors(where, heads, groups, dim=16, dtype=torch.float64, seed=0):
    """q, k, v, text_k, text_v."""
    generator = torch.Generator().manual_seed(seed)
    n, texts = len(where[0]), int(where[2][-1])
    shapes = [(n, heads, dim), *[(n, groups, dim)] * 2, *[(texts, groups, dim)] * 2]
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes]


def estimate(q, block, scale):
    """Log-sum-exp of the logits of a block's keys [S, D] for one query [D], if they were normally distributed."""
    mean, n = float(q @ block.mean(0)) * scale, len(block)
    sigma = scale * math.sqrt(float((q.square() * block.var(0, correction=0)).sum()))
    most = math.sqrt(2 * math.log(n))
    return mean + (sigma**2 / 2 + math.log(n) if sigma < most else sigma * most)


def choose(k, q, text, i, block_size, block_count, window_size, spread, scale):
    """Blocks of the query q [r, D] at index i of a stream k [n, D] after text [T, D]: the definition, in floats."""
    own = i // block_size
    blocks = k[: (i + 1) // block_size * block_size].unflatten(0, (-1, block_size)) if i + 1 >= block_size else []
    importance = [0.0] * own
    for head in q if own else []:
        if spread:
            share = [math.exp(estimate(head, block, scale)) for block in blocks[:own]]
            total = sum(share) + float((text @ head * scale).exp().sum())
        else:
            share = [math.exp(head @ block.mean(0) * scale) for block in blocks]
            total = sum(share)
        importance = [x + y / total for x, y in zip(importance, share[:own], strict=True)]
    chosen = {0, *(t // block_size for t in range(max(0, i - window_size + 1), i + 1))}
    for j in sorted(range(own), key=lambda j: (-importance[j], j)):
        if len(chosen) < block_count:
            chosen.add(j)
    return chosen


def materialised(
    tensors, kinds, block_size=16, block_count=32, window_size=256, spread=True, per_head=False, remainder=False,
    scale=None,
):  # fmt: skip
    """merged_attention with one mask per sample and head over its tokens in their order."""
    q, k, v, text_k, text_v = tensors
    heads, groups, dim = q.shape[1], k.shape[1], q.shape[2]
    scale = dim**-0.5 if scale is None else scale
    out, start, text_start = [], 0, 0
    for row in kinds:
        vision, n, texts = torch.tensor(row), sum(row), len(row) - sum(row)
        stream, text = slice(start, start + n), slice(text_start, text_start + texts)
        start, text_start = stream.stop, text.stop
        index = vision.cumsum(0) - 1  # of vision tokens, in the stream
        keys, values = k.new_zeros(2, len(row), groups, dim)
        keys[vision], values[vision] = k[stream], v[stream]
        keys[~vision], values[~vision] = text_k[text], text_v[text]
        for i, token in enumerate(vision.nonzero().flatten().tolist()):
            for h in range(heads):
                g = h // (heads // groups)
                group = q[start - n + i, g * (heads // groups) : (g + 1) * (heads // groups)]
                before = keys[:token][~vision[:token], g]
                rule = (block_size, block_count, window_size, spread, scale)
                choosing = group[h % len(group)][None] if per_head else group
                blocks = choose(k[stream, g], choosing, before, i, *rule)
                chosen = torch.tensor(sorted(blocks))
                keep = ~vision | torch.isin(index // block_size, chosen)
                keep &= torch.arange(len(row)) <= token
                seen, held = keys[keep, g], values[keep, g]
                query, weights = group[h % (heads // groups)], [1.0] * len(seen)
                others = [j for j in range((i + 1) // block_size) if remainder and j not in blocks]
                for j in others:
                    block = slice(start - n + j * block_size, start - n + (j + 1) * block_size)
                    seen = torch.cat([seen, k[block, g].mean(0, keepdim=True)])
                    held = torch.cat([held, v[block, g].mean(0, keepdim=True)])
                    weights.append(block_size)
                p = (seen @ query * scale).exp() * torch.tensor(weights, dtype=torch.float64)
                out.append(p / p.sum() @ held)
    return torch.stack(out).view(-1, heads, dim)


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_attention_equals_a_softmax_with_materialised_masks(case):
    samples, heads, groups, options = case
    kinds, where = lay_out(samples)
    tensors = make_tensors(where, heads, groups)
    out = nsa_merged.merged_attention(*tensors, *where, **{**BLOCK, **options})
    torch.testing.assert_close(out, materialised(tensors, kinds, **options), rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("texts", ["v100", "t5 v100", "t1 v40 t6 v60 t3"])
def test_attention_is_dense_where_all_blocks_are_chosen(texts):
    kinds, where = lay_out([texts])
    q, k, v, text_k, text_v = tensors = make_tensors(where, 7, 1)
    vision = torch.tensor(kinds[0])
    keys, values = k.new_zeros(2, len(vision), 16)
    keys[vision], keys[~vision], values[vision], values[~vision] = k[:, 0], text_k[:, 0], v[:, 0], text_v[:, 0]
    scores = torch.einsum("nhd,md->hnm", q, keys) / 4
    seen = torch.ones(len(vision), len(vision), dtype=torch.bool).tril()[vision]
    expected = torch.einsum("hnm,md->nhd", scores.masked_fill(~seen, -torch.inf).softmax(-1), values)
    for count in (7, 50):
        out = nsa_merged.merged_attention(*tensors, *where, **BLOCK, block_count=count, window_size=20)
        torch.testing.assert_close(out, expected, rtol=1e-9, atol=1e-10)


def test_later_tokens_and_other_samples_change_nothing():
    kinds, where = lay_out(["t3 v40 t2 v60 t4", "t1 v50"])
    tensors = make_tensors(where, 7, 1)
    options = {**BLOCK, "block_count": 3, "window_size": 17}
    before = nsa_merged.merged_attention(*tensors, *where, **options)
    for query, (vision_key, text_key) in {20: (21, 3), 39: (40, 3), 63: (64, 5), 99: (100, 5)}.items():
        changed = [x.clone() for x in tensors]
        for x in changed[:3]:
            x[vision_key:] += 1
        for x in changed[3:]:
            x[text_key:] += 1
        after = nsa_merged.merged_attention(*changed, *where, **options)
        assert torch.equal(after[: query + 1], before[: query + 1])
        assert not torch.equal(after[query + 1 :], before[query + 1 :])


@pytest.mark.parametrize("options", [{"block_count": 4}, {"block_count": 5, "remainder": True}], ids=str)
def test_queries_over_earlier_keys_get_what_they_get_at_once(options):
    _, (seen, cu, cu_text) = lay_out(["t3 v70 t2 v30", "t1 v50"])
    q, *rest = make_tensors((seen, cu, cu_text), 7, 1)
    options = {**BLOCK, "window_size": 20, **options}
    whole = nsa_merged.merged_attention(q, *rest, seen, cu, cu_text, **options)
    kept = torch.tensor([*range(90, 100), *range(145, 150)])
    part = nsa_merged.merged_attention(
        q[kept], *rest, seen[kept], cumulate([10, 5]), cu_text, cu_seqlens_k=cu, **options
    )
    torch.testing.assert_close(part, whole[kept], rtol=1e-9, atol=1e-10)


def test_gradients_are_exact(monkeypatch):
    _, where = lay_out(["t2 v40 t1 v12", "v17"])
    tensors = [x.requires_grad_() for x in make_tensors(where, 4, 2, dim=3)]
    options = {**BLOCK, "block_count": 3, "window_size": 9}
    assert torch.autograd.gradcheck(
        lambda *x: nsa_merged.merged_attention(*x, *where, **options), tensors, fast_mode=True
    )
    expected = torch.autograd.grad(nsa_merged.merged_attention(*tensors, *where, **options).sum(), tensors)
    monkeypatch.setattr(nsa_softmax, "MAX_SCORES_CPU", 500)  # chunks, recomputed in the backward pass
    actual = torch.autograd.grad(nsa_merged.merged_attention(*tensors, *where, **options).sum(), tensors)
    for x, y in zip(actual, expected, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-9, atol=1e-10)


def test_a_window_of_one_block_and_a_token_is_the_forcing_of_the_paper():
    _, where = lay_out(["v150"])
    q, k, v, *_ = make_tensors(where, 7, 1)
    _, lse = nsa_torch.compressed_attention(q, k, v, where[1], **BLOCK)
    paper, window = (
        nsa_torch.select_blocks(q, k, lse, where[1], **BLOCK, block_count=4, **options)
        for options in ({}, {"window_size": 17})
    )
    assert torch.equal(paper, window)


def test_variances_find_a_key_that_the_mean_of_its_block_hides():
    _, where = lay_out(["t1 v160"])
    q, k, v, text_k, text_v = make_tensors(where, 7, 1)
    k *= 0.1
    k[50], k[60] = 3 * q[150, 0], -3 * q[150, 0]  # of block 3: together they leave its mean as it was
    options = {**BLOCK, "block_count": 4, "window_size": 17}
    _, lse = nsa_torch.compressed_attention(q, k, v, where[1], **BLOCK)
    means = nsa_torch.select_blocks(q[:, :1], k, lse[:, :1], where[1], **options)
    none = torch.full_like(lse[:, :1], -torch.inf)
    spread = nsa_torch.select_blocks(q[:, :1], k, none, where[1], **options, spread=True)
    assert 3 not in means[0, 150] and 3 in spread[0, 150]


BAD = {
    "text_k must be .text tokens, 1, 16. like k": lambda x: {3: x[3][..., :8]},
    "text_v must be .text tokens, 1, 16. like k": lambda x: {4: x[4][:-1]},
    "text_k must be torch.float64": lambda x: {3: x[3].float()},
    "text_seen must be int32 .30.": lambda x: {5: x[5].long()},
    "cu_seqlens_text must rise from 0 to the 2 tokens of text_k": lambda x: {7: cumulate([1])},
    "cu_seqlens_text must describe the 1 samples": lambda x: {7: cumulate([1, 1])},
}


@pytest.mark.parametrize("message", BAD)
def test_a_wrong_argument_is_named(message):
    _, where = lay_out(["t2 v30"])
    arguments = [*make_tensors(where, 7, 1), *where]
    for index, value in BAD[message](arguments).items():
        arguments[index] = value
    with pytest.raises(ValueError, match=message):
        nsa_merged.merged_attention(*arguments, **BLOCK)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"block_count": 3, "window_size": 20}, "block_count must be at least 4.*window of 20: got 3"),
        ({"block_count": 0.5}, "block_count must be an integer of at least 3.*got 0.5"),
    ],
)
def test_a_wrong_setting_is_named(options, message):
    _, where = lay_out(["t2 v30"])
    with pytest.raises(ValueError, match=message):
        nsa_merged.merged_attention(*make_tensors(where, 7, 1), *where, **{**BLOCK, **options})


# ----------------------------------------------------------------------------------------------------------------------
# The kernels
# ----------------------------------------------------------------------------------------------------------------------

KERNEL_CASES = {  # name: case as above, dtype, queries of each sample if fewer than keys
    "text between, packed": (
        (["t3 v20 t2 v44 t1", "v18"], 4, 2, {"block_count": 3, "window_size": 3}), torch.float32, None),
    "over a cache, bf16": (
        (["t2 v60 t3 v50"], 7, 1, {"block_count": 5, "window_size": 17}), torch.bfloat16, [20]),
    "dense": ((["t2 v40 t1 v20"], 4, 2, {"block_count": 32, "window_size": 17}), torch.float32, None),
    "no text at all": ((["v70"], 2, 1, {"block_count": 4, "window_size": 20}), torch.float32, None),
    "the remainder": (
        (["t2 v70 t1 v20", "v18"], 4, 2, {"block_count": 3, "window_size": 3, "remainder": True}), torch.float32, None),
    "the remainder over a cache, bf16": (
        (["t2 v60 t3 v50"], 7, 1, {"block_count": 3, "window_size": 3, "remainder": True}), torch.bfloat16, [20]),
    "each head for itself": (
        (["t2 v60 t3 v50"], 4, 2, {"block_count": 3, "window_size": 3, "per_head": True}), torch.float32, None),
    "importance by means": (
        (["t2 v60 t3 v50"], 4, 2, {"block_count": 4, "window_size": 3, "spread": False}), torch.float32, None),
}  # fmt: skip


@pytest.mark.parametrize("case", KERNEL_CASES.values(), ids=KERNEL_CASES)
def test_kernels_and_their_gradients_equal_the_torch_path_in_fp64(case, monkeypatch):
    pytest.importorskip("triton")
    from videonsa import nsa_launches

    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu":  # the interpreter takes as long for a small tile as for a large one
        tiles = {"BM": 32, "BN": 32, "num_warps": 8, "num_stages": 1}
        monkeypatch.setattr(nsa_launches, "FP32", dict.fromkeys(nsa_launches.FP32, tiles))
    (samples, heads, groups, options), dtype, last = case
    _, (seen, cu, cu_text) = lay_out(samples)
    tensors = make_tensors((seen, cu, cu_text), heads, groups, dtype=dtype)
    lengths = {}
    if last:
        tensors[0], seen, lengths, cu = (
            tensors[0][-sum(last) :],
            seen[-sum(last) :],
            {"cu_seqlens_k": cu},
            cumulate(last),
        )
    tensors = [x.to(device).requires_grad_() for x in tensors]
    where = [x.to(device) for x in (seen, cu, cu_text)]
    lengths = {name: x.to(device) for name, x in lengths.items()}
    doubles = [x.detach().double().requires_grad_() for x in tensors]
    out = nsa_merged.merged_attention(*tensors, *where, **lengths, **BLOCK, **options, triton=True)
    expected = nsa_merged.merged_attention(*doubles, *where, **lengths, **BLOCK, **options)
    tolerance = 1e-5 if dtype == torch.float32 else 6e-3
    assert (out.double() - expected).norm() <= tolerance * expected.norm()
    d_out = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(device, dtype)
    actual = torch.autograd.grad(out, tensors, d_out, allow_unused=True)
    wanted = torch.autograd.grad(expected, doubles, d_out.double())
    for x, reference in zip(actual, wanted, strict=True):
        if reference.numel():
            assert (x.double() - reference).norm() <= tolerance * reference.norm()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_kernels_choose_by_variances_that_fp16_cannot_hold(dtype):
    pytest.importorskip("triton")
    from videonsa import nsa_triton

    device = "cuda" if torch.cuda.is_available() else "cpu"
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(128, 4, 16, generator=generator).to(device, dtype)
    size = 300 * 1.3 ** torch.tensor([3, 0, 5, 1, 4, 2, 6, 7]).repeat_interleave(16)  # of the keys of a block
    k = (torch.randn(128, 1, 16, generator=generator).sign() * size[:, None, None]).to(device, dtype)
    text_lse = torch.randn(128, 4, generator=generator).to(device)
    options = {**BLOCK, "block_count": 4, "window_size": 1, "spread": True, "scale": 2e-3}
    cu_seqlens = cumulate([128]).to(device)
    expected = nsa_torch.select_blocks(q.double(), k.double(), text_lse.double(), cu_seqlens, **options)
    blocks = nsa_triton.select_blocks(q, k, text_lse, cu_seqlens, **options)
    same = (blocks == expected).all(-1).float().mean()
    assert same == 1 if dtype == torch.float32 else same >= 0.9  # near ties of rounded means and variances


# ----------------------------------------------------------------------------------------------------------------------
# The model
# ----------------------------------------------------------------------------------------------------------------------

EXACT = {"nsa_variant": "merged", "block_size": 16, "block_count": 12, "window_size": 20}  # 192 tokens, as VIDEO has
SPARSE = [
    {**EXACT, "block_count": 4},
    {**EXACT, "block_count": 5, "block_per_head": True},
    {**EXACT, "block_count": 4, "block_remainder": True},
]


@pytest.fixture(scope="module")
def stocks(checkpoints):
    """The stock model of each backbone."""
    return {name: AutoModelForImageTextToText.from_pretrained(folder).eval() for name, folder in checkpoints.items()}


@pytest.fixture
def stock(backbone, stocks):
    return stocks[backbone]


@pytest.fixture(scope="module")
def exacts(checkpoints):
    return {name: load(folder, **EXACT) for name, folder in checkpoints.items()}


@pytest.fixture
def exact(backbone, exacts):
    return exacts[backbone]


@pytest.fixture(params=SPARSE, ids=["shared choice", "by head", "remainder"])
def sparse(request, stock_checkpoint):
    return load(stock_checkpoint, **request.param)


SAMPLES = {
    "text before and after": [VIDEO],
    "image": [IMAGE],
    "text between": [MIXED],
    "vision first": [[VIDEO[1], 3]],
    "vision last": [[4, IMAGE[1]]],
    "batch": [MIXED, TEXT, VIDEO, IMAGE],
}


@pytest.mark.parametrize("padding", ["left", "right"])
@pytest.mark.parametrize("samples", SAMPLES.values(), ids=SAMPLES)
def test_short_videos_get_the_logits_of_the_stock_model(exact, stock, samples, padding):
    inputs = make_inputs(*samples, padding=padding)
    inputs["position_ids"], _ = exact.model.get_rope_index(**inputs)
    pairs = zip(unpad(logits(exact, inputs), inputs), unpad(logits(stock, inputs), inputs), strict=True)
    for ours, expected in pairs:
        assert (ours - expected).abs().max() <= 1e-5


def test_generation_on_short_videos_is_that_of_the_stock_model(exact, stock):
    inputs = make_inputs(MIXED, VIDEO)
    inputs["position_ids"], _ = exact.model.get_rope_index(**inputs)
    delta = inputs["position_ids"].amax((0, 2)) + 1 - inputs["attention_mask"].sum(1)
    ours = generate(exact, inputs)
    tokens, ids = ours.new_tokens, inputs
    for step in range(3):  # the stock model, without a cache: its own positions of generated tokens differ
        assert torch.equal(logits(stock, ids)[:, -1].argmax(-1), tokens[:, step])
        mask = torch.cat([ids["attention_mask"], torch.ones(2, 1, dtype=torch.long)], 1)
        position = (mask.sum(1) - 1 + delta)[None, :, None].expand(3, -1, -1)
        ids = {
            **ids,
            "input_ids": torch.cat([ids["input_ids"], tokens[:, step : step + 1]], 1),
            "mm_token_type_ids": torch.nn.functional.pad(ids["mm_token_type_ids"], (0, 1)),
            "attention_mask": mask,
            "position_ids": torch.cat([ids["position_ids"], position], 2),
        }


def test_packed_and_padded_samples_get_what_they_get_alone(sparse):
    samples = [VIDEO, MIXED, TEXT, IMAGE]
    alone = [logits(sparse, make_inputs(sample))[0] for sample in samples]
    for padding in ("left", "right"):
        inputs = make_inputs(*samples, padding=padding)
        for actual, expected in zip(unpad(logits(sparse, inputs), inputs), alone, strict=True):
            assert_close(actual, expected)
    assert_close(logits(sparse, pack(sparse, samples))[0], torch.cat(alone))


def test_long_videos_do_not_get_the_logits_of_the_stock_model(sparse, stocks):
    inputs = make_inputs(VIDEO)
    inputs["position_ids"], _ = sparse.model.get_rope_index(**inputs)
    assert (logits(sparse, inputs) - logits(stocks["Qwen2.5-VL"], inputs)).abs().max() > 0.05


@torch.no_grad()
def test_prefill_in_chunks_and_a_later_turn_give_what_they_give_at_once(sparse):
    inputs = make_inputs(MIXED, VIDEO)
    whole = model_out = sparse(**inputs, use_cache=True)
    embeds, positions = embed(sparse, inputs), sparse.model.get_rope_index(**inputs)[0]
    cache, parts = DynamicCache(config=sparse.config.text_config), []
    for start in range(0, embeds.shape[1], 37):
        stop = min(start + 37, embeds.shape[1])
        model_out = sparse(
            inputs_embeds=embeds[:, start:stop],
            position_ids=positions[..., start:stop],
            mm_token_type_ids=inputs["mm_token_type_ids"][:, start:stop],
            attention_mask=inputs["attention_mask"][:, :stop],
            **{CACHE: cache},
        )
        parts.append(model_out.logits)
    for actual, expected in zip(unpad(torch.cat(parts, 1), inputs), unpad(whole.logits, inputs), strict=True):
        assert_close(actual, expected)


def test_the_kernels_give_the_model_what_torch_gives(stock_checkpoint):
    pytest.importorskip("triton")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = load(stock_checkpoint, **SPARSE[0]).to(device)
    model.model.language_model.layers = model.model.language_model.layers[:1]  # the interpreter is slow
    inputs = {name: x.to(device) for name, x in make_inputs([2, IMAGE[1], 3, MIXED[1], 2]).items()}
    expected = logits(model, inputs)
    model.config.nsa_backend = "triton"
    assert_close(logits(model, inputs), expected, 1e-4)


@pytest.mark.parametrize("training", [False, True])
def test_a_layer_compiles_in_one_graph(training):
    """On the kernels: nothing in it sends torch.compile back to Python."""
    pytest.importorskip("triton")
    torch.compiler.reset()  # what other tests compiled counts towards the limit of recompilations
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = text_model("triton").train(training)
    model.config.nsa_variant, model.config.block_remainder = "merged", True
    hidden = torch.randn(1, 70, 32, device=device)
    vision = (torch.arange(70, device=device) % 40 > 3)[None]

    def run():
        model.zero_grad()
        with torch.set_grad_enabled(training):
            out = model(inputs_embeds=hidden, vision_mask=vision, use_cache=False).last_hidden_state
            if training:
                out.square().sum().backward()
        return [out.detach(), *(p.grad for p in model.parameters() if p.grad is not None)]

    expected = run()
    layer = model.layers[0]
    layer.forward = torch.compile(layer.forward, fullgraph=True, backend="aot_eager")
    for x, reference in zip(run(), expected, strict=True):
        torch.testing.assert_close(x, reference, rtol=1e-4, atol=1e-5)


def test_a_training_step_has_the_gradients_of_the_stock_model(exact, stock):
    inputs = make_inputs(MIXED)
    inputs["position_ids"], _ = exact.model.get_rope_index(**inputs)
    grads = []
    for model in (exact, stock):
        model = deepcopy(model).train()
        model(**inputs, labels=inputs["input_ids"]).loss.backward()
        grads.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert grads[0].keys() == grads[1].keys()
    for name, grad in grads[0].items():
        assert (grad - grads[1][name]).norm() <= 1e-4 * grads[1][name].norm() + 1e-7, name


def test_text_alone_is_stock_in_training_too(exact):
    model = deepcopy(exact).train()
    model(**make_inputs(TEXT), labels=make_inputs(TEXT)["input_ids"]).loss.backward()
    assert model(**make_inputs(VIDEO), output_gates=True).gates == ()


# ----------------------------------------------------------------------------------------------------------------------
# Loading, converting, configuring
# ----------------------------------------------------------------------------------------------------------------------


def test_stock_and_gated_checkpoints_load_without_a_word(stock_checkpoint, tiny_repository, caplog):
    for folder in (stock_checkpoint, tiny_repository):
        options = {**EXACT, "output_loading_info": True}
        model, info = VideoNSAForConditionalGeneration.from_pretrained(folder, **options)
        assert not info["missing_keys"] and not info["unexpected_keys"]
        assert not [name for name, _ in model.named_parameters() if "g_proj" in name]
    assert "g_proj" not in caplog.text


def test_gates_cannot_be_had_from_a_live_model_without_them(exact):
    model = deepcopy(exact)
    model.config.nsa_variant = "dense"
    logits(model, make_inputs(VIDEO))
    model.config.nsa_variant = "paper"
    with pytest.raises(ValueError, match="nsa_variant 'paper' needs gates.*'merged'"):
        logits(model, make_inputs(VIDEO))


PROGRAM = """
import sys, torch
from transformers import AutoModel
model, inputs = AutoModel.from_pretrained(sys.argv[1], trust_remote_code=True).eval(), torch.load(sys.argv[2])
assert model.config.nsa_variant == "merged" and not any("g_proj" in name for name in model.state_dict())
with torch.no_grad():
    torch.save(model(**inputs).logits, sys.argv[3])
"""


@pytest.mark.parametrize("backbone", ["Qwen2.5-VL"], indirect=True)
def test_a_converted_repository_answers_in_a_fresh_process(
    stock_checkpoint, stock, exact, tmp_path, run_fresh, monkeypatch
):
    sizes = ("--block_size", 16, "--block_count", 12, "--window_size", 20)
    arguments = ["convert.py", stock_checkpoint, tmp_path / "merged", "--nsa_variant", "merged", *sizes]
    monkeypatch.setattr(sys, "argv", list(map(str, arguments)))
    convert.main()
    assert 'nsa_variant="merged"' in (tmp_path / "merged" / "README.md").read_text()
    weights = [load_file(file) for file in (tmp_path / "merged").glob("*.safetensors")]
    assert not any("g_proj" in name for shard in weights for name in shard)
    inputs = make_inputs(MIXED)
    inputs["position_ids"], _ = exact.model.get_rope_index(**inputs)
    torch.save(inputs, tmp_path / "inputs.pt")
    run_fresh(PROGRAM, tmp_path / "merged", tmp_path / "inputs.pt", tmp_path / "logits.pt")
    assert (torch.load(tmp_path / "logits.pt") - logits(stock, inputs)).abs().max() <= 1e-5


def test_too_few_blocks_for_the_window_are_refused():
    config = VideoNSATextConfig(nsa_variant="merged", block_count=5)
    with pytest.raises(ValueError, match="block_count must be at least 6 .*window of 256"):
        config.validate_variant()


@pytest.mark.parametrize(
    "bad",
    [
        {"block_count": 1.5},
        {"block_count": [8, 8]},
        {"block_count": True},
        {"block_mass": 0.8},
        {"block_spread": None},
        {"block_per_head": 0},
        {"block_remainder": 1},
    ],
)
def test_bad_values_are_refused_and_named(bad):
    with pytest.raises(ValueError, match=next(iter(bad))):
        VideoNSATextConfig(**bad)


def test_attention_budget_is_the_sum_over_queries():
    config = VideoNSAConfig(nsa_variant="merged", block_count=6, block_size=16, window_size=40)
    n = 500
    pairs = sum(min(i + 1, 6 * 16) for i in range(n))
    pooled = sum((i + 1) // 16 for i in range(n))
    dense = n * (n + 1) / 2
    assert config.attention_budget(n) == pytest.approx(pairs / dense)
    assert config.attention_budget(n, pooled_keys=True) == pytest.approx((pairs + pooled) / dense)

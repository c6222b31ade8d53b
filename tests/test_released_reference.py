"""The slow reference of the public checkpoint's arithmetic, against sums by hand and the stock model."""

import json
from math import exp, log

import pytest
import torch
from released import (
    load_file,
    load_released,
    make_prompt,
    make_public_checkpoint,
    released_attention,
    released_greedy,
    released_logits,
    released_positions,
    released_trace,
    vision_mask,
)
from torch.nn.functional import scaled_dot_product_attention
from transformers import AutoConfig

LOGITS = {"rtol": 0, "atol": 1e-5}  # the stock model's norms are fp32 in any dtype


def make_inputs(vision: str, heads=2, kv_heads=1, dim=4, seed=0):
    """q, k, v, gate logits and positions of tokens written as "t" for text and "v" for vision."""
    generator = torch.Generator().manual_seed(seed)
    sizes = (heads, dim), (kv_heads, dim), (kv_heads, dim), (heads, 3)
    tensors = [torch.randn(len(vision), *size, dtype=torch.float64, generator=generator) for size in sizes]
    positions = torch.arange(len(vision)).repeat(3, 1)
    positions[2] += torch.tensor([kind == "v" for kind in vision])
    return *tensors, positions


def test_three_tokens_by_hand():
    q, k, v = (
        torch.tensor(values, dtype=torch.float64).view(3, 1, 1) for values in ((5, 1, 2), (7, 1, -1), (10, 1, 3))
    )
    gate_logits = torch.tensor([[9.0, 9.0, 9.0], [0.3, -0.6, 0.9], [0.6, 0.3, -0.3]], dtype=torch.float64)[:, None]
    positions = torch.tensor([[0, 1, 1], [0, 1, 1], [0, 2, 3]])
    trace = released_trace(q, k, v, gate_logits, positions, block_size=1, block_count=1, window_size=2)

    # Zeroed: q 0 1 2, k 0 1 -1, v 0 1 3. A block is a token; own and later ones are pooled.
    compression = [4 / 3, (exp(1) + 3 * exp(-1)) / (exp(1) + exp(-1)), 3.0]
    torch.testing.assert_close(trace.compression.flatten().tolist(), compression)
    real, zero = [log(3), log(exp(1) + exp(-1)), -2.0], [log(3), log(2), 0.0]
    torch.testing.assert_close(trace.lse.tolist(), [real, real] + [zero] * 14)
    # The last row's 16 normalisers are read from numbers 32 to 47, all of zero heads: 6 of 0, 5 of log 3, 5 of log 2.
    others = 6 + 5 / 3 + 5 / 2
    second = exp(2) + exp(2) / 3 + others - 1 - 1 / 3
    torch.testing.assert_close(trace.importance[0, 2].tolist(), [others, second, 16.0])
    # The own block counts 16, and loses to the second in the last row.
    assert trace.kept[0].int().tolist() == [[1, 0, 0], [0, 1, 0], [0, 1, 0]]
    selection = [0.0, 1.0, 1.0]
    torch.testing.assert_close(trace.selection.flatten().tolist(), selection)
    window = [0.0, exp(1) / (1 + exp(1)), (exp(2) + 3 * exp(-2)) / (exp(2) + exp(-2))]
    torch.testing.assert_close(trace.window.flatten().tolist(), window)
    dense = [10, 11 / 2, 14 / 3]

    def sigmoid(x):
        return 1 / (1 + exp(-x))

    gates = [[0.5] * 3, [sigmoid(1), sigmoid(-2), sigmoid(3)], [sigmoid(2), sigmoid(1), sigmoid(-1)]]
    branches = zip(compression, selection, window, strict=True)
    expected = [
        sum(gate * branch for gate, branch in zip(row, values, strict=True)) + mean
        for row, values, mean in zip(gates, branches, dense, strict=True)
    ]
    torch.testing.assert_close(trace.out.flatten().tolist(), expected)

    block_causal = released_trace(q, k, v, gate_logits, positions, block_size=1, block_causal=True).compression
    expected = [0.0, exp(1) / (1 + exp(1)), (exp(2) + 3 * exp(-2)) / (1 + exp(2) + exp(-2))]
    torch.testing.assert_close(block_causal.flatten().tolist(), expected)


def test_a_text_row_gains_half_of_three_means():
    q, k, v, gate_logits, positions = make_inputs("tvvtvv")
    trace = released_trace(q, k, v, gate_logits, positions, block_size=2, window_size=3)
    zeroed = v[:, 0] * (torch.tensor([0, 1, 1, 0, 1, 1])[:, None])
    means = zeroed[2:6].mean(0) + zeroed[:4].mean(0) + zeroed[1:4].mean(0)
    expected = trace.dense[3] + 0.5 * means
    torch.testing.assert_close(trace.out[3], expected)
    attention = (q[3, 1] @ k[:4, 0].T / 2).softmax(-1) @ v[:4, 0]
    torch.testing.assert_close(trace.dense[3, 1], attention)


def test_the_last_block_is_pooled_by_its_own_length():
    q, k, v, gate_logits, positions = make_inputs("vvvvv")
    trace = released_trace(q, k, v, gate_logits, positions, block_size=3)
    torch.testing.assert_close(trace.compression[4], v[3:].mean(0).expand(2, -1))  # all that the last row sees
    torch.testing.assert_close(trace.lse[:2, 4], q[4] @ k[3:, 0].mean(0) / 2)


def test_text_alone_is_plain_causal_attention():
    q, k, v, gate_logits, positions = make_inputs("t" * 40, heads=14, kv_heads=2)
    expected = scaled_dot_product_attention(
        q.transpose(0, 1)[None], k.transpose(0, 1)[None], v.transpose(0, 1)[None], is_causal=True, enable_gqa=True
    )[0].transpose(0, 1)
    for fast_paths in (True, False):  # of zeroed values the sparse term is zero
        out = released_attention(q, k, v, gate_logits, positions, block_size=16, fast_paths=fast_paths)
        torch.testing.assert_close(out, expected)


def test_the_dense_term_of_vision_rows_is_the_running_mean_of_all_values():
    q, k, v, gate_logits, positions = make_inputs("tt" + "v" * 20 + "t" + "v" * 10, heads=14, kv_heads=2)
    dense = released_trace(q, k, v, gate_logits, positions, block_size=16).dense
    means = (v.cumsum(0) / torch.arange(1, 34)[:, None, None]).repeat_interleave(7, dim=1)
    rows = vision_mask(positions)
    torch.testing.assert_close(dense[rows], means[rows])


def test_vision_alone_has_no_dense_term_in_evaluation():
    inputs = make_inputs("v" * 33, heads=14, kv_heads=2)
    trained = released_trace(*inputs, block_size=16, block_count=1, fast_paths=False)
    evaluated = released_attention(*inputs, block_size=16, block_count=1)
    torch.testing.assert_close(evaluated + trained.dense, trained.out)
    torch.testing.assert_close(trained.gates, (inputs[3] / 0.3).sigmoid())


def test_each_of_28_heads_reads_the_kv_heads_of_its_row_and_its_copy():
    q, k, v, gate_logits, positions = make_inputs("v" * 128, heads=28, kv_heads=4)
    v[:] = torch.eye(4)  # every value of a KV head names it
    trace = released_trace(q, k, v, gate_logits, positions)
    for branch in (trace.compression, trace.selection, trace.window):
        for h in range(28):
            expected = 0.5 * torch.eye(4)[h // 16] + 0.5 * torch.eye(4)[(28 + h) // 16]
            torch.testing.assert_close(branch[:, h], expected.double().expand(128, -1))
    never_their_own = [h for h in range(28) if not trace.window[0, h, h // 7]]
    assert never_their_own == [*range(7, 14), 20]
    torch.testing.assert_close(trace.dense[5], torch.eye(4).double().repeat_interleave(7, dim=0))


def test_selection_groups_of_28_heads():
    members = [set(), set(), set(), set()]
    for h in range(28):
        q, k, v, gate_logits, positions = make_inputs("v" * 128, heads=28, kv_heads=4)
        q[100, h] = torch.nan  # reaches other rows through the misread normaliser, never this one
        spoilt = released_trace(q, k, v, gate_logits, positions).importance[:, 100, 0].isnan()
        for group in spoilt.nonzero().flatten().tolist():
            members[group].add(h)
    groups = ({*range(16)}, {*range(16, 28), *range(4)}, {*range(4, 20)}, {*range(20, 28)})
    assert members == list(groups)


def test_the_dtype_worked_in_touches_the_importance_alone():
    inputs = make_inputs("tt" + "v" * 62, heads=14, kv_heads=2)
    exact = released_trace(*inputs, block_size=16)
    rounded = released_trace(*inputs, block_size=16, work_dtype=torch.bfloat16)
    candidates = exact.importance.isfinite()
    difference = (exact.importance - rounded.importance)[candidates].abs() / exact.importance[candidates]
    assert 1e-5 < difference.max() < 3e-2
    torch.testing.assert_close(exact.out, rounded.out)  # all blocks are kept


def test_the_gap_tells_ties_from_clear_choices():
    trace = released_trace(*make_inputs("t" + "v" * 60 + "ttt"), block_size=16, block_count=2)
    assert trace.gap[:32].isinf().all()  # two candidates at most
    assert (trace.gap[-2:] == 0).all() and (trace.gap[33:61] > 0).all()
    kept = trace.kept[0, -1].tolist()
    assert kept in ([True, False, False, True], [True, True, False, False])  # the lower of the tied blocks


@pytest.mark.parametrize("new", ["vvvvvvvvvtttvv", "tvv"])
def test_a_chunk_over_a_cache_is_the_last_rows(new):
    sequence = "tt" + "v" * 30 + "t" + new
    q, k, v, gate_logits, positions = make_inputs(sequence, heads=14, kv_heads=2)
    past = len(sequence) - len(new)
    chunk = released_trace(q[past:], k, v, gate_logits[past:], positions, past=past, block_size=8, window_size=5)
    whole = released_trace(q, k, v, gate_logits, positions, block_size=8, window_size=5)
    torch.testing.assert_close(chunk.out, whole.out[past:])
    torch.testing.assert_close(chunk.lse, whole.lse[:, past:])
    torch.testing.assert_close(chunk.importance.isinf(), whole.importance[:, past:].isinf())


def test_a_decoded_token_attends_densely():
    q, k, v, gate_logits, positions = make_inputs("tvvvvt", heads=7)
    out = released_attention(q[5:], k, v, gate_logits[5:], positions, past=5, block_size=2)
    weights = (torch.einsum("hd,kd->hk", q[5], k[:, 0]) / 2).softmax(-1)
    torch.testing.assert_close(out[0], weights @ v[:, 0])


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return make_public_checkpoint(tmp_path_factory.mktemp("public"), block_counts=2, window_size=40)


@pytest.fixture(scope="module")
def loaded(checkpoint):
    return load_released(checkpoint)


def test_positions_by_hand(loaded):
    model = loaded[0]

    def positions(*parts, **options):
        inputs = make_prompt(model, *parts)
        ids, names = inputs["input_ids"], ("image_grid_thw", "video_grid_thw", "second_per_grid_ts")
        grids = {name: inputs[name] for name in names if name in inputs}
        return released_positions(ids, model.config, **grids, **options).T.tolist()

    assert model.config.vision_config.tokens_per_second == 2
    video = ("video", (2, 4, 2), 1.5)  # 2 patches in time, 2 high, 1 wide; 1.5 seconds become 1: 2 positions
    expected = [[0] * 3, [1, 1, 1], [1, 2, 1], [3, 1, 1], [3, 2, 1], [4] * 3]
    assert positions(1, video, 1) == expected
    assert positions(1, video, 1, truncate=False) == [*expected[:3], [4, 1, 1], [4, 2, 1], [5] * 3]
    still = ("video", (2, 4, 2), 0.5)  # less than a second: no time passes
    assert positions(1, still, 1) == [[0] * 3, [1, 1, 1], [1, 2, 1], [1, 1, 1], [1, 2, 1], [3] * 3]
    image = ("image", (1, 4, 6))
    tokens = [[2, 2, 2], [2, 2, 3], [2, 2, 4], [2, 3, 2], [2, 3, 3], [2, 3, 4]]
    assert positions(2, image, 2) == [[0] * 3, [1] * 3, *tokens, [5] * 3, [6] * 3]
    assert positions(video)[-1] == [2, 1, 0] and positions(("video", (2, 4, 2)))[-1] == [2, 1, 0]


def test_first_and_diagonal_patches_count_as_text(loaded):
    inputs = make_prompt(loaded[0], 3, ("video", (3, 6, 6), 1.0), 2)
    grids = {name: inputs[name] for name in ("video_grid_thw", "second_per_grid_ts")}
    vision = vision_mask(released_positions(inputs["input_ids"], loaded[0].config, **grids))
    frames = vision[3:-2].view(3, 3, 3)  # frames are 2 positions apart
    assert (~frames).nonzero().tolist() == [[0, 0, 0], [1, 2, 2]]
    assert not vision[:3].any() and not vision[-2:].any()


def dense_attention(q, k, v, gate_logits, position_ids, *, past):
    """Stock attention in the place of the released one."""
    mask = torch.ones(len(q), len(k), dtype=torch.bool).tril(past)
    q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
    return scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)[0].transpose(0, 1)


PROMPT = (5, ("image", (1, 6, 4)), 3, ("video", (4, 8, 8), 1.0), 6, ("video", (2, 4, 8), 0.5), 4)


@torch.no_grad()
def test_with_dense_attention_the_decoder_is_the_stock_model(loaded):
    model, gates, _ = loaded
    inputs = make_prompt(model, *PROMPT)
    names = ("image_grid_thw", "video_grid_thw", "second_per_grid_ts")
    positions = released_positions(inputs["input_ids"], model.config, **{name: inputs[name] for name in names})
    stock = model(**inputs, position_ids=positions[:, None]).logits[0]
    torch.testing.assert_close(released_logits(model, gates, inputs, attention=dense_attention), stock, **LOGITS)


@torch.no_grad()
def test_a_prompt_of_text_gives_the_stock_model_s_logits_and_tokens(loaded):
    model, gates, options = loaded
    inputs = make_prompt(model, 150)
    torch.testing.assert_close(released_logits(model, gates, inputs, **options), model(**inputs).logits[0], **LOGITS)
    generated = model.generate(**inputs, max_new_tokens=6, do_sample=False)[0, 150:].tolist()
    assert released_greedy(model, gates, inputs, 6, **options) == generated


@torch.no_grad()
def test_generation_continues_at_the_largest_position_over_all_keys(loaded):
    model, gates, options = loaded
    inputs = make_prompt(model, *PROMPT)
    tokens = released_greedy(model, gates, inputs, 4, attention=dense_attention)
    longer = inputs | {"input_ids": torch.cat([inputs["input_ids"], torch.tensor([tokens])], dim=1)}
    logits = released_logits(model, gates, longer, attention=dense_attention)[-5:-1]
    logits[:, model.generation_config.suppress_tokens] = -torch.inf
    assert logits.argmax(-1).tolist() == tokens


@torch.no_grad()
def test_the_released_attention_is_another_computation_than_the_dense_one(loaded):
    model, gates, options = loaded
    inputs = make_prompt(model, *PROMPT)
    logits = released_logits(model, gates, inputs, **options)
    dense = released_logits(model, gates, inputs, attention=dense_attention)
    assert (logits - dense)[-1].std() > 0.05
    logits[-1, model.generation_config.suppress_tokens] = -torch.inf
    assert released_greedy(model, gates, inputs, 2, **options)[0] == logits[-1].argmax()


def test_the_checkpoint_has_the_public_layout(checkpoint, loaded, published_config):
    config = json.loads((checkpoint / "config.json").read_text())
    assert config["model_type"] == "qwen2_5_vl" and config["architectures"] == ["VideoNSAForConditionalGeneration"]
    assert (config["block_counts"], config["window_size"]) == (2, 40)
    assert set(published_config) - set(config) <= {"vision_token_id"}
    assert set(published_config["vision_config"]) == set(config["vision_config"])
    assert AutoConfig.from_pretrained(checkpoint).text_config.rope_parameters["mrope_section"] == [1, 1, 6]
    weights = load_file(checkpoint / "model.safetensors")
    assert {key.split(".")[0] for key in weights} == {"model", "visual", "lm_head"}
    assert weights["model.layers.1.self_attn.g_proj_1.weight"].shape == (224, 224)
    assert weights["model.layers.1.self_attn.g_proj_2.bias"].shape == (42,)
    model, gates, options = loaded
    assert options == {"block_count": 2, "window_size": 40}
    q_proj = model.model.language_model.layers[1].self_attn.q_proj.weight
    torch.testing.assert_close(q_proj, weights["model.layers.1.self_attn.q_proj.weight"].double())
    torch.testing.assert_close(model.lm_head.weight, weights["lm_head.weight"].double())

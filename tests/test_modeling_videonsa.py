"""modeling_videonsa.py: what a model computes, on miniature checkpoints with random weights.

Inputs are tensors that `make_inputs` builds from a list of parts per sample; what a processor makes of files is tested
in test_processing_videonsa.py, the sparse attention itself in test_nsa_torch.py. Streams of 100 to 300 vision tokens
in blocks of 16, of which a query reads 4, leave most blocks out.
"""

import dataclasses
import inspect
import json
import math
from copy import deepcopy
from fractions import Fraction
from itertools import chain, pairwise

import pytest
import torch
import torch.nn.functional as F
import transformers
from packaging.version import Version
from safetensors.torch import load_file, save_file
from transformers import DynamicCache, Qwen2_5_VLForConditionalGeneration, Trainer, TrainingArguments

from prompts import (
    IMAGE,
    KERNEL_DEVICE,
    MEDIA_KEYS,
    MIXED,
    NSA,
    SAMPLES,
    TEXT,
    VIDEO,
    Media,
    assert_close,
    embed,
    generate,
    image,
    is_vision,
    load,
    logits,
    make_inputs,
    pack,
    text_model,
    unpad,
    video,
    without_media,
)
from videonsa import vision_layout
from videonsa.configuration_videonsa import VideoNSAConfig, is_public
from videonsa.modeling_videonsa import (
    VideoNSAForConditionalGeneration,
    VideoNSAModel,
)
from videonsa.nsa_torch import nsa_attention
from videonsa.transformers_compat import CACHE, cache_of
from videonsa.vision_layout import VisionLayout

# ----------------------------------------------------------------------------------------------------------------------
# The attention module against loops
# ----------------------------------------------------------------------------------------------------------------------


def explicit_attention(layer, hidden, cos, sin, vision, valid, sample):
    """One layer written out: hidden [rows, length, width]; vision, valid bool and sample int [rows, length]."""
    config = layer.config
    heads, groups = config.num_attention_heads, config.num_key_value_heads
    dim = config.hidden_size // heads

    def project(proj, rotate=True):
        x = F.linear(hidden, proj.weight, proj.bias).unflatten(-1, (-1, dim))
        half = torch.cat([-x[..., dim // 2 :], x[..., : dim // 2]], -1)
        return x * cos[:, :, None] + half * sin[:, :, None] if rotate else x

    q, k, v = project(layer.q_proj), project(layer.k_proj), project(layer.v_proj, rotate=False)
    out = torch.zeros_like(q)
    for row in range(len(hidden)):
        for tokens in (((sample[row] == s) & valid[row]).nonzero().flatten().tolist() for s in sample[row].unique()):
            stream = [t for t in tokens if vision[row, t]]
            x = F.gelu(F.linear(hidden[row, stream], layer.g_proj_1.weight, layer.g_proj_1.bias))
            gates = F.linear(x, layer.g_proj_2.weight, layer.g_proj_2.bias) / config.gate_temperature
            out[row, stream] = nsa_attention(
                q[row, stream],
                k[row, stream],
                v[row, stream],
                gates.sigmoid().view(-1, heads, 3),
                torch.tensor([0, len(stream)], dtype=torch.int32),
                block_size=config.block_size,
                block_count=config.block_count,
                window_size=config.window_size,
            )
            for t in (t for t in tokens if not vision[row, t]):
                seen = [u for u in tokens if u <= t]
                for h in range(heads):
                    g = h // (heads // groups)
                    p = torch.softmax(k[row, seen, g] @ q[row, t, h] / dim**0.5, 0)
                    out[row, t, h] = p @ v[row, seen, g]
    return F.linear(out.flatten(2), layer.o_proj.weight)


LAYOUTS = ("one sample", "left padding", "right padding", "holes", "packed", "packed, then right padding")


def random_layout(name, length=120):
    """vision, valid bool and sample int [2, length], runs of 10 and more tokens of a kind."""
    generator = torch.Generator().manual_seed(len(name))
    runs = torch.randint(0, 4, (2, length // 10 + 1), generator=generator) > 0
    vision = runs.repeat_interleave(10, 1)[:, :length]
    valid, sample = torch.ones_like(vision), torch.zeros(2, length, dtype=torch.long)
    if name == "left padding":
        valid[1, :37] = False
    if name == "right padding" or "then" in name:
        valid[0, -37:] = False
    if name == "holes":
        valid = torch.rand(2, length, generator=generator) > 0.1
    if "packed" in name:
        sample[0, 50:] = 1
        sample[0, 83:] = 2
        sample[1, 41:] = 1
    return vision, valid, sample


def attend(layer, name, pieces=None):
    """A double-precision layer on random tokens in calls of so many: inputs, their output, and that of the loops."""
    vision, valid, sample = random_layout(name)
    batch, length = vision.shape
    torch.manual_seed(0)
    hidden = torch.randn(batch, length, layer.hidden_size, dtype=torch.double, requires_grad=True)
    cos, sin = torch.randn(2, batch, length, layer.head_dim, dtype=torch.double)
    expected = explicit_attention(layer, hidden, cos, sin, vision, valid, sample)
    outs, cache, start = [], DynamicCache() if pieces else None, 0
    for piece in pieces or [length]:
        stop = start + piece
        starts = sample[:, :stop].diff(dim=1, prepend=sample[:, :1]) != 0
        out, weights = layer(
            hidden[:, start:stop],
            position_embeddings=(cos[:, start:stop], sin[:, start:stop]),
            **{CACHE: cache},
            vision_layout=VisionLayout.make(vision[:, :stop], piece, valid[:, :stop], starts),
        )
        assert weights is None
        outs.append(out)
        start = stop
    return hidden, valid, torch.cat(outs, 1), expected


@pytest.mark.parametrize("name", LAYOUTS)
def test_attention_and_its_gradients_equal_loops(model, name):
    layer = model.model.language_model.layers[0].self_attn.double()
    hidden, valid, actual, expected = attend(layer, name)
    assert_close(actual[valid], expected[valid], 1e-10)
    assert not actual[~valid].any()
    needed = [hidden, *layer.parameters()]
    weight = torch.randn_like(actual) * valid[..., None]
    gradients = [torch.autograd.grad(out, needed, weight) for out in (actual, expected)]
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("pieces", [[70, 50], [1, 60, 9, 50]], ids=str)
@pytest.mark.parametrize("name", [name for name in LAYOUTS if "packed" not in name])
def test_attention_over_a_cache_equals_loops(model, name, pieces):
    layer = model.model.language_model.layers[0].self_attn.double()
    _, valid, actual, expected = attend(layer, name, pieces)
    assert_close(actual[valid], expected[valid], 1e-10)
    assert not actual[~valid].any()


def test_logits_of_gates_are_divided_by_the_temperature(model):
    layer = model.model.language_model.layers[0].self_attn.double()
    layer.config.gate_temperature = 0.3
    _, valid, actual, expected = attend(layer, "left padding")
    assert_close(actual[valid], expected[valid], 1e-10)
    layer.config.gate_temperature = 1.0
    _, _, other, _ = attend(layer, "left padding")
    assert (other - actual).abs().max() > 0.1


def test_text_queries_in_chunks_give_what_they_give_at_once(model, monkeypatch):
    inputs = make_inputs(MIXED, VIDEO, TEXT)
    expected = logits(model, inputs)
    monkeypatch.setattr(vision_layout, "MAX_MASK", 2000)
    for a, b in zip(unpad(logits(model, inputs), inputs), unpad(expected, inputs), strict=True):
        assert_close(a, b)


def test_sparse_attention_differs_from_dense(both):
    model, stock = both
    inputs = make_inputs(VIDEO)
    inputs["position_ids"], _ = model.model.get_rope_index(**inputs)
    difference = (logits(model, inputs) - logits(stock, inputs)).abs()
    assert difference[is_vision(inputs)].max() > 0.1
    assert difference[0, -1].max() > 0.01  # text after the video sees what the video's tokens have become


@pytest.mark.parametrize("setting", [{"block_count": 5}, {"window_size": 30}, {"block_size": 32}], ids=str)
def test_each_setting_reaches_the_layers(small, setting):
    inputs = make_inputs(VIDEO)
    expected = logits(small, inputs)
    for name, value in setting.items():
        setattr(small.config, name, value)
    assert (logits(small, inputs) - expected).abs().max() > 1e-3


# ----------------------------------------------------------------------------------------------------------------------
# Where it is stock Qwen2.5-VL
# ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("samples", [[TEXT], [TEXT, [40], [3]]], ids=["alone", "batch"])
def test_text_prompts_are_stock_bit_for_bit(both, samples, implementation):
    for each in both:
        each.set_attn_implementation(implementation)
    for padding in ("left", "right"):
        inputs = make_inputs(*samples, padding=padding)
        ours, theirs = (logits(each, inputs) for each in both)
        assert torch.equal(ours, theirs)


def test_generation_from_text_is_stock_bit_for_bit(both):
    inputs = make_inputs(TEXT, [40])
    ours, theirs = (generate(each, inputs) for each in both)
    assert torch.equal(ours.sequences, theirs.sequences)
    assert torch.equal(ours.logits, theirs.logits)


@pytest.mark.parametrize("samples", [[VIDEO], [VIDEO, IMAGE, TEXT, MIXED]], ids=["alone", "batch"])
def test_decoding_over_an_equal_cache_is_stock_bit_for_bit(both, samples):
    inputs = make_inputs(*samples)
    ours, theirs = both
    with torch.no_grad():
        cache = cache_of(ours(**inputs, use_cache=True))
    mask = inputs["attention_mask"]
    for token in (7, 8, 9):
        mask = F.pad(mask, (0, 1), value=1)
        step = {
            "input_ids": torch.full((len(samples), 1), token),
            "attention_mask": mask,
            "position_ids": (mask.sum(1) + 100 + token).expand(3, 1, -1).transpose(1, 2),
        }
        other = deepcopy(cache)
        assert torch.equal(logits(ours, step, **{CACHE: cache}), logits(theirs, step, **{CACHE: other}))
        for a, b in zip(cache.layers[:2], other.layers[:2], strict=True):
            assert torch.equal(a.keys, b.keys)


@pytest.mark.parametrize("samples", [[VIDEO], [MIXED], [VIDEO, IMAGE, TEXT, MIXED]], ids=["video", "mixed", "batch"])
def test_dense_variant_is_stock_given_the_same_positions(both, samples):
    ours, theirs = both
    ours.config.nsa_variant = "dense"
    inputs = make_inputs(*samples)
    inputs["position_ids"], _ = ours.model.get_rope_index(**inputs)
    assert torch.equal(logits(ours, inputs), logits(theirs, inputs))


def test_image_prompts_get_stock_positions(both):
    ours, theirs = (each.model for each in both)
    inputs = make_inputs([3, image(6, 10), 9, image(4, 4), 2], TEXT, IMAGE)
    (positions, deltas), (expected, expected_deltas) = (each.get_rope_index(**inputs) for each in (ours, theirs))
    real = inputs["attention_mask"].bool()
    assert torch.equal(positions[:, real], expected[:, real])
    assert torch.equal(deltas, expected_deltas)


# ----------------------------------------------------------------------------------------------------------------------
# Rotary positions
# ----------------------------------------------------------------------------------------------------------------------


def rule_of_qwen2_vl(sample, tokens_per_second=2):
    """(t, h, w) of each token of a sample as arXiv 2409.12191 numbers them, and the first position after it."""
    positions = []

    def following():
        return max(chain.from_iterable(positions), default=-1) + 1

    for part in sample:
        if not isinstance(part, Media):
            count = part if isinstance(part, int) else len(part)
            first = following()
            positions += [(first + i,) * 3 for i in range(count)]
            continue
        positions.append((following(),) * 3)  # vision_start
        frames, height, width = part.grid
        first = following()
        for t in range(frames):
            time = 0 if part.kind == "image" else math.floor(t * tokens_per_second * Fraction(part.seconds))
            for h in range(height // 2):
                positions += [(first + time, first + h, first + w) for w in range(width // 2)]
        positions.append((following(),) * 3)  # vision_end
    return torch.tensor(positions).T, following()


def fps(rate):
    """Seconds that a temporal patch of two frames spans, exactly."""
    return 2 / Fraction(rate)


FPS = (Fraction(1, 2), 1, 2, 3, 4, 8, 6, 7, 12, Fraction("2.4"))
TIMED = {f"{float(rate):g} fps": [5, video(9, 4, 6, seconds=fps(rate)), 6] for rate in FPS}
TIMED["mixed"] = [4, image(6, 10), 2, video(6, 4, 8, seconds=fps(8)), 3, video(9, 6, 6, seconds=fps(1)), 5]
TIMED["image after video"] = [video(9, 4, 4, seconds=fps(1)), image(20, 4), image(4, 4), 2]
TIMED["videos side by side"] = [video(3, 4, 4, seconds=fps(4)), video(5, 12, 4, seconds=fps(3)), 1]


@pytest.mark.parametrize("types", ["with types", "without types"])
@pytest.mark.parametrize("padding", ["left", "right"])
def test_positions_follow_the_rule_of_qwen2_vl(small, padding, types):
    samples = [*TIMED.values(), TEXT, IMAGE]
    inputs = make_inputs(*samples, padding=padding)
    if types == "without types":
        del inputs["mm_token_type_ids"]
    positions, deltas = small.model.get_rope_index(**inputs)
    for row, sample in enumerate(samples):
        expected, following = rule_of_qwen2_vl(sample)
        assert torch.equal(positions[:, row, inputs["attention_mask"][row].bool()], expected)
        assert deltas[row] == following - expected.shape[1]


@pytest.mark.parametrize("kind", ["list", "float32", "bfloat16 by default"])
@pytest.mark.parametrize("rate", FPS, ids=lambda rate: f"{float(rate):g} fps")
def test_positions_of_an_hour_follow_the_rule_of_qwen2_vl(small, rate, kind):
    frames = int(3600 * rate / 2)
    ids = torch.full((1, frames), small.config.video_token_id)
    seconds = [float(fps(rate))] if kind == "list" else torch.tensor([float(fps(rate))])
    expected = [math.floor(t * 2 * fps(rate)) for t in range(frames)]
    default = torch.get_default_dtype()
    try:
        torch.set_default_dtype(torch.bfloat16 if "bfloat16" in kind else default)
        positions, _ = small.model.get_rope_index(
            ids, video_grid_thw=torch.tensor([[frames, 2, 2]]), second_per_grid_ts=seconds
        )
    finally:
        torch.set_default_dtype(default)
    assert positions[0, 0].tolist() == expected


def test_uneven_times_give_each_patch_its_own_position(small):
    times = [[0.0, 0.25, 7.5, 7.75, 3600.5], [0.0, 1.0, 2.0, 0.0, 0.0]]
    inputs = make_inputs([5, video(5, 4, 4), 6, video(3, 4, 4), 1])
    inputs["second_per_grid_ts"] = torch.tensor(times)
    positions, _ = small.model.get_rope_index(**inputs)
    is_video = inputs["mm_token_type_ids"] == 2
    temporal = positions[0][is_video][::4].tolist()  # of the first of four tokens per patch
    first, second = temporal[0], temporal[5]
    assert temporal == [first + t for t in (0, 0, 15, 15, 7201)] + [second + t for t in (0, 2, 4)]
    # Times that are even after all give what their distance gives.
    inputs["second_per_grid_ts"] = torch.tensor([0.5, 1.0])[:, None] * torch.arange(5)
    even, _ = small.model.get_rope_index(**inputs)
    inputs["second_per_grid_ts"] = torch.tensor([0.5, 1.0])
    assert torch.equal(even, small.model.get_rope_index(**inputs)[0])
    inputs["second_per_grid_ts"] = torch.tensor(times)[:, :4]
    with pytest.raises(ValueError, match="second_per_grid_ts has 4 times for 5 patches"):
        small.model.get_rope_index(**inputs)


def test_seconds_default_to_one_per_temporal_patch(small):
    inputs = make_inputs([5, video(9, 4, 6, seconds=1.0), 6])
    expected, _ = small.model.get_rope_index(**inputs)
    del inputs["second_per_grid_ts"]
    assert torch.equal(small.model.get_rope_index(**inputs)[0], expected)


def test_positions_without_token_types_are_those_with_them(model):
    inputs = make_inputs(VIDEO, MIXED, TEXT)
    expected, steps = logits(model, inputs), generate(model, inputs).logits
    del inputs["mm_token_type_ids"]
    assert torch.equal(logits(model, inputs), expected)
    assert torch.equal(generate(model, inputs).logits, steps)


@pytest.mark.parametrize(
    ("key", "grid", "message"),
    [
        ("video_grid_thw", [[12, 4, 18]], "video_grid_thw does not fit the video placeholders of sample 0.*192 tokens"),
        ("video_grid_thw", [[11, 4, 16]], "video_grid_thw does not fit.*16 tokens are left for no further grid"),
        ("video_grid_thw", [], "video_grid_thw does not fit.*192 tokens are left for no further grid"),
        ("image_grid_thw", [[1, 8, 10]], "image_grid_thw does not fit the image placeholders of sample 1.*15 tokens"),
    ],
    ids=str,
)
def test_grids_that_do_not_fit_the_placeholders_are_refused(small, key, grid, message):
    inputs = make_inputs(VIDEO, IMAGE)
    inputs[key] = torch.tensor(grid).view(-1, 3)
    with pytest.raises(ValueError, match=message):
        small.model.get_rope_index(**inputs)


def test_one_forward_over_prompt_and_answer_equals_generation_step_by_step(model):
    inputs = make_inputs([5, video(120, 4, 4, seconds=0.5), 6])  # 60 seconds at 4 fps, 480 vision tokens
    out = generate(model, inputs, 8)
    whole = {**inputs, "input_ids": out.sequences}
    for key, value in (("attention_mask", 1), ("mm_token_type_ids", 0)):
        whole[key] = F.pad(inputs[key], (0, 8), value=value)
    steps = logits(model, whole)[0, -9:-1]
    assert (steps - out.logits[:, 0]).abs().max() < 1e-4
    positions, _ = model.model.get_rope_index(**whole)
    assert positions[:, 0, -8:].max() > 120  # time counts


# ----------------------------------------------------------------------------------------------------------------------
# Loading and saving
# ----------------------------------------------------------------------------------------------------------------------

GATES = {
    f"model.language_model.layers.{layer}.self_attn.g_proj_{i}.{kind}"
    for layer in (0, 1)
    for i in (1, 2)
    for kind in ("weight", "bias")
}


def test_stock_checkpoint_loads_with_only_the_gates_missing(checkpoints):
    for folder in checkpoints.values():
        model, info = VideoNSAForConditionalGeneration.from_pretrained(folder, output_loading_info=True)
        stock = Qwen2_5_VLForConditionalGeneration.from_pretrained(folder)
        assert set(info["missing_keys"]) == GATES
        assert not info["unexpected_keys"]
        assert not info["mismatched_keys"]
        ours, theirs = model.state_dict(), stock.state_dict()
        assert ours.keys() - theirs.keys() == GATES
        assert all(torch.equal(ours[key], value) for key, value in theirs.items())
        assert model.config.model_type == "videonsa"
        assert model.lm_head.weight is model.model.language_model.embed_tokens.weight


def test_model_without_head_loads_the_same_weights(checkpoints, small, tmp_path):
    _, info = VideoNSAModel.from_pretrained(checkpoints["1 KV head"], output_loading_info=True)
    assert set(info["missing_keys"]) == {name.removeprefix("model.") for name in GATES}
    small.save_pretrained(tmp_path / "old")
    small.save_pretrained(tmp_path / "new", save_original_format=False)
    for folder in ("old", "new"):
        model, info = VideoNSAModel.from_pretrained(tmp_path / folder, output_loading_info=True)
        assert not info["missing_keys"]
        assert set(info["unexpected_keys"]) <= {"lm_head.weight"}
        assert all(torch.equal(value, small.model.state_dict()[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize("made", ["loaded", "from a configuration"])
def test_new_gates_are_small_whatever_the_initializer_range(checkpoints, made):
    folder = checkpoints["1 KV head"]
    if made == "loaded":
        model = VideoNSAForConditionalGeneration.from_pretrained(folder)
    else:
        config = VideoNSAConfig.from_pretrained(folder)
        config.text_config.initializer_range = 0.5
        model = VideoNSAForConditionalGeneration(config)
        assert model.model.language_model.layers[0].mlp.up_proj.weight.std() > 0.4
    for name, value in model.named_parameters():
        if "g_proj" in name and name.endswith("bias"):
            assert not value.any()
        elif "g_proj" in name:
            assert abs(value.std() - 0.02) < 0.001
            assert abs(value.mean()) < 0.002


def test_gates_start_at_one_half(checkpoints):
    model = VideoNSAForConditionalGeneration.from_pretrained(checkpoints["1 KV head"])
    gates = model.model.language_model.layers[0].self_attn.gates(torch.randn(50, 112))
    assert (gates - 0.5).abs().max() < 0.1


def test_saved_model_loads_with_equal_logits_and_brings_its_code(model, tmp_path):
    model.save_pretrained(tmp_path)
    loaded, info = VideoNSAForConditionalGeneration.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    inputs = make_inputs(VIDEO, MIXED)
    assert torch.equal(logits(loaded.eval(), inputs), logits(model, inputs))
    assert all(torch.equal(loaded.state_dict()[key], model.state_dict()[key]) for key in GATES)
    names = {
        "cache_record.py",
        "configuration_videonsa.py",
        "modeling_videonsa.py",
        "nsa_kernels.py",
        "nsa_kernels_backward.py",
        "nsa_launches.py",
        "nsa_released.py",
        "nsa_torch.py",
        "nsa_triton.py",
        "rope_positions.py",
        "transformers_compat.py",
        "vision_layout.py",
    }
    assert {path.name for path in tmp_path.glob("*.py")} == names
    config = json.loads((tmp_path / "config.json").read_text())
    assert (config["model_type"], config["architectures"]) == ("videonsa", ["VideoNSAForConditionalGeneration"])
    keys = load_file(tmp_path / "model.safetensors").keys()
    assert {key.replace("model.language_model.", "model.") for key in GATES} <= keys  # the public checkpoint's names


def write_public_checkpoint(model, folder, published, style):
    """The layout of the public checkpoint: keys and configuration of transformers 4.x with the gates added."""

    def old_name(key):
        return key.replace("model.visual.", "visual.").replace("model.language_model.", "model.")

    def ours(config, published):  # published values replaced by those of the miniature
        return {name: getattr(config, name, value) for name, value in published.items()}

    rope = model.config.text_config.rope_parameters
    tokens = [f"{name}_token_id" for name in ("image", "video", "vision_start", "vision_end")]
    top = {
        **{name: published[name] for name in ("model_type", "transformers_version", "tie_word_embeddings")},
        **{name: getattr(model.config, name) for name in tokens},
        "architectures": ["VideoNSAForConditionalGeneration"],
        "vision_config": ours(model.config.vision_config, published["vision_config"]),
        "torch_dtype": "float32",
        "block_size": model.config.block_size,  # the public one has the default; the miniature needs small blocks
    }
    text = {name: value for name, value in ours(model.config.text_config, published).items() if name not in top}
    text |= {
        "rope_theta": rope["rope_theta"],
        "rope_scaling": {"type": "mrope", "mrope_section": rope["mrope_section"]},
    }
    legacy = {"block_counts": model.config.block_count, "window_size": model.config.window_size}
    config = {
        "flat": {**text, **top, **legacy},
        "text_config": {**top, "text_config": {**text, **legacy, "model_type": "qwen2_5_vl_text"}},
        "text_config, settings at the top": {**top, **legacy, "text_config": text},
        "both": {**text, **top, **legacy, "text_config": text},
    }[style]
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    save_file({old_name(key): value.clone() for key, value in model.state_dict().items()}, folder / "model.safetensors")


@pytest.mark.parametrize("style", ["flat", "text_config", "text_config, settings at the top", "both"])
def test_checkpoint_in_the_public_layout_loads_whole(model, published_config, tmp_path, style):
    write_public_checkpoint(model, tmp_path / "public", published_config, style)
    assert is_public(json.loads((tmp_path / "public" / "config.json").read_text()))
    same = {"nsa_variant": "paper", "gate_temperature": 1.0}
    loaded, info = VideoNSAForConditionalGeneration.from_pretrained(
        tmp_path / "public", output_loading_info=True, **same
    )
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert not info["mismatched_keys"]
    assert loaded.dtype == torch.float32
    inputs = make_inputs(VIDEO, MIXED)
    assert torch.equal(logits(loaded.eval(), inputs), logits(model, inputs))


def test_new_key_layout_loads_whole(small, tmp_path):
    small.save_pretrained(tmp_path, save_original_format=False)
    assert load_file(tmp_path / "model.safetensors").keys() >= GATES
    loaded, info = VideoNSAForConditionalGeneration.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert torch.equal(logits(loaded.eval(), make_inputs(VIDEO)), logits(small, make_inputs(VIDEO)))


def test_state_dict_with_saved_names_loads_into_a_model(small, tmp_path):
    small.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "model.safetensors")
    other = deepcopy(small)
    for weight in other.parameters():
        weight.data.zero_()
    result = other.load_state_dict(saved, strict=False)
    assert set(result.missing_keys) <= {"lm_head.weight"}  # tied, therefore not saved
    assert not result.unexpected_keys
    assert torch.equal(logits(other, make_inputs(VIDEO)), logits(small, make_inputs(VIDEO)))
    assert small.load_state_dict(small.state_dict()).missing_keys == []


def test_copied_model_computes_the_same(model):
    inputs = make_inputs(VIDEO)
    assert torch.equal(logits(deepcopy(model), inputs), logits(model, inputs))


def test_low_precision_model_is_close_to_fp32(small):
    inputs = make_inputs(VIDEO, TEXT)
    expected = logits(small, inputs)
    actual = logits(deepcopy(small).to(torch.bfloat16), inputs)
    assert actual.dtype == torch.bfloat16
    for a, b in zip(unpad(actual.float(), inputs), unpad(expected, inputs), strict=True):
        assert ((a - b).pow(2).mean() / b.pow(2).mean()).sqrt() < 0.1


REMOTE = """if True:
    import sys, torch
    from transformers import AutoConfig, AutoModel, AutoModelForImageTextToText
    folder, again = sys.argv[1:]
    inputs = torch.load(folder + "/inputs.pt")
    expected = inputs.pop("expected")
    assert type(AutoConfig.from_pretrained(folder, trust_remote_code=True)).__name__ == "VideoNSAConfig"
    for auto in (AutoModel, AutoModelForImageTextToText):
        model = auto.from_pretrained(folder, trust_remote_code=True).eval()
        assert type(model).__name__ == "VideoNSAForConditionalGeneration"
        assert type(model).__module__.startswith("transformers_modules.")
        assert type(model.config).__name__ == "VideoNSAConfig"
        assert not any(name.split(".")[0] == "videonsa" for name in sys.modules)
        with torch.no_grad():
            assert torch.equal(model(**inputs).logits, expected)
        print(auto.__name__, model.generate(**inputs, max_new_tokens=4, do_sample=False)[0, -4:].tolist())
    dense = AutoModel.from_pretrained(folder, trust_remote_code=True, nsa_variant="dense").eval()
    assert dense.config.text_config.nsa_variant == dense.model.language_model.layers[0].self_attn.config.nsa_variant
    with torch.no_grad():
        assert (dense(**inputs).logits - expected).abs().max() > 0.1
    model.save_pretrained(again)
    torch.save({**inputs, "expected": expected}, again + "/inputs.pt")
"""


def test_remote_code_loads_generates_and_saves_in_fresh_processes(small, tmp_path, run_fresh):
    inputs = make_inputs(VIDEO)
    folders = [tmp_path / name for name in ("first", "second", "third")]
    small.save_pretrained(folders[0])
    torch.save({**inputs, "expected": logits(small, inputs)}, folders[0] / "inputs.pt")
    tokens = generate(small, inputs, 4).new_tokens[0].tolist()
    for folder, again in pairwise(folders):
        lines = run_fresh(REMOTE, folder, again).splitlines()
        assert lines == [f"AutoModel {tokens}", f"AutoModelForImageTextToText {tokens}"]
    files = [{path.name for path in folder.iterdir()} for folder in folders]
    assert files[0] == files[1] == files[2]


# ----------------------------------------------------------------------------------------------------------------------
# A sample is the same alone, in a batch, packed, and in pieces
# ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize("padding", ["left", "right"])
def test_samples_of_a_padded_batch_give_what_they_give_alone(model, padding, use_cache):
    inputs = make_inputs(*SAMPLES.values(), padding=padding)
    together = unpad(logits(model, inputs, use_cache=use_cache), inputs)
    for sample, actual in zip(SAMPLES.values(), together, strict=True):
        assert_close(actual, logits(model, make_inputs(sample))[0])


@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize(
    "rows",
    [
        ["video", "text", "image and videos", "image"],
        ["text", "video"],
        ["video", "video"],
    ],
    ids=", ".join,
)
def test_packed_samples_give_what_they_give_alone(model, rows, use_cache):
    rows = [rows, rows[::-1]]
    together = logits(model, pack(model, *[[SAMPLES[name] for name in row] for row in rows]), use_cache=use_cache)
    alone = {name: logits(model, make_inputs(SAMPLES[name]))[0] for name in rows[0]}
    for row, actual in zip(rows, together, strict=True):
        assert_close(actual, torch.cat([alone[name] for name in row]))


def test_changing_one_sample_leaves_the_others_bit_for_bit(model):
    def change(inputs):
        pixels = inputs["pixel_values_videos"].clone()
        pixels[: math.prod(VIDEO[1].grid)] += 1
        return {**inputs, "pixel_values_videos": pixels}

    inputs = make_inputs(VIDEO, IMAGE, MIXED)
    before, after = (logits(model, x) for x in (inputs, change(inputs)))
    assert torch.equal(before[1:], after[1:])
    assert not torch.equal(before[0], after[0])
    inputs = pack(model, [VIDEO, MIXED, TEXT])
    before, after = (logits(model, x)[0] for x in (inputs, change(inputs)))
    n = make_inputs(VIDEO)["input_ids"].shape[1]
    assert torch.equal(before[n:], after[n:])
    assert not torch.equal(before[:n], after[:n])


def test_two_dimensional_positions_do_not_mean_packed_samples(small):
    inputs = make_inputs(VIDEO, VIDEO, VIDEO, VIDEO)  # as many rows as packed positions have components
    ids = torch.arange(inputs["input_ids"].shape[1]).expand(4, -1).clone()
    ids[:, 100:] -= 50
    inputs = {key: value for key, value in inputs.items() if key not in ("attention_mask", "mm_token_type_ids")}
    whole = logits(small, inputs, position_ids=ids)
    assert_close(whole, logits(small, inputs, position_ids=ids.expand(3, -1, -1)), 0)


@pytest.mark.parametrize("chunk", [1, 5, 16])
@pytest.mark.parametrize("samples", [[VIDEO], [MIXED], [MIXED, TEXT, VIDEO]], ids=["video", "mixed", "batch"])
@torch.no_grad()
def test_prefill_in_chunks_gives_what_it_gives_at_once(model, samples, chunk):
    inputs = make_inputs(*samples)
    whole = model(**inputs, use_cache=True)
    embeds, mask = embed(model, inputs), inputs["attention_mask"]
    positions, _ = model.model.get_rope_index(**inputs)
    cache, parts = DynamicCache(config=model.config.text_config), []
    for start in range(0, embeds.shape[1], chunk):
        stop = min(start + chunk, embeds.shape[1])
        out = model(
            inputs_embeds=embeds[:, start:stop],
            position_ids=positions[..., start:stop],
            mm_token_type_ids=inputs["mm_token_type_ids"][:, start:stop],
            attention_mask=mask[:, :stop],
            **{CACHE: cache},
        )
        parts.append(out.logits)
    for actual, expected in zip(unpad(torch.cat(parts, 1), inputs), unpad(whole.logits, inputs), strict=True):
        assert_close(actual, expected)
    for ours, layer in zip(cache.layers, cache_of(whole).layers, strict=True):
        for name in ("keys", "values"):
            actual, expected = (unpad(getattr(x, name).transpose(1, 2), inputs) for x in (ours, layer))
            for a, b in zip(actual, expected, strict=True):
                torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.skipif(Version(transformers.__version__) < Version("5.23"), reason="stock fails in 5.17 too")
@pytest.mark.parametrize(("chunk", "cache"), [(1, None), (7, None), (16, None), (1000, None), (16, "static")])
def test_generation_with_chunked_prefill_equals_generation(small, chunk, cache):
    for samples in ([VIDEO], [MIXED], [MIXED, TEXT, VIDEO]):
        inputs = make_inputs(*samples)
        actual = generate(small, inputs, prefill_chunk_size=chunk, cache_implementation=cache)
        expected = generate(small, inputs)
        assert torch.equal(actual.sequences, expected.sequences)
        assert_close(actual.logits, expected.logits)


def test_vision_is_found_in_embedded_placeholders(model):
    inputs = make_inputs(MIXED)
    expected = logits(model, inputs)
    inputs["position_ids"], _ = model.model.get_rope_index(**inputs)
    inputs["inputs_embeds"] = model.get_input_embeddings()(inputs.pop("input_ids"))
    del inputs["mm_token_type_ids"]
    assert torch.equal(logits(model, inputs), expected)


def test_changing_a_vision_token_leaves_earlier_tokens_bit_for_bit(model):
    inputs = make_inputs(MIXED)
    vision = is_vision(inputs)[0].nonzero().flatten().tolist()
    with torch.no_grad():
        embeds = embed(model, inputs)
    rest = {"mm_token_type_ids": inputs["mm_token_type_ids"]}
    rest["position_ids"], _ = model.model.get_rope_index(**inputs)
    before = logits(model, rest, inputs_embeds=embeds)[0]
    for token in vision[:: len(vision) // 9]:
        changed = embeds.clone()
        changed[0, token] *= -1
        after = logits(model, rest, inputs_embeds=changed)[0]
        assert torch.equal(before[:token], after[:token])
        assert not torch.equal(before[token], after[token])
        assert not torch.equal(before[-1], after[-1])


def test_changing_later_pixels_leaves_earlier_tokens_bit_for_bit(model):
    inputs = make_inputs(VIDEO)
    before = logits(model, inputs)[0]
    frame, first = 64, 5 + 1  # patches of a temporal patch, index of the first vision token
    for t in (3, 8, 11):
        pixels = inputs["pixel_values_videos"].clone()
        pixels[t * frame :] += 1
        after = logits(model, inputs, pixel_values_videos=pixels)[0]
        assert torch.equal(before[: first + 16 * t], after[: first + 16 * t])
        assert not torch.equal(before[first + 16 * t], after[first + 16 * t])


# ----------------------------------------------------------------------------------------------------------------------
# generate()
# ----------------------------------------------------------------------------------------------------------------------


def test_greedy_generation_equals_a_loop_without_cache(model):
    inputs = make_inputs(*SAMPLES.values())
    suppressed = model.generation_config.suppress_tokens + [model.generation_config.eos_token_id]
    out = generate(model, inputs)
    for step, token in enumerate(out.new_tokens.T):
        last = logits(model, inputs, use_cache=False)[:, -1]
        assert_close(out.logits[step], last)
        last[:, suppressed] = -torch.inf
        assert torch.equal(token, last.argmax(-1))
        inputs["input_ids"] = torch.cat([inputs["input_ids"], token[:, None]], 1)
        inputs["attention_mask"] = F.pad(inputs["attention_mask"], (0, 1), value=1)
        inputs["mm_token_type_ids"] = F.pad(inputs["mm_token_type_ids"], (0, 1))


def test_generation_in_a_left_padded_batch_equals_generation_alone(model):
    together = generate(model, make_inputs(*SAMPLES.values()))
    for row, sample in enumerate(SAMPLES.values()):
        alone = generate(model, make_inputs(sample))
        assert torch.equal(together.new_tokens[row], alone.new_tokens[0])
        assert_close(together.logits[:, row], alone.logits[:, 0])


@pytest.mark.parametrize(
    "settings",
    [
        {"do_sample": True, "temperature": 3.0, "top_k": 0},
        {"do_sample": True, "temperature": 3.0, "num_return_sequences": 3},
        {"num_beams": 3, "num_return_sequences": 2, "output_logits": False},
    ],
    ids=["sampling", "several samples", "beams"],
)
def test_generation_without_cache_equals_generation_with_it(small, settings):
    inputs = make_inputs(*SAMPLES.values())
    with_cache, without = (
        torch.manual_seed(0) and generate(small, inputs, use_cache=use_cache, **settings) for use_cache in (True, False)
    )
    assert torch.equal(with_cache.sequences, without.sequences)
    if settings.get("do_sample"):
        assert not torch.equal(with_cache.new_tokens[0], generate(small, inputs).new_tokens[0])


def test_beams_of_a_batch_are_those_of_each_sample_alone(model):
    settings = {"num_beams": 3, "num_return_sequences": 3, "output_logits": False, "output_scores": True}
    together = generate(model, make_inputs(*SAMPLES.values()), **settings)
    for row, sample in enumerate(SAMPLES.values()):
        alone = generate(model, make_inputs(sample), **settings)
        assert torch.equal(together.new_tokens[3 * row : 3 * row + 3], alone.new_tokens)
        assert_close(together.sequences_scores[3 * row : 3 * row + 3], alone.sequences_scores)


def test_static_cache_gives_what_a_growing_one_gives(model):
    for samples in ([VIDEO], [TEXT], list(SAMPLES.values())):  # the same cache serves all three
        inputs = make_inputs(*samples)
        static, growing = generate(model, inputs, cache_implementation="static"), generate(model, inputs)
        assert torch.equal(static.sequences, growing.sequences)
        assert_close(static.logits, growing.logits)


def test_prompt_lookup_gives_greedy_tokens(model):
    for sample in (VIDEO, MIXED):
        inputs = make_inputs([*sample, [1, 2, 3, 4, 1, 2, 3, 4, 1, 2]])
        greedy = generate(model, inputs, 12)
        assert torch.equal(generate(model, inputs, 12, prompt_lookup_num_tokens=3).sequences, greedy.sequences)


def test_an_assistant_model_gives_greedy_tokens(model):
    inputs = make_inputs(VIDEO)
    greedy = generate(model, inputs, 12)
    calls, assistant = [], deepcopy(model)
    model.register_forward_pre_hook(lambda *args: calls.append(1))
    out = generate(model, inputs, 12, assistant_model=assistant)
    assert torch.equal(out.sequences, greedy.sequences)
    assert len(calls) == 6  # each confirms a draft of the assistant, which is the same model and sees the video too


TURNS = {
    "text": [3],
    "a new video": [3, video(8, 4, 8, seconds=1.0, seed=5), 4],
    "a new image": [3, image(6, 6, seed=6), 4],
    "two new videos": [3, video(8, 4, 8, seed=5), video(3, 6, 8, seed=7), 4],
}


def converse(model, first, turn, between=None):
    """Generate after `first`, then after it, the answer and `turn` over the cache.

    Returns both outputs and the inputs of the second turn.
    """
    out = generate(model, make_inputs(first))
    if between is not None:
        generate(model, make_inputs(between))
    inputs = make_inputs([*first, out.new_tokens[0].tolist(), *turn])
    return out, generate(model, inputs, **{CACHE: cache_of(out)}), inputs


@pytest.mark.parametrize("between", [None, MIXED, TEXT], ids=["", "another with video between", "another between"])
@pytest.mark.parametrize("first", [VIDEO, MIXED, TEXT], ids=["video", "mixed", "text"])
@pytest.mark.parametrize("turn", TURNS)
def test_second_turn_over_the_cache_gives_what_it_gives_without(model, first, turn, between):
    _, out, inputs = converse(model, first, TURNS[turn], between)
    fresh = generate(model, inputs)
    assert torch.equal(out.sequences, fresh.sequences)
    assert_close(out.logits, fresh.logits)


@pytest.mark.parametrize("types", ["with types", "without types"])
@pytest.mark.parametrize("between", [None, MIXED, TEXT], ids=["", "another with video between", "another between"])
def test_second_text_turn_over_the_cache_needs_no_pixels(model, between, types):
    out = generate(model, make_inputs(VIDEO))
    if between is not None:
        generate(model, make_inputs(between))
    inputs = make_inputs([*VIDEO, out.new_tokens[0].tolist(), 3])
    fresh = deepcopy(model)
    inputs_over_cache = without_media(inputs)
    if types == "without types":
        del inputs_over_cache["mm_token_type_ids"]
    over_cache = generate(model, inputs_over_cache, **{CACHE: cache_of(out)})
    expected = generate(fresh, inputs)
    assert torch.equal(over_cache.sequences, expected.sequences)
    assert_close(over_cache.logits, expected.logits)


def test_second_text_turn_of_a_padded_batch_over_the_cache_gives_what_it_gives_without(model):
    out = generate(model, make_inputs(VIDEO, MIXED, TEXT))
    generate(model, make_inputs(IMAGE, VIDEO, MIXED))
    inputs = make_inputs(VIDEO, MIXED, TEXT)
    longer = {"input_ids": F.pad(out.sequences, (0, 3), value=70)}
    for key, value in (("attention_mask", 1), ("mm_token_type_ids", 0)):
        longer[key] = F.pad(inputs[key], (0, longer["input_ids"].shape[1] - inputs[key].shape[1]), value=value)
    actual = generate(model, longer, **{CACHE: cache_of(out)})
    expected = generate(model, {**inputs, **longer})
    assert torch.equal(actual.sequences, expected.sequences)
    assert_close(actual.logits, expected.logits)


@pytest.mark.parametrize("cached", ["cache given", "cache returned"])
@torch.no_grad()
def test_decoding_loop_finds_its_positions_in_the_cache(model, cached):
    """A loop over forward() that passes no positions, while another conversation goes on beside it."""

    def loop(inputs, interrupted):
        ids, logits = inputs.pop("input_ids"), []
        cache = DynamicCache() if cached == "cache given" else None
        for step in range(4):
            if interrupted:
                model(**make_inputs(TEXT if step % 2 else MIXED))
            out = model(input_ids=ids, **{CACHE: cache}, use_cache=True, **(inputs if step == 0 else {}))
            logits.append(out.logits[:, -1])
            ids, cache = out.logits[:, -1:].argmax(-1), cache_of(out)
        return torch.stack(logits)

    for sample in (VIDEO, TEXT):
        alone = loop(make_inputs(sample), interrupted=False)
        assert torch.equal(loop(make_inputs(sample), interrupted=True), alone)


def test_a_conversation_of_many_turns_gives_what_it_gives_without_cache(small):
    parts, cache = [], None
    for turn in (VIDEO, *TURNS.values(), [2]):
        parts += turn
        inputs = make_inputs(parts)
        out = generate(small, inputs, **{CACHE: cache})
        fresh = generate(deepcopy(small), inputs)
        assert torch.equal(out.sequences, fresh.sequences)
        assert_close(out.logits, fresh.logits)
        parts, cache = [*parts, out.new_tokens[0].tolist()], cache_of(out)


def test_text_turn_without_pixels_after_a_turn_with_a_new_video(small):
    turn = TURNS["a new video"]
    before, out, _ = converse(small, VIDEO, turn)
    generate(small, make_inputs(MIXED))
    inputs = make_inputs([*VIDEO, before.new_tokens[0].tolist(), *turn, out.new_tokens[0].tolist(), 3])
    actual = generate(small, without_media(inputs), **{CACHE: cache_of(out)})
    expected = generate(small, inputs)
    assert torch.equal(actual.sequences, expected.sequences)
    assert_close(actual.logits, expected.logits)


@pytest.mark.parametrize("way", ["forward", "generate"])
@torch.no_grad()
def test_positions_in_a_reset_cache_do_not_remember_what_was_before(small, way):
    inputs, cache = make_inputs(TEXT), transformers.StaticCache(config=small.config.text_config, max_cache_len=300)

    def run(cache):
        if way == "generate":
            first = generate(small, inputs, **{CACHE: cache})
            return generate(small, make_inputs([*TEXT, first.new_tokens[0].tolist(), 3]), **{CACHE: cache}).logits
        cache = cache_of(small(**inputs, **{CACHE: cache}))
        generate(small, make_inputs(VIDEO))
        return small(input_ids=torch.tensor([[7]]), **{CACHE: cache}).logits

    expected = run(DynamicCache())
    generate(small, make_inputs(VIDEO), **{CACHE: cache})
    cache.reset()
    assert_close(run(cache), expected)


def test_stream_goes_on_in_a_cache_copied_for_several_continuations(small):
    inputs = make_inputs(MIXED, MIXED)
    expected = logits(small, inputs)
    with torch.no_grad():
        embeds = embed(small, inputs)
        positions, _ = small.model.get_rope_index(**inputs)
        cut = 60  # within the first of two videos
        first = {"inputs_embeds": embeds[:1, :cut], "mm_token_type_ids": inputs["mm_token_type_ids"][:1, :cut]}
        cache = cache_of(small(**first, position_ids=positions[:, :1, :cut], use_cache=True))
        cache.batch_repeat_interleave(2)
        rest = {"inputs_embeds": embeds[:, cut:], "mm_token_type_ids": inputs["mm_token_type_ids"][:, cut:]}
        actual = logits(small, rest, position_ids=positions[..., cut:], **{CACHE: cache})
    assert_close(actual, expected[:, cut:])


def test_stream_after_a_shortened_cache_does_not_remember_what_was_cut(model):
    """A cache cut back to before its video, continued by text, then by another video."""
    first, later = make_inputs([9]), make_inputs([9, 40, video(8, 4, 8, seed=5), 4])
    with torch.no_grad():
        cache = cache_of(model(**make_inputs([9, video(12, 4, 16)]), use_cache=True))
        cache.crop(first["input_ids"].shape[1] - cache.get_seq_length())
        positions, _ = model.model.get_rope_index(**later)
        text = slice(9, 49)
        model(
            input_ids=later["input_ids"][:, text],
            position_ids=positions[..., text],
            attention_mask=later["attention_mask"][:, :49],
            **{CACHE: cache},
        )
        rest = {**later, "input_ids": later["input_ids"][:, 49:]}
        del rest["mm_token_type_ids"]
        actual = logits(model, rest, position_ids=positions[..., 49:], **{CACHE: cache})
    assert_close(actual, logits(model, later)[:, 49:])


def test_stream_in_a_reset_cache_does_not_remember_what_was_before(model):
    cache = transformers.StaticCache(config=model.config.text_config, max_cache_len=256)
    logits(model, make_inputs(VIDEO), **{CACHE: cache}, use_cache=True)
    cache.reset()
    later = make_inputs([40, video(8, 4, 8, seed=5), 4])
    positions, _ = model.model.get_rope_index(**later)
    expected = logits(model, later)
    parts = []
    for part in (slice(40), slice(40, None)):
        kwargs = {"input_ids": later["input_ids"][:, part], "position_ids": positions[..., part]}
        if part.stop is None:
            kwargs |= {key: later[key] for key in MEDIA_KEYS if key in later}
        mask = later["attention_mask"][:, : part.stop]
        parts.append(logits(model, kwargs, attention_mask=mask, **{CACHE: cache}))
    assert_close(torch.cat(parts, 1), expected)


# ----------------------------------------------------------------------------------------------------------------------
# Training
# ----------------------------------------------------------------------------------------------------------------------


def with_labels(inputs):
    labels = inputs["input_ids"].masked_fill(is_vision(inputs) | (inputs["attention_mask"] == 0), -100)
    return {**inputs, "labels": labels}


def loss_and_gradients(model, inputs):
    model.zero_grad()
    loss = model(**with_labels(inputs)).loss
    loss.backward()
    return loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("use_reentrant", [True, False], ids=["reentrant", "not reentrant"])
@pytest.mark.parametrize("samples", [[VIDEO, MIXED], [TEXT, [40]]], ids=["vision", "text only"])
def test_gradient_checkpointing_changes_neither_loss_nor_gradients(model, samples, use_reentrant):
    inputs = make_inputs(*samples)
    model.train()
    loss, gradients = loss_and_gradients(model, inputs)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": use_reentrant})
    model.enable_input_require_grads()
    again, gradients_again = loss_and_gradients(model, inputs)
    assert_close(again, loss)
    assert gradients.keys() == gradients_again.keys()
    if samples[0] is VIDEO:
        assert gradients.keys() == {name for name, _ in model.named_parameters()}
    for name, gradient in gradients.items():
        assert gradient.abs().max() > 0 or "g_proj" in name or "k_proj.bias" in name, name
        torch.testing.assert_close(gradients_again[name], gradient, rtol=1e-4, atol=1e-7)


def test_loss_in_training_is_that_of_evaluation(model):
    inputs = with_labels(make_inputs(VIDEO, MIXED, TEXT))
    with torch.no_grad():
        expected = model(**inputs).loss
    assert torch.equal(model.train()(**inputs).loss, expected)


def test_gates_have_gradients_where_vision_is_and_zeros_for_text_alone(model):
    model.train()
    for samples, zero in (([VIDEO, TEXT], False), ([TEXT, [40]], True)):
        _, gradients = loss_and_gradients(model, make_inputs(*samples))
        assert gradients.keys() >= GATES
        assert all((gradients[name] == 0).all() == zero for name in GATES)


def test_training_step_under_autocast_follows_fp32(small):
    inputs = make_inputs(VIDEO, MIXED, TEXT)
    small.train()
    loss, gradients = loss_and_gradients(small, inputs)
    with torch.autocast("cpu", torch.bfloat16):
        again, gradients_again = loss_and_gradients(small, inputs)
    assert abs(again - loss) < 0.02
    assert gradients.keys() == gradients_again.keys()
    with torch.autocast("cpu", torch.bfloat16):
        assert_close(small(**with_labels(inputs), use_cache=False).loss, again, 1e-3)
    for name in gradients:
        assert gradients_again[name].isfinite().all(), name
    for name in GATES:
        assert F.cosine_similarity(gradients[name].flatten(), gradients_again[name].flatten(), dim=0) > 0.9
    before = small.model.language_model.layers[0].self_attn.g_proj_2.weight.detach().clone()
    torch.optim.AdamW(small.parameters(), lr=1e-3).step()
    assert not torch.equal(small.model.language_model.layers[0].self_attn.g_proj_2.weight, before)
    with torch.autocast("cpu", torch.bfloat16):
        assert loss_and_gradients(small, inputs)[0] < again


@torch.no_grad()
def test_autocast_works_over_a_cache_that_began_with_text(small):
    inputs = make_inputs([9, *VIDEO])
    positions, _ = small.model.get_rope_index(**inputs)
    first, rest = slice(9), slice(9, None)
    media = {key: inputs[key] for key in MEDIA_KEYS if key in inputs}
    with torch.autocast("cpu", torch.bfloat16):
        expected = small(**inputs).logits
        cache = cache_of(small(input_ids=inputs["input_ids"][:, first], position_ids=positions[..., first]))
        step = {"input_ids": inputs["input_ids"][:, rest], "position_ids": positions[..., rest], **media}
        actual = small(**step, **{CACHE: cache}).logits
    assert ((actual - expected[:, rest]).float().pow(2).mean() / expected.float().pow(2).mean()).sqrt() < 0.1


@pytest.mark.parametrize("use_reentrant", [None, True, False], ids=["plain", "reentrant", "not reentrant"])
def test_training_with_a_frozen_vision_tower_reaches_all_the_rest(small, use_reentrant):
    inputs = make_inputs(VIDEO, MIXED)
    _, expected = loss_and_gradients(small.train(), inputs)
    small.model.visual.requires_grad_(False)
    if use_reentrant is not None:
        small.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": use_reentrant})
        small.enable_input_require_grads()
    _, gradients = loss_and_gradients(deepcopy(small), inputs)
    assert gradients.keys() == {name for name in expected if ".visual." not in name}
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-4, atol=1e-7)


SMALL_VIDEO = [3, video(6, 4, 8, seed=4), 20]


@pytest.fixture
def make_trainer(checkpoints, tmp_path):
    """Trainers of all parameters on video, image and text samples, each from the same weights."""

    def make(name, **settings):
        arguments = TrainingArguments(
            output_dir=str(tmp_path / name),
            max_steps=6,
            save_steps=3,
            logging_steps=1,
            learning_rate=3e-3,
            per_device_train_batch_size=2,
            per_device_eval_batch_size=2,
            remove_unused_columns=False,
            use_cpu=True,
            report_to=[],
            disable_tqdm=True,
            seed=0,
            **settings,
        )
        samples = [SMALL_VIDEO, IMAGE, TEXT, [*SMALL_VIDEO, 9], MIXED, [30]]
        return Trainer(
            load(checkpoints["1 KV head"]),
            arguments,
            data_collator=lambda samples: with_labels(make_inputs(*samples)),
            train_dataset=samples,
            eval_dataset=samples[:2],
        )

    return make


def losses(trainer, key="loss"):
    return [entry[key] for entry in trainer.state.log_history if key in entry]


def test_resumed_training_continues_as_if_uninterrupted(make_trainer, tmp_path):
    whole = make_trainer("whole")
    whole.train()
    resumed = make_trainer("resumed")
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-3"))
    assert len(losses(whole)) == 6
    assert losses(whole)[-1] < losses(whole)[0]
    assert losses(resumed) == pytest.approx(losses(whole), abs=1e-6)
    theirs = whole.model.state_dict()
    for name, weight in resumed.model.state_dict().items():
        torch.testing.assert_close(weight, theirs[name], rtol=1e-5, atol=1e-7)


def test_best_model_is_loaded_at_the_end_of_training(make_trainer):
    trainer = make_trainer(
        "best",
        load_best_model_at_end=True,
        eval_strategy="steps",
        eval_steps=3,
        metric_for_best_model="eval_loss",
        greater_is_better=True,  # the worse model, so that it is not the one in memory
    )
    trainer.train()
    assert trainer.state.best_model_checkpoint.endswith("checkpoint-3")
    assert trainer.evaluate()["eval_loss"] == pytest.approx(max(losses(trainer, "eval_loss")), abs=1e-6)
    assert losses(trainer, "eval_loss")[0] != pytest.approx(losses(trainer, "eval_loss")[1], abs=1e-3)


# ----------------------------------------------------------------------------------------------------------------------
# Gates as an output
# ----------------------------------------------------------------------------------------------------------------------


def test_output_gates_are_those_of_the_layers_at_vision_tokens_and_zero_elsewhere(model):
    inputs = make_inputs(VIDEO, MIXED, TEXT)
    seen = []
    for layer in model.model.language_model.layers:
        layer.self_attn.register_forward_pre_hook(
            lambda module, args, kwargs: seen.append(module.gates(kwargs["hidden_states"])), with_kwargs=True
        )
    with torch.no_grad():
        out = model(**inputs, output_gates=True)
    heads, (batch, length) = model.config.text_config.num_attention_heads, inputs["input_ids"].shape
    assert isinstance(out.gates, tuple)
    assert [gates.shape for gates in out.gates] == [(batch, length, heads, 3)] * 2
    vision = is_vision(inputs)
    for gates, expected in zip(out.gates, seen, strict=True):
        torch.testing.assert_close(gates[vision], expected[vision], rtol=1e-5, atol=1e-6)
        assert gates[vision].std() > 0.05
        assert not gates[~vision].any()


@torch.no_grad()
def test_output_gates_come_from_either_model_in_either_form(small):
    inputs = make_inputs(VIDEO, TEXT)
    expected = small(**inputs, output_gates=True)
    assert "gates" not in small(**inputs)
    assert torch.equal(expected.logits, small(**inputs).logits)
    forms = [
        small(**inputs, output_gates=True, return_dict=False)[-1],
        small.model(**inputs, output_gates=True).gates,
        small.model(**inputs, output_gates=True, return_dict=False)[-1],
    ]
    for gates in forms:
        assert isinstance(gates, tuple)
        assert all(torch.equal(a, b) for a, b in zip(gates, expected.gates, strict=True))
    assert small(**inputs, return_dict=False)[0].equal(expected.logits)


@torch.no_grad()
def test_output_gates_are_empty_where_nothing_is_sparse(small):
    assert small(**make_inputs(TEXT), output_gates=True).gates == ()
    assert small.model(**make_inputs(TEXT), output_gates=True).gates == ()
    small.config.nsa_variant = "dense"
    assert small(**make_inputs(VIDEO), output_gates=True).gates == ()


@torch.no_grad()
def test_output_gates_of_a_step_over_a_cache_are_those_of_its_tokens(small):
    cache = cache_of(small(**make_inputs(VIDEO), use_cache=True))
    step = {"input_ids": torch.tensor([[5]]), CACHE: cache}
    assert small(**step, output_gates=True).gates == ()


@torch.no_grad()
def test_an_observer_sees_what_each_layer_attends_with_and_may_change_the_gates(model):
    inputs = make_inputs(VIDEO, MIXED, TEXT)
    seen, vision = [], is_vision(inputs)

    def observe(attention, q, k, v, gates, layout):
        rows, positions = layout.keys.rows, layout.keys.positions
        seen.append(attention.layer_idx)
        packed = q[layout.queries], k[rows, :, positions], v[rows, :, positions]
        whole = nsa_attention(*packed, gates, layout.cu_seqlens, **NSA)
        assert layout.queries.tolist() == vision.flatten().nonzero().flatten().tolist()
        outputs.append(attention.o_proj(whole.flatten(1)))
        return gates

    outputs, expected = [], []
    for layer in model.model.language_model.layers:
        layer.self_attn.register_forward_hook(lambda module, args, output: expected.append(output[0][vision]))
    same = model(**inputs, observe=observe, output_gates=True)
    assert seen == [0, 1] and torch.equal(same.logits, model(**inputs).logits)
    for output, wanted in zip(outputs, expected, strict=False):
        torch.testing.assert_close(output, wanted, rtol=1e-4, atol=1e-5)
    off = model(**inputs, observe=lambda attention, q, k, v, gates, layout: 0 * gates, output_gates=True)
    assert not torch.stack(off.gates).any() and not torch.equal(off.logits, same.logits)


def test_hidden_states_are_returned_as_in_stock(both):
    ours, theirs = (each(**make_inputs(VIDEO), output_hidden_states=True) for each in both)
    assert set(ours.keys()) == set(theirs.keys()) - {"rope_deltas"}  # of transformers 5.17: ours are in the cache
    assert [x.shape for x in ours.hidden_states] == [x.shape for x in theirs.hidden_states]


def test_attention_weights_are_those_of_text_queries(both):
    inputs = make_inputs(VIDEO, MIXED)
    positions, _ = both[0].model.get_rope_index(**inputs)
    for each in both:
        each.set_attn_implementation("eager")
    ours, theirs = (each(**inputs, position_ids=positions, output_attentions=True) for each in both)
    assert [x.shape for x in ours.attentions] == [x.shape for x in theirs.attentions]
    # The layers after the first one get other hidden states than in the stock model.
    weights, dense = ours.attentions[0].transpose(1, 2), theirs.attentions[0].transpose(1, 2)
    text = inputs["attention_mask"].bool() & ~is_vision(inputs)
    torch.testing.assert_close(weights[text], dense[text])
    assert not weights[~text].any()
    assert_close(ours.logits[text], logits(both[0], inputs, position_ids=positions)[text])


def test_attention_weights_have_gradients(small):
    small.set_attn_implementation("eager")
    outputs = small(**make_inputs(VIDEO), output_attentions=True, output_hidden_states=True)
    kept = (outputs.attentions[0], outputs.hidden_states[0])
    for x in kept:
        x.retain_grad()
    outputs.logits.sum().backward()
    assert all(x.grad.abs().sum() > 0 for x in kept)


@torch.no_grad()
def test_attention_weights_need_eager_attention_as_in_stock(both):
    ours, theirs = (each(**make_inputs(VIDEO), output_attentions=True) for each in both)
    assert ours.attentions == theirs.attentions == ()
    both[0].set_attn_implementation("eager")
    inputs = make_inputs(VIDEO)
    outputs = generate(both[0], inputs, max_new_tokens=2, output_attentions=True)
    length = inputs["input_ids"].shape[1]
    assert [x[0].shape[2:] for x in outputs.attentions] == [(length, length), (1, length + 1)]


# ----------------------------------------------------------------------------------------------------------------------
# Errors
# ----------------------------------------------------------------------------------------------------------------------


def training_losses(backend: str, steps: int) -> torch.Tensor:
    """Losses [steps] of learning the tokens before, and within, 68 vision tokens by heart."""
    model = text_model(backend)
    head = torch.nn.Linear(32, 50, device=KERNEL_DEVICE)
    optimizer = torch.optim.Adam([*model.parameters(), *head.parameters()], lr=1e-2)
    ids = torch.randint(50, (1, 72), generator=torch.Generator().manual_seed(0)).to(KERNEL_DEVICE)
    vision = (torch.arange(72, device=KERNEL_DEVICE) > 1) & (torch.arange(72, device=KERNEL_DEVICE) < 70)
    losses = []
    for _ in range(steps):
        hidden = model(input_ids=ids, vision_mask=vision[None], use_cache=False).last_hidden_state
        loss = torch.nn.functional.cross_entropy(head(hidden)[0, :-1], ids[0, 1:])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return torch.tensor(losses)


def test_triton_backend_gives_what_torch_gives(small):
    pytest.importorskip("triton")
    small.to(KERNEL_DEVICE)
    inputs = {name: x.to(KERNEL_DEVICE) for name, x in make_inputs(VIDEO).items()}
    small.config.nsa_backend = "torch"
    expected = logits(small, inputs)
    small.config.nsa_backend = "triton"
    torch.testing.assert_close(logits(small, inputs), expected, rtol=1e-4, atol=1e-4)


def test_triton_backend_learns_as_torch_does():
    pytest.importorskip("triton")
    steps = 200 if KERNEL_DEVICE == "cuda" else 10  # of seconds each, where the kernels are interpreted
    expected = training_losses("torch", steps)
    torch.testing.assert_close(training_losses("triton", steps), expected, rtol=1e-2 if steps > 10 else 1e-4, atol=1e-3)
    assert expected[-1] < 0.7 * expected[0]


@pytest.mark.parametrize("training", [False, True])
def test_decoder_layers_compile_in_one_graph_each(training):
    """On the kernels: nothing in a layer sends torch.compile back to Python."""
    pytest.importorskip("triton")
    torch.compiler.reset()  # what other tests compiled counts towards the limit of recompilations
    model = text_model("triton").train(training)
    hidden = torch.randn(2, 40, 32, device=KERNEL_DEVICE)
    vision = torch.zeros(2, 40, dtype=torch.bool, device=KERNEL_DEVICE)
    vision[:, 3:30], vision[1, 3:9] = True, False

    def run():
        model.zero_grad()
        with torch.set_grad_enabled(training):
            cache = None if training else transformers.DynamicCache()
            outputs = model(inputs_embeds=hidden, vision_mask=vision, **{CACHE: cache}, use_cache=not training)
        if training:
            outputs.last_hidden_state.square().sum().backward()
        return [outputs.last_hidden_state.detach(), *(p.grad for p in model.parameters() if p.grad is not None)]

    expected = run()
    for layer in model.layers:
        layer.forward = torch.compile(layer.forward, fullgraph=True, backend="aot_eager")
    for x, reference in zip(run(), expected, strict=True):
        torch.testing.assert_close(x, reference, rtol=1e-4, atol=1e-5)


def test_auto_backend_is_torch_on_cpu(small):
    assert small.config.nsa_backend == "auto"
    expected = logits(small, make_inputs(VIDEO))
    small.config.nsa_backend = "torch"
    assert torch.equal(logits(small, make_inputs(VIDEO)), expected)


BAD = {
    "nsa_variant": "sparse",
    "nsa_backend": "cuda",
    "block_size": 48,
    "block_count": 2,
    "window_size": 0,
    "gate_temperature": 0.0,
}


@pytest.mark.parametrize("given", ["to from_pretrained", "afterwards", "afterwards on the text config"])
@pytest.mark.parametrize("name", BAD)
def test_bad_settings_are_refused_when_a_model_is_made(checkpoints, name, given):
    folder, message = checkpoints["1 KV head"], f"{name} must be .*{BAD[name]}"
    if given == "to from_pretrained":
        with pytest.raises(ValueError, match=message):
            VideoNSAForConditionalGeneration.from_pretrained(folder, **{name: BAD[name]})
        return
    config = VideoNSAConfig.from_pretrained(folder)
    if given == "afterwards":
        before = getattr(config, name)
        with pytest.raises(ValueError, match=message):
            setattr(config, name, BAD[name])
        assert getattr(config, name) == before
        return
    setattr(config.text_config, name, BAD[name])
    with pytest.raises(ValueError, match=message):
        VideoNSAForConditionalGeneration(config)


def test_gates_survive_the_hooks_of_accelerate(checkpoints):
    from accelerate import dispatch_model

    model = VideoNSAForConditionalGeneration.from_pretrained(checkpoints["1 KV head"]).eval()
    devices = dict.fromkeys(("model.visual", "model.language_model", "lm_head"), "cpu")
    dispatch_model(model, devices, force_hooks=True)
    assert len(model(**make_inputs(VIDEO), output_gates=True).gates) == len(model.model.language_model.layers)


def test_a_cache_of_a_prompt_with_explicit_positions_keeps_its_own_offsets(small):
    text = make_inputs(TEXT)["input_ids"]
    positions = torch.arange(text.shape[1]).expand(3, 1, -1)
    answers = []
    for video_between in (False, True):
        cache = cache_of(small(input_ids=text, position_ids=positions, use_cache=True))
        if video_between:
            logits(small, make_inputs(VIDEO))
        answers.append(small(input_ids=text[:, :3], **{CACHE: cache}).logits)
    assert torch.equal(*answers)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("num_key_value_heads", 3, "num_attention_heads must be a multiple of num_key_value_heads, got 7 and 3"),
        ("layer_types", ["full_attention", "sliding_attention"], "layer_types must not contain 'sliding_attention'"),
    ],
)
def test_unsuitable_architectures_are_refused_when_a_model_is_made(checkpoints, name, value, message):
    config = VideoNSAConfig.from_pretrained(checkpoints["1 KV head"])
    setattr(config.text_config, name, value)
    with pytest.raises(ValueError, match=message):
        VideoNSAForConditionalGeneration(config)


@pytest.mark.parametrize("way", ["forward", "generate"])
@pytest.mark.parametrize("kind", ["image", "video"])
def test_placeholders_and_features_must_agree_in_number(small, kind, way):
    inputs = make_inputs(MIXED)
    ids = inputs["input_ids"]
    placeholder = getattr(small.config, f"{kind}_token_id")
    ids[0, (ids[0] == placeholder).nonzero()[0]] = 7
    inputs.pop("mm_token_type_ids")
    call = small if way == "forward" else small.generate
    with pytest.raises(ValueError, match=f"(?i){kind}.*(do not match|does not fit)"):
        call(**inputs)


@pytest.mark.parametrize("shape", ["too short", "too long", "other batch", "4-D", "dict"])
def test_attention_mask_of_another_shape_is_refused(small, shape):
    inputs = make_inputs(VIDEO)
    inputs["position_ids"], _ = small.model.get_rope_index(**inputs)
    mask = inputs.pop("attention_mask")
    length = mask.shape[1]
    mask = {
        "too short": mask[:, 1:],
        "too long": F.pad(mask, (0, 1), value=1),
        "other batch": mask.expand(2, -1),
        "4-D": torch.ones(1, 1, length, length, dtype=torch.bool),
        "dict": {"full_attention": None},
    }[shape]
    message = rf"attention_mask must be \[batch, cached \+ new tokens\] = \[1, {length}\], got"
    with pytest.raises(ValueError, match=message):
        small(**inputs, attention_mask=mask)


@pytest.mark.parametrize("wrong", ["another size", "two"])
def test_pixels_of_another_number_of_tokens_over_a_cache_are_refused(small, wrong):
    inputs = make_inputs([*VIDEO, video(8, 4, 8, seed=5), 4])
    past = len(make_inputs(VIDEO)["input_ids"][0])
    grids = {"another size": [(9, 4, 8)], "two": [(4, 4, 8), (5, 4, 8)]}[wrong]
    positions, _ = small.model.get_rope_index(**inputs)
    with torch.no_grad():
        cache = cache_of(small(**make_inputs(VIDEO)))
    with pytest.raises(ValueError, match="(?i)video features and video tokens do not match"):
        small(
            input_ids=inputs["input_ids"][:, past:],
            position_ids=positions[..., past:],
            pixel_values_videos=torch.cat([video(*grid).pixels() for grid in grids]),
            video_grid_thw=torch.tensor(grids),
            **{CACHE: cache},
        )


def test_batch_over_a_cache_does_not_guess_which_pixels_are_new(small):
    out = generate(small, make_inputs(VIDEO, VIDEO))
    first, second = ([*VIDEO, tokens.tolist()] for tokens in out.new_tokens)
    inputs = make_inputs([*first, video(12, 4, 16, seed=5), 4], [*second, 198])
    with pytest.raises(ValueError, match="(?i)video features and video tokens do not match"):
        generate(small, inputs, **{CACHE: cache_of(out)})


def test_new_video_over_a_cache_needs_positions(small):
    inputs = make_inputs(VIDEO)
    with torch.no_grad():
        cache = cache_of(small(**inputs))
    del inputs["attention_mask"]
    with pytest.raises(ValueError, match="images and videos over a cache need position_ids"):
        small(**inputs, **{CACHE: cache})


# ----------------------------------------------------------------------------------------------------------------------
# Devices, compilation, what tools read
# ----------------------------------------------------------------------------------------------------------------------


def test_layout_moves_every_tensor_to_another_device():
    vision, valid, sample = random_layout("packed, then right padding")
    starts, observe = sample.diff(dim=1, prepend=sample[:, :1]) != 0, print
    layout = VisionLayout.make(vision, vision.shape[1], valid, starts, observe)
    assert layout.to("cpu") is layout
    moved = layout.to(torch.device("meta"), non_blocking=True)
    assert moved.observe is observe
    count = 0

    def compare(old, new):
        nonlocal count
        if isinstance(old, torch.Tensor):
            assert (new.device.type, new.shape, new.dtype) == ("meta", old.shape, old.dtype)
            count += 1
        elif isinstance(old, list):
            for a, b in zip(old, new, strict=True):
                compare(a, b)
        elif dataclasses.is_dataclass(old):
            compare(list(vars(old).values()), list(vars(new).values()))
        else:
            assert new == old

    compare(layout, moved)
    assert count == 10 + len(layout.text_runs) > 11  # ten of the layout, and the text of several samples


def test_offloaded_model_computes_the_same(small, tmp_path):
    inputs = make_inputs(VIDEO, TEXT)
    small.save_pretrained(tmp_path / "saved")
    layers = {f"model.language_model.layers.{i}": place for i, place in enumerate(("cpu", "disk"))}
    rest = ("embed_tokens", "norm", "rotary_emb")
    places = {"model.visual": "disk", "lm_head": "cpu", **layers, **{f"model.language_model.{x}": "cpu" for x in rest}}
    loaded = VideoNSAForConditionalGeneration.from_pretrained(
        tmp_path / "saved", device_map=places, offload_folder=tmp_path / "offload"
    )
    assert loaded.model.language_model.layers[1].self_attn.g_proj_1.weight.device.type == "meta"
    assert torch.equal(logits(loaded.eval(), inputs), logits(small, inputs))


def test_decoding_step_compiles_in_one_graph(small):
    inputs = make_inputs(VIDEO)
    cache = transformers.StaticCache(config=small.config.text_config, max_cache_len=256)
    logits(small, inputs, **{CACHE: cache})
    length = inputs["input_ids"].shape[1]
    step = {
        "input_ids": torch.tensor([[7]]),
        "position_ids": torch.full((3, 1, 1), 300),
        "attention_mask": torch.arange(256)[None, None, None] <= length,
    }
    other = deepcopy(cache)
    expected = logits(small, step, **{CACHE: cache})
    compiled = torch.compile(small, backend="eager", fullgraph=True)
    assert_close(logits(compiled, step, **{CACHE: other}), expected)


def test_signatures_that_generate_and_trainer_inspect_are_stock():
    ours, theirs = VideoNSAForConditionalGeneration, Qwen2_5_VLForConditionalGeneration
    for name in ("forward", "get_image_features", "get_video_features"):
        assert inspect.signature(getattr(ours, name)) == inspect.signature(getattr(theirs, name))

"""What a model makes of its inputs: rotary positions, and logits that are the same for a sample alone, in a batch,
packed, and in pieces; inputs that do not fit each other are refused."""

import math
from fractions import Fraction
from itertools import chain

import pytest
import torch
import torch.nn.functional as F
from transformers import DynamicCache

from prompts import (
    IMAGE,
    MIXED,
    SAMPLES,
    TEXT,
    VIDEO,
    Media,
    assert_close,
    embed,
    generate,
    image,
    is_vision,
    logits,
    make_inputs,
    pack,
    unpad,
    video,
)
from videonsa.transformers_compat import CACHE, cache_of

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
def test_prefill_in_chunks_gives_what_it_gives_at_once(small, samples, chunk):
    inputs = make_inputs(*samples)
    whole = small(**inputs, use_cache=True)
    embeds, mask = embed(small, inputs), inputs["attention_mask"]
    positions, _ = small.model.get_rope_index(**inputs)
    cache, parts = DynamicCache(config=small.config.text_config), []
    for start in range(0, embeds.shape[1], chunk):
        stop = min(start + chunk, embeds.shape[1])
        out = small(
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


def test_vision_is_found_in_embedded_placeholders(model):
    inputs = make_inputs(MIXED)
    expected = logits(model, inputs)
    inputs["position_ids"], _ = model.model.get_rope_index(**inputs)
    inputs["inputs_embeds"] = model.get_input_embeddings()(inputs.pop("input_ids"))
    del inputs["mm_token_type_ids"]
    assert torch.equal(logits(model, inputs), expected)


def test_changing_a_vision_token_leaves_earlier_tokens_bit_for_bit(small):
    inputs = make_inputs(MIXED)
    vision = is_vision(inputs)[0].nonzero().flatten().tolist()
    with torch.no_grad():
        embeds = embed(small, inputs)
    rest = {"mm_token_type_ids": inputs["mm_token_type_ids"]}
    rest["position_ids"], _ = small.model.get_rope_index(**inputs)
    before = logits(small, rest, inputs_embeds=embeds)[0]
    for token in vision[:: len(vision) // 9]:
        changed = embeds.clone()
        changed[0, token] *= -1
        after = logits(small, rest, inputs_embeds=changed)[0]
        assert torch.equal(before[:token], after[:token])
        assert not torch.equal(before[token], after[token])
        assert not torch.equal(before[-1], after[-1])


def test_changing_later_pixels_leaves_earlier_tokens_bit_for_bit(model):
    inputs = make_inputs(VIDEO)
    before = logits(model, inputs)[0]
    firsts = is_vision(inputs)[0].nonzero()[::16, 0].tolist()  # vision token of each temporal patch of 64 patches
    for t in (3, 8, 11):
        pixels = inputs["pixel_values_videos"].clone()
        pixels[64 * t :] += 1
        after = logits(model, inputs, pixel_values_videos=pixels)[0]
        assert torch.equal(before[: firsts[t]], after[: firsts[t]])
        assert not torch.equal(before[firsts[t]], after[firsts[t]])


# ----------------------------------------------------------------------------------------------------------------------
# Errors
# ----------------------------------------------------------------------------------------------------------------------


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

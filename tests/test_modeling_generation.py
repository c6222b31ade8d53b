"""generate() and decoding loops: greedy, sampled, in beams and speculative; over caches of every kind, through the
turns of a conversation."""

from copy import deepcopy

import pytest
import torch
import torch.nn.functional as F
import transformers
from packaging.version import Version
from transformers import DynamicCache

from prompts import (
    IMAGE,
    MEDIA_KEYS,
    MIXED,
    SAMPLES,
    TEXT,
    VIDEO,
    assert_close,
    embed,
    generate,
    image,
    logits,
    make_inputs,
    video,
    without_media,
)
from videonsa.transformers_compat import CACHE, cache_of

# ----------------------------------------------------------------------------------------------------------------------
# generate()
# ----------------------------------------------------------------------------------------------------------------------


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
    ("backbone", "settings"),
    [
        ("Qwen2.5-VL", {"do_sample": True, "temperature": 3.0, "top_k": 0}),
        ("Qwen3-VL", {"do_sample": True, "temperature": 3.0, "num_return_sequences": 3}),
        ("Qwen2.5-VL", {"num_beams": 3, "num_return_sequences": 2, "output_logits": False}),
    ],
    ids=["sampling", "several samples", "beams"],
    indirect=["backbone"],
)
def test_generation_without_cache_equals_generation_with_it(model, settings):
    inputs = make_inputs(*SAMPLES.values())
    with_cache, without = (
        torch.manual_seed(0) and generate(model, inputs, use_cache=use_cache, **settings) for use_cache in (True, False)
    )
    assert torch.equal(with_cache.sequences, without.sequences)
    if settings.get("do_sample"):
        assert not torch.equal(with_cache.new_tokens[0], generate(model, inputs).new_tokens[0])


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


has_chunks = pytest.mark.skipif(
    Version(transformers.__version__) < Version("5.23"), reason="stock has no chunks with videos in 5.17"
)


@has_chunks
@pytest.mark.parametrize(
    ("backbone", "chunk", "cache"),
    [
        ("Qwen2.5-VL", 1, None),
        ("Qwen2.5-VL", 7, None),
        ("Qwen3-VL", 16, None),
        ("Qwen2.5-VL", 1000, None),
        ("Qwen2.5-VL", 16, "static"),
    ],
    indirect=["backbone"],
)
def test_generation_with_chunked_prefill_equals_generation(model, chunk, cache):
    for samples in ([VIDEO], [MIXED], [MIXED, TEXT, VIDEO]):
        inputs = make_inputs(*samples)
        actual = generate(model, inputs, prefill_chunk_size=chunk, cache_implementation=cache)
        expected = generate(model, inputs)
        assert torch.equal(actual.sequences, expected.sequences)
        assert_close(actual.logits, expected.logits)


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


# ----------------------------------------------------------------------------------------------------------------------
# Further turns over a cache
# ----------------------------------------------------------------------------------------------------------------------

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


@has_chunks
@pytest.mark.parametrize("chunk", [7, 1000])
@pytest.mark.parametrize("turn", [*TURNS.values(), [3, video(6, 4, 8, seed=9), 4]], ids=[*TURNS, "one as large"])
def test_second_turn_in_chunks_gives_what_it_gives_without_a_cache(model, turn, chunk):
    first = [5, video(6, 4, 8, seed=5), 6]
    out = generate(model, make_inputs(first))
    inputs = make_inputs([*first, out.new_tokens[0].tolist(), *turn])
    actual = generate(model, inputs, prefill_chunk_size=chunk, **{CACHE: cache_of(out)})
    expected = generate(model, inputs)
    assert torch.equal(actual.sequences, expected.sequences)
    assert_close(actual.logits, expected.logits)


@has_chunks
@pytest.mark.parametrize("chunk", [None, 7])
def test_second_turn_in_chunks_may_bring_its_new_ids_alone(small, chunk):
    first = [5, video(6, 4, 8, seed=5), 6]
    out = generate(small, make_inputs(first))
    whole = make_inputs([*first, out.new_tokens[0].tolist(), 3, video(6, 4, 8, seed=9), 4])
    past = cache_of(out).get_seq_length()
    patches = len(whole["pixel_values_videos"]) // 2
    new = {
        "input_ids": whole["input_ids"][:, past:],
        "attention_mask": whole["attention_mask"],
        "position_ids": small.model.get_rope_index(**whole)[0],
        "pixel_values_videos": whole["pixel_values_videos"][patches:],
        "video_grid_thw": whole["video_grid_thw"][1:],
    }
    actual = generate(small, new, prefill_chunk_size=chunk, **{CACHE: cache_of(out)})
    assert_close(actual.logits, generate(small, whole).logits)


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


# ----------------------------------------------------------------------------------------------------------------------
# Caches that are copied, shortened, or reset
# ----------------------------------------------------------------------------------------------------------------------


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
# Errors
# ----------------------------------------------------------------------------------------------------------------------


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


@pytest.mark.parametrize("chunk", [None, pytest.param(16, marks=has_chunks)])
def test_batch_over_a_cache_does_not_guess_which_pixels_are_new(small, chunk):
    out = generate(small, make_inputs(VIDEO, VIDEO))
    first, second = ([*VIDEO, tokens.tolist()] for tokens in out.new_tokens)
    inputs = make_inputs([*first, video(12, 4, 16, seed=5), 4], [*second, 198])
    with pytest.raises(ValueError, match="(?i)video features and video tokens do not match"):
        generate(small, inputs, prefill_chunk_size=chunk, **{CACHE: cache_of(out)})


def test_new_video_over_a_cache_needs_positions(small):
    inputs = make_inputs(VIDEO)
    with torch.no_grad():
        cache = cache_of(small(**inputs))
    del inputs["attention_mask"]
    with pytest.raises(ValueError, match="images and videos over a cache need position_ids"):
        small(**inputs, **{CACHE: cache})

"""cache_record.py: whatever is done to the rows of a cache, a later call gives what it gives without a cache."""

import pickle
import threading
from copy import deepcopy

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import DynamicCache, StaticCache

from lib import tiny
from prompts import (
    IMAGE,
    MEDIA_KEYS,
    MIXED,
    TEXT,
    VIDEO,
    assert_close,
    embed,
    generate,
    image,
    load,
    logits,
    make_inputs,
    video,
    without_media,
)
from videonsa.cache_record import CacheRecord
from videonsa.transformers_compat import CACHE, cache_of

# Backbone and variant of the models that most tests run on.
VARIANTS = {"paper": ("Qwen2.5-VL", "paper"), "Qwen3-VL": ("Qwen3-VL", "merged"), "dense": ("Qwen2.5-VL", "dense")}
MERGED = {"merged": ("Qwen2.5-VL", "merged")}
SAMPLES = (VIDEO, MIXED, IMAGE)


@pytest.fixture(scope="module")
def variants(checkpoints):
    """Each of these models; merged needs more blocks than the window overlaps."""
    return {
        name: load(checkpoints[backbone], nsa_variant=variant, block_count=5)
        for name, (backbone, variant) in {**VARIANTS, **MERGED}.items()
    }


@pytest.fixture(params=VARIANTS)
def variant(request, variants, inputs_for):
    inputs_for({**VARIANTS, **MERGED}[request.param][0])
    return variants[request.param]


def prefilled(model, *samples, **kwargs):
    """The cache of a prompt, and the prompt."""
    inputs = make_inputs(*samples)
    with torch.no_grad():
        return cache_of(model(**inputs, use_cache=True, **kwargs)), inputs


def extended(inputs, tokens):
    """Inputs with text tokens [batch, n] after them."""
    new = torch.ones_like(tokens)
    return {
        **inputs,
        "input_ids": torch.cat([inputs["input_ids"], tokens], 1),
        "attention_mask": torch.cat([inputs["attention_mask"], new], 1),
        "mm_token_type_ids": torch.cat([inputs["mm_token_type_ids"], 0 * new.int()], 1),
    }


# ----------------------------------------------------------------------------------------------------------------------
# Rows
# ----------------------------------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("how", ["reorder_cache", "batch_select_indices"])
@pytest.mark.parametrize("rows", [[0, 1], [1, 0], [0], [1], [0, 0, 1, 1]], ids=str)
def test_chosen_rows_go_on_as_without_a_cache(variant, how, rows):
    cache, inputs = prefilled(variant, VIDEO, MIXED)
    whole = extended(inputs, torch.tensor([[7, 8, 9], [17, 18, 19]]))
    expected = logits(variant, whole)[rows, -3:]
    getattr(cache, how)(torch.tensor(rows))
    step = {"input_ids": whole["input_ids"][rows, -3:], "attention_mask": whole["attention_mask"][rows]}
    assert_close(logits(variant, step, **{CACHE: cache}), expected)


@torch.no_grad()
def test_repeated_rows_go_on_as_without_a_cache(variant):
    cache, inputs = prefilled(variant, VIDEO, MIXED)
    cache.batch_repeat_interleave(2)
    rows = [0, 0, 1, 1]
    whole = extended(inputs, torch.tensor([[7, 8], [17, 18]]))
    step = {"input_ids": whole["input_ids"][rows, -2:], "attention_mask": whole["attention_mask"][rows]}
    assert_close(logits(variant, step, **{CACHE: cache}), logits(variant, whole)[rows, -2:])


@torch.no_grad()
@pytest.mark.parametrize("kept", [1, 40, 150, 203])
@pytest.mark.parametrize("variant", ["paper", "merged", "dense"], indirect=True)
def test_a_cropped_cache_goes_on_as_without_a_cache(variant, kept):
    """Cut within the text before, the video (where its rest is not to come), and the text after it."""
    cache, inputs = prefilled(variant, VIDEO)
    cache.crop(kept - inputs["input_ids"].shape[1])
    tokens = torch.tensor([[7, 8, 9]])
    positions, _ = variant.model.get_rope_index(**inputs)
    following = positions[..., :kept].max() + 1
    whole = {
        "inputs_embeds": torch.cat([embed(variant, inputs)[:, :kept], variant.get_input_embeddings()(tokens)], 1),
        "mm_token_type_ids": torch.cat([inputs["mm_token_type_ids"][:, :kept], torch.zeros(1, 3).int()], 1),
        "position_ids": torch.cat([positions[..., :kept], following + torch.arange(3).expand(3, 1, 3)], -1),
    }
    actual = logits(variant, {"input_ids": tokens}, **{CACHE: cache})
    assert_close(actual, logits(variant, whole)[:, -3:])


@torch.no_grad()
def test_the_best_of_several_beams_is_kept_for_the_next_turn(variant):
    inputs = make_inputs(VIDEO)
    out = generate(variant, inputs, num_beams=3, max_new_tokens=4)
    turn = torch.cat([out.sequences[:1], torch.tensor([[7, 8, 9]])], 1)
    expected = generate(variant, extended(inputs, turn[:, inputs["input_ids"].shape[1] :])).logits
    errors = []
    # transformers does not say which row of the cache holds the best beam.
    for row in range(3):
        cache = deepcopy(cache_of(out))
        cache.batch_select_indices(torch.tensor([row]))
        given = generate(variant, {"input_ids": turn, "attention_mask": torch.ones_like(turn)}, **{CACHE: cache})
        errors.append((given.logits - expected).abs().max() / expected.abs().max())
    assert min(errors) < 1e-5


@torch.no_grad()
@pytest.mark.parametrize("copy", [deepcopy, lambda x: pickle.loads(pickle.dumps(x))], ids=["copied", "pickled"])
def test_a_copy_goes_on_by_itself(small, copy):
    cache, inputs = prefilled(small, VIDEO)
    other = copy(cache)
    record, copied = CacheRecord.find(cache), CacheRecord.find(other)
    assert copied is not record and copied.first is other.layers[0]
    tokens = torch.tensor([[7, 8]])
    expected = logits(small, extended(inputs, tokens))[:, -2:]
    assert_close(logits(small, {"input_ids": tokens}, **{CACHE: other}), expected)
    assert_close(logits(small, {"input_ids": tokens}, **{CACHE: cache}), expected)


@torch.no_grad()
def test_a_reset_cache_remembers_nothing(small):
    cache = StaticCache(config=small.config.text_config, max_cache_len=256)
    logits(small, make_inputs(VIDEO), **{CACHE: cache})
    assert cache.is_compileable
    cache.reset()
    for inputs in (make_inputs(TEXT), make_inputs(VIDEO)):
        assert_close(logits(small, inputs, **{CACHE: cache}), logits(small, inputs))
        cache.reset()


OPERATIONS = st.lists(
    st.one_of(
        st.tuples(st.just("step"), st.lists(st.integers(0, 200), min_size=1, max_size=3)),
        st.tuples(st.just("reorder"), st.permutations([0, 1])),
        st.tuples(st.just("select"), st.lists(st.integers(0, 1), min_size=1, max_size=3)),
        st.tuples(st.just("repeat"), st.none()),
        st.tuples(st.just("crop"), st.integers(1, 3)),
        st.tuples(st.just("copy"), st.booleans()),
    ),
    min_size=2,
    max_size=6,
)


@torch.no_grad()
@pytest.mark.parametrize("name", VARIANTS)
@settings(max_examples=6, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(operations=OPERATIONS)
def test_any_sequence_of_operations_gives_what_no_cache_gives(variants, inputs_for, name, operations):
    inputs_for(VARIANTS[name][0])
    model = variants[name]
    cache, prompt = prefilled(model, VIDEO, MIXED)
    prompt_length = prompt["input_ids"].shape[1]
    rows = [0, 1]  # of the prompt
    tails = torch.zeros(2, 0, dtype=torch.long)  # text tokens since

    def step(tokens):
        nonlocal tails
        tails = torch.cat([tails, torch.tensor(tokens).expand(len(rows), -1)], 1)
        # Rows of the prompt, each with its tail: computed at once, without a cache.
        whole = {key: prompt[key][rows] for key in ("input_ids", "attention_mask", "mm_token_type_ids")}
        whole = extended(whole, tails)
        media = {key: x for key, x in make_inputs(*(SAMPLES[row] for row in rows)).items() if key in MEDIA_KEYS}
        expected = logits(model, {**whole, **media})[:, -len(tokens) :]
        given = {"input_ids": tails[:, -len(tokens) :], "attention_mask": whole["attention_mask"]}
        assert_close(logits(model, given, **{CACHE: cache}), expected)

    for operation, argument in operations:
        if operation == "step":
            step(argument)
        elif operation in ("reorder", "select"):
            chosen = [i % len(rows) for i in argument]
            if operation == "reorder":
                chosen = list(reversed(range(len(rows)))) if argument[0] else list(range(len(rows)))
            method = "reorder_cache" if operation == "reorder" else "batch_select_indices"
            getattr(cache, method)(torch.tensor(chosen))
            rows, tails = [rows[i] for i in chosen], tails[chosen]
        elif operation == "repeat" and len(rows) < 4:
            cache.batch_repeat_interleave(2)
            rows, tails = [row for row in rows for _ in range(2)], tails.repeat_interleave(2, 0)
        elif operation == "crop" and tails.shape[1]:
            count = min(argument, tails.shape[1])
            cache.crop(-count)
            tails = tails[:, :-count]
        elif operation == "copy":
            cache = deepcopy(cache) if argument else pickle.loads(pickle.dumps(cache))
        assert cache.get_seq_length() == prompt_length + tails.shape[1]
    step([5])


@torch.no_grad()
def test_a_new_video_over_chosen_rows_continues_the_stream(variant):
    """Rows of a cache are swapped, then each gets a new video, by positions of the whole sequence."""
    cache, inputs = prefilled(variant, VIDEO, MIXED)
    cache.batch_select_indices(torch.tensor([1]))
    sample = [*MIXED, 4, video(8, 4, 8, seed=5), 3]
    whole, before = make_inputs(sample), make_inputs(MIXED)["input_ids"].shape[1]
    positions, _ = variant.model.get_rope_index(**whole)
    rest = {
        "input_ids": whole["input_ids"][:, before:],
        "position_ids": positions[..., before:],
        "pixel_values_videos": video(8, 4, 8, seed=5).pixels(),
        "video_grid_thw": torch.tensor([[8, 4, 8]]),
    }
    padding = inputs["input_ids"].shape[1] - before
    rest["attention_mask"] = torch.nn.functional.pad(whole["attention_mask"], (padding, 0))
    actual = logits(variant, rest, **{CACHE: cache})
    assert_close(actual, logits(variant, whole)[:, before:])


# ----------------------------------------------------------------------------------------------------------------------
# Calls beside each other
# ----------------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_threads_answer_as_one_thread_does(model):
    """Eight threads, each with a conversation of its own of three turns."""
    prompts = [make_inputs([i + 2, video(4 + 2 * (i % 3), 4, 8, seed=i), 3]) for i in range(8)]

    def talk(i):
        cache, ids, answers = DynamicCache(), prompts[i]["input_ids"], []
        for turn in range(3):
            given = prompts[i] if turn == 0 else {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
            out = generate(model, given, max_new_tokens=2, **{CACHE: cache})
            answers.append(out.logits)
            # Between turns of generate, a step by hand that gives no positions.
            new = torch.tensor([[7]])
            answers.append(logits(model, {"input_ids": out.sequences[:, -1:]}, **{CACHE: cache})[:, -1])
            ids = torch.cat([out.sequences, new], 1)
        return torch.cat([x.flatten() for x in answers])

    expected, wrong = [talk(i) for i in range(8)], []

    def work(i):
        for _ in range(5):
            if not torch.equal(talk(i), expected[i]):
                wrong.append(i)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


# ----------------------------------------------------------------------------------------------------------------------
# What is vision
# ----------------------------------------------------------------------------------------------------------------------


def placeholder(kind="video"):
    return tiny.make_tokenizer().convert_tokens_to_ids(f"<|{kind}_pad|>")


@torch.no_grad()
@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_a_placeholder_that_the_model_generated_is_text(both, kind):
    ours, theirs = both
    inputs = make_inputs(VIDEO)
    length = inputs["input_ids"].shape[1]
    cache = DynamicCache() if kind == "dynamic" else StaticCache(config=ours.config.text_config, max_cache_len=256)
    logits(ours, inputs, **{CACHE: cache})
    for i in range(2):
        other = deepcopy(cache)
        del other.layers[2:]
        step = {"input_ids": torch.tensor([[placeholder()]]), "position_ids": torch.full((3, 1, 1), 300 + i)}
        if kind == "static":
            step["attention_mask"] = torch.arange(256)[None, None, None] <= length + i
        assert torch.equal(logits(ours, step, **{CACHE: cache}), logits(theirs, step, **{CACHE: other}))
    record = CacheRecord.find(cache)
    record.fit(length + 2)
    assert int(record.keys.sum()) == int((inputs["mm_token_type_ids"] > 0).sum())


@torch.no_grad()
def test_the_turn_after_a_generated_placeholder_goes_on(small):
    cache, inputs = prefilled(small, VIDEO)
    tokens = torch.tensor([[placeholder(), 7, placeholder(), 8]])
    first = logits(small, {"input_ids": tokens[:, :1]}, **{CACHE: cache})
    turn = torch.cat([inputs["input_ids"], tokens], 1)
    out = generate(small, {"input_ids": turn, "attention_mask": torch.ones_like(turn)}, **{CACHE: cache})
    # Without a cache, they are told from the video's placeholders by the features that they do not have.
    whole = extended(inputs, tokens)
    embeds = torch.cat([embed(small, inputs), small.get_input_embeddings()(tokens)], 1)
    positions, deltas = small.model.get_rope_index(**whole)
    call = {"inputs_embeds": embeds, "mm_token_type_ids": whole["mm_token_type_ids"], "position_ids": positions}
    expected = logits(small, call)
    assert_close(first[:, -1], expected[:, -4])
    assert_close(out.logits[0], expected[:, -1])


@pytest.mark.parametrize("types", [True, False])
def test_placeholders_without_features_are_an_error(variant, types):
    inputs = without_media(make_inputs(VIDEO))
    if not types:
        del inputs["mm_token_type_ids"]
    for call in (lambda: variant(**inputs), lambda: variant.generate(**inputs, max_new_tokens=1)):
        with pytest.raises(ValueError, match="192 placeholders of images or video, but the call has neither"):
            call()


def test_types_must_fit_the_embeddings(small):
    inputs = make_inputs(VIDEO)
    embeds = torch.nn.functional.pad(embed(small, inputs), (0, 0, 4, 0))  # as prompt tuning does
    message = r"mm_token_type_ids must have a type for each of the 209 embeddings, got \[1, 205\]"
    with pytest.raises(ValueError, match=message):
        small(inputs_embeds=embeds, mm_token_type_ids=inputs["mm_token_type_ids"])


@torch.no_grad()
def test_merged_embeddings_find_their_positions_by_types_and_grids(small):
    inputs = make_inputs(VIDEO, MIXED)
    call = {key: value for key, value in inputs.items() if "pixel" not in key and key != "input_ids"}
    call["inputs_embeds"] = embed(small, inputs)
    assert_close(logits(small, call), logits(small, inputs))
    del call["video_grid_thw"], call["image_grid_thw"]
    with pytest.raises(ValueError, match="need position_ids, or image_grid_thw and video_grid_thw"):
        small(**call)


def test_embeddings_with_pixels_need_ids_types_or_positions(small):
    inputs = make_inputs(VIDEO)
    call = {key: inputs[key] for key in ("pixel_values_videos", "video_grid_thw", "second_per_grid_ts")}
    call["inputs_embeds"] = small.get_input_embeddings()(inputs["input_ids"])
    with pytest.raises(ValueError, match="need mm_token_type_ids or position_ids"):
        small(**call)
    with torch.no_grad():
        assert_close(small(**call, mm_token_type_ids=inputs["mm_token_type_ids"]).logits, logits(small, inputs))


# ----------------------------------------------------------------------------------------------------------------------
# Loops by hand
# ----------------------------------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("count", [1, 5])
@pytest.mark.parametrize("samples", [[VIDEO], [VIDEO, MIXED, IMAGE]], ids=["alone", "padded batch"])
def test_a_loop_with_a_growing_mask_finds_its_positions(variant, samples, count):
    cache, inputs = prefilled(variant, *samples)
    for turn in range(2):
        tokens = torch.arange(count).expand(len(samples), -1) + 7 + turn
        inputs = extended(inputs, tokens)
        step = {"input_ids": tokens, "attention_mask": inputs["attention_mask"]}
        actual = logits(variant, step, **{CACHE: cache})
        assert_close(actual, logits(variant, inputs)[:, -count:])


@torch.no_grad()
def test_padding_within_new_tokens_takes_no_position(small):
    cache, inputs = prefilled(small, VIDEO, VIDEO)
    tokens = torch.tensor([[7, 8, 9], [7, 8, 0]])
    mask = torch.nn.functional.pad(inputs["attention_mask"], (0, 3), value=1)
    mask[1, -1] = 0
    logits(small, {"input_ids": tokens, "attention_mask": mask}, **{CACHE: cache})
    mask = torch.nn.functional.pad(mask, (0, 1), value=1)
    step = {"input_ids": torch.tensor([[5], [5]]), "attention_mask": mask}
    actual = logits(small, step, **{CACHE: cache})
    for row, tail in enumerate(([7, 8, 9, 5], [7, 8, 5])):
        alone = extended(make_inputs(VIDEO), torch.tensor([tail]))
        assert_close(actual[row, -1], logits(small, alone)[0, -1])


@torch.no_grad()
def test_an_image_among_other_rows_takes_its_own_positions(small):
    cache, inputs = prefilled(small, [3, image(6, 10), 9], VIDEO)
    whole = extended(inputs, torch.tensor([[4], [5]]))
    step = {"input_ids": whole["input_ids"][:, -1:], "attention_mask": whole["attention_mask"]}
    assert_close(logits(small, step, **{CACHE: cache}), logits(small, whole)[:, -1:])

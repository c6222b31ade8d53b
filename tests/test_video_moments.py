"""The moments that a model looked at: the needle is found, in every variant, and nothing is changed by looking."""

import math

import numpy as np
import pytest
import torch

from lib.loading import CLIP, UNSEEN, assemble_tiny_model, load, read
from lib.needles import make_sample
from videonsa import VideoChat, nsa_merged, video_moments
from videonsa.nsa_torch import block_means, compressed_attention, select_blocks
from videonsa.transformers_compat import cache_of
from videonsa.video_moments import (
    AnswerAttention,
    Moment,
    count_choices,
    observing,
    patch_frame,
    pick_moments,
    spread_layers,
    text_lse,
)
from videonsa.video_reader import VideoFile

CLIPS = 20


@pytest.fixture(scope="module")
def repository(tmp_path_factory):
    return assemble_tiny_model(tmp_path_factory.mktemp("tiny") / "model")


@pytest.fixture(scope="module", params=["paper", "merged", "released", "dense"])
def chat(request, repository):
    """The trained tiny model in one variant."""
    return VideoChat(*load(str(repository), "cpu", nsa_variant=request.param))


@pytest.fixture(scope="module")
def samples(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clips")
    return [make_sample(folder / f"clip{seed}", CLIP, (seed, UNSEEN, 0)) for seed in range(CLIPS)]


def shows_needle(moment: Moment, sample: dict) -> bool:
    """Whether the needle is in one of the two frames of a moment's patch."""
    times = (moment.seconds, moment.seconds + 1 / CLIP.fps)
    return any(start <= time < end for start, end in sample["needles"][0]["seconds"] for time in times)


def test_the_frame_that_an_answer_attends_to_most_has_the_needle(chat, samples):
    variant, hits = chat.model.config.nsa_variant, []
    samples = samples if variant == "paper" else samples[:5]
    for i, sample in enumerate(samples):
        # Every later question of a conversation, too.
        conversation = chat.open(sample["video"])
        for item in sample["questions"][: 4 if i % 4 == 0 else 1]:
            answer = conversation.ask(item["question"], max_new_tokens=4)
            hits.append(shows_needle(answer.moments[0], sample))
            assert sum(answer.shares) == pytest.approx(1) and len(answer.shares) == 16
            assert all(a.share >= b.share >= 1 / 16 for a, b in zip(answer.moments, answer.moments[1:], strict=False))
        assert bool(conversation.choices) == (variant in ("paper", "merged"))
    assert len(hits) >= 11 and np.mean(hits) >= 0.95


def count_hooks(model) -> int:
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())


@pytest.mark.parametrize("most", [64, 3])
def test_attention_received_is_that_of_the_layers_themselves(repository, samples, monkeypatch, most):
    monkeypatch.setattr(video_moments, "ANSWER_TOKENS", most)
    model, processor = load(str(repository), "cpu", nsa_variant="dense")
    config = model.generation_config
    config.suppress_tokens, config.eos_token_id = [*config.suppress_tokens, config.eos_token_id], 10**6
    inputs, _ = read(processor, samples[0]["video"], samples[0]["questions"][0]["question"])
    hooks = count_hooks(model)
    with AnswerAttention(model) as attention:
        # A layer with a forward hook computes all tokens, where the last ones are enough.
        assert not any(module._forward_hooks for module in model.model.language_model.layers.modules())
        output = model.generate(**inputs, max_new_tokens=7, do_sample=False, return_dict_in_generate=True)
    assert count_hooks(model) == hooks
    length, count = inputs["input_ids"].shape[1], output.sequences.shape[1] - inputs["input_ids"].shape[1]

    eager, _ = load(str(repository), "cpu", nsa_variant="dense")
    eager.set_attn_implementation("eager")
    ids = output.sequences[:, :-1]
    whole = {**inputs, "input_ids": ids, "attention_mask": torch.ones_like(ids)}
    whole["mm_token_type_ids"] = torch.nn.functional.pad(inputs["mm_token_type_ids"], (0, count - 1))
    with torch.no_grad():
        weights = eager(**whole, output_attentions=True).attentions  # per layer [1, H, tokens, tokens]
    every = torch.stack(weights)[:, 0, :, length - 1 :].mean((0, 1))  # [tokens of the answer, tokens]
    taken = [0, (count - 1) // 2, count - 1] if most == 3 else list(range(count))
    expected = every[taken].mean(0)
    received = attention.received(cache_of(output))
    assert (received - expected).abs().max() < 1e-5


def test_an_answer_is_the_same_with_and_without_looking(chat, samples):
    sample = samples[1]
    question = sample["questions"][0]["question"]
    inputs, _ = read(chat.processor, sample["video"], question)
    options = {"max_new_tokens": 6, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}
    plain = chat.model.generate(**inputs, **options)
    with AnswerAttention(chat.model):
        watched = chat.model.generate(**inputs, **options)
    assert torch.equal(plain.sequences, watched.sequences)
    assert all(torch.equal(a, b) for a, b in zip(plain.logits, watched.logits, strict=True))


def test_moments_are_the_frames_that_the_model_saw(chat, samples):
    sample = samples[1]
    conversation = chat.open(sample["video"], max_pixels=84 * 84)
    answer = conversation.ask("What appeared?", max_new_tokens=4)
    with VideoFile(sample["video"]) as file:
        frames = file.read(list(range(0, 32, 2)), 84, 84).permute(0, 2, 3, 1).numpy()
    for moment in [*answer.moments, *conversation.choices]:
        index = round(moment.seconds * 2)
        shares = answer.shares if moment in answer.moments else conversation.choice_shares
        assert moment.share == pytest.approx(shares[index]) and moment.share >= 0.001
        assert np.abs(frames[index].astype(int) - moment.frame).max() <= 1
    assert len(conversation.choice_shares) == 16 and math.isnan(conversation.choice_shares[0])


def test_a_short_video_leaves_nothing_to_choose(chat, samples):
    conversation = chat.open(samples[0]["video"], num_frames=4)
    answer = conversation.ask("What appeared?", max_new_tokens=4)
    assert conversation.choices == [] and all(map(math.isnan, conversation.choice_shares))
    assert answer.moments and len(answer.shares) == 2


def test_a_moment_reads_as_time_and_share():
    moments = [Moment(3, 0.61), Moment(67.5, 0.12), Moment(3599.96, 0.004)]
    assert ", ".join(map(str, moments)) == "0:03 (61 %), 1:07.5 (12 %), 60:00 (0.4 %)"
    picture = np.zeros((2, 2, 3), np.uint8)
    assert str(Moment(12, 0.25, picture, video=1)) == "video 2, 0:12 (25 %)"
    assert repr(Moment(12, 0.25, picture, video=1)) == "Moment(seconds=12, share=0.25, video=1)"


def test_layers_are_spread_evenly_and_the_last_one_is_among_them():
    class Model:
        class config:
            class text_config:
                num_hidden_layers = 28

    assert spread_layers(Model, 4) == [7, 14, 20, 27]
    Model.config.text_config.num_hidden_layers = 2
    assert spread_layers(Model, 4) == [0, 1]


def test_moments_keep_a_distance_and_frames_without_a_share_are_none():
    shares = [float("nan"), *np.linspace(1, 0, 999)]
    assert pick_moments(shares, 4) == [1, 33, 65, 97]
    assert pick_moments([0.2, 0.5, 0.3, 0.0], least=0.25) == [1, 2]
    assert pick_moments([0.0, float("nan")]) == pick_moments([]) == []
    assert pick_moments([0.03, 0.04, float("nan"), 0.2, 0.05]) == [3, 4]  # at least a quarter of the largest


def test_a_frame_is_put_together_from_its_patches(chat):
    processor, generator = chat.processor.video_processor, np.random.default_rng(0)
    frames = generator.integers(0, 256, (6, 56, 84, 3), dtype=np.uint8)
    features = processor([frames], do_resize=False, return_tensors="pt")
    for i in range(3):
        frame = patch_frame(processor, features["pixel_values_videos"], features["video_grid_thw"][0].tolist(), i)
        assert np.array_equal(frame, frames[2 * i])


# ----------------------------------------------------------------------------------------------------------------------
# Choices
# ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("window", [None, 40])
@pytest.mark.parametrize("past", [0, 37])
def test_choices_are_counted_where_there_was_a_choice(window, past):
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(150, heads, 16, generator=generator) for heads in (4, 2, 2))
    q = q[past:]
    lengths = {
        name: torch.tensor([0, len(x)], dtype=torch.int32) for name, x in (("cu_seqlens", q), ("cu_seqlens_k", k))
    }
    _, lse = compressed_attention(q, k, v, **lengths, block_size=16)
    blocks = select_blocks(q, k, lse, **lengths, block_size=16, block_count=5, window_size=window)
    expected = torch.zeros(10, 2, dtype=torch.float64)
    for group in blocks:
        for i, chosen in enumerate(group.tolist(), past):
            own = i // 16
            first = own - 1 if window is None else max(0, i + 1 - window) // 16
            if own + 1 > 5:
                for j in range(1, first):
                    expected[j] += torch.tensor([j in chosen, 1])
    assert expected[:, 0].sum() > 0
    assert torch.equal(count_choices(blocks, 16, 5, window, past), expected)


def test_the_log_sum_exp_over_text_is_that_of_the_text_before():
    generator = torch.Generator().manual_seed(0)
    q, text = torch.randn(7, 4, 16, generator=generator), torch.randn(5, 2, 16, generator=generator)
    seen = torch.tensor([0, 0, 2, 2, 3, 5, 5])
    lse = text_lse(q, text, seen, 0.25)
    for i, count in enumerate(seen.tolist()):
        scores = torch.einsum("grd,tgd->grt", q[i].unflatten(0, (2, 2)), text[:count]) * 0.25
        assert torch.allclose(lse[i], scores.logsumexp(-1).flatten())


def test_blocks_are_counted_as_the_layers_of_merged_choose_them(repository, samples, monkeypatch):
    """The counter makes the choice again; what the attention itself chose is taken from inside of it."""
    chat = VideoChat(*load(str(repository), "cpu", nsa_variant="merged"))
    choose, counted, made = nsa_merged.choose, [], []

    def note(*args, **kwargs):
        made.append(choose(*args, **kwargs))
        return made[-1]

    # The layers run the files of the repository.
    code = type(chat.model.model.language_model.layers[0].self_attn).__module__.rpartition(".")[0]
    monkeypatch.setattr(__import__(f"{code}.nsa_merged", fromlist=["choose"]), "choose", note)
    count = video_moments.count_choices
    monkeypatch.setattr(video_moments, "count_choices", lambda blocks, *a: counted.append(blocks) or count(blocks, *a))
    inputs, _ = read(chat.processor, samples[0]["video"], "What appeared?")
    counter = video_moments.ChoiceCounter(chat.model)
    counter.watched = [0]
    with observing(chat.model, counter), torch.no_grad():
        chat.model(**inputs)
    (blocks,) = counted
    (first, *_) = made  # of layer 0, bool [G, tokens, blocks]
    marks = torch.zeros(*blocks.shape[:2], first.shape[2] + 1, dtype=torch.bool)
    marks.scatter_(2, blocks.long() + 1, True)
    assert torch.equal(marks[..., 1:], first)
    assert len(block_means(torch.zeros(256, 1, 1), 16)) == first.shape[2]

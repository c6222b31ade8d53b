"""Answers over a cache are those of the whole conversation, whatever was stopped or failed before."""

import threading
import time

import numpy as np
import pytest
import torch

from lib.conversation import Conversation, VideoChat, pick_moments
from lib.loading import CLIP, UNSEEN, assemble_tiny_model, load, read
from lib.needles import make_sample
from lib.observe import count_choices, patch_frame
from videonsa.nsa_torch import compressed_attention, select_blocks
from videonsa.video_reader import VideoFile


@pytest.fixture(scope="module")
def repository(tmp_path_factory):
    return assemble_tiny_model(tmp_path_factory.mktemp("tiny") / "model")


@pytest.fixture(scope="module")
def chat(repository):
    """The trained tiny model."""
    return VideoChat(*load(str(repository), None, "cpu"))


@pytest.fixture(scope="module")
def talker(repository):
    """The same model, which comes to no end: it may not say that token."""
    model, processor = load(str(repository), None, "cpu")
    config = model.generation_config
    config.suppress_tokens, config.eos_token_id = [*config.suppress_tokens, config.eos_token_id], 10**6
    return VideoChat(model, processor)


@pytest.fixture(scope="module")
def sample(tmp_path_factory):
    return make_sample(tmp_path_factory.mktemp("clip") / "clip", CLIP, (1, UNSEEN, 0))


def ask(chat, conversation, question, **kwargs) -> str:
    *_, answer = ["", *chat.ask(conversation, question, **kwargs)]
    return answer


def test_later_questions_read_nothing_and_get_the_answers_of_the_whole_conversation(chat, sample, monkeypatch):
    conversation, calls = Conversation(sample["video"]), []
    handle = chat.model.model.visual.register_forward_hook(lambda *_: calls.append("vision tower"))

    def read_and_note(*args, **settings):
        calls.append("video")
        return read(*args, **settings)

    monkeypatch.setattr("lib.conversation.read", read_and_note)
    for i, item in enumerate(sample["questions"]):
        assert ask(chat, conversation, item["question"]) == item["answer"]
        assert calls == ["video", "vision tower"]
        assert (conversation.timing["cached"] > 256) == (i > 0) and conversation.timing["given"] < 300 - 270 * (i > 0)
        options = {"tokenize": True, "return_dict": True, "return_tensors": "pt"}
        whole = chat.processor.apply_chat_template(conversation.messages[:-1], add_generation_prompt=True, **options)
        out = chat.model.generate(**whole, max_new_tokens=8, do_sample=False)
        assert out[0, :-1].tolist() == conversation.ids.tolist()  # all but the token that ends the answer
        calls.remove("vision tower")
    handle.remove()


def test_an_answer_is_streamed_and_stops_when_told_and_the_next_one_is_that_of_the_whole(talker, sample):
    conversation, seen = Conversation(sample["video"], {"fps": 1}), []
    for text in talker.ask(conversation, "What appeared?", 400):
        seen.append(text)
        if len(seen) == 3:
            conversation.stop.set()
    assert len(seen) >= 3 and all(b.startswith(a) and a != b for a, b in zip(seen, seen[1:], strict=False))
    assert conversation.timing["tokens"] < 400
    assert conversation.messages[-1]["content"][0]["text"] == seen[-1]
    conversation.stop.clear()
    ask(talker, conversation, "Where was it?", max_new_tokens=6)
    inputs, _ = read(talker.processor, sample["video"], "What appeared?", fps=1)
    ids = conversation.ids[None, :-6]
    whole = {**inputs, "input_ids": ids, "attention_mask": torch.ones_like(ids)}
    del whole["mm_token_type_ids"]
    assert torch.equal(talker.model.generate(**whole, max_new_tokens=6, do_sample=False)[0], conversation.ids)


def test_a_question_stopped_before_its_first_token_leaves_no_trace(talker, sample):
    conversation = Conversation(sample["video"])
    conversation.stop.set()
    assert ask(talker, conversation, "What appeared?", max_new_tokens=2) == "" and not conversation.messages
    conversation.stop.clear()
    layers = talker.model.model.language_model.layers
    reached = []
    handles = [layers[0].register_forward_hook(lambda *_: conversation.stop.set())]
    handles.append(layers[1].register_forward_hook(lambda *_: reached.append(1)))
    assert ask(talker, conversation, "What appeared?", max_new_tokens=2) == ""
    for handle in handles:
        handle.remove()
    assert not reached and not conversation.messages and not conversation.timing
    conversation.stop.clear()
    assert ask(talker, conversation, "What appeared?", max_new_tokens=2)


def test_who_stops_listening_ends_the_answer(talker, sample):
    conversation = Conversation(sample["video"])
    answer = talker.ask(conversation, "What appeared?", 10_000)
    next(answer)
    answer.close()
    with talker.lock:
        assert conversation.timing["tokens"] < 10_000


def test_a_failed_question_is_an_error_and_the_next_one_is_answered(talker, sample, tmp_path, monkeypatch):
    bad = tmp_path / "bad.mp4"
    bad.write_text("no video")
    with pytest.raises(ValueError, match="cannot be read as a video"):
        ask(talker, Conversation(str(bad)), "What appeared?")
    conversation = Conversation(sample["video"])
    ask(talker, conversation, "What appeared?", max_new_tokens=2)

    def fail(*args, **kwargs):
        raise torch.OutOfMemoryError("too much")

    with monkeypatch.context() as patch, pytest.raises(torch.OutOfMemoryError):
        patch.setattr(talker.model, "generate", fail)
        ask(talker, conversation, "Where was it?")
    with pytest.raises(ValueError, match="was lost; start a new one"):
        ask(talker, conversation, "Where was it?")
    assert ask(talker, Conversation(sample["video"]), "What appeared?", max_new_tokens=2)


def test_questions_of_two_threads_are_answered_one_after_the_other(talker, sample):
    running, most, answers = [0], [0], {}

    def enter(*_):
        running[0] += 1
        most[0] = max(most[0], running[0])
        time.sleep(0.01)

    def leave(*_):
        running[0] -= 1

    handles = [talker.model.register_forward_pre_hook(enter), talker.model.register_forward_hook(leave)]
    conversations = [Conversation(sample["video"], {"fps": fps}) for fps in (1, 2)]

    def both_turns(i):
        answers[i] = [ask(talker, conversations[i], q, max_new_tokens=4) for q in ("What appeared?", "Where was it?")]

    threads = [threading.Thread(target=both_turns, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for handle in handles:
        handle.remove()
    assert most == [1]
    for i, conversation in enumerate(conversations):
        alone = Conversation(sample["video"], conversation.settings)
        again = [ask(talker, alone, q, max_new_tokens=4) for q in ("What appeared?", "Where was it?")]
        assert answers[i] == again and torch.equal(conversation.ids, alone.ids)


def test_planned_memory_is_what_the_cache_and_the_pixels_take(chat, sample):
    plan = chat.processor.video_processor.plan(sample["video"], fps=2)
    conversation = Conversation(sample["video"], {"fps": 2})
    ask(chat, conversation, "What appeared?")
    cache, pixels = chat.memory(plan)
    kept = sum(x.nbytes for layer in conversation.cache.layers[:-1] for x in (layer.keys, layer.values))
    assert cache == kept * plan.tokens / conversation.cache.get_seq_length()
    inputs, _ = read(chat.processor, sample["video"], "What appeared?", fps=2)
    assert pixels == inputs["pixel_values_videos"].nbytes


def test_choices_are_counted_where_there_was_a_choice():
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(150, heads, 16, generator=generator) for heads in (4, 2, 2))
    lengths = torch.tensor([0, 150], dtype=torch.int32)
    _, lse = compressed_attention(q, k, v, lengths, block_size=16)
    blocks = select_blocks(q, k, lse, lengths, block_size=16, block_count=4)
    expected = torch.zeros(10, 2, dtype=torch.float64)
    for group in blocks:
        for i, chosen in enumerate(group.tolist()):
            own = i // 16
            if own + 1 > 4:
                for j in range(1, own - 1):
                    expected[j] += torch.tensor([j in chosen, 1])
    assert torch.equal(count_choices(blocks, 16, 4), expected)
    assert expected[:, 0].sum() == 2 * sum(4 - 3 for i in range(150) if i // 16 >= 4)


def test_moments_are_those_chosen_most_as_the_model_saw_them(chat, sample):
    conversation = Conversation(sample["video"], {"max_pixels": 84 * 84})
    ask(chat, conversation, "What appeared?")
    with VideoFile(sample["video"]) as file:
        frames = file.read(list(range(0, 32, 2)), 84, 84).permute(0, 2, 3, 1).numpy()
    shares = np.array(conversation.shares)
    assert len(shares) == 16 and np.isnan(shares[0]) and np.nanmax(shares) <= 1
    seconds = [moment.seconds for moment in conversation.moments]
    assert seconds == sorted(seconds) and len(seconds) == 8
    for moment in conversation.moments:
        assert moment.share == pytest.approx(shares[round(moment.seconds * 2)])
        assert np.abs(frames[round(moment.seconds * 2)].astype(int) - moment.frame).max() <= 1
    short = Conversation(sample["video"], {"num_frames": 4})
    ask(chat, short, "What appeared?")
    assert [moment.share for moment in short.moments] == [None, None]


def test_moments_keep_a_distance_and_are_spread_evenly_without_shares():
    shares = [float("nan"), *np.linspace(1, 0, 999)]
    assert pick_moments(shares, 4) == [1, 33, 65, 97]
    assert pick_moments([float("nan")] * 3, 4) == [0, 1, 2]
    assert pick_moments([float("nan")] * 100, 4) == [12, 37, 62, 87]


def test_a_frame_is_put_together_from_its_patches(chat):
    processor, generator = chat.processor.video_processor, np.random.default_rng(0)
    frames = generator.integers(0, 256, (6, 56, 84, 3), dtype=np.uint8)
    features = processor([frames], do_resize=False, return_tensors="pt")
    for i in range(3):
        frame = patch_frame(processor, features["pixel_values_videos"], features["video_grid_thw"][0].tolist(), i)
        assert np.array_equal(frame, frames[2 * i])

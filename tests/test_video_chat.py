"""Answers over a cache are those of the whole conversation, whatever was stopped, failed or asked aside before."""

import re
import shutil
import string
import threading
import time
from copy import deepcopy
from pathlib import Path

import pytest
import torch

from lib.loading import CLIP, UNSEEN, assemble_tiny_model, load, read
from lib.needles import make_sample
from prompts import assert_close
from videonsa import VideoChat, video_chat
from videonsa.transformers_compat import CACHE_NAMES, cache_of
from videonsa.video_chat import Answer, crop

ROOT = Path(__file__).resolve().parents[1]
VARIANTS = ("paper", "merged", "released", "dense")


@pytest.fixture(scope="module")
def repository(tmp_path_factory):
    return assemble_tiny_model(tmp_path_factory.mktemp("tiny") / "model")


@pytest.fixture(scope="module")
def chats(repository):
    """The trained tiny model in each variant."""
    return {variant: VideoChat(*load(str(repository), "cpu", nsa_variant=variant)) for variant in VARIANTS}


@pytest.fixture(scope="module")
def chat(chats):
    return chats["paper"]


@pytest.fixture(scope="module")
def talker(repository):
    """The same model, which comes to no end: it may not say that token."""
    model, processor = load(str(repository), "cpu")
    config = model.generation_config
    config.suppress_tokens, config.eos_token_id = [*config.suppress_tokens, config.eos_token_id], 10**6
    return VideoChat(model, processor)


@pytest.fixture(scope="module")
def qwen3_chat(qwen3_repository):
    """An untrained model on Qwen3-VL, which says letters, of frames at 1 per second."""
    model, processor = load(str(qwen3_repository), "cpu")
    letters = processor.tokenizer.convert_tokens_to_ids(list(string.ascii_lowercase))
    others = set(range(model.config.text_config.vocab_size)) - {*letters}
    model.generation_config.suppress_tokens = sorted(others)
    processor.video_processor.fps = 1
    return VideoChat(model, processor)


@pytest.fixture(scope="module")
def samples(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clips")
    return [make_sample(folder / f"clip{seed}", CLIP, (seed, UNSEEN, 0)) for seed in (1, 2)]


@pytest.fixture(scope="module")
def sample(samples):
    return samples[0]


@pytest.fixture
def visual_calls(chat):
    """Grows with each call of the vision tower."""
    calls = []
    handle = chat.model.model.visual.register_forward_hook(lambda *_: calls.append("vision tower"))
    yield calls
    handle.remove()


def asked_afresh(chat, messages, max_new_tokens=8) -> tuple[str, list[int]]:
    """(answer to a whole conversation, all its tokens but the one that ends it), without a cache from before."""
    inputs = chat.processor.apply_chat_template(
        messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    output = chat.model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)[0]
    text = chat.processor.decode(output[inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return text, output[:-1].tolist()


def state(conversation) -> dict:
    """All that a conversation remembers."""
    layers = [] if conversation.cache is None else conversation.cache.layers
    return {
        "messages": deepcopy(conversation.messages),
        "ids": conversation.ids.clone(),
        "cache": [x.clone() for layer in layers for x in (layer.keys, layer.values)],
        "choices": list(conversation.choice_shares),
        "videos": [video.start for video in conversation.videos],
    }


def assert_same_state(actual: dict, expected: dict) -> None:
    assert len(actual["cache"]) == len(expected["cache"])
    for a, b in zip([actual["ids"], *actual["cache"]], [expected["ids"], *expected["cache"]], strict=True):
        assert torch.equal(a, b)
    for name in ("messages", "choices", "videos"):
        assert str(actual[name]) == str(expected[name])  # nan equals nan


# ----------------------------------------------------------------------------------------------------------------------
# Questions
# ----------------------------------------------------------------------------------------------------------------------


def test_later_questions_read_nothing_and_get_the_answers_of_the_whole_conversation(chat, sample, visual_calls):
    conversation = chat.open(sample["video"])
    for i, item in enumerate(sample["questions"]):
        answer = conversation.ask(item["question"])
        assert answer == item["answer"] and isinstance(answer, Answer) and answer.complete
        assert visual_calls == ["vision tower"]
        assert (answer.timing["cached"] > 256) == (i > 0) and answer.timing["given"] < 300 - 270 * (i > 0)
        assert asked_afresh(chat, conversation.messages[:-1])[1] == conversation.ids.tolist()
        visual_calls.pop()
    assert conversation.answer is answer


@pytest.mark.parametrize("variant", ["paper", "merged", "dense"])
def test_a_video_is_added_later_and_both_are_seen(chats, samples, variant):
    chat, conversation = chats[variant], chats[variant].open(samples[0]["video"])
    question = samples[1]["questions"][0]["question"]
    conversation.ask(samples[0]["questions"][0]["question"])
    before = conversation.cache.get_seq_length()
    conversation.add(samples[1]["video"])
    answer = conversation.ask(question)
    assert answer.timing["cached"] == before and answer.timing["given"] > 256 and len(answer.shares) == 32
    assert asked_afresh(chat, conversation.messages[:-1])[1] == conversation.ids.tolist()
    assert {moment.video for moment in answer.moments} == {0, 1}

    # So is one that comes after a question which was not saved.
    conversation.add(samples[0]["video"], fps=1)
    conversation.ask(question, save=False)
    answer = conversation.ask(question)
    assert answer.timing["given"] < 30 and len(answer.shares) == 32 + 4
    content = conversation.messages[-2]["content"]
    content[0] = {**content[0], "fps": 1}
    assert asked_afresh(chat, conversation.messages[:-1])[1] == conversation.ids.tolist()


def test_a_conversation_on_qwen3_has_the_tokens_of_the_whole_one(qwen3_chat, samples):
    """Text stands between the patches of its videos: it is kept, read once, and belongs to no patch."""

    def begin():
        talk = qwen3_chat.open(samples[0]["video"])
        for question in ("What was it?", "When?"):
            talk.ask(question, max_new_tokens=3)
        talk.add(samples[1]["video"], start=2)
        return talk

    talk = begin()
    talk.ask("Aside?", max_new_tokens=3, save=False)
    answer = talk.ask("Which came first?", max_new_tokens=3)
    assert answer.timing["given"] < 80 and len(answer.shares) == 4 + 3

    content = talk.messages[-2]["content"]
    content[0] = {**content[0], "start": 2}
    inputs = qwen3_chat.processor.apply_chat_template(
        talk.messages[:-1], add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    whole = qwen3_chat.model.generate(**inputs, max_new_tokens=3, do_sample=False)[0].tolist()
    assert talk.ids.tolist() == whole
    types = inputs["mm_token_type_ids"][0]
    assert torch.cat([video.places for video in talk.videos]).tolist() == types.nonzero().squeeze(1).tolist()
    talk.undo()
    assert_asks_as_anew(talk, begin(), "Which?", max_new_tokens=3)


def test_a_question_that_is_not_saved_leaves_everything_as_it_was(chat, sample, visual_calls):
    conversation = chat.open(sample["video"])
    questions, answers = ([item[name] for item in sample["questions"]] for name in ("question", "answer"))
    assert conversation.ask(questions[0], save=False) == answers[0]
    assert conversation.messages == [] and len(conversation.ids) == 0
    assert conversation.ask(questions[1], save=False) == answers[1]
    assert visual_calls == ["vision tower"]  # the video stays read

    conversation.ask(questions[2])
    before = state(conversation)
    for question, answer in zip(questions, answers, strict=True):
        assert conversation.ask(question, save=False) == answer == conversation.answer
        assert_same_state(state(conversation), before)
    conversation.ask(questions[3])
    alone = chat.open(sample["video"])
    for question in questions[2:]:
        alone.ask(question)
    assert conversation.messages == alone.messages and torch.equal(conversation.ids, alone.ids)
    for a, b in zip(state(conversation)["cache"], state(alone)["cache"], strict=True):
        assert a.shape == b.shape and (a.float() - b.float()).abs().max() < 1e-4


@pytest.mark.parametrize("variant", ["paper", "released"])
def test_an_undone_question_leaves_no_trace_and_videos_stay_read(chats, samples, variant):
    chat = chats[variant]
    questions = [item["question"] for item in samples[0]["questions"]]
    talk = chat.open(samples[0]["video"])
    with pytest.raises(ValueError, match="no question to undo"):
        talk.undo()
    first = talk.ask(questions[0])
    after_first = deepcopy(talk.messages)
    talk.add(samples[1]["video"])
    second = talk.ask(questions[1])
    whole, ids = deepcopy(talk.messages), talk.ids.tolist()

    talk.undo()
    assert talk.messages == after_first and talk.answer is None
    assert talk.ask(questions[1]) == second and (talk.messages, talk.ids.tolist()) == (whole, ids)
    read_again = variant == "released"
    assert (talk.answer.timing["given"] > 200) == read_again
    talk.undo()
    talk.undo()
    assert talk.messages == [] and len(talk.ids) == 0
    talk.videos.pop()
    assert talk.ask(questions[0]) == first == asked_afresh(chat, talk.messages[:1])[0]


def assert_asks_as_anew(conversation, anew, question: str, **options) -> None:
    """A conversation goes on as one that has not been through anything, and its cache is that of its tokens."""
    answer, expected = (talk.ask(question, **options) for talk in (conversation, anew))
    assert answer == expected and conversation.messages == anew.messages
    assert answer.shares == pytest.approx(expected.shares, abs=1e-5)
    assert [str(moment) for moment in answer.moments] == [str(moment) for moment in expected.moments]
    assert answer.timing["given"] + answer.timing["cached"] == expected.timing["given"] + expected.timing["cached"]
    assert answer.timing["given"] > 0 and len(conversation.ids) - conversation.cache.get_seq_length() in (0, 1)
    actual, expected = state(conversation), state(anew)
    assert torch.equal(actual["ids"], expected["ids"]) and actual["videos"] == expected["videos"]
    assert actual["choices"] == pytest.approx(expected["choices"], abs=1e-6, nan_ok=True)
    for a, b in zip(actual["cache"], expected["cache"], strict=True):
        assert a.shape == b.shape and (a.float() - b.float()).abs().max() < 1e-4


@pytest.mark.parametrize("variant", ["paper", "released"])
def test_videos_on_both_sides_of_an_undone_question_are_those_of_a_new_conversation(chats, samples, variant):
    chat, first, second = chats[variant], samples[0]["video"], samples[1]["video"]
    questions = [item["question"] for item in samples[1]["questions"]]
    talk = chat.open(first, fps=2)
    talk.ask(questions[0])
    talk.add(second, start=1)
    talk.ask(questions[1])
    talk.undo()
    talk.undo()
    assert len(talk.choice_shares) == (0 if variant == "released" else 8) and not talk.messages
    anew = chat.open(first, fps=2)
    anew.add(second, start=1)
    assert_asks_as_anew(talk, anew, questions[2])
    assert (talk.answer.timing["cached"] > 0) == (variant == "paper")


def test_a_video_that_was_read_after_an_undone_question_is_read_again(chat, samples):
    first, second = samples[0]["video"], samples[1]["video"]
    questions = [item["question"] for item in samples[1]["questions"]]
    talk = chat.open(first)
    talk.ask(questions[0])
    talk.ask(questions[1])
    talk.add(second, fps=2)
    talk.ask(questions[2], save=False)
    talk.undo()
    talk.add(first, fps=1)
    talk.ask(questions[2], save=False)

    anew = chat.open(first)
    anew.ask(questions[0])
    anew.add(second, fps=2)
    anew.add(first, fps=1)
    assert_asks_as_anew(talk, anew, questions[3])
    assert talk.answer.timing["given"] < 30


def test_settings_that_do_not_exist_are_refused_at_once(chat, sample):
    with pytest.raises(TypeError, match="unknown settings: pfs; there are: .*fps, .*max_tokens"):
        chat.open(sample["video"], pfs=1)
    talk = chat.open(sample["video"], fps=1)
    with pytest.raises(TypeError, match="unknown settings: begin, pfs;"):
        talk.add(sample["video"], pfs=1, begin=2)
    assert len(talk.videos) == 1


def test_with_released_a_question_that_is_not_saved_reads_the_video_again(chats, sample):
    conversation = chats["released"].open(sample["video"])
    question = sample["questions"][0]["question"]
    first = conversation.ask(question, save=False)
    assert conversation.cache is None and first.moments
    assert conversation.ask(question) == first and conversation.answer.timing["cached"] == 0

    conversation.add(sample["video"])
    tokens = conversation.videos[0].tokens
    second = conversation.ask(question, save=False)
    assert conversation.ask(question) == second and conversation.answer.timing["given"] > tokens


def test_a_cut_answer_says_so(chat, sample):
    answer = chat.open(sample["video"]).ask("What appeared?", max_new_tokens=1)
    assert not answer.complete and answer.timing["tokens"] == 1


# ----------------------------------------------------------------------------------------------------------------------
# Streams, stops and failures
# ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["method", "event"])
def test_an_answer_is_streamed_and_stops_when_told_and_the_next_one_is_that_of_the_whole(talker, sample, how):
    conversation, pieces, event = talker.open(sample["video"], fps=1), [], threading.Event()
    for piece in conversation.stream("What appeared?", max_new_tokens=400, stop=event):
        pieces.append(piece)
        if len(pieces) == 3:
            conversation.stop() if how == "method" else event.set()
    answer = conversation.answer
    assert len(pieces) >= 3 and all(pieces) and "".join(pieces) == answer and not answer.complete
    assert answer.timing["tokens"] < 400
    assert conversation.messages[-1]["content"][0]["text"] == answer
    conversation.ask("Where was it?", max_new_tokens=6)
    inputs, _ = read(talker.processor, sample["video"], "What appeared?", fps=1)
    ids = conversation.ids[None, :-6]
    whole = {**inputs, "input_ids": ids, "attention_mask": torch.ones_like(ids)}
    del whole["mm_token_type_ids"]
    assert torch.equal(talker.model.generate(**whole, max_new_tokens=6, do_sample=False)[0], conversation.ids)


def test_a_question_stopped_before_its_first_token_leaves_no_trace(talker, sample):
    conversation, stop = talker.open(sample["video"]), threading.Event()
    stop.set()
    assert list(conversation.stream("What appeared?", max_new_tokens=2, stop=stop)) == []
    assert conversation.answer is None and not conversation.messages
    layers = talker.model.model.language_model.layers
    reached = []
    handles = [layers[0].register_forward_hook(lambda *_: conversation.stop())]
    handles.append(layers[1].register_forward_hook(lambda *_: reached.append(1)))
    assert conversation.ask("What appeared?", max_new_tokens=2) == ""
    assert conversation.answer is None and conversation.cache is None and not conversation.messages

    for handle in handles:
        handle.remove()
    assert not reached
    assert conversation.ask("What appeared?", max_new_tokens=2)
    before = state(conversation)
    handle = layers[0].register_forward_hook(lambda *_: conversation.stop())
    assert conversation.ask("Where was it?", max_new_tokens=2) == ""
    handle.remove()
    assert_same_state(state(conversation), before)


def test_reading_stops_within_a_layer(talker, sample):
    talk, stop, ran = talker.open(sample["video"]), threading.Event(), []
    layer = talker.model.model.language_model.layers[0]
    handles = [
        layer.self_attn.q_proj.register_forward_hook(lambda *_: stop.set()),
        layer.mlp.register_forward_hook(lambda *_: ran.append("mlp")),
    ]
    assert list(talk.stream("What appeared?", stop=stop)) == [] and talk.answer is None
    for handle in handles:
        handle.remove()
    assert not ran and talk.messages == []


def test_who_stops_listening_ends_the_answer(talker, sample):
    conversation = talker.open(sample["video"])
    answer = conversation.stream("What appeared?", max_new_tokens=10_000)
    next(answer)
    answer.close()
    with talker.lock:
        assert conversation.answer.timing["tokens"] < 10_000


def test_a_failed_question_is_an_error_and_the_next_one_is_answered(talker, sample, tmp_path, monkeypatch):
    bad = tmp_path / "bad.mp4"
    bad.write_text("no video")
    conversation = talker.open(str(bad))
    with pytest.raises(ValueError, match="cannot be read as a video"):
        conversation.ask("What appeared?")
    with pytest.raises(ValueError, match="there is no video in this conversation"):
        conversation.ask("What appeared?")
    conversation.add(sample["video"])
    conversation.ask("What appeared?", max_new_tokens=2)
    before = state(conversation)
    conversation.add(str(bad))
    with pytest.raises(ValueError, match="cannot be read as a video"):
        conversation.ask("Where was it?")

    def fail(*args):
        raise torch.OutOfMemoryError("too much")

    handle = talker.model.model.language_model.layers[1].register_forward_hook(fail)
    with pytest.raises(torch.OutOfMemoryError):
        conversation.ask("Where was it?")
    handle.remove()
    assert conversation.answer is None
    assert_same_state(state(conversation), before)
    assert conversation.ask("Where was it?", max_new_tokens=2)
    assert not talker.model.model.language_model._forward_pre_hooks  # nothing is left in the model


def test_only_the_video_that_cannot_be_read_is_dropped(chat, samples, tmp_path):
    bad = tmp_path / "bad.mp4"
    bad.write_text("no video")
    talk, question = chat.open(samples[0]["video"]), samples[0]["questions"][0]["question"]
    talk.add(str(bad))
    talk.add(samples[1]["video"], fps=2)
    with pytest.raises(ValueError, match="cannot be read as a video"):
        talk.ask(question)
    anew = chat.open(samples[0]["video"])
    anew.add(samples[1]["video"], fps=2)
    assert_asks_as_anew(talk, anew, question)


def test_a_failure_after_the_last_token_leaves_the_cache_as_it_was(chat, samples, monkeypatch):
    talk, question = chat.open(samples[0]["video"]), samples[0]["questions"][0]["question"]
    talk.ask(question)
    before = state(talk)

    def fail(*args):
        raise torch.OutOfMemoryError("too much")

    with monkeypatch.context() as patched:
        patched.setattr(video_chat, "patch_shares", fail)
        with pytest.raises(torch.OutOfMemoryError):
            talk.ask(question)
    assert_same_state(state(talk), before)
    assert talk.answer is None


def test_questions_of_two_threads_are_answered_one_after_the_other(talker, sample):
    running, most, answers = [0], [0], {}

    def enter(*_):
        running[0] += 1
        most[0] = max(most[0], running[0])
        time.sleep(0.01)

    def leave(*_):
        running[0] -= 1

    handles = [talker.model.register_forward_pre_hook(enter), talker.model.register_forward_hook(leave)]
    conversations = [talker.open(sample["video"], fps=fps) for fps in (1, 2)]

    def both_turns(i):
        answers[i] = [conversations[i].ask(q, max_new_tokens=4) for q in ("What appeared?", "Where was it?")]

    threads = [threading.Thread(target=both_turns, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for handle in handles:
        handle.remove()
    assert most == [1]
    for i, conversation in enumerate(conversations):
        alone = talker.open(sample["video"], fps=(1, 2)[i])
        again = [alone.ask(q, max_new_tokens=4) for q in ("What appeared?", "Where was it?")]
        assert answers[i] == again and torch.equal(conversation.ids, alone.ids)
        assert answers[i][1].shares == again[1].shares


def test_planned_memory_is_what_the_cache_and_the_pixels_take(chat, sample):
    plan = chat.processor.video_processor.plan(sample["video"], fps=2)
    conversation = chat.open(sample["video"], fps=2)
    conversation.ask("What appeared?")
    cache, pixels = chat.memory(plan)
    kept = sum(x.nbytes for layer in conversation.cache.layers[:-1] for x in (layer.keys, layer.values))
    assert cache == kept * plan.tokens / conversation.cache.get_seq_length()
    inputs, _ = read(chat.processor, sample["video"], "What appeared?", fps=2)
    assert pixels == inputs["pixel_values_videos"].nbytes


# ----------------------------------------------------------------------------------------------------------------------
# The plain way, and a repository on the Hub
# ----------------------------------------------------------------------------------------------------------------------


def test_layers_of_different_lengths_are_cut_to_one(chat, sample):
    inputs, _ = read(chat.processor, sample["video"], "What appeared?")
    cache = cache_of(chat.model.generate(**inputs, max_new_tokens=2, return_dict_in_generate=True))
    expected = [layer.keys[:, :, :100].clone() for layer in cache.layers]
    cache.layers[2].crop(-1)
    crop(cache, 100)
    for layer, keys in zip(cache.layers, expected, strict=True):
        assert torch.equal(layer.keys, keys) and layer.get_seq_length() == 100


def test_the_plain_way_of_the_page_is_exact(repository, samples, tmp_path, monkeypatch):
    """Runs what the page shows, and compares with asking afresh."""
    page = (ROOT / "docs/conversations.md").read_text().split("## With transformers alone")[1]
    (snippet,) = re.findall(r"^```python\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)
    questions = [item["question"] for item in samples[0]["questions"]]
    assert '("What is the talk about?", "Who speaks first?")' in snippet
    snippet = snippet.replace('("What is the talk about?", "Who speaks first?")', str(questions))
    monkeypatch.chdir(tmp_path)
    shutil.copy(samples[0]["video"], "talk.mp4")
    for variant in ("paper", "merged", "dense"):
        model, processor = load(str(repository), "cpu", nsa_variant=variant)
        names = {"chat": VideoChat(model, processor), "model": model}
        exec(snippet, names)
        if variant == "paper":
            assert names["answers"] == [item["answer"] for item in samples[0]["questions"]]

        options = {"max_new_tokens": 8, "return_dict_in_generate": True, "output_logits": True}
        for question in questions:
            inputs, _ = read(processor, "talk.mp4", question)
            afresh = model.generate(**inputs, **options)
            ids = inputs["input_ids"]
            for name in CACHE_NAMES:
                copied = {name: deepcopy(names["cache"])}
                after = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **copied, **options)
                assert torch.equal(after.sequences, afresh.sequences)
                for a, b in zip(after.logits, afresh.logits, strict=True):
                    assert_close(a, b)


HUB_USER = """
import sys

from transformers import AutoModel, AutoProcessor
from transformers.dynamic_module_utils import get_class_from_dynamic_module

repo, video, question = sys.argv[1:]
VideoChat = get_class_from_dynamic_module("video_chat.VideoChat", repo)
model = AutoModel.from_pretrained(repo, trust_remote_code=True)
chat = VideoChat(model, AutoProcessor.from_pretrained(repo, trust_remote_code=True))
answer = chat.open(video).ask(question)
assert "videonsa" not in sys.modules and answer.moments
print(answer, VideoChat.__module__.split(".")[0])
"""


def test_a_folder_as_on_the_hub_brings_it_along(repository, sample, run_fresh):
    question = sample["questions"][0]
    printed = run_fresh(HUB_USER, str(repository), sample["video"], question["question"])
    assert printed.split() == [question["answer"], "transformers_modules"]

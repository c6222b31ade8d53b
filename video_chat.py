"""Conversations about videos: a video is read once, and each question finds it in the cache of keys and values.

    chat = VideoChat(model, processor)
    talk = chat.open("talk.mp4", fps=1)
    answer = talk.ask("What is the talk about?")
    print(answer, *answer.moments)

`video_moments.py` finds the moments that the model looked at.
"""

import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack
from copy import deepcopy
from dataclasses import dataclass, field, replace
from functools import partial

import numpy as np
import torch
from torch.overrides import TorchFunctionMode
from transformers import DynamicCache, TextIteratorStreamer

from .cache_record import position_after
from .processing_videonsa import seconds_per_patch
from .video_moments import (
    AnswerAttention,
    ChoiceCounter,
    Moment,
    observing,
    patch_frame,
    patch_shares,
    pick_moments,
    this_thread,
)
from .video_planner import shorten


class Answer(str):
    """The text of an answer, and how it came about.

    Attributes:
        moments: the frames that the answer's tokens attended to most, the first one most. Frames that got less than
            an even share, or less than a quarter of the first one's, are not among them.
        shares: of that attention, for each temporal patch of the videos, in their order; their sum is 1.
        timing: `reading`, seconds to read videos; `first`, seconds from there to the first token; `given`, tokens that
            the model had to read; `cached`, tokens found in the cache; `tokens` of the answer, and `speed`, how many
            of them per second after the first.
        complete: False if it was stopped, or cut at `max_new_tokens`.
    """

    def __new__(cls, text: str = "", moments=(), shares=(), timing=None, complete: bool = True):
        self = super().__new__(cls, text)
        self.moments: list[Moment] = list(moments)
        self.shares: list[float] = list(shares)
        self.timing: dict[str, float] = timing or {}
        self.complete = complete
        return self


@dataclass
class Video:
    """A video of a conversation.

    Attributes:
        source, settings: what `VideoNSAVideoProcessor` takes.
        text: what stands for it in a prompt: placeholders, with Qwen3-VL between the times at which they are shown.
        tokens: how many placeholders it has.
        places: int64 [tokens], where these stand in the conversation; None until it is read.
        seconds: when each of its temporal patches begins.
        frames: uint8 [height, width, 3], the first one of each temporal patch.
    """

    source: object
    settings: dict
    text: str = field(default="", repr=False)
    tokens: int = 0
    places: torch.Tensor | None = field(default=None, repr=False)
    seconds: list[float] = field(default_factory=list)
    frames: list[np.ndarray] = field(default_factory=list, repr=False)

    @property
    def start(self) -> int | None:
        """Place of its first placeholder in the conversation; None until it is read."""
        return None if self.places is None else int(self.places[0])

    @property
    def end(self) -> int:
        """Place after its last placeholder."""
        return int(self.places[-1]) + 1


class Stopped(Exception):
    """An answer was stopped before there was a token."""


class VideoChat:
    """Conversations with a model and its processor. Threads may share it: one question is answered at a time.

    Args:
        model: a `VideoNSAForConditionalGeneration`, or `VideoNSAQwen3ForConditionalGeneration`.
        processor: the `VideoNSAProcessor` of its checkpoint, or `VideoNSAQwen3Processor`.
    """

    def __init__(self, model, processor):
        self.model, self.processor = model, processor
        self.lock = threading.Lock()

    def open(self, video, **settings) -> "Conversation":
        """A new conversation about a video, which the first question reads.

        Args:
            video: whatever a message may hold: a path, an address, bytes, frames.
            **settings: of `VideoNSAVideoProcessor` for this video, such as fps, max_tokens, start and end.

        Raises:
            TypeError: there is no such setting.
        """
        conversation = Conversation(self, [])
        conversation.add(video, **settings)
        return conversation

    def memory(self, plan) -> tuple[int, int]:
        """Bytes that a planned video takes on the model's device: (keys and values of its tokens, its pixels)."""
        processor = self.processor.video_processor
        patch = 3 * processor.temporal_patch_size * processor.patch_size**2 * 4  # fp32
        return plan.prompt_tokens * cache_bytes(self.model), plan.tokens * processor.merge_size**2 * patch


def cache_bytes(model) -> int:
    """Of the keys and values of a token, in all layers."""
    text = model.config.text_config
    dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    return 2 * text.num_hidden_layers * text.num_key_value_heads * dim * model.dtype.itemsize


class Conversation:
    """Videos, what was said about them, and the model's memory of both. `VideoChat.open` makes one.

    Attributes:
        messages: of the chat so far, as `apply_chat_template` takes them.
        answer: the last one, also if it was not saved; None while a question is being answered, and if it failed or
            was stopped before its first token.
        choices: the moments that vision tokens chose to read most, where they have more before them than they may
            read; empty where nothing was chosen. They do not depend on questions.
        choice_shares: for each temporal patch of the videos, how many of the vision tokens that had the choice chose
            it; nan where none had to choose.
        videos: that were read or are to be read.
        ids: int64 [tokens], of the prompts and answers so far.
        cache: keys and values of these, but of the last token at most; also of videos that were read for a question
            which was not saved.
    """

    def __init__(self, chat: VideoChat, videos: list[Video]):
        self.chat, self.videos = chat, videos
        self.messages: list[dict] = []
        self.answer: Answer | None = None
        self.choices: list[Moment] = []
        self.choice_shares: list[float] = []
        self.ids = torch.empty(0, dtype=torch.long)
        self.cache: DynamicCache | None = None
        self._said = 0  # videos that messages hold
        # For each question, the tokens and videos before it, and the choices counted after it.
        self._turns: list[tuple[int, int, ChoiceCounter]] = []
        self._counter = ChoiceCounter(chat.model)
        self._stops: list[threading.Event] = []  # of the questions that are being answered or wait

    def add(self, video, **settings) -> None:
        """Add a video to the conversation, as `VideoChat.open` takes it; the next question reads it.

        Raises:
            TypeError: there is no such setting.
        """
        allowed = self.chat.processor.video_processor.valid_kwargs.__annotations__.keys()
        if unknown := settings.keys() - allowed:
            names = shorten(", ".join(sorted(unknown)))
            raise TypeError(f"a video got unknown settings: {names}; there are: {', '.join(sorted(allowed))}")
        self.videos.append(Video(video, settings))

    def ask(self, question: str, *, max_new_tokens: int = 128, save: bool = True) -> Answer:
        """Answer a question; see `stream`. An answer that is stopped before its first token is empty."""
        turn = _Turn(self, question, max_new_tokens, save)
        for _ in turn.pieces():
            pass
        return Answer(complete=False) if turn.answer is None else turn.answer

    def stream(
        self, question: str, *, max_new_tokens: int = 128, save: bool = True, stop: threading.Event | None = None
    ) -> Iterator[str]:
        """Yield an answer piece by piece; at the end, `answer` has it with its moments.

        It is what `generate` gives for the whole conversation, without sampling. If it is stopped before its first
        token, or fails, the conversation is as it was.

        Args:
            question: text.
            max_new_tokens: where the answer is cut.
            save: keep question and answer. If not, messages and cache stay as they were, except that a video that was
                read stays read (in the variant "released", it is read again).
            stop: an event that ends the answer when it is set, as the method `stop` does.

        Raises:
            OSError, ValueError: a video cannot be read as its settings say. It is taken out of the conversation.
            torch.OutOfMemoryError: there is not enough memory.
        """
        return _Turn(self, question, max_new_tokens, save, stop).pieces()

    def undo(self) -> None:
        """Forget the last question and its answer. Its videos stay read, except in the variant "released".

        Videos that were read after it are read again: its words were before them.

        Raises:
            ValueError: no question was saved, or one is being answered.
        """
        if self._stops:
            raise ValueError("a question is being answered: stop it, or wait for it, before undo()")
        if not self._turns:
            raise ValueError("there is no question to undo")
        end = self._said
        tokens, self._said, counter = self._turns.pop()
        self.ids, self.answer = self.ids[:tokens], None
        del self.messages[-2:]

        if self.chat.model.config.nsa_variant == "released":
            # Text after a video is computed together with it.
            end = self._said
        self.videos[end:] = [Video(video.source, video.settings) for video in self.videos[end:]]
        kept = self.videos[end - 1].end if end > self._said else tokens
        crop(self.cache, kept)
        self.cache = self.cache if kept else None
        self._keep_choices(counter)

    def stop(self) -> None:
        """End the answer that is being given, and those that wait; what was said of it is kept."""
        for event in list(self._stops):
            event.set()

    def _keep_choices(self, counter: ChoiceCounter) -> None:
        """Take over what was counted while the videos that are read now were read."""
        self._counter, self.choices, self.choice_shares = counter, [], []
        videos = [video for video in self.videos if video.places is not None]
        if videos:
            shares = counter.shares(sum(video.tokens for video in videos), self.chat.model.config.block_size)
            parts = shares.split([video.tokens for video in videos])
            patches = [part.view(len(video.seconds), -1) for part, video in zip(parts, videos, strict=True)]
            self.choice_shares = torch.cat([patch.nanmean(1) for patch in patches]).tolist()
            self.choices = moments_of(videos, self.choice_shares, least=0.001)


class _Turn:
    """A question of a conversation, being answered. The conversation changes at the end, if at all."""

    def __init__(self, conversation: Conversation, question: str, max_new_tokens: int, save: bool, stop=None):
        self.conversation, self.question = conversation, question
        self.max_new_tokens, self.save = max_new_tokens, save
        self.model, self.processor = conversation.chat.model, conversation.chat.processor
        self.stop = threading.Event() if stop is None else stop
        self.streamer = TextIteratorStreamer(self.processor.tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.arrivals: list[float] = []  # when tokens came
        self.error: Exception | None = None
        self.answer: Answer | None = None

    def pieces(self) -> Iterator[str]:
        """See `Conversation.stream`."""
        self.conversation.answer = None
        self.conversation._stops.append(self.stop)
        # A thread of its own: whatever becomes of who iterates, it comes to an end and the next question can start.
        thread = threading.Thread(target=self._run, daemon=True)
        thread.start()
        try:
            yield from filter(None, self.streamer)
        except BaseException:
            self.stop.set()
            raise
        thread.join()
        if self.error is not None:
            raise self.error

    def _run(self) -> None:
        try:
            with self.conversation.chat.lock, torch.inference_mode():
                self._answer()
        except Stopped:
            pass
        except Exception as error:
            self.error = error
        finally:
            self.conversation._stops.remove(self.stop)
            self.streamer.on_finalized_text("", stream_end=True)

    def _answer(self) -> None:
        conversation, start = self.conversation, time.perf_counter()
        if self.stop.is_set():
            raise Stopped
        videos, features = self._read_videos()
        content = [{"type": "video", "video": video.source} for video in videos[conversation._said :]]
        content.append({"type": "text", "text": self.question})
        ids = self._prompt(content, videos)

        asked, cache = time.perf_counter(), conversation.cache
        cache = DynamicCache(config=self.model.config) if cache is None else cache
        cached = int(cache.get_seq_length())
        counter = deepcopy(conversation._counter)
        try:
            sequence = self._reply(ids, cache, videos, features, counter, start, asked)
        except BaseException:
            crop(cache, cached)
            raise

        if self.save:
            conversation._turns.append((len(conversation.ids), conversation._said, counter))
            conversation.ids, conversation.cache = sequence[: len(sequence) - self.answer.complete], cache
            conversation.messages += [
                {"role": "user", "content": content},
                {"role": "assistant", "content": [{"type": "text", "text": str(self.answer)}]},
            ]
            conversation._said = len(videos)
            stays = bool(features)
        else:
            # In the variant "released", text after a video is computed together with it.
            stays = features and self.model.config.nsa_variant != "released"
            cached = videos[-1].end if stays else cached
            crop(cache, cached)
            conversation.cache = cache if cached else None
        if stays:
            conversation.videos[: len(videos)] = videos
            conversation._keep_choices(counter)
        conversation.answer = self.answer

    def _reply(self, ids, cache, videos: list[Video], features: list, counter, start: float, asked: float):
        """All tokens int64 [n], those of the answer at the end; sets `answer`."""
        cached = int(cache.get_seq_length())
        inputs = self._inputs(ids, cache, videos, features)
        sequence, attention = self._generate(inputs, cache, counter if features else None)
        for video, feature in zip(videos[len(videos) - len(features) :], features, strict=True):
            grid, pixels = feature["video_grid_thw"][0].tolist(), feature["pixel_values_videos"]
            video.frames = [patch_frame(self.processor.video_processor, pixels, grid, i) for i in range(grid[0])]
        received = attention.received(cache)
        shares = patch_shares([received[video.places].view(len(video.seconds), -1) for video in videos])
        ends = self.model.generation_config.eos_token_id
        self.answer = Answer(
            self.processor.decode(sequence[ids.shape[1] :], skip_special_tokens=True),
            moments=moments_of(videos, shares, least=1 / len(shares)),
            shares=shares,
            timing=self._timing(asked - start, asked, ids.shape[1] - cached, cached),
            complete=int(sequence[-1]) in (ends if isinstance(ends, list) else [ends]),
        )
        return sequence

    def _read_videos(self) -> tuple[list[Video], list]:
        """The videos of the conversation, and what the processor returns for each one that was not read before. Those
        are new objects."""
        conversation = self.conversation
        videos = list(conversation.videos)
        if not videos:
            raise ValueError("there is no video in this conversation: add one")
        features = []
        for i, video in enumerate(videos):
            if video.places is not None:
                continue
            message = {"role": "user", "content": [{"type": "video", "video": video.source}]}
            try:
                feature = self.processor.apply_chat_template(
                    [message],
                    tokenize=True,
                    return_dict=True,
                    return_tensors="pt",
                    processor_kwargs={**video.settings, "return_metadata": True},
                )
            except Exception:
                conversation.videos = [other for other in conversation.videos if other is not video]
                raise
            features.append(feature)
            step = self.processor.video_processor.temporal_patch_size
            seconds = list(feature["video_metadata"][0].sample_times[::step])
            text = self.processor.replace_video_token(feature, 0)
            videos[i] = replace(video, text=text, tokens=text.count(self.processor.video_token), seconds=seconds)
        return videos, features

    def _prompt(self, content: list[dict], videos: list[Video]) -> torch.Tensor:
        """int64 [1, tokens] of the whole conversation up to the beginning of the answer; sets the places of videos."""
        conversation, processor = self.conversation, self.processor
        messages = conversation.messages
        render = partial(processor.apply_chat_template, tokenize=False, add_generation_prompt=True)
        before = render(messages[:-1]) + messages[-1]["content"][0]["text"] if messages else ""
        after = render([*messages, {"role": "user", "content": content}])
        if not after.startswith(before):
            raise ValueError("the chat template of this model changes earlier turns; start a new conversation")

        pending = videos[conversation._said :]
        text, *rest = after[len(before) :].split(processor.video_token, len(pending))
        text += "".join(video.text + part for video, part in zip(pending, rest, strict=True))
        new = processor.tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"][0]
        places = len(conversation.ids) + (new == self.model.config.video_token_id).nonzero().squeeze(1)
        for video in pending:
            video.places, places = places[: video.tokens], places[video.tokens :]
        return torch.cat([conversation.ids.to(self.model.device), new.to(self.model.device)])[None]

    def _inputs(self, ids: torch.Tensor, cache, videos: list[Video], features: list) -> dict:
        """What `generate` takes: all tokens, and the videos that are not in the cache."""
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        if not features:
            return inputs
        types = torch.zeros_like(ids)
        for video in videos:
            types[:, video.places] = 2
        grids = torch.cat([feature["video_grid_thw"] for feature in features]).to(ids.device)
        timed = {"video_grid_thw": grids}
        if "second_per_grid_ts" in features[0]:
            patch = self.processor.video_processor.temporal_patch_size
            metadata = [feature["video_metadata"][0] for feature in features]
            timed["second_per_grid_ts"] = torch.tensor(seconds_per_patch(metadata, patch), device=ids.device)
        pixels = [feature["pixel_values_videos"].to(ids.device) for feature in features]
        inputs |= {
            "mm_token_type_ids": types,
            "pixel_values_videos": torch.cat(pixels) if len(pixels) > 1 else pixels[0],
            **timed,
        }
        past = int(cache.get_seq_length())
        if past:
            # New videos over a cache need them. Of the tokens in the cache, only the places in the text are read.
            new, _ = self.model.model.get_rope_index(ids[:, past:], types[:, past:], **timed)
            rotary = torch.cat([new.new_zeros(3, 1, past), new + position_after(cache, past).to(new.device)], 2)
            text = torch.arange(ids.shape[1], device=ids.device).expand(1, 1, -1)
            inputs["position_ids"] = torch.cat([text, rotary])
        return inputs

    def _generate(self, inputs: dict, cache, counter) -> tuple[torch.Tensor, AnswerAttention]:
        """(all tokens int64 [n], what those of the answer attend to); `counter` observes vision tokens."""
        model, is_own = self.model, this_thread()

        def check_stop(*_):
            # Only before the first token: what was said is kept.
            if not self.arrivals and is_own() and self.stop.is_set():
                raise Stopped

        def note_token(ids, scores, **kwargs):
            self.arrivals.append(time.perf_counter())
            return torch.full((len(ids),), self.stop.is_set(), device=ids.device)

        with AnswerAttention(model) as attention, ExitStack() as stack:
            for layer in (*model.model.language_model.layers, *model.model.visual.blocks):
                stack.callback(layer.register_forward_pre_hook(check_stop).remove)
            if model.device.type == "cpu":
                # A layer may take many seconds there.
                stack.enter_context(BeforeEachOperation(check_stop))
            if counter is not None:
                stack.enter_context(observing(model, counter))
            output = model.generate(
                **inputs,
                past_key_values=cache,
                max_new_tokens=self.max_new_tokens,
                do_sample=False,
                return_dict_in_generate=True,
                streamer=self.streamer,
                stopping_criteria=[note_token],
            )
        return output.sequences[0], attention

    def _timing(self, reading: float, asked: float, given: int, cached: int) -> dict[str, float]:
        first, last = self.arrivals[0], self.arrivals[-1]
        speed = (len(self.arrivals) - 1) / max(last - first, 1e-9)
        counts = {"given": given, "cached": cached, "tokens": len(self.arrivals), "speed": speed}
        return {"reading": reading, "first": first - asked, **counts}


class BeforeEachOperation(TorchFunctionMode):
    """Calls `check` before each operation of PyTorch that this thread begins."""

    def __init__(self, check):
        super().__init__()
        self.check = check

    def __torch_function__(self, operation, types, args=(), kwargs=None):
        self.check()
        return operation(*args, **(kwargs or {}))


def crop(cache, length: int) -> None:
    """Cut a cache to its first `length` tokens; its layers may hold different numbers of them."""
    for layer in cache.layers:
        surplus = int(layer.get_seq_length()) - length
        if surplus > 0:
            layer.crop(-surplus)


def moments_of(videos: list[Video], shares: list[float], least: float = 0.0) -> list[Moment]:
    """The moments of the largest shares; see `pick_moments`."""
    patches = [(i, *patch) for i, video in enumerate(videos) for patch in zip(video.seconds, video.frames, strict=True)]
    picked = [(patches[i], shares[i]) for i in pick_moments(shares, least=least)]
    return [Moment(float(seconds), share, frame, video) for (video, seconds, frame), share in picked]

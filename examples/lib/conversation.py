"""Conversations about a video: the first question reads it, later ones find it in the cache of keys and values.

`VideoChat` answers with one model, one question at a time, and tells what of the video the model looked at;
`app.py` puts a page around it.
"""

import math
import threading
import time
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial

import numpy as np
import torch
from transformers import DynamicCache, TextIteratorStreamer

from .loading import read
from .observe import branch_functions, count_choices, observing, patch_frame

WATCHED_LAYERS = 3  # layers whose choices of blocks are counted
MOMENTS = 8  # of a video that `Conversation.moments` holds at most


@dataclass
class Moment:
    """A frame as the model saw it, and how often vision tokens chose to read what was on screen then."""

    seconds: float
    share: float | None  # of the tokens that had the choice; None where no token had to choose
    frame: np.ndarray  # uint8 [height, width, 3]


@dataclass
class Conversation:
    """A video, what was said about it, and the model's memory of both.

    Attributes:
        settings: how to read the video: arguments of `VideoNSAVideoProcessor`.
        messages: of the chat so far, as `apply_chat_template` takes them.
        stop: when set, the answer being given ends.
        moments: what the selection branch looked at most, in the order of the video.
        shares: for each temporal patch, as `Moment.share`; nan where no token had to choose.
        timing: of the last answer, if any: seconds to read the video and from there to the first token, tokens given
            to the model and found in the cache, tokens of the answer and how many of them per second.
    """

    video: str
    settings: dict = field(default_factory=dict)
    messages: list[dict] = field(default_factory=list)
    stop: threading.Event = field(default_factory=threading.Event)
    moments: list[Moment] = field(default_factory=list)
    shares: list[float] = field(default_factory=list)
    timing: dict[str, float] = field(default_factory=dict)
    ids: torch.Tensor | None = None  # int64 [tokens], of the prompts and answers so far
    cache: object | None = None  # of all of them but, at most, the last


class Stopped(Exception):
    """Somebody set `Conversation.stop` before there was a token."""


class VideoChat:
    """Answers questions with a model and a processor, as `loading.load` gives them; safe to share between threads."""

    def __init__(self, model, processor):
        self.model, self.processor = model, processor
        self.lock = threading.Lock()
        self.reading: Conversation | None = None  # whose video the model is given
        layers = model.model.language_model.layers
        spread = range(len(layers)) if len(layers) <= WATCHED_LAYERS else range(1, WATCHED_LAYERS + 1)
        self.watched = {round(i * (len(layers) - 1) / len(spread)) for i in spread}
        for layer in (*layers, *model.model.visual.blocks):
            layer.register_forward_pre_hook(self._check_stop)

    def memory(self, plan) -> tuple[int, int]:
        """Bytes that a planned video takes on the model's device: (keys and values of its tokens, its pixels)."""
        text, processor = self.model.config.text_config, self.processor.video_processor
        dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
        token = 2 * text.num_hidden_layers * text.num_key_value_heads * dim * self.model.dtype.itemsize
        patch = 3 * processor.temporal_patch_size * processor.patch_size**2 * 4  # fp32
        return plan.tokens * token, plan.tokens * processor.merge_size**2 * patch

    def ask(self, conversation: Conversation, question: str, max_new_tokens: int = 128) -> Iterator[str]:
        """Yield the answer so far, each time a word is added, and keep it in the conversation.

        The answer is what `generate` gives for the whole conversation, without sampling. If it is stopped before its
        first token, the conversation is as it was.

        Raises:
            OSError, ValueError: the video cannot be read as the settings say.
            torch.OutOfMemoryError: the video needs more memory than there is.
        """
        streamer = TextIteratorStreamer(self.processor.tokenizer, skip_prompt=True, skip_special_tokens=True)
        errors = []
        # A thread of its own: whatever becomes of who iterates, it comes to an end and the next question can start.
        args = (conversation, question, max_new_tokens, streamer, errors)
        thread = threading.Thread(target=self._answer, args=args, daemon=True)
        thread.start()
        answer = ""
        try:
            for part in streamer:
                if part:
                    answer += part
                    yield answer
        except GeneratorExit:
            conversation.stop.set()
            raise
        thread.join()
        if errors:
            raise errors[0]

    def _answer(self, conversation, question: str, max_new_tokens: int, streamer, errors: list) -> None:
        try:
            with self.lock, torch.inference_mode():
                try:
                    self._generate(conversation, question, max_new_tokens, streamer)
                finally:
                    self.reading = None
        except Stopped:
            pass
        except Exception as error:
            errors.append(error)
        finally:
            streamer.on_finalized_text("", stream_end=True)

    def _check_stop(self, *_) -> None:
        # Only then: what follows is short, and cutting it off here would leave a part of it in the cache.
        if self.reading is not None and self.reading.stop.is_set():
            raise Stopped

    def _generate(self, conversation, question: str, max_new_tokens: int, streamer) -> None:
        start, conversation.timing = time.perf_counter(), {}
        if conversation.stop.is_set():
            raise Stopped
        model, cache, watch, choices = self.model, conversation.cache, nullcontext(), []
        first = cache is None
        if first:
            if conversation.messages:
                raise ValueError("the cache of this conversation was lost; start a new one")
            content = [{"type": "video", "video": conversation.video}, {"type": "text", "text": question}]
            inputs, metadata = read(self.processor, conversation.video, question, **conversation.settings)
            pixels, times = inputs["pixel_values_videos"], metadata.sample_times
            watch = observing(model, partial(self._observe, choices))
            inputs, self.reading = inputs.to(model.device), conversation
        else:
            content = [{"type": "text", "text": question}]
            ids = torch.cat([conversation.ids, self._later_turn(conversation.messages, content)])[None]
            inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        asked, length = time.perf_counter(), inputs["input_ids"].shape[1]
        cache = DynamicCache(config=model.config) if first else cache
        cached = int(cache.get_seq_length())
        arrivals = []

        def stopping(ids, scores, **kwargs):
            arrivals.append(time.perf_counter())
            self.reading = None
            return torch.full((len(ids),), conversation.stop.is_set(), device=ids.device)

        try:
            with watch:
                output = model.generate(
                    **inputs,
                    past_key_values=cache,
                    max_new_tokens=max_new_tokens,
                    do_sample=False,
                    return_dict_in_generate=True,
                    streamer=streamer,
                    stopping_criteria=[stopping],
                )
        except BaseException:
            conversation.cache = None  # layers may hold parts of different lengths
            raise
        ids, ends = output.sequences[0], model.generation_config.eos_token_id
        ended = int(ids[-1]) in (ends if isinstance(ends, list) else [ends])
        conversation.ids, conversation.cache = ids[: len(ids) - ended], cache
        text = self.processor.decode(conversation.ids[length:], skip_special_tokens=True)
        conversation.messages += [
            {"role": "user", "content": content},
            {"role": "assistant", "content": [{"type": "text", "text": text}]},
        ]
        conversation.timing = {
            "reading": asked - start,
            "first": arrivals[0] - asked,
            "given": length - cached,
            "cached": cached,
            "tokens": len(arrivals),
            "speed": (len(arrivals) - 1) / max(arrivals[-1] - arrivals[0], 1e-9),
        }
        if first:
            self._keep_moments(conversation, choices, pixels, inputs["video_grid_thw"][0].tolist(), times)

    def _later_turn(self, messages: list[dict], content: list[dict]) -> torch.Tensor:
        """int64 [tokens], from the end of the last answer to the beginning of the next."""
        render = partial(self.processor.apply_chat_template, tokenize=False, add_generation_prompt=True)
        before = render(messages[:-1]) + messages[-1]["content"][0]["text"]
        after = render([*messages, {"role": "user", "content": content}])
        if not after.startswith(before):
            raise ValueError("the chat template of this model changes earlier turns; start a new conversation")
        ids = self.processor.tokenizer(after[len(before) :], add_special_tokens=False, return_tensors="pt")["input_ids"]
        return ids[0].to(self.model.device)

    def _observe(self, choices: list, attention, q, k, v, gates, layout) -> torch.Tensor:
        """Count what the vision tokens of a layer choose; see `VideoNSAModel.forward`."""
        if attention.layer_idx in self.watched and self.model.config.nsa_variant == "paper":
            config = attention.config
            q, k, v = q[layout.queries], layout.keys.take(k), layout.keys.take(v)
            nsa = branch_functions(self.model, q)
            sizes = {"block_size": config.block_size, "scale": attention.scaling}
            _, lse = nsa.compressed_attention(q, k, v, layout.cu_seqlens, **sizes)
            blocks = nsa.select_blocks(q, k, lse, layout.cu_seqlens, **sizes, block_count=config.block_count)
            choices.append(count_choices(blocks, config.block_size, config.block_count).cpu())
        return gates

    def _keep_moments(self, conversation, choices: list, pixels, grid: list[int], times: list[float]) -> None:
        processor, config = self.processor.video_processor, self.model.config
        patches, merge = grid[0], processor.merge_size
        per_patch = grid[1] * grid[2] // merge**2  # tokens
        shares = torch.full((patches,), math.nan)
        if choices:
            chosen, could = torch.stack(choices).sum(0).unbind(-1)  # [blocks]
            tokens = (chosen / could).repeat_interleave(config.block_size)[: patches * per_patch]
            shares = tokens.view(patches, per_patch).nanmean(1).float()
        seconds = times[:: processor.temporal_patch_size]
        conversation.shares = shares.tolist()
        conversation.moments = [
            Moment(seconds[i], None if math.isnan(shares[i]) else float(shares[i]), frame)
            for i in pick_moments(conversation.shares)
            for frame in [patch_frame(processor, pixels, grid, i)]
        ]


def pick_moments(shares: list[float], most: int = MOMENTS) -> list[int]:
    """Indices, ascending, of the largest shares that are not beside each other; of all alike where none is a number."""
    count = len(shares)
    rated = [i for i in range(count) if not math.isnan(shares[i])]
    if not rated:
        return sorted({int((i + 0.5) * count / most) for i in range(most)} if count > most else range(count))
    distance, picked = 1 + count // (8 * most), []
    for i in sorted(rated, key=lambda i: -shares[i]):
        if len(picked) < most and all(abs(i - j) >= distance for j in picked):
            picked.append(i)
    return sorted(picked)

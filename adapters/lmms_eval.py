"""VideoNSA as a model of lmms-eval (https://github.com/EvolvingLMMs-Lab/lmms-eval), for the field's benchmarks.

    pip install -e ".[eval]"
    python -m lmms_eval --model videonsa --model_args pretrained=VideoNSA-7B,fps=4,max_frames=256,frame_tokens=512 \
        --tasks longvideobench_val_v --batch_size 1 --output_path results

lmms-eval finds `manifest` by the entry point `lmms_eval.models` of this package. Videos are read by the checkpoint's
own processor: `--model_args` takes its settings (`fps`, `num_frames`, `frame_tokens`, `max_pixels`, `max_frames`,
`max_tokens`, `prefer` ...) and all fields of the configuration (`nsa_variant`, `block_count`, `window_size` ...).
docs/findings.md has the lines with the paper's settings. `examples/compare_dense.py` runs a task twice, with sparse and
with dense attention, and tests the difference.
"""

import re
import time
from pathlib import Path

import torch
from tqdm import tqdm
from transformers import AutoConfig, AutoModel, AutoProcessor

from videonsa.configuration_videonsa import NSA_FIELDS
from videonsa.video_inputs import CLIP_KEYS

try:
    from lmms_eval.api.model import lmms
except ImportError:  # the class can be made and tested without lmms-eval, which alone can run it
    lmms = object

# Settings that hold for all videos of a call, and those of each. A task gives the part of a video, from start to end.
CALL_SETTINGS = ("timeout", "max_source_pixels", "max_duration")
VIDEO_SETTINGS = tuple(dict.fromkeys(name for name in CLIP_KEYS.values() if name not in ("start", "end")))
HUB_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*")
SAMPLING = ("temperature", "top_p", "top_k", "num_beams")
FILL_BLOCKS = "fill_blocks"  # the processor's own `block_size`, which has the name of a field of the configuration


def manifest():
    """What lmms-eval registers."""
    from lmms_eval.models.registry_v2 import ModelManifest  # here, as that module loads this one

    return ModelManifest(model_id="videonsa", chat_class_path=f"{__name__}.VideoNSA")


def read_config(pretrained: str):
    """The configuration of a VideoNSA repository, read before anything that takes time.

    Raises:
        ValueError: it is no folder nor an id of the Hub, cannot be read, or is another kind of checkpoint.
    """
    given = f"--model_args pretrained={pretrained}"
    if not Path(pretrained).is_dir() and not HUB_ID.fullmatch(pretrained):
        raise ValueError(f"{given} is no folder, nor a Hub id, which is OWNER/NAME")
    try:
        config = AutoConfig.from_pretrained(pretrained, trust_remote_code=True)
    except (OSError, ValueError) as error:  # no such repository, no network, no config.json, an unknown kind
        raise ValueError(f"{given} cannot be read: {str(error).splitlines()[0]}") from error
    if config.model_type not in ("videonsa", "videonsa_qwen3"):
        raise ValueError(
            f"{given} is a {config.model_type} checkpoint, not a VideoNSA repository; make one with: "
            f"python examples/convert.py {pretrained} OUTPUT"
        )
    return config


class VideoNSA(lmms):
    """Answers the questions of lmms-eval's tasks.

    Args:
        pretrained: folder or Hub id of a VideoNSA repository.
        batch_size: questions at a time, of the same task.
        device, dtype: where the model is, and in what numbers; with several processes, each takes its own GPU.
        system_prompt: put before conversations that have none; by default the chat template's own.
        attn_implementation: as transformers takes it; for decoding, text and the vision tower.
        settings: fields of the configuration, and settings of the processor for videos. The processor's `block_size` is
            called `fill_blocks` here.

    Raises:
        ValueError: a setting is neither, or `pretrained` is no VideoNSA repository.
    """

    is_simple = False

    def __init__(
        self, pretrained: str, batch_size: int = 1, device: str | None = None, dtype: str = "auto",
        system_prompt: str | None = None, attn_implementation: str | None = None, **settings,
    ):  # fmt: skip
        super().__init__()
        fields = {name: settings.pop(name) for name in NSA_FIELDS if name in settings}
        if FILL_BLOCKS in settings:
            settings["block_size"] = settings.pop(FILL_BLOCKS)
        self.video_settings = {name: settings.pop(name) for name in VIDEO_SETTINGS if name in settings}
        self.call_settings = {name: settings.pop(name) for name in CALL_SETTINGS if name in settings}
        ignored = {"max_batch_size", "batch_size_per_gpu"}  # lmms-eval passes them to every model
        if unknown := sorted(set(settings) - ignored):
            allowed = ", ".join(sorted({*NSA_FIELDS, *VIDEO_SETTINGS, *CALL_SETTINGS, FILL_BLOCKS}))
            own = "pretrained, dtype, system_prompt, attn_implementation"
            raise ValueError(f"--model_args has no {', '.join(unknown)}; it may have {own}, {allowed}")
        config = read_config(pretrained)
        self.batch_size, self.system_prompt = int(batch_size), system_prompt
        self._rank, self._world_size = 0, 1
        if torch.distributed.is_torchelastic_launched():
            from accelerate import Accelerator  # sets the processes up; lmms-eval gathers what they return through it

            self.accelerator = Accelerator()
            self._rank, self._world_size = self.accelerator.process_index, self.accelerator.num_processes
            device = str(self.accelerator.device)
        for name, value in fields.items():
            setattr(config, name, value)
        device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        options = {"trust_remote_code": True, "dtype": dtype, "device_map": device}
        if attn_implementation:
            options["attn_implementation"] = attn_implementation
        self.model = AutoModel.from_pretrained(pretrained, config=config, **options).eval()
        self.device = self.model.device  # where lmms-eval puts what it gathers from processes
        self.processor = AutoProcessor.from_pretrained(pretrained, trust_remote_code=True)
        self.processor.tokenizer.padding_side = "left"

    def generate_until(self, requests) -> list[str]:
        """Answers in the order of the requests; those of one task and with the same options are batched."""
        groups = {}
        for i, request in enumerate(requests):
            _, _, options, _, task, _ = request.args
            groups.setdefault((task, repr(options)), []).append(i)
        answers = [None] * len(requests)
        self.seconds, self.tokens = 0.0, 0
        with tqdm(total=len(requests), disable=self._rank != 0, desc="videonsa") as bar:
            for indices in groups.values():
                for start in range(0, len(indices), self.batch_size):
                    batch = indices[start : start + self.batch_size]
                    conversations = [self.conversation(requests[i]) for i in batch]
                    options = requests[batch[0]].args[2]
                    for i, text in zip(batch, self.answer(conversations, options), strict=True):
                        answers[i] = text
                        if hasattr(self, "cache_hook"):
                            self.cache_hook.add_partial("generate_until", (requests[i].args[0], options), text)
                    bar.update(len(batch))
        self.log_throughput(len(requests))
        return answers

    def log_throughput(self, requests: int) -> None:
        """Tell lmms-eval what was generated in what time, as its own models do, for its results."""
        if lmms is object:
            return
        from lmms_eval.models.model_utils.gen_metrics import log_metrics  # here, as its package loads this module

        log_metrics(
            total_elapsed_time=self.seconds,
            total_gen_tokens=self.tokens,
            avg_speed=self.tokens / self.seconds if self.seconds else 0.0,
            additional_metrics={"rank": self._rank, "total_requests": requests},
        )

    def conversation(self, request) -> list[dict]:
        """Chat messages, as the processor takes them, of a request of lmms-eval."""
        _, doc_to_messages, _, doc_id, task, split = request.args
        messages = [
            {"role": message["role"], "content": [self.part(part) for part in message["content"]]}
            for message in doc_to_messages(self.task_dict[task][split][doc_id])
        ]
        if self.system_prompt and messages[0]["role"] != "system":
            messages.insert(0, {"role": "system", "content": [{"type": "text", "text": self.system_prompt}]})
        return messages

    def part(self, part: dict) -> dict:
        """A part of a message: media have their file or image as `url`, videos may have a start and an end."""
        if part["type"] == "text":
            return {"type": "text", "text": part["text"]}
        if part["type"] == "image":
            return {"type": "image", "image": part["url"]}
        if part["type"] != "video":
            raise ValueError(f"VideoNSA takes text, images and videos, not {part['type']}")
        times = {name: part.get(f"{name}_time") for name in ("start", "end")}
        times = {name: value for name, value in times.items() if value is not None}
        return {"type": "video", "video": part["url"], **self.video_settings, **times}

    def answer(self, conversations: list[list[dict]], options: dict) -> list[str]:
        """Generated answers, each up to the first of the strings `until`."""
        inputs = self.processor.apply_chat_template(
            conversations, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt",
            processor_kwargs={"padding": True, **self.call_settings},
        ).to(self.model.device)  # fmt: skip
        sampling = {name: options[name] for name in SAMPLING if options.get(name) is not None}
        if not options.get("do_sample") and not sampling.get("temperature"):
            sampling = {"do_sample": False, "num_beams": sampling.get("num_beams", 1)}
        else:
            sampling["do_sample"] = True
        start = time.perf_counter()
        output = self.model.generate(**inputs, max_new_tokens=options.get("max_new_tokens", 128), **sampling)
        new = output[:, inputs["input_ids"].shape[1] :].cpu()
        self.seconds += time.perf_counter() - start
        self.tokens += int((new != self.processor.tokenizer.pad_token_id).sum())
        texts = self.processor.tokenizer.batch_decode(new, skip_special_tokens=True)
        until = options.get("until") or []
        # Tasks ask to stop at an empty line by default, which cuts reasoning and leading newlines off.
        stops = [stop for stop in ([until] if isinstance(until, str) else until) if stop.strip()]
        for stop in stops:
            texts = [text.split(stop)[0] for text in texts]
        return [text.strip() for text in texts]

    def loglikelihood(self, requests):
        raise NotImplementedError("VideoNSA answers by generation; tasks that rank likelihoods are not supported")

    def generate_until_multi_round(self, requests):
        raise NotImplementedError("tasks of several rounds are not supported")

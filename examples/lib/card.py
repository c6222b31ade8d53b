"""The model card that `convert.py` and `finetune.py` write into a repository."""

import configparser
import copy
import json
import logging
from pathlib import Path

from huggingface_hub import ModelCard, ModelCardData, hf_hub_download

from videonsa.configuration_videonsa import NSA_VARIANTS

from .fields import MEANINGS, SIZES

logger = logging.getLogger(__name__)

VIDEO = "https://huggingface.co/datasets/raushan-testing-hf/videos-test/resolve/main/sample_demo_1.mp4"
QWEN25 = """\
@article{bai2025qwen25vl,
  title   = {Qwen2.5-VL Technical Report},
  author  = {Shuai Bai and Keqin Chen and Xuejing Liu and Jialin Wang and Wenbin Ge and Sibo Song and Kai Dang and
             Peng Wang and Shijie Wang and Jun Tang and Humen Zhong and Yuanzhi Zhu and Mingkun Yang and Zhaohai Li and
             Jianqiang Wan and Pengfei Wang and Wei Ding and Zheren Fu and Yiheng Xu and Jiabo Ye and Xi Zhang and
             Tianbao Xie and Zesen Cheng and Hang Zhang and Zhibo Yang and Haiyang Xu and Junyang Lin},
  journal = {arXiv preprint arXiv:2502.13923},
  year    = {2025}
}"""
QWEN3 = """\
@article{bai2025qwen3vl,
  title   = {Qwen3-VL Technical Report},
  author  = {Shuai Bai and Yuxuan Cai and Ruizhe Chen and Keqin Chen and Xionghui Chen and Zesen Cheng and Lianghao
             Deng and Wei Ding and Chang Gao and Chunjiang Ge and Wenbin Ge and Zhifang Guo and Qidong Huang and Jie
             Huang and Fei Huang and Binyuan Hui and Shutong Jiang and Zhaohai Li and Mingsheng Li and Mei Li and
             Kaixin Li and Zicheng Lin and Junyang Lin and Xuejing Liu and Jiawei Liu and Chenglong Liu and Yang Liu
             and Dayiheng Liu and Shixuan Liu and Dunjie Lu and Ruilin Luo and Chenxu Lv and Rui Men and Lingchen Meng
             and Xuancheng Ren and Xingzhang Ren and Sibo Song and Yuchong Sun and Jun Tang and Jianhong Tu and
             Jianqiang Wan and Peng Wang and Pengfei Wang and Qiuyue Wang and Yuxuan Wang and Tianbao Xie and Yiheng Xu
             and Haiyang Xu and Jin Xu and Zhibo Yang and Mingkun Yang and Jianxin Yang and An Yang and Bowen Yu and
             Fei Zhang and Hang Zhang and Xi Zhang and Bo Zheng and Humen Zhong and Jingren Zhou and Fan Zhou and Jing
             Zhou and Yuanzhi Zhu and Ke Zhu},
  journal = {arXiv preprint arXiv:2511.21631},
  year    = {2025}
}"""
# By model_type: the backbone, and its report.
BACKBONES = {
    "videonsa": ("Qwen2.5-VL", QWEN25),
    "videonsa_qwen3": ("Qwen3-VL", QWEN3),
}
# What `nsa_variant` offers; a card lists those that its checkpoint can run.
VARIANTS = {
    "paper": "sparse attention as published: compression, selection and window, mixed by gates; needs trained gates",
    "released": "what the code computes that the public weights `Enxin/VideoNSA` were trained with; for these weights",
    "merged": "one softmax over earlier text and the chosen blocks, without gates; for weights without trained gates",
    "dense": "stock attention: the baseline",
}
NSA = """\
through Native Sparse Attention: to the means of blocks of
{block_size} tokens, to the {block_count} blocks that matter most, and to a window of {window_size} tokens"""
MERGED = """\
to the text before them and to chosen blocks of {block_size}
tokens: the first, those that a window of {window_size} tokens overlaps, and the most important, {block_count} in all"""
# What a checkpoint needs that does not come with one of these.
INSTALLED = ("transformers", "torch", "av", "accelerate")
LENGTHS = (8192, 32768, 131072)  # tokens

CARD = """
# {name}

[VideoNSA](https://arxiv.org/abs/2510.02295) on the weights of {base}, for questions about long videos.
In every layer of the language model, vision tokens attend {method}.
Text tokens, and with them all that is generated, keep the dense attention of {backbone}.

{note}

## Use

```sh
{install}
```

```python
from transformers import AutoModel, AutoProcessor, TextStreamer

repo = "{name}"
model = AutoModel.from_pretrained(repo, trust_remote_code=True, {options})
processor = AutoProcessor.from_pretrained(repo, trust_remote_code=True)

video = "{video}"  # or a path
messages = [{{"role": "user", "content": [
    {{"type": "video", "video": video}},
    {{"type": "text", "text": "What happens in this video?"}},
]}}]
inputs = processor.apply_chat_template(
    messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
).to(model.device)
streamer = TextStreamer(processor.tokenizer, skip_prompt=True, skip_special_tokens=True)
output = model.generate(**inputs, max_new_tokens=128, streamer=streamer)
```

By default a video gives up to 4 frames per second of at most {pixels:,} pixels, within 131,072 tokens; a longer one is
sampled more sparsely. `processor_kwargs={{"fps": 1, "max_tokens": 32768}}` in `apply_chat_template` changes that.

Several questions, for which the video is read once (`answer.moments` are the frames that an answer attended to most):

```python
from transformers.dynamic_module_utils import get_class_from_dynamic_module

VideoChat = get_class_from_dynamic_module("video_chat.VideoChat", repo)
talk = VideoChat(model, processor).open("{video}")
answer = talk.ask("What happens in this video?")
print(answer, *answer.moments)
print(talk.ask("What is shown at the end?"))
```

Or as a pipeline:

```python
from transformers import pipeline

pipe = pipeline("image-text-to-text", model="{name}", trust_remote_code=True, {pipeline_options})
messages = [{{"role": "user", "content": [
    {{"type": "video", "video": "{video}"}},
    {{"type": "text", "text": "What happens in this video?"}},
]}}]
print(pipe(text=messages, max_new_tokens=128, return_full_text=False)[0]["generated_text"])
```

`trust_remote_code=True` runs the `.py` files of this repository. Read them, and add `revision="<commit>"` to stay with
what you have read.

## Configuration

{layers} layers of width {hidden_size} with {heads} query and {kv_heads} KV heads of {head_dim}; weights in {dtype}.

| field | value | meaning |
|---|---|---|
{fields}

| `nsa_variant` | what vision tokens compute |
|---|---|
{variants}

All fields are accepted by `from_pretrained`, as `nsa_variant="dense"` is.

## Memory and speed

Computed from the shapes, not measured; workspace and activations of a prefill come on top.

| | {lengths} |
|---|{rules}|
| weights, GB | {weights} |
| keys and values in the cache ({dtype}), GB | {cache} |
| query–key pairs of vision tokens, of dense attention | {budget} |

No speed of this model has been measured, on any GPU. Measured is the reading of videos: 2 minutes of 1080p H.264 at 4
frames per second become model inputs in 4.2 s, at 0.2 in 1.0 s, on 2 cores of an AMD EPYC (PyAV 18.1, torch 2.15,
transformers 5.23; `benchmarks/video.py` of the project).

## Limits

- The Triton kernels are tested in Triton's interpreter and have not run on a GPU; should they fail on yours,
  `nsa_backend="torch"` computes the same, more slowly.
- Sparse attention makes prefilling cheaper. Decoding is dense, and the cache holds all tokens.
- Answers can be wrong or made up, more so about short events in long videos and about order. What holds for the
  base model (languages, biases, intended use) holds here.
- HDR is not tone mapped, audio is ignored.

## Citation

```bibtex
@article{{song2025videonsa,
  title   = {{VideoNSA: Native Sparse Attention Scales Video Understanding}},
  author  = {{Enxin Song and Wenhao Chai and Shusheng Yang and Ethan Armand and Xiaojun Shan and Haiyang Xu and
             Jianwen Xie and Zhuowen Tu}},
  journal = {{arXiv preprint arXiv:2510.02295}},
  year    = {{2025}}
}}

{citation}
```
"""


ADAPTER_CARD = """
# {name}: the adapter

LoRA weights, and whole weights of the gates, for {base}. The folder above holds the model that they are merged into.

{note}

## Use

```sh
{install}
```

```python
from peft import PeftModel
from transformers import AutoModel, AutoProcessor

base = AutoModel.from_pretrained({base_path}, trust_remote_code=True, {options})
model = PeftModel.from_pretrained(base, "{name}", subfolder="adapter")
processor = AutoProcessor.from_pretrained({base_path}, trust_remote_code=True)
```

The scripts of the project merge it themselves, from a folder:

```sh
{commands}
```
"""


def write_adapter_card(folder: Path, *, base: str, name: str, note: str, **options) -> None:
    """Write the card of an adapter in the folder `adapter` of a trained model; the arguments are those of
    `write_card`."""
    data, named = _data(base, base, library_name="peft", tags=["lora"]), _base_name(base)
    local = name.rpartition("/")[2]
    commands = [f"python examples/demo.py --model {local}/adapter"]
    if local != name:
        commands.insert(0, f'hf download {name} --include "adapter/*" --local-dir {local}')
    card = ADAPTER_CARD.format(
        name=name,
        base=named,
        base_path=json.dumps(base),
        note=note,
        install=install_line("peft"),
        options=_arguments({"dtype": "auto", "device_map": "auto", **options}),
        commands="\n".join(commands),
    )
    (folder / "README.md").write_text(f"---\n{data.to_yaml()}\n---\n{card}")


def write_card(source: str | Path, folder: Path, config, *, base: str, name: str, note: str, **options) -> None:
    """Write the model card of a complete repository.

    Args:
        source: folder or Hub id of the checkpoint it was made from, whose card states the licence.
        folder: of the repository; its weights are counted.
        config: its configuration.
        base: folder or Hub id to name as the base model. A folder stands for the base model of its own card.
        name: of the model, its Hub id where it has one.
        note: a paragraph about its training.
        **options: for `from_pretrained` in the snippets, beside dtype and device_map.
    """
    data = _data(source, base, library_name="transformers", tags=["custom_code"])
    backbone, citation = BACKBONES[config.model_type]
    vision, text = config.vision_config, config.text_config
    dtype = str(config.dtype or "float32").removeprefix("torch.")
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    itemsize = 4 if dtype == "float32" else 2
    per_token = 2 * text.num_hidden_layers * text.num_key_value_heads * head_dim * itemsize
    weights = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    model_options = {key: value for key, value in options.items() if key not in ("dtype", "device_map")}
    sizes = {key: getattr(config, key) for key in SIZES}
    merged = config.nsa_variant == "merged"
    # Of "released" alone, which not every backbone has.
    others = () if "released" in text.variants else ("block_causal", "truncate_seconds")
    meanings = {key: meaning for key, meaning in MEANINGS.items() if key not in others}
    fields = [f"| `{key}` | {json.dumps(getattr(config, key))} | {meaning} |" for key, meaning in meanings.items()]
    runs = [key for key in VARIANTS if _runs(text, key) and (not merged or key in ("merged", "dense"))]  # no gates
    card = CARD.format(
        name=name,
        install=install_line(),
        base=_base_name(base),
        backbone=backbone,
        pixels=(8 * vision.patch_size * vision.spatial_merge_size) ** 2,
        citation=citation,
        note=note,
        video=VIDEO,
        options=_arguments({"dtype": "auto", "device_map": "auto", **options}),
        pipeline_options=_arguments(
            {"dtype": "auto", "device_map": "auto", **({"model_kwargs": model_options} if model_options else {})}
        ),
        layers=text.num_hidden_layers,
        hidden_size=text.hidden_size,
        heads=text.num_attention_heads,
        kv_heads=text.num_key_value_heads,
        head_dim=head_dim,
        dtype=dtype,
        fields="\n".join(fields),
        method=(MERGED if merged else NSA).format(**sizes),
        variants="\n".join(f'| `"{key}"` | {VARIANTS[key]} |' for key in runs),
        lengths=" | ".join(f"{n:,} tokens" for n in LENGTHS),
        rules="|".join("---" for _ in LENGTHS),
        weights=" | ".join([f"{weights / 1e9:.3g}"] * len(LENGTHS)),
        cache=" | ".join(f"{n * per_token / 1e9:.3g}" for n in LENGTHS),
        budget=" | ".join(f"{config.attention_budget(n, pooled_keys=True):.1%}" for n in LENGTHS),
    )
    (folder / "README.md").write_text(f"---\n{data.to_yaml()}\n---\n{card}")


def requirements(*extras: str) -> list[str]:
    """What the package needs, with its extras, as setup.cfg says it."""
    setup = configparser.ConfigParser()
    setup.read(Path(__file__).resolve().parents[2] / "setup.cfg")
    lists = [setup["options"]["install_requires"], *(setup["options.extras_require"][extra] for extra in extras)]
    return list(dict.fromkeys(line for text in lists for line in text.splitlines() if line))


def install_line(*more: str) -> str:
    """The command that installs what a checkpoint needs, and further packages of training."""
    lines = [line for line in requirements("train") if line.startswith((*INSTALLED, *more))]
    return " ".join(["pip install", *(f'"{line}"' for line in lines)])


def _base_name(base: str) -> str:
    return Path(base).resolve().name if Path(base).exists() else f"[{base}](https://huggingface.co/{base})"


def _data(source: str | Path, base: str, *, library_name: str, tags: list[str]) -> ModelCardData:
    """The metadata of a card; what the card of `source` does not say, it does not, either."""
    stated = _metadata(source)
    if "license" not in stated:
        logger.warning(
            f"The card of {source} states no licence, so that the new one states none: add `license:` at its top"
        )
    return ModelCardData(
        library_name=library_name,
        pipeline_tag="video-text-to-text",
        tags=["videonsa", "sparse-attention", "long-video", *tags, "arxiv:2510.02295"],
        base_model=stated.get("base_model") if Path(base).exists() else base,
        **{key: stated[key] for key in ("license", "license_name", "license_link") if key in stated},
    )


def _metadata(source: str | Path) -> dict:
    """The metadata of a checkpoint's card; empty where there is none, or none that can be read."""
    path = Path(source) / "README.md"
    if not Path(source).is_dir():
        try:
            path = Path(hf_hub_download(str(source), "README.md"))
        except OSError:  # no card, no network
            return {}
    return ModelCard.load(path).data.to_dict() if path.is_file() else {}


def _arguments(options: dict) -> str:
    return ", ".join(f"{key}={json.dumps(value)}" for key, value in options.items())


def _runs(text_config, variant: str) -> bool:
    """Whether a checkpoint can run a variant: it is there, and the settings allow it."""
    config = copy.deepcopy(text_config)
    config.nsa_variant = variant
    try:
        config.validate_nsa()
        config.validate_variant()
    except ValueError:
        return False
    return variant in NSA_VARIANTS

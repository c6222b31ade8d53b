"""The findings of the VideoNSA paper (arXiv 2510.02295, section 4) as measurements on any checkpoint, and a needle map.

    python examples/analyze.py gates                        # the tiny trained model, on clips made on the spot
    python examples/analyze.py sinks VideoNSA-7B haystack/test.json --output findings
    python examples/analyze.py looked-at VideoNSA-7B --video talk.mp4 --question "Who speaks first?"

FINDING is one of transfer, scaling, budget, gates, latency, sinks, needles and looked-at; `analyze.py FINDING --help`
says what it measures, by which equation, and what it writes to the folder --output: FINDING.json and figures, in place
of older ones. DATA is a file as for `evaluate.py`; questions are asked and counted as there. `lib/observe.py` looks
into the layers, `lib/figures.py` draws, `lib/summaries.py` says in a few lines what was found. Needs matplotlib:
pip install -e ".[analyze]".
"""

from lib.door import door  # first: it names the extra of a package that is missing

# isort: split

import argparse
import functools
import inspect
import itertools
import json
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import transformers
from tqdm import tqdm

from lib import figures
from lib.answering import Prompts, Question, accuracy, answer_all, is_correct, list_questions
from lib.data import Drop, load_samples, media_parts
from lib.fields import SIZES, add_fields, given_fields
from lib.folders import TINY
from lib.loading import UNSEEN, load, read
from lib.needles import Settings, make_clip, make_dataset, messages
from lib.observe import (
    BRANCHES,
    SINK_ATTENTION,
    SinkTally,
    configured,
    dense_received,
    only_branches,
    received_by_branch,
    similarity,
    watch,
    watch_dense,
)  # fmt: skip
from lib.options import OptionParser, add_device
from lib.progress import prefill_progress
from lib.summaries import summarize
from videonsa.nsa_torch import block_means
from videonsa.video_chat import VideoChat
from videonsa.video_moments import branch_functions, count_choices, observing, patch_frame

KINDS = {1: "image", 2: "video"}  # of mm_token_type_ids
SAMPLED = 2048  # tokens of a clip of which gates are kept one by one
# Lengths of the clips that are made where no data are given.
CLIP_SECONDS = {
    "transfer": (4, 8, 16, 32),
    "scaling": (4, 8, 16, 32),
    "budget": (8, 16),
    "gates": (8, 16),
    "sinks": (8, 16),
    "needles": (8, 16, 32, 64, 128),
}
QUESTIONS = ("colour", "shape", "where", "when")
DEPTHS = (0.0, 0.2, 0.5, 0.8, 1.0)
SHEET, HIGHLIGHTS = "looked-at.png", "looked-at.mp4"
OBSERVED = ("gates", "latency", "sinks", "looked-at")  # findings about the branches of nsa_variant="paper"


# ----------------------------------------------------------------------------------------------------------------------
# Findings
# ----------------------------------------------------------------------------------------------------------------------


def transfer(args) -> dict:
    """Finding 1, dense transfer (paper: table 3): do weights trained with sparse attention serve dense attention?

    The same checkpoint answers all questions as it is and with nsa_variant="dense", softmax(q·kᵀ/√d) v over all earlier
    tokens ("Dense-NSA"), and so does a model trained with dense attention, if one is given ("Dense-SFT"). Measured are
    the accuracy by type of question, its change relative to the first in percent, and the share of questions to which
    two of them give the same answer, right or wrong.
    """
    model, processor, samples = open_model_and_data(args)
    trained = model.config.nsa_variant
    runs = {trained: ask(model, processor, samples, args)}
    with configured(model, nsa_variant="dense"):
        runs["dense, same weights"] = ask(model, processor, samples, args)
    if args.twin:
        twin, _ = load(args.twin, args.device, nsa_variant="dense")
        runs["dense, dense-trained"] = ask(twin, processor, samples, args)
    answers = {name: {entry["id"]: entry["answered"].strip().lower() for entry in run} for name, run in runs.items()}
    agreement = {
        a: {b: mean(answers[a][id] == answers[b][id] for id in answers[a] if id in answers[b]) for b in answers}
        for a in answers
    }
    base = accuracy(runs[trained])["all"]["all"]["accuracy"]
    return {
        "accuracy": {name: accuracy(run) for name, run in runs.items()},
        "change_percent": {
            name: percent_change(accuracy(run)["all"]["all"]["accuracy"], base) for name, run in runs.items()
        },
        "agreement": agreement,
    }


def scaling(args) -> dict:
    """Finding 2, scaling and the token budget (paper: figure 2, section 4): context L = frames F × tokens per frame T.

    First, accuracy and time by context length, the questions grouped by it, up to the next power of two, as the data
    and the processor give it. Then every video is read with each of --frames and --frame_tokens (per temporal patch,
    which is two frames), and accuracy and time are measured for each pair. Pairs of one context, F/2 · T tokens, lie on
    a line of the heat map; the best on each line is marked. Only videos that have the most frames asked for take part.
    """
    model, processor, samples = open_model_and_data(args)
    run = ask(model, processor, samples, args)
    by_length = {}
    for bucket, cell in accuracy(run)["all"].items():
        if bucket != "all":
            entries = [entry for entry in run if bucket == str(1 << (entry["tokens"] - 1).bit_length())]
            kinds = {kind: row[bucket]["accuracy"] for kind, row in accuracy(entries).items() if kind != "all"}
            by_length[bucket] = {**cell, "tokens": mean(e["tokens"] for e in entries), "types": kinds} | times(entries)
    longest = ask(model, processor, samples, args, num_frames=max(args.frames), frame_tokens=min(args.frame_tokens))
    fit = {entry["id"] for entry in longest}
    samples = [sample for sample in samples if sample[0].id in fit]
    if not samples:
        raise ValueError(f"--frames: no video has {max(args.frames)} frames of {min(args.frame_tokens)} tokens")
    cells = []
    for frames, tokens in tqdm(list(itertools.product(args.frames, args.frame_tokens)), disable=None):
        entries = ask(model, processor, samples, args, num_frames=frames, frame_tokens=tokens)
        cell = {"frames": frames, "frame_tokens": tokens, "context": frames // 2 * tokens}
        cells.append({**cell, **summary(entries)})
    return {"by_length": by_length, "cells": cells, "best_splits": best_splits(cells)}


def best_splits(cells: list[dict]) -> list[dict]:
    """The most accurate cell of each context that can be spent in several ways."""
    rivals = defaultdict(list)
    for cell in cells:
        if cell["questions"]:
            rivals[cell["context"]].append(cell)
    best = [max(group, key=lambda cell: cell["accuracy"]) for group in rivals.values() if len(group) > 1]
    return [{name: cell[name] for name in ("context", "frames", "frame_tokens")} for cell in best]


def budget(args) -> dict:
    """Finding 3, the attention budget (paper: figure 3): b blocks of s tokens and a window of w, K = b·s + w keys.

    Accuracy and time over `block_count` × `window_size`, at the K that the model was trained with, and at --budgets
    times as much. `share` is `config.attention_budget`, the share of the query–key pairs of dense causal attention,
    averaged over the prompts; `share_paper` is the paper's γ = 2 (b·s + w) / (L - 1), which counts every query as if it
    had K keys behind it, and so exceeds 1 where K is long for the context L.
    """
    model, processor, samples = open_model_and_data(args)
    size, count, window = (getattr(model.config, name) for name in SIZES)
    cells = []
    settings = {(count, window)}
    for factor in args.budgets:
        keys = factor * (count * size + window)
        for local in args.window_shares:
            w = round(keys * local)
            b = round((keys - w) / size)
            if w >= 1 and b >= 3:
                settings.add((b, w))
        if (b := round((keys - window) / size)) >= 3:
            settings.add((b, window))
    for b, w in tqdm(sorted(settings), disable=None):
        with configured(model, block_count=b, window_size=w):
            entries = ask(model, processor, samples, args)
            shares = [model.config.attention_budget(entry["tokens"]) for entry in entries]
        lengths = [entry["tokens"] for entry in entries]
        cell = {"block_count": b, "window_size": w, "keys": b * size + w, "share": mean(shares)}
        cell["share_paper"] = mean(2 * (b * size + w) / (length - 1) for length in lengths)
        cells.append({**cell, "trained": (b, w) == (count, window), **summary(entries)})
    return {"cells": cells}


def gates(args) -> dict:
    """Finding 4, gates (paper: figures 4 and 5, table 2; equation 1: o = Σ_c g_c · Attn(q, K_c, V_c)).

    Of the gates g = sigmoid(MLP(x)) of each layer, head and branch, over the vision tokens of all clips: mean and
    quartiles over depth; means by head, by kind of token (image, video) and by the relative time of the token's frame;
    and how alike heads are: the mean over pairs of heads of the cosine of their gate trajectories over the tokens,
    each less its mean (Pearson's correlation, which is what the paper's colour bars from -1 to 1 show).
    Then the branches are ablated: each alone, each pair and all three answer all questions, the other gates set to 0.
    """
    model, processor, samples = open_model_and_data(args)
    layers = model.config.text_config.num_hidden_layers
    kept, kinds, moments = [[] for _ in range(layers)], [], []
    heads = model.config.text_config.num_attention_heads
    alike = torch.zeros(layers, len(BRANCHES), heads, heads)
    clips = 0
    for inputs in prompts_of(processor, samples, args.limit):
        kind = inputs["mm_token_type_ids"][0]
        kind = kind[kind > 0]
        chosen = torch.arange(0, len(kind), max(1, len(kind) // SAMPLED))
        kinds.append(kind[chosen])
        moments.append(chosen / max(1, len(kind) - 1))
        clips += 1

        def see(seen, chosen=chosen):
            g = seen.gates[chosen.to(seen.gates.device)].float().cpu()  # [tokens, heads, branches]
            kept[seen.layer].append(g)
            alike[seen.layer] += similarity(g)

        watch(model, inputs, see)
    values = torch.stack([torch.cat(layer) for layer in kept])  # [layers, tokens, heads, branches]
    kinds, moments = torch.cat(kinds), torch.cat(moments)
    bins = (moments * 10).long().clamp(max=9)
    quartiles = torch.quantile(values.mean(2), torch.tensor([0.25, 0.75]), dim=1)  # over tokens, of the mean head
    heads = values.mean(1)  # [layers, heads, branches]
    off_diagonal = ~torch.eye(heads.shape[1], dtype=torch.bool)
    alike /= clips
    result = {
        "branches": BRANCHES,
        "clips": clips,
        "tokens": values.shape[1],
        "mean": heads.mean(1).tolist(),
        "quartiles_over_tokens": quartiles.transpose(0, 1).tolist(),
        "quartiles_over_heads": torch.quantile(heads, torch.tensor([0.25, 0.75]), dim=1).transpose(0, 1).tolist(),
        "by_head": heads.tolist(),
        "by_kind": {KINDS[i]: values[:, kinds == i].mean((1, 2)).tolist() for i in KINDS if (kinds == i).any()},
        "by_time": torch.stack([values[:, bins == i].mean((1, 2)) for i in range(10)], 1).tolist(),
        "similarity": alike.tolist(),
        "mean_similarity": alike[:, :, off_diagonal].mean(-1).tolist() if heads.shape[1] > 1 else None,
        "ablation": {},
    }
    every = range(len(BRANCHES))
    for on in (on for n in reversed(every) for on in itertools.combinations(every, n + 1)):
        with observing(model, functools.partial(only_branches, on)):
            run = ask(model, processor, samples, args)
        result["ablation"][" + ".join(BRANCHES[i] for i in on)] = accuracy(run)
    return result


def latency(args) -> dict:
    """Finding 5, latency by branch (paper: figure 6, appendix R): one layer in the model's shape, on random inputs.

    Milliseconds per part over the context L: `pooling` (block means of k and v, O(L)), `compression` (which pools, then
    attends to L/s means per query: O(L²/s)), `choice` (which pools, then ranks them: O(L²/s)), `selection` (O(L·b·s)),
    `window` (O(L·w)), the `gates` network of the model's first layer (O(L)) and `whole`, nsa_attention without that
    network. Timed by the code of benchmarks/attention.py. Theoretical growth is drawn through the longest context. (The
    paper counts the choice as a part of selection, and expects compression to be linear.) On a CPU it is nsa_torch that
    is timed.
    """
    sys.path.append(str(Path(__file__).resolve().parents[1] / "benchmarks"))
    # Here, because these put the package of this checkout in place of an installed one.
    from attention import branch_calls
    from common import DTYPES, environment, measure

    model, _ = load_model(args)
    config, attention = model.config.text_config, model.model.language_model.layers[0].self_attn
    dtype = DTYPES[args.dtype] if args.dtype else model.dtype
    sizes = SimpleNamespace(**{name: getattr(config, name) for name in SIZES})
    dim, rows = attention.head_dim, []
    attention = attention.to(dtype)
    timed = functools.partial(measure, device=model.device, seconds=args.seconds, least=3)
    torch.manual_seed(0)
    for tokens in tqdm(args.lengths, disable=None):
        new = functools.partial(torch.randn, dtype=dtype, device=model.device)
        q = new(tokens, config.num_attention_heads, dim)
        k, v = (new(tokens, config.num_key_value_heads, dim) for _ in range(2))
        hidden, g = new(tokens, config.hidden_size), new(tokens, config.num_attention_heads, len(BRANCHES)).sigmoid()
        cu_seqlens = torch.tensor([0, tokens], dtype=torch.int32, device=model.device)
        nsa = branch_functions(model.model.language_model.layers[0].self_attn, q)
        with torch.no_grad():
            _, lse = nsa.compressed_attention(q, k, v, cu_seqlens, block_size=sizes.block_size)
            blocks = nsa.select_blocks(
                q, k, lse, cu_seqlens, block_size=sizes.block_size, block_count=sizes.block_count
            )
            calls = branch_calls(nsa, q, k, v, g, lse, blocks, cu_seqlens, sizes)
            parts = {
                "pooling": (lambda k, v: [block_means(x, sizes.block_size) for x in (k, v)], (k, v)),
                "compression": calls["compressed"],
                "choice": calls["select"],
                "selection": calls["selected"],
                "window": calls["window"],
                "gates": (attention.gates, (hidden,)),
                "whole": calls["whole"],
            }
            for part, (call, tensors) in parts.items():
                rows.append({"part": part, "tokens": tokens, **timed(functools.partial(call, *tensors))})
    return {
        "rows": rows,
        "growth": {"pooling": 1, "compression": 2, "choice": 2, "selection": 1, "window": 1, "gates": 1, "whole": 2},
        "kernel": nsa.__name__.split("_")[-1],
        "shape": {"heads": config.num_attention_heads, "kv_heads": config.num_key_value_heads, "head_dim": dim},
        "dtype": str(dtype).removeprefix("torch."),
        "environment": {name: x for name, x in environment(model.device, None).items() if x is not None},
    }


def sinks(args) -> dict:
    """Finding 6, attention sinks (paper: section 4, figures 7 to 9, 27; the definition is Pai et al.'s, "Sparsity is
    cool", 2025, which the paper follows).

    A key is a sink of a head where 1[α > 0.1 and ‖v‖ < median(‖v‖) - 2·IQR(‖v‖)]: α is the mean probability that it
    receives from the queries that see it in the branch, ‖v‖ the norm of its value, median and interquartile range over
    the keys of the same layer and KV head. `attention_only` drops the condition on values (α > 0.1; Gu et al. 2024,
    arXiv 2410.10781, count sinks so, of the first token at 0.3).
    Keys of `compression` are pooled blocks. `gated` is the mixture that reaches the output, Σ_c g_c p_c / Σ_c g_c per
    query, where the probability of a block is spread evenly over its tokens; all queries at or after a token count.
    `dense` is the same checkpoint with nsa_variant="dense" (or --twin), among its vision tokens.
    Given are shares over layers, positions, key and value norms, and shares by block and window size. Attention
    received is summed up chunk by chunk of queries: no [L, L] matrix is made.
    """
    model, processor, samples = open_model_and_data(args)
    prompts = list(prompts_of(processor, samples, args.limit))
    result = {"definition": {"attention": SINK_ATTENTION, "value_norm": "median - 2 IQR"}, "clips": len(prompts)}
    result["branches"] = sparse_sinks(model, prompts, (*BRANCHES, "gated"))
    dense = load(args.twin, args.device, nsa_variant="dense")[0] if args.twin else model
    tally = SinkTally(dense.config.text_config.num_hidden_layers)
    with configured(dense, nsa_variant="dense"):
        for inputs in tqdm(prompts, disable=None):
            watch_dense(dense, inputs, lambda *seen: tally.add(*dense_received(dense, *seen)))
    result["branches"]["dense"] = tally.read()
    result["dense_model"] = "twin" if args.twin else "same weights"
    result["by_setting"] = []
    size, count, window = (getattr(model.config, name) for name in SIZES)
    sizes = [{"block_size": s, "block_count": max(3, count * size // s)} for s in args.block_sizes or (size, 2 * size)]
    windows = [{"window_size": w} for w in args.windows or (window // 2, window, 2 * window, 4 * window)]
    for fields, names in [*((f, BRANCHES[:2]) for f in sizes), *((f, BRANCHES[2:]) for f in windows)]:
        with configured(model, **fields):
            found = sparse_sinks(model, prompts, names)
        result["by_setting"] += [{"branch": name, **fields, **values} for name, values in found.items()]
    return result


def needles(args) -> dict:
    """Needle map (paper: LongVA's, arXiv 2406.16852, which calls it V-NIAH; VideoNSA's has none): how does accuracy
    depend on the number of frames, and on where among them the needle is?

    In each clip one shape flashes up, at one of --depths: if f of F frames show it, then from frame
    round(depth · (F - f)) on. Each length and depth gets --clips clips. Questions about what flashed up (colour, shape,
    where) are counted apart from those about when, which need attention between vision tokens most. A clip is read once
    for its questions, by `VideoChat`. Answers must be exact: fine-tune a model on such clips first.
    """
    model, processor = load_model(args)
    samples, _ = load_samples([str(make_needle_clips(args))], processor)
    samples.sort(key=lambda sample: sample.tokens)
    chat, found = VideoChat(model, processor), defaultdict(list)
    with prefill_progress(model):
        for sample in tqdm(samples, unit="clip", disable=None):
            talk = chat.open(media_parts(sample.messages)[0]["video"])
            right, start = defaultdict(list), time.perf_counter()
            for question in list_questions(sample):
                text = question.messages[-1]["content"][-1]["text"]
                answer = talk.ask(text, max_new_tokens=args.max_new_tokens, save=False)
                right["when" if question.type == "when" else "what"].append(is_correct(answer, question.expected))
            (video,) = talk.videos
            cell = 2 * len(video.seconds), sample.record["depth"], video.tokens
            found[cell].append((right, time.perf_counter() - start))
    cells = []
    for (frames, depth, tokens), clips in sorted(found.items()):
        cell = {"frames": frames, "depth": depth, "vision_tokens": tokens, "seconds": mean(took for _, took in clips)}
        for part in ("what", "when"):
            counted = [correct for right, _ in clips for correct in right[part]]
            cell[part] = {"accuracy": mean(counted), "questions": len(counted)}
        cells.append(cell)
    return {"cells": cells}


def looked_at(args) -> dict:
    """What the model looked at for one answer: the blocks that vision tokens chose (paper: equation 3), and what the
    answer's tokens attended to.

    `chosen`: for each block, the share of the queries that chose it of those that could have left it out (they have
    more blocks behind them than they may take, and it is neither the first, their own nor the one before, which all
    take anyway), the mean over the layers of a group (early, middle, late) and KV heads. Vision tokens precede the
    question and do not see it, and nothing after the last frames can choose them. `attended`: the probability that the
    vision tokens receive from the text tokens which predict the answer, the mean over these, heads and layers; text
    attends densely. Writes a contact sheet of the frames that score highest, with times, and an mp4 that shows both.
    """
    model, processor = load_model(args)
    with tempfile.TemporaryDirectory() as folder:
        video, question = args.video, args.question or "What happens in this video?"
        if video is None:
            data = make_clips(Path(folder) / "clips", 1, (16.0,), args.seed)
            (sample,), _ = load_samples([str(data)], processor, roots=[])
            asked = next(q for q in list_questions(sample) if q.type == "when")
            video, question = asked.messages[-1]["content"][0]["video"], asked.messages[-1]["content"][-1]["text"]
        wanted = {"fps": args.fps, "max_tokens": args.max_tokens}
        inputs, metadata = read(processor, video, question, **{k: v for k, v in wanted.items() if v is not None})
    pixels, grid = inputs["pixel_values_videos"], inputs["video_grid_thw"][0].tolist()
    frames = np.stack([patch_frame(processor.video_processor, pixels, grid, i) for i in range(grid[0])])
    inputs = inputs.to(model.device)
    with prefill_progress(model):
        output = model.generate(**inputs, max_new_tokens=args.max_new_tokens, do_sample=False)
    new = output[0, inputs["input_ids"].shape[1] :]
    layers = model.config.text_config.num_hidden_layers
    groups = dict(zip(("early", "middle", "late"), np.array_split(np.arange(layers), min(3, layers)), strict=False))
    t, h, w = (inputs["video_grid_thw"][0] // torch.tensor([1, 2, 2], device=model.device)).tolist()
    chosen, attended = torch.zeros(layers, t * h * w), torch.zeros(t * h * w)

    def see(seen):
        counts = count_choices(seen.chosen_blocks(), seen.sizes["block_size"], seen.sizes["block_count"])
        rates = (counts[:, 0] / counts[:, 1]).nan_to_num()  # [blocks], 0 where no query had a choice
        chosen[seen.layer] = rates.repeat_interleave(seen.sizes["block_size"])[: t * h * w].cpu()
        attended.add_(seen.text_attention(len(new)).mean(0).cpu() / layers)

    watch(model, continued(inputs, new[:-1]), see)
    scores = {name: chosen[torch.as_tensor(group)].mean(0).view(t, h, w) for name, group in groups.items()}
    scores["answer"] = attended.view(t, h, w)
    seconds = metadata.plan.times[::2]
    result = {
        "video": str(args.video or "a clip made on the spot"),
        "question": question,
        "answer": processor.tokenizer.decode(new, skip_special_tokens=True),
        "plan": str(metadata.plan),
        "grid": [t, h, w],
        "layers": {name: group.tolist() for name, group in groups.items()},
        "seconds": [round(float(x), 3) for x in seconds],
        "frames": {name: x.mean((1, 2)).tolist() for name, x in scores.items()},
        "share_of_answer_on_video": round(float(attended.sum()), 4),
    }
    figures.contact_sheet(result, frames, args.output / SHEET)
    figures.highlight_video(
        frames, {"chosen": chosen.mean(0).view(t, h, w), "attended": scores["answer"]}, seconds,
        metadata.plan.fps / 2, args.output / HIGHLIGHTS,
    )  # fmt: skip
    return result


# ----------------------------------------------------------------------------------------------------------------------
# Models, clips and questions
# ----------------------------------------------------------------------------------------------------------------------


def load_model(args):
    """(model, processor) of args.model, or the tiny trained one."""
    if args.model is None:
        args.model = TINY
    model, processor = load(args.model, args.device, **given_fields(args))
    variant = model.config.nsa_variant
    if (variant == "dense" and args.finding != "needles") or (variant != "paper" and args.finding in OBSERVED):
        needed = "'paper'" if args.finding in OBSERVED else "sparse attention"
        raise ValueError(f"model {args.model} has nsa_variant={variant!r}; {args.finding} needs {needed}")
    return model, processor


def open_model_and_data(args):
    """(model, processor, [[Question]]), short prompts first."""
    model, processor = load_model(args)
    data = args.data or str(make_clips(args.scratch / "clips", args.clips, tuple(args.clip_seconds), args.seed))
    samples, drops = load_samples([data], processor, roots=[args.media_root] if args.media_root else [])
    samples.sort(key=lambda sample: sample.tokens)
    samples = [asked for sample in samples if (asked := list_questions(sample))]
    if not samples:
        raise ValueError(f"data {data} has no question that can be asked; {len(drops)} samples were dropped")
    return model, processor, samples


def make_clips(folder: Path, count: int, seconds, seed: int) -> Path:
    settings = Settings(seconds=seconds, questions=QUESTIONS)
    return make_dataset(folder, {"test": count}, settings, seed=seed, workers=1) / "test.jsonl"


def make_needle_clips(args) -> Path:
    """A data set of clips of each length with the needle at each depth; its records have `depth`."""
    folder, records = args.scratch / "clips", []
    folder.mkdir()
    for i, (seconds, depth, _) in enumerate(itertools.product(args.clip_seconds, args.depths, range(args.clips))):
        settings = Settings(seconds=(seconds,), depth=depth, size=args.size, questions=QUESTIONS)
        records.append({**messages(make_clip((folder, settings, (args.seed, UNSEEN, i), f"{i:06}"))), "depth": depth})
    path = folder / "test.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def ask(model, processor, samples, args, **video) -> list[dict]:
    """Entries of `evaluate.answer_all`; `video` are settings of the processor for each video."""

    def with_settings(question: Question) -> Question:
        messages = [
            {**message, "content": [{**p, **video} if p["type"] == "video" else p for p in message["content"]]}
            for message in question.messages
        ]
        return replace(question, messages=messages)

    samples = [[with_settings(question) for question in sample] for sample in samples] if video else samples
    options = {"batch_size": args.batch_size, "max_new_tokens": args.max_new_tokens, "workers": args.workers}
    with prefill_progress(model):
        return [entry for entry in answer_all(model, processor, samples, **options) if not isinstance(entry, Drop)]


def prompts_of(processor, samples, limit: int) -> Iterator[dict]:
    """Inputs [1, ...] of the first question of up to `limit` samples that have videos or images, evenly chosen."""
    count = min(limit, len(samples))
    every = Prompts([sample[:1] for sample in samples], processor)
    for prompts in (every[i * len(samples) // count] for i in range(count)):
        if isinstance(prompts, Drop):
            continue
        inputs = {name: x[None] if name == "input_ids" else x for name, x in prompts[0][1].items()}
        ids = inputs["input_ids"]
        types = sum(kind * (ids == getattr(processor, f"{name}_token_id")) for kind, name in KINDS.items()).int()
        if types.any():
            yield {**inputs, "mm_token_type_ids": types}


def continued(inputs, new: torch.Tensor) -> dict:
    """The inputs of a prompt with further text tokens [n] after it."""
    more = dict(inputs)
    more["input_ids"] = torch.cat([inputs["input_ids"], new[None]], 1)
    for name, fill in (("attention_mask", 1), ("mm_token_type_ids", 0)):
        if name in inputs:
            more[name] = torch.nn.functional.pad(inputs[name], (0, len(new)), value=fill)
    return more


def sparse_sinks(model, prompts, names) -> dict[str, dict]:
    tallies = {name: SinkTally(model.config.text_config.num_hidden_layers) for name in names}

    def see(seen):
        for name, *found in received_by_branch(seen, names):
            tallies[name].add(seen.layer, *found)

    for inputs in tqdm(prompts, disable=None):
        watch(model, inputs, see)
    return {name: tally.read() for name, tally in tallies.items()}


def summary(entries: list[dict]) -> dict:
    table = accuracy(entries) if entries else {"all": {"all": {"accuracy": None, "questions": 0}}}
    kinds = {kind: row["all"]["accuracy"] for kind, row in table.items() if kind != "all"}
    tokens = {"tokens": mean(entry["tokens"] for entry in entries)}
    return {**table["all"]["all"], "types": kinds} | tokens | times(entries)


def times(entries: list[dict]) -> dict:
    """Seconds per question to generate the answer, without decoding of the video."""
    return {"seconds": mean(entry["seconds"] for entry in entries)}


def mean(values) -> float | None:
    values = list(values)
    return round(sum(values) / len(values), 6) if values else None


def percent_change(value: float, base: float) -> float | None:
    return round(100 * (value / base - 1), 2) if base else None


# ----------------------------------------------------------------------------------------------------------------------
# Command line
# ----------------------------------------------------------------------------------------------------------------------

FINDINGS = {
    "transfer": transfer,
    "scaling": scaling,
    "budget": budget,
    "gates": gates,
    "latency": latency,
    "sinks": sinks,
    "needles": needles,
    "looked-at": looked_at,
}


def parse_length(text: str) -> int:
    return int(text[:-1]) * 1024 if text[-1] in "kK" else int(text)


def make_parser() -> argparse.ArgumentParser:
    parser = OptionParser(description=__doc__)
    commands = parser.add_subparsers(dest="finding", metavar="FINDING", required=True)
    cuda = torch.cuda.is_available()
    for name, function in FINDINGS.items():
        about = inspect.getdoc(function)
        command = commands.add_parser(name, help=about.split(":")[0].split("(")[0], description=about)
        add = command.add_argument
        add("model", nargs="?", help="folder or Hub id of a VideoNSA repository (default: the tiny trained one)")
        if name not in ("latency", "looked-at", "needles"):
            add("data", nargs="?", help="questions as for evaluate.py (default: clips made on the spot)")
            add("--media_root", help="folder that media paths are relative to (default: that of DATA)")
            add("--batch_size", type=int, default=1, help="questions that are answered at a time")
            add("--workers", type=int, default=0, help="processes that decode videos")
        if name not in ("latency", "looked-at"):
            each = ", for each length and depth" if name == "needles" else ""
            add("--clips", type=int, default=4 if each else 16, help=f"number of clips made on the spot{each}")
            add("--clip_seconds", type=float, nargs="+", default=CLIP_SECONDS[name], help="their lengths in seconds")
        if name != "latency":
            add("--max_new_tokens", type=int, default=32, help="most tokens of an answer")
            add("--seed", type=int, default=0, help="seed of the clips made on the spot")
        if name in ("transfer", "sinks"):
            add("--twin", help="a model trained with dense attention")
        if name in ("gates", "sinks"):
            add("--limit", type=int, default=16, help="clips whose layers are observed")
        if name == "scaling":
            add("--frames", type=int, nargs="+", default=[8, 16, 32, 64], help="frames of a video")
            add("--frame_tokens", type=int, nargs="+", default=[4, 9, 16], help="tokens of two frames")
        if name == "budget":
            add("--budgets", type=float, nargs="+", default=[0.5, 1, 2], help="multiples of the trained budget")
            shares = [0.03, 0.12, 0.25, 0.5]
            add("--window_shares", type=float, nargs="+", default=shares, help="shares that the window gets")
        if name == "latency":
            lengths = [2**i for i in range(10, 18 if cuda else 15)]
            add(
                "--lengths",
                type=parse_length,
                nargs="+",
                default=lengths,
                help="tokens (default: 1K ... 128K; CPU: 16K)",
            )
            add("--dtype", choices=("bf16", "fp16", "fp32"), help="dtype (default: the model's)")
            add("--seconds", type=float, default=0.2, help="seconds spent on each figure")
        if name == "sinks":
            add(
                "--block_sizes",
                type=int,
                nargs="+",
                help="block sizes, at the same block_size · block_count (default: 1 and 2 times the trained one)",
            )
            add("--windows", type=int, nargs="+", help="window sizes (default: half to 4 times the trained one)")
        if name == "needles":
            add_fields(command, "nsa_variant")
            add("--depths", type=float, nargs="+", default=DEPTHS, help="places of the needle: 0 the start, 1 the end")
            add("--size", type=int, default=Settings.size, help="width and height of the clips in pixels")
        if name == "looked-at":
            add("--video", help="file or URL (default: a clip made on the spot)")
            add("--question", help="what to ask (default: when something happens in that clip)")
            add("--fps", type=float, help="frames per second to read (default: up to 4, within --max_tokens)")
            add("--max_tokens", type=int, help="most tokens of video and text together (default: 131072)")
        add("--output", type=Path, default=Path("findings"), help="folder to write to")
        add_fields(command, "nsa_backend")
        add_device(command)
    return parser


def run(args) -> tuple[dict, list[Path]]:
    """Measure, write FINDING.json and draw it; what was found, and the files written."""
    args.output.mkdir(parents=True, exist_ok=True)
    given = {name: str(x) if isinstance(x, Path) else x for name, x in vars(args).items()}
    given["model"] = given["model"] or "tiny"
    with tempfile.TemporaryDirectory() as folder:
        args.scratch = Path(folder)
        start = time.perf_counter()
        found = FINDINGS[args.finding](args)
        took = time.perf_counter() - start
    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    device = torch.cuda.get_device_name() if args.device.startswith("cuda") else args.device
    del given["output"]
    about = {"finding": args.finding, "settings": given, "versions": versions, "device": device}
    result = {**about, "took_seconds": took, **found}
    path = args.output / f"{args.finding}.json"
    path.write_text(json.dumps(rounded(result), ensure_ascii=False) + "\n")
    if args.finding == "looked-at":
        return result, [path, *(args.output / name for name in (SHEET, HIGHLIGHTS))]
    return result, [path, figures.draw(result, args.output)]


def rounded(x):
    """The same with floats of five significant digits."""
    if isinstance(x, dict):
        return {str(key): rounded(value) for key, value in x.items()}
    if isinstance(x, list | tuple):
        return [rounded(value) for value in x]
    return float(f"{x:.5g}") if isinstance(x, float) else x


@door
def main() -> None:
    args = make_parser().parse_args()
    result, files = run(args)
    print("\n".join(summarize(result)))
    for file in files:
        print(f"wrote {file}")


if __name__ == "__main__":
    main()

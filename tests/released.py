"""The arithmetic that the public VideoNSA checkpoint was trained with, step by step and as slow as that is.

That code is Espere-1119-Song/VideoNSA at 377eeb9 (`Qwen2_5_VLMixNSA`); this file was written from a list of what it
does, independently of the package, whose `nsa_variant="released"` must equal it: plain PyTorch, one sample, every head
and every mask materialised, fp64 or fp32. Also a tiny checkpoint in the layout of the public one.

S is the block size, H the query heads, G the KV heads, D the head dimension. Tokens are counted from the first one in
the sequence, text or vision. `past` tokens are cached: keys, values and positions cover past + new tokens, queries and
gates only the new ones.
"""

import json
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import load_file, save_file
from transformers import Qwen2_5_VLForConditionalGeneration

GROUP = 16  # padded query heads per KV head
NEW_VISION_KEYS = ("dtype", "in_channels", "initializer_range", "model_type", "rope_parameters")  # not in 4.x files


class Trace(NamedTuple):
    """What `released_trace` computes on its way; branches are before their gates, halves of padded heads summed up."""

    out: torch.Tensor  # [new, H, D]
    compression: torch.Tensor  # [new, H, D]
    selection: torch.Tensor  # [new, H, D]
    window: torch.Tensor  # [new, H, D]
    dense: torch.Tensor  # [new, H, D]
    gates: torch.Tensor  # [new, H, 3], in the order of the branches above
    vision: torch.Tensor  # [new] bool
    lse: torch.Tensor  # [16·G, new], of the compression branch, before it is misread
    importance: torch.Tensor  # [G, new, blocks], -inf for blocks that are not candidates
    kept: torch.Tensor  # [G, new, blocks] bool
    gap: torch.Tensor  # [new, H], see `selection_gap`


def released_attention(q, k, v, gate_logits, position_ids, **options) -> torch.Tensor:
    """The attention of one layer, [new, H, D]: `released_trace(...).out`."""
    return released_trace(q, k, v, gate_logits, position_ids, **options).out


def released_trace(
    q,
    k,
    v,
    gate_logits,
    position_ids,
    *,
    past: int = 0,
    block_size: int = 64,
    block_count: int = 32,
    window_size: int = 256,
    gate_temperature: float = 0.3,
    block_causal: bool = False,
    fast_paths: bool = True,
    work_dtype: torch.dtype | None = None,
    rank=None,
) -> Trace:
    """The attention of one layer with all that leads to it.

    Args:
        q: [new, H, D] after the rotary embedding, text and vision tokens alike; so are
        k, v: [past + new, G, D].
        gate_logits: [new, H, 3] for compression, selection and window, before they are divided.
        position_ids: integers [3, past + new], temporal, height and width.
        past: cached tokens. The new ones then are the last rows of the same arithmetic over all tokens, and "later"
            blocks are those that exist so far. The log-sum-exps that are misread are those of the new rows, [heads,
            new] read as [new, heads]: those of cached rows cannot be known from the new queries. All this is a rule of
            ours for chunks with vision tokens; of the public code none is known.
        block_causal: an intermediate commit's compression mask, j <= t // S, in place of t <= (j + 1)·S - 1.
        fast_paths: as in evaluation: one term only where the new tokens are all text, or all tokens so far are vision.
            (The public code looks at the new tokens in the second case, too, but knows no chunks: they would lose the
            dense term that they have in one pass.)
        work_dtype: what q·scale and the pooled keys are rounded to before the importance is computed.
        rank: of the importance [G, new, blocks], -inf where a block is no candidate: gives block indices, best first;
            default: equal ones from the lowest index on.
    """
    new, heads, dim = q.shape
    total, kv_heads, _ = k.shape
    padded = GROUP * kv_heads
    assert new + past == total and v.shape == k.shape and position_ids.shape == (3, total)
    assert heads % kv_heads == 0 and 2 * heads <= padded
    scale = dim**-0.5
    t = torch.arange(past, total)[:, None]  # [new, 1]
    key = torch.arange(total)[None, :]  # [1, total]

    # Text is where the three positions are equal; there q, k and v are zero for the sparse term.
    vision = vision_mask(position_ids)
    vision_rows = vision[past:]
    sparse_q = q * vision_rows[:, None, None]
    sparse_k = k * vision[:, None, None]
    sparse_v = v * vision[:, None, None]
    heads_q = torch.cat([sparse_q, sparse_q, q.new_zeros(new, padded - 2 * heads, dim)], dim=1)  # [new, 16·G, D]

    # Blocks are counted from the first token; the mean of the last one is over the tokens it has.
    spans = [(start, min(start + block_size, total)) for start in range(0, total, block_size)]
    pooled_k = torch.stack([sparse_k[start:end].sum(0) / (end - start) for start, end in spans])  # [blocks, G, D]
    pooled_v = torch.stack([sparse_v[start:end].sum(0) / (end - start) for start, end in spans])
    block = torch.arange(len(spans))[None, :]  # [1, blocks]

    # Compression: the own block and all later ones.
    visible = block <= t // block_size if block_causal else t <= (block + 1) * block_size - 1
    visible = visible.expand(padded, new, len(spans))
    logits = torch.stack([heads_q[:, p] @ pooled_k[:, p // GROUP].T * scale for p in range(padded)])
    logits = logits.masked_fill(~visible, -torch.inf)  # [16·G, new, blocks]
    lse = logits.logsumexp(-1)  # [16·G, new]
    compression = [logits[p].softmax(-1) @ pooled_v[:, p // GROUP] for p in range(padded)]

    # Importance: the normaliser is read from the wrong places, the own block counts 1 per head.
    misread = lse.reshape(-1).view(new, padded)
    candidate = block <= t // block_size  # [new, blocks]
    own = block == t // block_size
    importance = q.new_zeros(kv_heads, new, len(spans))
    for p in range(padded):
        scaled_q = rounded(heads_q[:, p] * scale, work_dtype)
        share = (scaled_q @ rounded(pooled_k[:, p // GROUP], work_dtype).T - misread[:, p, None]).exp()
        importance[p // GROUP] += torch.where(own, 1.0, share)
    importance = importance.masked_fill(~candidate, -torch.inf)
    ranked = (rank or lowest_first)(importance)
    kept = torch.zeros_like(importance, dtype=torch.bool)
    kept.scatter_(-1, ranked[..., :block_count], True)
    kept &= candidate

    # Selection and window, over zeroed text keys too.
    selection, window = [], []
    in_window = (key <= t) & (key > t - window_size)
    for p in range(padded):
        group = p // GROUP
        in_kept = kept[group][:, (key // block_size)[0]] & (key <= t)
        for outputs, mask in ((selection, in_kept), (window, in_window)):
            outputs.append(attend(heads_q[:, p], sparse_k[:, group], sparse_v[:, group], mask, scale))

    # Half of the real heads, half of their copies; the zero heads are dropped.
    branches = [torch.stack(outputs, dim=1) for outputs in (compression, selection, window)]
    branches = [0.5 * (branch[:, :heads] + branch[:, heads : 2 * heads]) for branch in branches]
    gates = (gate_logits / gate_temperature * vision_rows[:, None, None]).sigmoid()  # 0.5 for text
    sparse = sum(gates[..., b, None] * branch for b, branch in enumerate(branches))

    # The dense term: q is zero for vision, k and v are whole, heads have their own KV head.
    text_q = q * ~vision_rows[:, None, None]
    ratio = heads // kv_heads
    dense = [attend(text_q[:, h], k[:, h // ratio], v[:, h // ratio], key <= t, scale) for h in range(heads)]
    dense = torch.stack(dense, dim=1)

    out = sparse + dense
    if fast_paths and not vision_rows.any():
        out = dense
    elif fast_paths and vision.all():
        out = sparse
    gap = selection_gap(importance, heads, block_count)
    return Trace(out, *branches, dense, gates, vision_rows, lse, importance, kept, gap)


def lowest_first(importance) -> torch.Tensor:
    return importance.sort(dim=-1, descending=True, stable=True).indices


def vision_mask(position_ids) -> torch.Tensor:
    """Which tokens count as vision, bool [tokens]: those whose three positions [3, tokens] are not all equal."""
    return torch.tensor([not (temporal == height == width) for temporal, height, width in position_ids.T.tolist()])


def rounded(x, dtype) -> torch.Tensor:
    return x if dtype is None else x.to(dtype).to(x.dtype)


def attend(q, k, v, mask, scale) -> torch.Tensor:
    """Attention of one head: q [rows, D], k and v [keys, D], mask [rows, keys]."""
    return (q @ k.T * scale).masked_fill(~mask, -torch.inf).softmax(-1) @ v


def selection_gap(importance, heads, block_count) -> torch.Tensor:
    """How clear the choice of blocks was, [new, H]: the distance of the least important block kept from the most
    important one left, over the former; the smaller of the two groups that a head is in. 0 is an exact tie, which this
    reference gives to the lower index; infinity means that all candidates were kept."""
    best = importance.sort(-1, descending=True).values
    gap = torch.full_like(best[..., 0], torch.inf)
    if best.shape[-1] > block_count:
        last, first_left = best[..., block_count - 1], best[..., block_count]
        gap = torch.where(first_left.isinf(), gap, (last - first_left) / last)
    h = torch.arange(heads)
    return torch.minimum(gap[h // GROUP], gap[(heads + h) // GROUP]).T


def released_positions(
    input_ids, config, *, image_grid_thw=None, video_grid_thw=None, second_per_grid_ts=None, truncate: bool = True
) -> torch.Tensor:
    """Rotary positions [3, tokens] of one prompt, input_ids [tokens] or [1, tokens].

    Each stretch of text, image or video starts at the largest position so far plus one. A patch of a video lies at its
    index × seconds per grid × `tokens_per_second`, and as the public code turns the seconds into an integer first
    (`truncate`), frames that are less than a second apart share one position. Without seconds a grid lasts one.
    """
    merge, rate = config.vision_config.spatial_merge_size, config.vision_config.tokens_per_second
    images = [] if image_grid_thw is None else image_grid_thw.tolist()
    videos = [] if video_grid_thw is None else video_grid_thw.tolist()
    seconds = [1.0] * len(videos) if second_per_grid_ts is None else [float(value) for value in second_per_grid_ts]
    images, videos, seconds = iter(images), iter(videos), iter(seconds)
    ids, positions, start = input_ids.reshape(-1).tolist(), [], 0
    while len(positions) < len(ids):
        token = ids[len(positions)]
        if token == config.image_token_id:
            (frames, rows, columns), interval = next(images), 0.0
        elif token == config.video_token_id:
            (frames, rows, columns), interval = next(videos), next(seconds)
        else:
            positions.append((start, start, start))
            start += 1
            continue
        if truncate:
            interval = int(interval)
        for frame in range(frames):
            for row in range(rows // merge):
                for column in range(columns // merge):
                    positions.append((start + int(frame * interval * rate), start + row, start + column))
        start = max(max(position) for position in positions) + 1
    return torch.tensor(positions).T


def load_released(folder: str | Path, dtype: torch.dtype = torch.float64):
    """A checkpoint folder in the public layout as (stock model, gates, options of `released_attention`).

    The stock class reads everything but the gates, {layer: (weight 1, bias 1, weight 2, bias 2)}.
    """
    folder = Path(folder)
    model = Qwen2_5_VLForConditionalGeneration.from_pretrained(folder, dtype=dtype).eval()
    names = ("g_proj_1.weight", "g_proj_1.bias", "g_proj_2.weight", "g_proj_2.bias")
    weights = {key: value for file in folder.glob("*.safetensors") for key, value in load_file(file).items()}
    gates = {
        layer: tuple(weights[f"model.layers.{layer}.self_attn.{name}"].to(dtype) for name in names)
        for layer in range(model.config.text_config.num_hidden_layers)
    }
    config = json.loads((folder / "config.json").read_text())
    renamed = {"block_counts": "block_count", "window_size": "window_size"}
    return model, gates, {new: config[old] for old, new in renamed.items() if old in config}


@torch.no_grad()
def released_logits(model, gates, inputs, position_ids=None, *, attention=released_attention, **options):
    """Logits [tokens, vocabulary] of one prompt, computed as one chunk.

    Args:
        model: stock Qwen2.5-VL in fp64 or fp32: its embeddings, vision tower and weights are used.
        gates: {layer: (weight 1, bias 1, weight 2, bias 2)}.
        inputs: what the stock processor gives, batch of one: `input_ids`, pixels, grids, `second_per_grid_ts`.
        position_ids: [3, tokens]; default: `released_positions`.
        attention: with the signature of `released_attention`.
        **options: of `attention`.
    """
    position_ids = positions_of(model, inputs) if position_ids is None else position_ids
    return decode(model, gates, embed(model, inputs), position_ids, [], attention, options)


@torch.no_grad()
def released_greedy(
    model, gates, inputs, max_new_tokens: int, position_ids=None, *, attention=released_attention, **options
) -> list[int]:
    """The tokens that follow a prompt, at most `max_new_tokens` or up to the first end-of-sequence token.

    The prompt is one chunk; each further token is a chunk of text of its own, at the largest position so far plus one,
    over the stored keys and values. Tokens that the generation configuration suppresses are not chosen.
    """
    position_ids = positions_of(model, inputs) if position_ids is None else position_ids
    settings = model.generation_config
    ends = settings.eos_token_id if isinstance(settings.eos_token_id, list) else [settings.eos_token_id]
    hidden, cache, tokens = embed(model, inputs), [], []
    while True:
        logits = decode(model, gates, hidden, position_ids, cache, attention, options)[-1]
        logits[settings.suppress_tokens or []] = -torch.inf
        tokens.append(logits.argmax().item())
        if len(tokens) == max_new_tokens or tokens[-1] in ends:
            return tokens
        hidden = model.get_input_embeddings()(torch.tensor(tokens[-1:]))
        following = position_ids.max() + 1
        position_ids = torch.cat([position_ids, following.expand(3, 1)], dim=1)


def make_prompt(model, *parts, seed=0):
    """Inputs of a prompt of texts (numbers of tokens) and ("image" | "video", grid[, seconds per grid])."""
    generator = torch.Generator().manual_seed(seed)
    config, ids, inputs = model.config, [], {}
    for part in parts:
        if isinstance(part, int):
            ids += torch.randint(0, 250, (part,), generator=generator).tolist()
            continue
        kind, grid, *seconds = part
        cells = grid[0] * grid[1] * grid[2]
        ids += [getattr(config, f"{kind}_token_id")] * (cells // 4)
        pixels = "pixel_values" if kind == "image" else "pixel_values_videos"
        inputs.setdefault(pixels, []).append(torch.randn(cells, 1176, dtype=torch.float64, generator=generator))
        inputs.setdefault(f"{kind}_grid_thw", []).append(torch.tensor(grid)[None])
        if seconds:
            inputs.setdefault("second_per_grid_ts", []).append(torch.tensor(seconds))
    return {"input_ids": torch.tensor([ids])} | {name: torch.cat(values) for name, values in inputs.items()}


def positions_of(model, inputs) -> torch.Tensor:
    names = ("image_grid_thw", "video_grid_thw", "second_per_grid_ts")
    return released_positions(inputs["input_ids"], model.config, **{name: inputs.get(name) for name in names})


def embed(model, inputs) -> torch.Tensor:
    """Embeddings of a prompt, [tokens, hidden], with the vision tower's features in place of the placeholders."""
    ids = inputs["input_ids"][0]
    hidden = model.get_input_embeddings()(ids)
    if inputs.get("pixel_values") is not None:
        features = model.model.get_image_features(inputs["pixel_values"], inputs["image_grid_thw"]).pooler_output
        hidden[ids == model.config.image_token_id] = torch.cat(features)
    if inputs.get("pixel_values_videos") is not None:
        features = model.model.get_video_features(inputs["pixel_values_videos"], inputs["video_grid_thw"]).pooler_output
        hidden[ids == model.config.video_token_id] = torch.cat(features)
    return hidden


def decode(model, gates, hidden, position_ids, cache, attention, options) -> torch.Tensor:
    """Logits [new, vocabulary] of new tokens, hidden [new, hidden size], after those in the cache.

    position_ids [3, past + new]. cache: empty at first; then per layer the keys and values of all tokens, kept up here.
    """
    text = model.config.text_config
    new, past = len(hidden), position_ids.shape[1] - len(hidden)
    cos, sin = rotary(position_ids[:, past:], text, hidden.dtype)
    for index, layer in enumerate(model.model.language_model.layers):
        projections = layer.self_attn
        x = rms_norm(hidden, layer.input_layernorm)
        q = rotate(projections.q_proj(x).view(new, text.num_attention_heads, -1), cos, sin)
        k = rotate(projections.k_proj(x).view(new, text.num_key_value_heads, -1), cos, sin)
        v = projections.v_proj(x).view(new, text.num_key_value_heads, -1)
        if index < len(cache):
            k, v = torch.cat([cache[index][0], k]), torch.cat([cache[index][1], v])
            cache[index] = (k, v)
        else:
            cache.append((k, v))
        weight_1, bias_1, weight_2, bias_2 = gates[index]
        middle = x @ weight_1.T + bias_1
        middle = middle * 0.5 * (1 + torch.erf(middle / 2**0.5))
        gate_logits = (middle @ weight_2.T + bias_2).view(new, text.num_attention_heads, 3)
        out = attention(q, k, v, gate_logits, position_ids, past=past, **options)
        hidden = hidden + projections.o_proj(out.reshape(new, -1))
        hidden = hidden + layer.mlp(rms_norm(hidden, layer.post_attention_layernorm))
    return model.lm_head(rms_norm(hidden, model.model.language_model.norm))


def rms_norm(x, norm) -> torch.Tensor:
    return x * (x.pow(2).mean(-1, keepdim=True) + norm.variance_epsilon).rsqrt() * norm.weight


def rotary(position_ids, text_config, dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosine and sine, [tokens, 1, D]; the angles are fp32, as in the stock model."""
    dim = text_config.hidden_size // text_config.num_attention_heads
    settings = text_config.rope_parameters
    frequencies = 1.0 / settings["rope_theta"] ** (torch.arange(0, dim, 2, dtype=torch.float32) / dim)
    axes = [axis for axis, size in enumerate(settings["mrope_section"]) for _ in range(size)]  # of each frequency
    angles = torch.stack([position_ids[axis].float() * frequencies[i] for i, axis in enumerate(axes)], dim=-1)
    angles = torch.cat([angles, angles], dim=-1)[:, None]
    return angles.cos().to(dtype), angles.sin().to(dtype)


def rotate(x, cos, sin) -> torch.Tensor:
    """Rotate [tokens, heads, D]: dimension i goes with i + D / 2."""
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-second, first], dim=-1) * sin


def make_public_checkpoint(
    folder: str | Path,
    *,
    block_counts: int | None = None,
    window_size: int | None = None,
    num_hidden_layers: int = 2,
    seed: int = 0,
    words: bool = False,
) -> Path:
    """Write a random checkpoint in the layout of the public one (files and keys) to `folder` and return it.

    14 query and 2 KV heads of dimension 16, so that 28 real heads and copies and 4 zero heads make 32. Weights are
    fp32; those of queries, keys and gates are large enough that attention is not uniform and no gate is alike.

    block_counts, window_size: keys of config.json, left out where None; words: see `tiny.make_stock_checkpoint`.
    """
    from lib.tiny import make_stock_checkpoint

    shape = {"hidden_size": 224, "num_attention_heads": 14, "num_key_value_heads": 2, "vision_hidden_size": 32}
    folder = make_stock_checkpoint(folder, num_hidden_layers=num_hidden_layers, seed=seed, words=words, **shape)

    stock = json.loads((folder / "config.json").read_text())
    text, vision = stock["text_config"], stock["vision_config"]
    config = {key: value for key, value in (stock | text).items() if not isinstance(value, dict | list)}
    config |= {
        "architectures": ["VideoNSAForConditionalGeneration"],
        "model_type": "qwen2_5_vl",
        "transformers_version": "4.51.3",
        "torch_dtype": config.pop("dtype"),
        "tie_word_embeddings": False,
        "rope_theta": text["rope_parameters"]["rope_theta"],
        "rope_scaling": {"type": "mrope", "mrope_section": text["rope_parameters"]["mrope_section"]},
        "sliding_window": 32768,
        "max_window_layers": num_hidden_layers,
        "vision_config": {key: value for key, value in vision.items() if key not in NEW_VISION_KEYS},
    }
    config["vision_config"] |= {"in_chans": vision["in_channels"], "spatial_patch_size": vision["patch_size"]}
    options = {"block_counts": block_counts, "window_size": window_size}
    config |= {key: value for key, value in options.items() if value is not None}
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")

    weights = load_file(folder / "model.safetensors")
    generator = torch.Generator().manual_seed(seed + 1)

    def normal(*size, std):
        return torch.empty(size).normal_(0, std, generator=generator)

    hidden, heads = text["hidden_size"], text["num_attention_heads"]
    weights["lm_head.weight"] = normal(text["vocab_size"], hidden, std=0.1)
    for layer in range(num_hidden_layers):
        prefix = f"model.layers.{layer}.self_attn."
        for name in ("q_proj", "k_proj"):
            weights[f"{prefix}{name}.weight"] *= 1.7
        for name in ("q_proj", "k_proj", "v_proj"):
            weights[f"{prefix}{name}.bias"] = normal(*weights[f"{prefix}{name}.bias"].shape, std=0.3)
        weights[f"{prefix}g_proj_1.weight"] = normal(hidden, hidden, std=0.1)
        weights[f"{prefix}g_proj_1.bias"] = normal(hidden, std=0.5)
        weights[f"{prefix}g_proj_2.weight"] = normal(3 * heads, hidden, std=0.03)
        weights[f"{prefix}g_proj_2.bias"] = normal(3 * heads, std=0.3)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder

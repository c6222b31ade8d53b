"""nsa_released.py and the variant "released" of the model, against the slow reference of `released.py`."""

import json

import forks
import pytest
import torch
from conftest import ROOT
from kernel_cases import DEVICE, needs_gpu, relative_rms
from released import (
    load_released,
    make_prompt,
    make_public_checkpoint,
    positions_of,
    released_greedy,
    released_logits,
    released_trace,
    vision_mask,
)

from videonsa.modeling_videonsa import VideoNSAForConditionalGeneration
from videonsa.nsa_released import Stream, _text_means, released_attention, tied_choice
from videonsa.transformers_compat import CACHE, cache_of
from videonsa.vision_layout import VisionLayout

SIZES = {"block_size": 16, "block_count": 4, "window_size": 20}
CLEAR = 1e-4  # relative distance of the last block chosen from the first one left, above which fp32 cannot err


def public_ranking(block_size: int):
    """Ranks blocks as the public kernel does: Batcher's bitonic network on chunks of `block_size` blocks, one number at
    a time; equal numbers change places where it sorts downwards."""

    def merge(items, distance, down):
        while distance:
            for i in range(len(items)):
                if not i & distance and (items[i][0] > items[i + distance][0]) != down(i):
                    items[i], items[i + distance] = items[i + distance], items[i]
            distance //= 2

    def best(row):
        kept = None
        for start in range(0, len(row), block_size):
            items = [(x, start + i) if x >= 0 else (0.0, -1) for i, x in enumerate(row[start : start + block_size])]
            items += [(0.0, -1)] * (block_size - len(items))
            if all(block < 0 for _, block in items):
                break
            distance = 1
            while 2 * distance < block_size:
                merge(items, distance, lambda i, size=2 * distance: bool(i & size))
                distance *= 2
            merge(items, distance, lambda i, first=kept is None: first)
            if kept is not None:
                items = kept[: block_size // 2] + items[block_size // 2 :]
                merge(items, distance, lambda i: True)
            kept = items
        order = [block for _, block in kept if block >= 0]
        return order + [block for block in range(len(row)) if block not in order]

    def rank(importance):
        return torch.tensor([[best(row) for row in group] for group in importance.tolist()])

    return rank


def positions(*parts):
    """int [3, L] of texts (numbers of tokens) and vision (patches, rows, columns, positions from patch to patch)."""
    found, start = [], 0
    for part in parts:
        if isinstance(part, int):
            axes = torch.arange(part).expand(3, -1)
        else:
            *sizes, step = part
            axes = torch.cartesian_prod(*map(torch.arange, sizes)).T * torch.tensor([step, 1, 1])[:, None]
        found.append(axes + start)
        start = int(found[-1].max()) + 1
    return torch.cat(found, 1)


def inputs(position_ids, heads, groups, dim, dtype=torch.float64, size=1.5, seed=0):
    """q, k, v, gate logits [L, ...] as they are in `dtype`."""
    generator = torch.Generator().manual_seed(seed)
    shapes = ((heads, dim), (groups, dim), (groups, dim), (heads, 3))
    q, k, v, logits = (
        torch.randn(position_ids.shape[1], *shape, generator=generator, dtype=torch.float64) for shape in shapes
    )
    return *(x.to(dtype) for x in (size * q, k, v)), logits


def ours(q, k, v, logits, position_ids, past=0, **options):
    """`released_attention` of the tokens after `past`, with the dense term of text queries."""
    vision = vision_mask(position_ids).to(q.device)
    stream = Stream.make(vision, q.shape[0] - past, options["block_size"], options["block_count"])
    gates = (logits[past:][vision[past:]] / 0.3).sigmoid().to(q.dtype)
    out = released_attention(q[past:], k, v, gates, stream, **options)
    return out, ~vision[past:]


CASES = {
    "text around a video": ((5, (4, 4, 4, 2), 9), {}),
    "whole blocks of text, frames at one time, an image": ((70, (6, 4, 4, 0), 9, (1, 6, 6, 0), 3), {}),
    "a chunk over a cache": (((6, 4, 4, 0), 40, (8, 4, 4, 1), 3), {"past": 50}),
    "a cached video, then text and another": (((6, 4, 4, 0), 5, (8, 4, 4, 1)), {"past": 97}),
    "vision alone in the chunk": ((3, (3, 4, 5, 1)), {"past": 4}),
    "one vision token": ((2, (1, 1, 2, 0)), {}),
    "all blocks fit": ((13, (3, 4, 4, 1), 2), {}),
    "14 heads": ((13, (9, 4, 4, 1), 13), {"heads": 14, "groups": 2}),
    "8 heads, blocks of 32": ((13, (9, 5, 4, 1), 13), {"heads": 8, "groups": 1, "block_size": 32, "block_count": 3}),
    "many blocks": ((13, (24, 5, 4, 1), 13, (2, 3, 3, 0), 5), {"heads": 8, "groups": 1}),
    "more blocks than the public kernel can keep": ((9, (12, 4, 4, 1), 3), {"block_count": 9}),
}


def run_case(parts, options, dtype, device="cpu", **changes):
    """(ours, the reference in fp64, which rows are vision, which have a clear choice of blocks)"""
    options = {**SIZES, **options, **changes}
    heads, groups, past = (options.pop(name, default) for name, default in (("heads", 28), ("groups", 4), ("past", 0)))
    position_ids, triton = positions(*parts), options.pop("triton", False)
    tensors = inputs(position_ids, heads, groups, options.pop("dim", 16), dtype)
    q, k, v, logits = (x.double() for x in tensors)
    work_dtype = None if dtype == torch.float64 else dtype
    rank = public_ranking(options["block_size"]) if 2 * options["block_count"] <= options["block_size"] else None
    trace = released_trace(
        q[past:], k, v, logits[past:], position_ids, past=past, work_dtype=work_dtype, rank=rank, **options
    )
    q, k, v, logits = (x.to(device) for x in tensors)
    out, text = ours(q, k, v, logits, position_ids, past, triton=triton, **options)
    assert out.dtype == dtype
    out = out.cpu().double()
    if text.any() and not text.all():
        out[text.cpu()] += trace.dense[text.cpu()]
    return out, trace, ~text.cpu()


def assert_equal(out, trace):
    """In every row, but for vision queries to which blocks of text alone are exactly as important as their own block:
    these are given to the lower block here, and to whichever its network brings up in the public kernel."""
    same = (out - trace.out).norm(dim=-1) <= 1e-9 * trace.out.norm(dim=-1)
    tied = ((trace.importance == 16).sum(-1) > 1).any(0) & trace.vision
    assert same[~tied].all() and tied.float().mean() < 0.05


@pytest.mark.parametrize("block_causal", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_the_torch_path_equals_the_reference_in_fp64_ties_included(case, block_causal):
    out, trace, _ = run_case(*CASES[case], torch.float64, block_causal=block_causal)
    assert_equal(out, trace)


@pytest.mark.parametrize("seed", range(12))
def test_random_prompts_equal_the_reference_in_fp64(seed):
    generator = torch.Generator().manual_seed(seed)

    def number(low, high):
        return int(torch.randint(low, high, (1,), generator=generator))

    parts = []
    for _ in range(number(1, 4)):
        parts += [number(1, 60)] if number(0, 3) else []
        parts.append((number(1, 12), number(1, 7), number(2, 7), number(0, 4)))
    parts += [number(1, 40)] if number(0, 3) else []
    length = positions(*parts).shape[1]
    options = {"past": number(0, length) if number(0, 2) else 0, "heads": 14, "groups": 2, "window_size": number(1, 70)}
    if vision_mask(positions(*parts))[options["past"] :].any():
        out, trace, _ = run_case(tuple(parts), options, torch.float64)
        assert_equal(out, trace)


LARGE = {
    "7B": (
        (40, (60, 8, 8, 0), 30, (20, 8, 8, 2), 40),
        {"block_size": 64, "block_count": 8, "window_size": 256, "dim": 128},
    ),
}
# Each block and each program counts.
INTERPRETED = {
    "text around a video": CASES["text around a video"],
    "14 heads": ((13, (5, 4, 4, 1), 3), {"heads": 14, "groups": 2}),
}
BOTH = {
    "torch": CASES,
    "triton": INTERPRETED,
    "triton, natively": CASES | LARGE,
}


@pytest.mark.usefixtures("larger_tiles")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("path", "case"),
    [
        pytest.param(path, case, marks=needs_gpu if "natively" in path else (), id=f"{path}: {name}")
        for path, cases in BOTH.items()
        for name, case in cases.items()
    ],
)
def test_both_paths_equal_the_reference_in_working_precision(path, case, dtype):
    triton = path != "torch"
    if triton:
        pytest.importorskip("triton")
    parts, options = case
    out, trace, vision = run_case(parts, {"dim": 32, **options}, dtype, DEVICE if triton else "cpu", triton=triton)
    clear = (trace.gap > (CLEAR if dtype == torch.float32 else 0.03)) | ~vision[:, None]
    assert clear.float().mean() > (0.6 if dtype == torch.float32 else 0.15)
    assert relative_rms(out[clear], trace.out[clear]) <= (1e-5 if dtype == torch.float32 else 3e-3)
    assert relative_rms(out, trace.out) <= 0.03  # near ties fall either way


def test_which_of_tied_blocks_are_kept_is_no_detail():
    """Lower blocks first, as elsewhere, would give text queries something else."""
    position_ids = positions(*CASES["a chunk over a cache"][0])
    tensors = inputs(position_ids, 28, 4, 16)
    public = released_trace(*tensors, position_ids, rank=public_ranking(16), **SIZES)
    lowest = released_trace(*tensors, position_ids, **SIZES)
    assert relative_rms(lowest.out[~public.vision], public.out[~public.vision]) > 0.1


def test_means_of_text_queries_do_not_cancel_in_long_streams():
    v = 100 + torch.randn(20_000, 1, 8, generator=torch.Generator().manual_seed(0))
    at = torch.tensor([19_000, 19_999])
    ties, rank = tied_choice(at // 16, 16, 4), torch.zeros(1, 2, dtype=torch.long)
    sizes = {"block_size": 16, "window_size": 20, "block_causal": False}
    found, exact = (_text_means(x, x.unflatten(0, (-1, 16)).mean(1), at, ties, rank, **sizes) for x in (v, v.double()))
    torch.testing.assert_close(found, exact, rtol=1e-6, atol=0)


@pytest.mark.usefixtures("larger_tiles")
@pytest.mark.parametrize("triton", [False, True], ids=["torch", "triton"])
def test_gradients_equal_those_of_the_reference(triton):
    if triton:
        pytest.importorskip("triton")
    dtype, device = (torch.float32, DEVICE) if triton else (torch.float64, "cpu")
    position_ids = positions(9, (4, 4, 4, 1), 5)
    tensors = [x.requires_grad_() for x in inputs(position_ids, 10, 2, 16)]
    trace = released_trace(*tensors, position_ids, rank=public_ranking(16), **SIZES)
    vision = vision_mask(position_ids)
    expected = trace.out - trace.dense * ~vision[:, None, None]  # the model adds the dense term of text
    own = [x.detach().to(device, dtype if i < 3 else None).requires_grad_() for i, x in enumerate(tensors)]
    out, _ = ours(*own, position_ids, triton=triton, **SIZES)
    cotangent = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    wanted = torch.autograd.grad(expected, tensors, cotangent)
    for grad, want in zip(torch.autograd.grad(out, own, cotangent.to(out)), wanted, strict=True):
        assert relative_rms(grad.cpu(), want) <= (1e-5 if triton else 1e-9)


def test_what_is_not_a_number_stays_one_and_raises_nothing():
    position_ids = positions(9, (7, 4, 4, 1), 30)
    q, k, v, logits = inputs(position_ids, 14, 2, 16)
    q[9:121] = torch.nan
    out, text = ours(q, k, v, logits, position_ids, **SIZES)
    assert out[~text].isnan().all() and out[text].isfinite().all()


@pytest.mark.parametrize("block_size", [16, 64])
def test_tied_choices_are_those_of_the_network_run_number_by_number(block_size):
    count = block_size // 2
    own = torch.tensor([0, count - 1, count, block_size - 1, block_size, block_size + 1, 2 * block_size, 200])
    choices = tied_choice(own, block_size, count)
    for c, (more, equal, less) in zip(own.tolist(), choices.tolist(), strict=True):
        for importance, chosen in ((3.0, more), (2.0, equal), (1.0, less)):
            ranked = public_ranking(block_size)(torch.tensor([[[2.0] * c + [importance]]]))[0, 0, :count].tolist()
            assert [block for block in chosen if block >= 0] == ranked or set(chosen) - {-1} == set(ranked)


def test_text_between_vision_rides_along_only_where_it_is_short():
    vision = vision_mask(positions(100, (2, 4, 4, 1), 13, (2, 4, 4, 1), 70, (1, 4, 4, 1), 300))
    runs = Stream.make(vision, len(vision), 16, 4).runs
    assert len(runs) == 2 and sum(stop - start for start, stop in runs) < 100
    assert all(vision[start] and vision[stop - 1] for start, stop in runs)


@pytest.fixture(scope="module")
def public(tmp_path_factory):
    """Folder of a tiny checkpoint in the public layout; prompts of some blocks of 64 tokens leave blocks unselected."""
    return make_public_checkpoint(tmp_path_factory.mktemp("public"), block_counts=3, window_size=40)


@pytest.fixture(scope="module")
def model(public):
    return VideoNSAForConditionalGeneration.from_pretrained(public, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def reference(public):
    return load_released(public)


VIDEO = ("video", (6, 16, 12), 0.5)  # 288 tokens, whose time does not pass once seconds are cut
PROMPTS = {
    "video": (9, VIDEO, 7),
    "two videos and an image": (
        70,
        ("video", (3, 12, 14), 1.0),
        9,
        ("image", (1, 10, 8)),
        3,
        ("video", (4, 8, 8), 2.5),
        4,
    ),
    "video first": (VIDEO, 5),
    "long text": (40, ("image", (1, 8, 8)), 250),
}


def in_fp32(prompt):
    return {name: x.float() if x.is_floating_point() else x for name, x in prompt.items()}


@torch.no_grad()
@pytest.mark.parametrize("name", PROMPTS)
def test_a_public_checkpoint_gives_the_logits_and_tokens_of_the_reference(model, reference, name):
    prompt = make_prompt(reference[0], *PROMPTS[name])
    stock, gates, options = reference
    options = {**options, "rank": public_ranking(64)}
    logits = model(**in_fp32(prompt)).logits[0]
    assert relative_rms(logits, released_logits(stock, gates, prompt, **options)) <= 1e-5
    generated = model.generate(**in_fp32(prompt), max_new_tokens=8, do_sample=False)[0, prompt["input_ids"].shape[1] :]
    assert generated.tolist() == released_greedy(stock, gates, prompt, 8, **options)


@torch.no_grad()
@pytest.mark.usefixtures("larger_tiles")
def test_the_kernels_give_the_same_logits(public, reference):
    pytest.importorskip("triton")
    kernels = VideoNSAForConditionalGeneration.from_pretrained(public, dtype=torch.float32, nsa_backend="triton")
    prompt = make_prompt(reference[0], 5, ("video", (2, 8, 8), 0.5), 4)
    logits = kernels.to(DEVICE)(**{name: x.to(DEVICE) for name, x in in_fp32(prompt).items()}).logits[0]
    expected = released_logits(*reference[:2], prompt, **reference[2], rank=public_ranking(64))
    assert relative_rms(logits.cpu(), expected) <= 1e-5


@torch.no_grad()
def test_positions_are_cut_to_seconds_unless_the_switch_is_off(public, model, reference):
    prompt = make_prompt(reference[0], *PROMPTS["video"])
    types = model.model.token_types(prompt["input_ids"])
    grids = {name: prompt[name] for name in ("video_grid_thw", "second_per_grid_ts")}
    cut, _ = model.model.get_rope_index(prompt["input_ids"], types, **grids)
    assert torch.equal(cut[:, 0], positions_of(reference[0], prompt))
    exact = VideoNSAForConditionalGeneration.from_pretrained(public, truncate_seconds=False, dtype=torch.float32).eval()
    kept, _ = exact.model.get_rope_index(prompt["input_ids"], types, **grids)
    assert kept[0, 0, 9:-7].unique().tolist() == [*range(9, 15)] and cut[0, 0, 9:-7].unique().tolist() == [9]
    expected = released_logits(*reference[:2], prompt, kept[:, 0], **reference[2], rank=public_ranking(64))
    assert relative_rms(exact(**in_fp32(prompt)).logits[0], expected) <= 1e-5


@torch.no_grad()
def test_times_that_are_not_evenly_spaced_are_cut_each(model, reference):
    ids = make_prompt(reference[0], 1, ("video", (4, 4, 4)))["input_ids"]
    times, grid = [[0.0, 0.7, 1.9, 2.0]], torch.tensor([[4, 4, 4]])
    found, _ = model.model.get_rope_index(ids, video_grid_thw=grid, second_per_grid_ts=times)
    assert found[0, 0, 1::4].tolist() == [1, 1, 3, 5]  # 0, 0, 1 and 2 seconds, of 2 positions each


@torch.no_grad()
def test_the_intermediate_compression_mask_is_a_switch(public, reference):
    prompt = make_prompt(reference[0], *PROMPTS["video"])
    causal = VideoNSAForConditionalGeneration.from_pretrained(public, block_causal=True, dtype=torch.float32)
    logits = causal(**in_fp32(prompt)).logits[0]
    expected = released_logits(*reference[:2], prompt, **reference[2], rank=public_ranking(64), block_causal=True)
    assert relative_rms(logits, expected) <= 1e-5


@torch.no_grad()
def test_a_static_cache_gives_the_same_tokens(model, reference):
    prompt = in_fp32(make_prompt(reference[0], *PROMPTS["video"]))
    tokens = model.generate(**prompt, max_new_tokens=6, do_sample=False)
    static = model.generate(**prompt, max_new_tokens=6, do_sample=False, cache_implementation="static")
    assert torch.equal(static, tokens)


def test_the_layout_moves_between_devices_as_a_whole():
    vision = vision_mask(positions(3, (2, 4, 4, 1), 5))[None]
    layout = VisionLayout.make(
        vision, 20, make_stream=lambda vision, n: Stream.make(vision, n, block_size=16, block_count=3)
    )
    (sample,) = layout.to("meta").streams
    tensors = [x for x in (*vars(sample.stream).values(), *vars(sample).values()) if isinstance(x, torch.Tensor)]
    assert len(tensors) == 6 and all(x.device.type == "meta" for x in tensors)


@torch.no_grad()
def test_samples_of_a_padded_batch_and_of_a_packed_row_are_as_if_alone(model, reference):
    prompts = [
        in_fp32(make_prompt(reference[0], *parts, seed=i)) for i, parts in enumerate(((9, VIDEO, 7), (5, VIDEO), (60,)))
    ]
    alone = [model(**prompt).logits[0] for prompt in prompts]
    longest = max(len(logits) for logits in alone)
    vision = {
        name: torch.cat([prompt[name] for prompt in prompts if name in prompt])
        for name in prompts[0]
        if name != "input_ids"
    }
    for side in ("left", "right"):
        ids, mask = torch.zeros(3, longest, dtype=torch.long), torch.zeros(3, longest, dtype=torch.long)
        for i, prompt in enumerate(prompts):
            n = len(alone[i])
            where = slice(longest - n, None) if side == "left" else slice(n)
            ids[i, where], mask[i, where] = prompt["input_ids"][0], 1
        batch = model(input_ids=ids, attention_mask=mask, **vision).logits
        for logits, row, kept in zip(alone, batch, mask.bool(), strict=True):
            torch.testing.assert_close(row[kept], logits, rtol=0, atol=2e-5)

    rows = [positions_of(reference[0], prompt)[:, None] for prompt in prompts]
    text = torch.cat([torch.arange(len(logits)) for logits in alone])
    packed = torch.cat([text[None, None], torch.cat(rows, 2)])
    ids = torch.cat([prompt["input_ids"] for prompt in prompts], 1)
    together = model(input_ids=ids, position_ids=packed, use_cache=False, **vision).logits[0]
    torch.testing.assert_close(together, torch.cat(alone), rtol=0, atol=2e-5)


@torch.no_grad()
def test_chunks_over_a_cache_are_those_of_the_reference(model, reference):
    stock, gates, options = reference
    prompt = make_prompt(stock, 9, VIDEO, 7, ("video", (4, 8, 8), 1.0), 4)
    at = 9 + 288 + 3
    position_ids = positions_of(stock, prompt)
    names = {name: prompt[name] for name in prompt if name != "input_ids"}
    first, second = ({name: x[part] for name, x in names.items()} for part in (slice(0, 1), slice(1, 2)))
    cells = 6 * 16 * 12
    first["pixel_values_videos"], second["pixel_values_videos"] = names["pixel_values_videos"].split([cells, 256])
    outputs = model(input_ids=prompt["input_ids"][:, :at], position_ids=position_ids[:, None, :at], **in_fp32(first))
    later = model(
        input_ids=prompt["input_ids"][:, at:], position_ids=position_ids[:, None, at:],
        **{CACHE: cache_of(outputs)}, **in_fp32(second),
    ).logits[0]  # fmt: skip
    from released import decode, embed

    hidden, cache = embed(stock, prompt), []
    options = {**options, "rank": public_ranking(64)}
    attention = released_reference
    decode(stock, gates, hidden[:at], position_ids[:, :at], cache, attention, options)
    expected = decode(stock, gates, hidden[at:], position_ids, cache, attention, options)
    assert relative_rms(later, expected) <= 1e-5


def released_reference(*args, **options):
    return released_trace(*args, **options).out


def test_a_training_step_reaches_every_parameter(public, reference):
    model = VideoNSAForConditionalGeneration.from_pretrained(public, dtype=torch.float32).train()
    prompt = in_fp32(make_prompt(reference[0], *PROMPTS["video"]))
    model(**prompt, labels=prompt["input_ids"]).loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name
        assert parameter.grad.any() or "k_proj.bias" in name, name


@torch.no_grad()
def test_the_paper_and_the_dense_variant_load_the_same_weights(public, model, reference):
    prompt = in_fp32(make_prompt(reference[0], *PROMPTS["video"]))
    released = model(**prompt).logits
    for variant in ("paper", "dense"):
        other = VideoNSAForConditionalGeneration.from_pretrained(
            public, nsa_variant=variant, dtype=torch.float32
        ).eval()
        assert other.config.gate_temperature == 0.3 and not other.config.text_config.cuts_seconds()
        assert (other(**prompt).logits - released).abs().max() > 0.1
    text = make_prompt(reference[0], 50)
    torch.testing.assert_close(model(**text).logits, other(**text).logits, rtol=0, atol=0)


PROGRAM = """
import sys, torch
from transformers import AutoModel
model = AutoModel.from_pretrained(sys.argv[1], trust_remote_code=True, dtype=torch.float32).eval()
assert model.config.nsa_variant == "released" and model.config.block_count == 3 and model.config.window_size == 40
print(model.generate(**torch.load(sys.argv[2]), max_new_tokens=8, do_sample=False).tolist())
"""


def test_the_converted_repository_generates_the_same_in_a_fresh_process(public, model, reference, tmp_path, run_fresh):
    from lib.conversion import convert

    repository = convert(public, tmp_path / "repository")
    card = (repository / "README.md").read_text()
    assert 'nsa_variant="released"' in card and '"nsa_variant": "dense"' not in card
    assert json.loads((repository / "config.json").read_text())["text_config"]["nsa_variant"] == "released"
    prompt = in_fp32(make_prompt(reference[0], *PROMPTS["video"]))
    torch.save(prompt, tmp_path / "prompt.pt")
    printed = run_fresh(PROGRAM, repository, tmp_path / "prompt.pt").splitlines()[-1]
    assert json.loads(printed) == model.generate(**prompt, max_new_tokens=8, do_sample=False).tolist()


def test_the_demo_picks_the_variant_of_a_public_checkpoint_and_says_so(public):
    done = forks.run(
        ROOT / "examples/demo.py", "--model", public, "--device", "cpu", "--max_new_tokens", 2, "--seed", 1
    )
    assert done.returncode == 0, done.stderr
    assert "nsa_variant=released" in done.stdout and "block_count=3" in done.stdout and "answer" in done.stdout

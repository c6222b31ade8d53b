"""analyze.py, what it looks with: every finding on the tiny model, its numbers against direct computation."""

import json
import sys
from types import SimpleNamespace

import av
import numpy as np
import pytest
import torch

import analyze
from evaluate import evaluate
from lib import figures, observe
from lib.loading import assemble_tiny_model, load
from lib.needles import Settings, make_dataset
from lib.summaries import summarize


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Has `tiny`, the trained model, and `clips/test.jsonl`: clips of 4 s and 8 s."""
    folder = tmp_path_factory.mktemp("analyze")
    assemble_tiny_model(folder / "tiny")
    settings = Settings(seconds=(4.0, 8.0), questions=("colour", "where", "when"))
    make_dataset(folder / "clips", {"test": 3}, settings, seed=3, workers=1)
    return folder


@pytest.fixture(scope="module")
def tiny(folder):
    return load(str(folder / "tiny"), "cpu")


@pytest.fixture(scope="module")
def prompts(folder):
    """Inputs of one question about each of two clips."""
    args = {"model": str(folder / "tiny"), "data": str(folder / "clips/test.jsonl"), "finding": "gates"}
    _, processor, samples = analyze.open_model_and_data(SimpleNamespace(**args, device="cpu", media_root=None))
    return list(analyze.prompts_of(processor, samples, 2))


@pytest.fixture(scope="module")
def prompt(prompts):
    return prompts[0]


@pytest.fixture(scope="module")
def seen(tiny, prompt):
    """What each layer attends with."""
    layers = []
    observe.watch(tiny[0], prompt, layers.append)
    return layers


@pytest.fixture
def run(folder, tmp_path):
    def run(finding, *options, data=True):
        paths = [str(folder / "tiny"), *([str(folder / "clips/test.jsonl")] if data else [])]
        args = analyze.make_parser().parse_args([finding, *paths, *map(str, options), "--output", str(tmp_path)])
        analyze.run(args)
        result = json.loads((tmp_path / f"{finding}.json").read_text())
        assert result["finding"] == finding and result["versions"]["torch"] == torch.__version__
        assert (tmp_path / f"{finding}.png").stat().st_size > 10_000
        lines = summarize(result)
        assert 2 < len(lines) < 10 and all(line and len(line) < 200 for line in lines)
        assert lines[-1] == f"took {result['took_seconds']:,.0f} s on cpu" and result["took_seconds"] > 0
        return result

    return run


def probabilities(seen) -> dict[str, torch.Tensor]:
    """[H, N, m] of each branch, from its definition."""
    size, count, window = (seen.sizes[name] for name in observe.SIZES)
    n, heads, dim = seen.q.shape
    q, k = (
        seen.q.double().transpose(0, 1),
        seen.k.double().repeat_interleave(heads // seen.k.shape[1], 1).transpose(0, 1),
    )
    i, j = torch.arange(n)[:, None], torch.arange(n)

    def softmax(keys, visible):
        p = (q @ keys.transpose(1, 2) * dim**-0.5).masked_fill(~visible, -torch.inf).softmax(-1)
        return p.nan_to_num(0)

    means = k.unflatten(1, (-1, size)).mean(2)
    p = {"compression": softmax(means, j[: n // size] < (i + 1) // size)}
    importance = p["compression"].sum(0)  # one KV head
    chosen = torch.zeros(n, n // size, dtype=torch.bool)
    for t in range(n):
        own = t // size
        forced = {0, max(own - 1, 0), own}
        others = sorted(set(range(own)) - forced, key=lambda b: (-importance[t, b], b))
        chosen[t, [*forced, *others[: count - len(forced)]]] = True
    p["selection"] = softmax(k, chosen.repeat_interleave(size, 1) & (j <= i))
    p["window"] = softmax(k, (j <= i) & (j > i - window))
    return p


def test_attention_received_is_that_of_materialised_probabilities(seen, monkeypatch):
    monkeypatch.setattr(observe, "MAX_SCORES", 2**14)  # several chunks
    for layer in seen:
        n, heads, _ = layer.q.shape
        size, p = layer.sizes["block_size"], probabilities(layer)
        found = {name: alpha for name, alpha, _, _ in observe.received_by_branch(layer, (*observe.BRANCHES, "gated"))}
        for name in observe.BRANCHES:
            viewers = (p[name] > 0).sum(1).clamp(min=1)
            torch.testing.assert_close(found[name].double(), p[name].sum(1) / viewers, rtol=1e-3, atol=1e-5)
        # The weights that the output is made with are the mixture's, before it is divided by the gates.
        gates = layer.gates.double().permute(2, 1, 0)[..., None]  # [3, H, N, 1]
        spread = p["compression"].repeat_interleave(size, -1) / size
        weights = gates[0] * spread + gates[1] * p["selection"] + gates[2] * p["window"]
        v = layer.v.double().repeat_interleave(heads, 1).transpose(0, 1)
        output = layer.nsa.nsa_attention(layer.q, layer.k, layer.v, layer.gates, layer.cu_seqlens, **layer.sizes)
        torch.testing.assert_close((weights @ v).transpose(0, 1).float(), output, rtol=1e-3, atol=1e-4)
        sees_blocks = (torch.arange(n) >= size - 1)[:, None]
        mixture = weights / (gates[0] * sees_blocks + gates[1] + gates[2])
        torch.testing.assert_close(mixture.sum(-1), torch.ones(heads, n).double())
        expected = mixture.sum(1) / torch.arange(n, 0, -1)
        torch.testing.assert_close(found["gated"].double(), expected, rtol=1e-3, atol=1e-6)


def test_dense_attention_received_is_that_of_the_eager_weights(folder, tiny, prompt):
    model, _ = tiny
    found = {}

    def see(*layer):
        index, alpha, _, value_norm = observe.dense_received(model, *layer)
        found[index] = alpha, value_norm

    with observe.configured(model, nsa_variant="dense"):
        observe.watch_dense(model, prompt, see)
        eager, _ = load(str(folder / "tiny"), "cpu", nsa_variant="dense")
        eager.set_attn_implementation("eager")
        weights = eager(**prompt, output_attentions=True).attentions
    vision = prompt["mm_token_type_ids"][0] > 0
    assert len(found) == len(weights)
    for i, p in enumerate(weights):
        among = p[0][:, vision][:, :, vision]
        expected = among.sum(1) / torch.arange(among.shape[1], 0, -1)
        torch.testing.assert_close(found[i][0], expected.detach(), rtol=1e-3, atol=1e-6)
    assert model.config.text_config._attn_implementation == "sdpa" and model.config.nsa_variant == "paper"


def test_sinks_are_found_as_defined():
    generator = torch.Generator().manual_seed(0)
    alpha, norm = torch.rand(6, 50, generator=generator) / 4, torch.rand(2, 50, generator=generator) + 5
    norm[0, [3, 9]], norm[1, 30] = 1.0, 0.5
    found = observe.find_sinks(alpha, norm)
    for head in range(6):
        values = norm[head // 3].numpy()
        low, median, high = np.percentile(values, [25, 50, 75])
        for key in range(50):
            expected = alpha[head, key] > 0.1 and values[key] < median - 2 * (high - low)
            assert found[head, key] == expected
    assert 0 < found.sum() <= 9
    tally = observe.SinkTally(2)
    tally.add(1, alpha, norm, norm)
    read = tally.read()
    assert read["share"] == pytest.approx(found.float().mean().item())
    assert read["attention_only"] == pytest.approx((alpha > 0.1).float().mean().item())
    assert read["by_layer"] == pytest.approx([0.0, read["share"]])
    bins = [found[:, [k for k in range(50) if k * observe.BINS // 50 == b]] for b in range(observe.BINS)]
    assert read["positions"] == pytest.approx([b.float().mean().item() for b in bins])
    assert {3, 9, 30} >= {k for k in range(50) if found[:, k].any()}


def test_gates_are_those_of_the_hidden_states(run, tiny, prompts):
    result = run("gates", "--limit", 2, "--max_new_tokens", 4, "--batch_size", 3)
    model = tiny[0]
    hidden = [[] for _ in range(4)]
    handles = [
        layer.self_attn.register_forward_pre_hook(
            lambda module, args, kwargs: hidden[module.layer_idx].append(kwargs["hidden_states"][0]), with_kwargs=True
        )
        for layer in model.model.language_model.layers
    ]
    with torch.no_grad():
        for inputs in prompts:
            model(**inputs)
    for handle in handles:
        handle.remove()
    vision = [inputs["mm_token_type_ids"][0] > 0 for inputs in prompts]
    assert result["clips"] == len(prompts) == 2 and result["tokens"] == sum(v.sum() for v in vision)
    for i, layer in enumerate(model.model.language_model.layers):
        first, second = layer.self_attn.g_proj_1, layer.self_attn.g_proj_2
        each = []
        for x, where in zip(hidden[i], vision, strict=True):
            inner = torch.nn.functional.gelu(x[where] @ first.weight.T + first.bias)
            logits = inner @ second.weight.T + second.bias
            each.append((1 / (1 + (-logits).exp())).view(-1, 7, 3).detach())
        whole = torch.cat(each)
        assert result["by_head"][i] == pytest.approx(whole.mean(0).numpy(), abs=1e-4)
        assert result["mean"][i] == pytest.approx(whole.mean((0, 1)).numpy(), abs=1e-4)
        assert result["by_kind"]["video"][i] == pytest.approx(whole.mean((0, 1)).numpy(), abs=1e-4)
        low = torch.quantile(whole.mean(1), 0.25, dim=0)
        assert result["quartiles_over_tokens"][i][0] == pytest.approx(low.numpy(), abs=1e-4)
        for branch in range(3):
            expected = np.mean([np.corrcoef(g[..., branch].double().T.numpy()) for g in each], 0)
            assert np.array(result["similarity"][i][branch]) == pytest.approx(expected, abs=1e-3)
        first_tenth = torch.cat([g[: -(-(len(g) - 1) // 10)] for g in each]).mean((0, 1))
        assert result["by_time"][i][0] == pytest.approx(first_tenth.numpy(), abs=2e-3)
    assert list(result["ablation"]) == [
        "compression + selection + window", "compression + selection", "compression + window", "selection + window",
        "compression", "selection", "window",
    ]  # fmt: skip
    right = {name: row["all"]["all"]["accuracy"] for name, row in result["ablation"].items()}
    assert right["compression + selection + window"] > 0.9 > right["compression"]


def test_a_branch_alone_gives_its_output_times_its_gate(tiny, prompt, seen):
    model, outputs = tiny[0], []
    hook = model.model.language_model.layers[0].self_attn.o_proj.register_forward_pre_hook(
        lambda module, args: outputs.append(args[0])
    )
    with torch.no_grad(), observe.observing(model, lambda *args: observe.only_branches((2,), *args)):
        model(**prompt)
    hook.remove()
    layer = seen[0]
    alone, _ = layer.nsa.window_attention(layer.q, layer.k, layer.v, layer.cu_seqlens, window_size=32)
    torch.testing.assert_close(outputs[0][0, layer.vision], (layer.gates[..., 2:] * alone).flatten(1))


def test_the_answer_attends_as_its_queries_and_all_earlier_keys_say(seen):
    layer = seen[2]
    length, heads, dim = layer.every_q.shape
    scores = torch.einsum("qhd,kd->hqk", layer.every_q, layer.every_k[:, 0]) * dim**-0.5
    p = scores.masked_fill(torch.ones(length, length).triu(1).bool(), -torch.inf).softmax(-1).mean(0)
    torch.testing.assert_close(layer.text_attention(3), p[-3:, layer.vision], rtol=1e-3, atol=1e-6)


def test_transfer_counts_as_evaluate_does(run, folder, tmp_path):
    result = run("transfer", "--max_new_tokens", 4, "--twin", folder / "tiny")
    args = {"model": str(folder / "tiny"), "data": str(folder / "clips/test.jsonl"), "media_root": None, "limit": None}
    args |= {"fps": None, "max_frames": None, "batch_size": 1, "max_new_tokens": 4, "workers": 0, "device": "cpu"}
    answers = {}
    for name, variant in (("paper", None), ("dense, same weights", "dense")):
        done = evaluate(SimpleNamespace(**args, nsa_variant=variant, output=str(tmp_path / f"{variant}.json")))
        assert done["accuracy"] == result["accuracy"][name]
        answers[name] = [entry["answered"] for entry in done["answers"]]
    assert result["accuracy"]["dense, dense-trained"] == result["accuracy"]["dense, same weights"]  # the twin is itself
    same = np.mean([a == b for a, b in zip(*answers.values(), strict=True)])
    assert result["agreement"]["paper"]["dense, same weights"] == pytest.approx(same, abs=1e-4)
    assert result["agreement"]["paper"]["paper"] == 1 and result["change_percent"]["paper"] == 0


def test_scaling_spends_the_context_as_asked_for(run):
    result = run("scaling", "--frames", 4, 16, "--frame_tokens", 4, 16, "--max_new_tokens", 4)
    assert sum(row["questions"] for row in result["by_length"].values()) == 9
    tokens = {(c["frames"], c["frame_tokens"]): c["tokens"] for c in result["cells"]}
    text = tokens[4, 4] - 8
    assert tokens == {(f, t): pytest.approx(text + f // 2 * t, abs=0.01) for f in (4, 16) for t in (4, 16)}
    (best,) = result["best_splits"]  # of 4 frames of 16 tokens and of 16 frames of 4
    rivals = [cell for cell in result["cells"] if cell["context"] == best["context"] == 32]
    winner = max(rivals, key=lambda cell: cell["accuracy"])
    assert len(rivals) == 2 and (best["frames"], best["frame_tokens"]) == (winner["frames"], winner["frame_tokens"])
    with pytest.raises(ValueError, match="no video has 1000 frames of 4 tokens"):
        run("scaling", "--frames", 1000, "--frame_tokens", 4, "--max_new_tokens", 2)


def test_the_budget_has_the_trained_point_and_its_shares(run, tiny):
    options = ["--budgets", 1, 2, "--window_shares", 0.5, "--max_new_tokens", 4]
    result = run("budget", *options)
    cells = {(c["block_count"], c["window_size"]): c for c in result["cells"]}
    assert set(cells) == {(4, 32), (3, 48), (6, 96), (10, 32)}
    assert [key for key, cell in cells.items() if cell["trained"]] == [(4, 32)]
    assert cells[6, 96]["keys"] == cells[10, 32]["keys"] == 192
    length = cells[4, 32]["tokens"]
    assert cells[4, 32]["share_paper"] == pytest.approx(2 * 96 / length, rel=0.4) and cells[4, 32]["share"] < 1
    assert tiny[0].config.window_size == 32


def test_sinks_of_all_branches_add_up(run, seen, prompt):
    options = ["--limit", 1, "--block_sizes", 16, 32, "--windows", 32]
    result = run("sinks", *options)
    found = result["branches"]
    assert list(found) == [*observe.BRANCHES, "gated", "dense"]
    shares = []
    for layer in seen:
        p = probabilities(layer)["window"]
        alpha = p.sum(1) / (p > 0).sum(1)
        norm = layer.v[:, 0].norm(dim=-1).numpy()
        low, median, high = np.percentile(norm, [25, 50, 75])
        shares.append(((alpha.numpy() > 0.1) & (norm < median - 2 * (high - low))).mean())
    assert found["window"]["by_layer"] == pytest.approx(shares, abs=1e-4)
    assert found["window"]["share"] == pytest.approx(np.mean(shares), abs=1e-4)
    rows = result["by_setting"]
    assert [row["branch"] for row in rows] == ["compression", "selection"] * 2 + ["window"]
    assert (rows[2]["block_size"], rows[2]["block_count"], rows[4]["window_size"]) == (32, 3, 32)
    assert rows[0]["share"] == found["compression"]["share"] and rows[4]["share"] == found["window"]["share"]


def test_latency_times_every_part(run):
    result = run("latency", "--lengths", 64, 128, "--seconds", 0, data=False)
    parts = {(row["part"], row["tokens"]): row["ms"] for row in result["rows"]}
    assert set(parts) == {(part, n) for part in result["growth"] for n in (64, 128)} and min(parts.values()) > 0
    assert result["kernel"] == "torch" and result["shape"] == {"heads": 7, "kv_heads": 1, "head_dim": 32}
    assert torch.__version__.startswith(result["environment"]["torch"])


def test_needles_maps_lengths_and_depths(run):
    options = ["--clips", 1, "--clip_seconds", 3, 4, "--depths", 0, 1, "--max_new_tokens", 4]
    result = run("needles", *options, data=False)
    cells = {(cell["frames"], cell["depth"]): cell for cell in result["cells"]}
    assert list(cells) == [(12, 0.0), (12, 1.0), (16, 0.0), (16, 1.0)]
    assert {(cell["what"]["questions"], cell["when"]["questions"]) for cell in cells.values()} == {(3, 1)}
    assert np.mean([cell["what"]["accuracy"] for cell in cells.values()]) > 0.9
    assert [cell["vision_tokens"] for cell in cells.values()] == [96, 96, 128, 128]


def test_looked_at_shows_the_frames_of_the_video(run, tiny, folder, tmp_path):
    clip = next((folder / "clips/test").glob("*.mp4"))
    result = run("looked-at", "--video", clip, "--question", "What colour was it?", "--max_new_tokens", 4, data=False)
    t, h, w = result["grid"]
    assert len(result["seconds"]) == t and result["seconds"][:3] == [0.0, 0.5, 1.0] and (h, w) == (4, 4)
    assert list(result["frames"]) == ["early", "middle", "late", "answer"]
    assert result["layers"] == {"early": [0, 1], "middle": [2], "late": [3]}
    assert 0 < result["share_of_answer_on_video"] < 1
    assert sum(result["frames"]["answer"]) * h * w == pytest.approx(result["share_of_answer_on_video"], abs=1e-3)
    with av.open(str(tmp_path / "looked-at.mp4")) as container:
        shown = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    assert len(shown) == t and shown[0].shape == (244, 448, 3)
    with av.open(str(clip)) as container:
        first = next(container.decode(video=0)).to_ndarray(format="rgb24")
    assert shown[0][20:].mean() > 0.55 * first.mean()  # visible where nothing looks


def test_the_command_line_says_what_is_measured_and_what_is_wrong(folder, tmp_path, monkeypatch, capsys):
    for finding in analyze.FINDINGS:
        with pytest.raises(SystemExit, match="0"):
            analyze.make_parser().parse_args([finding, "--help"])
        assert "(paper: " in capsys.readouterr().out
    tiny, output = str(folder / "tiny"), str(tmp_path / "out")
    monkeypatch.setattr(sys, "argv", ["analyze.py", "gates", tiny, "gone.json", "--output", output])
    with pytest.raises(SystemExit, match="analyze.py: data file .*gone.json does not exist"):
        analyze.main()
    config = json.loads((folder / "tiny/config.json").read_text())
    dense = assemble_tiny_model(tmp_path / "dense")
    config["text_config"]["nsa_variant"] = "dense"
    (dense / "config.json").write_text(json.dumps(config))
    monkeypatch.setattr(sys, "argv", ["analyze.py", "gates", str(dense), "--output", output])
    with pytest.raises(SystemExit, match="has nsa_variant='dense'; gates needs 'paper'"):
        analyze.main()


def test_the_command_line_prints_what_was_found_and_the_files_that_it_wrote(folder, tmp_path, monkeypatch, capsys):
    (tmp_path / "latency-old.json").touch()
    options = ["--lengths", "64", "--seconds", "0", "--output", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["analyze.py", "latency", str(folder / "tiny"), *options])
    analyze.main()
    first, times, took, *wrote = capsys.readouterr().out.splitlines()
    assert first == "nsa_torch, float32, ms of one layer"
    assert times.startswith("     64 tokens: pooling ") and ", whole " in times
    assert took.startswith("took ") and took.endswith(" s on cpu")
    assert wrote == [f"wrote {tmp_path / 'latency.json'}", f"wrote {tmp_path / 'latency.png'}"]


DASHED = {"frames": 8, "frame_tokens": 16}, {"frames": 16, "frame_tokens": 8}


def test_figures_hide_no_number_and_no_point():
    """Numbers of a heat map have a ground that a line does not cross, and legends lie outside of their axes."""
    cells = [{**cell, "context": 64, "questions": 2, "accuracy": 0.5} for cell in DASHED]
    lengths = {str(n): {"tokens": n, "seconds": n / 99, "types": {"colour": 1.0, "when": 1.0}} for n in (128, 256)}
    figure = figures.scaling({"by_length": lengths, "cells": cells, "best_splits": [DASHED[0]]})
    figure.canvas.draw()
    numbers = figure.axes[2].texts
    (line,) = [line for line in figure.axes[2].lines if line.get_linestyle() == "--"]
    assert len(numbers) == 2
    for number in numbers:
        assert number.get_bbox_patch().get_alpha() is None and number.get_zorder() > line.get_zorder()
    for axis in (figure.axes[0], figure.axes[2]):
        assert axis.get_legend().get_window_extent().y1 < axis.get_window_extent().y0
    widths = [line.get_linewidth() for line in figure.axes[0].lines]
    assert widths == sorted(widths, reverse=True) and len(set(widths)) == 2  # what lies below another shows
    figures.plt.close(figure)

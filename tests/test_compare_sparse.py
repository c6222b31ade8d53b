"""compare_sparse.py and sparse_baselines.py: baselines compute what their papers say, and the comparison adds up."""

import json
import sys

import pytest
import torch

import compare_sparse
from lib import sparse_baselines
from lib.loading import assemble_tiny_model
from lib.needles import Settings, make_dataset
from lib.sparse_baselines import METHODS, Prefill
from prompts import MIXED, assert_close, generate, logits, make_inputs
from videonsa.modeling_videonsa import VideoNSAForConditionalGeneration

SIZE = 8


def make(name, level, n=90, dim=16, heads=3):
    """A mask bool [heads or 1, n, n] of a method, of its third layer."""
    generator = torch.Generator().manual_seed(0)
    q, k = torch.randn(2, heads, n, dim, generator=generator) * 2
    vision = (torch.arange(n) > 5) & (torch.arange(n) < n - 7)
    method = METHODS[name](level, vision, SIZE)
    masks = [method(layer, q, k, dim**-0.5) for layer in range(3)]
    return q, k, method, masks[2]


@pytest.mark.parametrize("name", METHODS)
def test_masks_are_causal_grow_with_the_level_and_end_dense(name):
    dense = torch.ones(90, 90, dtype=torch.bool).tril()
    before = 0
    for level in (0.0, 0.2, 0.5, 0.8, 1.0):
        mask = make(name, level)[3]
        assert not (mask & ~dense).any() and mask.any(-1).all()
        share = float(mask.float().mean(0).sum() / dense.sum())
        assert share >= before
        before = share
    assert before > 0.99
    assert float(make(name, 0.0)[3].float().mean(0).sum() / dense.sum()) < 0.5


def test_vertical_slash_takes_the_columns_and_diagonals_that_the_last_queries_see():
    q, k, _, mask = make("MInference", 0.2)
    p = (
        (q[:, -SIZE:] @ k.mT / 4)
        .masked_fill(~torch.ones(90, 90, dtype=torch.bool).tril()[-SIZE:], -torch.inf)
        .softmax(-1)
    )
    for h in range(3):
        columns, diagonals = [0.0] * 90, [0.0] * 90
        for row in range(SIZE):
            for j in range(90 - SIZE + row + 1):
                columns[j] += float(p[h, row, j])
                diagonals[90 - SIZE + row - j] += float(p[h, row, j])
        best = max(range(SIZE // 2, 90), key=columns.__getitem__)
        assert mask[h, best:, best].all()
        best = max(range(SIZE, 90), key=diagonals.__getitem__)
        assert mask[h].diagonal(-best).all()


def test_xattention_scores_blocks_by_antidiagonals(monkeypatch):
    seen = []
    until = sparse_baselines.until_mass
    monkeypatch.setattr(sparse_baselines, "until_mass", lambda p, mass: seen.append(p) or until(p, mass))
    q, k, _, _ = make("XAttention", 0.5, n=32)
    strided = torch.zeros(3, 8, 8)
    for a in range(8):
        for b in range(8):
            for t in range(4):  # from the lower left to the upper right of a square of 4 x 4
                strided[:, a, b] += (q[:, 4 * a + t] * k[:, 4 * b + 3 - t]).sum(-1)
    strided = (strided / 16).masked_fill(~torch.ones(8, 8, dtype=torch.bool).tril(), -torch.inf).softmax(-1)
    expected = strided.unflatten(2, (4, 2)).sum(-1).unflatten(1, (4, 2)).sum(2)
    torch.testing.assert_close(seen[-1], expected)


def test_vecattention_takes_the_keys_whose_logits_are_near_the_largest():
    q, k, _, mask = make("VecAttention", 0.5)
    for h in range(3):
        for start in range(0, 90, SIZE):
            group = range(start, min(start + SIZE, 90))
            logits = [float(q[h, group].mean(0) @ k[h, j]) / 4 for j in range(group[-1] + 1)]
            near = {j for j, logit in enumerate(logits) if logit >= max(logits) - 1}  # 0.5 / (1 - 0.5)
            for i in group:
                expected = {j for j in near | {*range(SIZE)} | {*group} if j <= i}
                assert {*mask[h, i].nonzero().flatten().tolist()} == expected


def test_fastv_drops_the_vision_tokens_that_the_last_token_attends_to_least():
    q, k, method, _ = make("FastV", 0.25)
    p = (q[:, -1:] @ k.mT / 4).softmax(-1)[:, 0].mean(0)
    kept = method.keys(2)
    vision = method.vision
    assert kept[~vision].all() and int((kept & vision).sum()) == round(0.25 * int(vision.sum()))
    assert p[kept & vision].min() >= p[~kept & vision].max()
    assert method.keys(1) is None


def test_a_method_that_computes_everything_is_dense_attention(stock_checkpoint):
    options = {"nsa_variant": "merged", "block_size": 16, "block_count": 32}
    model = VideoNSAForConditionalGeneration.from_pretrained(stock_checkpoint, **options).eval()
    inputs = make_inputs(MIXED)
    vision = (inputs["mm_token_type_ids"] > 0)[0]
    model.config.nsa_variant = "dense"
    expected, tokens = logits(model, inputs), generate(model, inputs).sequences
    for name in ("Tri-shape", "FastV"):
        with Prefill(model, METHODS[name](1.0, vision, 16)) as prefill:
            assert_close(logits(model, inputs), expected)
            assert torch.equal(generate(model, inputs).sequences, tokens)
        assert prefill.shares == pytest.approx([1.0] * 4)
    with Prefill(model, METHODS["Tri-shape"](0.1, vision, 16)):
        assert (logits(model, inputs) - expected).abs().max() > 0.01
    assert torch.equal(logits(model, inputs), expected)  # nothing is left behind


def test_comparison_of_a_tiny_model(tmp_path, monkeypatch, capsys):
    pytest.importorskip("matplotlib")
    model = assemble_tiny_model(tmp_path / "tiny")
    data = make_dataset(tmp_path / "data", {"test": 1}, Settings(seconds=(4.0,), size=84, turns=2), workers=1)
    few = '"block_count": 3, "window_size": 1'
    settings = [
        f"{{{few}}}",
        '{"block_count": 32}',
        f'{{{few}, "block_remainder": true}}',
        f'{{{few}, "block_per_head": true}}',
    ]
    options = ["--settings", *settings, "--baselines", "Tri-shape", "--clips", "1", "--tune", "1", "--lengths", "128"]
    files = [tmp_path / "out.json", "--figure", tmp_path / "out.png"]
    arguments = ["compare_sparse.py", model, data / "test.json", *files, *options]
    monkeypatch.setattr(sys, "argv", list(map(str, arguments)))
    compare_sparse.main()
    result = json.loads((tmp_path / "out.json").read_text())
    rows = {row["method"]: row for row in result["rows"]}
    assert list(rows) == ["dense", *settings, "Tri-shape"]
    assert rows["dense"]["agreement"] == 1.0 and rows["dense"]["error"] == [0.0] * 4
    assert rows[settings[1]]["share"] == rows[settings[1]]["agreement"] == 1.0
    assert max(rows[settings[1]]["error"]) <= 1e-4 < min(rows[settings[0]]["error"])
    share = [rows[setting]["share"] for setting in settings]
    assert share[0] == share[3] < share[2] < 1
    assert abs(rows["Tri-shape"]["share"] - rows[settings[0]]["share"]) < 0.05
    assert (tmp_path / "out.png").stat().st_size > 10_000
    compare_sparse.main()  # again: rows are replaced, not repeated
    assert len(json.loads((tmp_path / "out.json").read_text())["rows"]) == len(rows)
    monkeypatch.setattr(sys, "argv", [*map(str, arguments), "--lengths", "64"])
    with pytest.raises(SystemExit, match=r"--lengths \[64\] must be among those of the data: 128"):
        compare_sparse.main()

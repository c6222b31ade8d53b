"""Text queries of `VisionLayout`: runs of adjacent ones, and the keys that each run is given."""

import pytest
import torch
import torch.nn.functional as F

from videonsa import vision_layout
from videonsa.modeling_videonsa import VideoNSAAttention
from videonsa.vision_layout import TextChunk, VisionLayout


def lay_out(kinds, new=None, valid=None):
    """kinds "ttvv...": one character for each token of a row."""
    vision = torch.tensor([[kind == "v" for kind in row] for row in kinds])
    return VisionLayout.make(vision, new or vision.shape[1], valid)


def dense(layer, q, k, v, layout):
    out = torch.full_like(q, torch.nan)
    for chunk in layout.text_chunks(q.shape[1] // k.shape[1]):
        out[chunk.queries] = layer._dense(q[chunk.queries], k, v, chunk)
    return out


class Layer:
    """What `_dense` reads of its layer."""

    attention_dropout, training, scaling = 0.0, False, 0.3
    _dense = VideoNSAAttention._dense


def test_keys_of_a_run_end_at_its_last_query():
    layout = lay_out(["tttvvvvttvvvvvvvvvvvvvvvvvvvvt"])
    chunks = [(x.queries.tolist(), x.keys) for x in layout.text_chunks(1)]
    assert chunks == [([0, 1, 2], slice(0, 3)), ([7, 8], slice(0, 9)), ([29], slice(0, 30))]


def test_runs_are_joined_where_one_call_costs_no_more():
    """Two queries over 9 keys, and one over 12: the 6 pairs more are fewer than what a call over 9 keys costs."""
    (chunk,) = list(lay_out(["vvvvvvvttvvt"]).text_chunks(1))
    assert (chunk.queries.tolist(), chunk.keys) == ([7, 8, 11], slice(0, 12))
    assert chunk.mask.sum(1).tolist() == [8, 9, 12]


def test_runs_of_several_samples_are_not_joined():
    layout = lay_out(["vvvvtvt", "vvvvtvt"])
    assert [x.queries.tolist() for x in layout.text_chunks(1)] == [[4, 6], [11, 13]]
    vision = torch.tensor([[kind == "v" for kind in "vvvvtvvvvt"]])
    packed = VisionLayout.make(vision, 10, starts=torch.arange(10)[None] % 5 == 0)
    assert [(x.queries.tolist(), x.keys) for x in packed.text_chunks(1)] == [([4], slice(0, 5)), ([9], slice(5, 10))]


@pytest.mark.parametrize(("images", "patches", "words"), [(400, 16, 3), (120, 64, 12), (1000, 1, 1)])
def test_a_chat_of_many_images_makes_few_calls_of_few_pairs(images, patches, words):
    kinds = "t" * 16 + ("v" * patches + "t" * words) * images
    chunks = list(lay_out([kinds]).text_chunks(7))
    assert torch.equal(torch.cat([x.queries for x in chunks]), torch.tensor([c == "t" for c in kinds]).nonzero()[:, 0])
    assert len(chunks) <= 20
    exact = sum(i + 1 for i, kind in enumerate(kinds) if kind == "t")
    assert sum(len(x.queries) * (x.keys.stop - x.keys.start) for x in chunks) <= 1.3 * exact


def test_a_run_from_the_first_token_needs_no_mask():
    masks = [x.mask is None for x in lay_out(["tttvvvvvvtt"]).text_chunks(1)]
    assert masks == [True, False]
    padding = torch.tensor([[False] + [True] * 10])
    assert not any(x.mask is None for x in lay_out(["tttvvvvvvtt"], valid=padding).text_chunks(1))


def test_rows_of_a_batch_and_queries_over_a_cache_are_runs_of_their_own():
    layout = lay_out(["vvvtt", "ttvvt"], new=2)
    assert [(x.queries.tolist(), x.row, x.keys) for x in layout.text_chunks(1)] == [
        ([0, 1], 0, slice(0, 5)),
        ([3], 1, slice(0, 5)),
    ]


def test_chunks_of_a_long_run_end_at_their_own_last_query(monkeypatch):
    monkeypatch.setattr(vision_layout, "MAX_ROWS", 2)
    chunks = [(x.queries.tolist(), x.keys.stop) for x in lay_out(["vttttt"]).text_chunks(1)]
    assert chunks == [([1, 2], 3), ([3, 4], 5), ([5], 6)]


def test_text_rows_are_dense_causal_attention(monkeypatch):
    kinds = ["ttttvvvvvttttttvvt", "vvttttvttttttvvvvt"]
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(2, 6, 18, 8, dtype=torch.float64, generator=generator)
    k, v = torch.randn(2, 2, 2, 18, 8, dtype=torch.float64, generator=generator)
    expected = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True, scale=0.3)
    is_text = torch.tensor([[kind == "t" for kind in row] for row in kinds]).flatten()
    rows = q.transpose(1, 2).flatten(0, 1)
    for max_rows in (256, 2):
        monkeypatch.setattr(vision_layout, "MAX_ROWS", max_rows)
        out = dense(Layer(), rows, k, v, lay_out(kinds))
        torch.testing.assert_close(
            out[is_text], expected.transpose(1, 2).flatten(0, 1)[is_text], rtol=1e-12, atol=1e-12
        )
        assert out[~is_text].isnan().all()


def test_a_whole_run_over_more_keys_is_causal_from_its_end():
    """As a GPU computes it: one call for a run, without a mask of ours."""
    q, k, v = (torch.randn(shape, dtype=torch.float64) for shape in ((3, 6, 8), (1, 2, 9, 8), (1, 2, 9, 8)))
    chunk = TextChunk(torch.arange(3), 0, slice(1, 9), None)
    mask = torch.arange(8) <= torch.arange(5, 8)[:, None]
    expected = Layer()._dense(q, k, v, TextChunk(torch.arange(3), 0, slice(1, 9), mask))
    torch.testing.assert_close(Layer()._dense(q, k, v, chunk), expected, rtol=1e-12, atol=1e-12)

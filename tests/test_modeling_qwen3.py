"""What Qwen3-VL alone has: positions of the stock class, a stream interrupted by text, and what is refused. What it
shares with Qwen2.5-VL is tested beside it, by the fixtures `model` and `both`."""

import json

import pytest
import torch

import videonsa
from prompts import IMAGE, MIXED, TEXT, VIDEO, assert_close, embed, is_vision, logits, make_inputs
from videonsa.configuration_videonsa_qwen3 import VideoNSAQwen3Config, VideoNSAQwen3TextConfig


@pytest.fixture
def backbone(inputs_for):
    inputs_for("Qwen3-VL")
    return "Qwen3-VL"


@pytest.mark.parametrize("padding", ["left", "right"])
def test_positions_are_those_of_the_stock_class(both, padding):
    inputs = make_inputs(MIXED, TEXT, VIDEO, IMAGE, padding=padding)
    ours, theirs = (each.model.get_rope_index(**inputs) for each in both)
    assert torch.equal(ours[0], theirs[0]) and torch.equal(ours[1], theirs[1])
    del inputs["mm_token_type_ids"]
    assert torch.equal(both[0].model.get_rope_index(**inputs)[0], theirs[0])


@torch.no_grad()
def test_patches_of_a_video_are_one_stream_of_vision_tokens(model):
    inputs, layouts = make_inputs(VIDEO, MIXED), []
    model(**inputs, observe=lambda attention, q, k, v, gates, layout: layouts.append(layout) or gates)
    (layout, _), vision = layouts, is_vision(inputs)
    assert layout.cu_seqlens.tolist() == [0, 192, 192 + int(vision[1].sum())]
    assert torch.equal(layout.queries, vision.flatten().nonzero()[:, 0])
    # A patch has 16 tokens, as a block; before each of them stand two marks and the digits of its number.
    assert layout.text_seen[:192:16].diff().tolist() == [3] * 9 + [4, 4]


def test_the_vision_tower_and_deepstack_have_gradients(model):
    inputs = make_inputs(VIDEO)
    model.train()(**inputs, labels=inputs["input_ids"]).loss.backward()
    assert all(p.grad.abs().sum() > 0 for p in model.model.visual.deepstack_merger_list.parameters())


@pytest.mark.parametrize("wrong", ["size", "count", "no text between"])
def test_grids_that_do_not_fit_the_placeholders_are_refused(model, wrong):
    inputs = make_inputs(TEXT, VIDEO)
    message = "video_grid_thw does not fit the video placeholders of sample 1: a run has 16, where "
    if wrong == "size":
        inputs["video_grid_thw"][0, 1] = 2
        message += "8 are due"
    elif wrong == "count":
        inputs["video_grid_thw"][0, 0] = 11
        message += "none is due"
    else:
        inputs["mm_token_type_ids"][1] = inputs["mm_token_type_ids"][1].sort().values
        message = "a run has 192, where 16 are due. Text must stand between"
    with pytest.raises(ValueError, match=message):
        model.model.get_rope_index(**inputs)


@torch.no_grad()
def test_embeddings_that_hold_features_lack_those_of_deepstack(both):
    ours, theirs = both
    inputs = make_inputs(VIDEO)
    call = {"inputs_embeds": embed(ours, inputs), "mm_token_type_ids": inputs["mm_token_type_ids"]}
    call["position_ids"], _ = ours.model.get_rope_index(**inputs)
    with pytest.raises(ValueError, match="lack those of deepstack.*pass input_ids with pixel_values"):
        ours(**call)
    ours.config.nsa_variant = "dense"
    assert torch.equal(ours(**call).logits, logits(theirs, call))
    # Text alone, and placeholders with pixels, lose nothing.
    ours.config.nsa_variant = "paper"
    text = make_inputs(TEXT)
    embeds, types = ours.get_input_embeddings()(text["input_ids"]), text["mm_token_type_ids"]
    assert_close(ours(inputs_embeds=embeds, mm_token_type_ids=types).logits, logits(ours, text))


def test_sequence_parallelism_is_refused(model):
    with pytest.raises(ValueError, match="shard_sequence needs a Qwen2.5-VL backbone"):
        model.shard_sequence(object())
    model.shard_sequence(None)


def test_the_configuration_is_saved_with_its_own_types(qwen3_checkpoint, tmp_path):
    config = VideoNSAQwen3Config.from_pretrained(qwen3_checkpoint, block_count=7)
    assert isinstance(config.text_config, VideoNSAQwen3TextConfig) and config.block_count == 7
    config.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    assert (saved["model_type"], saved["text_config"]["model_type"]) == ("videonsa_qwen3", "videonsa_qwen3_text")
    assert saved["auto_map"]["AutoModel"] == "modeling_videonsa_qwen3.VideoNSAQwen3ForConditionalGeneration"
    assert VideoNSAQwen3Config.from_pretrained(tmp_path).to_dict() == config.to_dict()


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"nsa_variant": "released"}, "nsa_variant must be one of paper, merged, dense; got 'released'"),
        ({"block_causal": True}, "block_causal belong to nsa_variant='released'"),
        ({"truncate_seconds": True}, "truncate_seconds and .* belong to nsa_variant='released'"),
    ],
    ids=str,
)
def test_what_belongs_to_the_released_variant_is_refused(bad, message):
    for make in (VideoNSAQwen3Config, VideoNSAQwen3TextConfig):
        with pytest.raises(ValueError, match=message):
            make(**bad)


@pytest.mark.parametrize("kind", ["qwen3_vl_moe", "qwen2_5_vl"])
def test_another_backbone_is_refused(tmp_path, kind):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": kind}))
    with pytest.raises(ValueError, match=f"model_type must be qwen3_vl .*no mixture of experts.*got {kind}"):
        videonsa.model_class("qwen3_vl").from_pretrained(tmp_path)
    with pytest.raises(ValueError, match="model_type must be one of videonsa, qwen2_5_vl, .*'qwen3_vl_moe'"):
        videonsa.config_class("qwen3_vl_moe")

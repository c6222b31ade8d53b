"""configuration_videonsa.py: defaults, where fields may stand, what is refused, the budget of attention pairs."""

import json
from fractions import Fraction

import pytest
from transformers import Qwen2_5_VLConfig

from videonsa.configuration_videonsa import NSA_FIELDS, VideoNSAConfig, VideoNSATextConfig

DEFAULTS = {
    "block_size": 64,
    "block_count": 32,
    "block_spread": True,
    "block_per_head": False,
    "block_remainder": False,
    "window_size": 256,
    "gate_temperature": 1.0,
    "nsa_variant": "paper",
    "truncate_seconds": None,
    "block_causal": False,
    "nsa_backend": "auto",
}
OTHERS = {
    "block_size": 16,
    "block_count": 5,
    "block_spread": False,
    "block_per_head": True,
    "block_remainder": True,
    "window_size": 20,
    "gate_temperature": 0.3,
    "nsa_variant": "dense",
    "truncate_seconds": True,
    "block_causal": True,
    "nsa_backend": "torch",
}


def fields(config):
    return {name: getattr(config, name) for name in NSA_FIELDS}


def save(config: dict, folder):
    """Write a configuration as a checkpoint brings it; returns the folder."""
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    return folder


# ----------------------------------------------------------------------------------------------------------------------
# Fields
# ----------------------------------------------------------------------------------------------------------------------


def test_defaults_are_those_of_the_paper():
    assert fields(VideoNSATextConfig()) == fields(VideoNSAConfig()) == DEFAULTS


def test_fields_may_be_given_at_the_top_or_in_the_text_config():
    for config in (VideoNSAConfig(**OTHERS), VideoNSAConfig(text_config=OTHERS)):
        assert fields(config) == fields(config.text_config) == OTHERS


@pytest.mark.parametrize("name", NSA_FIELDS)
def test_fields_of_the_whole_configuration_are_those_of_the_text_config(name):
    config = VideoNSAConfig()
    setattr(config, name, OTHERS[name])
    assert getattr(config.text_config, name) == OTHERS[name]
    setattr(config.text_config, name, DEFAULTS[name])
    assert getattr(config, name) == DEFAULTS[name]


def test_window_of_the_vision_tower_is_its_own():
    config = VideoNSAConfig(window_size=20, vision_config={"window_size": 112})
    assert (config.window_size, config.text_config.window_size, config.vision_config.window_size) == (20, 20, 112)
    config.window_size = 30
    assert config.vision_config.window_size == 112


def test_saved_configuration_loads_with_equal_fields(tmp_path):
    config = VideoNSAConfig(**OTHERS)
    config.save_pretrained(tmp_path)
    loaded = VideoNSAConfig.from_pretrained(tmp_path)
    assert fields(loaded) == OTHERS
    assert loaded.to_dict() == config.to_dict()


def test_fields_are_saved_once_in_the_text_config(tmp_path):
    VideoNSAConfig(**OTHERS).save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    assert OTHERS.items() <= saved["text_config"].items()
    assert not {*NSA_FIELDS, "block_counts"} & saved.keys()
    assert "block_counts" not in saved["text_config"]
    assert (saved["model_type"], saved["text_config"]["model_type"]) == ("videonsa", "videonsa_text")
    assert saved["auto_map"]["AutoModel"] == "modeling_videonsa.VideoNSAForConditionalGeneration"


@pytest.mark.parametrize("place", ["top level", "text_config", "flat"])
def test_names_of_the_public_checkpoint_are_understood_wherever_they_stand(tmp_path, published_config, place):
    legacy = {"block_counts": 8, "window_size": 100}
    text = {"hidden_size": 112, "num_attention_heads": 7, "num_key_value_heads": 1, "num_hidden_layers": 2}
    config = {
        "top level": {"text_config": text, **legacy},
        "text_config": {"text_config": {**text, **legacy}},
        "flat": {**published_config, **legacy, **text},
    }[place]
    loaded = VideoNSAConfig.from_pretrained(save({"model_type": "qwen2_5_vl", **config}, tmp_path))
    assert fields(loaded) == {**DEFAULTS, "block_count": 8, "window_size": 100}
    assert loaded.block_counts == loaded.text_config.block_counts == 8
    assert loaded.text_config.hidden_size == 112
    assert loaded.vision_config.window_size == 112


def test_published_flat_configuration_keeps_its_values(tmp_path, published_config):
    config = VideoNSAConfig.from_pretrained(save(published_config, tmp_path))
    text = config.text_config
    assert (text.hidden_size, text.num_attention_heads, text.num_key_value_heads) == (3584, 28, 4)
    assert text.rope_parameters["mrope_section"] == [16, 24, 24]
    assert text.rope_parameters["rope_theta"] == 1000000.0
    assert set(text.layer_types) == {"full_attention"}
    assert (config.image_token_id, config.video_token_id) == (151655, 151656)
    assert config.tie_word_embeddings is False
    assert (config.vision_config.depth, config.vision_config.tokens_per_second) == (32, 2)


@pytest.mark.parametrize("given", ["object", "folder"])
def test_stock_configuration_becomes_a_videonsa_configuration(stock_checkpoint, given):
    stock = Qwen2_5_VLConfig.from_pretrained(stock_checkpoint)
    if given == "folder":
        config = VideoNSAConfig.from_pretrained(stock_checkpoint)
    else:
        config = VideoNSAConfig(**stock.to_dict())
    assert (config.model_type, config.text_config.model_type) == ("videonsa", "videonsa_text")
    assert isinstance(config.text_config, VideoNSATextConfig)
    assert fields(config) == DEFAULTS
    ours, theirs = config.text_config.to_dict(), stock.text_config.to_dict()
    assert {k: v for k, v in ours.items() if k in theirs and k != "model_type"}.items() <= theirs.items()
    assert config.vision_config.to_dict() == stock.vision_config.to_dict()


def test_autoconfig_loads_remote_code_in_a_fresh_process(tmp_path, run_fresh):
    program = """if True:
        import sys
        from transformers import AutoConfig
        config = AutoConfig.from_pretrained(sys.argv[1], trust_remote_code=True, window_size=33)
        assert type(config).__name__ == "VideoNSAConfig" and type(config).__module__.startswith("transformers_modules")
        assert type(config.text_config).__name__ == "VideoNSATextConfig"
        config.save_pretrained(sys.argv[2])
        print(config.block_size, config.nsa_variant, config.window_size, config.text_config.attention_budget(128000))
    """
    VideoNSAConfig(block_size=32, nsa_variant="dense").save_pretrained(tmp_path / "first")
    assert run_fresh(program, tmp_path / "first", tmp_path / "second").split() == ["32", "dense", "33", "1.0"]
    assert (tmp_path / "second" / "configuration_videonsa.py").exists()
    assert fields(VideoNSAConfig.from_pretrained(tmp_path / "second"))["window_size"] == 33


# ----------------------------------------------------------------------------------------------------------------------
# What is refused
# ----------------------------------------------------------------------------------------------------------------------

BAD = [
    *(({"block_size": value}, "block_size") for value in (8, 0, -64, 48, 64.0, True, None)),
    *(({"block_count": value}, "block_count") for value in (2, 0, 32.0)),
    *(({"block_counts": value}, "block_count") for value in (2, "32")),
    *(({"window_size": value}, "window_size") for value in (0, -1, 1.5)),
    *(({"gate_temperature": value}, "gate_temperature") for value in (0, -0.3, float("nan"), "1", None)),
    ({"nsa_variant": "sparse"}, "nsa_variant.*paper, released, merged, dense.*'sparse'"),
    ({"nsa_backend": "cuda"}, "nsa_backend.*auto, triton, torch.*'cuda'"),
    ({"truncate_seconds": "no"}, "truncate_seconds.*'no'"),
    ({"block_causal": 1}, "block_causal.*1"),
]
BAD_TEXT = [
    *BAD,
    ({"num_attention_heads": 7, "num_key_value_heads": 2}, "num_attention_heads.*num_key_value_heads.*7 and 2"),
]


@pytest.mark.parametrize(("bad", "message"), BAD_TEXT, ids=str)
def test_bad_field_is_refused_and_named(bad, message):
    with pytest.raises(ValueError, match=message):
        VideoNSATextConfig(**bad)
    with pytest.raises(ValueError, match=message):
        VideoNSAConfig(text_config=bad)


@pytest.mark.parametrize(("bad", "message"), BAD, ids=str)
def test_bad_field_at_the_top_is_refused_and_named(bad, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        VideoNSAConfig(**bad)
    with pytest.raises(ValueError, match=message):
        VideoNSAConfig.from_pretrained(save({"model_type": "qwen2_5_vl", **bad}, tmp_path))


@pytest.mark.parametrize("variant", ["paper", "released", "merged", "dense"])
def test_known_variants_make_a_configuration(variant):
    assert VideoNSAConfig(nsa_variant=variant).text_config.nsa_variant == variant


# ----------------------------------------------------------------------------------------------------------------------
# Attention budget
# ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pooled_keys", [False, True])
@pytest.mark.parametrize("settings", [(16, 3, 1), (16, 4, 20), (16, 5, 100), (32, 3, 7), (64, 32, 256)], ids=str)
def test_attention_budget_is_the_sum_over_queries(settings, pooled_keys):
    block_size, block_count, window_size = settings
    config = VideoNSATextConfig(block_size=block_size, block_count=block_count, window_size=window_size)
    computed = dense = 0
    for i in range(3000):
        dense += i + 1
        computed += min(i + 1, block_count * block_size) + min(i + 1, window_size)
        computed += (i + 1) // block_size if pooled_keys else 0
        if i < 200 or i % 37 == 0:
            assert config.attention_budget(i + 1, pooled_keys) == float(Fraction(computed, dense))


def test_attention_budget_at_128000_tokens_is_that_of_the_paper():
    config = VideoNSAConfig()
    assert round(config.attention_budget(128_000), 3) == 0.036
    assert round(config.attention_budget(128_000, pooled_keys=True), 3) == 0.051
    assert config.attention_budget(128_000) == config.text_config.attention_budget(128_000)


def test_attention_budget_of_dense_attention_is_one():
    config = VideoNSAConfig(nsa_variant="dense")
    assert [config.attention_budget(n) for n in (1, 100, 10**6)] == [1.0, 1.0, 1.0]


@pytest.mark.parametrize("n", [0, -5])
@pytest.mark.parametrize("variant", ["paper", "released", "dense"])
def test_attention_budget_needs_a_token(variant, n):
    with pytest.raises(ValueError, match=f"n_tokens must be at least 1, got {n}"):
        VideoNSAConfig(nsa_variant=variant).attention_budget(n)


@pytest.mark.parametrize("block_causal", [False, True])
@pytest.mark.parametrize("n", [1, 15, 16, 17, 100])
def test_attention_budget_of_the_released_variant_counts_heads_and_their_copies(n, block_causal):
    sizes = {"block_size": 16, "block_count": 3, "window_size": 20}
    config = VideoNSAConfig(nsa_variant="released", block_causal=block_causal, **sizes)
    pairs = sum(min(i + 1, 48) + min(i + 1, 20) for i in range(n))
    blocks = -(-n // 16)
    pooled = sum(i // 16 + 1 if block_causal else blocks - i // 16 for i in range(n))
    assert config.attention_budget(n) == 2 * pairs / (n * (n + 1) // 2)
    assert config.attention_budget(n, pooled_keys=True) == 2 * (pairs + pooled) / (n * (n + 1) // 2)


def test_the_layout_of_the_public_checkpoint_is_recognised_and_what_it_says_is_honoured(published_config, tmp_path):
    public = {**published_config, "architectures": ["VideoNSAForConditionalGeneration"]}
    config = VideoNSAConfig.from_pretrained(save({**public, "block_counts": 16, "window_size": 128}, tmp_path))
    assert (config.nsa_variant, config.gate_temperature) == ("released", 0.3)
    assert (config.block_size, config.block_count, config.window_size) == (64, 16, 128)
    assert config.text_config.cuts_seconds() and not config.block_causal
    nothing = VideoNSAConfig.from_pretrained(save({**public, "block_counts": None, "window_size": None}, tmp_path))
    assert (nothing.block_count, nothing.window_size) == (32, 256)
    exact = VideoNSAConfig.from_pretrained(tmp_path, truncate_seconds=False)
    assert exact.nsa_variant == "released" and not exact.text_config.cuts_seconds()
    paper = VideoNSAConfig.from_pretrained(tmp_path, nsa_variant="paper")
    assert (paper.gate_temperature, paper.text_config.cuts_seconds()) == (0.3, False)
    config.save_pretrained(tmp_path / "saved")
    saved = VideoNSAConfig.from_pretrained(tmp_path / "saved")
    assert (saved.nsa_variant, saved.gate_temperature, saved.block_count) == ("released", 0.3, 16)
    stock = VideoNSAConfig.from_pretrained(save(published_config, tmp_path))
    assert (stock.nsa_variant, stock.gate_temperature) == ("paper", 1.0) and not stock.text_config.cuts_seconds()


@pytest.mark.parametrize("heads", [8, 18])
def test_heads_that_do_not_fill_the_padding_of_the_released_variant_are_refused_by_models(heads):
    config = VideoNSATextConfig(nsa_variant="released", num_attention_heads=heads, num_key_value_heads=2)
    with pytest.raises(ValueError, match=f"num_attention_heads must be in 9 ... 16.*got {heads}"):
        config.validate_variant()


def test_a_configuration_of_another_backbone_names_what_loads_it(tmp_path):
    for kind in ("qwen3_vl", "qwen3_vl_moe", "videonsa_qwen3"):
        (tmp_path / "config.json").write_text(json.dumps({"model_type": kind}))
        with pytest.raises(ValueError, match=f"got {kind}: load it by AutoModel or videonsa.model_class"):
            VideoNSAConfig.from_pretrained(tmp_path)

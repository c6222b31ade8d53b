"""Loading and saving of a model: stock, public and own checkpoints, remote code in fresh processes, offloaded layers,
low precision; settings that do not fit are refused."""

import json
from copy import deepcopy
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from conftest import ROOT
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText

import videonsa
from prompts import GATES, MIXED, TEXT, VIDEO, generate, logits, make_inputs, unpad
from videonsa.configuration_videonsa import VideoNSAConfig, is_public
from videonsa.modeling_videonsa import VideoNSAForConditionalGeneration
from videonsa.vision_attention import untrained_gates

TYPES = {"Qwen2.5-VL": "videonsa", "Qwen3-VL": "videonsa_qwen3"}


def test_stock_checkpoint_loads_with_only_the_gates_missing(checkpoints, backbone):
    stock = AutoModelForImageTextToText.from_pretrained(checkpoints[backbone])
    ours = videonsa.model_class(stock.config.model_type)
    model, info = ours.from_pretrained(checkpoints[backbone], output_loading_info=True)
    assert set(info["missing_keys"]) == GATES
    assert not info["unexpected_keys"]
    assert not info["mismatched_keys"]
    ours, theirs = model.state_dict(), stock.state_dict()
    assert ours.keys() - theirs.keys() == GATES
    assert all(torch.equal(ours[key], value) for key, value in theirs.items())
    assert model.config.model_type == TYPES[backbone]
    assert isinstance(model.config, videonsa.config_class(TYPES[backbone]))
    assert model.lm_head.weight is model.model.language_model.embed_tokens.weight


def test_model_without_head_loads_the_same_weights(checkpoints, backbone, model, tmp_path):
    base = type(model.model)
    _, info = base.from_pretrained(checkpoints[backbone], output_loading_info=True)
    assert set(info["missing_keys"]) == {name.removeprefix("model.") for name in GATES}
    model.save_pretrained(tmp_path / "old")
    model.save_pretrained(tmp_path / "new", save_original_format=False)
    for folder in ("old", "new"):
        loaded, info = base.from_pretrained(tmp_path / folder, output_loading_info=True)
        assert not info["missing_keys"]
        assert set(info["unexpected_keys"]) <= {"lm_head.weight"}
        assert all(torch.equal(value, model.model.state_dict()[key]) for key, value in loaded.state_dict().items())


def test_a_subclass_loads_and_saves_as_its_base_does(checkpoints, backbone, model, tmp_path):
    # transformers looks key layouts up by the name.
    own = type(f"My{type(model).__name__}", (type(model),), {})
    model.save_pretrained(tmp_path / "base")
    for folder in (checkpoints[backbone], tmp_path / "base"):
        loaded = own.from_pretrained(folder)
        loaded.save_pretrained(tmp_path / "own")
        saved = [load_file(tmp_path / name / "model.safetensors") for name in ("own", "base")]
        assert saved[0].keys() == saved[1].keys()
    state = model.state_dict()
    assert all(torch.equal(value, state[key]) for key, value in loaded.state_dict().items())


@pytest.mark.parametrize("made", ["loaded", "from a configuration"])
def test_new_gates_are_small_whatever_the_initializer_range(checkpoints, made):
    folder = checkpoints["Qwen2.5-VL"]
    if made == "loaded":
        model = VideoNSAForConditionalGeneration.from_pretrained(folder)
    else:
        config = VideoNSAConfig.from_pretrained(folder)
        config.text_config.initializer_range = 0.5
        model = VideoNSAForConditionalGeneration(config)
        assert model.model.language_model.layers[0].mlp.up_proj.weight.std() > 0.4
    for name, value in model.named_parameters():
        if "g_proj" in name and name.endswith("bias"):
            assert not value.any()
        elif "g_proj" in name:
            assert abs(value.std() - 0.02) < 0.001
            assert abs(value.mean()) < 0.002


def test_gates_start_at_one_half(checkpoints):
    model = VideoNSAForConditionalGeneration.from_pretrained(checkpoints["Qwen2.5-VL"])
    gates = model.model.language_model.layers[0].self_attn.gates(torch.randn(50, 112))
    assert (gates - 0.5).abs().max() < 0.1


UNTRAINED = "gates of this checkpoint are untrained"


@pytest.mark.parametrize("source", ["stock", "converted"])
def test_untrained_gates_are_told_once_when_they_are_needed(stock_checkpoint, tiny_repository, caplog, source):
    folder = stock_checkpoint if source == "stock" else tiny_repository
    inputs = make_inputs(VIDEO)
    for variant in ("dense", "merged"):
        logits(VideoNSAForConditionalGeneration.from_pretrained(folder, nsa_variant=variant, block_count=6), inputs)

    model = VideoNSAForConditionalGeneration.from_pretrained(folder)
    logits(model, make_inputs(TEXT))
    model.train()
    logits(model, inputs)
    assert UNTRAINED not in caplog.text

    model.eval()
    for _ in range(2):
        logits(model, inputs)
    assert caplog.text.count(UNTRAINED) == 1
    assert all(f'nsa_variant="{variant}"' in caplog.text for variant in ("paper", "dense", "merged"))
    assert "fine-tune it" in caplog.text


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_trained_gates_are_told_from_new_ones(stock_checkpoint, caplog, dtype):
    model = VideoNSAForConditionalGeneration.from_pretrained(stock_checkpoint, dtype=dtype)
    layers = [layer.self_attn for layer in model.model.language_model.layers]
    assert untrained_gates(layers)

    other = deepcopy(layers)
    with torch.no_grad():
        other[-1].g_proj_2.weight.mul_(1.5)
    assert not untrained_gates(other)

    inputs = make_inputs(VIDEO)
    gates = [parameter for name, parameter in model.named_parameters() if "g_proj" in name]
    optimizer = torch.optim.AdamW(gates, lr=1e-5)
    model.train()
    model(**inputs, labels=inputs["input_ids"]).loss.backward()
    optimizer.step()
    assert not untrained_gates(layers)
    logits(model.eval(), inputs)
    assert UNTRAINED not in caplog.text


def test_gates_of_the_tiny_model_are_trained():
    folder = Path(__file__).resolve().parents[1] / "examples/tiny"
    model = VideoNSAForConditionalGeneration.from_pretrained(folder)
    assert not untrained_gates([layer.self_attn for layer in model.model.language_model.layers])


@pytest.mark.parametrize("door", ["class", "AutoConfig"])
def test_a_variant_given_to_load_is_not_that_of_the_saved_checkpoint(tiny_repository, tmp_path, door):
    def load(folder, **options):
        if door == "class":
            return VideoNSAForConditionalGeneration.from_pretrained(folder, **options)
        config = VideoNSAConfig.from_pretrained(folder, **options)
        return VideoNSAForConditionalGeneration.from_pretrained(folder, config=config)

    def saved(model) -> dict:
        model.save_pretrained(tmp_path / "saved")
        return json.loads((tmp_path / "saved/config.json").read_text())["text_config"]

    model = load(tiny_repository, nsa_variant="dense", block_count=4)
    for _ in range(2):
        config = saved(model)
        assert config["nsa_variant"] == "paper" and config["block_count"] == 4
        assert not [name for name in config if "checkpoint" in name]
    assert model.config.nsa_variant == model.model.language_model.layers[0].self_attn.config.nsa_variant == "dense"
    assert saved(load(tmp_path / "saved"))["nsa_variant"] == "paper"
    # Two ways to change it on purpose, and a model that has no gates for another variant.
    model.config.nsa_variant = "dense"
    assert saved(model)["nsa_variant"] == "dense"
    model = load(tiny_repository, nsa_variant="dense")
    model.config.text_config.nsa_variant = "released"
    assert saved(model)["nsa_variant"] == "released"
    assert saved(load(tiny_repository, nsa_variant="merged", block_count=4))["nsa_variant"] == "merged"


def test_a_stock_checkpoint_is_saved_with_the_variant_given(stock_checkpoint, tmp_path):
    VideoNSAForConditionalGeneration.from_pretrained(stock_checkpoint, nsa_variant="dense").save_pretrained(tmp_path)
    assert VideoNSAConfig.from_pretrained(tmp_path).nsa_variant == "dense"


def test_saved_model_loads_with_equal_logits_and_brings_its_code(backbone, model, tmp_path):
    model.save_pretrained(tmp_path)
    loaded, info = type(model).from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    inputs = make_inputs(VIDEO, MIXED)
    assert torch.equal(logits(loaded.eval(), inputs), logits(model, inputs))
    assert all(torch.equal(loaded.state_dict()[key], model.state_dict()[key]) for key in GATES)
    of_the_processor = {"processing_videonsa.py", *(path.name for path in ROOT.glob("video_*.py"))}
    of_qwen3 = {path.name for path in ROOT.glob("*_qwen3.py")}
    others = of_qwen3 if backbone == "Qwen2.5-VL" else {"modeling_videonsa.py", "rope_positions.py"}
    names = {path.name for path in ROOT.glob("*.py")} - of_the_processor - others - {"__init__.py"}
    assert {path.name for path in tmp_path.glob("*.py")} == names
    config = json.loads((tmp_path / "config.json").read_text())
    assert (config["model_type"], config["architectures"]) == (TYPES[backbone], [type(model).__name__])
    keys = load_file(tmp_path / "model.safetensors").keys()
    # Of Qwen2.5-VL, the names of the public checkpoint.
    parts = ("model.language_model.", "model.") if backbone == "Qwen2.5-VL" else ("", "")
    assert {key.replace(*parts) for key in GATES} <= keys


def write_public_checkpoint(model, folder, published, style):
    """The layout of the public checkpoint: keys and configuration of transformers 4.x with the gates added."""

    def old_name(key):
        return key.replace("model.visual.", "visual.").replace("model.language_model.", "model.")

    def ours(config, published):  # published values replaced by those of the miniature
        return {name: getattr(config, name, value) for name, value in published.items()}

    rope = model.config.text_config.rope_parameters
    tokens = [f"{name}_token_id" for name in ("image", "video", "vision_start", "vision_end")]
    top = {
        **{name: published[name] for name in ("model_type", "transformers_version", "tie_word_embeddings")},
        **{name: getattr(model.config, name) for name in tokens},
        "architectures": ["VideoNSAForConditionalGeneration"],
        "vision_config": ours(model.config.vision_config, published["vision_config"]),
        "torch_dtype": "float32",
        "block_size": model.config.block_size,  # the public one has the default; the miniature needs small blocks
    }
    text = {name: value for name, value in ours(model.config.text_config, published).items() if name not in top}
    text |= {
        "rope_theta": rope["rope_theta"],
        "rope_scaling": {"type": "mrope", "mrope_section": rope["mrope_section"]},
    }
    legacy = {"block_counts": model.config.block_count, "window_size": model.config.window_size}
    config = {
        "flat": {**text, **top, **legacy},
        "text_config": {**top, "text_config": {**text, **legacy, "model_type": "qwen2_5_vl_text"}},
        "text_config, settings at the top": {**top, **legacy, "text_config": text},
        "both": {**text, **top, **legacy, "text_config": text},
    }[style]
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    save_file({old_name(key): value.clone() for key, value in model.state_dict().items()}, folder / "model.safetensors")


@pytest.mark.parametrize("style", ["flat", "text_config", "text_config, settings at the top", "both"])
def test_checkpoint_in_the_public_layout_loads_whole(small, published_config, tmp_path, style):
    write_public_checkpoint(small, tmp_path / "public", published_config, style)
    assert is_public(json.loads((tmp_path / "public" / "config.json").read_text()))
    same = {"nsa_variant": "paper", "gate_temperature": 1.0}
    loaded, info = VideoNSAForConditionalGeneration.from_pretrained(
        tmp_path / "public", output_loading_info=True, **same
    )
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert not info["mismatched_keys"]
    assert loaded.dtype == torch.float32
    inputs = make_inputs(VIDEO, MIXED)
    assert torch.equal(logits(loaded.eval(), inputs), logits(small, inputs))


def test_new_key_layout_loads_whole(small, tmp_path):
    small.save_pretrained(tmp_path, save_original_format=False)
    assert load_file(tmp_path / "model.safetensors").keys() >= GATES
    loaded, info = VideoNSAForConditionalGeneration.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert torch.equal(logits(loaded.eval(), make_inputs(VIDEO)), logits(small, make_inputs(VIDEO)))


def test_state_dict_with_saved_names_loads_into_a_model(small, tmp_path):
    small.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "model.safetensors")
    other = deepcopy(small)
    for weight in other.parameters():
        weight.data.zero_()
    result = other.load_state_dict(saved, strict=False)
    assert set(result.missing_keys) <= {"lm_head.weight"}  # tied, therefore not saved
    assert not result.unexpected_keys
    assert torch.equal(logits(other, make_inputs(VIDEO)), logits(small, make_inputs(VIDEO)))
    assert small.load_state_dict(small.state_dict()).missing_keys == []


def test_copied_model_computes_the_same(model):
    inputs = make_inputs(VIDEO)
    assert torch.equal(logits(deepcopy(model), inputs), logits(model, inputs))


def test_low_precision_model_is_close_to_fp32(small):
    inputs = make_inputs(VIDEO, TEXT)
    expected = logits(small, inputs)
    actual = logits(deepcopy(small).to(torch.bfloat16), inputs)
    assert actual.dtype == torch.bfloat16
    for a, b in zip(unpad(actual.float(), inputs), unpad(expected, inputs), strict=True):
        assert ((a - b).pow(2).mean() / b.pow(2).mean()).sqrt() < 0.1


REMOTE = """if True:
    import sys, torch
    from transformers import AutoConfig, AutoModel, AutoModelForImageTextToText
    folder, again, name = sys.argv[1:]
    inputs = torch.load(folder + "/inputs.pt")
    expected = inputs.pop("expected")
    assert type(AutoConfig.from_pretrained(folder, trust_remote_code=True)).__name__ == name + "Config"
    for auto in (AutoModel, AutoModelForImageTextToText):
        model = auto.from_pretrained(folder, trust_remote_code=True).eval()
        assert type(model).__name__ == name + "ForConditionalGeneration"
        assert type(model).__module__.startswith("transformers_modules.")
        assert type(model.config).__name__ == name + "Config"
        assert not any(name.split(".")[0] == "videonsa" for name in sys.modules)
        with torch.no_grad():
            assert torch.equal(model(**inputs).logits, expected)
        print(auto.__name__, model.generate(**inputs, max_new_tokens=4, do_sample=False)[0, -4:].tolist())
    dense = AutoModel.from_pretrained(folder, trust_remote_code=True, nsa_variant="dense").eval()
    assert dense.config.text_config.nsa_variant == dense.model.language_model.layers[0].self_attn.config.nsa_variant
    with torch.no_grad():
        assert (dense(**inputs).logits - expected).abs().max() > 0.1
    model.save_pretrained(again)
    torch.save({**inputs, "expected": expected}, again + "/inputs.pt")
"""


def test_remote_code_loads_generates_and_saves_in_fresh_processes(backbone, model, tmp_path, run_fresh):
    inputs = make_inputs(VIDEO)
    folders = [tmp_path / name for name in ("first", "second", "third")]
    folders = folders if backbone == "Qwen2.5-VL" else folders[:2]  # what a saved one saves does not depend on it
    model.save_pretrained(folders[0])
    torch.save({**inputs, "expected": logits(model, inputs)}, folders[0] / "inputs.pt")
    tokens = generate(model, inputs, 4).new_tokens[0].tolist()
    name = type(model).__name__.removesuffix("ForConditionalGeneration")
    for folder, again in pairwise(folders):
        lines = run_fresh(REMOTE, folder, again, name).splitlines()
        assert lines == [f"AutoModel {tokens}", f"AutoModelForImageTextToText {tokens}"]
    files = [{path.name for path in folder.iterdir()} for folder in folders]
    assert files[1:] == files[:-1]


def test_gates_survive_the_hooks_of_accelerate(checkpoints):
    from accelerate import dispatch_model

    model = VideoNSAForConditionalGeneration.from_pretrained(checkpoints["Qwen2.5-VL"]).eval()
    devices = dict.fromkeys(("model.visual", "model.language_model", "lm_head"), "cpu")
    dispatch_model(model, devices, force_hooks=True)
    assert len(model(**make_inputs(VIDEO), output_gates=True).gates) == len(model.model.language_model.layers)


def test_offloaded_model_computes_the_same(small, tmp_path):
    inputs = make_inputs(VIDEO, TEXT)
    small.save_pretrained(tmp_path / "saved")
    layers = {f"model.language_model.layers.{i}": place for i, place in enumerate(("cpu", "disk"))}
    rest = ("embed_tokens", "norm", "rotary_emb")
    places = {"model.visual": "disk", "lm_head": "cpu", **layers, **{f"model.language_model.{x}": "cpu" for x in rest}}
    loaded = VideoNSAForConditionalGeneration.from_pretrained(
        tmp_path / "saved", device_map=places, offload_folder=tmp_path / "offload"
    )
    assert loaded.model.language_model.layers[1].self_attn.g_proj_1.weight.device.type == "meta"
    assert torch.equal(logits(loaded.eval(), inputs), logits(small, inputs))


# ----------------------------------------------------------------------------------------------------------------------
# Errors
# ----------------------------------------------------------------------------------------------------------------------

BAD = {
    "nsa_variant": "sparse",
    "nsa_backend": "cuda",
    "block_size": 48,
    "block_count": 2,
    "window_size": 0,
    "gate_temperature": 0.0,
}


@pytest.mark.parametrize("given", ["to from_pretrained", "afterwards", "afterwards on the text config"])
@pytest.mark.parametrize("name", BAD)
def test_bad_settings_are_refused_when_a_model_is_made(checkpoints, name, given):
    folder, message = checkpoints["Qwen2.5-VL"], f"{name} must be .*{BAD[name]}"
    if given == "to from_pretrained":
        with pytest.raises(ValueError, match=message):
            VideoNSAForConditionalGeneration.from_pretrained(folder, **{name: BAD[name]})
        return
    config = VideoNSAConfig.from_pretrained(folder)
    if given == "afterwards":
        before = getattr(config, name)
        with pytest.raises(ValueError, match=message):
            setattr(config, name, BAD[name])
        assert getattr(config, name) == before
        return
    setattr(config.text_config, name, BAD[name])
    with pytest.raises(ValueError, match=message):
        VideoNSAForConditionalGeneration(config)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("num_key_value_heads", 3, "num_attention_heads must be a multiple of num_key_value_heads, got 7 and 3"),
        ("layer_types", ["full_attention", "sliding_attention"], "layer_types must not contain 'sliding_attention'"),
    ],
)
def test_unsuitable_architectures_are_refused_when_a_model_is_made(checkpoints, name, value, message):
    config = VideoNSAConfig.from_pretrained(checkpoints["Qwen2.5-VL"])
    setattr(config.text_config, name, value)
    with pytest.raises(ValueError, match=message):
        VideoNSAForConditionalGeneration(config)

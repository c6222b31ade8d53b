"""transformers_compat.py and its use by the model: one code for every supported transformers, and loud where it is not.

The text of a test says what a release may do; a patch of the stock class plays that release.
"""

import configparser
import inspect
import json
import re
import shutil
import warnings
from pathlib import Path

import pytest
import torch
from packaging.specifiers import SpecifierSet
from safetensors.torch import load_file, save_file
from transformers import DynamicCache
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.models.qwen2_5_vl import modeling_qwen2_5_vl as stock

from prompts import IMAGE, MIXED, TEXT, VIDEO, assert_close, embed, generate, is_vision, logits, make_inputs
from videonsa import transformers_compat
from videonsa.modeling_videonsa import STOCK, VideoNSAForConditionalGeneration, VideoNSAModel, VideoNSATextModel
from videonsa.transformers_compat import ATTENTION_IMPLEMENTATIONS, CACHE, CACHE_NAMES, TESTED, check_contract

OTHER = next(name for name in CACHE_NAMES if name != CACHE)

# ----------------------------------------------------------------------------------------------------------------------
# Names
# ----------------------------------------------------------------------------------------------------------------------


def call_model(model, inputs, **cache):
    return model(**inputs, **cache).logits


def call_base_model(model, inputs, **cache):
    return model.model(**inputs, **cache).last_hidden_state


def call_text_model(model, inputs, **cache):
    embeds, positions = embed(model, inputs), model.model.get_rope_index(**inputs)[0]
    return model.model.language_model(
        inputs_embeds=embeds, position_ids=positions, vision_mask=is_vision(inputs), **cache
    ).last_hidden_state


def call_attention(model, inputs, **cache):
    layer, embeds = model.model.language_model.layers[0].self_attn, embed(model, inputs)
    rotary = torch.ones(2, *embeds.shape[:2], layer.head_dim)
    return layer(embeds, position_embeddings=tuple(rotary), attention_mask=None, **cache)[0]


def call_generate(model, inputs, **cache):
    return generate(model, inputs, max_new_tokens=3, **cache).logits


@torch.no_grad()
@pytest.mark.parametrize(
    "call", [call_model, call_base_model, call_text_model, call_attention, call_generate], ids=lambda f: f.__name__
)
def test_both_names_of_the_cache_are_taken_without_a_warning(small, call):
    inputs = make_inputs(VIDEO)
    results = []
    for name in CACHE_NAMES:
        cache = DynamicCache(config=small.config)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            results.append(call(small, inputs, **{name: cache}))
        assert cache.get_seq_length() >= inputs["input_ids"].shape[1]
    assert torch.equal(*results)


@torch.no_grad()
def test_cache_is_continued_by_either_name(small):
    inputs = make_inputs(VIDEO)
    outputs = small(**inputs, use_cache=True)
    cache = outputs[CACHE]
    more = torch.cat([inputs["input_ids"], torch.tensor([[7, 8]])], 1)
    expected = small(
        **{**inputs, "input_ids": more, "attention_mask": torch.ones_like(more), "mm_token_type_ids": None}
    )
    small(input_ids=torch.tensor([[7]]), **{OTHER: cache})
    actual = small(input_ids=torch.tensor([[8]]), **{CACHE: cache})
    assert_close(actual.logits[:, -1], expected.logits[:, -1])


def test_a_cache_under_both_names_is_refused(small):
    two = dict.fromkeys(CACHE_NAMES, DynamicCache())
    with pytest.raises(ValueError, match="two names of one argument"):
        small(**make_inputs(VIDEO), **two)
    # A name with None is as good as none.
    inputs = make_inputs(TEXT)
    assert torch.equal(logits(small, inputs, **{CACHE: None, OTHER: DynamicCache()}), logits(small, inputs))


def test_arguments_may_be_positional_as_in_stock(small):
    inputs = make_inputs(VIDEO)
    expected = logits(small, inputs)
    rest = {key: value for key, value in inputs.items() if key not in ("input_ids", "attention_mask")}
    with torch.no_grad():
        assert torch.equal(small(inputs["input_ids"], inputs["attention_mask"], **rest).logits, expected)
    ids = make_inputs(TEXT)["input_ids"]
    assert torch.equal(small.generate(ids, max_new_tokens=1), small.generate(input_ids=ids, max_new_tokens=1))


def test_signatures_are_those_of_the_stock_class(both):
    model, theirs = both
    for ours, expected in (
        (model.forward, type(theirs).forward),
        (model.model.forward, type(theirs.model).forward),
        (model.model.language_model.forward, type(theirs.model.language_model).forward),
    ):
        assert list(inspect.signature(ours).parameters) == list(inspect.signature(expected).parameters)[1:]


@torch.no_grad()
def test_outputs_are_those_of_the_stock_class(both):
    ours, theirs = (each(**make_inputs(VIDEO, IMAGE), use_cache=True) for each in both)
    assert type(ours) is type(theirs)
    names = set(theirs.keys()) - {"rope_deltas"}  # of transformers 5.17: ours are in the cache
    assert set(ours.keys()) == names
    for name in {"image_outputs", "video_outputs"} & set(theirs.keys()):
        for a, b in zip(ours[name].pooler_output, theirs[name].pooler_output, strict=True):
            assert torch.equal(a, b)
    with_gates = both[0](**make_inputs(VIDEO, IMAGE), use_cache=True, output_gates=True)
    assert set(with_gates.keys()) == {*names, "gates"}


# ----------------------------------------------------------------------------------------------------------------------
# A release that is not what we know
# ----------------------------------------------------------------------------------------------------------------------


def build(small):
    return VideoNSATextModel(small.config.text_config)


RENAMED = {
    "the text model": (stock.Qwen2_5_VLTextModel, r"Qwen2_5_VLTextModel\.forward"),
    "the model": (stock.Qwen2_5_VLModel, r"Qwen2_5_VLModel\.forward"),
    "a decoder layer": (stock.Qwen2_5_VLDecoderLayer, r"Qwen2_5_VLDecoderLayer\.forward"),
    "the attention": (stock.Qwen2_5_VLAttention, r"Qwen2_5_VLAttention\.forward"),
}


@pytest.mark.parametrize("where", RENAMED)
def test_a_renamed_argument_is_an_error_when_a_model_is_built(small, monkeypatch, where):
    owner, name = RENAMED[where]
    before = owner.forward

    def forward(self, hidden_states=None, kv_state=None, **kwargs):
        return before(self, hidden_states, **{CACHE: kv_state}, **kwargs)

    monkeypatch.setattr(owner, "forward", forward)
    with pytest.raises(
        ImportError, match=rf"transformers {transformers_compat.VERSION} lacks.*{name}\({CACHE}\).*5\.17"
    ):
        build(small)


@pytest.mark.parametrize("name", ["compute_3d_position_ids", "get_rope_index"])
def test_a_removed_method_that_we_override_is_an_error(small, monkeypatch, name):
    monkeypatch.delattr(stock.Qwen2_5_VLModel, name)
    with pytest.raises(ImportError, match=rf"Qwen2_5_VLModel\.{name}"):
        build(small)


def test_an_argument_that_another_backbone_alone_has_is_checked_too(models, monkeypatch):
    text_model = models["Qwen3-VL"].model.language_model
    monkeypatch.setattr(text_model.stock.text_model, "forward", stock.Qwen2_5_VLTextModel.forward)
    with pytest.raises(ImportError, match=r"Qwen3VLTextModel\.forward\(visual_pos_masks\)"):
        type(text_model)(text_model.config)


def test_a_renamed_argument_is_an_error_when_the_module_is_imported(run_fresh, tiny_repository):
    program = """
import sys
from transformers import AutoModel
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLTextModel
def forward(self, input_ids=None, attention_mask=None, position_ids=None, kv_state=None, **kwargs): ...
Qwen2_5_VLTextModel.forward = forward
try:
    AutoModel.from_pretrained(sys.argv[1], trust_remote_code=True)
except ImportError as error:
    print(error)
"""
    assert f"Qwen2_5_VLTextModel.forward({CACHE})" in run_fresh(program, tiny_repository)


def test_a_version_older_than_tested_is_an_error(monkeypatch):
    monkeypatch.setattr(transformers_compat, "VERSION", "5.16.3")
    with pytest.raises(ImportError, match=r"transformers 5\.16\.3 is too old.*5\.17 to"):
        check_contract(STOCK)


@pytest.mark.parametrize("version", ["5.25.0", "5.25.0.dev0", "6.0.0"])
def test_a_newer_version_that_keeps_the_contract_is_warned_of(monkeypatch, version):
    said = []
    monkeypatch.setattr(transformers_compat, "VERSION", version)
    monkeypatch.setattr(transformers_compat.logger, "warning_once", said.append)
    check_contract(STOCK)
    assert len(said) == 1
    assert version in said[0] and f"({TESTED[0]} to {TESTED[1]})" in said[0]


def test_the_tested_versions_are_those_that_installation_allows():
    setup = configparser.ConfigParser()
    setup.read(Path(__file__).parents[1] / "setup.cfg")
    lines = setup["options"]["install_requires"].splitlines()
    allowed = SpecifierSet(next(x for x in lines if x.startswith("transformers")).removeprefix("transformers"))
    major, last = map(int, TESTED[1].split("."))
    assert f"{TESTED[0]}.0" in allowed and f"{TESTED[1]}.9" in allowed
    assert f"{major}.{last + 1}.0" not in allowed and "5.16.9" not in allowed


@torch.no_grad()
def test_a_cache_that_is_not_written_is_an_error(small, monkeypatch):
    before = stock.Qwen2_5_VLAttention.forward

    def forward(self, *args, **kwargs):
        return before(self, *args, **{**kwargs, CACHE: None})

    monkeypatch.setattr(stock.Qwen2_5_VLAttention, "forward", forward)
    for inputs in (make_inputs(VIDEO), make_inputs(TEXT)):
        with pytest.raises(RuntimeError, match="the cache holds 0 tokens after a forward call"):
            small(**inputs, use_cache=True)
    logits(small, make_inputs(VIDEO), use_cache=False)


@torch.no_grad()
def test_a_cache_that_is_given_but_passed_over_is_an_error(small, monkeypatch):
    before = stock.Qwen2_5_VLTextModel.forward

    def forward(self, *args, **kwargs):
        return before(self, *args, **{**kwargs, CACHE: None})

    monkeypatch.setattr(stock.Qwen2_5_VLTextModel, "forward", forward)
    with pytest.raises(RuntimeError, match="the cache holds 0 tokens"):
        small(**make_inputs(VIDEO), **{CACHE: DynamicCache()})


@torch.no_grad()
def test_a_stock_attention_that_passes_our_function_over_is_an_error(small, monkeypatch):
    def forward(self, hidden_states, **kwargs):
        return hidden_states, None

    monkeypatch.setattr(stock.Qwen2_5_VLAttention, "forward", forward)
    with pytest.raises(RuntimeError, match="did not call the attention function"):
        small(**make_inputs(VIDEO), use_cache=False)


# ----------------------------------------------------------------------------------------------------------------------
# What a call tells of its tokens, and what computes it; test_engines.py has the calls of serving engines
# ----------------------------------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("implementation", [*ATTENTION_IMPLEMENTATIONS, "kernels-community/flash-attn2"])
def test_a_sparse_prefill_is_the_same_under_every_supported_implementation(small, implementation):
    inputs = make_inputs(VIDEO, MIXED)
    expected = logits(small, inputs)
    # Written directly: set_attn_implementation asks for packages and GPUs that the prefill does not need.
    small.config.text_config._attn_implementation = implementation
    assert torch.equal(logits(small, inputs), expected)


@torch.no_grad()
def test_embeddings_alone_are_refused_unless_types_say_what_they_are(small):
    inputs = make_inputs(VIDEO)
    embeds, positions = embed(small, inputs), small.model.get_rope_index(**inputs)[0]
    call = {"inputs_embeds": embeds, "position_ids": positions}
    with pytest.raises(ValueError, match="inputs_embeds alone do not tell.*mm_token_type_ids"):
        small(**call)
    assert torch.equal(small(**call, mm_token_type_ids=inputs["mm_token_type_ids"]).logits, logits(small, inputs))

    text = small.get_input_embeddings()(make_inputs(TEXT)["input_ids"])
    with pytest.raises(ValueError, match="all 0 for text alone"):
        small(inputs_embeds=text)
    types = torch.zeros(text.shape[:2], dtype=torch.int)
    cache = DynamicCache()
    outputs = small(inputs_embeds=text[:, :-1], mm_token_type_ids=types[:, :-1], **{CACHE: cache})
    step = small(inputs_embeds=text[:, -1:], **{CACHE: cache})
    actual = torch.cat([outputs.logits, step.logits], 1)
    assert_close(actual, logits(small, make_inputs(TEXT)))

    small.config.nsa_variant = "dense"
    assert small(**call).logits.shape[:2] == embeds.shape[:2]


# ----------------------------------------------------------------------------------------------------------------------
# Checkpoints
# ----------------------------------------------------------------------------------------------------------------------


def test_both_classes_save_the_key_layout_of_transformers_4(small, tmp_path):
    from safetensors.torch import load_file

    small.save_pretrained(tmp_path / "full")
    small.model.save_pretrained(tmp_path / "base")
    full, base = (set(load_file(tmp_path / name / "model.safetensors")) for name in ("full", "base"))
    assert full - base <= {"lm_head.weight"} and base <= full
    assert {"visual.patch_embed.proj.weight", "model.norm.weight"} <= base
    for folder in ("full", "base"):
        loaded, info = type(small.model).from_pretrained(tmp_path / folder, output_loading_info=True)
        assert not info["missing_keys"]
        for key, value in small.model.state_dict().items():
            assert torch.equal(loaded.state_dict()[key], value)
    loaded = VideoNSAForConditionalGeneration.from_pretrained(tmp_path / "base")
    assert torch.equal(loaded.model.state_dict()["language_model.norm.weight"], small.model.language_model.norm.weight)


# ----------------------------------------------------------------------------------------------------------------------
# Weights of a checkpoint and of a model
# ----------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def saved(small, tmp_path):
    """A saved model, and what rewrites its weights."""
    folder = tmp_path / "saved"
    small.save_pretrained(folder)

    def rewrite(change):
        weights = load_file(folder / "model.safetensors")
        save_file(change(weights), folder / "model.safetensors", metadata={"format": "pt"})
        return folder

    return rewrite


def without(part: str):
    return lambda weights: {name: x for name, x in weights.items() if part not in name}


def renamed(pattern: str, replacement: str):
    return lambda weights: {re.sub(pattern, replacement, name): x for name, x in weights.items()}


@pytest.mark.parametrize("model_class", [VideoNSAForConditionalGeneration, VideoNSAModel])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (without("layers.1.mlp"), r"lacks 3 of its weights, such as .*language_model\.layers\.1\.mlp\.down_proj"),
        (without("layers.1.self_attn.g_proj_1"), r"lacks 2 of its weights, such as .*g_proj_1\.bias"),
        (lambda weights: {**weights, "model.layers.2.norm.weight": torch.ones(3)}, r"has 1 .*layers\.2\.norm"),
        (renamed(r"visual\.merger", "visual.joiner"), "lacks 5 of its weights.* and has 5 weights that are not"),
    ],
)
def test_a_checkpoint_with_other_weights_than_the_model_is_refused(saved, model_class, change, message):
    folder = saved(change)
    with pytest.raises(ValueError, match=f"is not of a {model_class.__name__} with this configuration: it {message}"):
        model_class.from_pretrained(folder)
    _, info = model_class.from_pretrained(folder, output_loading_info=True)  # the caller decides
    assert info["missing_keys"] or info["unexpected_keys"]


def test_a_checkpoint_without_any_gates_and_the_whole_for_a_part_load(saved, small):
    folder = saved(without("g_proj"))
    text = VideoNSATextModel.from_pretrained(folder)
    assert torch.equal(text.norm.weight, small.model.language_model.norm.weight)
    loaded = VideoNSAForConditionalGeneration.from_pretrained(folder)
    assert torch.equal(loaded.lm_head.weight, small.lm_head.weight)


@pytest.mark.parametrize("model_class", [VideoNSAForConditionalGeneration, VideoNSAModel])
@pytest.mark.parametrize("repeated", ["model.model.", "model.model.model."])
def test_keys_that_zero3_wrote_are_loaded(saved, small, model_class, repeated):
    folder = saved(renamed(r"^model\.", repeated))
    loaded = model_class.from_pretrained(folder)
    expected = small if model_class is VideoNSAForConditionalGeneration else small.model
    assert all(torch.equal(x, loaded.state_dict()[name]) for name, x in expected.state_dict().items())

    fresh = VideoNSAForConditionalGeneration(small.config)
    fresh.load_state_dict(load_file(folder / "model.safetensors"), strict=False)
    assert all(torch.equal(x, fresh.state_dict()[name]) for name, x in small.state_dict().items())


def test_a_model_is_saved_with_the_same_keys_however_it_was_made(small, tmp_path):
    def keys(model, **options):
        model.save_pretrained(tmp_path / "saved", **options)
        return load_file(tmp_path / "saved/model.safetensors").keys()

    expected = keys(small)
    assert {"model.embed_tokens.weight", "visual.patch_embed.proj.weight"} <= expected
    assert keys(VideoNSAForConditionalGeneration(small.config)) == expected
    assert keys(VideoNSAModel(small.config)) == expected

    sharded = VideoNSAForConditionalGeneration(small.config)
    sharded.__class__ = type("FSDPVideoNSAForConditionalGeneration", (type(sharded),), {})  # as FSDP2 does
    assert keys(sharded) == expected

    # Under ZeRO-3, from_pretrained keeps all renamings, and Trainer gathers the weights.
    small._weight_conversions = get_model_conversion_mapping(small)
    assert keys(small, state_dict=small.state_dict()) == expected


def test_generation_settings_hold_no_fields_of_the_configuration(stock_checkpoint, tmp_path):
    model = VideoNSAForConditionalGeneration.from_pretrained(stock_checkpoint, nsa_variant="dense", block_counts=5)
    assert (model.config.nsa_variant, model.config.block_count) == ("dense", 5)
    model.save_pretrained(tmp_path)
    settings = json.loads((tmp_path / "generation_config.json").read_text())
    assert settings.keys() == json.loads((stock_checkpoint / "generation_config.json").read_text()).keys()

    settings["nsa_variant"] = "dense"  # as earlier code wrote it
    (tmp_path / "generation_config.json").write_text(json.dumps(settings))
    model = VideoNSAForConditionalGeneration.from_pretrained(tmp_path)
    assert not hasattr(model.generation_config, "nsa_variant")
    assert model.generation_config.suppress_tokens == settings["suppress_tokens"]


EDITED = """
import logging
import sys

from transformers import AutoModelForImageTextToText

folder, *files = sys.argv[1:]
messages = []
handler = logging.Handler(logging.WARNING)
handler.emit = lambda record: messages.append(record.getMessage())
logging.getLogger("transformers_modules").addHandler(handler)
for file in [None, None, *files]:
    if file is not None:
        with open(f"{folder}/{file}", "a") as code:
            code.write("EDITED = True\\n")
    AutoModelForImageTextToText.from_pretrained(folder, trust_remote_code=True)
    print(sum("start a new process" in message for message in messages))
print(messages[-1])
"""


def test_code_files_that_differ_from_the_code_that_runs_are_named(small, tmp_path, run_fresh):
    folder = tmp_path / "saved"
    small.save_pretrained(folder)
    for path in Path(transformers_compat.__file__).parent.glob("*.py"):
        shutil.copyfile(path, folder / path.name)
    *counts, message = run_fresh(EDITED, folder, "modeling_videonsa.py", "vision_layout.py").splitlines()
    assert counts == ["0", "0", "1", "2"]
    assert "has another modeling_videonsa.py, vision_layout.py than the code that runs" in message


SUBFOLDER = """
import sys
from transformers import AutoModelForImageTextToText, AutoProcessor

for auto in (AutoModelForImageTextToText, AutoProcessor):
    print(type(auto.from_pretrained(sys.argv[1], subfolder="tiny", trust_remote_code=True)).__name__)
"""


def test_a_subfolder_loads_with_the_code_files_at_the_root(tiny_repository, tmp_path, run_fresh):
    shutil.copytree(tiny_repository, tmp_path / "repository/tiny")
    for path in (tmp_path / "repository/tiny").glob("*.py"):
        path.rename(tmp_path / "repository" / path.name)
    printed = run_fresh(SUBFOLDER, tmp_path / "repository").split()
    assert printed == ["VideoNSAForConditionalGeneration", "VideoNSAProcessor"]

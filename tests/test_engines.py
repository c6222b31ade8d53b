"""Calls as serving engines make them: an attention function of their own, a model by `AutoModel`, merged embeddings and
nothing else, a paged cache. The engines themselves are not installed: docs/engines.md."""

import json
import re
from pathlib import Path

import pytest
import torch
from packaging.version import Version
from transformers import AutoConfig, AutoModel, AutoProcessor
from transformers import __version__ as VERSION
from transformers.generation.continuous_batching.cache import PagedAttentionCache
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from prompts import TEXT, VIDEO, embed, make_inputs
from videonsa.transformers_compat import CACHE

ENGINE = "an_engine"
PAGE = (Path(__file__).resolve().parents[1] / "docs/engines.md").read_text()
OVERRIDES = json.loads(re.search(r"^```json\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)[1])


@pytest.fixture
def engine(monkeypatch):
    """An attention function that an engine registers under `ENGINE`; returns the layers that it computed."""
    computed = []

    def attention(module, q, k, v, attention_mask, **kwargs):
        computed.append(module.layer_idx)
        return sdpa_attention_forward(module, q, k, v, None, scaling=kwargs["scaling"], is_causal=True)

    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._global_mapping, ENGINE, attention)
    return computed


@torch.no_grad()
@pytest.mark.parametrize("variant", ["paper", "merged"])
@pytest.mark.parametrize("given", ["embeddings", "embeddings and types", "ids", "text"])
def test_a_sparse_variant_refuses_the_attention_of_an_engine(small, engine, variant, given):
    inputs = make_inputs(TEXT if given == "text" else VIDEO)
    positions, _ = small.model.get_rope_index(**inputs)
    call = {"inputs_embeds": embed(small, inputs), "position_ids": positions, "use_cache": False}
    if given == "embeddings and types":
        call["mm_token_type_ids"] = inputs["mm_token_type_ids"]
    if given in ("ids", "text"):
        call = {**inputs, "use_cache": False}
    small.config.nsa_variant = variant
    for config in (small.config, small.config.text_config):
        config._attn_implementation = ENGINE
    # Embeddings alone are refused first, for they do not tell where the vision tokens are.
    message = "inputs_embeds alone" if given == "embeddings" else f"attn_implementation='{ENGINE}'"
    with pytest.raises(ValueError, match=f'{message}.*nsa_variant="dense"'):
        small.model(**call)
    assert not engine


@torch.no_grad()
def test_dense_runs_through_the_attention_of_an_engine(both, engine):
    inputs = make_inputs(VIDEO)
    positions, _ = both[0].model.get_rope_index(**inputs)
    call = {"inputs_embeds": embed(both[0], inputs), "position_ids": positions, "use_cache": False}
    both[0].config.nsa_variant = "dense"
    for each in both:
        for config in (each.config, each.config.text_config):
            config._attn_implementation = ENGINE
    assert torch.equal(*(each.model(**call, return_dict=False)[0] for each in both))


@torch.no_grad()
def test_automodel_makes_the_model_without_a_head_if_the_configuration_names_it(tiny_repository, engine, monkeypatch):
    """vLLM and SGLang call `AutoModel.from_config` and take the first output for hidden states."""
    monkeypatch.setattr(AutoModel._model_mapping, "_extra_content", {})  # where from_config registers the class
    config = AutoConfig.from_pretrained(tiny_repository, trust_remote_code=True)
    for name, value in OVERRIDES.items():
        setattr(config, name, value)  # as vLLM does
    config.text_config._attn_implementation = ENGINE
    model = AutoModel.from_config(config, trust_remote_code=True, dtype=torch.float32).eval()
    assert type(model).__name__ == "VideoNSAModel" and model.is_backend_compatible()
    assert model.get_decoder() is model.language_model

    inputs = make_inputs(VIDEO)
    positions, _ = model.get_rope_index(**{name: inputs[name] for name in inputs if not name.startswith("pixel")})
    call = {"input_ids": None, "inputs_embeds": embed(model, inputs), "position_ids": positions, "use_cache": False}
    hidden = model(**call, attention_instances={}, return_dict=False)[0]
    assert hidden.shape == (*inputs["input_ids"].shape, config.text_config.hidden_size)
    assert engine == list(range(config.text_config.num_hidden_layers))


def test_the_processor_tells_where_the_tokens_of_a_video_stand(tiny_repository):
    """vLLM reads videos itself, counts their tokens beforehand, and asks what a placeholder became."""
    processor = AutoProcessor.from_pretrained(tiny_repository, trust_remote_code=True)
    video = torch.randint(256, (8, 56, 84, 3), dtype=torch.uint8).numpy()
    metadata = {"fps": 4.0, "duration": 2.0, "total_num_frames": 8, "frames_indices": list(range(8))}
    options = {"do_sample_frames": False, "return_text_replacement_offsets": True, "return_tensors": "pt"}
    text = f"a<|vision_start|>{processor.video_token}<|vision_end|>"
    output = processor(text=text, videos=[video], video_metadata=[metadata], **options)
    ((place,),) = output["text_replacement_offsets"]
    assert place["type"] == "video" and place["text"] == processor.video_token
    tokens = place["replacement"].count(processor.video_token)
    assert tokens == int(output["video_grid_thw"].prod()) // 4
    if Version(VERSION) < Version("5.18"):  # stock calls a method that there is not, and vLLM takes no videos
        return
    assert processor._get_num_multimodal_tokens(video_sizes=[video.shape[:3]])["num_video_tokens"] == [tokens]


@pytest.mark.parametrize("variant", ["paper", "dense"])
def test_continuous_batching_is_refused(small, variant):
    small.config.nsa_variant = variant
    inputs = make_inputs(TEXT)
    positions = torch.arange(inputs["input_ids"].shape[1])[None]
    cache = PagedAttentionCache.__new__(PagedAttentionCache)
    with pytest.raises(ValueError, match="a PagedAttentionCache does not keep which .*no continuous batching"):
        small(input_ids=inputs["input_ids"], position_ids=positions, use_cache=False, **{CACHE: cache})

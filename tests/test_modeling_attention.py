"""The attention of a model, on miniature checkpoints with random weights: equal to loops, to the stock model where
nothing is sparse, and what it returns on request (gates, attention weights, hidden states).

Inputs are tensors that `make_inputs` builds from a list of parts per sample; what a processor makes of files is tested
in test_processing_videonsa.py, the sparse attention itself in test_nsa_torch.py. Streams have 100 to 300 vision tokens
in blocks of 16. A query reads 4 blocks, so most are left out.
"""

import dataclasses
import inspect
from copy import deepcopy

import pytest
import torch
import torch.nn.functional as F
from transformers import DynamicCache

import videonsa
from prompts import IMAGE, MIXED, NSA, TEXT, VIDEO, assert_close, generate, image, is_vision, logits, make_inputs, unpad
from videonsa import vision_layout
from videonsa.nsa_torch import nsa_attention
from videonsa.transformers_compat import CACHE, cache_of
from videonsa.vision_layout import VisionLayout

# ----------------------------------------------------------------------------------------------------------------------
# The attention module against loops
# ----------------------------------------------------------------------------------------------------------------------


def explicit_attention(layer, hidden, cos, sin, vision, valid, sample):
    """One layer written out: hidden [rows, length, width]; vision, valid bool and sample int [rows, length]."""
    config = layer.config
    heads, groups = config.num_attention_heads, config.num_key_value_heads
    dim = layer.q_proj.out_features // heads

    def project(proj):
        return F.linear(hidden, proj.weight, proj.bias).unflatten(-1, (-1, dim))

    def rotate(x, norm):
        if norm is not None:
            x = x * (x.square().mean(-1, keepdim=True) + norm.eps).rsqrt() * norm.weight
        half = torch.cat([-x[..., dim // 2 :], x[..., : dim // 2]], -1)
        return x * cos[:, :, None] + half * sin[:, :, None]

    v = project(layer.v_proj)
    q, k = (rotate(project(getattr(layer, f"{x}_proj")), getattr(layer, f"{x}_norm", None)) for x in "qk")
    out = torch.zeros_like(q)
    for row in range(len(hidden)):
        for tokens in (((sample[row] == s) & valid[row]).nonzero().flatten().tolist() for s in sample[row].unique()):
            stream = [t for t in tokens if vision[row, t]]
            x = F.gelu(F.linear(hidden[row, stream], layer.g_proj_1.weight, layer.g_proj_1.bias))
            gates = F.linear(x, layer.g_proj_2.weight, layer.g_proj_2.bias) / config.gate_temperature
            out[row, stream] = nsa_attention(
                q[row, stream],
                k[row, stream],
                v[row, stream],
                gates.sigmoid().view(-1, heads, 3),
                torch.tensor([0, len(stream)], dtype=torch.int32),
                block_size=config.block_size,
                block_count=config.block_count,
                window_size=config.window_size,
            )
            for t in (t for t in tokens if not vision[row, t]):
                seen = [u for u in tokens if u <= t]
                for h in range(heads):
                    g = h // (heads // groups)
                    p = torch.softmax(k[row, seen, g] @ q[row, t, h] / dim**0.5, 0)
                    out[row, t, h] = p @ v[row, seen, g]
    return F.linear(out.flatten(2), layer.o_proj.weight)


@pytest.fixture
def layer(model):
    """The attention of a layer in double precision, in which that of transformers does not compute norms."""
    layer = model.model.language_model.layers[0].self_attn
    for name in ("q_norm", "k_norm"):
        if hasattr(layer, name):
            norm = torch.nn.RMSNorm(layer.head_dim, eps=1e-6)
            torch.nn.init.normal_(norm.weight, 1, 0.3, generator=torch.Generator().manual_seed(0))
            setattr(layer, name, norm)
    return layer.double()


LAYOUTS = ("one sample", "left padding", "right padding", "holes", "packed", "packed, then right padding")


def random_layout(name, length=120):
    """vision, valid bool and sample int [2, length], runs of 10 and more tokens of a kind."""
    generator = torch.Generator().manual_seed(len(name))
    runs = torch.randint(0, 4, (2, length // 10 + 1), generator=generator) > 0
    vision = runs.repeat_interleave(10, 1)[:, :length]
    valid, sample = torch.ones_like(vision), torch.zeros(2, length, dtype=torch.long)
    if name == "left padding":
        valid[1, :37] = False
    if name == "right padding" or "then" in name:
        valid[0, -37:] = False
    if name == "holes":
        valid = torch.rand(2, length, generator=generator) > 0.1
    if "packed" in name:
        sample[0, 50:] = 1
        sample[0, 83:] = 2
        sample[1, 41:] = 1
    return vision, valid, sample


def attend(layer, name, pieces=None):
    """A double-precision layer on random tokens in calls of so many: inputs, their output, and that of the loops."""
    vision, valid, sample = random_layout(name)
    batch, length = vision.shape
    torch.manual_seed(0)
    hidden = torch.randn(batch, length, layer.config.hidden_size, dtype=torch.double, requires_grad=True)
    cos, sin = torch.randn(2, batch, length, layer.head_dim, dtype=torch.double)
    expected = explicit_attention(layer, hidden, cos, sin, vision, valid, sample)
    outs, cache, start = [], DynamicCache() if pieces else None, 0
    for piece in pieces or [length]:
        stop = start + piece
        starts = sample[:, :stop].diff(dim=1, prepend=sample[:, :1]) != 0
        out, weights = layer(
            hidden[:, start:stop],
            position_embeddings=(cos[:, start:stop], sin[:, start:stop]),
            attention_mask=None,
            **{CACHE: cache},
            vision_layout=VisionLayout.make(vision[:, :stop], piece, valid[:, :stop], starts),
        )
        assert weights is None
        outs.append(out)
        start = stop
    return hidden, valid, torch.cat(outs, 1), expected


@pytest.mark.parametrize("name", LAYOUTS)
def test_attention_and_its_gradients_equal_loops(layer, name):
    hidden, valid, actual, expected = attend(layer, name)
    assert_close(actual[valid], expected[valid], 1e-10)
    assert not actual[~valid].any()
    needed = [hidden, *layer.parameters()]
    weight = torch.randn_like(actual) * valid[..., None]
    gradients = [torch.autograd.grad(out, needed, weight) for out in (actual, expected)]
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("pieces", [[70, 50], [1, 60, 9, 50]], ids=str)
@pytest.mark.parametrize("name", [name for name in LAYOUTS if "packed" not in name])
def test_attention_over_a_cache_equals_loops(layer, name, pieces):
    _, valid, actual, expected = attend(layer, name, pieces)
    assert_close(actual[valid], expected[valid], 1e-10)
    assert not actual[~valid].any()


def test_logits_of_gates_are_divided_by_the_temperature(layer):
    layer.config.gate_temperature = 0.3
    _, valid, actual, expected = attend(layer, "left padding")
    assert_close(actual[valid], expected[valid], 1e-10)
    layer.config.gate_temperature = 1.0
    _, _, other, _ = attend(layer, "left padding")
    assert (other - actual).abs().max() > 0.1


def test_text_queries_in_chunks_give_what_they_give_at_once(model, monkeypatch):
    inputs = make_inputs(MIXED, VIDEO, TEXT)
    expected = logits(model, inputs)
    monkeypatch.setattr(vision_layout, "MAX_MASK", 2000)
    for a, b in zip(unpad(logits(model, inputs), inputs), unpad(expected, inputs), strict=True):
        assert_close(a, b)


def test_sparse_attention_differs_from_dense(both):
    model, stock = both
    inputs = make_inputs(VIDEO)
    inputs["position_ids"], _ = model.model.get_rope_index(**inputs)
    difference = (logits(model, inputs) - logits(stock, inputs)).abs()
    assert difference[is_vision(inputs)].max() > 0.1
    assert difference[0, -1].max() > 0.01  # text after the video sees what the video's tokens have become


@pytest.mark.parametrize("setting", [{"block_count": 5}, {"window_size": 30}, {"block_size": 32}], ids=str)
def test_each_setting_reaches_the_layers(small, setting):
    inputs = make_inputs(VIDEO)
    expected = logits(small, inputs)
    for name, value in setting.items():
        setattr(small.config, name, value)
    assert (logits(small, inputs) - expected).abs().max() > 1e-3


def test_layout_moves_every_tensor_to_another_device():
    vision, valid, sample = random_layout("packed, then right padding")
    starts, observe = sample.diff(dim=1, prepend=sample[:, :1]) != 0, print
    layout = VisionLayout.make(vision, vision.shape[1], valid, starts, observe, last=4)
    assert layout.to("cpu") is layout
    moved = layout.to(torch.device("meta"), non_blocking=True)
    assert moved.observe is observe
    count = 0

    def compare(old, new):
        nonlocal count
        if isinstance(old, torch.Tensor):
            assert (new.device.type, new.shape, new.dtype) == ("meta", old.shape, old.dtype)
            count += 1
        elif isinstance(old, list):
            for a, b in zip(old, new, strict=True):
                compare(a, b)
        elif dataclasses.is_dataclass(old):
            compare(list(vars(old).values()), list(vars(new).values()))
        else:
            assert new == old

    compare(layout, moved)
    assert count == 11 + 11  # and those for the last layer


# ----------------------------------------------------------------------------------------------------------------------
# Where it is stock
# ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("samples", [[TEXT], [TEXT, [40], [3]]], ids=["alone", "batch"])
def test_text_prompts_are_stock_bit_for_bit(both, samples, implementation):
    for each in both:
        each.set_attn_implementation(implementation)
    for padding in ("left", "right"):
        inputs = make_inputs(*samples, padding=padding)
        ours, theirs = (logits(each, inputs) for each in both)
        assert torch.equal(ours, theirs)


def test_generation_from_text_is_stock_bit_for_bit(both):
    inputs = make_inputs(TEXT, [40])
    ours, theirs = (generate(each, inputs) for each in both)
    assert torch.equal(ours.sequences, theirs.sequences)
    assert torch.equal(ours.logits, theirs.logits)


@pytest.mark.parametrize("samples", [[VIDEO], [VIDEO, IMAGE, TEXT, MIXED]], ids=["alone", "batch"])
def test_decoding_over_an_equal_cache_is_stock_bit_for_bit(both, samples):
    inputs = make_inputs(*samples)
    ours, theirs = both
    with torch.no_grad():
        cache = cache_of(ours(**inputs, use_cache=True))
    mask = inputs["attention_mask"]
    for token in (7, 8, 9):
        mask = F.pad(mask, (0, 1), value=1)
        step = {
            "input_ids": torch.full((len(samples), 1), token),
            "attention_mask": mask,
            "position_ids": (mask.sum(1) + 100 + token).expand(3, 1, -1).transpose(1, 2),
        }
        other = deepcopy(cache)
        assert torch.equal(logits(ours, step, **{CACHE: cache}), logits(theirs, step, **{CACHE: other}))
        for a, b in zip(cache.layers[:2], other.layers[:2], strict=True):
            assert torch.equal(a.keys, b.keys)


@pytest.mark.parametrize("samples", [[VIDEO], [MIXED], [VIDEO, IMAGE, TEXT, MIXED]], ids=["video", "mixed", "batch"])
def test_dense_variant_is_stock_given_the_same_positions(both, samples):
    ours, theirs = both
    ours.config.nsa_variant = "dense"
    inputs = make_inputs(*samples)
    inputs["position_ids"], _ = ours.model.get_rope_index(**inputs)
    assert torch.equal(logits(ours, inputs), logits(theirs, inputs))


def test_image_prompts_get_stock_positions(both):
    ours, theirs = (each.model for each in both)
    inputs = make_inputs([3, image(6, 10), 9, image(4, 4), 2], TEXT, IMAGE)
    (positions, deltas), (expected, expected_deltas) = (each.get_rope_index(**inputs) for each in (ours, theirs))
    real = inputs["attention_mask"].bool()
    assert torch.equal(positions[:, real], expected[:, real])
    assert torch.equal(deltas, expected_deltas)


@pytest.mark.parametrize("model_type", ["qwen2_5_vl", "qwen3_vl"])
def test_signatures_that_generate_and_trainer_inspect_are_stock(model_type):
    ours = videonsa.model_class(model_type)
    theirs = next(x for x in ours.__mro__ if x.__module__.startswith("transformers.models"))
    for name in ("forward", "get_image_features", "get_video_features"):
        assert inspect.signature(getattr(ours, name)) == inspect.signature(getattr(theirs, name))


# ----------------------------------------------------------------------------------------------------------------------
# Gates and attention weights as outputs
# ----------------------------------------------------------------------------------------------------------------------


def test_output_gates_are_those_of_the_layers_at_vision_tokens_and_zero_elsewhere(model):
    inputs = make_inputs(VIDEO, MIXED, TEXT)
    seen = []
    for layer in model.model.language_model.layers:
        layer.self_attn.register_forward_pre_hook(
            lambda module, args, kwargs: seen.append(module.gates(kwargs["hidden_states"])), with_kwargs=True
        )
    with torch.no_grad():
        out = model(**inputs, output_gates=True)
    heads, (batch, length) = model.config.text_config.num_attention_heads, inputs["input_ids"].shape
    assert isinstance(out.gates, tuple)
    assert [gates.shape for gates in out.gates] == [(batch, length, heads, 3)] * 2
    vision = is_vision(inputs)
    for gates, expected in zip(out.gates, seen, strict=True):
        torch.testing.assert_close(gates[vision], expected[vision], rtol=1e-5, atol=1e-6)
        assert gates[vision].std() > 0.05
        assert not gates[~vision].any()


@torch.no_grad()
def test_output_gates_come_from_either_model_in_either_form(small):
    inputs = make_inputs(VIDEO, TEXT)
    expected = small(**inputs, output_gates=True)
    assert "gates" not in small(**inputs)
    assert torch.equal(expected.logits, small(**inputs).logits)
    forms = [
        small(**inputs, output_gates=True, return_dict=False)[-1],
        small.model(**inputs, output_gates=True).gates,
        small.model(**inputs, output_gates=True, return_dict=False)[-1],
    ]
    for gates in forms:
        assert isinstance(gates, tuple)
        assert all(torch.equal(a, b) for a, b in zip(gates, expected.gates, strict=True))
    assert small(**inputs, return_dict=False)[0].equal(expected.logits)


@torch.no_grad()
def test_output_gates_are_empty_where_nothing_is_sparse(small):
    assert small(**make_inputs(TEXT), output_gates=True).gates == ()
    assert small.model(**make_inputs(TEXT), output_gates=True).gates == ()
    small.config.nsa_variant = "dense"
    assert small(**make_inputs(VIDEO), output_gates=True).gates == ()


@torch.no_grad()
def test_output_gates_of_a_step_over_a_cache_are_those_of_its_tokens(small):
    cache = cache_of(small(**make_inputs(VIDEO), use_cache=True))
    step = {"input_ids": torch.tensor([[5]]), CACHE: cache}
    assert small(**step, output_gates=True).gates == ()


@torch.no_grad()
def test_an_observer_sees_what_each_layer_attends_with_and_may_change_the_gates(model):
    inputs = make_inputs(VIDEO, MIXED, TEXT)
    seen, vision = [], is_vision(inputs)

    def observe(attention, q, k, v, gates, layout):
        rows, positions = layout.keys.rows, layout.keys.positions
        seen.append(attention.layer_idx)
        packed = q[layout.queries], k[rows, :, positions], v[rows, :, positions]
        whole = nsa_attention(*packed, gates, layout.cu_seqlens, **NSA)
        assert layout.queries.tolist() == vision.flatten().nonzero().flatten().tolist()
        outputs.append(attention.o_proj(whole.flatten(1)))
        return gates

    outputs, expected = [], []
    for layer in model.model.language_model.layers:
        layer.self_attn.register_forward_hook(lambda module, args, output: expected.append(output[0][vision]))
    same = model(**inputs, observe=observe, output_gates=True)
    assert seen == [0, 1] and torch.equal(same.logits, model(**inputs).logits)
    for output, wanted in zip(outputs, expected, strict=False):
        torch.testing.assert_close(output, wanted, rtol=1e-4, atol=1e-5)
    off = model(**inputs, observe=lambda attention, q, k, v, gates, layout: 0 * gates, output_gates=True)
    assert not torch.stack(off.gates).any() and not torch.equal(off.logits, same.logits)


def test_hidden_states_are_returned_as_in_stock(both):
    ours, theirs = (each(**make_inputs(VIDEO), output_hidden_states=True) for each in both)
    assert set(ours.keys()) == set(theirs.keys()) - {"rope_deltas"}  # of transformers 5.17: ours are in the cache
    assert [x.shape for x in ours.hidden_states] == [x.shape for x in theirs.hidden_states]


def test_attention_weights_are_those_of_text_queries(both):
    inputs = make_inputs(VIDEO, MIXED)
    positions, _ = both[0].model.get_rope_index(**inputs)
    for each in both:
        each.set_attn_implementation("eager")
    ours, theirs = (each(**inputs, position_ids=positions, output_attentions=True) for each in both)
    assert [x.shape for x in ours.attentions] == [x.shape for x in theirs.attentions]
    # The layers after the first one get other hidden states than in the stock model.
    weights, dense = ours.attentions[0].transpose(1, 2), theirs.attentions[0].transpose(1, 2)
    text = inputs["attention_mask"].bool() & ~is_vision(inputs)
    torch.testing.assert_close(weights[text], dense[text])
    assert not weights[~text].any()
    assert_close(ours.logits[text], logits(both[0], inputs, position_ids=positions)[text])


def test_attention_weights_have_gradients(small):
    small.set_attn_implementation("eager")
    outputs = small(**make_inputs(VIDEO), output_attentions=True, output_hidden_states=True)
    kept = (outputs.attentions[0], outputs.hidden_states[0])
    for x in kept:
        x.retain_grad()
    outputs.logits.sum().backward()
    assert all(x.grad.abs().sum() > 0 for x in kept)


@torch.no_grad()
def test_attention_weights_need_eager_attention_as_in_stock(both):
    ours, theirs = (each(**make_inputs(VIDEO), output_attentions=True) for each in both)
    assert ours.attentions == theirs.attentions == ()
    both[0].set_attn_implementation("eager")
    inputs = make_inputs(VIDEO)
    outputs = generate(both[0], inputs, max_new_tokens=2, output_attentions=True)
    length = inputs["input_ids"].shape[1]
    assert [x[0].shape[2:] for x in outputs.attentions] == [(length, length), (1, length + 1)]

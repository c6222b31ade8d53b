"""Processes that share the tokens of a call compute what one process does."""

import random

import torch
import torch.distributed as dist
from processes import run
from torch.distributed.device_mesh import init_device_mesh

from lib import tiny
from prompts import NSA, TEXT, VIDEO, assert_close, image, logits, make_inputs, pack, video
from videonsa.configuration_videonsa import VideoNSAConfig
from videonsa.modeling_videonsa import VideoNSAForConditionalGeneration

# Query heads, KV heads.
SHAPES = {4: (8, 4), 2: (6, 2), 1: (4, 1)}


def make_model(kv_heads: int, variant: str = "paper"):
    """A model of two layers, the same in every process."""
    heads, kv_heads = SHAPES[kv_heads]
    shape = {"num_attention_heads": heads, "num_key_value_heads": kv_heads, "hidden_size": 16 * heads}
    stock = tiny.make_config(tiny.make_tokenizer(), num_hidden_layers=2, vision_hidden_size=32, **shape)
    torch.manual_seed(0)
    config = VideoNSAConfig(**{**stock.to_dict(), "model_type": "videonsa"})
    for name, value in {**NSA, "nsa_variant": variant}.items():
        setattr(config.text_config, name, value)
    model = VideoNSAForConditionalGeneration(config)
    for name, weight in model.named_parameters():
        if "g_proj" in name:
            weight.data.normal_(0, 0.3)
    return model.train()


def random_samples(seed: int) -> list:
    """Two samples of text, images and videos."""
    choose = random.Random(seed)

    def part(i):
        media = {1: image(4, 2 * choose.randint(1, 4), seed=i), 2: video(choose.randint(1, 9), 4, 8, seed=i)}
        return media.get(choose.randint(0, 2), choose.randint(1, 40))

    return [[choose.randint(1, 9), *map(part, range(choose.randint(1, 4))), choose.randint(1, 30)] for _ in range(2)]


def with_labels(inputs):
    labels = inputs["input_ids"].masked_fill(inputs.get("attention_mask", torch.tensor(1)) == 0, -100)
    labels[:, ::3] = -100
    return {**inputs, "labels": labels}


def loss_and_gradients(model, inputs, mesh=None):
    """The loss, and the mean over ranks of all gradients in one row."""
    model.shard_sequence(mesh)
    model.zero_grad()
    loss = model(**with_labels(inputs), use_cache=False).loss
    loss.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    if mesh is not None:
        for gradient in gradients.values():
            dist.all_reduce(gradient, group=mesh.get_group())
            gradient /= mesh.size()
    return loss.detach(), gradients


def compare(model, inputs, mesh):
    real = inputs.get("attention_mask", torch.ones_like(inputs["input_ids"])).bool()
    model.shard_sequence(None)
    expected = logits(model, inputs, use_cache=False)[real]
    model.shard_sequence(mesh)
    assert_close(logits(model, inputs, use_cache=False)[real], expected)
    loss, gradients = loss_and_gradients(model, inputs)
    loss_of_ranks, gradients_of_ranks = loss_and_gradients(model, inputs, mesh)
    assert_close(loss_of_ranks, loss)
    assert gradients_of_ranks.keys() == gradients.keys()
    most = max(gradient.abs().max() for gradient in gradients.values())
    for name, gradient in gradients.items():
        error = (gradients_of_ranks[name] - gradient).abs().max()
        assert error <= 1e-5 * max(gradient.abs().max(), most / 100), (name, error, gradient.abs().max())


def compare_mixes(ranks: int, kv_heads: int, variant: str, seeds: range):
    mesh = init_device_mesh("cpu", (dist.get_world_size() // ranks, ranks), mesh_dim_names=("data", "sequence"))
    model = make_model(kv_heads, variant)
    for seed in seeds:
        compare(model, make_inputs(*random_samples(seed), padding="left" if seed % 2 else "right"), mesh["sequence"])
    compare(model, pack(model, [VIDEO, TEXT, [3, image(4, 4), 5]]), mesh["sequence"])
    compare(model, make_inputs(TEXT, [40]), mesh["sequence"])


def compare_all():
    for variant in ("dense", "merged"):
        compare_mixes(4, 2, variant, range(1))
    compare_mixes(2, 2, "merged", range(1, 2))
    compare_mixes(2, 2, "paper", range(2, 4))
    compare_mixes(4, 4, "paper", range(4, 5))
    compare_mixes(4, 2, "paper", range(5, 7))  # ranks that share a KV head
    compare_mixes(4, 1, "paper", range(7, 8))


def test_outputs_loss_and_gradients_are_those_of_one_process():
    run(compare_all, 4)

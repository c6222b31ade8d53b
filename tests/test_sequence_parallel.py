"""Processes that share the tokens of a call compute what one process does."""

import json
import random
import runpy
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from processes import run
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from lib import tiny
from prompts import NSA, TEXT, VIDEO, assert_close, generate, image, logits, make_inputs, pack, video
from videonsa.configuration_videonsa import VideoNSAConfig
from videonsa.modeling_videonsa import VideoNSAForConditionalGeneration
from videonsa.transformers_compat import CACHE

ROOT = Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT / "benchmarks"))

from arithmetic import layer_elements, tables  # noqa: E402

# Query heads, KV heads.
SHAPES = {4: (8, 4), 3: (3, 3), 2: (6, 2), 1: (4, 1)}


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


def make_mesh(ranks: int) -> DeviceMesh:
    """`ranks` neighbours."""
    shape = (dist.get_world_size() // ranks, ranks)
    return init_device_mesh("cpu", shape, mesh_dim_names=("data", "sequence"))["sequence"]


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


def compare_mixes(ranks: int, kv_heads: int, variant: str, seeds: range, others: bool = True):
    """Compare on random samples and, as `others`, on a packed row and on text alone."""
    model, mesh = make_model(kv_heads, variant), make_mesh(ranks)
    for seed in seeds:
        compare(model, make_inputs(*random_samples(seed), padding="left" if seed % 2 else "right"), mesh)
    if others:
        compare(model, pack(model, [VIDEO, TEXT, [3, image(4, 4), 5]]), mesh)
        compare(model, make_inputs(TEXT, [40]), mesh)


def compare_two_and_four():
    compare_mixes(2, 2, "paper", range(2))
    compare_mixes(4, 4, "paper", range(2, 3), others=False)
    compare_mixes(4, 2, "paper", range(3, 6))  # ranks that share a KV head
    compare_mixes(4, 1, "paper", range(6, 7), others=False)
    compare_mixes(2, 2, "merged", range(1), others=False)
    compare_mixes(4, 2, "merged", range(1, 2))
    compare_mixes(4, 2, "dense", range(1))


def compare_eight():
    compare_mixes(8, 4, "paper", range(7, 8), others=False)


def generate_together():
    for ranks, kv_heads, variant in ((4, 2, "paper"), (2, 2, "merged"), (2, 2, "dense")):
        model, mesh = make_model(kv_heads, variant).eval(), make_mesh(ranks)
        inputs = make_inputs(VIDEO, [3, image(4, 4), 5])
        expected = generate(model, inputs)
        model.shard_sequence(mesh)
        found = generate(model, inputs)
        assert torch.equal(found.new_tokens, expected.new_tokens)
        assert_close(found.logits, expected.logits)
        assert getattr(found, CACHE).layers[0].keys.shape[1] == max(1, kv_heads // ranks)  # of all tokens


class Traffic(TorchDispatchMode):
    """Counts what a process puts into collectives: elements of each kind."""

    def __init__(self):
        super().__init__()
        self.elements = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace == "c10d":
            sent = args[1] if function._opname == "alltoall_base_" else args[0][0]
            self.elements[function._opname] += sent.numel()
        return function(*args, **(kwargs or {}))


def count_traffic():
    for ranks, kv_heads in ((4, 2), (2, 2)):
        model, mesh = make_model(kv_heads), make_mesh(ranks)
        model.shard_sequence(mesh)
        inputs = with_labels(make_inputs([3, video(11, 4, 8), 7]))
        with Traffic() as traffic:
            model(**inputs, use_cache=False).loss.backward()
        # The loss and its gradient; no gathered activations.
        assert traffic.elements.keys() == {"alltoall_base_", "allreduce_"}
        assert traffic.elements["allreduce_"] == 2

        sent = torch.tensor(traffic.elements["alltoall_base_"])
        dist.all_reduce(sent, group=mesh.get_group())
        config = model.config.text_config
        shape = {"heads": config.num_attention_heads, "kv_heads": config.num_key_value_heads, "head_dim": 16}
        layers = config.num_hidden_layers * layer_elements(inputs["input_ids"].shape[1], ranks, shape)
        features = 11 * 8 * config.hidden_size * ranks
        assert sent == 2 * (layers + features)  # forward and backward


def reject_wrong_meshes():
    model, mesh = make_model(2), make_mesh(2)
    with pytest.raises(ValueError, match="mesh must have one dimension"):
        model.shard_sequence(init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "sequence")))
    with pytest.raises(ValueError, match="the mesh has 2 ranks, and the model 3 KV heads"):
        make_model(3).shard_sequence(mesh)
    model.shard_sequence(mesh)
    with pytest.raises(ValueError, match="a static cache has no sequence parallelism"):
        generate(model, make_inputs(VIDEO), cache_implementation="static")
    model.config.text_config.nsa_variant = "released"
    with pytest.raises(ValueError, match='nsa_variant="released" has no sequence parallelism'):
        model.shard_sequence(mesh)


def time_steps(folder: str):
    sizes = {"compared": 192, "lengths": 128, "layers": 2, "hidden": 64, "heads": 4, "kv_heads": 2}
    options = {"device": "cpu", "dtype": "fp32", "output": folder, **sizes}
    sys.argv = ["sequence_parallel.py", *(str(x) for name, value in options.items() for x in (f"--{name}", value))]
    runpy.run_path(str(ROOT / "benchmarks/sequence_parallel.py"), run_name="__main__")


def four_ranks(folder: str):
    compare_two_and_four()
    generate_together()
    count_traffic()
    reject_wrong_meshes()
    time_steps(folder)


def test_four_ranks_compute_and_generate_what_one_does_and_send_what_the_arithmetic_says(tmp_path):
    run(four_ranks, 4, tmp_path)
    (row,) = json.loads((tmp_path / "sequence_parallel.json").read_text())
    assert row["ranks"] == 4 and row["tokens"] == 128 and row["ms"] > 0


def test_eight_ranks_compute_what_one_does():
    run(compare_eight, 8)


def test_the_sequence_parallelism_of_deepspeed_is_an_error(monkeypatch):
    def wrapper(*args, **kwargs):
        raise AssertionError("DeepSpeed attended")

    wrapper.__module__ = "deepspeed.runtime.sequence_parallel.ulysses_sp"
    model = make_model(2)
    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._global_mapping, model.config._attn_implementation, wrapper)
    with pytest.raises(ValueError, match="DeepSpeed's sequence parallelism cannot compute nsa_variant='paper'"):
        model(**make_inputs(VIDEO))


def test_the_page_has_the_tables_of_the_arithmetic():
    page = (ROOT / "docs/parallel.md").read_text()
    assert all(table in page for table in tables().split("\n\n"))

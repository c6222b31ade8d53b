"""Backends within a model: the Triton kernels compute and learn what PyTorch does, and torch.compile makes one graph of
a layer and of a step."""

from copy import deepcopy

import pytest
import torch
import transformers

from prompts import KERNEL_DEVICE, VIDEO, assert_close, logits, make_inputs, text_model, video
from videonsa import nsa_torch
from videonsa.transformers_compat import CACHE

pytestmark = pytest.mark.usefixtures("larger_tiles")


def training_losses(backend: str, steps: int) -> torch.Tensor:
    """Losses [steps] of learning the tokens before, and within, 60 vision tokens by heart: 4 blocks, 3 of them read."""
    model = text_model(backend)
    head = torch.nn.Linear(32, 50, device=KERNEL_DEVICE)
    optimizer = torch.optim.Adam([*model.parameters(), *head.parameters()], lr=1e-2)
    ids = torch.randint(50, (1, 64), generator=torch.Generator().manual_seed(0)).to(KERNEL_DEVICE)
    vision = (torch.arange(64, device=KERNEL_DEVICE) > 1) & (torch.arange(64, device=KERNEL_DEVICE) < 62)
    losses = []
    for _ in range(steps):
        hidden = model(input_ids=ids, vision_mask=vision[None], use_cache=False).last_hidden_state
        loss = torch.nn.functional.cross_entropy(head(hidden)[0, :-1], ids[0, 1:])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return torch.tensor(losses)


def test_triton_backend_gives_what_torch_gives(small):
    pytest.importorskip("triton")
    small.to(KERNEL_DEVICE)
    inputs = {name: x.to(KERNEL_DEVICE) for name, x in make_inputs([5, video(6, 4, 16), 6]).items()}  # 6 blocks
    small.config.nsa_backend = "torch"
    expected = logits(small, inputs)
    small.config.nsa_backend = "triton"
    torch.testing.assert_close(logits(small, inputs), expected, rtol=1e-4, atol=1e-4)


def test_triton_backend_learns_as_torch_does():
    pytest.importorskip("triton")
    steps = 200 if KERNEL_DEVICE == "cuda" else 4  # of seconds each, where the kernels are interpreted
    expected = training_losses("torch", steps)
    torch.testing.assert_close(training_losses("triton", steps), expected, rtol=1e-2 if steps > 4 else 1e-4, atol=1e-3)
    assert expected[-1] < 0.7 * expected[0]


@pytest.mark.parametrize("training", [False, True])
def test_decoder_layers_compile_in_one_graph_each(training):
    """On the kernels: nothing in a layer sends torch.compile back to Python."""
    pytest.importorskip("triton")
    torch.compiler.reset()  # what other tests compiled counts towards the limit of recompilations
    model = text_model("triton").train(training)
    hidden = torch.randn(2, 40, 32, device=KERNEL_DEVICE)
    vision = torch.zeros(2, 40, dtype=torch.bool, device=KERNEL_DEVICE)
    vision[:, 3:34], vision[1, 3:9] = True, False

    def run():
        model.zero_grad()
        with torch.set_grad_enabled(training):
            cache = None if training else transformers.DynamicCache()
            outputs = model(inputs_embeds=hidden, vision_mask=vision, **{CACHE: cache}, use_cache=not training)
        if training:
            outputs.last_hidden_state.square().sum().backward()
        return [outputs.last_hidden_state.detach(), *(p.grad for p in model.parameters() if p.grad is not None)]

    expected = run()
    for layer in model.layers:
        layer.forward = torch.compile(layer.forward, fullgraph=True, backend="aot_eager")
    for x, reference in zip(run(), expected, strict=True):
        torch.testing.assert_close(x, reference, rtol=1e-4, atol=1e-5)


def test_auto_backend_is_torch_on_cpu(small):
    assert small.config.nsa_backend == "auto"
    expected = logits(small, make_inputs(VIDEO))
    small.config.nsa_backend = "torch"
    assert torch.equal(logits(small, make_inputs(VIDEO)), expected)


@pytest.mark.parametrize("variant", ["paper", "merged"])
def test_a_compiled_prompt_leaves_the_pytorch_attention_to_python(small, variant, monkeypatch):
    seen = []

    def block_means(x, block_size):
        seen.append(torch.compiler.is_compiling())
        return means(x, block_size)

    means = nsa_torch.block_means
    monkeypatch.setattr(nsa_torch, "block_means", block_means)
    small.config.nsa_variant = variant
    inputs = make_inputs([5, video(6, 4, 16), 6])
    expected = logits(small, inputs)
    torch.compiler.reset()
    assert_close(logits(torch.compile(small, backend="eager"), inputs), expected)
    assert seen and not any(seen)


def test_decoding_step_compiles_in_one_graph(small):
    inputs = make_inputs(VIDEO)
    cache = transformers.StaticCache(config=small.config.text_config, max_cache_len=256)
    logits(small, inputs, **{CACHE: cache})
    length = inputs["input_ids"].shape[1]
    step = {
        "input_ids": torch.tensor([[7]]),
        "position_ids": torch.full((3, 1, 1), 300),
        "attention_mask": torch.arange(256)[None, None, None] <= length,
    }
    other = deepcopy(cache)
    expected = logits(small, step, **{CACHE: cache})
    compiled = torch.compile(small, backend="eager", fullgraph=True)
    assert_close(logits(compiled, step, **{CACHE: other}), expected)

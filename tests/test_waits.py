"""How often a call waits for the device.

Without a GPU, every tensor counts as one on the device but those that `Tensor.cpu` returned and what follows from them
alone. Steps that read the values of a tensor on the device wait for all that the device has to do.
"""

import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves
from transformers import DynamicCache

from prompts import IMAGE, VIDEO, load, make_inputs, pack, text_model
from videonsa import vision_layout
from videonsa.transformers_compat import CACHE

ROOT = Path(__file__).resolve().parents[1]
READS = {"item", "tolist", "numpy", "cpu", "__bool__", "__int__", "__float__", "__index__"}  # results for Python
SHAPES = {"nonzero", "masked_select", "unique", "unique_consecutive", "bincount", "repeat_interleave"}  # known late
CREATES = {"tensor", "as_tensor"}  # from Python's numbers: a copy that is waited for


class Waits(TorchFunctionMode):
    """`ours` and `others` count the waits of the repository's files, by line, and of other code, by file."""

    def __init__(self):
        super().__init__()
        self.ours, self.others = Counter(), Counter()
        self.host = []  # tensors on the CPU, kept so that no other gets their ids

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        given = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        on_host = bool(given) and all(self.is_host(x) for x in given)
        if not given:
            on_host = kwargs.get("device") is None
        indexed = name in ("__getitem__", "__setitem__") and any(
            isinstance(x, torch.Tensor) and x.dtype == torch.bool for x in tree_leaves(args[1])
        )
        if not on_host and (name in READS | SHAPES or indexed or (name in CREATES and not given)):
            self.count()
        out = func(*args, **kwargs)
        if name == "cpu":
            out = out.detach().clone()
        if name == "cpu" or (on_host and name != "to"):
            self.host += [x for x in tree_leaves(out) if isinstance(x, torch.Tensor)]
        return out

    def is_host(self, x) -> bool:
        return any(x is other for other in self.host)

    def count(self) -> None:
        frame = sys._getframe(2)
        while "/torch/" in frame.f_code.co_filename or frame.f_code.co_filename == __file__:
            frame = frame.f_back
        path = Path(frame.f_code.co_filename)
        if path.parent == ROOT:
            self.ours[f"{path.name}:{frame.f_lineno}"] += 1
        else:
            self.others[path.name] += 1


@pytest.fixture(autouse=True)
def separate_device(monkeypatch):
    """What is sent to the device is not on the host any more."""

    def send(x, *where):
        with torch._C.DisableTorchFunction():
            return x.clone()

    monkeypatch.setattr(vision_layout, "send", send)
    monkeypatch.setattr(vision_layout.VisionLayout, "to", lambda self, device: vision_layout._moved(self, device))


def waits(call) -> Waits:
    with torch.no_grad(), Waits() as mode:
        call()
    return mode


def forward(model, inputs, **options):
    model(**inputs, **options, logits_to_keep=1)


def test_what_is_read_on_the_host_is_no_wait_but_what_is_read_on_the_device_is():
    x = torch.arange(4)

    def call():
        host = x.cpu() + 1  # 1
        assert host.sum() == 10 and host[host > 1].tolist() == [2, 3, 4]
        assert (x + host).sum() == 16  # 2
        assert len(x[x > 1]) == 2  # 3
        torch.tensor([1], device=x.device)  # 4

    assert sum(waits(call).others.values()) + sum(waits(call).ours.values()) == 4


@pytest.mark.parametrize(("variant", "expected"), [("paper", 2), ("merged", 2), ("released", 3)])
def test_a_prefill_waits_twice(checkpoints, variant, expected):
    """Whether a call has vision tokens, and where; "released" tells it by positions, too. What PyTorch's path reads to
    choose a form is not counted: it is not for a GPU."""
    model = load(checkpoints["Qwen2.5-VL"], nsa_variant=variant)
    padded = make_inputs(VIDEO, IMAGE)
    padded["position_ids"], _ = model.model.get_rope_index(**padded)
    forward(model, padded)  # the first call looks at the gates
    for inputs in (padded, pack(model, [IMAGE, VIDEO])):
        places = waits(lambda inputs=inputs: forward(model, inputs, use_cache=True)).ours
        own = {place: count for place, count in places.items() if not place.startswith("nsa_")}
        assert sum(own.values()) == expected, own


def test_positions_wait_once_for_each_tensor_that_they_are_computed_from(model):
    inputs = make_inputs(VIDEO, IMAGE)
    ours = waits(lambda: model.model.get_rope_index(**inputs)).ours
    # Types, mask, two grids; seconds, which Qwen3-VL has as text.
    assert sum(ours.values()) == 4 + ("second_per_grid_ts" in inputs), ours


def test_layers_on_kernels_wait_for_nothing(monkeypatch):
    pytest.importorskip("triton")
    from videonsa import nsa_triton

    monkeypatch.setattr(nsa_triton, "reads_lengths", lambda q: False)  # as on a GPU
    model = text_model("triton").eval()
    hidden = torch.randn(1, 70, 32, device=model.device)
    vision = (torch.arange(70, device=model.device) > 3) & (torch.arange(70, device=model.device) < 64)
    model(inputs_embeds=hidden, vision_mask=vision[None])
    ours = waits(lambda: model(inputs_embeds=hidden, vision_mask=vision[None])).ours
    assert sum(ours.values()) == 1 and "vision_layout.py" in next(iter(ours)), ours


@pytest.mark.parametrize("tokens", [48, 49])
def test_operators_of_kernels_wait_for_nothing(tokens, monkeypatch):
    """Forward and backward, if all blocks are chosen, and if some are. Torch hides from `Waits` what an operator does,
    so the functions are called that it runs."""
    pytest.importorskip("triton")
    from videonsa import nsa_launches, nsa_triton

    monkeypatch.setattr(nsa_launches.Launches, "launch", lambda *_, **__: None)
    q, k, gates, cu = (
        torch.zeros(tokens, 2, 16),
        torch.zeros(tokens, 1, 16),
        torch.zeros(tokens, 2, 3),
        torch.tensor([0, tokens]),
    )
    sizes = {"block_size": 16, "window_size": 8, "scale": None}
    settings = {**sizes, "branches": [*nsa_launches.BRANCHES], "reverse": False, "need_q": True, "need_kv": True}

    def call():
        out, outputs, lse, blocks = nsa_triton._attend_gated._init_fn(
            q, k, k, gates, cu, cu, **sizes, block_count=3, save=True
        )
        nsa_triton._attend_backward._init_fn(out, None, outputs, lse, q, k, k, gates, blocks, None, cu, cu, **settings)

    assert not waits(call).ours


@pytest.mark.parametrize("kind", ["generate", "forward"])
def test_a_decoding_step_waits_no_more_than_stock(both, kind):
    ours, stock = both
    inputs = make_inputs(VIDEO)

    def step(model):
        cache = DynamicCache()
        forward(model, inputs, **{CACHE: cache}, use_cache=True)
        length = inputs["input_ids"].shape[1]
        given = {"input_ids": torch.tensor([[7]])}
        if kind == "generate":
            given["attention_mask"] = torch.ones(1, length + 1, dtype=torch.long)
            given["position_ids"] = torch.full((4, 1, 1), length)
            given["mm_token_type_ids"] = torch.zeros(1, 1, dtype=torch.int32)
        return waits(lambda: forward(model, given, **{CACHE: cache}, use_cache=True))

    found = step(ours)
    assert not found.ours, found.ours
    assert sum(found.others.values()) <= sum(step(stock).others.values())

"""Distillation of a model's dense attention into its sparse one, layer by layer (docs/distill.md).

A batch runs once, with dense attention and without gradients. In each layer, the dense output of the vision tokens
before `o_proj` is what sparse attention should give for the same hidden states. The ones that go on are the dense ones:
layers learn independently of each other, and nothing is back-propagated through the depth.

The sparse output is a gated sum of three branches, so that its squared error is a quadratic form of the gates.
`GateForm` holds it in 13 numbers per token and head. `DistillTrainer` lowers it for `finetune.py --distill`;
`measure_gates.py` says how low it can be. Shapes: N vision tokens, H query heads, G KV heads, head dimension D.
"""

import contextlib
import functools
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from videonsa.transformers_compat import Substitute
from videonsa.video_moments import branch_functions
from videonsa.vision_attention import GATE_STD, KEYS_ONLY
from videonsa.vision_layout import VisionLayout, layout_of_call

from .observe import configured
from .training import VideoTrainer

# Gates start at most so far from 0 and 1, where the sigmoid has no slope to learn by.
MARGIN = 0.02


@dataclass
class GateForm:
    """‖Σ_c g_c o_c - t‖² of tokens and heads as a function of their gates g, fp32, for branches o and a target t."""

    gram: torch.Tensor  # [N, H, 3, 3], products of the branches
    dot: torch.Tensor  # [N, H, 3], products of the branches with the target
    norm: torch.Tensor  # [N, H], ‖t‖²

    @classmethod
    def of(cls, branches: torch.Tensor, target: torch.Tensor) -> "GateForm":
        """branches [N, H, 3, D], target [N, H, D]"""
        with torch.autocast(target.device.type, enabled=False):
            branches, target = branches.float(), target.float().unsqueeze(-1)
            return cls(branches @ branches.mT, (branches @ target).squeeze(-1), target.square().sum((-2, -1)))

    def sum(self) -> "GateForm":
        """Of gates that all tokens share: [1, H, ...]."""
        return GateForm(*(x.sum(0, keepdim=True) for x in (self.gram, self.dot, self.norm)))

    def __add__(self, other: "GateForm") -> "GateForm":
        return GateForm(self.gram + other.gram, self.dot + other.dot, self.norm + other.norm)

    def error(self, gates: torch.Tensor) -> torch.Tensor:
        """Squared error [N, H] of gates [N, H, 3]."""
        g = gates.to(self.gram.dtype)
        squares = (self.gram * g.unsqueeze(-1) * g.unsqueeze(-2)).sum((-2, -1))
        return squares - 2 * (self.dot * g).sum(-1) + self.norm

    def relative(self, gates: torch.Tensor) -> torch.Tensor:
        """Squared error of each head over all tokens, relative to the target's squares: [H]."""
        return divide(self.error(gates).sum(0), self.norm.sum(0))


def best_gates(form: GateForm) -> torch.Tensor:
    """The gates in [0, 1] of least error, [N, H, 3] fp64.

    The best point of a cube lies inside of it or of one of its faces, edges and corners, where some gates are 0 or 1.
    For each of these 27, the others follow by least squares.
    """
    gram, dot = form.gram.double(), form.dot.double()
    size = dot.shape[-1]
    unit = torch.eye(size, dtype=gram.dtype, device=gram.device)
    # Branches may be alike, or 0, as the compression of the first tokens.
    ridge = 1e-9 * gram.diagonal(dim1=-2, dim2=-1).sum(-1)[..., None, None] * unit + 1e-30 * unit
    best, least = torch.zeros_like(dot), torch.full_like(dot[..., 0], torch.inf)
    for face in itertools.product((None, 0.0, 1.0), repeat=size):
        free = torch.tensor([x is None for x in face], device=gram.device)
        fixed = torch.tensor([x or 0.0 for x in face], dtype=gram.dtype, device=gram.device)
        matrix = torch.where(free[:, None] & free, gram + ridge, unit)
        g = torch.linalg.solve_ex(matrix, torch.where(free, dot - gram @ fixed, fixed))[0].clamp(0, 1)
        error = (gram * g.unsqueeze(-1) * g.unsqueeze(-2)).sum((-2, -1)) - 2 * (dot * g).sum(-1)
        better = error < least
        best, least = g.where(better[..., None], best), error.where(better, least)
    return best


def relative_error(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Squared error of each head over all tokens, relative to the target's squares: [N, H, D] -> [H]."""
    target = target.float()
    return divide((output.float() - target).square().sum((0, 2)), target.square().sum((0, 2)))


def divide(error: torch.Tensor, norm: torch.Tensor) -> torch.Tensor:
    return error / norm.clamp(min=torch.finfo(norm.dtype).tiny)


@dataclass
class DenseLayer:
    """A decoder layer in a dense call: what its attention reads, and what each head gives before `o_proj`."""

    attention: nn.Module
    hidden_states: torch.Tensor  # [batch, length, hidden]
    position_embeddings: tuple[torch.Tensor, torch.Tensor]
    layout: VisionLayout
    output: torch.Tensor  # [batch * length, H, D]

    @property
    def target(self) -> torch.Tensor:
        """[N, H, D]"""
        return self.output[self.layout.queries]

    def project(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """q [batch, H, length, D], k and v [batch, G, length, D], after the rotary."""
        q, (k, v) = self.attention.stock_forward(
            KEYS_ONLY,
            self.hidden_states,
            {"o_proj": nn.Identity()},
            position_embeddings=self.position_embeddings,
            attention_mask=None,
        )
        return q.unflatten(-1, (-1, self.attention.head_dim)).transpose(1, 2), k, v

    @property
    def inputs(self) -> torch.Tensor:
        """What gates are made of, [N, hidden]."""
        return self.hidden_states.flatten(0, 1)[self.layout.queries]

    def gates(self) -> torch.Tensor:
        """[N, H, 3]"""
        return self.attention.gates(self.inputs)

    def form(self, temperature: float = 1.0) -> GateForm:
        """The error of the sparse attention as a function of the gates; its logits are divided by `temperature`."""
        q, k, v = self.project()
        layout, config = self.layout, self.attention.config
        q = q.to(v.dtype).transpose(1, 2).flatten(0, 1)[layout.queries]
        k, v = layout.keys.take(k.to(v.dtype)), layout.keys.take(v)
        nsa = branch_functions(self.attention, q)
        common = {"cu_seqlens": layout.cu_seqlens, "scale": self.attention.scaling / temperature}
        blocks = {**common, "block_size": config.block_size}
        compression, lse = nsa.compressed_attention(q, k, v, **blocks)
        chosen = nsa.select_blocks(q, k, lse, block_count=config.block_count, **blocks)
        selection, _ = nsa.selected_attention(q, k, v, chosen, **blocks)
        window, _ = nsa.window_attention(q, k, v, window_size=config.window_size, **common)
        return GateForm.of(torch.stack([compression, selection, window], -2), self.target)

    def sparse(self, variant: str = "paper") -> torch.Tensor:
        """What the layer gives with a sparse variant, [batch * length, H, D]: all tokens, by the model's own code."""
        gates = None if variant == "merged" else self.gates()
        student = Substitute(self.attention, config=Substitute(self.attention.config, nsa_variant=variant))
        return type(self.attention).attend(student, *self.project(), gates, self.layout).flatten(0, 1)


@contextlib.contextmanager
def dense_layers(model, inputs: dict, see: Callable[[DenseLayer], None], observe: Callable | None = None) -> Iterator:
    """Calls of a model on `inputs` attend densely, and see() is called in each decoder layer, the first one first.

    The decoder keeps no graph; see() may make one of its own. A LoRA model is dense without its adapters, and see() has
    them.

    Args:
        observe: of the layout; see `SparseModel.forward`.
    """
    decoder, with_gradients = model.model.language_model, torch.is_grad_enabled()
    vision = model.model.token_types(inputs["input_ids"]) > 0
    masks = (inputs.get("attention_mask"), inputs.get("position_ids"))
    layout = layout_of_call(model.config.text_config, vision, 0, *masks, observe, 0)
    read = {}

    def keep(attention, args, kwargs):
        read[attention] = {name: kwargs[name] for name in ("hidden_states", "position_embeddings")}

    def compare(attention, o_proj, args):
        output = args[0].flatten(0, 1).unflatten(-1, (-1, attention.head_dim))
        switch_adapters(attention, True)
        with torch.set_grad_enabled(with_gradients):
            see(DenseLayer(attention, **read.pop(attention), layout=layout, output=output))

    def gradients(on: bool):
        def hook(*_):
            torch.set_grad_enabled(on)

        return hook

    hooks = [
        decoder.register_forward_pre_hook(gradients(False)),
        decoder.register_forward_hook(gradients(with_gradients), always_call=True),
    ]
    for attention in (layer.self_attn for layer in decoder.layers):
        switch_adapters(attention, False)
        hooks.append(attention.register_forward_pre_hook(keep, with_kwargs=True))
        hooks.append(attention.o_proj.register_forward_pre_hook(functools.partial(compare, attention)))
    try:
        with configured(model, nsa_variant="dense"):
            yield
    finally:
        for hook in hooks:
            hook.remove()


def switch_adapters(attention: nn.Module, on: bool) -> None:
    """Switch the adapters of PEFT in a layer on or off, if there are any."""
    for module in attention.modules():
        if hasattr(module, "enable_adapters"):
            module.enable_adapters(on)


def watch_layers(model, inputs: dict, see: Callable[[DenseLayer], None]) -> None:
    """Run a batch of model inputs densely and call see() in each decoder layer."""
    with dense_layers(model, inputs, see):
        model(**without_labels(inputs))


def without_labels(inputs: dict) -> dict:
    """The inputs for a call whose logits nobody reads."""
    return {**{name: x for name, x in inputs.items() if name != "labels"}, "logits_to_keep": 1, "use_cache": False}


def trained_linear(gate: nn.Module) -> nn.Linear:
    """The layer of gates that is trained; PEFT wraps a copy of it."""
    return next(m for m in gate.modules() if isinstance(m, nn.Linear) and m.weight.requires_grad)


class DistillTrainer(VideoTrainer):
    """Trains gates, and adapters of q, k and v if the model has some, to imitate the model's own dense attention.

    The loss is the relative squared error of the vision tokens' attention before `o_proj`, the mean over heads and
    layers. Adapters change what text tokens read, too: with them, the error of the text tokens' attention is added.
    Every batch counts the same.
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            raise ValueError("--distill needs whole layers in every process: use DDP, not FSDP or DeepSpeed")
        self.model_accepts_loss_kwargs = False
        self.adapted = hasattr(self.model, "peft_config")
        self.plain = self.model.get_base_model() if self.adapted else self.model
        self.errors = []  # [layers], of each batch since the last log

    @torch.no_grad()
    def start_gates(self, items: Sequence) -> None:
        """Make new gates, which are the best constant ones for items of the data set: their biases say it all."""
        forms = {}

        def see(layer):
            form = layer.form().sum()
            forms[layer.attention] = forms[layer.attention] + form if layer.attention in forms else form

        self.plain.eval()
        for item in items:
            inputs = self._prepare_inputs(self.data_collator([item]))
            with self.accelerator.autocast():
                watch_layers(self.plain, inputs, see)
        for attention, form in forms.items():
            first, second = (trained_linear(gate) for gate in (attention.g_proj_1, attention.g_proj_2))
            first.weight.normal_(0, GATE_STD)
            for parameter in (first.bias, second.weight):
                parameter.zero_()
            gates = best_gates(form).clamp(MARGIN, 1 - MARGIN).flatten()
            second.bias.copy_(attention.config.gate_temperature * gates.logit())

    def compute_loss(self, model, inputs, *args, **kwargs):
        observe = None
        if model.training:
            self.meter.count(inputs)
            observe = self.meter.observe
        errors = []
        with dense_layers(self.plain, inputs, lambda layer: errors.append(self.layer_error(layer)), observe):
            model(**without_labels(inputs))
        errors = torch.stack(errors)
        if model.training:
            self.errors.append(errors.detach())
        return errors.mean()

    def layer_error(self, layer: DenseLayer) -> torch.Tensor:
        """The loss of a layer, a number. With gradient checkpointing, its activations are computed twice, not kept."""

        def run(function):
            again = self.args.gradient_checkpointing and torch.is_grad_enabled()
            return checkpoint(function, use_reentrant=False) if again else function()

        def adapted_error():
            output = layer.sparse()
            rows = (layer.layout.queries, layer.layout.text)
            return sum(relative_error(output[x], layer.output[x]).mean() for x in rows)

        if self.adapted:
            return run(adapted_error)
        with torch.no_grad():
            form = layer.form()
        # Nothing else of the layer is kept.
        gates = run(functools.partial(layer.attention.gates, layer.inputs))
        if layer.layout.observe is not None:
            layer.layout.observe(layer.attention, None, None, None, gates, layer.layout)
        return form.relative(gates).mean()

    def counted(self, inputs) -> torch.Tensor:
        return (self.plain.model.token_types(inputs["input_ids"]) > 0).sum()

    def log(self, logs, *args, **kwargs):
        if "loss" in logs and self.errors:
            errors = self.accelerator.reduce(torch.stack(self.errors).mean(0), "mean")
            logs = {**logs, **{f"error/layer_{i:02}": error for i, error in enumerate(errors.tolist())}}
            self.errors = []
        super().log(logs, *args, **kwargs)

"""Distillation: finetune.py --distill, the forms that it minimises, and measure_gates.py."""

import json
import sys

import pytest
import torch
from peft import PeftModel
from trainings import losses, weights

import finetune
import measure_gates
from lib.distill import DenseLayer, GateForm, best_gates, dense_layers, relative_error
from lib.observe import configured
from lib.training import part_of
from prompts import MIXED, VIDEO, logits, make_inputs
from videonsa.modeling_videonsa import VideoNSAForConditionalGeneration
from videonsa.vision_attention import untrained_gates

QUICK = [
    "--distill",
    "--learning_rate",
    1e-2,
    "--logging_steps",
    1,
    "--report_to",
    "none",
    "--dataloader_num_workers",
    0,
]


def dense_logits(model, inputs) -> torch.Tensor:
    with configured(model, nsa_variant="dense"):
        return logits(model, inputs)


def test_the_form_of_a_layer_is_the_error_of_its_sparse_attention(model):
    inputs, seen = make_inputs(VIDEO, MIXED), []

    def see(layer: DenseLayer):
        seen.append(layer.attention.layer_idx)
        form, gates, rows = layer.form(), layer.gates(), layer.layout.queries
        output = layer.sparse()
        torch.testing.assert_close(
            form.relative(gates), relative_error(output[rows], layer.target), rtol=1e-3, atol=1e-5
        )
        # Text rows are dense in both.
        rows = layer.layout.text
        torch.testing.assert_close(output[rows], layer.output[rows], rtol=1e-4, atol=1e-5)

        bound = form.relative(best_gates(form))
        assert (bound < form.relative(gates)).all()
        constant = form.sum().relative(best_gates(form.sum()))
        assert (bound <= constant + 1e-6).all() and (constant < form.relative(gates)).all()

    expected = dense_logits(model, inputs)
    with torch.no_grad(), dense_layers(model, inputs, see):
        assert torch.equal(model(**inputs).logits, expected)
    assert seen == [0, 1] and model.config.nsa_variant == "paper"


def test_best_gates_are_those_of_a_fine_grid():
    generator = torch.Generator().manual_seed(0)
    branches, target = torch.randn(40, 2, 3, 5, generator=generator), torch.randn(40, 2, 5, generator=generator)
    branches[:2, :, 0] = 0  # no block is complete
    branches[2:4, :, 1] = branches[2:4, :, 2]  # a selection of all tokens is a window of all
    form = GateForm.of(branches, target)
    found = form.error(best_gates(form))
    steps = torch.linspace(0, 1, 21)
    least = form.error(torch.cartesian_prod(steps, steps, steps)[:, None, None]).amin(0)
    assert (found <= least + 1e-5).all() and (found >= least - 0.1).all()


def test_gradients_of_a_layer_reach_its_own_gates_alone(small):
    for name, parameter in small.named_parameters():
        parameter.requires_grad_("g_proj" in name)
    small.train()
    inputs, errors = make_inputs(VIDEO), []
    with dense_layers(small, inputs, lambda layer: errors.append(layer.form().relative(layer.gates()).mean())):
        output = small(**inputs).logits
    assert not output.requires_grad and torch.is_grad_enabled()
    errors[1].backward()
    found = {name for name, parameter in small.named_parameters() if parameter.grad is not None}
    assert found == {name for name, _ in small.named_parameters() if "layers.1.self_attn.g_proj" in name}


def test_gates_learn_from_a_folder_of_clips_and_know_it(train, tiny_repository, needles, tmp_path, monkeypatch, capsys):
    count = len([*(needles / "validation").glob("*.mp4")])
    options = ["--method", "gates", "--start_samples", 0, "--per_device_train_batch_size", count, "--max_steps", 8]
    trainer, folder, printed = train(*options, *QUICK, "--save_strategy", "no", data=needles / "validation")
    assert f"train: {count} samples, 0 dropped" in printed and "trained: gates 0.03 M\n" in printed
    first, *_, last = losses(trainer)  # all samples in each step
    assert last < first / 5
    logged = trainer.state.log_history[0]
    assert first == pytest.approx((logged["error/layer_00"] + logged["error/layer_01"]) / 2, rel=1e-3)
    assert 0.4 < logged["gate_window"] < 0.6

    before, after = weights(tiny_repository), weights(folder)
    assert {part_of(name) for name in before if not torch.equal(before[name], after[name])} == {"gates"}
    base, distilled = (VideoNSAForConditionalGeneration.from_pretrained(x).eval() for x in (tiny_repository, folder))
    inputs = make_inputs(VIDEO, MIXED)
    assert torch.equal(dense_logits(distilled, inputs), dense_logits(base, inputs))
    assert untrained_gates([layer.self_attn for layer in base.model.language_model.layers])
    assert not untrained_gates([layer.self_attn for layer in distilled.model.language_model.layers])
    card = (folder / "README.md").read_text()
    assert f"without answers, by `examples/finetune.py --distill` (gates): {count} samples, 8 steps of {count}." in card
    assert f"error of the sparse attention at the end: {last:.3f}." in card

    given = [folder, needles / "test.json", tmp_path / "new/out.json", "--clips", 1, "--max_new_tokens", 1]
    given += ["--answers", "paper", "--temperatures", 1, 2, "--teacher", tiny_repository]
    monkeypatch.setattr(sys, "argv", ["measure_gates.py", *map(str, given)])
    measure_gates.main()
    assert "agreement" in capsys.readouterr().out
    result = json.loads((tmp_path / "new/out.json").read_text())
    for row in result["rows"]:
        for layer in row["layers"]:
            assert layer["bound"] <= min(layer["now"], layer["constant"])
            assert layer["bound at 1"] == layer["bound"] != layer["bound at 2"]
    assert result["answers"]["dense"]["agreement"]["all"]["all"]["accuracy"] == 1


def test_a_resumed_distillation_with_adapters_is_the_uninterrupted_one_and_keeps_its_teacher(train, tiny_repository):
    options = ["--method", "lora", "--lora_dropout", 0.3, "--per_device_train_batch_size", 2, "--max_steps", 3]
    whole, folder, printed = train(*options, *QUICK, "--save_steps", 1)
    assert "trained: language 0.02 M, gates 0.03 M\n" in printed
    assert losses(whole)[0] < 0.7  # new gates start as the best constant ones
    # Activations that are computed twice are the same.
    resumed, again, _ = train(
        *options, *QUICK, "--save_steps", 9, "--gradient_checkpointing",
        "--resume_from_checkpoint", folder / "checkpoint-1", output="again",
    )  # fmt: skip
    assert losses(resumed) == losses(whole)
    for name, tensor in weights(again / "adapter").items():
        assert torch.equal(tensor, weights(folder / "adapter")[name]), name

    adapter = weights(folder / "adapter")
    changed = {name.split(".")[-3 if "lora" in name else -2] for name in adapter}
    assert changed == {"q_proj", "k_proj", "v_proj", "g_proj_1", "g_proj_2"}
    assert all(tensor.any() for name, tensor in adapter.items() if "lora_B" in name)
    inputs = make_inputs(VIDEO)
    base = VideoNSAForConditionalGeneration.from_pretrained(tiny_repository).eval()
    expected = dense_logits(base, inputs)
    adapted = PeftModel.from_pretrained(base, folder / "adapter").eval()
    with adapted.disable_adapter():
        assert torch.equal(dense_logits(base, inputs), expected)
    assert not torch.equal(dense_logits(base, inputs), expected)
    assert "Adapters of the queries, keys and values" in (folder / "README.md").read_text()


def test_a_batch_counts_once_however_it_is_accumulated(train):
    options = ["--method", "gates", "--start_samples", 0, "--max_steps", 1, "--save_strategy", "no", *QUICK]
    parts = ["--per_device_train_batch_size", 1, "--gradient_accumulation_steps", 2, "--learning_rate", 0]
    trainer, _, _ = train(*options, *parts)
    batches = list(trainer.get_train_dataloader().batch_sampler)[:2]
    model = trainer.model.eval()
    with torch.no_grad():
        each = [trainer.compute_loss(model, trainer.data_collator([trainer.train_dataset[i]])) for (i,) in batches]
    assert losses(trainer) == [pytest.approx(sum(each).item() / 2, rel=1e-3)]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "--distill needs --method gates or lora, got full: whole weights"),
        (["--method", "gates", "--nsa_variant", "dense"], "--distill needs --nsa_variant paper, whose .*, got dense"),
        (["--method", "lora", "--train_vision"], "leave out --train_vision"),
        (["--method", "gates", "--start_samples", "-1"], "--start_samples must be 0 or more, got -1"),
    ],
)
def test_what_does_not_go_with_distillation_is_refused(tiny_repository, options, message):
    given = ["--model", str(tiny_repository), "--train_data", "d", "--output_dir", "o", "--distill", *options]
    with pytest.raises(ValueError, match=message):
        finetune.load_config(finetune.parse_arguments(given)[0])

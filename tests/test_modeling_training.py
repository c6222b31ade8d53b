"""Training of a model: gradients, gradient checkpointing, autocast, frozen parts, and runs of Trainer."""

from copy import deepcopy

import pytest
import torch
import torch.nn.functional as F
from trainings import losses
from transformers import Trainer, TrainingArguments

from prompts import GATES, IMAGE, MEDIA_KEYS, MIXED, TEXT, VIDEO, assert_close, is_vision, load, make_inputs, video
from videonsa.transformers_compat import CACHE, cache_of


def with_labels(inputs):
    labels = inputs["input_ids"].masked_fill(is_vision(inputs) | (inputs["attention_mask"] == 0), -100)
    return {**inputs, "labels": labels}


def loss_and_gradients(model, inputs):
    model.zero_grad()
    loss = model(**with_labels(inputs)).loss
    loss.backward()
    return loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("use_reentrant", [True, False], ids=["reentrant", "not reentrant"])
@pytest.mark.parametrize("samples", [[VIDEO, MIXED], [TEXT, [40]]], ids=["vision", "text only"])
def test_gradient_checkpointing_changes_neither_loss_nor_gradients(model, samples, use_reentrant):
    inputs = make_inputs(*samples)
    model.train()
    loss, gradients = loss_and_gradients(model, inputs)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": use_reentrant})
    model.enable_input_require_grads()
    again, gradients_again = loss_and_gradients(model, inputs)
    assert_close(again, loss)
    assert gradients.keys() == gradients_again.keys()
    if samples[0] is VIDEO:
        assert gradients.keys() == {name for name, _ in model.named_parameters()}
    for name, gradient in gradients.items():
        assert gradient.abs().max() > 0 or "g_proj" in name or "k_proj.bias" in name, name
        torch.testing.assert_close(gradients_again[name], gradient, rtol=1e-4, atol=1e-7)


def test_loss_in_training_is_that_of_evaluation(model):
    inputs = with_labels(make_inputs(VIDEO, MIXED, TEXT))
    with torch.no_grad():
        expected = model(**inputs).loss
    assert torch.equal(model.train()(**inputs).loss, expected)


def test_gates_have_gradients_where_vision_is_and_zeros_for_text_alone(model):
    model.train()
    for samples, zero in (([VIDEO, TEXT], False), ([TEXT, [40]], True)):
        _, gradients = loss_and_gradients(model, make_inputs(*samples))
        assert gradients.keys() >= GATES
        assert all((gradients[name] == 0).all() == zero for name in GATES)


def test_training_step_under_autocast_follows_fp32(small):
    inputs = make_inputs(VIDEO, MIXED, TEXT)
    small.train()
    loss, gradients = loss_and_gradients(small, inputs)
    with torch.autocast("cpu", torch.bfloat16):
        again, gradients_again = loss_and_gradients(small, inputs)
    assert abs(again - loss) < 0.02
    assert gradients.keys() == gradients_again.keys()
    with torch.autocast("cpu", torch.bfloat16):
        assert_close(small(**with_labels(inputs), use_cache=False).loss, again, 1e-3)
    for name in gradients:
        assert gradients_again[name].isfinite().all(), name
    for name in GATES:
        assert F.cosine_similarity(gradients[name].flatten(), gradients_again[name].flatten(), dim=0) > 0.9
    before = small.model.language_model.layers[0].self_attn.g_proj_2.weight.detach().clone()
    torch.optim.AdamW(small.parameters(), lr=1e-3).step()
    assert not torch.equal(small.model.language_model.layers[0].self_attn.g_proj_2.weight, before)
    with torch.autocast("cpu", torch.bfloat16):
        assert loss_and_gradients(small, inputs)[0] < again


@torch.no_grad()
def test_autocast_works_over_a_cache_that_began_with_text(small):
    inputs = make_inputs([9, *VIDEO])
    positions, _ = small.model.get_rope_index(**inputs)
    first, rest = slice(9), slice(9, None)
    media = {key: inputs[key] for key in MEDIA_KEYS if key in inputs}
    with torch.autocast("cpu", torch.bfloat16):
        expected = small(**inputs).logits
        cache = cache_of(small(input_ids=inputs["input_ids"][:, first], position_ids=positions[..., first]))
        step = {"input_ids": inputs["input_ids"][:, rest], "position_ids": positions[..., rest], **media}
        actual = small(**step, **{CACHE: cache}).logits
    assert ((actual - expected[:, rest]).float().pow(2).mean() / expected.float().pow(2).mean()).sqrt() < 0.1


@pytest.mark.parametrize("use_reentrant", [None, True, False], ids=["plain", "reentrant", "not reentrant"])
def test_training_with_a_frozen_vision_tower_reaches_all_the_rest(small, use_reentrant):
    inputs = make_inputs(VIDEO, MIXED)
    _, expected = loss_and_gradients(small.train(), inputs)
    small.model.visual.requires_grad_(False)
    if use_reentrant is not None:
        small.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": use_reentrant})
        small.enable_input_require_grads()
    _, gradients = loss_and_gradients(deepcopy(small), inputs)
    assert gradients.keys() == {name for name in expected if ".visual." not in name}
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-4, atol=1e-7)


SMALL_VIDEO = [3, video(6, 4, 8, seed=4), 20]


@pytest.fixture
def make_trainer(backbone, checkpoints, tmp_path):
    """Trainers of all parameters on video, image and text samples, each from the same weights."""

    def make(name, **settings):
        arguments = TrainingArguments(
            output_dir=str(tmp_path / name),
            max_steps=6,
            save_steps=3,
            logging_steps=1,
            learning_rate=3e-3,
            per_device_train_batch_size=2,
            per_device_eval_batch_size=2,
            remove_unused_columns=False,
            use_cpu=True,
            report_to=[],
            disable_tqdm=True,
            seed=0,
            **settings,
        )
        samples = [SMALL_VIDEO, IMAGE, TEXT, [*SMALL_VIDEO, 9], MIXED, [30]]
        return Trainer(
            load(checkpoints[backbone]),
            arguments,
            data_collator=lambda samples: with_labels(make_inputs(*samples)),
            train_dataset=samples,
            eval_dataset=samples[:2],
        )

    return make


def test_resumed_training_continues_as_if_uninterrupted(make_trainer, tmp_path):
    whole = make_trainer("whole")
    whole.train()
    resumed = make_trainer("resumed")
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-3"))
    assert len(losses(whole)) == 6
    assert losses(whole)[-1] < losses(whole)[0]
    assert losses(resumed) == pytest.approx(losses(whole), abs=1e-6)
    theirs = whole.model.state_dict()
    for name, weight in resumed.model.state_dict().items():
        torch.testing.assert_close(weight, theirs[name], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("backbone", ["Qwen2.5-VL"], indirect=True)
def test_best_model_is_loaded_at_the_end_of_training(make_trainer):
    trainer = make_trainer(
        "best",
        load_best_model_at_end=True,
        eval_strategy="steps",
        eval_steps=3,
        metric_for_best_model="eval_loss",
        greater_is_better=True,  # the worse model, so that it is not the one in memory
    )
    trainer.train()
    assert trainer.state.best_model_checkpoint.endswith("checkpoint-3")
    assert trainer.evaluate()["eval_loss"] == pytest.approx(max(losses(trainer, "eval_loss")), abs=1e-6)
    assert losses(trainer, "eval_loss")[0] != pytest.approx(losses(trainer, "eval_loss")[1], abs=1e-3)

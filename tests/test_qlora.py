"""finetune.py --load_in_4bit: adapters learn over weights of 4 bits, and belong to the model with all its bits."""

import json
import shutil

import pytest
import torch
from trainings import losses, weights

from lib.training import part_of

QUICK = ["--logging_steps", 1, "--report_to", "none", "--dataloader_num_workers", 0, "--save_strategy", "no"]
FOUR_BITS = ["--method", "lora", "--load_in_4bit"]


@pytest.mark.needs("bitsandbytes")
def test_adapters_learn_over_4_bits_and_are_merged_into_the_model_with_all_bits(train, tiny_repository, needles):
    options = [*FOUR_BITS, "--max_steps", 2, "--learning_rate", 1e-2, "--lora_dropout", 0, *QUICK]
    one, _, _ = train(*options, output="one")
    # An evaluation must not change how the weights are held.
    evaluation = ["--eval_data", needles / "validation.json", "--eval_strategy", "steps", "--eval_steps", 1]
    evaluation += ["--eval_answers", 0, "--gradient_checkpointing"]
    two, folder, _ = train(*options, *evaluation, output="two")
    assert losses(two) == pytest.approx(losses(one), rel=1e-4)
    assert losses(two)[-1] < losses(two)[0]
    layer = two.model.get_base_model().model.language_model.layers[0]
    held = (layer.mlp.up_proj.base_layer, layer.self_attn.g_proj_1.original_module)
    assert [type(module).__name__ for module in held] == ["Linear4bit", "GateLinear"]

    before, after = weights(tiny_repository), weights(folder)
    changed = {part_of(name) for name in before if not torch.equal(before[name], after[name])}
    assert changed == {"language", "gates", "merger"}
    for path in (folder, folder / "adapter"):
        assert "quantization_config" not in (path / "config.json").read_text()
    assert "(lora, over 4 bits)" in (folder / "README.md").read_text()
    adapter = weights(folder / "adapter")
    (down,) = (x for name, x in adapter.items() if name.endswith("layers.0.self_attn.q_proj.lora_A.weight"))
    (up,) = (x for name, x in adapter.items() if name.endswith("layers.0.self_attn.q_proj.lora_B.weight"))
    (name,) = (name for name in before if name.endswith("layers.0.self_attn.q_proj.weight"))
    torch.testing.assert_close(after[name] - before[name], 2 * up @ down, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize(
    ("options", "found", "fsdp", "error"),
    [
        (["--load_in_4bit"], True, False, "--load_in_4bit needs --method lora, got full"),
        (FOUR_BITS, False, False, r'--load_in_4bit needs bitsandbytes: pip install -e "\.\[ecosystem\]"'),
        (FOUR_BITS, True, True, "--load_in_4bit was not tried with FSDP or DeepSpeed"),
    ],
    ids=["method", "package", "FSDP"],
)
def test_4_bits_are_refused_before_anything_is_read(train, monkeypatch, options, found, fsdp, error):
    monkeypatch.setattr("lib.qlora.is_bitsandbytes_available", lambda: found)
    monkeypatch.setenv("ACCELERATE_USE_FSDP", str(fsdp))
    with pytest.raises(ValueError, match=error):
        train(*options, data="nothere.json")


def test_a_quantized_checkpoint_is_no_model_to_train(train, tiny_repository, tmp_path):
    folder = shutil.copytree(tiny_repository, tmp_path / "quantized")
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_8bit": True}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="--model .*quantized holds quantized weights; name the model"):
        train(model=folder)

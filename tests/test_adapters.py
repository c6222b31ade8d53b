"""LoRA adapters as models: what scripts and users open, the card beside it, and the modes of weight files."""

import json
import os
import re
import shutil
import sys

import pytest
import torch

import evaluate
from lib.loading import load

QUICK = ["--logging_steps", 1, "--report_to", "none", "--dataloader_num_workers", 0, "--save_strategy", "steps"]


@pytest.fixture
def tuned(train):
    """The output folder of a LoRA training with another window, with a checkpoint."""
    options = ["--method", "lora", "--max_steps", 2, "--save_steps", 2, "--learning_rate", 1e-2, "--window_size", 24]
    mask = os.umask(0o022)
    try:
        return train(*options, *QUICK)[1]
    finally:
        os.umask(mask)


def weights(model) -> dict[str, torch.Tensor]:
    return {name: x for name, x in model.state_dict().items() if "rotary" not in name}


def test_adapters_and_checkpoints_are_models(tuned, tiny_repository, needles, tmp_path, monkeypatch, capsys):
    merged, processor = load(str(tuned), "cpu")
    expected = weights(merged)
    base = weights(load(str(tiny_repository), "cpu")[0])
    assert any(not torch.equal(x, base[name]) for name, x in expected.items())
    for name in ("adapter", "checkpoint-2"):
        model, read = load(str(tuned / name), "cpu")
        assert type(model).__name__ == type(merged).__name__ and model.config.window_size == 24
        found = weights(model)
        assert found.keys() == expected.keys()
        for key, x in expected.items():
            torch.testing.assert_close(found[key], x, rtol=1e-5, atol=1e-6, msg=key)
        assert type(read).__name__ == type(processor).__name__
    config = load(str(tuned / "adapter"), "cpu", nsa_variant="dense", nsa_backend="torch")[0].config
    assert (config.nsa_variant, config.nsa_backend) == ("dense", "torch")

    # By one line beside the base model, as docs/finetuning.md and the card have it.
    card = (tuned / "adapter/README.md").read_text()
    assert card.startswith("---\n") and "library_name: peft" in card and "More Information Needed" not in card
    (snippet,) = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    assert 'base = AutoModel.from_pretrained("' in snippet and "window_size=24" in snippet
    assert 'PeftModel.from_pretrained(base, "out", subfolder="adapter")' in snippet
    assert "demo.py --model out/adapter" in card and "hf download" not in card
    monkeypatch.chdir(tuned.parent)
    names = {}
    exec(compile(snippet.replace(', device_map="auto"', ""), "card", "exec"), names)
    assert names["model"].config.window_size == 24
    assert not (tuned / "checkpoint-2/README.md").exists()

    options = [tuned / "checkpoint-2", needles / "test.json", tmp_path / "out.json", "--limit", 1, "--workers", 0]
    monkeypatch.setattr(sys, "argv", ["evaluate.py", *map(str, options)])
    evaluate.main()
    assert json.loads((tmp_path / "out.json").read_text())["nsa"]["window_size"] == 24

    for path in tuned.rglob("*.safetensors"):
        assert path.stat().st_mode & 0o777 == 0o644, path


def test_an_adapter_without_its_base_or_given_to_finetune_is_explained(tuned, train, tmp_path):
    with pytest.raises(ValueError, match="is an adapter; name a model, such as the merged one beside it"):
        train("--dry_run", model=tuned / "adapter")
    lost = shutil.copytree(tuned / "adapter", tmp_path / "lost")
    config = json.loads((lost / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = "nothere"
    (lost / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(FileNotFoundError, match="lost is an adapter, whose base model nothere is no folder"):
        load(str(lost), "cpu")

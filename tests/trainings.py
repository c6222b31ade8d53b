"""What tests of training read from a run."""

from pathlib import Path

import torch
from safetensors.torch import load_file


def losses(trainer, key="loss") -> list[float]:
    """Of each time that it was logged; `key` may be eval_loss."""
    return [log[key] for log in trainer.state.log_history if key in log]


def weights(folder) -> dict[str, torch.Tensor]:
    """All that is in the safetensors files of a folder."""
    return {name: tensor for file in Path(folder).glob("*.safetensors") for name, tensor in load_file(file).items()}

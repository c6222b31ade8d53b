"""Native Sparse Attention as Triton kernels: the functions of `nsa_torch.py`, with the same arguments and results.

The kernels are not written yet. `available` says so, which makes `nsa_backend="auto"` use PyTorch; calling a function
here says it as an error, which is what `nsa_backend="triton"` leads to.
"""

import torch


def available(device: torch.device) -> bool:
    """Whether the kernels of this file can run on `device`."""
    return False


def nsa_attention(*args, **kwargs):
    _missing("nsa_attention")


def compressed_attention(*args, **kwargs):
    _missing("compressed_attention")


def select_blocks(*args, **kwargs):
    _missing("select_blocks")


def selected_attention(*args, **kwargs):
    _missing("selected_attention")


def window_attention(*args, **kwargs):
    _missing("window_attention")


def _missing(name: str):
    raise NotImplementedError(
        f"nsa_triton.{name}: the Triton kernels are not part of this release; nsa_torch.{name} computes the same "
        '(nsa_backend="torch", or "auto", which falls back to it)'
    )

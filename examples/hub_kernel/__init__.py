"""Native Sparse Attention (arXiv 2502.11089), forward and backward: any group of 1 to 16 query heads per KV head,
packed sequences, fewer queries than keys.

Each function runs Triton kernels where `available(q)` says so, and plain PyTorch elsewhere. This file opens the Hub
kernel that `examples/export_kernel.py` of VideoNSA writes; the other ones stand at the root of that repository.
"""

import functools

from . import nsa_torch, nsa_triton
from .nsa_triton import available

# The public API, to which the version of the kernel belongs.
__all__ = [
    "nsa_attention",
    "compressed_attention",
    "select_blocks",
    "selected_attention",
    "window_attention",
    "available",
]


def _by_device(name):
    """A function of `nsa_torch`, by the kernels where they can serve q."""
    fast, reference = getattr(nsa_triton, name), getattr(nsa_torch, name)

    @functools.wraps(reference)
    def attend(q, *arguments, **options):
        return (fast if available(q) else reference)(q, *arguments, **options)

    return attend


nsa_attention = _by_device("nsa_attention")
compressed_attention = _by_device("compressed_attention")
select_blocks = _by_device("select_blocks")
selected_attention = _by_device("selected_attention")
window_attention = _by_device("window_attention")

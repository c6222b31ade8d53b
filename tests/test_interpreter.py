"""What the patched interpreter of triton refuses; that it computes as a GPU does is tested with the kernels."""

import pytest
import torch

triton = pytest.importorskip("triton")
if torch.cuda.is_available():
    pytest.skip("kernels run natively on a GPU", allow_module_level=True)

import triton.language as tl  # noqa: E402


@triton.jit
def _copy(X, Y, N: tl.constexpr, SHIFT: tl.constexpr, STEP: tl.constexpr):
    """Program p copies N values, from p * N + SHIFT on, to p * STEP."""
    p = tl.program_id(0)
    at = tl.arange(0, N)
    tl.store(Y + p * STEP + at, tl.load(X + p * N + SHIFT + at))


def test_programs_that_keep_apart_pass():
    x, y = torch.arange(8.0), torch.zeros(8)
    _copy[(2,)](x, y, N=4, SHIFT=0, STEP=4)
    assert torch.equal(x, y)
    _copy[(2,)](x, x, N=4, SHIFT=0, STEP=4)  # what a program itself has read, it may write


def test_an_access_out_of_bounds_is_an_error():
    with pytest.raises(Exception, match="IndexError.*load: 1 of 4 active lanes out of bounds"):
        _copy[(2,)](torch.zeros(8), torch.zeros(8), N=4, SHIFT=1, STEP=4)


def test_two_programs_that_write_one_address_are_an_error():
    with pytest.raises(Exception, match="RuntimeError.*store: 1 active lanes on what another program has written"):
        _copy[(2,)](torch.zeros(8), torch.zeros(8), N=4, SHIFT=0, STEP=3)


def test_a_program_that_reads_what_another_writes_is_an_error_in_either_order():
    x = torch.zeros(16)
    with pytest.raises(Exception, match="RuntimeError.*load: 4 active lanes on what another program has written"):
        _copy[(2,)](x, x[4:], N=4, SHIFT=0, STEP=4)
    with pytest.raises(Exception, match="RuntimeError.*store: 4 active lanes on what another program has read"):
        _copy[(2,)](x[4:], x, N=4, SHIFT=0, STEP=4)

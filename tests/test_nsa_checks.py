"""nsa_checks.py: what the attention functions refuse, by name."""

import pytest
import torch
from brute import offsets

from videonsa import nsa_torch
from videonsa.nsa_checks import check_prefix
from videonsa.nsa_released import pooled_attention

# ----------------------------------------------------------------------------------------------------------------------
# Errors
# ----------------------------------------------------------------------------------------------------------------------

ARGUMENTS = {
    "nsa_attention": "q k v gates cu_seqlens cu_seqlens_k block_size block_count window_size",
    "compressed_attention": "q k v cu_seqlens cu_seqlens_k block_size",
    "select_blocks": "q k lse cu_seqlens cu_seqlens_k block_size block_count",
    "selected_attention": "q k v blocks cu_seqlens cu_seqlens_k block_size",
    "window_attention": "q k v cu_seqlens cu_seqlens_k window_size",
}
each_function = pytest.mark.parametrize("function", ARGUMENTS)


def each_function_with(argument):
    return pytest.mark.parametrize("function", [name for name, names in ARGUMENTS.items() if argument in names.split()])


def call(function, **changes):
    """The function on two samples of 20 and 10 tokens, H = 4, G = 2, D = 8, with some arguments replaced."""
    arguments = {
        "q": torch.zeros(30, 4, 8),
        "k": torch.zeros(30, 2, 8),
        "v": torch.zeros(30, 2, 8),
        "gates": torch.zeros(30, 4, 3),
        "lse": torch.zeros(30, 4),
        "blocks": torch.zeros(2, 30, 3, dtype=torch.int32),
        "cu_seqlens": offsets((20, 10)),
        "cu_seqlens_k": None,
        "block_size": 16,
        "block_count": 3,
        "window_size": 8,
    }
    arguments.update(changes)
    return getattr(nsa_torch, function)(**{name: arguments[name] for name in ARGUMENTS[function].split()})


@each_function
def test_valid_arguments_raise_nothing(function):
    call(function, cu_seqlens_k=offsets((20, 10)))
    call(function, block_size=64, block_count=100, window_size=1000)


@pytest.mark.parametrize("block_size", [8, 24, 0, -16, 1])
@each_function_with("block_size")
def test_block_size_must_be_a_power_of_two_from_16(function, block_size):
    with pytest.raises(ValueError, match="block_size"):
        call(function, block_size=block_size)


@pytest.mark.parametrize("block_count", [2, 0, -1])
@each_function_with("block_count")
def test_block_count_must_be_3_or_more(function, block_count):
    with pytest.raises(ValueError, match="block_count"):
        call(function, block_count=block_count)


@pytest.mark.parametrize("window_size", [0, -1])
@each_function_with("window_size")
def test_window_size_must_be_1_or_more(function, window_size):
    with pytest.raises(ValueError, match="window_size"):
        call(function, window_size=window_size)


@each_function
def test_query_heads_must_be_a_multiple_of_kv_heads(function):
    with pytest.raises(ValueError, match=r"\bq\b|heads"):
        call(function, q=torch.zeros(30, 3, 8), gates=torch.zeros(30, 3, 3), lse=torch.zeros(30, 3))


MISMATCHES = [
    {"q": torch.zeros(30, 4, 16)},
    {"q": torch.zeros(30, 32)},
    {"k": torch.zeros(30, 16)},
    {"k": torch.zeros(30, 2, 16), "v": torch.zeros(30, 2, 16)},
    {"v": torch.zeros(30, 2, 16)},
    {"v": torch.zeros(30, 4, 8)},
    {"v": torch.zeros(29, 2, 8)},
    {"q": torch.zeros(30, 4, 8, dtype=torch.float64)},
    {"k": torch.zeros(30, 2, 8, dtype=torch.bfloat16)},
    {"v": torch.zeros(30, 2, 8, dtype=torch.float64)},
    {"k": torch.zeros(30, 2, 8, device="meta")},
    {"v": torch.zeros(30, 2, 8, device="meta")},
]


@pytest.mark.parametrize(
    "function, changes",
    [(f, changes) for f in ARGUMENTS for changes in MISMATCHES if set(changes) & set(ARGUMENTS[f].split())],
    ids=lambda x: (
        x if isinstance(x, str) else ",".join(f"{n} {list(t.shape)} {t.dtype} {t.device}" for n, t in x.items())
    ),
)
def test_q_k_and_v_must_agree_in_shape_dtype_and_device(function, changes):
    with pytest.raises(ValueError, match=rf"\b({'|'.join(changes)})\b"):
        call(function, **changes)


@pytest.mark.parametrize(
    "cu_seqlens",
    [
        torch.tensor([0, 20, 30]),
        torch.tensor([0.0, 20.0, 30.0]),
        offsets((20, 10)) + 1,
        torch.tensor([5, 20, 30], dtype=torch.int32),
        torch.tensor([0, 25, 20, 30], dtype=torch.int32),
        torch.tensor([0, 40, 30], dtype=torch.int32),
        torch.tensor([0, 20, 29], dtype=torch.int32),
        torch.tensor([0, 20, 31], dtype=torch.int32),
        torch.tensor([], dtype=torch.int32),
        torch.tensor([[0, 20, 30]], dtype=torch.int32),
    ],
    ids=lambda x: f"{x.tolist()} {x.dtype}",
)
@each_function
def test_cu_seqlens_must_be_int32_and_rise_from_zero_to_the_number_of_tokens(function, cu_seqlens):
    with pytest.raises(ValueError, match=r"cu_seqlens\b"):
        call(function, cu_seqlens=cu_seqlens)


@pytest.mark.parametrize(
    "cu_seqlens_k",
    [
        torch.tensor([0, 20, 30]),
        torch.tensor([5, 20, 30], dtype=torch.int32),
        torch.tensor([0, 40, 30], dtype=torch.int32),
        torch.tensor([0, 20, 29], dtype=torch.int32),
        torch.tensor([0, 30], dtype=torch.int32),
        torch.tensor([0, 20, 30, 30], dtype=torch.int32),
        torch.tensor([0, 15, 30], dtype=torch.int32),  # fewer keys than queries in the first sample
    ],
    ids=lambda x: f"{x.tolist()} {x.dtype}",
)
@each_function
def test_cu_seqlens_k_must_match_the_keys_and_hold_every_query(function, cu_seqlens_k):
    with pytest.raises(ValueError, match="cu_seqlens_k"):
        call(function, cu_seqlens_k=cu_seqlens_k)


@each_function
def test_more_keys_than_queries_need_cu_seqlens_k(function):
    with pytest.raises(ValueError, match=r"cu_seqlens|\bk\b"):
        call(function, k=torch.zeros(40, 2, 8), v=torch.zeros(40, 2, 8))
    call(function, k=torch.zeros(40, 2, 8), v=torch.zeros(40, 2, 8), cu_seqlens_k=offsets((25, 15)))


@pytest.mark.parametrize("shape", [(30, 4, 2), (30, 4), (29, 4, 3), (30, 2, 3), (4, 30, 3)], ids=str)
def test_gates_must_be_three_per_query_head(shape):
    with pytest.raises(ValueError, match="gates"):
        call("nsa_attention", gates=torch.zeros(shape))


@pytest.mark.parametrize(
    "shape, dtype",
    [
        ((2, 30, 3), torch.int64),
        ((2, 30, 3), torch.float32),
        ((30, 2, 3), torch.int32),
        ((2, 29, 3), torch.int32),
        ((4, 30, 3), torch.int32),
        ((2, 30), torch.int32),
    ],
    ids=str,
)
def test_blocks_must_be_int32_per_kv_head_and_query(shape, dtype):
    with pytest.raises(ValueError, match="blocks"):
        call("selected_attention", blocks=torch.zeros(shape, dtype=dtype))


@pytest.mark.parametrize("shape", [(2, 29), (30, 2), (4, 30)], ids=str)
def test_the_importance_of_own_blocks_needs_a_value_for_each_kv_head_and_query(shape):
    q, k, lse = torch.zeros(30, 4, 16), torch.zeros(30, 2, 16), torch.zeros(30, 4)
    with pytest.raises(ValueError, match="own_importance"):
        nsa_torch.select_blocks(q, k, lse, offsets((20, 10)), own_importance=torch.zeros(shape))


@pytest.mark.parametrize(("first", "means", "name"), [(-1, 1, "first"), (34, 3, "k"), (33, 4, "k")])
def test_given_means_must_be_as_many_as_the_last_query_sees(first, means, name):
    q, k = torch.zeros(30, 4, 16), torch.zeros(means, 2, 16)
    with pytest.raises(ValueError, match=rf"^{name} must"):
        pooled_attention(q, k, k, first=first, block_size=16)


@pytest.mark.parametrize(
    "message, changes",
    {
        "v must have the shape of k": {"v": torch.zeros(4, 2, 16)},
        "seen must be int32 .30.": {"seen": torch.zeros(30, dtype=torch.int64)},
        "cu_seqlens_k must rise from 0 to the 5 tokens of k": {"cu_seqlens_k": offsets((2, 2))},
        "cu_seqlens_k must describe the 2 samples": {"cu_seqlens_k": offsets((5,))},
        "cu_seqlens must rise from 0 to the 30 tokens of q": {"cu_seqlens": offsets((20, 9))},
        "scale must be positive": {"scale": 0.0},
    }.items(),
)
def test_errors_of_prefix_attention_name_its_own_arguments(message, changes):
    arguments = {
        "q": torch.zeros(30, 4, 16),
        "k": torch.zeros(5, 2, 16),
        "v": torch.zeros(5, 2, 16),
        "seen": torch.zeros(30, dtype=torch.int32),
        "cu_seqlens": offsets((20, 10)),
        "cu_seqlens_k": offsets((2, 3)),
    }
    check_prefix(**arguments)
    with pytest.raises(ValueError, match=f"^{message}"):
        check_prefix(**(arguments | changes))

"""What ptxas makes of the kernels for GPUs that are not here, by benchmarks/compile_kernels.py."""

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from videonsa import nsa_launches

triton = pytest.importorskip("triton")
FOLDER = Path(__file__).resolve().parents[1] / "benchmarks"
sys.path.insert(0, str(FOLDER))
import compile_kernels  # noqa: E402

# Every case for each would take minutes, and so would those of Qwen3-VL, which differ by their groups alone:
# `compile_kernels.py 90 --json` has all. Of sm_80 and sm_89, which have the same tiles, sm_89 has less shared memory,
# so the larger case.
CASES = {
    80: ["7B fp32", "bf16 dim 32 group 1 block 16"],
    89: ["fp16 dim 80 group 16 block 128"],
    90: ["7B bf16", "7B bf16 released"],
}


@pytest.fixture(scope="module")
def compilations():
    """{compute capability: future of the rows of compile_kernels.py}"""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}

    def compile_for(capability):
        command = [sys.executable, compile_kernels.__file__, str(capability), *CASES[capability], "--json"]
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    pool = ThreadPoolExecutor(2)
    yield {capability: pool.submit(compile_for, capability) for capability in CASES}
    pool.shutdown(cancel_futures=True)


@pytest.fixture(params=CASES, ids="sm_{}".format)
def compiled(request, compilations):
    """(compute capability, rows of compile_kernels.py)"""
    return request.param, compilations[request.param].result()


def spilled_by_triton_3_6(row) -> int:
    """Instructions of a loop of 500 and more that triton 3.6 may spend on words that have no register on sm_90."""
    if not triton.__version__.startswith("3.6"):
        return 0
    # The latter in `released`.
    return {"selected_dkv_kernel": 2, "band_dkv_kernel": 6}.get(row["kernel"], 0)


def test_all_kernels_compile_and_fit_and_no_loop_spills(compiled):
    capability, rows = compiled
    kernels = {name for name in vars(nsa_launches) if name.endswith("_kernel")}
    for case in CASES[capability]:
        assert {row["kernel"] for row in rows if row["case"] == case} == kernels
    for row in rows:
        assert row["spills_in_loops"] <= spilled_by_triton_3_6(row), row
        # Once, around the loops; the most is of fp16 with a head dim of 80, by triton 3.6.
        assert row["spills"] <= 64 and row["stack"] <= 128, row
        assert row["shared"] <= compile_kernels.SHARED_MEMORY[capability], row


DOTS = {
    "band_kernel": 2,
    "importance_kernel": 2,  # with variances, as below
    "estimate_kernel": 2,
    "selected_kernel": 2,
    "band_dq_kernel": 3,
    "selected_dq_kernel": 3,
    "band_dkv_kernel": 4,
    "selected_dkv_kernel": 4,
}


def test_dots_use_wgmma_where_meant_and_do_not_wait_for_each_other(compiled):
    capability, rows = compiled
    for row in rows:
        arrivals = [loop["arrivals"] for loop in row["loops"]]
        if capability == 90 and row["case"] == "7B bf16" and row["kernel"] in DOTS:
            assert row["wgmma"] and all(arrivals), row
        assert max(arrivals, default=0) <= DOTS.get(row["kernel"], 0), row
        if capability < 90:
            assert row["wgmma"] == 0


# Loops that may wait for the copies that they issued last, since another program of the SM, which two stages leave room
# for, can compute meanwhile.
TWO_STAGES = {
    "estimate_kernel": "a third stage of means and variances would leave room for one program of two",
    "importance_kernel": "the same: with variances it shares the tiles of `estimate_kernel`",
    "band_dkv_kernel": "of merged's remainder, which has no registers left for a third stage",
}


def test_loops_never_wait_for_the_copies_that_they_issued_last(compiled):
    """They did: a block's index was queued behind the keys of blocks before it; and so was the number of a query head,
    while the variant `released` gave the kernels lists of heads."""
    capability, rows = compiled
    if capability < 90:
        # With two stages, keys are copied to where those of the turn were, once it has read them.
        assert max(row["stages"] for row in rows if any(loop["copies"] for loop in row["loops"])) == 2
        return
    for row in rows:
        if row["stages"] == 2 and row["kernel"] in TWO_STAGES and row["programs"] >= 2:
            continue
        for loop in row["loops"]:
            if loop["copies"]:
                assert loop["in_flight"] and min(loop["in_flight"]) > 0, row

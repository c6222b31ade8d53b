"""The benchmarks run on a CPU at tiny sizes, as on a GPU at real ones, and leave rows that plot.py can draw."""

import itertools
import json
import os
import re
from pathlib import Path

import av
import forks
import pytest

ROOT = Path(__file__).resolve().parents[1]
ATTENTION = {"heads": 4, "kv_heads": 2, "head_dim": 16, "block_size": 16, "block_count": 4, "window_size": 20}
MODEL = {"layers": 2, "hidden": 64, "heads": 4, "kv_heads": 2}
TIMES = {"ms", "ms_low", "ms_high", "runs", "peak_mb"}
ABOUT = {"date", "hardware", "torch", "triton", "transformers", "commit", "dtype"}


def run(script, *args, cwd=None, **variables):
    """Run a script of benchmarks/ in a fresh process with these environment variables; returns it finished."""
    inherited = {name: x for name, x in os.environ.items() if name not in ("PYTHONPATH", "TRITON_INTERPRET")}
    variables = {"OMP_NUM_THREADS": "1", **{name: str(x) for name, x in variables.items()}}
    return forks.run(ROOT / "benchmarks" / script, *args, cwd=cwd, env=inherited | variables)


def measure(script, folder, lengths, **options):
    """The rows that a script has appended, and what it prints."""
    options |= {"device": "cpu", "seconds": 0, "date": "2000-01-01", "output": folder}
    flags = (f"--{name}" for name, value in options.items() if value is True)
    values = (x for name, value in options.items() if value is not True for x in (f"--{name}", value))
    done = run(script, *flags, "--lengths", *lengths, *values)
    assert done.returncode == 0, done.stderr
    return json.loads((folder / script.replace(".py", ".json")).read_text()), done.stdout


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("results")


@pytest.fixture(scope="module")
def attention(folder):
    return measure("attention.py", folder, [64, 256], overlaps=0.8, backward=True, **ATTENTION)


@pytest.fixture(scope="module")
def prefill(folder):
    return measure("prefill.py", folder, [128], new_tokens=2, **MODEL)


@pytest.fixture(scope="module")
def train_step(folder):
    return measure("train_step.py", folder, [128], checkpointing=True, **MODEL)


@pytest.fixture(scope="module")
def video(folder):
    readers = ("ffmpeg", "pyav", "decord", "videonsa-frames", "videonsa")
    clip = {"minutes": 0.5, "heights": 72, "fps": 4, "runs": 1, "threads": 1, "clips": folder / "clips"}
    options = {**clip, "date": "2000-01-01", "output": folder}
    done = run("video.py", "--readers", *readers, *(x for name, value in options.items() for x in (f"--{name}", value)))
    assert done.returncode == 0, done.stderr
    return {row["reader"]: row for row in json.loads((folder / "video.json").read_text())}, done.stdout


def test_attention_times_every_branch_and_dense_kernels_in_every_pass_at_every_length(attention):
    rows, printed = attention
    for tokens, name in itertools.product((64, 256), ("forward", "backward", "forward+backward")):
        here = [row for row in rows if (row["tokens"], row["pass"]) == (tokens, name)]
        timed = {(row["part"], row["kernel"]): row for row in here if "ms" in row}
        parts = {("dense", "sdpa FLASH_ATTENTION"), ("dense", "sdpa MATH")}
        parts |= {(part, "torch") for part in ("compressed", "selected", "window", "whole", "released", "merged")}
        parts |= {("select", "torch")} if name == "forward" else set()  # it has no gradient
        assert set(timed) == parts
        for row in timed.values():
            assert set(row) >= TIMES | ABOUT and row["date"] == "2000-01-01"
            assert 0 < row["ms_low"] <= row["ms"] <= row["ms_high"] and row["runs"] == 10
        fastest = min(row["ms"] for (part, _), row in timed.items() if part == "dense")
        assert all(row["speedup"] == pytest.approx(fastest / row["ms"], abs=1e-3) for row in timed.values())
        assert f"skipped: dense sdpa CUDNN_ATTENTION, {name}" in printed and f"{tokens} tokens, {name}" in printed


TOY = """
from videonsa import nsa_torch
from videonsa.nsa_torch import compressed_attention, nsa_attention, select_blocks, selected_attention


def window_attention(q, k, v, cu_seqlens, **options):
    o, lse = nsa_torch.window_attention(q, k, v, cu_seqlens, **options)
    return FACTOR * o, lse
"""


def options_of(**options):
    return [x for name, value in options.items() for x in (f"--{name}", value)]


def test_another_backend_is_checked_and_timed_beside_ours(tmp_path):
    (tmp_path / "toy_kernels.py").write_text(TOY.replace("FACTOR", "1"))
    (tmp_path / "wrong_kernels.py").write_text(TOY.replace("FACTOR", "1.01"))
    (tmp_path / "few_kernels.py").write_text("nsa_attention = print")
    given = ["attention.py", "--lengths", 64, "--backward", "--no_variants", *options_of(**ATTENTION)]
    given += ["--dtype", "fp32", "--seconds", 0, "--device", "cpu", "--output", tmp_path]
    done = run(*given, "--backend", "toy_kernels", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    rows = json.loads((tmp_path / "attention.json").read_text())
    for name in ("torch", "toy_kernels"):
        found = {row["part"]: row["error"] for row in rows if row["kernel"] == name and row["pass"] == "forward"}
        assert set(found) == {"compressed", "select", "selected", "window", "whole"}
        assert found.pop("select") == 0 and all(0 < error < 1e-5 for error in found.values())

    (tmp_path / "script.py").write_text("""
import sys

import attention

for name in ("wrong_kernels", "few_kernels", "no_kernels"):
    sys.argv = [sys.argv[0], *sys.argv[1:], "--backend", name]
    try:
        attention.main()
    except SystemExit as end:
        print(end, file=sys.stderr)
""")
    done = run(tmp_path / "script.py", *given[1:], PYTHONPATH=ROOT / "benchmarks")
    assert done.stderr.splitlines() == [
        "attention.py: window_attention of wrong_kernels differs from nsa_torch by 0.01; allowed is 1e-05",
        "attention.py: --backend few_kernels has no compressed_attention, select_blocks, selected_attention, "
        "window_attention",
        "attention.py: --backend no_kernels cannot be imported: No module named 'no_kernels'",
    ]
    assert json.loads((tmp_path / "attention.json").read_text()) == rows


def test_without_a_gpu_sizes_that_end_are_offered(tmp_path):
    (tmp_path / "script.py").write_text("""
import sys

import attention, common, prefill, torch

assert not torch.cuda.is_available()
sys.argv = ["attention.py"]
args = attention.parse()
assert args.lengths == [256, 1024] and args.overlaps == []
sys.argv = ["prefill.py"]
prefill.main()
""")
    done = run(tmp_path / "script.py", PYTHONPATH=ROOT / "benchmarks", CUDA_VISIBLE_DEVICES="")
    assert done.stdout == (
        "attention.py: no GPU, so nsa_torch is timed and no kernel; --lengths 256 1K ends, long streams do not\n"
    )
    offered = "--lengths 128 --layers 2 --hidden 64 --heads 4 --kv_heads 2 --seconds 0"
    message = f"prefill.py: without a GPU, the 7B at these lengths does not end; try {offered}\n"
    assert (done.returncode, done.stderr) == (2, message)


def test_older_spellings_of_options_are_understood(tmp_path):
    (tmp_path / "script.py").write_text("""
import argparse, sys

import attention, common

parser = common.OptionParser("")
common.add_model_options(parser, [64])
common.add_options(parser)
new = ["--kv_heads", "2", "--nsa_variant", "merged", "--nsa_backend=torch", "--output", "a-b--c"]
old = ["--kv-heads", "2", "--variant", "merged", "--backend=torch", "--output", "a-b--c"]
assert parser.parse_args(new) == parser.parse_args(old) and str(parser.parse_args(new).output) == "a-b--c"
for action in parser._actions:
    assert "-" not in action.option_strings[0].lstrip("-")
sys.argv = ["attention.py", "--variants", "--block-size", "32"]
assert attention.parse().block_size == 32
""")
    done = run(tmp_path / "script.py", PYTHONPATH=ROOT / "benchmarks")
    assert done.returncode == 0, done.stderr


def test_options_are_spelled_with_underscores():
    for path in (ROOT / "benchmarks").glob("*.py"):
        assert not re.findall(r'add_argument\(\s*f?"--\w+-', path.read_text()), path


def test_selections_are_described_by_what_was_selected(attention):
    selected = {(row["tokens"], row["selection"]): row for row in attention[0] if row["part"] == "selected"}
    assert set(selected) == {(64, "random"), (256, "random"), (256, "overlap 0.8")}
    assert selected[64, "random"]["overlap"] is None  # 4 blocks: nothing to choose
    assert selected[64, "random"]["union"] == (1 + 2 + 3 + 4) / 4
    random, correlated = selected[256, "random"], selected[256, "overlap 0.8"]
    assert random["overlap"] < 0.7 and correlated["overlap"] == pytest.approx(0.8, abs=0.03)
    assert correlated["union"] < random["union"] <= 256 / 16


def test_prefill_compares_two_models_of_the_same_weights(prefill):
    rows, _ = prefill
    assert [(row["model"], row["kernel"]) for row in rows] == [("VideoNSA", "torch"), ("Qwen2.5-VL", "sdpa")]
    for row in rows:
        assert set(row) >= TIMES | ABOUT
        assert row["ms"] > 0 and row["decode_tokens_per_s"] > 0
        assert row["tokens"] == 128 and row["text_tokens"] == 48 and row["layers"] == 2
    assert rows[0]["speedup"] == pytest.approx(rows[1]["ms"] / rows[0]["ms"], abs=1e-3)


def test_prefill_compares_a_checkpoint_with_its_dense_variant(tmp_path):
    tiny = ROOT / "examples/tiny"
    rows, _ = measure("prefill.py", tmp_path, [128], new_tokens=2, checkpoint=tiny, dtype="fp32", runs=1)
    assert [(row["model"], row["kernel"]) for row in rows] == [("VideoNSA", "torch"), ("dense", "sdpa")]
    for row in rows:
        shape = {"layers": 4, "hidden": 224, "heads": 7, "kv_heads": 1}
        assert row["checkpoint"] == "tiny" and {name: row[name] for name in shape} == shape
        assert row["ms"] > 0 and row["runs"] == 1 and row["threads"] == 1


def test_train_step_compares_two_models_of_the_same_weights(train_step):
    rows, _ = train_step
    assert [(row["model"], row["kernel"]) for row in rows] == [("VideoNSA", "torch"), ("Qwen2.5-VL", "sdpa")]
    for row in rows:
        assert set(row) >= TIMES | ABOUT
        assert row["tokens"] == 128 and row["layers"] == 2 and row["activations"] == "recomputed"
        assert row["ms_per_layer"] == pytest.approx(row["ms"] / 2, abs=1e-3)
        assert row["optimizer_mb"] == pytest.approx(2 * row["weights_mb"], abs=0.2)
    assert rows[0]["speedup"] == pytest.approx(rows[1]["ms"] / rows[0]["ms"], abs=1e-3)


def test_train_step_finds_the_number_of_layers_that_fit(tmp_path):
    (tmp_path / "script.py").write_text("""
import train_step

for fitting in range(30):
    train_step.time_steps = lambda layers, *_, **__: {"a": {}, "b": {"skipped": ""} if layers > fitting else {}}
    assert train_step.layers_that_fit(0, None, None) == min(max(fitting, 1), 28)
""")
    done = run(tmp_path / "script.py", PYTHONPATH=ROOT / "benchmarks")
    assert done.returncode == 0, done.stderr


def test_cpu_compares_a_variant_with_dense_attention(tmp_path):
    options = {"nsa_variant": "released", "lengths": 128, "heads": 4, "rounds": 1, "output": tmp_path}
    done = run("cpu.py", *(x for name, value in options.items() for x in (f"--{name}", value)))
    assert done.returncode == 0, done.stderr
    (row,) = json.loads((tmp_path / "cpu.json").read_text())
    assert (row["nsa_variant"], row["tokens"], row["pass"]) == ("released", 128, "forward")
    assert row["ratio"] > 0 and row["nsa_peak_mb"] >= 0
    assert "released" in done.stdout


def test_video_readers_return_the_same_frames(video):
    rows, printed = video
    assert set(rows) == {"ffmpeg", "pyav", "decord", "videonsa-frames", "videonsa"}
    for reader, row in rows.items():
        assert set(row) >= ABOUT - {"dtype"} and row["codec"] == "h264" and row["threads"] == 1
        if "skipped" in row:
            assert reader in ("ffmpeg", "decord") and f"skipped: {reader}: {row['skipped']}" in printed
            continue
        assert set(row) >= TIMES and 0 < row["ms_low"] <= row["ms"] <= row["ms_high"] and row["runs"] == 1
        assert row["frames"] == 120 and row["size"] == "140x84" and "note" not in row
        if reader != "ffmpeg":
            assert row["difference"] < 3  # grey levels: another resampling, not another frame
            pixels = 120 * 84 * 140 * 3 * (4 if row["output"] == "inputs" else 1)
            assert row["output_mb"] == pytest.approx(pixels / 1e6, abs=0.05) and row["peak_mb"] > row["output_mb"]


def test_clips_repeat_what_was_encoded(video, folder):
    with av.open(folder / "clips" / "h264-72p-0.5min-2s.mp4") as container:
        frames = list(container.decode(video=0))
    assert [round(frame.time * 24) for frame in frames] == list(range(720))
    assert [i for i, frame in enumerate(frames) if frame.key_frame] == list(range(0, 720, 48))
    assert (frames[7].to_ndarray() == frames[7 + 480].to_ndarray()).all()


def test_a_reader_that_takes_too_much_memory_is_ended_and_said_so(video, folder, tmp_path):
    few = ("--minutes", 0.5, "--heights", 72, "--fps", 4, "--readers", "pyav", "--clips", folder / "clips")
    done = run("video.py", *few, "--memory", 0.001, "--output", tmp_path)
    assert done.returncode == 0, done.stderr
    assert "skipped: pyav: more than 0.001 GB of memory" in done.stdout


def test_rows_are_appended_and_drawn(attention, prefill, train_step, video, folder):
    measure("prefill.py", folder, [64], new_tokens=0, **MODEL)
    rows, _ = measure("train_step.py", folder, [64], **MODEL)
    assert rows[: len(train_step[0])] == train_step[0] and {row["tokens"] for row in rows} == {128, 64}
    assert {row["activations"] for row in rows} == {"recomputed", "kept"}
    done = run("plot.py", "--input", folder, "--output", folder / "drawn")
    assert done.returncode == 0, done.stderr
    for name in ("attention.png", "prefill.png", "train_step.png", "video.png"):
        assert (folder / "drawn" / name).read_bytes().startswith(b"\x89PNG")


def test_plot_says_what_it_misses(attention, folder, tmp_path):
    assert (
        "none of attention.json, prefill.json, train_step.json, video.json"
        in run("plot.py", "--input", tmp_path).stderr
    )
    assert "no figures of 1999-01-01" in run("plot.py", "--input", folder, "--date", "1999-01-01").stderr

"""The benchmarks run on a CPU at tiny sizes, as on a GPU at real ones, and leave rows that plot.py can draw."""

import json
import os
import subprocess
import sys
from pathlib import Path

import av
import pytest

ROOT = Path(__file__).resolve().parents[1]
ATTENTION = {"heads": 4, "kv-heads": 2, "head-dim": 16, "block-size": 16, "block-count": 4, "window-size": 20}
MODEL = {"layers": 2, "hidden": 64, "heads": 4, "kv-heads": 2, "new-tokens": 2}
TIMES = {"ms", "ms_low", "ms_high", "runs", "peak_mb"}
ABOUT = {"date", "hardware", "torch", "triton", "transformers", "commit", "dtype"}


def run(script, *args):
    """Run a script of benchmarks/ in a fresh process; returns it finished."""
    inherited = {name: x for name, x in os.environ.items() if name not in ("PYTHONPATH", "TRITON_INTERPRET")}
    return subprocess.run(
        [sys.executable, str(ROOT / "benchmarks" / script), *map(str, args)],
        capture_output=True,
        text=True,
        timeout=300,
        env={**inherited, "OMP_NUM_THREADS": "1"},
    )


def measure(script, folder, lengths, **options):
    """The rows that a script has appended, and what it prints."""
    options |= {"device": "cpu", "seconds": 0, "date": "2000-01-01", "output": folder}
    done = run(script, "--lengths", *lengths, *(x for name, value in options.items() for x in (f"--{name}", value)))
    assert done.returncode == 0, done.stderr
    return json.loads((folder / script.replace(".py", ".json")).read_text()), done.stdout


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("results")


@pytest.fixture(scope="module")
def attention(folder):
    return measure("attention.py", folder, [64, 256], overlaps=0.8, **ATTENTION)


@pytest.fixture(scope="module")
def prefill(folder):
    return measure("prefill.py", folder, [128], **MODEL)


@pytest.fixture(scope="module")
def video(folder):
    readers = ("ffmpeg", "pyav", "decord", "videonsa-frames", "videonsa")
    clip = {"minutes": 0.5, "heights": 72, "fps": 4, "runs": 1, "threads": 1, "clips": folder / "clips"}
    options = {**clip, "date": "2000-01-01", "output": folder}
    done = run("video.py", "--readers", *readers, *(x for name, value in options.items() for x in (f"--{name}", value)))
    assert done.returncode == 0, done.stderr
    return {row["reader"]: row for row in json.loads((folder / "video.json").read_text())}, done.stdout


def test_attention_times_every_branch_and_dense_kernels_at_every_length(attention):
    rows, printed = attention
    for tokens in (64, 256):
        timed = {(row["part"], row["kernel"]): row for row in rows if row["tokens"] == tokens and "ms" in row}
        parts = {("dense", "sdpa FLASH_ATTENTION"), ("dense", "sdpa MATH")}
        parts |= {(part, "torch") for part in ("compressed", "select", "selected", "window", "whole")}
        assert set(timed) == parts
        for row in timed.values():
            assert set(row) >= TIMES | ABOUT and row["date"] == "2000-01-01"
            assert 0 < row["ms_low"] <= row["ms"] <= row["ms_high"] and row["runs"] == 10
        fastest = min(row["ms"] for (part, _), row in timed.items() if part == "dense")
        assert all(row["speedup"] == pytest.approx(fastest / row["ms"], abs=1e-3) for row in timed.values())
    assert "skipped: dense sdpa CUDNN_ATTENTION" in printed and f"{256:,} tokens" in printed


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


def test_rows_are_appended_and_drawn(attention, prefill, video, folder):
    rows, _ = measure("prefill.py", folder, [64], **MODEL)
    assert rows[: len(prefill[0])] == prefill[0] and {row["tokens"] for row in rows} == {128, 64}
    done = run("plot.py", "--input", folder, "--output", folder / "drawn")
    assert done.returncode == 0, done.stderr
    for name in ("attention.png", "prefill.png", "video.png"):
        assert (folder / "drawn" / name).read_bytes().startswith(b"\x89PNG")


def test_plot_says_what_it_misses(attention, folder, tmp_path):
    assert "no attention.json, prefill.json or video.json" in run("plot.py", "--input", tmp_path).stderr
    assert "no figures of 1999-01-01" in run("plot.py", "--input", folder, "--date", "1999-01-01").stderr

"""make_needle_videos.py: what the questions say is what the clips show, and no split knows another."""

import itertools
import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

import av
import forks
import numpy as np
import pytest

import make_needle_videos
from lib import needles as needles_module
from lib.needles import COLOURS, COUNTS, PLACES, QUESTIONS, SPLITS, TIMES, Settings, make_dataset, make_sample

ROOT = Path(__file__).resolve().parents[1]
ALL = Settings(seconds=(5.0, 9.0), needles=(1, 2, 3), repeats=0.4, questions=QUESTIONS, turns=30, fps=4)


def decode(path):
    with av.open(str(path)) as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]).astype(int)


def saturated(frame):
    return frame.max(-1) - frame.min(-1) > 90


@pytest.fixture(scope="module")
def samples(tmp_path_factory):
    folder = tmp_path_factory.mktemp("samples")
    return [make_sample(folder / str(i), ALL, (0, 0, i)) for i in range(12)]


def test_needles_are_seen_when_and_where_the_sample_says_and_never_else(samples):
    for sample in samples:
        frames = decode(sample["video"])
        assert len(frames) == sample["seconds"] * ALL.fps
        shown = np.zeros(len(frames), bool)
        for needle in sample["needles"]:
            x, y = (np.array(PLACES[needle["where"]]) * ALL.size).astype(int)
            for start, end in needle["seconds"]:
                inside = slice(round(start * ALL.fps), round(end * ALL.fps))
                shown[inside] = True
                for frame in frames[inside]:
                    part = frame[y - 28 : y + 28, x - 28 : x + 28]
                    pixels = part[saturated(part)]
                    assert len(pixels) > 100
                    nearest = [
                        min(COLOURS, key=lambda name: np.abs(np.array(COLOURS[name]) - pixel).sum())
                        for pixel in pixels[:: len(pixels) // 20]
                    ]
                    assert Counter(nearest).most_common(1)[0][0] == needle["colour"]
        for frame in frames[~shown]:
            assert saturated(frame).sum() < 20


def test_questions_follow_from_the_needles(samples):
    seen = Counter()
    for sample in samples:
        needles = {f"{n['colour']} {n['shape']}": n for n in sample["needles"]}
        assert (
            len({n["colour"] for n in needles.values()}) == len({n["shape"] for n in needles.values()}) == len(needles)
        )
        for question in sample["questions"]:
            kind, text, answer = question["type"], question["question"], question["answer"]
            seen[kind] += 1
            if kind == "describe":
                order = sorted(needles.values(), key=lambda n: n["seconds"][0])
                assert answer == ", ".join(f"{n['colour']} {n['shape']} {n['where']}" for n in order)
                continue
            if kind == "first":
                named = [name for name in needles if name in text]
                assert answer == min(named, key=lambda name: needles[name]["seconds"][0]) and len(named) == 2
                continue
            needle = next(n for name, n in needles.items() if set(name.split()) & set(text.rstrip("?").split()))
            if kind == "when":
                (start, end), third = needle["seconds"][0], sample["seconds"] / 3
                assert len(needle["seconds"]) == 1
                assert third * TIMES.index(answer) <= start < end <= third * (TIMES.index(answer) + 1) + 1e-6
            elif kind == "count":
                assert answer == COUNTS[len(needle["seconds"]) - 1]
            else:
                assert answer == needle[kind]
    assert set(seen) == set(QUESTIONS)


def test_a_needle_is_at_the_depth_that_is_asked_for():
    for depth, seed in itertools.product((0.0, 0.3, 1.0), range(4)):
        (needle,) = needles_module.place_needles(np.random.default_rng(seed), 40, Settings(depth=depth))
        ((first, last),) = needle.flashes
        assert 0 <= first == round(depth * (40 - (last - first))) and last <= 40
    with pytest.raises(ValueError, match="--depth must be from 0 to 1, got 2"):
        Settings(depth=2)
    with pytest.raises(ValueError, match="--depth must be left out where clips have several needles or repeats"):
        Settings(depth=0.5, needles=(1, 2))


def test_flashes_do_not_overlap_and_every_third_is_as_likely():
    starts = Counter()
    for i in range(600):
        rng = np.random.default_rng(i)
        placed = needles_module.place_needles(rng, 36, ALL)
        flashes = sorted(flash for needle in placed for flash in needle.flashes)
        assert all(end + 2 <= start for (_, end), (start, _) in zip(flashes, flashes[1:], strict=False))
        if len(flashes) == 1:
            starts[flashes[0][0] * 3 // 36] += 1
    assert min(starts.values()) > 0.75 * max(starts.values())


def test_a_clip_follows_from_its_seed_alone(tmp_path):
    one, again = (make_sample(tmp_path / name, ALL, (7, 1, 3)) for name in "ab")
    assert decode(one.pop("video")).tolist() == decode(again.pop("video")).tolist()
    assert one == again
    for seed in ((8, 1, 3), (7, 2, 3), (7, 1, 4)):
        other = make_sample(tmp_path / "c", ALL, seed)
        other.pop("video")
        assert other != one


def test_a_clip_has_the_same_bytes_in_any_process(tmp_path):
    program = "import sys; from pathlib import Path; from lib.needles import Settings, make_sample\n"
    program += "for i in range(8): make_sample(Path(sys.argv[1]) / str(i), Settings(), (5, 0, i))"
    subprocess.run([sys.executable, "-c", program, tmp_path], cwd=ROOT / "examples", check=True)
    for i in range(8):
        path = make_sample(tmp_path / f"here-{i}", Settings(), (5, 0, i))["video"]  # torch is loaded here, not there
        assert Path(path).read_bytes() == (tmp_path / f"{i}.mp4").read_bytes()


def test_splits_share_no_seed_and_both_formats_say_the_same(needles):
    seeds = {}
    for split in SPLITS:
        records = json.loads((needles / f"{split}.json").read_text())
        chats = [json.loads(line) for line in (needles / f"{split}.jsonl").read_text().splitlines()]
        assert len(records) == len(chats) == len(list((needles / split).iterdir()))
        seeds[split] = {tuple(record["seed"]) for record in records}
        for record, chat in zip(records, chats, strict=True):
            kind = "video" if "video" in record else "image"
            assert (needles / record[kind]).is_file()
            values = [turn["value"] for turn in record["conversations"]]
            texts = [part["text"] for m in chat["messages"] for part in m["content"] if part["type"] == "text"]
            media = [part[kind] for m in chat["messages"] for part in m["content"] if part["type"] == kind]
            assert values[0].startswith(f"<{kind}>\n") and media == [record[kind]]
            assert [values[0].removeprefix(f"<{kind}>\n"), *values[1:]] == texts
            assert len(record["types"]) == len(values) / 2 and record["types"] == chat["types"]
    assert sum(map(len, seeds.values())) == len(set.union(*seeds.values())) == 20


def test_the_script_makes_any_duration_on_several_processes(tmp_path):
    command = [ROOT / "examples/make_needle_videos.py", tmp_path / "out", "--workers", 2, "--test", 2]
    command += ["--train", 3, "--seconds", 0.5, 60, "--fps", 2, "--size", 64, "--questions", "describe", "--seed", 5]
    done = forks.run(*command)
    assert done.returncode == 0, done.stderr
    assert "wrote 5 clips" in done.stdout and "x real time" in done.stdout
    records = json.loads((tmp_path / "out/train.json").read_text())
    assert {record["seconds"] for record in records} <= {0.5, 60.0}
    assert {kind for record in records for kind in record["types"]} == {"describe"}


def test_a_clip_without_a_question_is_no_sample(tmp_path):
    settings = Settings(needles=(1, 2), questions=("first",), size=32)
    folder = make_dataset(tmp_path / "out", {"test": 6}, settings, workers=1)
    records = json.loads((folder / "test.json").read_text())
    assert 0 < len(records) == (folder / "test.jsonl").read_text().count("\n") < 6
    assert all(record["conversations"] for record in records)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--train", "1", "--seconds", "0.1"], "--seconds must be at least one frame long"),
        (["--train", "1", "--size", "33"], "--size must be an even number"),
        (["--train", "1", "--needles", "9"], "--needles must be 1 to 8"),
        (["--train", "1", "--repeats", "2"], "--repeats must be from 0 to 1"),
        (["--train", "1", "--needle_seconds", "2", "1"], "--needle_seconds must be positive and ascending"),
        (["--train", "1", "--seed", "-1"], "--seed must be from 0"),
        (["--train", "1", "--questions", "count", "first"], "--questions must be .* count needs --repeats, first"),
        ([], "--train, --validation or --test"),
    ],
)
def test_bad_settings_are_named_and_nothing_is_written(tmp_path, monkeypatch, options, message):
    monkeypatch.setattr(sys, "argv", ["make_needle_videos.py", str(tmp_path / "out"), *options])
    with pytest.raises(SystemExit, match=message):
        make_needle_videos.main()
    assert not list(tmp_path.iterdir())


def test_a_folder_in_use_is_refused_and_a_failed_run_leaves_nothing(needles, tmp_path, monkeypatch):
    with pytest.raises(FileExistsError, match="exists already"):
        make_dataset(needles, {"train": 1}, ALL)
    monkeypatch.setattr(needles_module, "encode", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        make_dataset(tmp_path / "out", {"train": 1}, ALL, workers=1)
    assert not list(tmp_path.iterdir())

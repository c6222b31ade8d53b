"""What the page of `app.py` is put together from: times, previews, the line, transcripts."""

import json
import threading

import av
import numpy as np
import pytest
from videos import encode

from lib import preview, tiny
from lib.times import clock, seconds_of
from lib.transcript import ANEW, EMPTY, Turn, as_json, as_messages, as_text
from lib.waiting import Line
from videonsa.video_reader import VideoFile


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("1:30", 90), ("90", 90), ("0:07.5", 7.5), ("1:02:03", 3723), ("1:", 60), ("1:3", 63), (" 2 ", 2), (3, 3),
        (".5", 0.5), ("", None), (None, None),
    ],
)  # fmt: skip
def test_times_are_read_as_people_write_them(text, seconds):
    assert seconds_of(text) == seconds


@pytest.mark.parametrize("text", ["soon", "1:60", "1:2:3:4", "-1", "1e3", "nan", "1:-5"])
def test_what_is_no_time_is_said(text):
    with pytest.raises(ValueError, match="is no time"):
        seconds_of(text)


def test_times_are_written_as_they_are_read():
    assert [clock(s) for s in (0, 6.75, 59.96, 90, 93.5, 3723)] == [
        "0:00",
        "0:06.8",
        "1:00",
        "1:30",
        "1:33.5",
        "1:02:03",
    ]
    assert seconds_of(clock(3599.5)) == 3599.5


@pytest.mark.parametrize(
    ("name", "codec", "playable"),
    [
        ("a.mp4", "libx264", True), ("a.mov", "libx264", True), ("a.mp4", "mpeg4", False), ("a.avi", "mpeg4", False),
        ("a.mkv", "libx264", False), ("a.webm", "libvpx", True), ("b.mkv", "libvpx", False),
        ("a.mpg", "mpeg2video", False),
    ],
)  # fmt: skip
def test_a_browser_plays_some_files_and_all_copies(name, codec, playable, tmp_path):
    # 24 frames per second, since MPEG-2 knows few rates.
    path = encode(tmp_path / name, frames=48, fps=24, width=162, height=80, codec=codec)
    assert preview.is_playable(path) == playable
    if playable:
        return
    copy = tmp_path / "copy.mp4"
    shares = list(preview.convert(path, copy))
    assert shares == sorted(shares) and shares[-1] == 1
    assert preview.is_playable(copy)
    with VideoFile(str(path)) as file, VideoFile(str(copy)) as small:
        assert (small.width, small.height) == (162, 80) and len(small) == 24
        assert abs(small.times[-1] - file.times[-1]) < 0.06
        # The same picture at the same time.
        for i in (0, 12, 23):
            j = int(np.abs(file.times - small.times[i]).argmin())
            pictures = [video.read([k], 80, 162).float() for video, k in ((file, j), (small, i))]
            assert (pictures[0] - pictures[1]).abs().mean() < 6


def test_a_preview_is_small_and_upright(tmp_path):
    path = tiny.make_clip(tmp_path / "clip.mp4", seconds=2, fps=24, width=960, height=540, codec="mpeg4")
    list(preview.convert(path, tmp_path / "copy.mp4"))
    with av.open(str(tmp_path / "copy.mp4")) as container:
        stream = container.streams.video[0]
        assert (stream.width, stream.height, stream.frames) == (640, 360, 24)


def test_the_line_says_how_many_are_before_and_for_how_long():
    line = Line(most=2)
    first, second, third = line.join(30.0), line.join(10.0), line.join(None)
    assert first.turn.is_set() and not second.turn.is_set()
    assert line.describe(second).startswith("Waiting for 1 other question: about 30 s more, 0 s so far")
    assert line.describe(third).startswith("Waiting for 2 other questions: about 40 s more")
    with pytest.raises(ValueError, match="2 questions wait already"):
        line.join(1.0)
    line.leave(second)  # who stops waiting
    assert line.describe(third).startswith("Waiting for 1 other question: about 30 s")
    threading.Timer(0.05, line.leave, [first]).start()
    assert third.turn.wait(5)
    fourth = line.join(1.0)
    assert line.describe(fourth).startswith("Waiting for 1 other question, 0 s so far")  # nobody can tell how long
    line.leave(third)
    line.leave(third)
    assert fourth.turn.is_set()


def test_transcripts_tell_what_was_said_and_when_the_model_looked():
    turns = [
        Turn("What appeared?", "a star", {"fps": 2}, 0, [(3.0, 0.41), (63.5, None)], "2025-01-01T10:00:00+00:00"),
        Turn("And then?", " ", {"fps": 2}, 300),
        Turn("And now?", "a moon", {}, 0),
    ]
    said = [message["content"] for message in as_messages(turns, Turn("Why?", remembered=9))]
    assert said == ["What appeared?", "a star", "And then?", EMPTY, ANEW, "And now?", "a moon", "Why?"]
    text = as_text(turns, "clip.mp4", 90.0, "tiny")
    assert text.startswith(
        "clip.mp4, 1:30\nModel: tiny\n\nQ: What appeared?\nA: a star\n   Looked at: 0:03 (41%), 1:03.5\n"
    )
    assert "A: (empty)\n\n(The model reads the video anew.)\n\nQ: And now?" in text
    data = json.loads(as_json(turns, "clip.mp4", 90.0, "tiny"))
    assert data["video"] == "clip.mp4" and data["seconds"] == 90 and data["model"] == "tiny"
    assert data["turns"][0]["moments"] == [{"seconds": 3.0, "share": 0.41}, {"seconds": 63.5, "share": None}]
    assert [turn["starts"] for turn in data["turns"]] == [True, False, True]
    assert data["turns"][1]["answer"] == " " and data["turns"][0]["asked"].startswith("2025-01-01T10")

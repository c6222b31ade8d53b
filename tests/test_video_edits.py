"""Lists of edits of MP4 and QuickTime files show the frames that they name, in their order and for as long."""

import struct

import numpy as np
import pytest
import torch
from boxes import rebuild, with_edits
from corpus import FRAMES, SIZE, numbers_of
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from videonsa import video_reader, video_source
from videonsa.video_reader import VideoFile

RATE = 8
WIDTH, HEIGHT = SIZE

parts = st.tuples(st.integers(0, FRAMES - 1), st.integers(1, 16)).map(
    lambda part: (min(part[1], FRAMES - part[0]) / RATE, part[0] / RATE, 1)
)
stills = st.tuples(st.integers(1, 16), st.integers(0, FRAMES - 1)).map(
    lambda still: (still[0] / RATE, still[1] / RATE, 0)
)
nothings = st.integers(1, 20).map(lambda eighths: (eighths / RATE, None, 1))


def implied(edits) -> tuple[list[int], list[float], float]:
    """What a list itself says: numbers of the frames, their times from the first, and the duration."""
    numbers, times, now, end = [], [], 0.0, 0.0
    for seconds, start, rate in edits:
        if start is not None:
            ahead = np.arange(FRAMES) / RATE - start
            shown = np.flatnonzero((ahead >= 0) & (ahead < seconds)) if rate else np.flatnonzero(ahead <= 0)[-1:]
            numbers += shown.tolist()
            times += [now + (ahead[i] if rate else 0) for i in shown]
            end = now + seconds
        now += seconds
    return numbers, [time - times[0] for time in times], end - times[0]


def read(path, indices=None, **kwargs) -> torch.Tensor:
    with VideoFile(path, **kwargs) as file:
        return file.read(range(len(file)) if indices is None else indices, HEIGHT, WIDTH)


class TestLists:
    @settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
    @given(
        st.sampled_from(["h264.mp4", "open-gop.mp4", "h264.mov", "hevc.mp4"]),
        st.lists(st.one_of(parts, parts, stills, nothings), min_size=1, max_size=4).filter(
            lambda edits: any(start is not None for _, start, _ in edits)
        ),
        st.integers(1, 3),
    )
    def test_they_are_followed(self, corpus_clip, tmp_path, threads, monkeypatch, name, edits, count):
        numbers, times, duration = implied(edits)
        path = with_edits(corpus_clip(name), tmp_path / name, edits)
        monkeypatch.setattr(video_reader, "MIN_WORK", 1)
        threads(count)
        with VideoFile(path) as file:
            frames = file.read(range(len(file)), HEIGHT, WIDTH)
            assert numbers_of(frames) == numbers
            assert file.times.tolist() == pytest.approx(times, abs=2e-3)
            assert file.duration == pytest.approx(duration, abs=2e-3)
            some = list(range(0, len(file), 3))
            assert torch.equal(file.read(some, HEIGHT, WIDTH), frames[some])

    def test_the_middle_of_a_clip_may_be_cut_out(self, corpus_clip, tmp_path):
        path = with_edits(corpus_clip("h264.mp4"), tmp_path / "cut.mp4", [(2, 0, 1), (2, 4, 1)])
        for source in (path, path.read_bytes(), path.open("rb")):
            for on_error in ("raise", "keep"):
                assert numbers_of(read(source, on_error=on_error)) == [*range(16), *range(32, 48)]

    def test_parts_need_not_begin_with_a_frame(self, corpus_clip, tmp_path):
        edits = [(1.06, 0.3, 1), (0.7, 4.01, 1), (1, 0, 1)]
        numbers, times, duration = implied(edits)
        with VideoFile(with_edits(corpus_clip("h264.mp4"), tmp_path / "cut.mp4", edits)) as file:
            assert numbers == [*range(3, 11), *range(33, 38), *range(8)]
            assert numbers_of(file.read(range(len(file)), HEIGHT, WIDTH)) == numbers
            assert file.times.tolist() == pytest.approx(times, abs=2e-3)
            assert file.duration == pytest.approx(duration, abs=2e-3)

    def test_parts_may_be_fast_or_slow(self, corpus_clip, tmp_path):
        path = with_edits(corpus_clip("h264.mov"), tmp_path / "clip.mov", [(1, 0, 2), (2, 4, 0.5)])
        with VideoFile(path) as file:
            assert numbers_of(file.read(range(len(file)), HEIGHT, WIDTH)) == [*range(16), *range(32, 40)]
            expected = [*(i / 16 for i in range(16)), *(1 + i / 4 for i in range(8))]
            assert file.times.tolist() == pytest.approx(expected, abs=2e-3) and file.duration == pytest.approx(3)

    def test_jumps_stay_possible(self, corpus_clip, tmp_path):
        path = with_edits(corpus_clip("h264.mp4"), tmp_path / "cut.mp4", [(2, 5, 1), (2, 1, 1)])
        with VideoFile(path) as file:
            ((first, last),) = file._stretches(file.positions[[4]])
            assert first >= 36 and last - first < 24

    def test_the_model_sees_them(self, processor, corpus_clip, tmp_path):
        path = with_edits(corpus_clip("h264.mp4"), tmp_path / "cut.mp4", [(2, 0, 1), (1, None, 1), (2, 4, 1)])
        plan = processor.video_processor.plan(path, fps=2)
        assert (plan.end, plan.num_frames) == (pytest.approx(5), 10)


class TestBadLists:
    def test_one_that_shows_nothing_is_an_error(self, corpus_clip, tmp_path):
        for edits in ([(2, None, 1), (3, None, 1)], [(2, 100, 1), (3, 200, 1)]):
            path = with_edits(corpus_clip("h264.mp4"), tmp_path / "clip.mp4", edits)
            with pytest.raises(ValueError, match="clip.mp4: no frames in its video stream"):
                read(path)

    def test_their_frames_are_limited(self, corpus_clip, tmp_path, monkeypatch):
        monkeypatch.setattr(video_reader, "MAX_FRAMES", 100)
        path = with_edits(corpus_clip("h264.mp4"), tmp_path / "clip.mp4", [(7, 0, 1), (7, 0, 1)])
        with pytest.raises(ValueError, match="clip.mp4: more than 100 frames by its edit list, the limit"):
            read(path)
        path = with_edits(corpus_clip("h264.mp4"), tmp_path / "clip.mp4", [(5, 0, 1), (90_000, None, 1), (5, 0, 1)])
        with pytest.raises(ValueError, match="seconds long, the limit is 86,400"):
            read(path)

    @pytest.mark.parametrize("content", [b"", b"\0", struct.pack(">II", 0, 2**31), struct.pack(">IIIi", 0, 9, 5, 0)])
    def test_damaged_ones_are_no_worse_than_an_error(self, corpus_clip, tmp_path, content):
        data = rebuild(corpus_clip("h264.mp4").read_bytes(), lambda kind, box: content if kind == b"elst" else box)
        try:
            assert len(read(data)) > 0
        except ValueError as error:
            assert "<bytes>" in str(error)

    def test_boxes_that_never_end_are_given_up(self, tmp_path):
        (tmp_path / "boxes.mp4").write_bytes(struct.pack(">I4s", 8, b"free") * 10_000)
        assert video_source.movie_edits(str(tmp_path / "boxes.mp4"), 1) is None

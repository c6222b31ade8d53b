"""Oddities that real files have, each made here: lengths, clocks, several streams, display matrices, colours."""

import itertools

import av
import corpus
import numpy as np
import pytest
from av.codec.context import Flags
from av.stream import Disposition
from boxes import move_blocks, with_matrix
from corpus import FRAMES, SIZE, X264, numbers_of, picture, times_of, write
from PIL import Image

from videonsa.video_reader import VideoFile

WIDTH, HEIGHT = SIZE


def numbers(source, indices=None, **kwargs) -> list[int]:
    with VideoFile(source, **kwargs) as file:
        return numbers_of(file.read(range(len(file)) if indices is None else indices, file.height, file.width))


def slideshow(path, seconds, options=None):
    """Frames that stay on screen for so many seconds each, with B-frames."""
    with av.open(str(path), "w", options=options or {}) as output:
        stream = output.add_stream("libx264", rate=8)
        stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, "yuv420p"
        stream.codec_context.time_base = stream.time_base = corpus.Fraction(1, 1000)
        stream.codec_context.flags |= Flags.frame_duration
        for i, (start, length) in enumerate(zip(np.cumsum([0, *seconds[:-1]]), seconds, strict=True)):
            frame = av.VideoFrame.from_ndarray(picture(i), format="rgb24").reformat(format="yuv420p")
            frame.pts, frame.time_base = round(start * 1000), corpus.Fraction(1, 1000)
            frame.duration = round(length * 1000)
            output.mux(stream.encode(frame))
        output.mux(stream.encode())
    return path


def two_streams(path, sizes, *, default, counts=(FRAMES, FRAMES)):
    """Two video streams of different sizes; one is the default."""
    with av.open(str(path), "w") as output:
        streams = []
        for i, width in enumerate(sizes):
            stream = output.add_stream("libx264", rate=8, options=X264)
            stream.width, stream.height, stream.pix_fmt = width, width // 2, "yuv420p"
            stream.disposition = Disposition.default.value if i == default else 0
            streams.append(stream)
        for stream, width, count in zip(streams, sizes, counts, strict=True):
            for number in range(count):
                image = picture(number, width, width // 2)
                output.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
            output.mux(stream.encode())
    return path


class TestLengths:
    @pytest.mark.parametrize("seconds", [[8, 8, 1, 4, 15, 8, 8, 4, 8], [4, 1, 8, 8, 2, 1, 1], [30, 1, 1, 1, 1, 1, 1]])
    @pytest.mark.parametrize("name", ["slides.mp4", "slides.mov", "slides.mkv"])
    def test_they_are_those_of_showing_and_not_of_decoding(self, tmp_path, seconds, name):
        with VideoFile(slideshow(tmp_path / name, seconds)) as file:
            assert file.times.tolist() == pytest.approx(np.cumsum([0, *seconds[:-1]]).tolist(), abs=2e-3)
            assert file.duration == pytest.approx(sum(seconds), abs=2e-3)

    def test_fragments_state_none_and_are_read_whole(self, tmp_path):
        options = {"movflags": "frag_keyframe+empty_moov"}
        path = slideshow(tmp_path / "slides.mp4", [8, 8, 1, 4, 15, 8, 8, 4, 8], options)
        assert numbers(path) == list(range(9))

    def test_asf_states_one_that_counts_if_the_file_is_cut(self, tmp_path):
        for codec, name in (("wmv2", "clip.wmv"), ("libx264", "clip.asf")):
            path = write(tmp_path / name, (picture(i, 512, 256) for i in range(FRAMES)), codec=codec)
            assert numbers(path) == list(range(FRAMES))
            data = path.read_bytes()
            path.write_bytes(data[: len(data) // 2])
            with pytest.raises(ValueError, match=rf"{name}: truncated after \d\.\d of 7\.\d s \(\d+ frames\)"):
                VideoFile(path)
            assert 10 < len(numbers(path, on_error="keep")) < 50

    def test_mpjpeg_states_none_and_ends_as_it_should(self, tmp_path):
        options = {"codec": "mjpeg", "pix_fmt": "yuvj420p", "format": "mpjpeg"}
        path = write(tmp_path / "clip.mjpeg", map(picture, range(12)), **options)
        assert numbers(path) == list(range(12))


class TestClocks:
    def test_one_of_33_bits_may_wrap(self, tmp_path):
        for offset in ("95440", "95443.5"):
            path = write(tmp_path / "clip.ts", map(picture, range(FRAMES)), container={"output_ts_offset": offset})
            with VideoFile(path) as file:
                assert file.duration == pytest.approx(7.5, abs=2e-3)
                assert file.times.tolist() == pytest.approx([i / 8 for i in range(FRAMES)], abs=2e-3)
                assert numbers_of(file.read([0, 20, 59], HEIGHT, WIDTH)) == [0, 20, 59]

    @pytest.mark.parametrize("late", [0.0, 1.5, 5.0, 100.0, 90_000.0])
    @pytest.mark.parametrize("name", ["clip.mkv", "clip.flv", "clip.mp4", "clip.webm"])
    def test_one_may_start_late(self, tmp_path, name, late):
        codec = {"codec": "libvpx", "options": corpus.VPX} if name == "clip.webm" else {}
        options = {"movflags": "frag_keyframe+empty_moov+default_base_moof"} if name == "clip.mp4" else {}
        times = [late + i / 8 for i in range(FRAMES)]
        path = write(tmp_path / name, map(picture, range(FRAMES)), times=times, container=options, **codec)
        with VideoFile(path) as file:
            assert len(file) == FRAMES and file.duration == pytest.approx(7.5, abs=0.2)
        if name == "clip.mp4":
            return  # fragments written like this do not state a length
        data = path.read_bytes()
        path.write_bytes(data[: len(data) // 2])
        with pytest.raises(ValueError, match=f"{name}: (truncated|damaged) after"):
            VideoFile(path)
        assert 10 < len(numbers(path, on_error="keep")) < 50

    def test_one_may_start_before_zero(self, tmp_path):
        for bframes in (0, 2):
            options = {"x264-params": f"scenecut=0:bframes={bframes}:b-adapt=0:keyint=12"}
            path = write(tmp_path / "clip.mkv", map(picture, range(FRAMES)), options=options)
            path.write_bytes(move_blocks(path.read_bytes(), -625))
            with VideoFile(path) as file:
                assert file.times.tolist() == pytest.approx([i / 8 for i in range(FRAMES)], abs=2e-3)
                assert numbers_of(file.read(range(FRAMES), HEIGHT, WIDTH)) == list(range(FRAMES))
                assert numbers_of(file.read([3, 40], HEIGHT, WIDTH)) == [3, 40]

    @pytest.mark.parametrize("bframes", [0, 1, 2, 3])
    @pytest.mark.parametrize("name", ["clip.avi", "clip.asf"])
    def test_containers_with_decode_times_only_show_frames_when_they_should(self, tmp_path, name, bframes):
        for codec, options in (
            ("libx264", {"x264-params": f"scenecut=0:bframes={bframes}:b-adapt=0:keyint=12"}),
            ("mpeg4", {"bf": str(bframes), "g": "12", "qmax": "3"}),
        ):
            times = times_of("variable.mp4")
            path = write(tmp_path / name, map(picture, range(FRAMES)), times=times, codec=codec, options=options)
            with VideoFile(path) as file:
                assert file.times.tolist() == pytest.approx(times, abs=0.02)
                assert numbers_of(file.read(range(FRAMES), HEIGHT, WIDTH)) == list(range(FRAMES))


class TestStreams:
    @pytest.mark.parametrize(("sizes", "default"), [((64, 256), 1), ((256, 64), 0), ((64, 256), 0)])
    @pytest.mark.parametrize("name", ["clip.mkv", "clip.mp4"])
    def test_the_default_one_is_read(self, tmp_path, name, sizes, default):
        path = two_streams(tmp_path / name, sizes, default=default)
        with VideoFile(path) as file, av.open(str(path)) as container:
            best = container.streams.best("video")
            assert (file.width, file.height) == (best.width, best.height)
            if name == "clip.mkv":
                assert file.width == sizes[default]
            assert numbers_of(file.read(range(FRAMES), file.height, file.width)) == list(range(FRAMES))

    def test_a_thumbnail_of_one_picture_is_not(self, tmp_path):
        path = two_streams(tmp_path / "clip.mp4", (64, 128), default=1, counts=(1, FRAMES))
        assert numbers(path) == list(range(FRAMES))

    def test_animated_avif_is_its_sequence(self, processor, tmp_path):
        images = [Image.fromarray(picture(i)) for i in range(12)]
        images[0].save(tmp_path / "clip.avif", save_all=True, append_images=images[1:], duration=250)
        with VideoFile(tmp_path / "clip.avif") as file:
            assert numbers_of(file.read(range(len(file)), HEIGHT, WIDTH)) == list(range(12))
            assert file.times.tolist() == pytest.approx([i / 4 for i in range(12)])
        assert processor.video_processor.plan(tmp_path / "clip.avif").num_frames == 12


class TestMatrices:
    @pytest.mark.parametrize(("turns", "mirrored"), list(itertools.product(range(4), (False, True))))
    def test_frames_are_turned_and_mirrored_back(self, tmp_path, turns, mirrored):
        images = (np.rot90(picture(i), turns) for i in range(8))
        images = (np.ascontiguousarray(image[:, ::-1] if mirrored else image) for image in images)
        path = write(tmp_path / "stored.mp4", images)
        cos, sin = ((1, 0), (0, 1), (-1, 0), (0, -1))[turns]  # shown turned clockwise by 90 degrees, `turns` times
        flip = -1 if mirrored else 1
        for scale in (1, 0.5, 3):
            matrix = tuple(scale * value for value in (flip * cos, flip * sin, 0, -sin, cos, 0)) + (0, 0, 1)
            with VideoFile(with_matrix(path, tmp_path / "clip.mp4", matrix)) as file:
                assert (file.width, file.height) == SIZE
                assert numbers_of(file.read(range(8), HEIGHT, WIDTH)) == list(range(8))

    @pytest.mark.parametrize("matrix", [(0,) * 9, (0, 0, 0, 0, 1, 0, 0, 0, 1), (1, 1, 0, 1, 1, 0, 0, 0, 1)])
    def test_one_that_means_nothing_is_left_alone(self, corpus_clip, tmp_path, matrix):
        with VideoFile(with_matrix(corpus_clip("h264.mp4"), tmp_path / "clip.mp4", matrix)) as file:
            assert (file.width, file.height) == SIZE
            assert numbers_of(file.read([0, 30], HEIGHT, WIDTH)) == [0, 30]


class TestColours:
    def test_high_dynamic_range_is_told_once(self, tmp_path, caplog):
        for transfer in ("smpte2084", "arib-std-b67"):
            options = {"x264-params": f"transfer={transfer}"}
            path = write(tmp_path / "clip.mp4", map(picture, range(8)), options=options)
            assert numbers(path) == list(range(8))
        assert caplog.text.count("HDR video is read without tone mapping: its colours are approximate") == 1

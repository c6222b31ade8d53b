"""What is said of files that are no videos, bad, damaged, or too large, and what is kept of them when asked."""

import itertools
import random
import struct
import time
from pathlib import Path

import av
import pytest
from corpus import HEIGHT, SIZE, WIDTH, numbers_of, picture, read, write

from videonsa.video_reader import VideoFile


def faststart(path: Path, output: Path) -> bytes:
    """The file with its index in front, so that half of it can be opened."""
    with av.open(str(path)) as whole, av.open(str(output), "w", options={"movflags": "faststart"}) as copy:
        stream = copy.add_stream_from_template(whole.streams.video[0])
        for packet in whole.demux(video=0):
            if packet.size:
                packet.stream = stream
                copy.mux(packet)
    return output.read_bytes()


class TestBadFiles:
    def test_what_is_no_video_is_named(self, tmp_path, corpus_clip):
        (tmp_path / "text.mp4").write_text("This is not a video. " * 100)
        (tmp_path / "empty.mp4").touch()
        (tmp_path / "folder").mkdir()
        (tmp_path / "strange.mp4").write_bytes(corpus_clip("h264.mp4").read_bytes().replace(b"avc1", b"zzzz"))
        for name, message in {
            "text.mp4": "text.mp4: cannot be read as a video: .*Invalid data",
            "empty.mp4": "empty.mp4: the file is empty",
            "folder": "folder: a directory, without images",
            "strange.mp4": "strange.mp4: no decoder for its video stream",
        }.items():
            with pytest.raises(ValueError, match=message):
                VideoFile(tmp_path / name)
        with pytest.raises(FileNotFoundError, match="missing.mp4: no such video file"):
            VideoFile(tmp_path / "missing.mp4")
        for source, message in {
            b"": "<bytes>: empty",
            b"not a video at all": "<bytes>: cannot be read as a video",
        }.items():
            with pytest.raises(ValueError, match=message):
                VideoFile(source)
        with (tmp_path / "text.mp4").open() as file, pytest.raises(ValueError, match="text.mp4: .* binary mode"):
            VideoFile(file)
        with pytest.raises(ValueError, match="on_error must be 'raise' or 'keep', got 'skip'"):
            VideoFile(corpus_clip("h264.mp4"), on_error="skip")

    def test_text_that_libav_would_draw_is_no_video(self, tmp_path):
        for name in ("notes.txt", "notes.nfo"):
            (tmp_path / name).write_text("Not a video.\n" * 100)
            with pytest.raises(ValueError, match=f"{name}: no video file, but Tele-typewriter"):
                VideoFile(tmp_path / name)

    @pytest.mark.parametrize(
        "text",
        [
            "ffconcat version 1.0\nfile {}",
            "#EXTM3U\n#EXT-X-TARGETDURATION:8\n#EXTINF:7.5,\n{}\n#EXT-X-ENDLIST",
            "v=0\nc=IN IP4 127.0.0.1\nt=0 0\nm=video 45678 RTP/AVP 96\na=rtpmap:96 H264/90000\n",
            '<?xml version="1.0"?><MPD><Period><BaseURL>{}</BaseURL></Period></MPD>',
        ],
    )
    def test_what_refers_to_others_does_not_get_them_opened(self, corpus_clip, tmp_path, text):
        (tmp_path / "list.mp4").write_text(text.format(corpus_clip("h264.ts")))
        begin = time.monotonic()
        for source in (tmp_path / "list.mp4", (tmp_path / "list.mp4").read_bytes()):
            with pytest.raises(ValueError, match="(list.mp4|<bytes>): a list or description of other files or streams"):
                VideoFile(source)
        assert time.monotonic() - begin < 5  # libav would wait for a stream

    def test_a_clock_that_starts_anew_is_noticed(self, corpus_clip, tmp_path):
        (tmp_path / "twice.ts").write_bytes(2 * corpus_clip("h264.ts").read_bytes())
        with pytest.raises(ValueError, match="twice.ts: its clock starts anew after 60 of 120 frames"):
            VideoFile(tmp_path / "twice.ts")
        assert numbers_of(read(tmp_path / "twice.ts", on_error="keep")) == list(range(60))
        assert numbers_of(read(tmp_path / "twice.ts", [50], on_error="keep")) == [50]

    def test_a_video_without_frames_is_named(self, tmp_path):
        with av.open(str(tmp_path / "none.mp4"), "w", options={"movflags": "empty_moov"}) as output:
            stream = output.add_stream("libx264", rate=8)
            stream.width, stream.height, stream.pix_fmt = *SIZE, "yuv420p"
            output.start_encoding()
        with pytest.raises(ValueError, match="none.mp4: (no frames|cannot be read|no video stream)"):
            VideoFile(tmp_path / "none.mp4")

    @pytest.mark.parametrize("suffix", [".mp4", ".mkv", ".gif", ".ts"])
    def test_one_frame_is_a_video(self, tmp_path, suffix):
        codec = {"codec": "gif", "pix_fmt": "bgr8"} if suffix == ".gif" else {}
        path = write(tmp_path / f"clip{suffix}", [picture(77)], **codec)
        with VideoFile(path) as file:
            assert len(file) == 1 and file.duration > 0
            assert numbers_of(file.read([0, 0], HEIGHT, WIDTH)) == [77, 77]

    @pytest.mark.parametrize("name", ["faststart.mp4", "h264.mkv", "vp9.webm"])
    def test_a_file_that_ends_early_keeps_what_there_is_when_asked(self, corpus_clip, tmp_path, decoders, name):
        path = tmp_path / name
        whole = faststart(corpus_clip(name), path) if name.endswith("mp4") else corpus_clip(name).read_bytes()
        path.write_bytes(whole[: len(whole) * 8 // 10])
        with pytest.raises(
            ValueError, match=rf"{name}: truncated after \d\.\d of 7\.5 s \(\d+ frames\).*on_error='keep'"
        ):
            VideoFile(path)
        with VideoFile(path, on_error="keep") as file:
            assert 20 < len(file) < 56
            numbers = numbers_of(file.read(range(len(file)), HEIGHT, WIDTH))
            assert numbers[:-2] == list(range(len(file) - 2))  # the last may be cut in the middle

    @pytest.mark.parametrize("name", ["h264.mp4", "hevc.mp4", "vp9.webm", "mpeg4.mp4", "mjpeg.mov", "h264.avi"])
    def test_damaged_packets_keep_the_others_when_asked(self, corpus_clip, tmp_path, decoders, name):
        data, path = bytearray(corpus_clip(name).read_bytes()), tmp_path / name
        with av.open(str(corpus_clip(name))) as container:
            packets = [packet for packet in container.demux(video=0) if packet.size]
        for packet in packets[26:34]:
            data[packet.pos + 5 : packet.pos + packet.size] = bytes(packet.size - 5)
        path.write_bytes(data)
        with pytest.raises(ValueError, match=f"{name}: truncated or damaged, .* frames could be decoded: .*'keep'"):
            read(path)
        numbers = numbers_of(read(path, on_error="keep"))
        assert numbers[:22] == list(range(22)) and numbers[-10:] == list(range(50, 60))
        assert all(0 <= i - number < 24 for i, number in enumerate(numbers) if number >= 0)

    @pytest.mark.parametrize("name", ["h264.ts", "mpeg2.ts"])
    def test_lost_packets_of_a_transport_stream_are_noticed(self, corpus_clip, tmp_path, name):
        data, path = bytearray(corpus_clip(name).read_bytes()), tmp_path / name
        middle = len(data) // 2 // 188 * 188
        del data[middle : middle + 10 * 188]
        path.write_bytes(data)
        with pytest.raises(
            ValueError, match=rf"{name}: damaged after \d\.\d s; on_error='keep' makes do with the rest"
        ):
            read(path)
        numbers = numbers_of(read(path, on_error="keep"))
        assert 50 <= len(numbers) < 60 and numbers[:20] == list(range(20)) and numbers[-10:] == list(range(50, 60))

    def test_a_file_of_noise_is_refused_also_when_asked_to_keep(self, corpus_clip, tmp_path, decoders):
        data, path = bytearray(corpus_clip("h264.mp4").read_bytes()), tmp_path / "noise.mp4"
        with av.open(str(corpus_clip("h264.mp4"))) as container:
            for packet in container.demux(video=0):
                if packet.size:
                    data[packet.pos : packet.pos + packet.size] = bytes(packet.size)
        path.write_bytes(data)
        with pytest.raises(ValueError, match="noise.mp4: truncated or damaged, 0 of 60"):
            read(path)
        with pytest.raises(ValueError, match="noise.mp4: none of its frames can be decoded"):
            read(path, on_error="keep")

    def test_flipped_bytes_are_never_worse_than_an_error(self, corpus_clip, tmp_path, side_by_side):
        generator = random.Random(0)
        for name in ("h264.mp4", "h264.mkv", "h264.ts", "vp9.webm", "palette.gif", "mpeg4.avi"):
            original = corpus_clip(name).read_bytes()
            for trial in range(8):
                data = bytearray(original)
                for _ in range(1 + trial * 4):
                    data[generator.randrange(len(data))] = generator.randrange(256)
                (tmp_path / name).write_bytes(data)
                for source, on_error in itertools.product((bytes(data), tmp_path / name), ("raise", "keep")):
                    try:
                        with VideoFile(source, on_error=on_error) as file:
                            count = min(len(file), 60)
                            assert file.read(range(count), 28, 56).shape == (count, 3, 28, 56)
                    except ValueError as error:
                        assert "<bytes>" in str(error) or name in str(error)


class TestLimits:
    def test_frames_that_are_too_large_are_refused(self, corpus_clip, tmp_path):
        with pytest.raises(ValueError, match=r"h264.mp4: 128 × 64 pixels in its header, the limit is 8,000"):
            VideoFile(corpus_clip("h264.mp4"), max_pixels=8000)
        # A header that lies: of 10,000 × 10,000 pixels, where the frames are small.
        data = bytearray(corpus_clip("h264.mp4").read_bytes())
        for box, offset in ((b"avc1", 28), (b"tkhd", 80)):
            where = data.index(box) + offset
            size = (10_000, 10_000)
            data[where : where + (4 if box == b"avc1" else 8)] = (
                struct.pack(">HH", *size) if box == b"avc1" else struct.pack(">II", *(side << 16 for side in size))
            )
        (tmp_path / "liar.mp4").write_bytes(data)
        assert numbers_of(read(tmp_path / "liar.mp4", [0, 30])) == [0, 30]  # libav has looked into the frames before

    def test_a_small_file_of_huge_frames_is_refused_before_they_are_decoded(self, tmp_path):
        path = tmp_path / "bomb.mov"
        with av.open(str(path), "w") as output:
            stream = output.add_stream("png", rate=1)
            stream.width, stream.height, stream.pix_fmt = 9000, 9000, "gray"
            frame = av.VideoFrame(9000, 9000, "gray")
            frame.planes[0].update(bytes(frame.planes[0].buffer_size))
            output.mux(stream.encode(frame))
            output.mux(stream.encode())
        assert path.stat().st_size < 200_000
        with pytest.raises(ValueError, match="bomb.mov: 9000 × 9000 pixels in its header, the limit is 67,108,864"):
            VideoFile(path)

    def test_videos_that_are_too_long_are_refused(self, corpus_clip, tmp_path):
        with pytest.raises(ValueError, match="h264.mp4: 8 seconds long, the limit is 7"):
            VideoFile(corpus_clip("h264.mp4"), max_seconds=7)
        path = write(tmp_path / "days.mkv", map(picture, range(3)), times=[0, 1, 1e6])
        with pytest.raises(ValueError, match="days.mkv: 1,000,.* seconds long, the limit is 86,400"):
            VideoFile(path)
        assert len(VideoFile(path, max_seconds=1e7)) == 3

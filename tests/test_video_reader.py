"""Which frames come out of a file and what they look like, whatever the container and the source; memory and threads.

Frames of `corpus.py` carry their number, so that a test can tell which it got.
"""

import contextlib
import gc
import http.server
import inspect
import io
import multiprocessing
import os
import socket
import struct
import threading
import time
from fractions import Fraction
from pathlib import Path

import av
import corpus
import forks
import numpy as np
import pytest
import torch
from corpus import FRAMES, HEIGHT, SIZE, WIDTH, numbers_of, picture, read, write
from transformers.utils import logging
from videos import REAL_CLIP, needs_real_clip

from videonsa import video_reader, video_source
from videonsa.video_reader import VideoFile


@pytest.fixture
def decoding(monkeypatch):
    """The threads that decoded, in the order in which they began."""
    used, frames = [], VideoFile._frames
    monkeypatch.setattr(VideoFile, "_frames", lambda *args: used.append(threading.get_ident()) or frames(*args))
    return used


def solid(path, planes, pix_fmt, *, matrix, full, codec="libx264", options=None) -> Path:
    """A clip of one colour, given as its luma and chroma as they are stored."""
    with av.open(str(path), "w") as output:
        stream = output.add_stream(codec, rate=4, options=options or {})
        stream.width, stream.height, stream.pix_fmt = 64, 64, pix_fmt
        stream.codec_context.colorspace, stream.codec_context.color_range = matrix, 2 if full else 1
        dtype = np.uint16 if "10" in pix_fmt else np.uint8
        for _ in range(4):
            frame = av.VideoFrame(64, 64, pix_fmt)
            for plane, value in zip(frame.planes, planes, strict=True):
                plane.update(np.full(plane.buffer_size // dtype().itemsize, value, dtype).tobytes())
            frame.colorspace, frame.color_range = matrix, 2 if full else 1
            output.mux(stream.encode(frame))
        output.mux(stream.encode())
    return path


def stored(rgb, matrix, full, bits) -> list[int]:
    """Luma and chroma of a colour of 0 to 255, by the standards' own formulas."""
    red, green, blue = (value / 255 for value in rgb)
    kr, kb = {5: (0.299, 0.114), 1: (0.2126, 0.0722), 9: (0.2627, 0.0593)}[matrix]
    luma = kr * red + (1 - kr - kb) * green + kb * blue
    chroma = (blue - luma) / (2 * (1 - kb)), (red - luma) / (2 * (1 - kr))
    if full:
        top = 2**bits - 1
        return [round(luma * top), *(round(c * top + 2 ** (bits - 1)) for c in chroma)]
    return [round((16 + 219 * luma) * 2 ** (bits - 8)), *(round((128 + 224 * c) * 2 ** (bits - 8)) for c in chroma)]


class TestFrames:
    @pytest.mark.parametrize("name", corpus.CORPUS)
    def test_each_is_the_one_asked_for(self, corpus_clip, threads, monkeypatch, name):
        if name == "intra-refresh.mkv" and int(av.__version__.split(".")[0]) < 16:
            pytest.skip("decoders of PyAV 15 do not tell that a frame after a jump is incomplete")
        with VideoFile(corpus_clip(name)) as file:
            assert (len(file), file.width, file.height) == (FRAMES, *SIZE)
            assert file.times.tolist() == pytest.approx(corpus.times_of(name), abs=2e-3)
            everything = file.read(range(FRAMES), HEIGHT, WIDTH)
            assert numbers_of(everything) == list(range(FRAMES))
            for indices in ([0], [59], [5, 59], [11, 12, 13], [7, 7, 30, 58, 58], range(3, 60, 9), range(60)):
                for count, least in ((1, 128), (2, 128), (3, 1)):  # with 1, several decoders share what there is
                    threads(count)
                    monkeypatch.setattr(video_reader, "MIN_WORK", least)
                    assert torch.equal(file.read(indices, HEIGHT, WIDTH), everything[list(indices)])

    def test_only_those_are_converted(self, corpus_clip, monkeypatch):
        converted, convert = [], video_reader.to_rgb
        monkeypatch.setattr(video_reader, "to_rgb", lambda *args: converted.append(1) or convert(*args))
        read(corpus_clip("h264.mp4"), [3, 3, 20, 40])
        assert len(converted) == 3

    @pytest.mark.parametrize("name", ["h264.mp4", "h264.ts", "hevc.mp4", "open-gop.mp4", "vp9.webm", "variable.mkv"])
    def test_decoding_starts_at_the_key_frame_before(self, corpus_clip, name):
        with VideoFile(corpus_clip(name)) as file:
            (first, last), (start, stop) = file._stretches(file.positions[[2, 56]])
            assert first == 0 and last < 12 and start >= 36 and stop - start < 24

    def test_streams_whose_key_frames_are_none_are_decoded_whole(self, corpus_clip, monkeypatch):
        # From any frame but the first on, frames come out damaged or not at all.
        monkeypatch.setattr(VideoFile, "_stretches", lambda self, positions, *_: [(17, int(max(positions)))])
        assert numbers_of(read(corpus_clip("one-key-frame.mp4"), [20, 50])) == [20, 50]

    @pytest.mark.parametrize("name", ["open-gop.mp4", "open-gop.ts", "hevc-open-gop.mkv", "mpeg2.ts", "h264.mov"])
    def test_one_jump_is_enough(self, corpus_clip, decoding, name):
        for indices in ([40], [2, 33, 58], [59], [21, 22, 23, 24, 25], [34, 36, 59]):
            assert numbers_of(read(corpus_clip(name), indices)) == indices
        assert len(decoding) == 5

    @pytest.mark.parametrize(
        "name", ["h264.mp4", "open-gop.mp4", "hevc-open-gop.mkv", "vp9.webm", "av1.mp4", "late.ts"]
    )
    def test_several_threads_decode_from_key_frames_of_their_own(self, corpus_clip, side_by_side, decoding, name):
        everything = None
        for _ in range(4):
            frames = read(corpus_clip(name))
            assert numbers_of(frames) == list(range(FRAMES))
            everything = frames if everything is None else everything
            assert torch.equal(frames, everything)
        assert len(decoding) == 12 and threading.get_ident() not in decoding  # none had to decode anything once more

    def test_one_thread_decodes_where_there_are_no_others_or_too_little_work(
        self, corpus_clip, threads, decoding, monkeypatch
    ):
        threads(3)
        read(corpus_clip("h264.mp4"))  # less than two shares of work
        monkeypatch.setattr(video_reader, "MIN_WORK", 1)
        read(corpus_clip("h264.mp4"), [0, 3, 4])  # a single stretch
        read(corpus_clip("h264.mp4"), [0, 12, 47])  # most of it one stretch
        read(corpus_clip("one-key-frame.mp4"))
        for source in (corpus_clip("h264.mp4").read_bytes(), corpus_clip("h264.mp4").open("rb")):
            read(source)  # of which there is one place to read at
        monkeypatch.setattr(video_reader, "DECODER_MEMORY", 2 * 28 * 128 * 64 - 1)
        read(corpus_clip("h264.mp4"))
        monkeypatch.undo()
        threads(1)
        read(corpus_clip("h264.mp4"), [0, 30, 59])
        assert set(decoding) == {threading.get_ident()} and len(decoding) == 7

    def test_a_recording_may_start_before_its_first_key_frame_and_refer_to_what_it_lacks(self, corpus_clip, tmp_path):
        data = corpus_clip("open-gop.ts").read_bytes()
        (tmp_path / "cut.ts").write_bytes(data[12 * 188 :])
        numbers = numbers_of(read(tmp_path / "cut.ts"))
        assert 0 < numbers[0] <= 12 and numbers == list(range(numbers[0], 60))

    def test_a_jump_that_lands_behind_its_frame_is_made_good(self, corpus_clip, decoders):
        with VideoFile(corpus_clip("h264.mp4")) as file:
            file.dts = file.dts + 10**9
            assert numbers_of(file.read([2, 56], HEIGHT, WIDTH)) == [2, 56]

    def test_a_frame_may_change_its_size(self, tmp_path):
        parts = [write(tmp_path / f"{w}.h264", map(picture_of(w), range(8))) for w in (128, 256)]
        (tmp_path / "clip.h264").write_bytes(b"".join(part.read_bytes() for part in parts))
        with VideoFile(tmp_path / "clip.h264") as file:
            assert (file.width, file.height) == SIZE
            assert numbers_of(file.read(range(16), HEIGHT, WIDTH)) == [*range(8), *range(8)]

    @needs_real_clip
    def test_the_real_clip_gives_what_pyav_decodes(self):
        indices = [0, 1, 100, 101, 300, 490]
        with av.open(str(REAL_CLIP)) as container:
            frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
        with VideoFile(REAL_CLIP) as file:
            assert len(file) == 491 and (file.width, file.height) == (398, 224)
            ours = file.read(indices, 224, 398)
        assert torch.equal(ours, torch.from_numpy(np.stack(frames)[indices]).permute(0, 3, 1, 2))


def picture_of(width):
    return lambda number: picture(number, width, width // 2)


class TestLooks:
    @pytest.mark.parametrize("full", [False, True])
    @pytest.mark.parametrize("matrix", [5, 1, 9], ids=["bt601", "bt709", "bt2020"])
    @pytest.mark.parametrize(
        ("pix_fmt", "codec", "options"),
        [
            ("yuv420p", "libx264", {"qp": "1"}),
            ("yuv444p", "libx264", {"qp": "1"}),
            ("yuv420p10le", "libx265", {"x265-params": "log-level=none:qp=1:pools=none"}),
            ("yuv422p10le", "ffv1", {}),
        ],
    )
    def test_colours_are_those_that_the_file_states(self, tmp_path, pix_fmt, codec, options, matrix, full):
        for rgb in ((200, 30, 60), (20, 180, 40), (30, 60, 220), (255, 255, 255), (0, 0, 0)):
            planes = stored(rgb, matrix, full, 10 if "10" in pix_fmt else 8)
            path = solid(tmp_path / "c.mkv", planes, pix_fmt, matrix=matrix, full=full, codec=codec, options=options)
            frame = read(path, [2], 28, 28)[0].float().mean((1, 2))
            assert frame.tolist() == pytest.approx(rgb, abs=4)

    def test_colours_that_cannot_be_converted_are_named(self, corpus_clip, monkeypatch):
        def to_rgb(*_):
            raise OSError("Operation not supported")  # as newer versions of PyAV do for matrices that few files have

        monkeypatch.setattr(video_reader, "to_rgb", to_rgb)
        with pytest.raises(ValueError, match="h264.mp4: its colours, yuv420p with matrix 2, cannot be converted: Oper"):
            read(corpus_clip("h264.mp4"))

    def test_what_is_transparent_is_white(self, tmp_path):
        image = np.full((HEIGHT, WIDTH, 4), (200, 100, 0, 255), np.uint8)
        image[:, : WIDTH // 2, 3] = 0
        image[: HEIGHT // 2, WIDTH // 2 :, 3] = 128
        path = write(tmp_path / "clip.mov", [image] * 4, codec="qtrle", pix_fmt="argb")
        frame = read(path)[1].float()
        assert (frame[:, :, : WIDTH // 2] == 255).all()
        corners = frame[:, -1, -1].tolist(), frame[:, 0, -1].tolist()
        assert corners == ([200, 100, 0], pytest.approx([227.4, 177.2, 127], abs=0.6))

    @pytest.mark.parametrize("turns", [0, 1, 2, 3])
    def test_frames_are_upright(self, tmp_path, turns):
        path = write(tmp_path / "phone.mp4", (np.rot90(picture(i), turns).copy() for i in range(8)))
        cos, sin = ((1, 0), (0, 1), (-1, 0), (0, -1))[turns]  # shown turned clockwise by 90 degrees, `turns` times
        content = bytearray(path.read_bytes())
        matrix = content.index(b"tkhd") + 4 + 40
        values = cos << 16, sin << 16, 0, -sin << 16, cos << 16, 0, 0, 0, 1 << 30
        content[matrix : matrix + 36] = struct.pack(">9i", *values)
        path.write_bytes(content)
        with VideoFile(path) as file:
            assert (file.width, file.height) == SIZE
            assert numbers_of(file.read(range(8), HEIGHT, WIDTH)) == list(range(8))

    @pytest.mark.parametrize(("aspect", "size"), [("4/3", (171, 64)), ("1/2", (64, 64))])
    def test_pixels_that_are_not_square_count_as_they_are_shown(self, tmp_path, aspect, size):
        def prepare(stream):
            stream.codec_context.sample_aspect_ratio = Fraction(aspect)

        path = write(tmp_path / "clip.mp4", map(picture, range(8)), prepare=prepare)
        with VideoFile(path) as file:
            assert (file.width, file.height) == size
            assert numbers_of(file.read(range(8), file.height, file.width)) == list(range(8))


class TestSources:
    @pytest.mark.parametrize("name", ["h264.mp4", "h264.mkv", "late.ts", "palette.gif"])
    def test_bytes_and_files_are_read_as_paths_are(self, corpus_clip, name):
        path = corpus_clip(name)
        data = path.read_bytes()

        class Pipe(io.RawIOBase):
            inner = io.BytesIO(data)

            def readable(self):
                return True

            def readinto(self, buffer):
                return self.inner.readinto(buffer)

        for source in (data, bytearray(data), memoryview(data), io.BytesIO(data), Pipe()):
            assert numbers_of(read(source, [1, 33, 58])) == [1, 33, 58]
        with path.open("rb") as file:
            assert numbers_of(read(file, [1, 33, 58])) == [1, 33, 58]
            assert not file.closed

    def test_names_may_be_awkward(self, corpus_clip, tmp_path):
        data = corpus_clip("h264.mp4").read_bytes()
        for name in (
            "a clip.mp4",
            "прогулка 漫步.mp4",
            "10:30.mp4",
            "-i.mp4",
            "$(touch owned).mp4",
            "a'b;c&d|e%20f?.mp4",
        ):
            path = tmp_path / name
            path.write_bytes(data)
            for source in (path, str(path), path.as_uri(), path.as_uri().replace("file://", "FILE://localhost")):
                assert numbers_of(read(source, [40])) == [40]
        assert not (tmp_path / "owned").exists()

    @pytest.fixture
    def server(self, corpus_clip, tmp_path, monkeypatch):
        monkeypatch.setenv("no_proxy", "127.0.0.1")
        data = corpus_clip("faststart.mp4").read_bytes()
        requests = []

        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self):
                requests.append(self.path)
                if "missing" in self.path:
                    self.send_error(404)
                    return
                if "moved" in self.path:
                    self.send_response(302)
                    self.send_header("Location", "/clip.mp4")
                    self.end_headers()
                    return
                self.send_response(200)
                self.close_connection = True
                sent = data[:-100] if "cut" in self.path else data
                if "chunked" in self.path:
                    self.send_header("Transfer-Encoding", "chunked")
                    sent = b"%x\r\n" % len(data) + sent
                elif "unsized" not in self.path:
                    self.send_header("Content-Length", "abc" if "odd" in self.path else str(len(data)))
                self.end_headers()
                self.wfile.write(sent)

            def log_message(self, *_):
                pass

        with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
            threading.Thread(target=server.serve_forever, daemon=True).start()
            yield f"http://127.0.0.1:{server.server_port}", requests
            server.shutdown()

    @pytest.mark.parametrize("name", ["clip.mp4", "unsized.mp4", "odd.mp4", "moved.mp4", "ein Fluß.mp4?token=1"])
    def test_what_is_on_a_server_is_fetched_once(self, server, name):
        url, requests = server[0].upper(), server[1]
        assert numbers_of(read(f"{url}/{name}", [0, 59])) == [0, 59]
        assert len(requests) == 1 + ("moved" in name)

    def test_a_server_that_fails_is_named(self, server):
        url, _ = server
        for source, message in (
            (f"{url}/missing.mp4?token=1", r"/missing.mp4: cannot be downloaded: HTTP Error 404"),
            (f"{url}/cut.mp4", r"/cut.mp4: truncated after [\d,]+ of [\d,]+ bytes; on_error='keep'"),
            (f"{url}/chunked-cut.mp4", r"/chunked-cut.mp4: truncated after [\d,]+ bytes: IncompleteRead"),
            ("http://127.0.0.1:1/clip.mp4", "http://127.0.0.1:1/clip.mp4: cannot be downloaded: .*refused"),
            (f"http://{'a' * 80}.com/clip.mp4", "a.com/clip.mp4: cannot be downloaded: .*label"),
        ):
            with pytest.raises(ValueError, match=message):
                read(source)

    @pytest.mark.parametrize("name", ["cut.mp4", "chunked-cut.mp4"])
    def test_what_a_server_sent_is_kept_when_asked(self, server, name):
        assert numbers_of(read(f"{server[0]}/{name}", [0, 30], on_error="keep")) == [0, 30]

    def test_a_server_may_not_send_without_end(self, server, monkeypatch):
        monkeypatch.setattr(video_source, "MAX_DOWNLOAD", 1000)
        for name in ("clip.mp4", "unsized.mp4"):
            with pytest.raises(ValueError, match=f"{name}: more than 1,000 bytes, the limit"):
                read(f"{server[0]}/{name}")

    @pytest.mark.parametrize("protocol", ["http", "tcp"])
    def test_a_server_that_never_answers_is_given_up(self, protocol, monkeypatch):
        monkeypatch.setenv("no_proxy", "127.0.0.1")
        with socket.create_server(("127.0.0.1", 0)) as silent:
            url = f"{protocol}://127.0.0.1:{silent.getsockname()[1]}/clip.mp4"
            with pytest.raises(ValueError, match=f"{url}: cannot be .*(timed out|exit)"):
                read(url, timeout=0.3)


class TestResources:
    @pytest.mark.parametrize(("codec", "threads"), [("libx264", 2), ("libx265", 16)])
    def test_memory_is_that_of_the_frames_read(self, tmp_path, codec, threads):
        options = corpus.X264 if codec == "libx264" else corpus.X265
        path = write(tmp_path / "clip.mp4", (picture(i, 1920, 1080) for i in range(60)), codec=codec, options=options)
        script = f"""
            import sys; sys.path.insert(0, {str(Path(__file__).parent)!r}); import conftest
            import resource, torch
            from videonsa import video_reader, video_source
            from videonsa.video_reader import VideoFile
            peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
            torch.set_num_threads({threads})
            video_reader.MIN_WORK = 1
            before = peak()
            with VideoFile({str(path)!r}) as file:
                assert file._divide(file.positions)[1] == 2
                frames = file.read(range(0, 60, 2), 168, 280)
            print(peak() - before - frames.nbytes // 2**20)
        """
        done = forks.run("-c", inspect.cleandoc(script))
        assert done.returncode == 0, done.stderr
        assert int(done.stdout) < 200  # MB; 60 frames are 373 MB

    @pytest.mark.filterwarnings("ignore:This DataLoader will create 4 worker")
    def test_four_workers_read_alike_and_leak_nothing(self, corpus_clip):
        # Each worker gets each of the five, as their number is coprime to that of the workers.
        paths = [corpus_clip(name) for name in ("h264.mp4", "hevc.mp4", "vp9.webm", "late.ts", "mpeg4.avi")]
        loader = torch.utils.data.DataLoader(
            Clips(paths, 500), batch_size=None, num_workers=4, multiprocessing_context="fork"
        )
        used, seen = [[], [], [], []], {}
        for worker, path, files, memory, frames in loader:
            assert files == 0 and numbers_of(frames) == [0, 5, 11]
            assert torch.equal(frames, seen.setdefault(path, frames))
            used[worker].append(memory)
        assert len(seen) == 5
        for memory in used:
            assert len(memory) == 125
            assert max(memory[25:]) < max(memory[:25]) + 20  # MB; 100 leaks of a decoder would be far more

    @pytest.mark.filterwarnings("ignore:.*fork")
    def test_a_process_may_fork_after_threads_have_decoded(self, corpus_clip, tmp_path, threads):
        threads(2)
        data = bytearray(corpus_clip("one-key-frame.mp4").read_bytes())
        data[len(data) // 3 : len(data) // 2] = bytes(len(data) // 2 - len(data) // 3)
        (tmp_path / "clip.mp4").write_bytes(data)
        gc.disable()  # else it may happen to be in time
        try:
            with pytest.raises(ValueError, match="damaged") as caught:
                read(tmp_path / "clip.mp4")
            caught = [caught]
            caught.append(caught)  # keeps the error, and so its decoder, until it is collected
            del caught
            child = multiprocessing.get_context("fork").Process(target=gc.collect)
            child.start()
        finally:
            gc.enable()
        child.join(20)
        child.kill()
        assert child.exitcode == 0

    def test_files_are_closed_and_threads_end_after_errors_too(self, corpus_clip, tmp_path, decoders):
        (tmp_path / "text.mp4").write_text("This is not a video. " * 100)
        bad = tmp_path / "cut.mkv"
        bad.write_bytes(corpus_clip("h264.mkv").read_bytes()[:2000])
        before = os.listdir("/proc/self/fd")
        for _ in range(20):
            for path in (tmp_path / "text.mp4", bad):
                with pytest.raises(ValueError):
                    read(path)
            with pytest.raises(RuntimeError), VideoFile(corpus_clip("h264.mp4")) as file:
                file.read([2, 50], HEIGHT, WIDTH, resize=lambda *_: torch.zeros(1).view(2))
        assert len(os.listdir("/proc/self/fd")) <= len(before) and not decoding_threads()

    @pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
    def test_an_error_in_one_thread_ends_the_others(self, corpus_clip, side_by_side, error):
        resized = []

        def resize(frame, height, width):
            resized.append(1)
            if len(resized) == 2:
                raise error("no more")
            time.sleep(0.1)
            return video_reader.resize_bicubic(frame, height, width)

        with pytest.raises(error, match="no more"), VideoFile(corpus_clip("h264.mp4")) as file:
            file.read(range(FRAMES), HEIGHT, WIDTH, resize)
        assert len(resized) < 10 and not decoding_threads()

    def test_reading_side_by_side_leaks_no_memory(self, corpus_clip, side_by_side):
        used = []
        for _ in range(120):
            read(corpus_clip("h264.mp4"), range(0, FRAMES, 4))
            used.append(resident_mb())
        assert max(used[40:]) < max(used[:40]) + 20  # 80 times three decoders would be far more

    def test_damage_is_reported_alike_by_any_number_of_threads(self, corpus_clip, tmp_path, threads, monkeypatch):
        monkeypatch.setattr(video_reader, "MIN_WORK", 1)
        data, path = bytearray(corpus_clip("h264.mp4").read_bytes()), tmp_path / "clip.mp4"
        with av.open(str(corpus_clip("h264.mp4"))) as container:
            packets = [packet for packet in container.demux(video=0) if packet.size]
        for packet in (*packets[14:16], *packets[38:40]):
            data[packet.pos + 5 : packet.pos + packet.size] = bytes(packet.size - 5)
        path.write_bytes(data)
        messages = set()
        for count in (2, 3, 3, 3):
            threads(count)
            with pytest.raises(ValueError) as caught:
                read(path)
            messages.add((count, str(caught.value)))
        assert len(messages) == 2
        kept = [threads(count) or read(path, on_error="keep") for count in (1, 2, 3)]
        assert torch.equal(kept[0], kept[1]) and torch.equal(kept[0], kept[2])

    def test_progress_is_shown_after_seconds_only_and_not_where_it_is_off(self, corpus_clip, monkeypatch):
        logging.enable_progress_bar()  # which a test before may have turned off
        bars, tqdm = [], logging.tqdm
        monkeypatch.setattr(logging, "tqdm", lambda *args, **kwargs: bars.append(tqdm(*args, **kwargs)) or bars[-1])
        read(corpus_clip("h264.mp4"), [0, 3])
        assert (bars[0].total, bars[0].n, bars[0].desc, bars[0].delay) == (2, 2, "h264.mp4", 3)
        logging.disable_progress_bar()
        try:
            read(corpus_clip("h264.mp4"), [0, 3])
            assert type(bars[1]).__name__ == "EmptyTqdm"
        finally:
            logging.enable_progress_bar()


def decoding_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("ThreadPool")]


def resident_mb() -> int:
    return int(Path("/proc/self/status").read_text().split("VmRSS:")[1].split()[0]) // 1024


class Clips(torch.utils.data.Dataset):
    """The same frames of some clips in turn, with how many files of theirs the worker has open and the MB it takes."""

    def __init__(self, paths: list[Path], length: int):
        self.paths, self.length = [str(path) for path in paths], length

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, i: int):
        path = self.paths[i % len(self.paths)]
        frames = read(path, [0, 5, 11])
        files = 0
        for name in os.listdir("/proc/self/fd"):
            with contextlib.suppress(FileNotFoundError):  # the loader's own come and go
                files += os.readlink(f"/proc/self/fd/{name}") in self.paths
        return torch.utils.data.get_worker_info().id, path, files, resident_mb(), frames

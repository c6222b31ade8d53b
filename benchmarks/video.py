"""Time and memory of reading a video into sampled, resized frames: this repository, ffmpeg, and other readers.

    python benchmarks/video.py                              # two minutes of H.264, in 480p and 1080p
    python benchmarks/video.py --minutes 10 60 --codecs h264 hevc vp9 av1 --key_frames 2 10

Encodes its clips itself and keeps them in build/clips. Every figure comes from a process of its own, which reads once;
the readers take turns. What they are is in `readers.py`; README.md says what a figure includes.
"""

import argparse
import ctypes.util
import importlib.metadata
import importlib.util
import itertools
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import av
import numpy as np
import torch
from common import ROOT, OptionParser, add_output_options, announce, append_rows, environment, print_table
from readers import PIXELS, RATE, READERS, Job, find_ffmpeg
from transformers.models.qwen2_vl.video_processing_qwen2_vl import smart_resize

SEGMENT = 20  # seconds encoded; clips repeat them
# Encoder, container, bits per pixel much as streaming services spend them, options: fast, but with what decoders meet
# in practice (references, B-frames, loop filters), and key frames that nothing refers across.
CODECS = {
    "h264": ("libx264", "mp4", 0.1, {"preset": "veryfast", "x264-params": "scenecut=0:open-gop=0"}),
    "hevc": ("libx265", "mp4", 0.065, {"preset": "superfast", "x265-params": "scenecut=0:open-gop=0:log-level=error"}),
    "vp9": ("libvpx-vp9", "webm", 0.065, {"deadline": "realtime", "cpu-used": "7", "row-mt": "1"}),
    "av1": ("libsvtav1", "mp4", 0.05, {"preset": "9", "svtav1-params": "scd=0"}),
}


@dataclass(frozen=True)
class Clip:
    codec: str
    height: int
    minutes: float
    key_frames: int  # seconds from one to the next

    @property
    def width(self) -> int:
        return round(self.height * 8 / 9) * 2

    def __str__(self) -> str:
        return f"{self.codec}-{self.height}p-{self.minutes:g}min-{self.key_frames}s"


def main() -> None:
    parser = OptionParser(__doc__)
    parser.add_argument("--minutes", type=float, nargs="+", default=[2], help="of the clips (%(default)s)")
    parser.add_argument("--heights", type=int, nargs="+", default=[480, 1080], help="at 16:9 (%(default)s)")
    parser.add_argument("--codecs", nargs="+", default=["h264"], choices=CODECS, help="(%(default)s)")
    parser.add_argument("--key_frames", type=int, nargs="+", default=[2], choices=(1, 2, 5, 10),
                        help="seconds from one to the next (%(default)s)")  # fmt: skip
    parser.add_argument("--fps", type=float, nargs="+", default=[4, 0.2], help="frames to sample (%(default)s)")
    parser.add_argument("--readers", nargs="+", default=list(READERS), choices=READERS, help="(all)")
    parser.add_argument("--runs", type=int, default=3, help="of each reader (%(default)s)")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="and cores, of each reader (%(default)s)")
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9
    parser.add_argument(
        "--memory", type=float, default=round(memory * 3 / 4), help="GB a reader may take (%(default)s)"
    )
    parser.add_argument("--timeout", type=float, default=3600, help="seconds a reader may take (%(default)s)")
    parser.add_argument("--clips", type=Path, default=ROOT / "build" / "clips", help="their folder (build/clips)")
    add_output_options(parser)
    args = parser.parse_args()
    if any(round(minutes * 60, 6) % 10 for minutes in args.minutes):
        parser.error("--minutes must be whole multiples of 10 seconds, such as 0.5")

    same = {"benchmark": "video", **environment(torch.device("cpu"), args.date), **versions(), "threads": args.threads}
    announce(same)
    columns = ("reader", "output", "ms", "ms_low", "ms_high", "cpu_ms", "ratio", "peak_mb", "output_mb", "difference")
    for options in itertools.product(args.minutes, args.heights, args.codecs, args.key_frames):
        clip = Clip(**dict(zip(("minutes", "height", "codec", "key_frames"), options, strict=True)))
        path = make_clip(clip, args.clips)
        for fps in args.fps:
            print(f"\n{clip}, {path.stat().st_size / 1e6:.0f} MB, at {fps:g} fps", flush=True)
            rows = measure_clip(clip, path, fps, args)
            print_table((*columns, "note"), [row for row in rows if "ms" in row])
            for row in rows:
                if "skipped" in row:
                    print(f"skipped: {row['reader']}: {row['skipped']}")
            append_rows(args.output / "video.json", [{**same, **asdict(clip), "fps": fps, **row} for row in rows])


def measure_clip(clip: Clip, path: Path, fps: float, args: argparse.Namespace) -> list[dict]:
    """One row per reader. The readers take turns, so that what else the machine does meets all of them."""
    height, width = smart_resize(clip.height, clip.width, 28, PIXELS["shortest_edge"], PIXELS["longest_edge"])
    count = max(int(round(clip.minutes * 60 * fps, 6)) // 2 * 2, 2)
    job = Job("pyav", str(path), fps, count, width, height, args.threads)
    results = {reader: [] for reader in args.readers}
    with tempfile.TemporaryDirectory(dir=args.clips) as folder:
        reference = str(Path(folder) / "frames.npy")
        run(replace(job, save=reference), args)  # also brings the clip into the page cache
        for _, (reader, runs) in itertools.product(range(args.runs), results.items()):
            if not runs or "skipped" not in runs[-1]:
                runs.append(run(replace(job, reader=reader, reference=reference), args))
    rows = [{"reader": reader, "output": READERS[reader][1], **summary(runs)} for reader, runs in results.items()]
    floor = next((row["ms"] for row in rows if row["reader"] == "ffmpeg" and "ms" in row), None)
    for row in rows:
        if floor is not None and "ms" in row:
            row["ratio"] = round(row["ms"] / floor, 3)
        if "ms" in row and (row["frames"], row["size"]) != (count, f"{width}x{height}"):
            row["note"] = f"{row['frames']} frames of {row['size']}, not {count} of {width}x{height}"
    return rows


def summary(runs: list[dict]) -> dict:
    """The figures of a row, of several runs: medians, the range of the time, the highest peak of the memory."""
    if "skipped" in runs[-1]:
        return runs[-1]
    times = [run["ms"] for run in runs]
    figures = {"ms": statistics.median(times), "ms_low": min(times), "ms_high": max(times)}
    figures |= {"cpu_ms": statistics.median(run["cpu_ms"] for run in runs)}
    figures |= {"peak_mb": max(run["peak_mb"] for run in runs), "output_mb": runs[0].get("output_mb")}
    figures |= {"difference": runs[0].get("difference")}
    rounded = {name: None if x is None else round(x, 1) for name, x in figures.items()}
    return {**rounded, "runs": len(runs), "frames": runs[0]["frames"], "size": runs[0]["size"]}


def run(job: Job, args: argparse.Namespace) -> dict:
    """What a process of readers.py measures, or why it does not."""
    missing = [name for name in READERS[job.reader][2] if importlib.util.find_spec(name) is None]
    if missing:
        return {"skipped": f"not installed: {', '.join(missing)}"}
    environ = {**os.environ, "OMP_NUM_THREADS": str(job.threads)}
    if "torchcodec" in READERS[job.reader][2] and ctypes.util.find_library("avcodec") is None:
        environ["LD_LIBRARY_PATH"] = ffmpeg_libraries(args.clips.parent / "ffmpeg")
    command = [sys.executable, str(Path(__file__).with_name("readers.py")), json.dumps(asdict(job))]
    with tempfile.TemporaryFile("w+") as output, tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=output, stderr=errors, env=environ)
        start = time.monotonic()
        try:
            while process.poll() is None:
                time.sleep(0.1)
                if resident_memory(process.pid) > args.memory * 1e9:
                    return {"skipped": f"more than {args.memory:g} GB of memory"}
                if time.monotonic() - start > args.timeout:
                    return {"skipped": f"more than {args.timeout:g} s"}
        finally:
            process.kill()
            process.wait()
        output.seek(0), errors.seek(0)
        if process.returncode:
            said = [line.strip() for line in errors if line.strip()] or [f"ended with {process.returncode}"]
            causes = (line for line in said if re.match(r"[\w.]*(Error|Exception)\b", line))  # the first is the root
            return {"skipped": next(causes, said[-1])[:300]}
        return json.loads(output.read().splitlines()[-1])


def resident_memory(pid: int) -> int:
    """Bytes that a process has in memory now; 0 once it has ended."""
    try:
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, IndexError):
        return 0


def ffmpeg_libraries(folder: Path) -> str:
    """A library path with PyAV's own FFmpeg under the names that torchcodec looks for, where the system has none."""
    bundled = Path(av.__file__).parents[1] / "av.libs"
    folder.mkdir(parents=True, exist_ok=True)
    for library in bundled.glob("lib[as]*-*.so.*"):
        name, version = library.name.split("-")[0], library.name.split(".so.")[1].split(".")[0]
        link = folder / f"{name}.so.{version}"
        if not link.exists():
            link.unlink(missing_ok=True)
            link.symlink_to(library)
    return f"{folder}:{bundled}:{os.environ.get('LD_LIBRARY_PATH', '')}"


def versions() -> dict:
    """Versions of what the readers need, by the name of the package (decord comes in several), and of ffmpeg."""
    packages = importlib.metadata.packages_distributions()
    modules = sorted({module for _, _, needed in READERS.values() for module in needed})
    names = [packages[module][0] for module in modules if module in packages]
    found = {name: importlib.metadata.version(name) for name in names}
    try:
        about = subprocess.run([find_ffmpeg(), "-version"], capture_output=True, text=True, check=True).stdout
    except (ImportError, OSError, subprocess.SubprocessError):
        return found
    return {**found, "ffmpeg": about.split()[2]}


def make_clip(clip: Clip, folder: Path) -> Path:
    """The file of a clip, from the cache or new: the packets of its segment again and again, later each time."""
    path = folder / f"{clip}.{CODECS[clip.codec][1]}"
    if path.exists():
        return path
    segment = make_segment(clip, folder)
    unfinished = path.with_name(f"unfinished-{path.name}")
    with av.open(segment) as source, av.open(unfinished, "w") as output:
        template = source.streams.video[0]
        stream = output.add_stream_from_template(template, opaque=True)  # AV1 has a decoder of another name
        tick = template.time_base
        for start in range(0, round(clip.minutes * 60), SEGMENT):
            source.seek(0)
            for packet in source.demux(template):
                if packet.dts is None:
                    continue
                packet.pts += round(start / tick)
                packet.dts += round(start / tick)
                if packet.is_keyframe and packet.pts * tick >= clip.minutes * 60 - 1e-3:
                    break  # the end, in the middle of a segment
                packet.stream = stream
                output.mux(packet)
    return unfinished.rename(path)


def make_segment(clip: Clip, folder: Path) -> Path:
    """The file of the encoded segment that a clip repeats, from the cache or new."""
    encoder, container, bits_per_pixel, options = CODECS[clip.codec]
    path = folder / f"{clip.codec}-{clip.height}p-{clip.key_frames}s-segment.{container}"
    if path.exists():
        return path
    print(f"encoding {path.name}", file=sys.stderr)
    os.environ.setdefault("SVT_LOG", "1")  # errors only
    folder.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f"unfinished-{path.name}")
    interval = clip.key_frames * RATE
    with av.open(unfinished, "w") as output:
        stream = output.add_stream(
            encoder, rate=RATE, options={**options, "g": f"{interval}", "keyint_min": f"{interval}"}
        )
        stream.width, stream.height, stream.pix_fmt = clip.width, clip.height, "yuv420p"
        stream.bit_rate = round(bits_per_pixel * clip.width * clip.height * RATE)
        for picture in moving_pictures(clip.width, clip.height):
            output.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        output.mux(stream.encode())
    return unfinished.rename(path)


def moving_pictures(width: int, height: int) -> Iterator[np.ndarray]:
    """Pictures [height, width, 3]: a textured background that pans, things that cross it, film grain."""
    rng = np.random.default_rng(0)
    textures = [texture(rng, width, height) for _ in range(2)]
    grain = rng.normal(0, 3, (height, width, 1)).astype(np.int16)
    rows, columns = np.ogrid[:height, :width]
    things = rng.uniform((0, 0, -0.1, -0.2, 0.03), (1, 1, 0.1, 0.2, 0.12), (12, 5))  # place, speed, radius: in heights
    for k in range(SEGMENT * RATE):
        seconds = k / RATE
        picture = np.roll(textures[0], (round(height * 0.01 * seconds), round(height * 0.05 * seconds)), (0, 1))
        for y, x, dy, dx, radius in things * height:
            center = (y + dy * seconds) % height, (x * width / height + dx * seconds) % width
            inside = (rows - center[0]) ** 2 + (columns - center[1]) ** 2 < radius**2
            picture[inside] = 255 - textures[1][inside]
        picture += np.roll(grain, rng.integers(0, (height, width)), (0, 1))
        yield picture.clip(0, 255).astype(np.uint8)


def texture(rng: np.random.Generator, width: int, height: int) -> np.ndarray:
    """Random int16 [height, width, 3], mostly grey, that wraps around and has the 1/f spectrum of natural scenes."""
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None])
    frequency[0, 0] = np.inf
    grey, *colors = np.fft.irfft2(np.fft.rfft2(rng.normal(size=(4, height, width))) / frequency, (height, width))
    planes = np.stack([grey + 0.25 * color for color in colors], -1)
    return (128 + 40 * planes / planes.std()).astype(np.int16)


if __name__ == "__main__":
    main()

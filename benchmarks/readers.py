"""The readers that video.py compares, each as its users would write it, and the process that measures one of them.

A reader is a function of a `Job` that imports what it needs and returns another: that one reads the clip into memory
as `job.count` frames of `job.width` x `job.height`, and is what is timed. There are two kinds, by what they return:

    frames   uint8 pixels, [frames, height, width, 3] or [frames, 3, height, width]
    inputs   what the model takes: normalised float32 patches, [patches, 1176]
"""

import json
import os
import resource
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path

RATE = 24  # frames per second of all clips
PIXELS = {"shortest_edge": 28 * 28, "longest_edge": 224 * 224}  # per frame, as the processor of this repository has it


@dataclass
class Job:
    reader: str
    path: str
    fps: float
    count: int  # frames to return; the k-th is on screen at k / fps seconds
    width: int
    height: int
    threads: int
    reference: str | None = None  # .npy file of the frames to compare with
    save: str | None = None  # .npy file to write the frames to

    @property
    def indices(self) -> list[int]:
        return [int(k * RATE / self.fps) for k in range(self.count)]


def ffmpeg(job):
    """The floor: the frames go nowhere."""
    command = [find_ffmpeg(), "-v", "error", "-nostdin", "-progress", "pipe:2", "-threads", str(job.threads)]
    command += ["-i", job.path, "-an", "-filter_threads", str(job.threads), "-frames:v", str(job.count)]
    command += ["-vf", f"fps={job.fps},scale={job.width}:{job.height}", "-f", "rawvideo", "-pix_fmt", "rgb24", "pipe:1"]

    def read():
        done = subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, check=True)
        return int(done.stderr.rpartition("frame=")[2].split()[0])

    return read


def pyav(job):
    """The bare loop: every frame decoded, those on screen at the times wanted converted."""
    import av
    import numpy as np

    def read():
        frames, k = np.empty((job.count, job.height, job.width, 3), np.uint8), 0
        with av.open(job.path) as container:
            stream = container.streams.video[0]
            stream.thread_type, stream.codec_context.thread_count = "AUTO", job.threads
            for frame in container.decode(stream):
                if frame.time * job.fps > k - 1e-3:
                    frames[k] = frame.to_ndarray(
                        format="rgb24", width=job.width, height=job.height, interpolation="BICUBIC"
                    )
                    k += 1
                if k == job.count:
                    return frames
        raise ValueError(f"it ends after {k} of {job.count} frames")

    return read


def decord(job):
    from decord import VideoReader

    def read():
        video = VideoReader(job.path, width=job.width, height=job.height, num_threads=job.threads)
        return video.get_batch(job.indices).asnumpy()

    return read


def torchcodec(job):
    from torchcodec.decoders import VideoDecoder
    from torchcodec.transforms import Resize

    def read():
        resize = Resize((job.height, job.width))
        video = VideoDecoder(job.path, num_ffmpeg_threads=job.threads, transforms=[resize])
        return video.get_frames_at(job.indices).data

    return read


def opencv(job):
    """Seeks where samples are more than two seconds apart, else decodes all: OpenCV seeks before every single frame."""
    import cv2
    import numpy as np

    cv2.setNumThreads(job.threads)

    def read():
        video = cv2.VideoCapture(job.path, cv2.CAP_FFMPEG, [cv2.CAP_PROP_N_THREADS, job.threads])
        frames, shown = np.empty((job.count, job.height, job.width, 3), np.uint8), -1
        for k, index in enumerate(job.indices):
            if job.fps < 0.5:
                video.set(cv2.CAP_PROP_POS_FRAMES, index)
                shown = index - 1
            while shown < index:
                if not video.grab():
                    raise ValueError(f"it ends after {k} of {job.count} frames")
                shown += 1
            frame = cv2.resize(video.retrieve()[1], (job.width, job.height), interpolation=cv2.INTER_AREA)
            cv2.cvtColor(frame, cv2.COLOR_BGR2RGB, dst=frames[k])
        return frames

    return read


def videonsa(job, **settings):
    import common  # noqa: F401  makes this checkout the package `videonsa`

    from videonsa.processing_videonsa import VideoNSAVideoProcessor

    unlimited = 2**40  # tokens: frames do not become smaller where there are many
    processor = VideoNSAVideoProcessor(size=PIXELS, max_frames=job.count, max_tokens=unlimited, **settings)
    return lambda: processor(videos=job.path, fps=job.fps, return_tensors="pt")["pixel_values_videos"]


def videonsa_frames(job):
    """The same call without normalisation: the pixels as they are, in the order of patches."""
    return videonsa(job, do_rescale=False, do_normalize=False)


def transformers(job):
    from transformers import Qwen2VLVideoProcessor

    sampling = {"do_sample_frames": True, "max_frames": job.count, "cap_pixels_per_frame": False}
    processor = Qwen2VLVideoProcessor(size=PIXELS, **sampling)
    return lambda: processor(videos=job.path, fps=job.fps, return_tensors="pt")["pixel_values_videos"]


def qwen_vl_utils(job, backend):
    os.environ |= {"FORCE_QWENVL_VIDEO_READER": backend, "TORCHCODEC_NUM_THREADS": str(job.threads)}
    from qwen_vl_utils import process_vision_info
    from transformers import Qwen2VLVideoProcessor

    processor = Qwen2VLVideoProcessor(do_sample_frames=False, do_resize=False, cap_pixels_per_frame=False)
    video = {"type": "video", "video": job.path, "fps": job.fps, "max_frames": job.count}
    video |= {"resized_height": job.height, "resized_width": job.width}

    def read():
        _, videos = process_vision_info([{"role": "user", "content": [video]}])
        return processor(videos=videos, return_tensors="pt")["pixel_values_videos"]

    return read


READERS = {  # the reader, what it returns, and the modules that it needs
    "ffmpeg": (ffmpeg, "frames", ()),
    "pyav": (pyav, "frames", ("av",)),
    "decord": (decord, "frames", ("decord",)),
    "torchcodec": (torchcodec, "frames", ("torchcodec",)),
    "opencv": (opencv, "frames", ("cv2",)),
    "videonsa-frames": (videonsa_frames, "frames", ("av",)),
    "transformers": (transformers, "inputs", ("torchcodec",)),
    "qwen-decord": (partial(qwen_vl_utils, backend="decord"), "inputs", ("qwen_vl_utils", "decord")),
    "qwen-torchcodec": (partial(qwen_vl_utils, backend="torchcodec"), "inputs", ("qwen_vl_utils", "torchcodec")),
    "videonsa": (videonsa, "inputs", ("av",)),
}


def find_ffmpeg() -> str:
    """The ffmpeg on the PATH, or that of the package imageio-ffmpeg."""
    if found := shutil.which("ffmpeg"):
        return found
    import imageio_ffmpeg

    return imageio_ffmpeg.get_ffmpeg_exe()


def measure(job: Job) -> dict:
    """Read once, after all imports, on `job.threads` cores: times in ms, memory in MB, what came out."""
    if hasattr(os, "sched_setaffinity"):  # also bounds those that choose their number of threads themselves
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: job.threads])
    read = READERS[job.reader][0](job)
    before = peak_memory(reset=True)
    cpu, start = cpu_seconds(), time.perf_counter()
    result = read()
    ms, cpu_ms = (time.perf_counter() - start) * 1e3, (cpu_seconds() - cpu) * 1e3
    if isinstance(result, int):  # ffmpeg: the peak of its process, and nothing to look at
        peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024
        return {
            "ms": ms,
            "cpu_ms": cpu_ms,
            "peak_mb": peak / 1e6,
            "frames": result,
            "size": f"{job.width}x{job.height}",
        }
    peak = peak_memory() - before
    frames = as_frames(result, job)
    if job.save:
        import numpy as np

        np.save(job.save, frames)
    return {
        "ms": ms,
        "cpu_ms": cpu_ms,
        "peak_mb": peak / 1e6,
        "frames": len(frames),
        "size": f"{frames.shape[2]}x{frames.shape[1]}",
        "output_mb": result.nbytes / 1e6,
        "difference": largest_difference(frames, job.reference),
    }


def as_frames(result, job: Job):
    """Array [frames, height, width, 3] of what a reader returned, in grey levels 0 ... 255."""
    if result.ndim == 2:  # patches: t, then h and w in squares of 2 x 2; each RGB, of 2 frames and 14 x 14 pixels
        height, width = job.height // 28, job.width // 28
        if result.dtype.is_floating_point:
            from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

            shape = (-1, 3, result.shape[1] // 3)
            mean, std = (result.new_tensor(x)[:, None] for x in (OPENAI_CLIP_MEAN, OPENAI_CLIP_STD))
            result = result.view(shape).mul_(std).add_(mean).mul_(255).round_().byte()  # in place: it may be large
        patches = result.view(-1, height, width, 2, 2, 3, 2, 14, 14)
        return patches.permute(0, 6, 1, 3, 7, 2, 4, 8, 5).reshape(-1, job.height, job.width, 3).numpy()
    if result.shape[1] == 3:
        result = result.permute(0, 2, 3, 1)
    return result if hasattr(result, "astype") else result.numpy()


def largest_difference(frames, reference: str | None) -> float | None:
    """Mean difference per pixel of the frame that differs most from that of the reference, in grey levels."""
    import numpy as np

    expected = np.load(reference, mmap_mode="r") if reference else None
    if expected is None or expected.shape != frames.shape:
        return None
    differences = (np.abs(a.astype(np.int16) - b).mean() for a, b in zip(frames, expected, strict=True))
    return float(max(differences))


def cpu_seconds() -> float:
    """User and system time of this process and the children it has waited for."""
    usages = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


def peak_memory(reset: bool = False) -> int:
    """Bytes resident at most, since the last reset. (The peak that getrusage knows begins with that of the parent.)"""
    if reset:
        Path("/proc/self/clear_refs").write_text("5")
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) * 1024


if __name__ == "__main__":
    print(json.dumps(measure(Job(**json.loads(sys.argv[1])))))

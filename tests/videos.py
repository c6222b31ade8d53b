"""Clips and processor calls that tests of videos share.

The clips made here are flat: frame i is grey level 8 + 3i, so that a sampled frame can be told from its pixels. A real
clip comes from the folder that VIDEONSA_REAL_CLIPS names.
"""

import os
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from PIL import Image

REAL_CLIPS = os.environ.get("VIDEONSA_REAL_CLIPS", "")
REAL_CLIP = Path(REAL_CLIPS, "v_TpB_zMG3XBA.mp4")
# Its question and answer.
REAL_ANNOTATIONS = Path(REAL_CLIPS, "annotations.json")
B_FRAMES = {"bf": "2", "x264-params": "b-adapt=0:scenecut=0"}
PAPER_SIZE = {"shortest_edge": 28 * 28, "longest_edge": 224 * 224}
needs_real_clip = pytest.mark.skipif(not REAL_CLIPS, reason="VIDEONSA_REAL_CLIPS names no folder of real clips")


def encode(path, frames=32, fps=8, *, times=None, width=56, height=56, codec="libx264", container=None, options=None):
    """Encode flat frames at a constant rate, or at `times` in milliseconds; returns `path`."""
    with av.open(str(path), "w", options=container or {}) as output:
        stream = output.add_stream(codec, rate=fps, options=options or {})
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        if times is not None:
            stream.codec_context.time_base = Fraction(1, 1000)
        for i in range(frames if times is None else len(times)):
            image = np.full((height, width, 3), 8 + 3 * i % 240, np.uint8)
            frame = av.VideoFrame.from_ndarray(image, format="rgb24")
            if times is not None:
                frame.pts, frame.time_base = times[i], Fraction(1, 1000)
            output.mux(stream.encode(frame))
        output.mux(stream.encode())
    return path


def packets(path) -> list[av.Packet]:
    with av.open(str(path)) as container:
        return [packet for packet in container.demux(video=0) if packet.size]


def decode(path) -> torch.Tensor:
    """All frames of a file, uint8 [frames, 3, H, W]."""
    with av.open(str(path)) as container:
        frames = [torch.from_numpy(frame.to_ndarray(format="rgb24")) for frame in container.decode(video=0)]
    return torch.stack(frames).permute(0, 3, 1, 2)


def process(processor, video, **kwargs):
    """Features of one video by the video processor, and its metadata."""
    features = processor.video_processor(video, return_tensors="pt", return_metadata=True, **kwargs)
    return features, features["video_metadata"][0]


def shown(processor, video, **kwargs) -> list[int]:
    """Indices of the flat frames that the model gets to see, told from their grey levels."""
    features, _ = process(processor, video, do_rescale=False, do_normalize=False, **kwargs)
    t, h, w = features["video_grid_thw"][0].tolist()
    grey = features["pixel_values_videos"].float().view(t, h * w, 3, 2, 14 * 14).mean((1, 2, 4)).flatten()
    return ((grey - 8) / 3).round().int().tolist()


def chat(processor, *videos, images=(), **processor_kwargs):
    """Model inputs of a one-turn conversation."""
    content = [{"type": "video", "video": video} for video in videos]
    content += [{"type": "image", "image": image} for image in images] + [{"type": "text", "text": "What happens?"}]
    return processor.apply_chat_template(
        [{"role": "user", "content": content}],
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        processor_kwargs=processor_kwargs,
    )


def pil_frames(count, width=64, height=48) -> list[Image.Image]:
    return [Image.new("RGB", (width, height), (8 + 3 * i,) * 3) for i in range(count)]

"""Lets `qwen_vl_utils.process_vision_info` read videos by `VideoFile`: one import does it.

    import videonsa.adapters.qwen_vl_utils_reader

Nothing else here imports it: a processor neither needs qwen_vl_utils nor changes it. FORCE_QWENVL_VIDEO_READER in the
environment still chooses another reader.
"""

from typing import Any

import torch
from qwen_vl_utils import vision_process

from videonsa.video_reader import VideoFile


def register(patch_size: int = 14) -> None:
    """What the import calls. Again with the `image_patch_size` that `process_vision_info` is called with, if not 14:
    frames that it would make smaller are made so as they are decoded."""

    def resize(frame: torch.Tensor, height: int, width: int) -> torch.Tensor:
        # That of qwen_vl_utils, which rounds otherwise than transformers' does.
        mode = vision_process.InterpolationMode.BICUBIC
        return vision_process.transforms.functional.resize(frame, [height, width], interpolation=mode, antialias=True)

    def read_video(ele: dict[str, Any]) -> tuple[torch.Tensor, dict[str, Any], float]:
        """Frames [T, 3, H, W] uint8 of ele["video"], their metadata, and the frames per second that they amount to."""
        with VideoFile(ele["video"]) as file:
            fps = len(file) / file.duration
            first, last, total = vision_process.calculate_video_frame_range(ele, len(file), fps)
            count = vision_process.smart_nframes(ele, total_frames=total, video_fps=fps)
            indices = torch.linspace(first, last, count).round().long().tolist()
            size = resized_size(ele, count, file.height, file.width, patch_size)
            video = file.read(indices, *size, resize)
        metadata = {"fps": fps, "frames_indices": indices, "total_num_frames": total, "video_backend": "pyav"}
        return video, metadata, count / total * fps

    # The second is what qwen_vl_utils falls back to, and needs a function that torchvision has removed.
    vision_process.VIDEO_READER_BACKENDS.update(videonsa=read_video, torchvision=read_video)
    if vision_process.FORCE_QWENVL_VIDEO_READER is None:
        vision_process.FORCE_QWENVL_VIDEO_READER = "videonsa"
        getattr(vision_process.get_video_reader_backend, "cache_clear", lambda: None)()


def resized_size(ele: dict[str, Any], count: int, height: int, width: int, patch_size: int) -> tuple[int, int]:
    """(height, width) that qwen_vl_utils resizes `count` frames to, or theirs if that is larger."""
    factor = patch_size * vision_process.SPATIAL_MERGE_SIZE
    if "resized_height" in ele and "resized_width" in ele:
        size = vision_process.smart_resize(ele["resized_height"], ele["resized_width"], factor=factor)
    else:
        least = ele.get("min_pixels", vision_process.VIDEO_MIN_TOKEN_NUM * factor**2)
        total = ele.get("total_pixels", vision_process.MODEL_SEQ_LEN * factor**2 * 0.9)
        share = total / count * vision_process.FRAME_FACTOR
        most = max(min(vision_process.VIDEO_MAX_TOKEN_NUM * factor**2, share), int(least * 1.05))
        most = min(ele.get("max_pixels", most), most)
        size = vision_process.smart_resize(height, width, factor=factor, min_pixels=least, max_pixels=most)
    return size if size[0] <= height and size[1] <= width else (height, width)


register()

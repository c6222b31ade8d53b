"""Rotary positions by the rule of Qwen2-VL (arXiv 2409.12191 §2.1) and Qwen2.5-VL (arXiv 2502.13923 §2.1.2).

Text counts up in all three components: time, row and column. The patches of an image or video count their frame, row
and column, frames in units of 1 / tokens_per_second; each modality starts at the largest position before it plus one.
(transformers 5.x lets text after a video start too early, and up to 5.17 cuts seconds to integers.)
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch

MODALITIES = ("text", "image", "video")


@dataclass
class Media:
    """The images and videos of a batch, in the order of their placeholders."""

    grids: dict[int, Iterator[list[int]]]  # 1 image, 2 video: time, height and width of each in patches
    seconds: Iterator[float | list[float]]  # of each video, see `frame_times`
    merge: int  # patches per token, along height and along width
    tokens_per_second: float
    truncate: bool  # cut seconds to integers first, as the public code does

    @classmethod
    def of(cls, image_grids, video_grids, seconds, merge, tokens_per_second, truncate) -> "Media":
        """From grids int [images or videos, 3] and seconds [videos] or [videos, patches or more], or None."""
        grids = [iter([] if grids is None else grids.tolist()) for grids in (image_grids, video_grids)]
        seconds = iter([] if seconds is None else torch.as_tensor(seconds).tolist())
        return cls(dict(enumerate(grids, 1)), seconds, merge, tokens_per_second, truncate)

    def patch_positions(self, kind: int, left: int, row: int) -> torch.Tensor:
        """The next image or video: int64 [3, tokens], from 0.

        Raises:
            ValueError: it does not fit the `left` placeholders of its run.
        """
        grid = next(self.grids[kind], None)
        if grid is None or grid[0] * grid[1] * grid[2] // self.merge**2 > left:
            name = MODALITIES[kind]
            raise ValueError(
                f"{name}_grid_thw does not fit the {name} placeholders of sample {row}: {left} tokens are left for "
                f"{'no further grid' if grid is None else grid}"
            )
        times = self.frame_times(grid[0]) if MODALITIES[kind] == "video" else torch.arange(grid[0])
        return torch.cartesian_prod(times, *(torch.arange(n // self.merge) for n in grid[1:])).T

    def frame_times(self, count: int) -> torch.Tensor:
        """Positions of the next video's temporal patches, int64 [count]: from the seconds that each spans (1 if not
        given) or, if its frames are not evenly spaced, from the seconds at which each begins."""
        seconds = next(self.seconds, 1.0)
        if not isinstance(seconds, list):
            span = int(seconds) if self.truncate else seconds
            times = torch.arange(count).double() * span
        elif len(seconds) < count:
            raise ValueError(f"second_per_grid_ts has {len(seconds)} times for {count} patches")
        else:
            times = torch.tensor(seconds[:count], dtype=torch.float64)
            times = times.floor() if self.truncate else times
        # Whole units; the margin undoes float32 seconds just below their value.
        return (times * (self.tokens_per_second * (1 + 1e-7))).floor().long()


def sample_positions(types: torch.Tensor, media: Media, row: int) -> tuple[torch.Tensor, int]:
    """Positions of one sample.

    Args:
        types: int [length], the modality of each token (an index of `MODALITIES`), without padding.
        media: the images and videos of the batch; this takes those of its sample.
        row: of the sample in the batch, for errors.

    Returns:
        int64 [3, length], and the position of the token that comes next.
    """
    parts, start = [torch.empty(3, 0, dtype=torch.long)], 0
    kinds, lengths = torch.unique_consecutive(types, return_counts=True)
    for kind, left in zip(kinds.tolist(), lengths.tolist(), strict=True):
        while left > 0:
            part = media.patch_positions(kind, left, row) if kind else torch.arange(left).expand(3, -1)
            parts.append(part + start)
            left -= part.shape[1]
            start = int(parts[-1].max()) + 1
    return torch.cat(parts, 1), start

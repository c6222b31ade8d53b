"""What a cache remembers of its tokens beside keys and values: which are vision, and the position after each.

A later call continues the stream of vision tokens and the rotary positions. What it needs is kept *in* the cache, as
one more layer: reordered, selected, repeated, cropped, copied or pickled rows bring it along, two caches of one model
share nothing, and the model keeps no state.
"""

import torch
from transformers.cache_utils import CacheLayerMixin, DynamicLayer


class CacheRecord(DynamicLayer):
    """A layer of a cache without keys and values of its own.

    `keys`, bool [batch, 1, tokens, 1], is True for vision tokens. `values`, int64 of the same shape, is the rotary
    position that a token next in line would get. Compiled decoding steps add nothing: `fit` makes up for them.
    """

    # A static cache stays one that can be compiled, and is not prepared for heads that are not there.
    is_compileable = True
    supports_early_init = False

    def __init__(self, first: CacheLayerMixin):
        super().__init__()
        self.first = first  # layer of the same cache, which knows how many tokens it holds

    @staticmethod
    def find(cache) -> "CacheRecord | None":
        """The record of a cache, if it has one."""
        layers = getattr(cache, "layers", ())
        # By name, since a second copy of this file may have made it.
        return next((layer for layer in reversed(layers) if type(layer).__name__ == CacheRecord.__name__), None)

    @classmethod
    def of(cls, cache) -> "CacheRecord":
        """The record of a cache that a forward call has written; made if there is none."""
        record = cls.find(cache)
        if record is None:
            record = cls(cache.layers[0])
            cache.layers.append(record)
        return record

    def append(self, past: int, vision: torch.Tensor, following: torch.Tensor) -> None:
        """Add the tokens after the first `past`: vision bool and following int64, both [batch, new tokens]."""
        self.fit(past, following)
        following = torch.maximum(following, self.values[:, 0, -1]) if past else following
        self._set(
            torch.cat([self.keys, vision[:, None, :, None]], 2),
            torch.cat([self.values, following[:, None, :, None]], 2),
        )

    def fit(self, length: int, like: torch.Tensor | None = None) -> None:
        """Cut to the first `length` tokens, or go on to so many: what came in between was text in sequence.

        Args:
            length: tokens.
            like: int64 [batch, ...], for a record of no tokens yet.
        """
        have = self.get_seq_length()
        if have == 0:
            if like is None:
                return
            self._set(like.new_zeros(len(like), 1, 0, 1, dtype=torch.bool), like.new_zeros(len(like), 1, 0, 1))
        if have >= length:
            self._set(self.keys[:, :, :length], self.values[:, :, :length])
            return
        last = self.values[:, :, -1:] if have else self.values.new_zeros(len(self.values), 1, 1, 1)
        more = last + torch.arange(1, length - have + 1, device=last.device)[:, None]
        self._set(
            torch.cat([self.keys, torch.zeros_like(more, dtype=torch.bool)], 2), torch.cat([self.values, more], 2)
        )

    def _set(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        self.keys, self.values = keys, values
        self.device = keys.device
        self.is_initialized = True

    # Each of these runs after the same call of the layers before this one.

    def crop(self, tokens_to_remove: int) -> None:
        self.fit(int(self.first.get_seq_length()))

    def reset(self) -> None:
        self.keys = self.values = None
        self.is_initialized = False

    def prefetch(self) -> None:
        """An offloaded cache fetches the next layer in time; after the last one comes the first."""
        self.first.prefetch()

    def offload(self) -> None:
        """A few bytes per token stay where they are."""


def cached_vision(cache, past: int, like: torch.Tensor) -> torch.Tensor:
    """bool [batch, past], which of the `past` cached tokens are vision; `like` [batch, ...] of the new ones."""
    record = CacheRecord.find(cache) if past else None
    if record is None or record.get_seq_length() == 0:
        return like.new_zeros(len(like), past, dtype=torch.bool)
    record.fit(past)
    return record.keys[:, 0, :, 0].to(like.device)


def position_after(cache, past: int) -> torch.Tensor | None:
    """int64 [batch], the rotary position of a token after the `past` cached ones; None if the cache has no record."""
    record = CacheRecord.find(cache) if past else None
    if record is None or record.get_seq_length() == 0:
        return None
    record.fit(past)
    return record.values[:, 0, -1, 0]


def following_positions(position_ids: torch.Tensor, valid: torch.Tensor | None) -> torch.Tensor:
    """What `CacheRecord.append` takes, int64 [batch, new tokens].

    Args:
        position_ids: int64 [3 or 4, batch, new tokens] or [batch, new tokens] of the new tokens; of four, the first is
            the position in the text.
        valid: bool [batch, new tokens], False for padding.
    """
    positions = position_ids if position_ids.ndim == 2 else position_ids[-3:].amax(0)
    if valid is not None:
        positions = positions.masked_fill(~valid.to(positions.device), -1)
    return positions.cummax(1).values + 1

"""Which documents share a context: best fit, and splitting those that are longer than a context."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from dualtoken.sequence import SpecialTokens, TokenizedDocument


@dataclass
class OpenBins:
    """Bins filled by best fit as items come: each goes where it leaves the least room.

    At most `limit` bins are open; where an item fits none, the fullest is closed and a new one opened. A full
    bin is closed at once. What is closed is put on `closed`, for the caller to take.
    """

    capacity: int
    limit: int = 32
    bins: list[list[int]] = field(default_factory=list)
    """Items of each open bin, oldest bin first."""
    rooms: list[int] = field(default_factory=list)
    """Room left in each open bin."""
    closed: list[list[int]] = field(default_factory=list)

    def __post_init__(self) -> None:
        if self.capacity < 1 or self.limit < 1:
            raise ValueError(f"capacity is {self.capacity} and limit {self.limit}, expected both at least 1")

    def add(self, item: int, length: int) -> None:
        """Place an item; ValueError if it is empty or longer than a bin."""
        if not 0 < length <= self.capacity:
            raise ValueError(f"item {item} has length {length}, expected 1 to the capacity {self.capacity}")
        fitting = [index for index, room in enumerate(self.rooms) if room >= length]
        if fitting:
            best = min(fitting, key=self.rooms.__getitem__)
        else:
            if len(self.bins) == self.limit:
                self._close(min(range(len(self.bins)), key=self.rooms.__getitem__))
            self.bins.append([])
            self.rooms.append(self.capacity)
            best = len(self.bins) - 1
        self.bins[best].append(item)
        self.rooms[best] -= length
        if self.rooms[best] == 0:
            self._close(best)

    def flush(self) -> None:
        """Close all bins."""
        while self.bins:
            self._close(0)

    def _close(self, index: int) -> None:
        self.closed.append(self.bins.pop(index))
        del self.rooms[index]


def best_fit(lengths: Sequence[int], capacity: int, open_bins: int = 32) -> list[list[int]]:
    """Divide items into bins by online best fit.

    Args:
        lengths: Length of each item, 1 to `capacity`.
        capacity: What a bin holds.
        open_bins: How many bins may be open at a time.

    Returns:
        Indices of the items of each bin, in the order in which the bins were closed.

    Raises:
        ValueError: An item is empty or longer than a bin.
    """
    bins = OpenBins(capacity, open_bins)
    for index, length in enumerate(lengths):
        bins.add(index, length)
    bins.flush()
    return bins.closed


def split_document(
    document: TokenizedDocument, capacity: int, special: SpecialTokens
) -> tuple[list[TokenizedDocument], int]:
    """Split a document that is longer than a context, between tokens but never inside an image.

    Each piece opens with `<|endoftext|>` and takes as much as fits; only the last is closed. An image that
    does not fit a context by itself is left out and counted. Labels and codes stay with their tokens.

    Args:
        document: The whole document.
        capacity: Tokens that a piece may have, at least 2.
        special: Ids of the special tokens.

    Returns:
        The pieces, in order, and the number of images left out.

    Raises:
        ValueError: `capacity` is below 2.
    """
    if capacity < 2:
        raise ValueError(f"capacity is {capacity}, expected at least 2: a piece needs its opening token")
    if len(document) <= capacity:
        return [document], 0
    is_visual = document.input_ids == special.image_pad
    pieces: list[TokenizedDocument] = []
    left_out, begin = 0, 1

    def cut(end: int) -> None:
        # A piece of the closing token alone would teach to write nothing.
        if end > begin and not (end == begin + 1 == len(document) and pieces):
            pieces.append(_slice(document, begin, end, is_visual, f"{document.key}#{len(pieces)}"))

    for start, end in _indivisible(is_visual):
        if end - start > capacity - 1:
            cut(start)
            left_out, begin = left_out + 1, end
        elif end - begin > capacity - 1:
            cut(start)
            begin = start
    cut(len(document))
    return pieces, left_out


def _indivisible(is_visual: torch.Tensor) -> list[tuple[int, int]]:
    """Return the ranges that must stay whole, in order: single tokens, and images with their marks."""
    ranges: list[tuple[int, int]] = []
    index, visual = 1, is_visual.tolist()
    while index < len(visual):
        end = index + 1
        if end < len(visual) and visual[end]:
            while visual[end]:
                end += 1
            end += 1
        ranges.append((index, end))
        index = end
    return ranges


def _slice(
    document: TokenizedDocument, start: int, end: int, is_visual: torch.Tensor, key: str
) -> TokenizedDocument:
    """Return the opening token and the tokens from `start` to `end`, with the codes of their images."""
    first = int(is_visual[:start].sum())
    visual = slice(first, first + int(is_visual[start:end].sum()))
    return TokenizedDocument(
        input_ids=torch.cat([document.input_ids[:1], document.input_ids[start:end]]),
        codes=document.codes[visual],
        labels=torch.cat([document.labels[:1], document.labels[start:end]]),
        visual_loss_mask=document.visual_loss_mask[visual],
        key=key,
    )

"""Which documents share a context: those that fill it best; and splitting those that are longer."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch

from dualtoken.unified_model.sequence import SpecialTokens, TokenizedDocument, features_in_order


def fullest_pack(lengths: Sequence[int], capacity: int) -> list[int]:
    """Choose the first item and those others that leave the least room, exactly (subset sum).

    Args:
        lengths: Length of each item, 1 to `capacity`.
        capacity: What a pack holds.

    Returns:
        Indices of the chosen items in their order; among equally full packs, the one of earlier items.

    Raises:
        ValueError: An item is empty or longer than a pack.
    """
    if not 0 < min(lengths) <= max(lengths) <= capacity:
        item, length = next((i, n) for i, n in enumerate(lengths) if not 0 < n <= capacity)
        raise ValueError(f"item {item} has length {length}, expected 1 to the capacity {capacity}")
    within = (1 << capacity + 1) - 1
    some = 1 << lengths[0]  # bit n: some of the items so far, the first among them, have the length n
    sums = [some]
    for length in lengths[1:]:
        if some.bit_length() > capacity:  # full: later items cannot do better
            break
        some |= some << length & within
        sums.append(some)
    total = 1 << some.bit_length() - 1
    chosen = []
    for item in range(len(sums) - 1, 0, -1):
        if not sums[item - 1] & total:  # cannot be had without this one
            chosen.append(item)
            total >>= lengths[item]
    return [0, *reversed(chosen)]


class Waiting:
    """The lengths of items that wait for a pack, as they came; the items themselves are kept by the caller.

    Args:
        capacity: What a pack holds.
        contexts_held: As many packs' worth of items are waited for, to choose from.
        lengths: Of items that wait already.
    """

    def __init__(self, capacity: int, contexts_held: int, lengths: Iterable[int] = ()) -> None:
        self.capacity = capacity
        self.enough = contexts_held * capacity
        self.lengths = list(lengths)
        self.total = sum(self.lengths)

    def add(self, length: int) -> None:
        """Let one more item wait."""
        self.lengths.append(length)
        self.total += length

    @property
    def are_enough(self) -> bool:
        """Whether there are enough to make a pack."""
        return self.total >= self.enough

    def take(self) -> list[int]:
        """Choose the fullest pack with the oldest item: the places of its items among those that waited."""
        places = fullest_pack(self.lengths, self.capacity)
        self.total -= sum(take_out(self.lengths, places))
        return places


class InOrder:
    """As `Waiting`, for packs of so many items each, in the order they come.

    Args:
        count: Items in a pack; the last one of a pass may have fewer.
        lengths: Of items that wait already.
    """

    def __init__(self, count: int, lengths: Iterable[int] = ()) -> None:
        self.count = count
        self.lengths = list(lengths)

    def add(self, length: int) -> None:
        """Let one more item wait."""
        self.lengths.append(length)

    @property
    def are_enough(self) -> bool:
        """Whether there are enough to make a pack."""
        return len(self.lengths) >= self.count

    def take(self) -> list[int]:
        """The places of the oldest ones among those that waited."""
        places = list(range(min(self.count, len(self.lengths))))
        take_out(self.lengths, places)
        return places


def take_out(items: list[Any], places: Sequence[int]) -> list[Any]:
    """Pop the items at ascending places, in their order."""
    return [items.pop(place) for place in reversed(places)][::-1]


def pack_lengths(lengths: Sequence[int], capacity: int, contexts_held: int = 8) -> list[list[int]]:
    """Divide items into packs as they come: the fullest pack with the oldest item, of those held.

    Args:
        lengths: Length of each item, 1 to `capacity`.
        capacity: What a pack holds.
        contexts_held: As many packs' worth of items are held to choose from.

    Returns:
        Indices of the items of each pack.

    Raises:
        ValueError: An item is empty or longer than a pack.
    """
    packs: list[list[int]] = []
    held: list[int] = []
    waiting = Waiting(capacity, contexts_held)
    for item, length in enumerate(lengths):
        held.append(item)
        waiting.add(length)
        if waiting.are_enough:
            packs.append(take_out(held, waiting.take()))
    while held:
        packs.append(take_out(held, waiting.take()))
    return packs


def split_document(
    document: TokenizedDocument, capacity: int, special: SpecialTokens
) -> tuple[list[TokenizedDocument], int]:
    """Split a document that is longer than a context, between tokens but never inside an image.

    Each piece opens with the document's first token and takes as much as fits; only the last is closed. An
    image that does not fit a context by itself is left out and counted. Labels, codes and features stay with
    their tokens.

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
    inside = torch.tensor([special.image_pad, special.image_sep, special.image_feature])
    is_inside = torch.isin(document.input_ids, inside)
    pieces: list[TokenizedDocument] = []
    left_out, begin = 0, 1

    def cut(end: int) -> None:
        # A piece of the closing token alone would teach to write nothing.
        if end > begin and not (end == begin + 1 == len(document) and pieces):
            pieces.append(_slice(document, begin, end, special, f"{document.key}#{len(pieces)}"))

    for start, end in _indivisible(is_inside):
        if end - start > capacity - 1:
            cut(start)
            left_out, begin = left_out + 1, end
        elif end - begin > capacity - 1:
            cut(start)
            begin = start
    cut(len(document))
    return pieces, left_out


def _indivisible(is_inside: torch.Tensor) -> list[tuple[int, int]]:
    """Return the ranges that must stay whole, in order: single tokens, and images with their marks."""
    ranges: list[tuple[int, int]] = []
    index, inside = 1, is_inside.tolist()
    while index < len(inside):
        end = index + 1
        if end < len(inside) and inside[end]:
            while inside[end]:
                end += 1
            end += 1
        ranges.append((index, end))
        index = end
    return ranges


def _slice(
    document: TokenizedDocument, start: int, end: int, special: SpecialTokens, key: str
) -> TokenizedDocument:
    """Return the opening token and those from `start` to `end`, with their images' codes and features."""
    visual = _within(document.input_ids == special.image_pad, start, end)
    features, order = document.features, document.feature_order
    places = document.input_ids == special.image_feature
    if features is not None and order is not None:
        features, order = features_in_order(features, order[_within(places, start, end)])
    elif features is not None:
        images = _within(places, start, end, int(places.sum()) // len(features))
        features = features[images] if images.start < images.stop else None
    return TokenizedDocument(
        input_ids=torch.cat([document.input_ids[:1], document.input_ids[start:end]]),
        codes=document.codes[visual],
        labels=torch.cat([document.labels[:1], document.labels[start:end]]),
        visual_loss_mask=document.visual_loss_mask[visual],
        key=key,
        features=features,
        feature_order=order,
    )


def _within(places: torch.Tensor, start: int, end: int, at_a_time: int = 1) -> slice:
    """Which of the items lie from `start` to `end`, of which each takes so many of the true `places` [T]."""
    first = int(places[:start].sum()) // at_a_time
    return slice(first, first + int(places[start:end].sum()) // at_a_time)

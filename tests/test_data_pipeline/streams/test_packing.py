"""Packing loses nothing, overlaps nothing, exceeds nothing; splitting never cuts an image."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipeline.streams.packing import fullest_pack, pack_lengths, split_document
from dualtoken.unified_model.sequence import IGNORE_INDEX, SpecialTokens, TokenizedDocument

SPECIAL = SpecialTokens(1, 2, 3, 4, 5, 6)


@settings(max_examples=80, deadline=None)
@given(st.lists(st.integers(1, 50), max_size=200), st.integers(50, 80), st.integers(1, 9))
def test_each_item_is_in_one_pack_that_holds_it(lengths: list[int], capacity: int, held: int) -> None:
    packs = pack_lengths(lengths, capacity, held)
    assert sorted(index for items in packs for index in items) == list(range(len(lengths)))
    assert all(0 < sum(lengths[index] for index in items) <= capacity for items in packs)
    assert all(items == sorted(items) for items in packs)
    oldest = [min(index for items in packs[start:] for index in items) for start in range(len(packs))]
    assert [items[0] for items in packs] == oldest  # nobody waits forever


@settings(max_examples=80, deadline=None)
@given(st.lists(st.integers(1, 30), min_size=1, max_size=9), st.integers(30, 60))
def test_no_pack_could_be_fuller(lengths: list[int], capacity: int) -> None:
    others = range(1, len(lengths))
    sums = [
        lengths[0] + sum(lengths[index] for index in chosen)
        for count in range(len(lengths))
        for chosen in itertools.combinations(others, count)
    ]
    chosen = fullest_pack(lengths, capacity)
    assert chosen[0] == 0 and len(set(chosen)) == len(chosen)
    assert sum(lengths[index] for index in chosen) == max(total for total in sums if total <= capacity)


def test_items_that_fit_no_pack_are_refused() -> None:
    with pytest.raises(ValueError, match="length 11, expected 1 to the capacity 10"):
        pack_lengths([3, 11], 10)
    with pytest.raises(ValueError, match="length 0"):
        pack_lengths([0], 10)


def test_share_of_a_context_that_is_used() -> None:
    """The mix of arXiv 2503.14324's joint phase in rough: pairs, interleaved documents, text, at 4096."""
    rng = np.random.default_rng(0)
    kinds = rng.random(6000)
    pairs = 740 + rng.integers(10, 60, kinds.size)
    interleaved = rng.integers(1, 5, kinds.size) * 731 + rng.integers(50, 600, kinds.size)
    text = np.clip(rng.lognormal(6, 1, kinds.size), 20, 4000).astype(int)
    lengths = np.where(kinds < 0.5, pairs, np.where(kinds < 0.75, interleaved, text)).tolist()
    packs = pack_lengths(lengths, 4096)
    assert sum(lengths) / (4096 * len(packs)) > 0.98
    assert len(pack_lengths(lengths, 4096, contexts_held=1)) > 1.05 * len(packs)
    longest = sum(8 * max(lengths[start : start + 8]) for start in range(0, len(lengths), 8))
    assert longest > 2.3 * 4096 * len(packs)


def document(pieces: list[int]) -> TokenizedDocument:
    """Text (a piece above 0 is so many tokens) and images (a piece below 0 is so many positions)."""
    ids, labels, codes, mask = [1], [IGNORE_INDEX], [], []
    for number, piece in enumerate(pieces):
        if piece > 0:
            tokens = [100 + (number * 17 + index) % 50 for index in range(piece)]
            ids += tokens
            labels += tokens
        else:
            generate = number % 2 == 0
            ids += [5 if generate else 2] + [4] * -piece + [6 if generate else 3]
            labels += [5 if generate else IGNORE_INDEX] + [IGNORE_INDEX] * (1 - piece)
            codes += [[[number * 100 + index] * 2] * 2 for index in range(-piece)]
            mask += [generate] * -piece
    return TokenizedDocument(
        torch.tensor(ids + [1]),
        torch.tensor(codes, dtype=torch.int64).reshape(-1, 2, 2),
        torch.tensor(labels + [1]),
        torch.tensor(mask, dtype=torch.bool),
        key="k",
    )


@settings(max_examples=80, deadline=None)
@given(st.lists(st.integers(1, 30) | st.integers(-9, -1), min_size=1, max_size=8), st.integers(2, 25))
def test_split_keeps_everything_and_cuts_no_image(pieces: list[int], capacity: int) -> None:
    whole = document(pieces)
    parts, left_out = split_document(whole, capacity, SPECIAL)
    assert left_out == sum(
        2 - piece > capacity - 1 for piece in pieces if piece < 0 and len(whole) > capacity
    )
    assert all(1 < len(part) <= capacity for part in parts) or len(whole) <= capacity
    assert all(part.input_ids[0] == 1 and part.labels[0] == IGNORE_INDEX for part in parts)
    kept = document([p for p in pieces if p > 0 or len(whole) <= capacity or 2 - p <= capacity - 1])
    if not left_out:  # leaving one out changes the numbering of `document`
        kept = whole
    rest = torch.cat([part.input_ids[1:] for part in parts])
    labels = torch.cat([part.labels[1:] for part in parts])
    if len(rest) == len(kept) - 2:  # the closing token did not fit any more and stood alone
        rest, labels = torch.cat([rest, torch.tensor([1])]), torch.cat([labels, torch.tensor([1])])
    assert len(rest) == len(kept) - 1
    if not left_out:
        assert rest.tolist() == whole.input_ids[1:].tolist()
        assert labels.tolist() == whole.labels[1:].tolist()
        assert torch.cat([part.codes for part in parts]).tolist() == whole.codes.tolist()
        assert (
            torch.cat([part.visual_loss_mask for part in parts]).tolist() == whole.visual_loss_mask.tolist()
        )
    for part in parts:
        ids = part.input_ids.tolist()
        assert ids.count(4) == len(part.codes) == len(part.visual_loss_mask)
        assert ids.count(2) == ids.count(3) and ids.count(5) == ids.count(6)
        starts = [code for code in part.codes[:, 0, 0].tolist() if code % 100 == 0]
        assert len(starts) == ids.count(2) + ids.count(5)


def test_split_names_its_pieces_and_counts_images_that_fit_nowhere() -> None:
    parts, left_out = split_document(document([5, -9, 5]), 9, SPECIAL)
    assert [part.key for part in parts] == ["k#0", "k#1"]
    assert (left_out, [len(part) for part in parts]) == (1, [6, 7])
    assert split_document(document([3]), 9, SPECIAL)[0][0].key == "k"

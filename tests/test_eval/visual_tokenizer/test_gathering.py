"""Parts of ranks become what one rank would have found, once, for the last of them."""

import numpy as np

from eval.visual_tokenizer.batches import Share
from eval.visual_tokenizer.gathering import Part, gather


def part(*numbers):
    rows = {"psnr": [np.array([10.0 * number for number in numbers])]} if numbers else {"psnr": []}
    return Part.of_batches(numbers, rows, {"codes": np.array([len(numbers), 1])})


def test_the_last_rank_gets_everything_in_order(tmp_path):
    assert gather(tmp_path, Share(2, 3), {"a": 1}, part(), 5) is None
    assert gather(tmp_path, Share(0, 3), {"a": 1}, part(0, 1, 4), 5) is None
    whole = gather(tmp_path, Share(1, 3), {"a": 1}, part(2, 3), 5)
    assert whole.numbers.tolist() == [0, 1, 2, 3, 4]
    assert whole.rows["psnr"].tolist() == [0, 10, 20, 30, 40]
    assert whole.sums["codes"].tolist() == [5, 3]
    assert list(tmp_path.iterdir()) == []  # nothing is left for another run to trip over


def test_parts_of_other_settings_are_not_mixed_in(tmp_path):
    assert gather(tmp_path, Share(0, 2), {"a": 1}, part(0), 2) is None
    assert gather(tmp_path, Share(1, 2), {"a": 2}, part(1), 2) is None
    assert gather(tmp_path, Share(1, 2), {"a": 1}, part(1), 2).rows["psnr"].tolist() == [0, 10]


def test_one_rank_needs_no_files(tmp_path):
    assert gather(tmp_path, Share(), {}, part(1, 0), 2).rows["psnr"].tolist() == [0, 10]
    assert list(tmp_path.iterdir()) == []

"""The measures against values that public implementations gave, and against cases worked by hand."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch

from eval.metrics.codebooks import codebook_statistics
from eval.metrics.images import psnr, ssim, to_unit_range
from eval.metrics.recall import recall_at_1

DATA = Path(__file__).parents[1] / "data" / "eval_metrics"

# pyiqa 0.1.16 psnr (RGB), pytorch_msssim 1.0.0 ssim (data_range 1, valid padding) on image_pairs.npz.
PYIQA_PSNR = [80.0, 41.651993, 30.168695, 22.318270, 16.770231, 4.900409]
MSSSIM_SSIM = [1.0, 0.9938433, 0.9008768, 0.5807402, 0.2521338, -0.4146410]


@pytest.fixture(scope="module")
def pairs():
    arrays = np.load(DATA / "image_pairs.npz")
    first, second = (torch.from_numpy(arrays[name]).permute(0, 3, 1, 2) / 255 for name in ("gt", "rec"))
    return first, second


def test_psnr_equals_pyiqa(pairs):
    torch.testing.assert_close(
        psnr(pairs[1], pairs[0]), torch.tensor(PYIQA_PSNR).double(), rtol=1e-6, atol=2e-5
    )


def test_ssim_equals_pytorch_msssim(pairs):
    torch.testing.assert_close(
        ssim(pairs[1], pairs[0]), torch.tensor(MSSSIM_SSIM).double(), rtol=0, atol=5e-6
    )


def test_psnr_by_hand():
    black = torch.zeros(2, 3, 16, 16)
    grey = torch.full_like(black, 0.1)
    torch.testing.assert_close(psnr(grey, black), torch.tensor([20.0, 20.0]).double(), atol=1e-4, rtol=0)


def test_pairs_must_agree():
    with pytest.raises(ValueError, match=r"expected two equal shapes \[B, C, H, W\]"):
        psnr(torch.zeros(1, 3, 16, 16), torch.zeros(1, 3, 16, 8))
    with pytest.raises(ValueError, match="SSIM needs at least 11"):
        ssim(torch.zeros(1, 3, 10, 16), torch.zeros(1, 3, 10, 16))


def test_unit_range_clamps():
    values = torch.tensor([-3.0, -1.0, 0.0, 1.0, 2.0], dtype=torch.bfloat16)
    assert to_unit_range(values).tolist() == [0.0, 0.0, 0.5, 1.0, 1.0]


def test_codebook_statistics_equal_the_reference():
    codes = torch.from_numpy(np.load(DATA / "codes.npz")["codes"])
    found = codebook_statistics(codes, 16384)
    assert found.used == 330
    assert found.usage == 330 / 16384
    assert found.kl_to_uniform_nats == pytest.approx(5.60535192489624, abs=1e-5)
    assert found.entropy_bits == pytest.approx(5.9131879806518555, abs=1e-5)
    assert found.entropy_share == pytest.approx(0.4223705700465611, abs=1e-6)
    # The reference adds a small constant to every share before the logarithm.
    assert found.per_image_entropy_bits == pytest.approx(4.4049777403106125, abs=1e-4)
    assert found.perplexity == pytest.approx(2**5.9131879806518555, abs=1e-3)


def test_codebook_statistics_by_hand():
    even = codebook_statistics(torch.arange(8).view(2, 4), 8)
    assert (even.used, even.entropy_share, even.perplexity) == (8, 1.0, 8.0)
    assert even.kl_to_uniform_nats == pytest.approx(0)
    assert even.per_image_entropy_bits == 2.0
    single = codebook_statistics(torch.full((3, 5), 2), 8)
    assert (single.used, single.entropy_bits, single.perplexity) == (1, 0.0, 1.0)
    assert single.kl_to_uniform_nats == pytest.approx(math.log(8))


def test_codes_outside_the_codebook_are_refused():
    with pytest.raises(ValueError, match="codes from 0 to 8; expected 0 to 7"):
        codebook_statistics(torch.tensor([[0, 8]]), 8)
    with pytest.raises(ValueError, match="no codes"):
        codebook_statistics(torch.empty(0, 4, dtype=torch.long), 8)


def test_recall_counts_every_bearer_of_the_label():
    candidates = torch.eye(4)
    queries = torch.tensor([[9.0, 1, 0, 0], [1, 9, 0, 0], [0, 0, 1, 9], [0, 9, 1, 0]])
    result = recall_at_1(queries, candidates, ["a", "a", "b", "c"], ["a", "a", "c", "b"])
    assert result.recall == 0.75  # the last one finds an "a"
    assert result.chance == (2 + 2 + 1 + 1) / 16
    assert (result.queries, result.candidates) == (4, 4)


def test_recall_ignores_length():
    queries = torch.tensor([[1.0, 0.2]])
    candidates = torch.tensor([[1.0, 0.0], [50.0, 50.0]])
    assert recall_at_1(queries, candidates, [0], [0, 1]).recall == 1.0


def test_recall_refuses_what_cannot_be_found():
    with pytest.raises(ValueError, match="1 of 1 queries without a candidate"):
        recall_at_1(torch.ones(1, 2), torch.ones(1, 2), ["a"], ["b"])
    with pytest.raises(ValueError, match="expected one label each"):
        recall_at_1(torch.ones(2, 2), torch.ones(1, 2), ["a"], ["a"])

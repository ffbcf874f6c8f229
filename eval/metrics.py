"""Measures as pure functions of tensors: PSNR, SSIM, codebook statistics, retrieval."""

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

PSNR_EPSILON = 1e-8  # identical pictures give 80 dB
SSIM_WINDOW = 11
SSIM_SIGMA = 1.5
SSIM_K1, SSIM_K2 = 0.01, 0.03


def to_unit_range(images: Tensor) -> Tensor:
    """Map pictures in about [-1, 1] to [0, 1], clamped, fp32."""
    return ((images.float() + 1) / 2).clamp(0, 1)


def _check_pair(images: Tensor, references: Tensor) -> None:
    if images.shape != references.shape or images.ndim != 4:
        raise ValueError(
            f"got pictures of shape {tuple(images.shape)} and references of shape {tuple(references.shape)}; "
            "expected two equal shapes [B, C, H, W]"
        )


def psnr(images: Tensor, references: Tensor) -> Tensor:
    """Peak signal-to-noise ratio of each picture, in dB: 10 log10(1 / (mse + 1e-8)).

    Args:
        images: [B, C, H, W] in [0, 1].
        references: the same shape and range.

    Returns:
        [B], float64.

    Raises:
        ValueError: the shapes differ.
    """
    _check_pair(images, references)
    error = (images.double() - references.double()).square().mean(dim=(1, 2, 3))  # [B]
    return 10 * torch.log10(1 / (error + PSNR_EPSILON))


def ssim(images: Tensor, references: Tensor) -> Tensor:
    """Structural similarity of each picture, mean over channels and valid positions.

    An 11 x 11 Gaussian window (sigma 1.5) without padding, K1 = 0.01, K2 = 0.03, population
    covariances (Wang et al. 2004). Negative values stay negative.

    Args:
        images: [B, C, H, W] in [0, 1], H and W at least 11.
        references: the same shape and range.

    Returns:
        [B], float64.

    Raises:
        ValueError: the shapes differ, or a side is shorter than the window.
    """
    _check_pair(images, references)
    if min(images.shape[-2:]) < SSIM_WINDOW:
        raise ValueError(
            f"got pictures of {tuple(images.shape[-2:])} pixels; SSIM needs at least {SSIM_WINDOW} each way"
        )
    x, y = images.double(), references.double()
    offsets = torch.arange(SSIM_WINDOW, dtype=torch.float64) - SSIM_WINDOW // 2
    window = torch.exp(-(offsets**2) / (2 * SSIM_SIGMA**2))
    weights = (window / window.sum()).tolist()

    def slide(values: Tensor, dim: int) -> Tensor:
        length = values.shape[dim] - SSIM_WINDOW + 1
        return sum(weight * values.narrow(dim, i, length) for i, weight in enumerate(weights))

    def blur(values: Tensor) -> Tensor:  # faster than a grouped convolution in fp64
        return slide(slide(values, 3), 2)

    mean_x, mean_y = blur(x), blur(y)
    variance_x = blur(x * x) - mean_x**2
    variance_y = blur(y * y) - mean_y**2
    covariance = blur(x * y) - mean_x * mean_y
    c1, c2 = SSIM_K1**2, SSIM_K2**2
    structure = (2 * covariance + c2) / (variance_x + variance_y + c2)
    luminance = (2 * mean_x * mean_y + c1) / (mean_x**2 + mean_y**2 + c1)
    return (luminance * structure).mean(dim=(1, 2, 3))


@dataclass(frozen=True)
class CodebookStatistics:
    """How a set of codes spreads over its codebook."""

    codebook_size: int
    used: int  # codes that occur at all
    usage: float  # used / codebook_size
    entropy_bits: float
    entropy_share: float  # of log2(codebook_size)
    perplexity: float  # 2 ** entropy_bits: as many codes, evenly used, would have this entropy
    kl_to_uniform_nats: float
    per_image_entropy_bits: float  # mean over pictures of the entropy within one picture


def codebook_statistics(codes: Tensor, codebook_size: int) -> CodebookStatistics:
    """Statistics of codes against the uniform use of the codebook.

    Args:
        codes: [N, ...] integers; the first axis counts pictures.
        codebook_size: K.

    Raises:
        ValueError: no codes, or a code outside 0 .. K - 1.
    """
    if codes.numel() == 0:
        raise ValueError("got no codes; at least one picture is needed")
    flat = codes.reshape(codes.shape[0], -1).long()
    low, high = int(flat.min()), int(flat.max())
    if low < 0 or high >= codebook_size:
        raise ValueError(
            f"got codes from {low} to {high}; expected 0 to {codebook_size - 1}, the size of the codebook"
        )
    counts = torch.bincount(flat.flatten(), minlength=codebook_size)
    entropy = _entropy_bits(counts)
    limit = math.log2(codebook_size)
    per_image = [_entropy_bits(torch.bincount(row)) for row in flat]
    used = int((counts > 0).sum())
    return CodebookStatistics(
        codebook_size=codebook_size,
        used=used,
        usage=used / codebook_size,
        entropy_bits=entropy,
        entropy_share=entropy / limit,
        perplexity=2**entropy,
        kl_to_uniform_nats=(limit - entropy) * math.log(2),
        per_image_entropy_bits=sum(per_image) / len(per_image),
    )


def _entropy_bits(counts: Tensor) -> float:
    shares = counts[counts > 0].double()
    shares = shares / shares.sum()
    return abs(float((shares * shares.log2()).sum()))  # abs: a single used code gives -0.0


@dataclass(frozen=True)
class Recall:
    """Recall at 1 and what guessing would give."""

    recall: float
    chance: float
    queries: int
    candidates: int


def recall_at_1(
    queries: Tensor,
    candidates: Tensor,
    query_labels: Sequence[Hashable],
    candidate_labels: Sequence[Hashable],
) -> Recall:
    """Share of queries whose nearest candidate by cosine similarity bears the query's label.

    Args:
        queries: [N, C] features, normalised here.
        candidates: [M, C] features.
        query_labels: N labels; several candidates may bear one label, each counts as a hit.
        candidate_labels: M labels.

    Raises:
        ValueError: labels and features differ in number, or a label has no candidate.
    """
    if len(queries) != len(query_labels) or len(candidates) != len(candidate_labels):
        raise ValueError(
            f"got {len(queries)} queries with {len(query_labels)} labels and {len(candidates)} candidates "
            f"with {len(candidate_labels)} labels; expected one label each"
        )
    missing = set(query_labels) - set(candidate_labels)
    if missing or not len(queries):
        raise ValueError(f"got {len(missing)} of {len(queries)} queries without a candidate to find")
    ids = {label: index for index, label in enumerate(dict.fromkeys([*query_labels, *candidate_labels]))}
    wanted = torch.tensor([ids[label] for label in query_labels])
    offered = torch.tensor([ids[label] for label in candidate_labels])
    similarity = F.normalize(queries.double(), dim=-1) @ F.normalize(candidates.double(), dim=-1).T  # [N, M]
    hits = offered[similarity.argmax(dim=1).cpu()] == wanted
    matches = (wanted[:, None] == offered[None]).double()  # [N, M]
    return Recall(
        recall=float(hits.double().mean()),
        chance=float(matches.mean()),
        queries=len(queries),
        candidates=len(candidates),
    )

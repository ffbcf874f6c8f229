"""How a set of codes spreads over its codebook."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor


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
    counts = count_codes(codes, codebook_size)
    entropies = image_entropies(codes)
    return statistics_of_counts(counts, math.fsum(entropies) / len(entropies))


def count_codes(codes: Tensor, codebook_size: int) -> Tensor:
    """How often each code occurs, [K] int64; counts of several sets of codes can be added.

    Raises:
        ValueError: no codes, or a code outside 0 .. K - 1.
    """
    if codes.numel() == 0:
        raise ValueError("got no codes; at least one picture is needed")
    low, high = int(codes.min()), int(codes.max())
    if low < 0 or high >= codebook_size:
        raise ValueError(
            f"got codes from {low} to {high}; expected 0 to {codebook_size - 1}, the size of the codebook"
        )
    return torch.bincount(codes.long().flatten(), minlength=codebook_size)


def image_entropies(codes: Tensor) -> list[float]:
    """The entropy of the codes within each of N pictures, in bits; codes [N, ...]."""
    return [_entropy_bits(torch.bincount(row)) for row in codes.flatten(1).long()]


def statistics_of_counts(counts: Tensor, per_image_entropy_bits: float) -> CodebookStatistics:
    """Statistics of the counts [K] of all pictures and the mean of their entropies."""
    size, entropy = len(counts), _entropy_bits(counts)
    limit = math.log2(size)
    used = int((counts > 0).sum())
    return CodebookStatistics(
        codebook_size=size,
        used=used,
        usage=used / size,
        entropy_bits=entropy,
        entropy_share=entropy / limit,
        perplexity=2**entropy,
        kl_to_uniform_nats=(limit - entropy) * math.log(2),
        per_image_entropy_bits=per_image_entropy_bits,
    )


def _entropy_bits(counts: Tensor) -> float:
    shares = counts[counts > 0].double()
    shares = shares / shares.sum()
    return abs(float((shares * shares.log2()).sum()))  # abs: a single used code gives -0.0

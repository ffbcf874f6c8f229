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

"""How a tokenizer's codes use its codebooks, for each codebook and depth, from counts that add up."""

from dataclasses import asdict

import numpy as np
import torch
from torch import Tensor

from eval.metrics.codebooks import count_codes, image_entropies, statistics_of_counts

CODEBOOKS = ("pixel", "semantic")


def count_by_depth(codes: Tensor, codebook_size: int) -> np.ndarray:
    """How often each code occurs: [Q, D, K] int64 of codes [N, P, Q, D]."""
    _, _, books, depths = codes.shape
    counts = [[count_codes(codes[:, :, q, d], codebook_size) for d in range(depths)] for q in range(books)]
    return torch.stack([torch.stack(row) for row in counts]).numpy()


def entropies_by_depth(codes: Tensor) -> np.ndarray:
    """Entropy within each picture, bits: [N, Q, D + 1] of codes [N, P, Q, D]; the last over all depths."""
    _, _, books, depths = codes.shape
    parts = [codes[:, :, q, d] for q in range(books) for d in (*range(depths), slice(None))]
    found = np.array([image_entropies(part) for part in parts])  # [Q (D + 1), N]
    return found.T.reshape(len(codes), books, depths + 1)


def table_of_counts(counts: np.ndarray, entropies: np.ndarray) -> list[dict]:
    """Statistics for each codebook and depth, and over all depths (`depth` None).

    Args:
        counts: [Q, D, K], as `count_by_depth` gives them.
        entropies: [N, Q, D + 1], as `entropies_by_depth` gives them.
    """
    rows = []
    for q, name in enumerate(CODEBOOKS[: len(counts)]):
        by_depth = [*counts[q], counts[q].sum(axis=0)]
        for d, one in enumerate(by_depth):
            depth = d + 1 if d < len(counts[q]) else None
            statistics = statistics_of_counts(torch.from_numpy(one), float(np.mean(entropies[:, q, d])))
            rows.append({"codebook": name, "depth": depth, **asdict(statistics)})
    return rows


def codebook_table(codes: Tensor, codebook_size: int) -> list[dict]:
    """Statistics for each codebook and depth, and over all depths, of codes [N, P, Q, D]."""
    return table_of_counts(count_by_depth(codes, codebook_size), entropies_by_depth(codes))

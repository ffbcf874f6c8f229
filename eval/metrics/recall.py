"""Retrieval: whether a right candidate is among the nearest."""

import math
from collections import Counter
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

QUERIES = 1024  # compared with all candidates at a time


@dataclass(frozen=True)
class Recall:
    """Recall at some k and what guessing would give."""

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
    """Share of queries whose nearest candidate is a right one; see `recall_at`."""
    return recall_at(queries, candidates, query_labels, candidate_labels, (1,))[1]


def recall_at(
    queries: Tensor,
    candidates: Tensor,
    query_labels: Sequence[Hashable],
    candidate_labels: Sequence[Hashable],
    ks: Sequence[int],
) -> dict[int, Recall]:
    """Share of queries with a candidate of their label among the k nearest by cosine similarity, for each k.

    Of equally near candidates the earlier counts as nearer, so that features that are all the same find no
    more than luck would.

    Args:
        queries: [N, C] features, normalised here.
        candidates: [M, C] features.
        query_labels: N labels; several candidates may bear one label, each counts as a hit.
        candidate_labels: M labels.
        ks: how many of the nearest are looked at.

    Raises:
        ValueError: labels and features differ in number, a label has no candidate, or features are not
            finite.
    """
    first = first_hits(queries, candidates, query_labels, candidate_labels)
    count, offered = len(candidates), Counter(candidate_labels)
    right = Counter(offered[label] for label in query_labels)

    def chance(k: int) -> float:  # that k candidates drawn at random hold one of the right ones
        missed = (math.comb(count - one, k) / math.comb(count, k) * times for one, times in right.items())
        return 1 - math.fsum(missed) / len(queries)

    return {
        k: Recall(
            recall=float((first < k).double().mean()),
            chance=chance(min(k, count)),
            queries=len(queries),
            candidates=count,
        )
        for k in ks
    }


def first_hits(
    queries: Tensor,
    candidates: Tensor,
    query_labels: Sequence[Hashable],
    candidate_labels: Sequence[Hashable],
) -> Tensor:
    """How many candidates are nearer to each query than the nearest right one: [N] int64; see `recall_at`."""
    if len(queries) != len(query_labels) or len(candidates) != len(candidate_labels):
        raise ValueError(
            f"got {len(queries)} queries with {len(query_labels)} labels and {len(candidates)} candidates "
            f"with {len(candidate_labels)} labels; expected one label each"
        )
    missing = set(query_labels) - set(candidate_labels)
    if missing or not len(queries):
        raise ValueError(f"got {len(missing)} of {len(queries)} queries without a candidate to find")
    if not (torch.isfinite(queries).all() and torch.isfinite(candidates).all()):
        raise ValueError("got features that are NaN or infinite; check the model's weights")
    ids = {label: index for index, label in enumerate(dict.fromkeys(candidate_labels))}
    wanted = torch.tensor([ids[label] for label in query_labels])
    offered = torch.tensor([ids[label] for label in candidate_labels])
    compared = F.normalize(candidates.double(), dim=-1).T  # [C, M]
    found = []
    for start in range(0, len(queries), QUERIES):
        similarity = F.normalize(queries[start : start + QUERIES].double(), dim=-1) @ compared
        order = similarity.argsort(dim=1, descending=True, stable=True).cpu()
        hits = offered[order] == wanted[start : start + QUERIES, None]
        found.append(hits.int().argmax(dim=1))
    return torch.cat(found)

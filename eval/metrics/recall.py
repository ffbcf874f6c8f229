"""Retrieval: whether the nearest candidate is the right one."""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


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

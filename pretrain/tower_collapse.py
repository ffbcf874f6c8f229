"""Does a vision tower collapse while it trains? Its features of a few pictures, beside those at the start.

UniToken (arXiv 2504.04423) trains its tower at a hundredth of the adapter's rate, as a faster one collapses.
Two figures tell of it, over all places of pictures that stay the same. The *effective rank* of the features
(Roy and Vetterli, "The effective rank: a measure of effective dimensionality", EUSIPCO 2007) falls where they
become alike. The mean *cosine* of each feature to the one that the tower had for the same place at the start
of the run falls where they become others.

Shapes: N features of all pictures, C their width.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dualtoken.unified_model.sequence import PackedBatch
from pretrain.config import HealthConfig

PICTURES = 16  # at least, where there are as many


def effective_rank(features: Tensor) -> float:
    """The exponential of the entropy of the singular values of features [N, C], scaled to a sum of 1.

    From 1, all features multiples of one, to the smaller of N and C. NaN where a feature is not finite, or
    all are 0.
    """
    if not bool(features.isfinite().all()):
        return math.nan
    values = torch.linalg.svdvals(features.float())
    return torch.special.entr(values / values.sum()).sum().exp().item()


def mean_cosine(features: Tensor, others: Tensor) -> float:
    """The mean over N of the cosine of features [N, C] to others [N, C]."""
    return F.cosine_similarity(features.float(), others.float(), dim=-1).mean().item()


def packs_with_pictures(packs: Iterable[PackedBatch], least: int = PICTURES) -> list[PackedBatch]:
    """The first packs that together have `least` pictures with continuous features, or all that have any.

    Tiles of pictures count as pictures.
    """
    chosen, pictures = [], 0
    for pack in packs:
        if pack.features is not None:
            chosen.append(pack)
            pictures += len(pack.features)
        if pictures >= least:
            break
    return chosen


class TowerWatch:
    """Measures a vision tower on packs of documents whose pictures stay the same, from its first weights on.

    Build it on the weights that a run begins with, so before a checkpoint is loaded: a run that goes on finds
    what it is compared with by making it again. Every rank runs the same packs through the whole model, as in
    a validation, so that under ZeRO-3 all of them gather the same weights.

    Args:
        tower: whose outputs are the features.
        packs: with pictures, the same on every rank.
        run: runs the model on a pack, in evaluation mode and without gradients.
        bounds: `tower_rank` and `tower_cosine` say what counts as collapsed.
    """

    def __init__(
        self,
        tower: nn.Module,
        packs: Sequence[PackedBatch],
        run: Callable[[PackedBatch], Any],
        bounds: HealthConfig,
    ) -> None:
        self.tower, self.packs, self.run, self.bounds = tower, packs, run, bounds
        self.first = self._features()
        self.first_rank = effective_rank(self.first)

    def figures(self) -> dict[str, float]:
        """Effective rank, its share of the first one, mean cosine to the first features, 1 for a collapse.

        The model has to be in evaluation mode, without gradients; every rank has to call.
        """
        features = self._features()
        rank, cosine = effective_rank(features), mean_cosine(features, self.first)
        share, bounds = rank / self.first_rank, self.bounds
        # What is not finite is not above the bound either.
        collapsed = (bounds.tower_rank and not share >= bounds.tower_rank) or (
            bounds.tower_cosine and not cosine >= bounds.tower_cosine
        )
        return {
            "tower/effective_rank": rank,
            "tower/rank_share": share,
            "tower/cosine": cosine,
            "tower/collapsed": int(bool(collapsed)),
        }

    def describe(self) -> str:
        """A line for the start of the log."""
        in_tiles = any(pack.feature_order is not None for pack in self.packs)
        return (
            f"vision tower watched: effective rank {self.first_rank:.4g} at the start, of the features of "
            f"{sum(len(pack.features) for pack in self.packs)} held-out pictures"
            f"{' and tiles of them' if in_tiles else ''}"
        )

    def _features(self) -> Tensor:
        """What the tower makes of the pictures now, [N, C]."""
        kept: list[Tensor] = []
        hook = self.tower.register_forward_hook(lambda *call: kept.append(call[-1].detach().flatten(0, -2)))
        try:
            for pack in self.packs:
                self.run(pack)
        finally:
            hook.remove()
        return torch.cat(kept)

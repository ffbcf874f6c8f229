"""Whether a vision tower collapses: the measures by their definitions, and on a tower that was spoilt."""

import math

import numpy as np
import pytest
import torch

from dualtoken.unified_model.sequence import pack_documents
from pretrain.config import HealthConfig
from pretrain.tower_collapse import TowerWatch, effective_rank, mean_cosine, packs_with_pictures
from tests.support.unified_support import SEEN, caption, generation, plain, seeing, tiny_model, tokenized


@pytest.mark.parametrize("shape", [(40, 6), (5, 9)])
def test_the_effective_rank_is_roys_and_vetterlis(shape):
    matrix = np.random.default_rng(0).normal(size=shape) * np.arange(1, shape[1] + 1)
    values = np.linalg.svd(matrix, compute_uv=False)
    shares = values / values.sum()
    expected = math.exp(-sum(share * math.log(share) for share in shares))
    assert effective_rank(torch.from_numpy(matrix)) == pytest.approx(expected, rel=1e-5)


def test_the_effective_rank_of_what_is_known():
    orthogonal, _ = torch.linalg.qr(torch.randn(12, 12, generator=torch.Generator().manual_seed(0)))
    assert effective_rank(3 * orthogonal[:, :5]) == pytest.approx(5)
    assert effective_rank(orthogonal[:, :1] @ torch.ones(1, 7)) == pytest.approx(1, abs=1e-4)
    assert effective_rank(orthogonal.bfloat16()) == pytest.approx(12, rel=1e-3)
    for broken in (torch.zeros(4, 3), torch.full((4, 3), math.inf), torch.tensor([[1.0, math.nan]])):
        assert math.isnan(effective_rank(broken))


def test_the_cosine_is_taken_place_by_place():
    features = torch.tensor([[1.0, 0.0], [0.0, 2.0], [1.0, 1.0]])
    others = torch.tensor([[5.0, 0.0], [0.0, -1.0], [0.0, 3.0]])
    assert mean_cosine(features, others) == pytest.approx((1 - 1 + math.sqrt(0.5)) / 3)


def pack(*documents, model):
    return pack_documents(tokenized(*documents, layout=model.config.image_layout), 128)


def test_the_first_packs_with_pictures_are_chosen():
    model = tiny_model(**seeing())
    packs = [
        pack(plain("words"), generation("no features", 1), model=model),
        pack(caption("cat", 1), caption("dog", 2), model=model),
        pack(plain("words"), model=model),
        pack(caption("cow", 3), model=model),
        pack(caption("hen", 4), model=model),
    ]
    assert packs_with_pictures(iter(packs), 3) == [packs[1], packs[3]]
    assert packs_with_pictures(packs, 9) == [packs[1], packs[3], packs[4]]
    assert packs_with_pictures(packs[:1]) == []


@torch.no_grad()
def test_a_tower_that_was_spoilt_is_told_from_one_that_learned_a_little():
    model = tiny_model(**seeing())
    packs = [pack(caption("cat", 1), caption("dog", 2), model=model), pack(caption("cow", 3), model=model)]
    watch = TowerWatch(model.vision_tower, packs, lambda one: model(**one.model_inputs()), HealthConfig())
    pixels = torch.cat([one.features for one in packs])
    first = model.vision_tower(pixels).flatten(0, 1)
    assert len(first) == 3 * SEEN and watch.first_rank == pytest.approx(effective_rank(first))
    assert "3 held-out pictures" in watch.describe()
    same = {"tower/effective_rank": watch.first_rank, "tower/rank_share": 1, "tower/cosine": 1}
    assert watch.figures() == pytest.approx({**same, "tower/collapsed": 0})

    generator = torch.Generator().manual_seed(0)
    for parameter in model.vision_tower.parameters():
        parameter += 1e-3 * torch.randn(parameter.shape, generator=generator)
    quiet = watch.figures()
    assert quiet["tower/collapsed"] == 0 and 0.9 < quiet["tower/cosine"] < 1

    last = model.vision_tower.layers[-1].mlp.fc2
    last.bias += 100  # in every place of every picture the same
    spoilt = watch.figures()
    assert spoilt["tower/effective_rank"] < 2 and spoilt["tower/collapsed"] == 1
    for bounds, collapsed in (
        (HealthConfig(tower_rank=0, tower_cosine=0), 0),
        (HealthConfig(tower_rank=spoilt["tower/rank_share"] - 0.01, tower_cosine=0), 0),
        (HealthConfig(tower_rank=0, tower_cosine=spoilt["tower/cosine"] + 0.01), 1),
    ):
        watch.bounds = bounds
        assert watch.figures()["tower/collapsed"] == collapsed
    last.bias.fill_(math.inf)
    watch.bounds = HealthConfig()
    assert math.isnan(watch.figures()["tower/effective_rank"]) and watch.figures()["tower/collapsed"] == 1
    assert not model.vision_tower._forward_hooks

"""Layer similarity against its definition, blocks against brute force, and the proposal."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from dualtoken.visual_tokenizer.config import preset_config
from dualtoken.visual_tokenizer.layer_analysis import (
    analyze_backbone,
    find_blocks,
    layer_similarity,
    plot_similarity,
    propose_layers,
)
from dualtoken.visual_tokenizer.model import DualTokenVisualTokenizer


def tokenizer():
    torch.manual_seed(0)
    return DualTokenVisualTokenizer(preset_config("tiny"))


def images(count=5):
    return torch.rand(count, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1


def blocky(sizes, inside=0.9, across=0.2):
    """A similarity matrix of blocks."""
    block = torch.cat([torch.full((size,), index) for index, size in enumerate(sizes)])
    matrix = torch.where(block[:, None] == block[None], inside, across).double()
    return matrix.fill_diagonal_(1.0)


def test_similarity_is_the_mean_cosine_of_pooled_layers():
    vision = tokenizer().backbone.vision_model
    hidden = vision(images(), output_hidden_states=True).hidden_states
    expected = torch.zeros(4, 4, dtype=torch.float64)
    for image, i, j in itertools.product(range(5), range(4), range(4)):
        one, two = hidden[i + 1][image].double().mean(0), hidden[j + 1][image].double().mean(0)
        expected[i, j] += F.cosine_similarity(one, two, dim=0) / 5
    vision.train()
    found = layer_similarity(vision, images().split(2))
    assert vision.training
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(found.diagonal(), torch.ones(4, dtype=torch.float64))


@pytest.mark.parametrize("sizes", [(7, 10, 10), (1, 1, 1), (2, 5, 1), (6, 12, 6)])
def test_blocks_of_a_blocky_matrix_are_found(sizes):
    ends = list(itertools.accumulate(sizes))
    assert find_blocks(blocky(sizes)) == [(end - size + 1, end) for size, end in zip(sizes, ends)]


@pytest.mark.parametrize("num_blocks", [1, 2, 3, 4])
def test_blocks_are_the_best_of_all_segmentations(num_blocks):
    vectors = torch.randn(8, 3, generator=torch.Generator().manual_seed(1)).cumsum(0)
    similarity = F.normalize(vectors, dim=1) @ F.normalize(vectors, dim=1).t()

    def cost(cuts):
        edges = [0, *cuts, 8]
        return sum(
            similarity[a:b, a:b].trace() - similarity[a:b, a:b].sum() / (b - a)
            for a, b in zip(edges, edges[1:])
        )

    best = min(itertools.combinations(range(1, 8), num_blocks - 1), key=cost)
    assert [stop for _, stop in find_blocks(similarity, num_blocks)] == [*best, 8]


def test_clear_blocks_decide():
    proposal = propose_layers(blocky((7, 10, 10)))  # the structure the paper reports for SO400M
    assert proposal.blocks == [(1, 7), (8, 17), (18, 27)]
    assert (proposal.reconstruction_layer, proposal.from_rule, proposal.semantic_layer) == (7, 6, 26)
    text = " ".join(proposal.describe())
    assert "1-7, 8-17, 18-27" in text and "clear, so it is taken" in text and "quarter" in text


def test_without_clear_blocks_the_first_quarter_decides():
    distance = (torch.arange(24)[:, None] - torch.arange(24)[None]).abs()
    proposal = propose_layers(0.97 ** distance.double())  # an even drift has no borders
    assert not proposal.clear
    assert proposal.reconstruction_layer == proposal.from_rule == 6 and proposal.semantic_layer == 23
    assert "not clear, so the rule is taken" in " ".join(proposal.describe())


def test_a_tokenizer_is_analysed_and_drawn(tmp_path):
    similarity, proposal = analyze_backbone(tokenizer(), [images()])
    assert similarity.shape == (4, 4) and proposal.semantic_layer == 3
    plot_similarity(similarity, proposal, tmp_path / "layers.png", "a tiny tower")
    with Image.open(tmp_path / "layers.png") as picture:
        assert picture.format == "PNG" and min(picture.size) > 300
        assert len(picture.convert("RGB").getcolors(1 << 20)) > 20


def test_wrong_use_is_explained():
    with pytest.raises(ValueError, match="no images"):
        layer_similarity(tokenizer().backbone.vision_model, [])
    with pytest.raises(ValueError, match="2 layers cannot be cut into 3 blocks"):
        find_blocks(torch.eye(2))
    with pytest.raises(ValueError, match="a tower of 1 layer"):
        propose_layers(torch.eye(1))
    with pytest.raises(ValueError, match="Linear has no SigLIP vision tower"):
        analyze_backbone(torch.nn.Linear(2, 2), [images()])
    broken = tokenizer()
    with torch.no_grad():
        broken.backbone.vision_model.embeddings.patch_embedding.bias[0] = float("inf")
    with pytest.raises(ValueError, match="hidden states contain NaN or infinity"):
        analyze_backbone(broken, [images()])

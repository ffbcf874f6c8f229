"""Which layers should the two branches read? Similarity of a tower's layers, blocks, a proposal, a plot.

L layers are numbered from 1; layer n means the hidden states after n layers (arXiv 2503.14324, 3.1).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from os import PathLike

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.models.siglip.modeling_siglip import SiglipVisionModel

from dualtoken.visual_tokenizer.backbone import hidden_states_after

# A border between blocks is clear if the step across it is this many times the median step between
# neighbours.
_CLEAR_STEP = 1.5


@dataclass
class LayerProposal:
    """Layers for the two branches, from the blocks and from the rule of thumb."""

    blocks: list[tuple[int, int]]  # first and last layer of each block
    clear: bool  # whether the shallow block ends at a clear step
    from_blocks: int  # last layer of the shallow block
    from_rule: int  # last layer of the first quarter
    semantic_layer: int  # the last but one

    @property
    def reconstruction_layer(self) -> int:
        """The blocks' answer where they are clear, else the rule's."""
        return self.from_blocks if self.clear else self.from_rule

    def describe(self) -> list[str]:
        """Return the proposal in words, a line each."""
        blocks = ", ".join(f"{first}-{last}" if first < last else f"{first}" for first, last in self.blocks)
        verdict = "clear, so it is taken" if self.clear else "not clear, so the rule is taken"
        return [
            f"blocks of similar layers: {blocks}",
            f"reconstruction layer {self.reconstruction_layer}: the shallow block ends at {self.from_blocks} "
            f"({verdict}); the first quarter of the layers ends at {self.from_rule}",
            f"semantic layer {self.semantic_layer}: the last layer but one",
        ]


@torch.no_grad()
def layer_similarity(vision_model: SiglipVisionModel, batches: Iterable[Tensor]) -> Tensor:
    """Return the matrix S* ``[L, L]`` fp64: cosine similarity of mean-pooled layers, averaged over images.

    Args:
        vision_model: the tower.
        batches: images ``[B, 3, H, W]`` in [-1, 1].

    Raises:
        ValueError: if there is no image, or the tower's features are not finite.
    """
    layers = range(1, vision_model.config.num_hidden_layers + 1)
    device = vision_model.post_layernorm.weight.device
    was_training = vision_model.training
    vision_model.eval()
    total = torch.zeros(len(layers), len(layers), dtype=torch.float64)
    count = 0
    try:
        for images in batches:
            hidden = hidden_states_after(vision_model, images.to(device), layers)
            pooled = torch.stack([hidden[layer].double().mean(dim=1) for layer in layers], dim=1)  # [B, L, C]
            directions = F.normalize(pooled, dim=-1)
            total += torch.einsum("blc,bmc->lm", directions, directions).cpu()
            count += len(images)
    finally:
        vision_model.train(was_training)
    if count == 0:
        raise ValueError("no images: the similarity of layers is an average over images, give at least one")
    if not torch.isfinite(total).all():
        raise ValueError("the tower's hidden states contain NaN or infinity; check its weights")
    return total / count


def find_blocks(similarity: Tensor, num_blocks: int = 3) -> list[tuple[int, int]]:
    """Cut the layers into contiguous blocks that are as similar inside as can be.

    With S* as a kernel, this is least-squares segmentation: it minimises the sum over blocks of the squared
    distances to the block's mean, ``sum_i S_ii - sum_ij S_ij / n``, exactly, by dynamic programming.

    Args:
        similarity: S*, ``[L, L]``.
        num_blocks: 3 in the paper (shallow, middle, deep).

    Returns:
        First and last layer of each block, numbered from 1.

    Raises:
        ValueError: if there are fewer layers than blocks.
    """
    size = len(similarity)
    if not 1 <= num_blocks <= size:
        raise ValueError(f"{size} layers cannot be cut into {num_blocks} blocks")
    corner = F.pad(similarity.double().cumsum(0).cumsum(1), (1, 0, 1, 0))
    trace = F.pad(similarity.double().diagonal().cumsum(0), (1, 0))

    def cost(start: int, stop: int) -> float:
        inside = corner[stop, stop] - corner[start, stop] - corner[stop, start] + corner[start, start]
        return float(trace[stop] - trace[start] - inside / (stop - start))

    # best[stop]: least cost of layers [0, stop) in the present number of blocks, and where those blocks start
    best: list[tuple[float, list[int]]] = [(cost(0, stop), [0]) for stop in range(1, size + 1)]
    best.insert(0, (float("inf"), []))
    for blocks in range(2, num_blocks + 1):
        following: list[tuple[float, list[int]]] = [(float("inf"), [])] * blocks
        for stop in range(blocks, size + 1):
            options = ((best[start][0] + cost(start, stop), start) for start in range(blocks - 1, stop))
            least, start = min(options)
            following.append((least, [*best[start][1], start]))
        best = following
    starts = best[size][1]
    return [(start + 1, stop) for start, stop in zip(starts, [*starts[1:], size])]


def propose_layers(similarity: Tensor, num_blocks: int = 3) -> LayerProposal:
    """Propose reconstruction and semantic layers for a tower with the similarity matrix ``[L, L]``.

    The pixel branch reads the last layer of the shallow block, which the paper finds to be about the end of
    the first quarter; the semantic branch reads the last layer but one (arXiv 2503.14324, 3.2 and table 6).

    Raises:
        ValueError: if there are fewer than two layers.
    """
    size = len(similarity)
    if size < 2:
        raise ValueError(f"a tower of {size} layer(s) has no separate layers for two branches")
    blocks = find_blocks(similarity, min(num_blocks, size))
    border = blocks[0][1]
    steps = 1.0 - similarity.diagonal(1)
    clear = border < size and bool(steps[border - 1] > _CLEAR_STEP * steps.median())
    return LayerProposal(blocks, clear, border, max(1, size // 4), size - 1)


def plot_similarity(
    similarity: Tensor, proposal: LayerProposal, path: str | PathLike, title: str = ""
) -> None:
    """Draw S* ``[L, L]`` with its blocks and the proposed layers, and save the picture to ``path``.

    Raises:
        ImportError: if matplotlib is missing.
    """
    try:
        from matplotlib.figure import Figure
        from matplotlib.patches import Rectangle
        from matplotlib.ticker import MaxNLocator
    except ImportError as error:
        raise ImportError("plots need matplotlib: pip install matplotlib") from error
    size = len(similarity)
    figure = Figure(figsize=(5.6, 5.0), layout="constrained")
    axes = figure.add_subplot()
    picture = axes.imshow(similarity.cpu().numpy(), extent=(0.5, size + 0.5, size + 0.5, 0.5), cmap="viridis")
    for first, last in proposal.blocks:
        corner, width = (first - 0.5, first - 0.5), last - first + 1
        axes.add_patch(Rectangle(corner, width, width, fill=False, edgecolor="white", linewidth=1.5))
    taps = {"reconstruction": proposal.reconstruction_layer, "semantic": proposal.semantic_layer}
    for (name, layer), colour in zip(taps.items(), ("tab:orange", "tab:red")):
        axes.axvline(layer, color=colour, linestyle=":", label=f"{name} layer {layer}")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(MaxNLocator(integer=True))  # there is no layer 1.5
    axes.set(xlabel="layer", ylabel="layer", title=title or "cosine similarity of mean-pooled layers")
    axes.legend(loc="lower left", fontsize="small")
    figure.colorbar(picture, ax=axes)
    figure.savefig(path, dpi=120)


def analyze_backbone(model: nn.Module, batches: Iterable[Tensor]) -> tuple[Tensor, LayerProposal]:
    """Return S* ``[L, L]`` and the proposal for a SigLIP model, a vision tower or a visual tokenizer.

    Raises:
        ValueError: if ``model`` has no vision tower.
    """
    for module in model.modules():
        if isinstance(module, SiglipVisionModel):
            similarity = layer_similarity(module, batches)
            return similarity, propose_layers(similarity)
    raise ValueError(f"{type(model).__name__} has no SigLIP vision tower to analyse")

"""Floating-point operations of a training step of the unified model: formulas over the model's own layers.

A multiply-add counts as two; only matrix products and attention count (Kaplan et al., arXiv 2001.08361, table
1; Hoffmann et al., 2203.15556, appendix F). A product of n rows with an [o, i] matrix takes ``2 n i o``, its
gradients at its input and at its weights as much each; attention takes ``4 pairs width``, its gradient twice
that. What no gradient has to reach is left out, so frozen parts cost what they cost. Nothing is run: models
on the meta device, or sharded ones, do.

Shapes: T tokens, V visual positions, N positions with targets, D depths, K codes, C width of a head.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import nn

from dualtoken.unified_model.depth_transformer import VisualHead
from dualtoken.unified_model.model import DualTokenForCausalLM
from dualtoken.unified_model.sequence import IGNORE_INDEX, PackedBatch, SpecialTokens
from dualtoken.unified_model.vision_tower import VisionTower, features_per_image


@dataclass(frozen=True)
class Flops:
    """What a part computes: forward, gradients at its inputs, gradients at its weights."""

    forward: float = 0.0
    to_input: float = 0.0
    to_weights: float = 0.0

    def __add__(self, other: Flops) -> Flops:
        return Flops(
            self.forward + other.forward, self.to_input + other.to_input, self.to_weights + other.to_weights
        )

    def __mul__(self, times: float) -> Flops:
        return Flops(self.forward * times, self.to_input * times, self.to_weights * times)

    @property
    def backward(self) -> float:
        """Of the backward pass."""
        return self.to_input + self.to_weights

    @property
    def total(self) -> float:
        """Of forward and backward pass, nothing computed twice."""
        return self.forward + self.backward


def matmul(rows: float, inputs: int, outputs: int) -> Flops:
    """A linear map of `rows` vectors."""
    once = 2.0 * rows * inputs * outputs
    return Flops(once, once, once)


def attention(pairs: float, width: int) -> Flops:
    """Scores and weighted sums for `pairs` of a query and a key, in heads of `width` features together.

    What kernels recompute in their backward pass is not counted.
    """
    return Flops(4.0 * pairs * width, 8.0 * pairs * width)


class Chain:
    """Steps that feed each other; adds up by part what they compute.

    Args:
        learns_below: whether something in front of the first step learns, so that gradients have to pass.
    """

    def __init__(self, learns_below: bool = False, parts: dict[str, Flops] | None = None) -> None:
        self.learns_below = learns_below
        self.parts: dict[str, Flops] = {} if parts is None else parts

    def run(self, part: str, flops: Flops, learns: bool = False) -> None:
        """Add a step whose weights learn, or do not."""
        to_input = flops.to_input if self.learns_below else 0.0
        done = Flops(flops.forward, to_input, flops.to_weights if learns else 0.0)
        self.parts[part] = self.parts.get(part, Flops()) + done
        self.learns_below = self.learns_below or learns

    def run_linears(self, part: str, module: nn.Module, rows: float) -> None:
        """Add the linear layers of a module, in the order they are registered in, for `rows` vectors each."""
        # Norms come first: one that learns needs the gradient at the input of the maps behind it.
        norms = [m for m in module.modules() if type(m).__name__.endswith("Norm")]
        self.learns_below = self.learns_below or any(learns(norm) for norm in norms)
        for layer in module.modules():
            if isinstance(layer, nn.Linear):
                self.run(part, matmul(rows, layer.in_features, layer.out_features), learns(layer))

    def fork(self) -> Chain:
        """A chain that goes on from here beside this one, with the same account."""
        return Chain(self.learns_below, self.parts)


def learns(module: nn.Module) -> bool:
    """Whether a parameter of the module is trained."""
    return any(parameter.requires_grad for parameter in module.parameters())


@dataclass(frozen=True)
class PackContents:
    """What packs hold, in numbers that may be averages.

    Attributes:
        tokens: T, of all documents.
        pairs: of tokens and those they attend to: T (T + 1) / 2 of a causal document, T^2 where a kernel
            computes the whole square.
        visual_positions: V, image-pad tokens.
        text_targets: text tokens with a loss.
        visual_targets: N, visual positions with a loss.
        documents: number of documents.
        pictures: number of pictures.
        feature_pictures: number of those of which continuous features are read, or of their crops.
        feature_positions: positions of continuous features, ends of rows among them.
    """

    tokens: float
    pairs: float
    visual_positions: float
    text_targets: float
    visual_targets: float
    documents: float = 1.0
    pictures: float = 1.0
    feature_pictures: float = 0.0
    feature_positions: float = 0.0

    @classmethod
    def of_batch(cls, batch: PackedBatch, special: SpecialTokens) -> PackContents:
        """Contents of a pack that is still on the CPU, without its padding."""
        starts = batch.input_ids.new_tensor([special.vision_start, special.image_gen_start])
        counted = [batch.labels != IGNORE_INDEX, torch.isin(batch.input_ids, starts)]
        counted.append(batch.input_ids == special.image_feature)
        text_targets, pictures, seen = torch.stack([mask.sum() for mask in counted]).tolist()
        lengths = batch.cu_seqlens.diff()[: len(batch.keys)].double()  # the padding is the last one
        return cls(
            tokens=float(lengths.sum()),
            pairs=float((lengths * (lengths + 1) / 2).sum()),
            visual_positions=len(batch.codes),
            text_targets=text_targets,
            visual_targets=int(batch.visual_loss_mask.sum()),
            documents=len(batch.keys),
            pictures=pictures,
            feature_pictures=0 if batch.features is None else len(batch.features),
            feature_positions=seen,
        )

    @classmethod
    def of_documents(
        cls, lengths: Iterable[int], visual_positions: int, text_targets: int, visual_targets: int
    ) -> PackContents:
        """Contents of a pack of causal documents with these lengths."""
        lengths = list(lengths)
        pairs = sum(length * (length + 1) / 2 for length in lengths)
        return cls(sum(lengths), pairs, visual_positions, text_targets, visual_targets, len(lengths))


def unified_model_flops(model: DualTokenForCausalLM, pack: PackContents) -> dict[str, Flops]:
    """FLOPs of a training step of the unified model on a pack, by part (`PARTS`, `text_head`).

    Parameters that do not require gradients are frozen, and so is what only they would hand gradients to.
    """
    config, parts = model.config, {}
    features = Chain(parts=parts)
    if model.post_quantization is not None:
        width = config.post_quantization_dim
        pairs = pack.visual_positions * config.positions_per_image
        for projection in (model.post_quantization.pixel, model.post_quantization.semantic):
            run_projection(features, "post_quantization", projection, pack.visual_positions, pairs, width)
    reads_embeddings = learns(model.get_input_embeddings())
    for mlp in model.visual_embedder.mlps if model.visual_embedder is not None else ():
        features = Chain(parts=parts)
        features.run_linears("visual_embedder", mlp, pack.visual_positions)
    learns_below = features.learns_below or reads_embeddings
    if model.feature_adapter is not None:
        features, patches = Chain(parts=parts), pack.feature_pictures * config.features_per_image
        if model.vision_tower is not None:
            run_tower(features, "vision_tower", model.vision_tower, patches)
        features.run_linears("feature_adapter", model.feature_adapter, pack.feature_positions)
        learns_below = learns_below or features.learns_below
    decoder = Chain(learns_below, parts)
    text_config = model.decoder_config
    heads = text_config.num_attention_heads
    head_dim = getattr(text_config, "head_dim", None) or text_config.hidden_size // heads
    for layer in model.decoder.layers:
        decoder.run_linears("llm", layer, pack.tokens)
        decoder.run("llm", attention(pack.pairs, heads * head_dim))
    text = decoder.fork()
    output_layer = model.get_output_embeddings()
    targets = pack.text_targets + (pack.visual_targets if config.codes_in_vocabulary else 0.0)
    text.run_linears("text_head", nn.Sequential(output_layer), targets)
    for name, (projector, head) in zip(config.codebooks, model.visual_heads()):
        visual = decoder.fork()
        visual.run_linears(f"{name}_projector", projector, pack.visual_targets)
        run_visual_head(visual, f"{name}_head", head, pack.visual_targets)
    return parts


def run_tower(chain: Chain, part: str, tower: VisionTower, patches: float) -> None:
    """Add a vision tower over so many patches, each of which attends to all of its picture."""
    width, patch = tower.settings["hidden_size"], tower.patch_embedding
    inputs = patch.in_channels * patch.kernel_size[0] * patch.kernel_size[1]
    # Pixels take no gradient, and positions learn with the patches.
    embedded = matmul(patches, inputs, width)
    learned = learns(patch) or learns(tower.position_embedding)
    chain.run(part, Flops(embedded.forward, 0.0, embedded.to_weights), learned)
    pairs = patches * features_per_image(tower.settings)
    for layer in tower.layers:
        chain.run_linears(part, layer, patches)
        chain.run(part, attention(pairs, width))


def run_visual_head(chain: Chain, part: str, head: VisualHead, positions: float) -> None:
    """Add a depth transformer with its classifiers, D steps at each of `positions`."""
    layers, depth = full_shape(head.mlp_in)[0], head.depth
    _, codes, width = full_shape(head.classifier)
    inner, code_dim = full_shape(head.mlp_in)[1], full_shape(head.code_in)[1]
    rows, trained = positions * depth, learns(head)
    # Code vectors are frozen: no gradient goes to what the first map reads.
    leaf = matmul(positions * (depth - 1), code_dim, width)
    chain.run(part, Flops(leaf.forward, 0.0, leaf.to_weights), trained)
    layer = (
        matmul(rows, width, 3 * width)
        + attention(rows * depth, width)
        + matmul(rows, width, width)
        + matmul(rows, width, inner)
        + matmul(rows, inner, width)
    )
    chain.run(part, layer * layers, trained)
    chain.run(part, matmul(rows, width, codes), trained)


def run_projection(
    chain: Chain, part: str, projection: nn.Module, rows: float, pairs: float, width: int
) -> None:
    """Add an `AttentionProjection`; its heads, if it attends, are `width` features together."""
    chain.run_linears(part, projection, rows)
    if projection.attend:
        chain.run(part, attention(pairs, width))


def full_shape(parameter: nn.Parameter) -> tuple[int, ...]:
    """Shape of a parameter, of one that ZeRO-3 has sharded too."""
    return tuple(getattr(parameter, "ds_shape", parameter.shape))

"""The depth transformer and the visual head on top of it: one position's codes, depth by depth.

At a visual position the language model's hidden state h is followed by D steps of a small causal transformer
(arXiv 2503.14324 section 3.3, after 2203.01941): step 1 reads h, step d > 1 the sum of the code vectors
chosen at depths below d; each has a classifier of its own over the K codes. Positions do not see each other
here.

All weights of a head are parameters of this one module, stacked over layers and depths. Under ZeRO-3 the
head is thus gathered once per forward and once per backward pass, on every rank alike, however many chunks
of positions a rank's batch needs; with a module per layer each chunk would gather anew, and ranks with
different numbers of chunks would wait for each other forever.

Shapes: N positions, D depths, C channels of the head, K codes, E dimensions of a code vector.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from dualtoken.unified_model.chunked_loss import (
    Gradients,
    ScoreLogits,
    Scores,
    Weights,
    empty_scores,
    fill_in,
    linear_scores,
    logit_scores,
    scores_with_gradients,
)


@dataclass
class DepthCache:
    """Keys and values [layers, N, heads, D, head_dim] of the `length` depths done so far."""

    keys: torch.Tensor
    values: torch.Tensor
    length: int = 0


class Layer(NamedTuple):
    """Weights of one layer."""

    query_key_value: torch.Tensor  # [3 C, C]
    attention_out: torch.Tensor  # [C, C]
    mlp_in: torch.Tensor  # [I, C]
    mlp_out: torch.Tensor  # [C, I]


class DepthTransformer(nn.Module):
    """A pre-norm transformer along the depth axis.

    Norms carry no weights; the linear maps behind them can hold any scale.
    """

    def __init__(
        self,
        hidden_size: int,
        num_layers: int,
        num_heads: int,
        intermediate_size: int,
        depth: int,
        code_dim: int,
    ) -> None:
        super().__init__()
        if hidden_size % num_heads:
            raise ValueError(
                f"head_hidden_size {hidden_size} is not divisible by head_num_attention_heads {num_heads}"
            )
        self.num_heads = num_heads
        self.depth = depth
        self.code_in = nn.Parameter(torch.empty(hidden_size, code_dim))
        self.depth_embedding = nn.Parameter(torch.empty(depth, hidden_size))
        self.query_key_value = nn.Parameter(torch.empty(num_layers, 3 * hidden_size, hidden_size))
        self.attention_out = nn.Parameter(torch.empty(num_layers, hidden_size, hidden_size))
        self.mlp_in = nn.Parameter(torch.empty(num_layers, intermediate_size, hidden_size))
        self.mlp_out = nn.Parameter(torch.empty(num_layers, hidden_size, intermediate_size))

    def init_weights(self) -> None:
        """Draw the weights: each map keeps the scale of its input, residual branches start smaller."""
        residual = (2 * len(self.mlp_in)) ** -0.5
        for weight, scale in (
            (self.code_in, 1.0),
            (self.query_key_value, 1.0),
            (self.attention_out, residual),
            (self.mlp_in, 1.0),
            (self.mlp_out, residual),
        ):
            nn.init.normal_(weight, std=scale * weight.shape[-1] ** -0.5)
        nn.init.normal_(self.depth_embedding, std=0.02)


class VisualHead(DepthTransformer):
    """Depth transformer with a classifier per depth: log P(y_d given y_<d, h) for one codebook."""

    def __init__(
        self,
        hidden_size: int,
        num_layers: int,
        num_heads: int,
        intermediate_size: int,
        depth: int,
        code_dim: int,
        codebook_size: int,
        chunk_size: int,
    ) -> None:
        super().__init__(hidden_size, num_layers, num_heads, intermediate_size, depth, code_dim)
        self.classifier = nn.Parameter(torch.empty(depth, codebook_size, hidden_size))
        self.chunk_size = chunk_size
        self._score_logits: ScoreLogits = logit_scores

    def init_weights(self) -> None:
        """Draw the weights; small classifiers, so that every code starts near probability 1 / K."""
        super().init_weights()
        nn.init.normal_(self.classifier, std=0.1 * self.classifier.shape[-1] ** -0.5)

    def forward(
        self, hidden: torch.Tensor, prefix: torch.Tensor, targets: torch.Tensor, z_loss: float = 0.0
    ) -> Scores:
        """Score codes, in chunks of positions, so that no more than chunk_size x K logits are alive.

        Args:
            hidden: projected hidden states [N, C].
            prefix: sums of the code vectors before depths 2..D, [N, D - 1, E].
            targets: codes [N, D].
            z_loss: weight of the z-loss; 0 for none.

        Returns:
            scores [N, D].
        """
        parameters = [self.code_in, self.depth_embedding, *self._stacked(), self.classifier]
        return scores_with_gradients(
            lambda h, weights, needs: self._run(h, prefix, targets, z_loss, weights, needs),
            hidden,
            parameters,
        )

    def compile(self, *args: Any, **kwargs: Any) -> None:
        """Compile the trunk, and what the loss does between its matrix products.

        Arguments are those of `torch.compile`. The chunks' own loop calls autograd, and stays as it is.
        """
        self._trunk = torch.compile(self._trunk, *args, **kwargs)  # type: ignore[method-assign]
        self._score_logits = torch.compile(logit_scores, *args, **kwargs)

    def logits(self, hidden: torch.Tensor, prefix: torch.Tensor) -> torch.Tensor:
        """Compute all logits [N, D, K] at once plainly: the reference for `forward` and `step`."""
        features = self._trunk(hidden, prefix, self.code_in, self.depth_embedding, self._layers())
        return torch.einsum("ndc,dkc->ndk", features, self.classifier)

    def new_cache(self, positions: int) -> DepthCache:
        """Return an empty cache for `step`, to be had anew at each image position."""
        layers, _, width = self.query_key_value.shape
        shape = (layers, positions, self.num_heads, self.depth, width // self.num_heads)
        return DepthCache(self.query_key_value.new_zeros(shape), self.query_key_value.new_zeros(shape))

    def step(self, inputs: torch.Tensor, cache: DepthCache) -> torch.Tensor:
        """Compute the logits [N, K] of the next depth.

        `inputs` is the projected hidden state [N, C] at the first depth, the sum of the code vectors chosen
        so far [N, E] at later ones.
        """
        depth = cache.length
        x = inputs if depth == 0 else F.linear(inputs.to(self.code_in.dtype), self.code_in)
        x = (x + self.depth_embedding[depth])[:, None]
        for index, layer in enumerate(self._layers()):
            x = self._layer(x, layer, cache, index)
        cache.length += 1
        return F.linear(_norm(x[:, 0]), self.classifier[depth])

    def _stacked(self) -> list[torch.Tensor]:
        return [self.query_key_value, self.attention_out, self.mlp_in, self.mlp_out]

    def _layers(self) -> list[Layer]:
        return [Layer(*weights) for weights in zip(*self._stacked(), strict=True)]

    def _trunk(
        self,
        hidden: torch.Tensor,
        prefix: torch.Tensor,
        code_in: torch.Tensor,
        depth_embedding: torch.Tensor,
        layers: list[Layer],
    ) -> torch.Tensor:
        """Features [N, D, C] in front of the classifiers."""
        x = torch.cat([hidden[:, None], F.linear(prefix.to(hidden.dtype), code_in)], dim=1) + depth_embedding
        for layer in layers:
            x = self._layer(x, layer)
        return _norm(x)

    def _layer(
        self,
        x: torch.Tensor,  # [N, D, C], or [N, 1, C] with a cache
        weights: Layer,
        cache: DepthCache | None = None,
        index: int = 0,
    ) -> torch.Tensor:
        positions, steps, width = x.shape
        qkv = F.linear(_norm(x), weights.query_key_value).view(positions, steps, 3, self.num_heads, -1)
        query, key, value = qkv.permute(2, 0, 3, 1, 4)  # [N, heads, steps, head_dim] each
        if cache is not None:
            cache.keys[index, :, :, cache.length] = key[:, :, 0]
            cache.values[index, :, :, cache.length] = value[:, :, 0]
            key = cache.keys[index, :, :, : cache.length + 1]
            value = cache.values[index, :, :, : cache.length + 1]
        # Sequences of D steps are too short for the fused kernels to pay.
        scores = (query * query.shape[-1] ** -0.5) @ key.transpose(-1, -2)
        if cache is None:
            scores = scores + scores.new_full((steps, steps), float("-inf")).triu(1)
        attended = (scores.softmax(dim=-1) @ value).transpose(1, 2).reshape(positions, steps, width)
        x = x + F.linear(attended, weights.attention_out)
        return x + F.linear(F.gelu(F.linear(_norm(x), weights.mlp_in)), weights.mlp_out)

    def _run(
        self,
        hidden: torch.Tensor,
        prefix: torch.Tensor,
        targets: torch.Tensor,
        z_loss: float,
        weights: Weights | None,
        needs: Sequence[bool],
    ) -> tuple[Scores, Gradients]:
        """Score chunk after chunk; gradients of the parameters add up in place, slice by slice."""
        parameters = [hidden, self.code_in, self.depth_embedding, *self._stacked(), self.classifier]
        gradients: Gradients = [
            torch.zeros_like(p) if needed else None for p, needed in zip(parameters, needs, strict=True)
        ]
        code_in, depth_embedding = map(_leaf, parameters[1:3], gradients[1:3])
        stacked = zip(parameters[3:-1], gradients[3:-1], strict=True)
        layers = [Layer(*slices) for slices in zip(*(_leaves(p, g) for p, g in stacked), strict=True)]
        classifier_gradient = gradients[-1]
        need_trunk = any(needs[:-1])
        scores = empty_scores(targets, z_loss)
        for start in range(0, len(hidden), self.chunk_size):
            chunk = slice(start, start + self.chunk_size)
            hidden_leaf = _leaf(hidden[chunk], gradients[0][chunk] if gradients[0] is not None else None)
            with torch.set_grad_enabled(need_trunk):
                features = self._trunk(hidden_leaf, prefix[chunk], code_in, depth_embedding, layers)
            feature_gradient = torch.empty_like(features) if need_trunk else None
            detached = features.detach()
            for d in range(self.depth):
                found, gradient = linear_scores(
                    detached[:, d],
                    self.classifier[d],
                    targets[chunk, d],
                    weights=None if weights is None else weights.of((chunk, d)),
                    z_loss=z_loss,
                    weight_gradient=None if classifier_gradient is None else classifier_gradient[d],
                    need_hidden_gradient=need_trunk,
                    score_logits=self._score_logits,
                )
                fill_in(scores, (chunk, d), found)
                if feature_gradient is not None and gradient is not None:
                    feature_gradient[:, d] = gradient
            if feature_gradient is not None:
                torch.autograd.backward(features, feature_gradient)
        return scores, gradients


def _norm(x: torch.Tensor) -> torch.Tensor:
    return F.rms_norm(x, x.shape[-1:], eps=1e-6)


def _leaf(tensor: torch.Tensor, gradient: torch.Tensor | None) -> torch.Tensor:
    """A view of the tensor whose gradient, if there is one, is added to `gradient` in place."""
    leaf = tensor.detach()
    if gradient is not None:
        leaf.requires_grad_()
        leaf.grad = gradient
    return leaf


def _leaves(stacked: torch.Tensor, gradient: torch.Tensor | None) -> list[torch.Tensor]:
    """Leaves for the slices along the first axis."""
    return [_leaf(stacked[i], None if gradient is None else gradient[i]) for i in range(len(stacked))]

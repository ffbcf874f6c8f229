"""Negative log likelihoods of large classifiers without ever holding all their logits.

Positions are independent given their hidden states, so each chunk of positions runs forward and backward in
one go: what stays between the model's forward and backward pass are the gradients themselves, of the hidden
states and of the classifier, which the backward pass only scales. Nothing is computed twice and no logits
outlive their chunk.

The z-loss (PaLM, arXiv 2204.02311, section 5) is `z_loss * logsumexp(logits)^2` at each target; it keeps the
logits from drifting to where bf16 is coarse.

Shapes: N positions, C channels, K classes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

Gradients = list[torch.Tensor | None]


class Scores(NamedTuple):
    """What a classifier makes of its targets; all of one shape."""

    nll: torch.Tensor  # fp32
    correct: torch.Tensor  # bool, whether the target was the most likely class
    z_loss: torch.Tensor | None  # fp32, None without


class Weights(NamedTuple):
    """What the loss multiplies each nll and each z-loss by."""

    nll: torch.Tensor
    z_loss: torch.Tensor | None

    def of(self, index: slice | tuple[slice, int]) -> Weights:
        """Return those of some targets."""
        return Weights(self.nll[index], None if self.z_loss is None else self.z_loss[index])


Run = Callable[[torch.Tensor, Weights | None, Sequence[bool]], tuple[Scores, Gradients]]
"""(hidden, weights, which gradients) -> (scores, gradients of hidden and the parameters)."""
ScoreLogits = Callable[..., tuple[Scores, torch.Tensor | None]]
"""As `logit_scores`."""


def scores_with_gradients(run: Run, hidden: torch.Tensor, parameters: Sequence[torch.Tensor]) -> Scores:
    """Call `run` under autograd, taking the gradients it computes along with the losses.

    `run` returns the gradient of ``(weights.nll * nll + weights.z_loss * z_loss).sum()``, weights None
    meaning ones. If the loss built from the scores weighs all entries alike, as sums and means of nll and
    z-loss together do, these gradients are scaled; otherwise `run` is called again with the true weights.
    """
    if not torch.is_grad_enabled():
        return run(hidden, None, [False] * (1 + len(parameters)))[0]
    return Scores(*_ForwardGradients.apply(run, hidden, *parameters))


def empty_scores(targets: torch.Tensor, z_loss: float) -> Scores:
    """Return scores of the targets' shape to be filled in."""
    nll = torch.empty_like(targets, dtype=torch.float32)
    correct = torch.empty_like(targets, dtype=torch.bool)
    return Scores(nll, correct, torch.empty_like(nll) if z_loss else None)


def fill_in(scores: Scores, index: slice | tuple[slice, int], found: Scores) -> None:
    """Put the scores of some targets into their places."""
    for whole, part in zip(scores, found, strict=True):
        if whole is not None and part is not None:
            whole[index] = part


def linear_scores(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    bias: torch.Tensor | None = None,
    weights: Weights | None = None,
    z_loss: float = 0.0,
    weight_gradient: torch.Tensor | None = None,
    bias_gradient: torch.Tensor | None = None,
    need_hidden_gradient: bool = False,
    score_logits: ScoreLogits | None = None,
) -> tuple[Scores, torch.Tensor | None]:
    """Negative log likelihood of a linear classifier on one chunk, with the gradients written out.

    Args:
        hidden: [N, C].
        weight: [K, C].
        targets: classes [N].
        bias: [K] or None.
        weights: [N] each, scale the gradients (not the scores); None for ones.
        z_loss: weight of the z-loss; 0 for none.
        weight_gradient: [K, C], added to in place; None to leave out.
        bias_gradient: [K], likewise.
        need_hidden_gradient: whether to compute the second result.
        score_logits: a compiled `logit_scores`; None for itself.

    Returns:
        scores [N], gradient of the weighted sum by `hidden` [N, C] or None.
    """
    gradient_type = None
    if weight_gradient is not None or need_hidden_gradient:
        gradient_type = hidden.dtype
    if bias_gradient is not None:
        gradient_type = torch.float32
    scores, gradient = (score_logits or logit_scores)(
        F.linear(hidden, weight, bias), targets, weights, z_loss, gradient_type
    )
    if gradient is None:
        return scores, None
    if bias_gradient is not None:
        bias_gradient.add_(gradient.sum(dim=0))
    gradient = gradient.to(hidden.dtype)
    if weight_gradient is not None:
        weight_gradient.addmm_(gradient.t(), hidden)
    return scores, gradient @ weight if need_hidden_gradient else None


def logit_scores(
    logits: torch.Tensor,
    targets: torch.Tensor,
    weights: Weights | None,
    z_loss: float,
    gradient_type: torch.dtype | None,
) -> tuple[Scores, torch.Tensor | None]:
    """Scores [N] of logits [N, K], which are overwritten, and the gradient of their weighted sum [N, K].

    All of `linear_scores` but its matrix products, so that it can be compiled as one; arguments as there,
    and the type of the gradient, None for no gradient.
    """
    probabilities = logits.float()  # logits for now
    best, argmax = probabilities.max(dim=-1, keepdim=True)
    probabilities.sub_(best)
    target_logit = probabilities.gather(1, targets[:, None])
    total = probabilities.exp_().sum(dim=-1, keepdim=True)
    nll = total.log() - target_logit
    correct = argmax[:, 0] == targets
    log_z = total.log() + best if z_loss else None
    scores = Scores(nll[:, 0], correct, z_loss * log_z[:, 0].square() if log_z is not None else None)
    if gradient_type is None:
        return scores, None
    if log_z is None:
        probabilities.div_(total)
        probabilities.scatter_add_(1, targets[:, None], torch.full_like(nll, -1.0))
        if weights is not None:
            probabilities.mul_(weights.nll[:, None])
    else:
        # d log Z / d logits are the probabilities, so the z-loss only scales them.
        nll_weights = torch.ones_like(nll) if weights is None else weights.nll[:, None]
        z_weights = 1.0 if weights is None or weights.z_loss is None else weights.z_loss[:, None]
        probabilities.mul_((nll_weights + 2 * z_loss * z_weights * log_z) / total)
        probabilities.scatter_add_(1, targets[:, None], -nll_weights)
    return scores, probabilities.to(gradient_type)


class TextHead(nn.Linear):
    """The decoder's output layer, able to return losses in place of logits.

    It takes over the weight (shared with the embedding if the two are tied) and the place of the decoder's
    own. The loss is computed inside this module's forward, where ZeRO-3 has its weight gathered once,
    however many chunks there are.
    """

    def __init__(self, linear: nn.Linear, chunk_size: int) -> None:
        nn.Module.__init__(self)  # the weight exists already
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight = linear.weight
        self.register_parameter("bias", linear.bias)
        self.chunk_size = chunk_size
        self._score_logits: ScoreLogits = logit_scores
        # Whether transformers still has to draw the weight is a mark on the module.
        self._is_hf_initialized = getattr(linear, "_is_hf_initialized", False)

    def forward(  # type: ignore[override]
        self, hidden: torch.Tensor, targets: torch.Tensor | None = None, z_loss: float = 0.0
    ) -> torch.Tensor | Scores:
        """Return logits [..., K]; or, given `targets` [N] for `hidden` [N, C], their scores [N]."""
        if targets is None:
            return F.linear(hidden, self.weight, self.bias)
        parameters = [self.weight] if self.bias is None else [self.weight, self.bias]
        return scores_with_gradients(
            lambda h, weights, needs: self._run(h, targets, z_loss, weights, needs), hidden, parameters
        )

    def compile(self, *args: Any, **kwargs: Any) -> None:
        """Compile what a chunk's loss does between its matrix products; arguments of `torch.compile`."""
        self._score_logits = torch.compile(logit_scores, *args, **kwargs)

    def _run(
        self,
        hidden: torch.Tensor,
        targets: torch.Tensor,
        z_loss: float,
        weights: Weights | None,
        needs: Sequence[bool],
    ) -> tuple[Scores, Gradients]:
        scores = empty_scores(targets, z_loss)
        tensors = [hidden, self.weight, self.bias]
        gradients: Gradients = [
            torch.zeros_like(t) if t is not None and n else None
            for t, n in zip(tensors, [*needs, False], strict=False)
        ]
        for start in range(0, len(hidden), self.chunk_size):
            chunk = slice(start, start + self.chunk_size)
            found, hidden_gradient = linear_scores(
                hidden[chunk],
                self.weight,
                targets[chunk],
                self.bias,
                None if weights is None else weights.of(chunk),
                z_loss,
                gradients[1],
                gradients[2] if self.bias is not None else None,
                need_hidden_gradient=needs[0],
                score_logits=self._score_logits,
            )
            fill_in(scores, chunk, found)
            if gradients[0] is not None and hidden_gradient is not None:
                gradients[0][chunk] = hidden_gradient
        return scores, gradients[: len(needs)]


def _is_all(gradient: torch.Tensor | None, number: torch.Tensor) -> bool:
    """Whether a gradient is one number throughout; without waiting for the device where it is expanded.

    That is what sums of all scores make of the gradient of their result.
    """
    if gradient is None:
        return True
    is_expanded = all(size == 1 or not step for size, step in zip(gradient.shape, gradient.stride()))
    if is_expanded and gradient.data_ptr() == number.data_ptr():
        return True
    return bool((gradient == number).all())


class _ForwardGradients(torch.autograd.Function):
    """Keeps gradients computed in the forward pass for the backward pass."""

    @staticmethod
    def forward(ctx, run, hidden, *parameters):  # noqa: D102, ANN001
        needs = ctx.needs_input_grad[1:]
        scores, gradients = run(hidden, None, needs)
        ctx.run, ctx.gradients = run, gradients
        ctx.save_for_backward(hidden)
        ctx.mark_non_differentiable(scores.correct)
        return tuple(scores)

    @staticmethod
    def backward(ctx, nll_gradient, _, z_gradient):  # noqa: D102, ANN001
        gradients, ctx.gradients = ctx.gradients, None
        scale = nll_gradient[(0,) * nll_gradient.dim()]
        if gradients is None or not (_is_all(nll_gradient, scale) and _is_all(z_gradient, scale)):
            (hidden,) = ctx.saved_tensors
            _, gradients = ctx.run(hidden, Weights(nll_gradient, z_gradient), ctx.needs_input_grad[1:])
        else:
            for gradient in gradients:
                if gradient is not None:
                    gradient.mul_(scale.to(gradient.dtype))
        return None, *gradients

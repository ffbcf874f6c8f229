"""Negative log likelihoods of large classifiers without ever holding all their logits.

Positions are independent given their hidden states, so each chunk of positions runs forward and backward in
one go: what stays between the model's forward and backward pass are the gradients themselves, of the hidden
states and of the classifier, which the backward pass only scales. Nothing is computed twice and no logits
outlive their chunk.

Shapes: N positions, C channels, K classes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import nn

Gradients = list[torch.Tensor | None]
Run = Callable[
    [torch.Tensor, torch.Tensor | None, Sequence[bool]], tuple[torch.Tensor, torch.Tensor, Gradients]
]
"""(hidden, weights of the nll, which gradients) -> (nll, correct, gradients of hidden and the parameters)."""


def nll_with_gradients(
    run: Run, hidden: torch.Tensor, parameters: Sequence[torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Call `run` under autograd, taking the gradients it computes along with the losses.

    `run` returns the gradient of ``(weights * nll).sum()``, weights None meaning one. If the loss built
    from the nll weighs all its entries alike, as sums and means do, these gradients are scaled; otherwise
    `run` is called again with the true weights.

    Returns:
        nll in fp32 and, of the same shape, whether the target was the most likely class.
    """
    if not torch.is_grad_enabled():
        return run(hidden, None, [False] * (1 + len(parameters)))[:2]
    return _ForwardGradients.apply(run, hidden, *parameters)


def linear_nll(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    bias: torch.Tensor | None = None,
    weights: torch.Tensor | None = None,
    weight_gradient: torch.Tensor | None = None,
    bias_gradient: torch.Tensor | None = None,
    need_hidden_gradient: bool = False,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Negative log likelihood of a linear classifier on one chunk, with the gradients written out.

    Args:
        hidden: [N, C].
        weight: [K, C].
        targets: classes [N].
        bias: [K] or None.
        weights: [N], scales the gradients (not the nll); None for one.
        weight_gradient: [K, C], added to in place; None to leave out.
        bias_gradient: [K], likewise.
        need_hidden_gradient: whether to compute the third result.

    Returns:
        nll [N] in fp32, correct [N] bool, gradient of the weighted sum by `hidden` [N, C] or None.
    """
    probabilities = F.linear(hidden, weight, bias).float()  # logits for now
    best, argmax = probabilities.max(dim=-1, keepdim=True)
    probabilities.sub_(best)
    target_logit = probabilities.gather(1, targets[:, None])
    total = probabilities.exp_().sum(dim=-1, keepdim=True)
    nll = total.log() - target_logit
    correct = argmax[:, 0] == targets
    if weight_gradient is None and bias_gradient is None and not need_hidden_gradient:
        return nll[:, 0], correct, None
    probabilities.div_(total)
    probabilities.scatter_add_(1, targets[:, None], torch.full_like(nll, -1.0))
    if weights is not None:
        probabilities.mul_(weights[:, None])
    if bias_gradient is not None:
        bias_gradient.add_(probabilities.sum(dim=0))
    logits_gradient = probabilities.to(hidden.dtype)
    if weight_gradient is not None:
        weight_gradient.addmm_(logits_gradient.t(), hidden)
    return nll[:, 0], correct, logits_gradient @ weight if need_hidden_gradient else None


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
        # Whether transformers still has to draw the weight is a mark on the module.
        self._is_hf_initialized = getattr(linear, "_is_hf_initialized", False)

    def forward(  # type: ignore[override]
        self, hidden: torch.Tensor, targets: torch.Tensor | None = None
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """Return logits [..., K]; or, given `targets` [N] for `hidden` [N, C], nll [N] and correct [N]."""
        if targets is None:
            return F.linear(hidden, self.weight, self.bias)
        parameters = [self.weight] if self.bias is None else [self.weight, self.bias]
        return nll_with_gradients(
            lambda h, weights, needs: self._run(h, targets, weights, needs), hidden, parameters
        )

    def _run(
        self,
        hidden: torch.Tensor,
        targets: torch.Tensor,
        weights: torch.Tensor | None,
        needs: Sequence[bool],
    ) -> tuple[torch.Tensor, torch.Tensor, Gradients]:
        nll = hidden.new_empty(len(hidden), dtype=torch.float32)
        correct = targets.new_empty(len(hidden), dtype=torch.bool)
        tensors = [hidden, self.weight, self.bias]
        gradients: Gradients = [
            torch.zeros_like(t) if t is not None and n else None
            for t, n in zip(tensors, [*needs, False], strict=False)
        ]
        for start in range(0, len(hidden), self.chunk_size):
            chunk = slice(start, start + self.chunk_size)
            nll[chunk], correct[chunk], hidden_gradient = linear_nll(
                hidden[chunk],
                self.weight,
                targets[chunk],
                self.bias,
                None if weights is None else weights[chunk],
                gradients[1],
                gradients[2] if self.bias is not None else None,
                need_hidden_gradient=needs[0],
            )
            if gradients[0] is not None and hidden_gradient is not None:
                gradients[0][chunk] = hidden_gradient
        return nll, correct, gradients[: len(needs)]


class _ForwardGradients(torch.autograd.Function):
    """Keeps gradients computed in the forward pass for the backward pass."""

    @staticmethod
    def forward(ctx, run, hidden, *parameters):  # noqa: D102, ANN001
        needs = ctx.needs_input_grad[1:]
        nll, correct, gradients = run(hidden, None, needs)
        ctx.run, ctx.gradients = run, gradients
        ctx.save_for_backward(hidden)
        ctx.mark_non_differentiable(correct)
        return nll, correct

    @staticmethod
    def backward(ctx, nll_gradient, _):  # noqa: D102, ANN001
        gradients, ctx.gradients = ctx.gradients, None
        scale = nll_gradient.flatten()[0]
        if gradients is None or not bool((nll_gradient == scale).all()):
            (hidden,) = ctx.saved_tensors
            _, _, gradients = ctx.run(hidden, nll_gradient, ctx.needs_input_grad[1:])
        else:
            for gradient in gradients:
                if gradient is not None:
                    gradient.mul_(scale.to(gradient.dtype))
        return None, *gradients

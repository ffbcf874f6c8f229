"""Losses of the visual tokenizer: perceptual, adversarial and semantic distillation."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dualtoken.perceptual import PerceptualConfig, describe, load_lpips


def semantic_distillation_loss(student: Tensor, teacher: Tensor, mse_weight: float = 1.0) -> Tensor:
    """Return ``mse_weight * MSE - cosine`` of two feature tensors, a scalar (arXiv 2503.14324, 3.2).

    Args:
        student: features ``[..., C]`` with gradient.
        teacher: features of the frozen initial model, same shape.
        mse_weight: 1 in the joint phase; 0 leaves the cosine alone.

    Raises:
        ValueError: if the shapes differ.
    """
    if student.shape != teacher.shape:
        raise ValueError(
            f"student features {tuple(student.shape)} and teacher features {tuple(teacher.shape)} differ; "
            "both must come from the same layer of the same backbone"
        )
    student, teacher = student.float(), teacher.float()
    cosine = F.cosine_similarity(student, teacher, dim=-1).mean()
    if mse_weight == 0:
        return -cosine
    return mse_weight * F.mse_loss(student, teacher) - cosine


def hinge_discriminator_loss(real_logits: Tensor, fake_logits: Tensor) -> Tensor:
    """Return the hinge loss of the discriminator, ``(E[relu(1 - D(x))] + E[relu(1 + D(x_hat))]) / 2``."""
    return 0.5 * (F.relu(1.0 - real_logits.float()).mean() + F.relu(1.0 + fake_logits.float()).mean())


def generator_loss(fake_logits: Tensor) -> Tensor:
    """Return the generator's adversarial loss ``-E[D(x_hat)]``."""
    return -fake_logits.float().mean()


def last_layer_gradient(decoder_features: Tensor, kernel_shape: torch.Size, image_gradient: Tensor) -> Tensor:
    """Return the gradient of a loss with respect to the decoder's last convolution kernel (3x3, padding 1).

    The kernel's gradient follows from the loss's gradient at the *image*, so neither a second backward pass
    through the decoder nor access to a parameter that ZeRO may have partitioned is needed.

    Args:
        decoder_features: input of the last convolution, ``[B, C, H, W]``.
        kernel_shape: ``[3 * shuffle**2, C, k, k]``.
        image_gradient: gradient at the reconstruction, ``[B, 3, H, W]``; larger than the features by the
            decoder's pixel shuffle.
    """
    shuffle = image_gradient.shape[-1] // decoder_features.shape[-1]
    return torch.nn.grad.conv2d_weight(
        decoder_features.detach().float(),
        list(kernel_shape),
        F.pixel_unshuffle(image_gradient.float(), shuffle),
        padding=kernel_shape[-1] // 2,
    )


def adaptive_gan_weight(
    reconstruction_gradient: Tensor, gan_gradient: Tensor, minimum: float = 0.3, maximum: float = 10.0
) -> Tensor:
    """Return ``|grad(MSE + LPIPS)| / (|grad G| + 1e-4)`` clamped, a scalar (VQGAN, arXiv 2012.09841, eq. 7).

    Both gradients are those at the decoder's last kernel, averaged over all ranks beforehand, so that every
    rank uses the same weight.
    """
    weight = reconstruction_gradient.norm() / (gan_gradient.norm() + 1e-4)
    return weight.clamp(minimum, maximum)


class PerceptualLoss(nn.Module):
    """LPIPS (arXiv 1801.03924) between two image batches in [-1, 1], computed by the package ``lpips``."""

    def __init__(self, config: PerceptualConfig):
        super().__init__()
        self.model = load_lpips(config)
        self.source = describe(config)

    def train(self, mode: bool = True) -> PerceptualLoss:
        """Stay in eval mode: the network is a fixed measure."""
        return super().train(False)

    def forward(self, images: Tensor, targets: Tensor) -> Tensor:
        """Return the mean LPIPS distance of ``images`` and ``targets``, both ``[B, 3, H, W]``, a scalar."""
        return self.model(images, targets).mean()

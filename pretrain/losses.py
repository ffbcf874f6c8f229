"""Losses of the visual tokenizer: perceptual, adversarial and semantic distillation."""

from __future__ import annotations

import importlib.util
import warnings
from dataclasses import dataclass
from pathlib import Path
from urllib.error import URLError

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dualtoken.plain_tensors import read_tensors


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


@dataclass
class PerceptualConfig:
    """Which LPIPS network is used and where its trunk weights come from.

    ``trunk`` is a path to a state dict (torchvision's VGG16 / AlexNet, or a file of the package
    ``stlpips-pytorch``), ``torchvision`` (downloads on a connected machine), ``stlpips`` (the weights file of
    the installed package ``stlpips-pytorch``: a shift-tolerant relative of the published LPIPS), or
    ``none`` to run without perceptual loss.
    """

    net: str = "vgg"
    trunk: str = "torchvision"


class PerceptualLoss(nn.Module):
    """LPIPS (arXiv 1801.03924) between two image batches in [-1, 1], computed by the package ``lpips``."""

    def __init__(self, config: PerceptualConfig):
        super().__init__()
        import lpips

        if config.net not in ("vgg", "alex"):
            raise ValueError(f"perceptual_network.net is {config.net!r}; expected 'vgg' or 'alex'")
        downloaded = config.trunk == "torchvision"
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # lpips names torchvision's weights the old way
            try:
                self.model = lpips.LPIPS(net=config.net, pnet_rand=not downloaded, verbose=False)
            except URLError as error:
                raise ValueError(
                    f"perceptual_network.trunk=torchvision: the ImageNet weights of {config.net} cannot be "
                    f"downloaded ({error.reason}); give a path, or 'stlpips' (installed package) or 'none'"
                ) from error
        if not downloaded:
            load_perceptual_weights(self.model, perceptual_weights_path(config))
        self.source = f"LPIPS({config.net}), trunk from {config.trunk}"
        self.requires_grad_(False)
        self.eval()

    def train(self, mode: bool = True) -> PerceptualLoss:
        """Stay in eval mode: the network is a fixed measure."""
        return super().train(False)

    def forward(self, images: Tensor, targets: Tensor) -> Tensor:
        """Return the mean LPIPS distance of ``images`` and ``targets``, both ``[B, 3, H, W]``, a scalar."""
        return self.model(images, targets).mean()


def perceptual_weights_path(config: PerceptualConfig) -> Path:
    """Return the file that ``config.trunk`` names.

    Raises:
        ValueError: if there is no such file, or the package ``stlpips-pytorch`` is not installed.
    """
    if config.trunk == "stlpips":
        spec = importlib.util.find_spec("stlpips_pytorch")  # finds the folder without running its code
        if spec is None or not spec.submodule_search_locations:
            raise ValueError(
                "perceptual_network.trunk=stlpips, but the package is not installed; run "
                "`pip install --no-deps stlpips-pytorch`, give a path, or set trunk to none"
            )
        folder = Path(spec.submodule_search_locations[0]) / "weights/vST0.0"
        return folder / f"{config.net}_shift_tolerant.pth"
    path = Path(config.trunk)
    if not path.is_file():
        raise ValueError(
            f"perceptual_network.trunk={config.trunk}: no such file; give the path of a VGG16 or AlexNet "
            "state dict, 'torchvision' (downloads), 'stlpips' (installed package) or 'none'"
        )
    return path


def load_perceptual_weights(model: nn.Module, path: Path) -> None:
    """Copy trunk convolutions (and linear heads, where the file has them) into an ``lpips.LPIPS`` model.

    The files of torchvision and of ``stlpips-pytorch`` number their layers differently but hold the same
    convolutions in the same order, so they are matched by order, and every shape is checked.

    Raises:
        ValueError: if the file is refused (`read_tensors`), or the number of convolutions or a shape differs.
    """
    state = read_tensors(path)
    weights = [v for k, v in state.items() if k.endswith(".weight") and v.ndim == 4 and "lin" not in k]
    biases = [
        state[k.removesuffix("weight") + "bias"]
        for k, v in state.items()
        if k.endswith(".weight") and v.ndim == 4 and "lin" not in k
    ]
    convolutions = [m for m in model.net.modules() if isinstance(m, nn.Conv2d)]
    expected = [tuple(m.weight.shape) for m in convolutions]
    found = [tuple(w.shape) for w in weights]
    if found != expected:
        raise ValueError(
            f"{path}: convolutions {found} do not fit the perceptual network, which has {expected}"
        )
    with torch.no_grad():
        for convolution, weight, bias in zip(convolutions, weights, biases):
            convolution.weight.copy_(weight)
            convolution.bias.copy_(bias)
        for index, head in enumerate(model.lins):
            key = f"lin{index}.model.1.weight"
            if key in state:
                head.model[-1].weight.copy_(state[key])

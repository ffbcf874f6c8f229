"""LPIPS by the package `lpips`, its weights from a named place: training's loss and evaluation's figure."""

from __future__ import annotations

import importlib.util
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.error import URLError

import torch
from torch import nn

from dualtoken.plain_tensors import read_tensors


@dataclass
class PerceptualConfig:
    """Which LPIPS network is used and where its trunk weights come from.

    ``trunk`` is a path to a state dict (torchvision's VGG16 / AlexNet, or a file of the package
    ``stlpips-pytorch``), ``torchvision`` (downloads on a connected machine), ``stlpips`` (the weights file of
    the installed package ``stlpips-pytorch``: a shift-tolerant relative of the published LPIPS), or, in
    training, ``none`` to run without perceptual loss.
    """

    net: str = "vgg"
    trunk: str = "torchvision"


def load_lpips(config: PerceptualConfig) -> nn.Module:
    """Return LPIPS (arXiv 1801.03924), frozen, in eval mode, on the CPU.

    It takes two image batches ``[B, 3, H, W]`` in [-1, 1] and gives distances ``[B, 1, 1, 1]``.

    Raises:
        ValueError: if there is no such network, or no weights where ``config.trunk`` says.
    """
    import lpips

    if config.net not in ("vgg", "alex"):
        raise ValueError(f"perceptual_network.net is {config.net!r}; expected 'vgg' or 'alex'")
    downloaded = config.trunk == "torchvision"
    path = None if downloaded else perceptual_weights_path(config)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # lpips names torchvision's weights the old way
        try:
            model = lpips.LPIPS(net=config.net, pnet_rand=not downloaded, verbose=False)
        except URLError as error:
            raise ValueError(
                f"LPIPS trunk 'torchvision': the ImageNet weights of {config.net} cannot be "
                f"downloaded ({error.reason}); give a path, or 'stlpips' (installed package); a recipe's "
                "perceptual_network.trunk can be 'none'"
            ) from error
    if path is not None:
        load_perceptual_weights(model, path)
    return model.requires_grad_(False).eval()


def describe(config: PerceptualConfig) -> str:
    """The network and its weights in words, for logs and results."""
    return f"LPIPS({config.net}), trunk from {config.trunk}"


def perceptual_weights_path(config: PerceptualConfig) -> Path:
    """Return the file that ``config.trunk`` names.

    Raises:
        ValueError: if there is no such file, or the package ``stlpips-pytorch`` is not installed.
    """
    if config.trunk == "stlpips":
        spec = importlib.util.find_spec("stlpips_pytorch")  # finds the folder without running its code
        if spec is None or not spec.submodule_search_locations:
            raise ValueError(
                "LPIPS trunk 'stlpips', but the package is not installed; run "
                "`pip install --no-deps stlpips-pytorch` or give a path; a recipe's perceptual_network.trunk "
                "can be 'none'"
            )
        folder = Path(spec.submodule_search_locations[0]) / "weights/vST0.0"
        return folder / f"{config.net}_shift_tolerant.pth"
    path = Path(config.trunk)
    if not path.is_file():
        raise ValueError(
            f"LPIPS trunk {config.trunk}: no such file; give the path of a VGG16 or AlexNet "
            "state dict, 'torchvision' (downloads) or 'stlpips' (installed package); a recipe's "
            "perceptual_network.trunk can be 'none'"
        )
    return path


def load_perceptual_weights(model: Any, path: Path) -> None:
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
    convolutions: list[Any] = [m for m in model.net.modules() if isinstance(m, nn.Conv2d)]
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

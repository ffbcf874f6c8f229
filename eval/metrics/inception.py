"""The Inception network of FID, from its published weights: pictures to 2048 features."""

import hashlib
import zipfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from torchvision.models.inception import (
    BasicConv2d,
    Inception3,
    InceptionA,
    InceptionAux,
    InceptionB,
    InceptionC,
    InceptionD,
    InceptionE,
)

from dualtoken.plain_tensors import read_tensors

SIDE = 299  # pixels
CLASSES = 1008  # of the TensorFlow graph of 2015-12-05
WEIGHTS = "pt_inception-2015-12-05-6726825d.pth"
ADVICE = (
    f"expected {WEIGHTS}, the state dict in pytorch-fid's release 'fid_weights' (torch-fidelity's "
    "weights-inception-2015-12-05-6726825d.pth is the same file)"
)
RESIZING_THREADS = 8


class FeatureExtractor(Protocol):
    """Turns pictures into the features that Fréchet distances compare."""

    name: str  # of the distance in tables: only Inception's is called FID
    dim: int  # channels C
    fingerprint: str  # of the weights

    def __call__(self, pictures: Sequence[np.ndarray]) -> Tensor:
        """Features [B, C], fp32 on the CPU, of uint8 pictures [H, W, 3], each of its own size."""
        ...


class _PoolsLikeTensorFlow:
    """TensorFlow leaves padding out of averages; torchvision's branch of the pool is made anew."""

    def _forward(self, x: Tensor) -> list[Tensor]:
        *others, _ = super()._forward(x)  # type: ignore[misc]
        return [*others, self.branch_pool(self._pool(x))]  # type: ignore[attr-defined]

    def _pool(self, x: Tensor) -> Tensor:
        return F.avg_pool2d(x, kernel_size=3, stride=1, padding=1, count_include_pad=False)


class _BlockA(_PoolsLikeTensorFlow, InceptionA): ...


class _BlockC(_PoolsLikeTensorFlow, InceptionC): ...


class _BlockE(_PoolsLikeTensorFlow, InceptionE): ...


class _LastBlockE(_BlockE):
    """The published graph takes the maximum here; FID's figures depend on it."""

    def _pool(self, x: Tensor) -> Tensor:
        return F.max_pool2d(x, kernel_size=3, stride=1, padding=1)


def _block_e(in_channels: int) -> InceptionE:
    return (_LastBlockE if in_channels == 2048 else _BlockE)(in_channels)


def fid_inception() -> Inception3:
    """Torchvision's InceptionV3 as the FID graph has it, its weights not initialised for use."""
    blocks = [BasicConv2d, _BlockA, InceptionB, _BlockC, InceptionD, _block_e, InceptionAux]
    return Inception3(CLASSES, aux_logits=False, init_weights=False, inception_blocks=blocks)


def resize(picture: np.ndarray) -> np.ndarray:
    """Resize uint8 [H, W, 3] to float32 [299, 299, 3] as clean-fid: each channel in floats, unrounded.

    Bicubic with antialias (arXiv 2104.11222, section 3); what it overshoots is cut off to [0, 255].
    """
    planes = [
        Image.fromarray(np.ascontiguousarray(plane))
        for plane in picture.astype(np.float32).transpose(2, 0, 1)
    ]
    resized = [plane.resize((SIDE, SIDE), Image.Resampling.BICUBIC) for plane in planes]
    return np.stack(resized, axis=-1).clip(0, 255)


class Inception:
    """Features behind the last average pool; see `FeatureExtractor`."""

    name = "FID"
    dim = 2048

    def __init__(self, network: Inception3, fingerprint: str, device: torch.device) -> None:
        network.fc = torch.nn.Identity()
        self.network = network.eval().requires_grad_(False).to(device)
        self.fingerprint, self.device = fingerprint, device
        self._threads = ThreadPoolExecutor(RESIZING_THREADS)  # PIL resizes outside Python's lock

    @torch.no_grad()
    def __call__(self, pictures: Sequence[np.ndarray]) -> Tensor:
        """Features [B, 2048], fp32 on the CPU, of uint8 pictures: [B, H, W, 3], or a list of [H, W, 3].

        Raises:
            ValueError: a picture has another shape or type.
        """
        for picture in pictures:
            if picture.ndim != 3 or picture.shape[2] != 3 or picture.dtype != np.uint8:
                raise ValueError(
                    f"got a picture of shape {picture.shape}, {picture.dtype}; expected uint8 [H, W, 3]"
                )
        resized = torch.from_numpy(np.stack(list(self._threads.map(resize, pictures))))
        pixels = resized.to(self.device).permute(0, 3, 1, 2)  # [B, 3, 299, 299]
        return self.network((pixels - 128) / 128).float().cpu()


def load_inception(path: str | Path, device: str | torch.device = "cpu") -> Inception:
    """Load FID's Inception from the state dict that pytorch-fid and torch-fidelity use.

    Raises:
        FileNotFoundError: there is no such file; nothing is downloaded, random weights are never used.
        ValueError: it is the TorchScript file, which would run code, or its weights are of another network.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(
            f"no Inception weights at {path}: {ADVICE}; FID by random weights means nothing"
        )
    if _is_torchscript(path):
        raise ValueError(
            f"{path} is refused: TorchScript is a program, and nothing in a file is run; {ADVICE}"
        )
    network = fid_inception()
    try:
        network.load_state_dict(read_tensors(path))
    except RuntimeError as error:
        reason = " ".join(str(error).partition(":\n")[2].split())[:200]
        raise ValueError(f"{path} holds the weights of another network ({reason}); {ADVICE}") from error
    return Inception(network, hashlib.sha256(path.read_bytes()).hexdigest(), torch.device(device))


def _is_torchscript(path: Path) -> bool:
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return any("/code/" in name for name in archive.namelist())

"""GPUs by the figures of the vendor's data sheets, none of them measured."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Gpu:
    """A kind of GPU and the systems it comes in.

    Attributes:
        memory: bytes, as the data sheet counts them.
        bf16: dense FLOP/s in bf16 with fp32 sums, by tensor cores.
        fp32: FLOP/s in fp32, without tensor cores (TF32 is off where codes are made).
        nvlink: bytes/s inside a node, in one direction: half of the data sheet's NVLink figure.
        adapter: bytes/s out of a node for each GPU, in one direction: the adapter that the vendor's own
            systems (DGX) have beside each GPU.
    """

    memory: float
    bf16: float
    fp32: float
    nvlink: float
    adapter: float


# NVIDIA's data sheets: A100 (DS-10031), H100 (SXM5), H200 (SXM), DGX B200; adapters of DGX A100, H100, B200.
GPUS = {
    "a100-40": Gpu(40e9, 312e12, 19.5e12, 300e9, 25e9),
    "a100-80": Gpu(80e9, 312e12, 19.5e12, 300e9, 25e9),
    "h100": Gpu(80e9, 989.5e12, 67e12, 450e9, 50e9),
    "h200": Gpu(141e9, 989.5e12, 67e12, 450e9, 50e9),
    "b200": Gpu(180e9, 2250e12, 75e12, 900e9, 50e9),
}
# Names as CUDA reports them; others, as of the slower PCIe cards, are not known here.
_REPORTED = {
    "NVIDIA A100-SXM4-40GB": "a100-40",
    "NVIDIA A100-SXM4-80GB": "a100-80",
    "NVIDIA H100 80GB HBM3": "h100",
    "NVIDIA H200": "h200",
    "NVIDIA B200": "b200",
}


def peak_flops(name: str, dtype: torch.dtype) -> float | None:
    """FLOP/s of a GPU as the data sheet has them; None where it is not known.

    Args:
        name: as `torch.cuda.get_device_name` gives it.
        dtype: that matrices are multiplied in.
    """
    kind = _REPORTED.get(name)
    if kind is None:
        return None
    return GPUS[kind].bf16 if dtype == torch.bfloat16 else GPUS[kind].fp32

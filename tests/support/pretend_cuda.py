"""Tensors that say they are on a GPU and compute on the CPU, to find what only a GPU would complain about.

Within `PretendCuda()` every factory given `device="cuda"`, and every `.to("cuda")`, makes such a tensor. An
operation that mixes them with CPU tensors is refused as CUDA would refuse it. What makes the host wait (a
value that Python reads, a shape that depends on values, a copy back) is counted where the project asks for
it. Forward passes only: autograd's backward asks the driver for the device. `CountWaits` counts the
same operations on CPU tensors, backward passes included, and the project's own calls that copy from the host
and wait until it is done (`torch.tensor(..., device=)`, `.to(device)`), wherever the tensor may be.
"""

import sys
import threading
from collections import Counter
from pathlib import Path

import pytest
import torch
import torch.nn.attention.varlen  # registers its operator
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

from dualtoken.unified_model.attention import loop_over_documents

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = tuple(str(ROOT / name) for name in ("dualtoken", "data_pipeline", "pretrain", "eval"))
aten = torch.ops.aten

# Their results, or the shapes of these, are read by the host.
WAITING = {
    aten._local_scalar_dense.default,
    aten.equal.default,
    aten.nonzero.default,
    aten.masked_select.default,
    aten.bincount.default,
    aten._unique2.default,
    aten.unique_dim.default,
    aten.repeat_interleave.Tensor,
}
INDEXING = {aten.index.Tensor, aten.index_put.default, aten.index_put_.default, aten._index_put_impl_.default}
COPIES = {aten._to_copy.default, aten.copy_.default, aten.lift_fresh.default, aten.clone.default}


class OnGPU(torch.Tensor):
    """A tensor that claims to be on `cuda:0`; its values are those of `elem`, on the CPU."""

    elem: torch.Tensor
    mode: "PretendCuda"  # the one that is open

    @staticmethod
    def __new__(cls, elem: torch.Tensor) -> "OnGPU":
        made = torch.Tensor._make_wrapper_subclass(
            cls, elem.shape, strides=elem.stride(), storage_offset=elem.storage_offset(), dtype=elem.dtype,
            device="cuda:0", requires_grad=elem.requires_grad,
        )  # fmt: skip
        made.elem = elem.detach() if elem.requires_grad else elem
        return made

    def __repr__(self, **_):
        return f"OnGPU({tuple(self.shape)}, {self.dtype})"

    def data_ptr(self) -> int:
        return self.elem.data_ptr()

    def tolist(self) -> list:
        self.mode.record_wait()
        return self.elem.tolist()

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        raise RuntimeError(f"{func} on a pretended GPU tensor outside of PretendCuda()")


class CountWaits(TorchDispatchMode):
    """While it is open, `waits` counts by `file:function` what would wait if all tensors were on a GPU.

    In the thread that opened it: what one beside it waits for, such as the one that decodes, stops nobody.
    """

    def __init__(self) -> None:
        super().__init__()
        self.waits: Counter[str] = Counter()
        self._patch = pytest.MonkeyPatch()

    def __enter__(self) -> "CountWaits":
        self._thread = threading.get_ident()
        for name in ("tolist", "cpu"):  # which ask nobody on the CPU
            own = getattr(torch.Tensor, name)
            self._patch.setattr(torch.Tensor, name, self._counted(own))
        self._patch.setattr(torch.Tensor, "to", self._counted(torch.Tensor.to, copies_and_waits))
        for name in ("tensor", "as_tensor"):
            self._patch.setattr(torch, name, self._counted(getattr(torch, name), made_on_device))
        return super().__enter__()

    def __exit__(self, *exception) -> None:
        super().__exit__(*exception)
        self._patch.undo()

    def _counted(self, method, copies=None):
        def counted(tensor, *args, **kwargs):
            own = sys._getframe(1).f_code.co_filename.startswith(PACKAGES)
            counts = copies is None or (own and copies(tensor, *args, **kwargs))
            if counts and threading.get_ident() == self._thread:
                self.record_wait()
            return method(tensor, *args, **kwargs)

        return counted

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if waits(func, args):
            self.record_wait()
        return func(*args, **(kwargs or {}))

    def record_wait(self) -> None:
        """Count a wait for the place in the project that is being run."""
        frame = sys._getframe(1)
        while frame is not None and not frame.f_code.co_filename.startswith(PACKAGES):
            frame = frame.f_back
        if frame is None:
            self.waits["elsewhere"] += 1
        else:
            path = Path(frame.f_code.co_filename).relative_to(ROOT)
            self.waits[f"{path}:{frame.f_code.co_qualname.removesuffix('.<locals>.<dictcomp>')}"] += 1


def waits(func, args) -> bool:
    """Whether an operation on GPU tensors makes the host wait for them."""
    return func in WAITING or (
        func in INDEXING and any(index is not None and index.dtype == torch.bool for index in args[1])
    )


def copies_and_waits(_tensor, *args, non_blocking=False, device=None, **_kwargs) -> bool:
    """Whether `Tensor.to` with these arguments, if it copies, waits until that is done."""
    names_device = device is not None or (args and isinstance(args[0], torch.device | str))
    return bool(names_device) and not (non_blocking or any(arg is True for arg in args))


def made_on_device(data, *_args, device=None, **_kwargs) -> bool:
    """Whether `torch.tensor` or `as_tensor` makes a tensor of numbers on a device, which is such a copy."""
    return device is not None and not isinstance(data, torch.Tensor)


class PretendCuda(CountWaits):
    """While it is open, `device="cuda"` works, and `waits` counts waits for the device."""

    def __init__(self) -> None:
        super().__init__()
        self._kernel = sdpa_kernel(SDPBackend.MATH)
        # Below this mode and never asked: with it torch does not look for a driver at `device="cuda"`.
        self._fake = FakeTensorMode()

    def __enter__(self) -> "PretendCuda":
        self._kernel.__enter__()
        self._fake.__enter__()
        OnGPU.mode = self
        return TorchDispatchMode.__enter__(self)

    def __exit__(self, *exception) -> None:
        TorchDispatchMode.__exit__(self, *exception)
        self._fake.__exit__(*exception)
        self._kernel.__exit__(*exception)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        tensors = [leaf for leaf in tree_flatten((args, kwargs))[0] if isinstance(leaf, torch.Tensor)]
        on_gpu = [tensor for tensor in tensors if isinstance(tensor, OnGPU)]
        on_cpu = [t for t in tensors if not isinstance(t, OnGPU) and t.device.type == "cpu"]
        target = torch.device(kwargs["device"]).type if kwargs.get("device") is not None else None
        if func in COPIES:
            to_gpu = target == "cuda" or (target is None and isinstance(args[0], OnGPU))
            source = args[1] if func is aten.copy_.default else args[0]
            if isinstance(source, OnGPU) and not to_gpu:
                self.record_wait()
        else:
            to_gpu = bool(on_gpu) or target == "cuda"
            for tensor in on_cpu if on_gpu else ():
                # Numbers may come from the CPU, and CUDA takes indices from there.
                is_index = func in INDEXING and tensor is not args[0] and not tensor.is_floating_point()
                if tensor.ndim and not is_index:
                    raise RuntimeError(f"{func}: expected all tensors on cuda:0, found {tensor.shape} on cpu")
            if on_gpu and waits(func, args):
                self.record_wait()
        if target == "cuda":
            kwargs["device"] = torch.device("cpu")
        plain_args, plain_kwargs = tree_map(_plain, (args, kwargs))
        with unset_fake_temporarily():
            call = varlen_kernel if func is torch.ops.torch_attn._varlen_attn.default else func
            result = call(*plain_args, **plain_kwargs)
        known = {id(tensor.elem): tensor for tensor in on_gpu}

        def wrapped(leaf):
            if not isinstance(leaf, torch.Tensor) or not to_gpu:
                return leaf
            return known.get(id(leaf)) if id(leaf) in known else OnGPU(leaf)

        return tree_map(wrapped, result)


def varlen_kernel(
    query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, is_causal=False, scale=None, window_size=None,
    enable_gqa=False, **rest,
):  # fmt: skip
    """The operator behind torch's `varlen_attn`: refuses what its kernel does, computes by the CPU twin."""
    assert query.dtype in (torch.float16, torch.bfloat16) and query.dtype == key.dtype == value.dtype
    assert query.ndim == 3 and query.is_contiguous() and query.shape[-1] % 8 == 0 and query.shape[-1] <= 256
    assert query.shape[1] == key.shape[1] or (enable_gqa and query.shape[1] % key.shape[1] == 0)
    assert cu_seq_q.dtype == cu_seq_k.dtype == torch.int32 and int(cu_seq_q[-1]) == len(query)
    assert type(max_q) is type(max_k) is int and max_q == max_k == int(cu_seq_q.diff().max())
    assert is_causal or list(window_size) == [-1, 0]
    q, k, v = (tensor.transpose(0, 1)[None] for tensor in (query, key, value))
    output = loop_over_documents(q, k, v, cu_seq_q, max_q, 0.0, scale)[0]
    return output, q.new_empty(0), q.new_empty(0)


def _plain(leaf):
    return leaf.elem if isinstance(leaf, OnGPU) else leaf


def cast_parameters(module: torch.nn.Module, dtype: torch.dtype) -> torch.nn.Module:
    """Cast a model's parameters and leave its buffers as they are, as DeepSpeed does."""
    for parameter in module.parameters():
        parameter.data = parameter.data.to(dtype)
    return module


def move_to_gpu(module: torch.nn.Module) -> torch.nn.Module:
    """Put a model's parameters and buffers on the pretended GPU."""
    for part in module.modules():
        for name, parameter in part._parameters.items():
            if parameter is not None:
                moved = torch.nn.Parameter(OnGPU(parameter.detach()), parameter.requires_grad)
                part._parameters[name] = moved
        for name, buffer in part._buffers.items():
            if buffer is not None:
                part._buffers[name] = OnGPU(buffer)
    return module

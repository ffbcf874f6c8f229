"""Calls of GPU-only kernels, checked without a GPU: doubles with the real signatures, DALI's own graph."""

import importlib.util
import sys
import types

import pytest
import torch
from transformers import AttentionInterface, AttentionMaskInterface

from data_pipeline.images.decoding import build_image_decoder
from dualtoken.unified_model import attention
from dualtoken.unified_model.attention import loop_over_documents, varlen_documents
from tests.test_data_pipeline.images.test_image_decoding import HAS_DALI
from tests.test_dualtoken.unified_model.test_attention import LENGTHS, tensors


def flash_attn_varlen_func(
    q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p=0.0, softmax_scale=None,
    causal=False, window_size=(-1, -1), softcap=0.0, alibi_slopes=None, deterministic=False,
    return_attn_probs=False, block_table=None,
):  # fmt: skip
    """The signature of flash-attn 2.8.3, the conditions its kernel checks, the result of the CPU twin."""
    for tensor in (q, k, v):
        assert tensor.ndim == 3 and tensor.dtype in (torch.float16, torch.bfloat16)
        assert tensor.stride(-1) == 1 and tensor.shape[-1] % 8 == 0 and tensor.shape[-1] <= 256
    assert q.dtype == k.dtype == v.dtype and q.shape[1] % k.shape[1] == 0 and k.shape == v.shape
    for borders, longest in ((cu_seqlens_q, max_seqlen_q), (cu_seqlens_k, max_seqlen_k)):
        assert borders.dtype == torch.int32 and borders.is_contiguous() and borders.device == q.device
        assert type(longest) is int and longest == int(borders.diff().max())
    assert causal and window_size == (-1, -1) and not return_attn_probs
    heads_first = [tensor.transpose(0, 1)[None] for tensor in (q, k, v)]
    return loop_over_documents(*heads_first, cu_seqlens_q, max_seqlen_q, dropout_p, softmax_scale)[0]


@pytest.mark.parametrize("heads, key_heads, scaling", [(4, 4, None), (4, 2, 0.5), (4, 1, None)])
def test_flash_attn_is_called_as_it_wants(monkeypatch, heads, key_heads, scaling):
    monkeypatch.setattr(attention, "flash_attn_varlen_func", flash_attn_varlen_func)
    query, key, value, borders = tensors(heads, key_heads, dtype=torch.bfloat16)
    arguments = (query, key, value, borders, max(LENGTHS), 0.0, scaling)
    results = []
    for function in (loop_over_documents, varlen_documents):
        output = function(*arguments)
        assert output.shape == (1, sum(LENGTHS), heads, 16)
        results.append([output, *torch.autograd.grad(output.float().square().sum(), (query, key, value))])
    for expected, got in zip(*results, strict=True):
        torch.testing.assert_close(got, expected, rtol=0, atol=0)


def test_flash_attn_is_chosen_where_it_is_installed(monkeypatch):
    installed = types.ModuleType("flash_attn")
    installed.flash_attn_varlen_func = flash_attn_varlen_func
    for interface in (AttentionInterface, AttentionMaskInterface):
        monkeypatch.setattr(interface, "register", lambda *_: None)
    for module, expected in ((installed, "flash-attn varlen"), (None, "torch varlen_attn")):
        monkeypatch.setitem(sys.modules, "flash_attn", module)
        spec = importlib.util.spec_from_file_location("attention_again", attention.__file__)
        again = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(again)
        monkeypatch.setattr(again, "_has_varlen_kernel", lambda query: True)
        assert again.describe("cpu", torch.bfloat16) == expected


@pytest.mark.skipif(not HAS_DALI, reason="DALI is not installed")
@pytest.mark.parametrize("fit", ["resize", "crop"])
def test_dali_decodes_on_the_ranks_gpu(fit, monkeypatch):
    """DALI checks the graph as it is defined; to build it, it would need the device."""
    import nvidia.dali as dali

    calls = []

    def recorded(module, name):
        own = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *a, **k: calls.append((name, k)) or own(*a, **k))

    recorded(dali.fn.decoders, "image")
    recorded(dali.fn, "resize")
    monkeypatch.setattr(dali.Pipeline, "build", lambda pipeline: None)
    decoder = build_image_decoder(64, "dali", device="cuda:1", fit=fit)
    pipeline = decoder._build()
    assert "DALI (mixed)" in decoder.describe() and pipeline.device_id == 1
    (_, decode), (_, resize) = calls
    assert decode["device"] == "mixed" and resize["size"] == [64, 64]
    (output,) = pipeline._graph_out
    assert output.device == "gpu"  # nothing goes back to the host between decoding and the model

"""Attention that stays within documents of a pack, registered with transformers as ``"document"``.

A decoder built with ``attn_implementation="document"`` and called with ``cu_seq_lens_q`` (the names
transformers uses for flash attention) treats its single row as several documents. On CUDA in half precision
this is one variable-length kernel, from flash-attn where it is installed and from torch otherwise;
elsewhere the documents are run one by one, which on CPU is several times faster than one masked attention
over the whole row. Where torch.compile traces and there is no such kernel, it is that masked attention.

Without ``cu_seq_lens_q`` it is scaled dot product attention with the mask it is given, as used for
generation. This file is the only one that imports flash-attn.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch.nn.attention.varlen import varlen_attn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import sdpa_mask

try:  # as this file is loaded, for an import inside a function would break the graphs of torch.compile
    from flash_attn import flash_attn_varlen_func
except ImportError:
    flash_attn_varlen_func = None

DOCUMENT_ATTENTION = "document"
"""The name to pass as ``attn_implementation``."""


def document_attention(
    module: torch.nn.Module,
    query: torch.Tensor,  # [B, heads, T, head_dim]
    key: torch.Tensor,  # [B, key heads, S, head_dim]
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    cu_seq_lens_q: torch.Tensor | None = None,
    max_length_q: int | None = None,
    sliding_window: int | None = None,
    s_aux: torch.Tensor | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Attend causally, within documents if `cu_seq_lens_q` tells their borders.

    Returns:
        The output [B, T, heads, head_dim], and None in place of attention weights.

    Raises:
        ValueError: if documents come with more than one row or a mask, anything exceeds a sliding window, or
            the decoder has attention sinks (`s_aux`).
    """
    if s_aux is not None:
        raise ValueError(
            f"{type(module).__name__} has attention sinks, which this attention leaves out; take a decoder "
            "without them, such as Qwen2.5"
        )
    if cu_seq_lens_q is None:
        _require_window(key.shape[2], sliding_window)
        return _masked(query, key, value, attention_mask, dropout, scaling), None
    if query.shape[0] != 1 or attention_mask is not None:
        raise ValueError(
            f"packed documents come as one row without a mask, got {query.shape[0]} rows"
            f"{' and a mask' if attention_mask is not None else ''}; put all documents into one PackedBatch"
        )
    longest = max_length_q if max_length_q is not None else int(cu_seq_lens_q.diff().max())
    _require_window(longest, sliding_window)
    if not _has_varlen_kernel(query) and torch.compiler.is_compiling():
        # Lengths that the host reads would break the graph.
        mask = same_document(cu_seq_lens_q, query.shape[2])
        return _masked(query, key, value, mask, dropout, scaling), None
    attend = varlen_documents if _has_varlen_kernel(query) else loop_over_documents
    return attend(query, key, value, cu_seq_lens_q, longest, dropout, scaling), None


def same_document(cu_seqlens: torch.Tensor, length: int) -> torch.Tensor:
    """Which positions each one of a row sees, itself and those before it in its document: [T, T] bool."""
    places = torch.arange(length, device=cu_seqlens.device)
    document = torch.bucketize(places, cu_seqlens, right=True)
    return (document[:, None] == document) & (places[:, None] >= places)


def loop_over_documents(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    cu_seqlens: torch.Tensor,
    max_seqlen: int,
    dropout: float,
    scaling: float | None,
) -> torch.Tensor:
    """Run causal attention one document at a time: [1, heads, T, head_dim] -> [1, T, heads, head_dim]."""
    lengths = cu_seqlens.diff().tolist()
    outputs = [
        F.scaled_dot_product_attention(
            q,
            k,
            v,
            dropout_p=dropout,
            is_causal=True,
            scale=scaling,
            enable_gqa=query.shape[1] != key.shape[1],
        )
        for q, k, v in zip(
            query.split(lengths, dim=2), key.split(lengths, dim=2), value.split(lengths, dim=2), strict=True
        )
    ]
    return torch.cat(outputs, dim=2).transpose(1, 2)


def varlen_documents(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    cu_seqlens: torch.Tensor,
    max_seqlen: int,
    dropout: float,
    scaling: float | None,
) -> torch.Tensor:
    """Run one variable-length CUDA kernel over all documents; shapes as `loop_over_documents`."""
    q, k, v = (
        tensor[0].transpose(0, 1).contiguous() for tensor in (query, key, value)
    )  # [T, heads, head_dim]
    if flash_attn_varlen_func is not None:
        output = flash_attn_varlen_func(
            q,
            k,
            v,
            cu_seqlens,
            cu_seqlens,
            max_seqlen,
            max_seqlen,
            dropout,
            softmax_scale=scaling,
            causal=True,
        )
    else:
        if dropout:
            raise ValueError(
                f"attention dropout {dropout} on CUDA needs flash-attn: pip install 'dualtoken[cuda]', "
                "or set attention_dropout to 0 in the text_config"
            )
        output = varlen_attn(  # type: ignore[assignment]
            q, k, v, cu_seqlens, cu_seqlens, max_seqlen, max_seqlen,
            scale=scaling, window_size=(-1, 0), enable_gqa=q.shape[1] != k.shape[1],
        )  # fmt: skip
    return output[None]


def describe(device: torch.device | str, dtype: torch.dtype) -> str:
    """Say in a few words which implementation packed documents run on, for start-up messages."""
    if not _has_varlen_kernel(torch.empty(0, device=device, dtype=dtype)):
        return "scaled dot product attention, document by document"
    return "flash-attn varlen" if flash_attn_varlen_func is not None else "torch varlen_attn"


def _require_window(longest: int, sliding_window: int | None) -> None:
    if sliding_window is not None and longest > sliding_window:
        raise ValueError(
            f"a document of {longest} tokens exceeds the decoder's sliding window of {sliding_window}; "
            "set use_sliding_window=False in its text_config, or sliding_window=None where it lacks that"
        )


def _masked(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    dropout: float,
    scaling: float | None,
) -> torch.Tensor:
    length, seen = query.shape[2], key.shape[2]
    if length == 1:
        # One position sees all that its mask leaves, so the heads that share a key can be its queries: no
        # kernel has to know groups of heads, and those that do not are the faster ones under a mask.
        shared = query.reshape(len(query), key.shape[1], -1, query.shape[3])
        output = F.scaled_dot_product_attention(shared, key, value, mask, dropout, scale=scaling)
        return output.reshape(len(query), 1, query.shape[1], -1)
    causal = mask is None
    if causal and seen > length:
        # The kernel's own causal mask starts at the first key; with a cache the queries are the last
        # positions.
        mask = torch.ones(length, seen, dtype=torch.bool, device=query.device).tril(seen - length)
        causal = False
    output = F.scaled_dot_product_attention(
        query, key, value, attn_mask=mask, dropout_p=dropout, is_causal=causal, scale=scaling,
        enable_gqa=query.shape[1] != key.shape[1],
    )  # fmt: skip
    return output.transpose(1, 2)


def _has_varlen_kernel(query: torch.Tensor) -> bool:
    return query.is_cuda and query.dtype in (torch.float16, torch.bfloat16)


def _document_mask(**kwargs: Any) -> torch.Tensor | None:
    """Need no mask where nothing is padded; where something is, a full one."""
    return None if kwargs.get("attention_mask") is None else sdpa_mask(**kwargs)


AttentionInterface.register(DOCUMENT_ATTENTION, document_attention)
AttentionMaskInterface.register(DOCUMENT_ATTENTION, _document_mask)

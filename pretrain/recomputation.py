"""Activation checkpointing of a language model's layers: in full, or of what is cheap to compute again."""

from __future__ import annotations

from functools import partial
from typing import Any, Literal

from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts
from transformers import PreTrainedModel

Kept = Literal["nothing", "products"]

# Matrix products and attention, by every kernel that `dualtoken.unified_model.attention` may come to.
PRODUCTS = {
    "aten::mm",
    "aten::addmm",
    "aten::bmm",
    "aten::_scaled_dot_product_flash_attention",
    "aten::_scaled_dot_product_flash_attention_for_cpu",
    "aten::_scaled_dot_product_efficient_attention",
    "aten::_scaled_dot_product_cudnn_attention",
    "torch_attn::_varlen_attn",
    "flash_attn::_flash_attn_varlen_forward",
}


def checkpoint_activations(model: PreTrainedModel, kept: Kept = "nothing") -> None:
    """Let each layer keep its input, and compute the rest again in the backward pass.

    Args:
        model: with layers of transformers' `GradientCheckpointingLayer`.
        kept: "nothing" more; or "products", the results of matrix products and attention too: what is
            computed again are norms, activations and sums, which take little but bandwidth.
    """
    settings: dict[str, Any] = {"use_reentrant": False}
    if kept == "products":
        settings["context_fn"] = partial(create_selective_checkpoint_contexts, keep_products)
    model.activation_checkpointing_enable(settings)


def keep_products(_context: Any, operator: Any, *_args: Any, **_kwargs: Any) -> CheckpointPolicy:
    """Keep what `PRODUCTS` names; a policy of `create_selective_checkpoint_contexts`."""
    return CheckpointPolicy.MUST_SAVE if operator.name() in PRODUCTS else CheckpointPolicy.PREFER_RECOMPUTE

"""Sequence parallelism by DeepSpeed's Ulysses (arXiv 2309.14509): the ranks of a group share each pack.

Between the decoder's attentions a rank holds its stretch of the row with all heads, inside them the whole row
with its share of the heads; all-to-alls turn one into the other. So activations are a stretch's alone, and
attention is what it is on one rank. To ZeRO every rank is one of its own: losses are sums, and so are
gradients, whichever rank a target fell to.

Shapes: B = 1 row, T tokens of a pack, S ranks of a group.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface

from data_pipeline.errors import DatasetError
from dualtoken.unified_model.attention import document_attention
from dualtoken.unified_model.model import DualTokenForCausalLM
from dualtoken.unified_model.sequence import PackedBatch
from pretrain.config import ConfigError

ULYSSES_ATTENTION = "document_ulysses"
"""The name of the `attn_implementation`, known to transformers after `share_attention`."""


def own_stretch(length: int, size: int) -> tuple[int, int]:
    """First place, and the one behind the last, this rank's of a row of `length` shared by `size`."""
    own = length // size
    start = dist.get_rank() % size * own
    return start, start + own


def share_attention(model: DualTokenForCausalLM, size: int) -> None:
    """Let the decoder's attention share rows with the other ranks of a group, in training and validation.

    Every rank has to call; the first group is ranks 0 to S - 1. Rows are to be of a multiple of S tokens, and
    the model to be called with `own_stretch` of them.

    Args:
        model: not yet wrapped by DeepSpeed.
        size: S.

    Raises:
        ConfigError: the model reads continuous features; see `require_shareable`.
    """
    from deepspeed.runtime.sequence_parallel.ulysses_sp import UlyssesSPAttentionHF

    if model.config.reads_features:
        raise ConfigError(
            f"sequence_parallel_size={size} with visual_input={model.config.visual_input!r}: packs with "
            "continuous features cannot be shared; expected a model of codes alone, or "
            "sequence_parallel_size=1"
        )
    text = model.decoder_config
    require_shareable(text, size)
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    group, _ = dist.new_subgroups(size)
    ulysses = UlyssesSPAttentionHF(
        attn=document_attention,
        batch_size=1,
        attn_head_count=text.num_attention_heads,
        attn_head_size=head_dim,
        kv_head_count=text.num_key_value_heads,
        num_hidden_layers=text.num_hidden_layers,
        process_group=group,
        seq_length_is_variable=True,
    )

    def attend(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: None, **kwargs: Any
    ) -> tuple[Tensor, None]:
        if "position_ids" not in kwargs or value.shape[3] != head_dim:
            raise ConfigError(
                f"sequence_parallel_size={size}: {type(module).__name__} hands on no positions, or values of "
                f"{value.shape[3]} dimensions in heads of {head_dim}, as DeepSpeed's Ulysses cannot share; "
                "take a decoder such as Qwen2.5, or sequence_parallel_size=1"
            )
        output, _ = ulysses(module, query, key, value, attention_mask, **kwargs)
        return output, None

    AttentionInterface.register(ULYSSES_ATTENTION, attend)
    AttentionMaskInterface.register(ULYSSES_ATTENTION, lambda **_: None)
    model.llm.set_attn_implementation(ULYSSES_ATTENTION)


def require_shareable(text_config: Any, size: int) -> None:
    """Raise ConfigError unless attention of a decoder can be shared by `size` ranks."""
    heads, key_values = text_config.num_attention_heads, text_config.num_key_value_heads
    if heads % size or (key_values % size and size % key_values):
        raise ConfigError(
            f"sequence_parallel_size={size}: the decoder has {heads} heads, {key_values} of keys and values; "
            f"expected a number that divides {heads}, and divides {key_values} or is a multiple of it"
        )
    parameters = getattr(text_config, "rope_parameters", None) or {}
    kinds = [parameters, *(of_layers for of_layers in parameters.values() if isinstance(of_layers, dict))]
    changing = {"dynamic", "longrope"} & {kind.get("rope_type") for kind in kinds}
    if changing:
        raise ConfigError(
            f"sequence_parallel_size={size}: rotary positions of the decoder are {changing.pop()!r}, which "
            "turn by the largest position that a rank sees; expected default, linear, yarn or llama3"
        )


def pack_difference(batches: Sequence[PackedBatch], size: int) -> float:
    """A number whose sum over a group is 0 if its ranks have the same packs, which are still on the CPU.

    Ranks of a group read the same stream; one that left out a sample that the others could read would mix
    its documents with theirs from there on, and nothing else would show it.
    """
    checksum = 0
    for batch in batches:
        for tensor in (batch.input_ids, batch.codes):
            checksum = zlib.crc32(tensor.contiguous().numpy(), checksum)
    return float(checksum * (size - 1 if dist.get_rank() % size == 0 else -1))


def require_same_packs(difference: float) -> None:
    """Raise DatasetError unless the sum of all ranks' `pack_difference` is 0."""
    if difference:
        raise DatasetError(
            "ranks that share packs read different ones, whose documents would be mixed up: one may have "
            "left out a sample that another could read; go on from the last checkpoint, with "
            "data.on_bad_sample=stop to be told which"
        )

"""Bytes kept from the forward to the backward pass: estimates, compared with what autograd saves.

After Korthikanti et al. (arXiv 2205.05198, section 4), for the layers used here and attention that keeps no
scores: what each operation reads is kept once. Convolutional networks are run on the meta device.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import SiglipVisionConfig

from pretrain.budget import FP32
from pretrain.flops import learns


def decoder_layer_activations(text_config: Any, weight: int) -> float:
    """Bytes that a layer of a LLaMA-like decoder keeps for each token from forward to backward pass.

    Two norms compute in fp32 (one input in fp32; two vectors in the model's type), queries, keys, values and
    the attention's output twice, four vectors of the gated MLP, a log-sum for each head.
    """
    hidden, heads = text_config.hidden_size, text_config.num_attention_heads
    head_dim = getattr(text_config, "head_dim", None) or hidden // heads
    key_values = text_config.num_key_value_heads * head_dim
    norms = 2 * (FP32 * hidden + 2 * weight * hidden + FP32)
    attended = weight * (3 * heads * head_dim + 2 * key_values + 2 * head_dim) + FP32 * heads
    return norms + attended + 4 * weight * text_config.intermediate_size


def decoder_layer_products(text_config: Any, weight: int) -> float:
    """Bytes that a layer keeps for each token besides its input if it keeps its products alone.

    Those of `pretrain.recomputation`: queries, keys, values, the attention's output with a log-sum for each
    head, its projection, three of the gated MLP.
    """
    hidden, heads = text_config.hidden_size, text_config.num_attention_heads
    head_dim = getattr(text_config, "head_dim", None) or hidden // heads
    vectors = 2 * heads * head_dim + 2 * text_config.num_key_value_heads * head_dim + 2 * hidden
    return weight * (vectors + 2 * text_config.intermediate_size) + FP32 * heads


def encoder_layer_activations(config: Any, weight: int) -> float:
    """Bytes that a layer of SigLIP keeps for each position from forward to backward pass."""
    vectors = 8 * config.hidden_size + 2 * config.intermediate_size
    return weight * vectors + FP32 * config.num_attention_heads


def encoder_layer_products(config: Any, weight: int) -> float:
    """Bytes that such a layer keeps for each position besides its input if it keeps its products alone."""
    return weight * (6 * config.hidden_size + config.intermediate_size) + FP32 * config.num_attention_heads


def feature_activations(
    model: Any, patches: float, positions: float, weight: int, checkpoints: bool, keeps_products: bool
) -> float:
    """Bytes kept of continuous features: by the vision tower's layers, where they learn, and the adapter.

    Args:
        model: the unified model, with a feature adapter.
        patches: features, of all pictures and tiles.
        positions: of features in the sequence, ends of rows among them.
        weight: bytes of a weight.
        checkpoints: whether the layers are checkpointed.
        keeps_products: what checkpointed layers keep, as of `pretrain.recomputation`.
    """
    adapter, tower = model.feature_adapter.up, model.vision_tower
    kept = positions * weight * (adapter.in_features + 2 * adapter.out_features)
    if tower is None:
        return kept
    config = SiglipVisionConfig(**tower.settings)
    layer = patches * encoder_layer_activations(config, weight)
    if not learns(tower):
        return kept + layer  # of the one that runs
    layers = config.num_hidden_layers
    if not checkpoints:
        return kept + layers * layer
    products = encoder_layer_products(config, weight) if keeps_products else 0.0
    return kept + layers * patches * (config.hidden_size * weight + products) + layer


def projection_activations(wide: int, narrow: int, weight: int, widens: bool, attends: bool = True) -> float:
    """Bytes that an `AttentionProjection` keeps for each position from forward to backward pass."""
    inner, outer = (narrow, wide) if widens else (wide, narrow)
    if not attends:
        return weight * (2 * inner + 11 * outer)
    attended = 4 * wide + (0 if widens else outer)
    return weight * (3 * inner + attended + 11 * outer) + FP32 * (wide // narrow)


def head_chunk_bytes(
    chunk: int, depth: int, width: int, inner: int, layers: int, codes: int, weight: int
) -> float:
    """Bytes alive while a visual head scores a chunk of positions: activations, and logits of a depth.

    Logits are fp32 with their gradient in the model's type beside them.
    """
    return chunk * depth * layers * weight * (9 * width + 2 * inner) + logits_bytes(chunk, codes, weight)


def logits_bytes(chunk: int, classes: int, weight: int) -> float:
    """Bytes of a chunk's logits: fp32, and their gradient in the model's type beside them."""
    return float(chunk * classes * (FP32 + weight))


def kept_bytes(module: nn.Module, run: Callable[[], Any]) -> float:
    """Bytes that autograd keeps of a run of a module besides its parameters; the meta device will do.

    For networks without attention of their own: on the meta device attention keeps its scores.
    """
    own = {parameter.untyped_storage()._cdata for parameter in module.parameters()}
    kept: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage()._cdata not in own:
            kept[tensor.untyped_storage()._cdata] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        result = run()
    del result
    return float(sum(tensor.untyped_storage().nbytes() for tensor in kept.values()))


def tokenizer_activations(model: Any, weight: int, paint: bool) -> tuple[float, float]:
    """Bytes that a picture keeps, and with the tower's layers and the decoder's levels checkpointed."""
    config, vision = model.config, model.backbone.vision_model
    positions, width, dim = config.positions, config.vision.hidden_size, config.codebook_dim
    layer = positions * encoder_layer_activations(config.vision, weight)
    passes, deep, kept, pixel = learns(vision.embeddings), False, 0, False
    for number, block in enumerate(vision.encoder.layers, start=1):
        passes = passes or learns(block)
        kept += passes
        pixel = pixel or (passes and number == config.reconstruction_layer)
        if number == config.semantic_layer:
            passes = deep = passes or learns(model.prequant_semantic) or learns(model.postquant_semantic)
    semantic = [model.prequant_semantic, model.postquant_semantic]
    projections = semantic if deep else []
    pixels = [p for name, p in model.named_children() if name in ("prequant_pixel", "prequant_shortcut")]
    pixel = pixel or any(learns(p) for p in pixels)
    projections += pixels if pixel else []
    paint = paint and (pixel or learns(model.postquant_pixel) or learns(model.decoder))
    projections += [model.postquant_pixel] if paint else []
    other = sum(
        positions * projection_activations(width, dim, weight, p.proj.out_features == width, p.attend)
        for p in projections
    )
    whole, checkpointed = (
        kept * layer + other,
        kept * positions * width * weight + min(kept, 1) * layer + other,
    )
    if paint:
        size = config.latent_size
        x = torch.empty(1, width, size, size, device="meta", dtype=model.dtype, requires_grad=True)
        decoder = model.decoder
        blocks = [
            model.post_quant_conv,
            decoder.conv_in,
            decoder.mid,
            *reversed(decoder.up),
            decoder.conv_out,
        ]
        sizes, inputs = [], 0.0
        for block in blocks:
            sizes.append(kept_bytes(block, lambda block=block, x=x: block(x)))
            inputs += x.numel() * weight
            with torch.no_grad():
                x = block(x)
            x.requires_grad_()
        whole += sum(sizes)
        checkpointed += inputs + max(sizes)
    return whole, checkpointed

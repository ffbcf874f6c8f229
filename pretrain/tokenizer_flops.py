"""Floating-point operations of a step of the visual tokenizer and of SigLIP, per picture; rules of `flops`.

Convolutional networks are run once on the meta device, where only shapes exist, to learn how many positions
each convolution gives out.

Shapes: P positions of a picture, K codes, E dimensions of a code vector, D depths.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from dualtoken.visual_tokenizer.loading import VisualTokenizer
from dualtoken.visual_tokenizer.model import DualTokenVisualTokenizer
from dualtoken.visual_tokenizer.pixel_decoder import SpatialAttention
from dualtoken.visual_tokenizer.vq_tokenizer import VQTokenizer
from pretrain.flops import Chain, Flops, attention, learns, matmul, run_projection


def run_convolutions(
    chain: Chain, part: str, network: nn.Module, run: Callable[[], Any], times: float = 1
) -> None:
    """Add the convolutions and spatial attentions of a network on the meta device, as `run` calls it."""
    found: list[tuple[Flops, bool]] = []

    def note(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        if isinstance(module, nn.Conv2d):
            kernel = module.kernel_size[0] * module.kernel_size[1] * module.in_channels // module.groups
            positions = output.numel() // module.out_channels
            found.append((matmul(positions, kernel, module.out_channels), learns(module)))
        else:
            batch, channels, height, width = inputs[0].shape
            found.append((attention(batch * (height * width) ** 2, channels), False))

    hooks = [
        module.register_forward_hook(note)
        for module in network.modules()
        if isinstance(module, nn.Conv2d | SpatialAttention)
    ]
    with torch.no_grad():
        run()
    for hook in hooks:
        hook.remove()
    for flops, trained in found:
        chain.run(part, flops * times, trained)


def encode_flops(model: VisualTokenizer) -> float:
    """FLOPs of turning a picture into codes; `model` is on the meta device."""
    if isinstance(model, VQTokenizer):
        config = model.config
        picture = torch.empty(1, 3, config.image_size, config.image_size, device="meta")
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            model.latents(picture)
        search = matmul(config.positions, config.codebook_dim, config.codebook_size)
        return counter.get_total_flops() + search.forward
    chain = Chain()
    _run_encoder(chain, model)
    return sum(flops.forward for flops in chain.parts.values())


def tokenizer_flops(
    model: DualTokenVisualTokenizer, paint: bool, caption_tokens: int = 0
) -> dict[str, Flops]:
    """FLOPs of a training step of the tokenizer for a picture, by part; without its losses' networks.

    Args:
        model: on the meta device, frozen as the phase has it.
        paint: whether a loss reads the picture; else the decoder does not run.
        caption_tokens: tokens of its caption where the contrastive loss is on.
    """
    chain = Chain()
    config, vision = model.config, model.backbone.vision_model
    pixel, semantic = _run_encoder(chain, model)
    positions, width = config.positions, config.vision.hidden_size
    pairs = positions**2
    if paint:
        run_projection(pixel, "projections", model.postquant_pixel, positions, pairs, width)
        size = config.latent_size
        grid = torch.empty(1, width, size, size, device="meta", dtype=model.dtype)
        latents = torch.empty(1, config.decoder_in_channels, size, size, device="meta", dtype=model.dtype)
        run_convolutions(pixel, "pixel_decoder", model.post_quant_conv, lambda: model.post_quant_conv(grid))
        run_convolutions(pixel, "pixel_decoder", model.decoder, lambda: model.decoder(latents))
    run_projection(semantic, "projections", model.postquant_semantic, positions, pairs, width)
    for layer in vision.encoder.layers[config.semantic_layer :]:
        run_encoder_layer(semantic, "vision_tower", layer, positions, width)
    run_pooling_head(semantic, "vision_tower", vision.head, positions, width)
    if caption_tokens:
        run_text_tower(Chain(parts=chain.parts), model.backbone.text_model, caption_tokens)
    return chain.parts


def tokenizer_step_flops(
    model: DualTokenVisualTokenizer,
    paint: bool,
    caption_tokens: int = 0,
    perceptual_net: str | None = None,
    discriminator: nn.Module | None = None,
) -> dict[str, Flops]:
    """FLOPs of a training step of the tokenizer for a picture, by part, its losses' networks among them.

    Args:
        model: on the meta device, frozen as the phase has it.
        paint: whether a loss reads the picture.
        caption_tokens: tokens of its caption where the contrastive loss is on.
        perceptual_net: trunk of LPIPS where that is a loss.
        discriminator: on the meta device, where there is one.
    """
    flops, visual = tokenizer_flops(model, paint, caption_tokens), model.config
    tower = model.backbone.vision_model
    flops["teacher"] = teacher_flops(tower, visual.positions, visual.vision.hidden_size)
    if perceptual_net is not None:
        flops["perceptual"] = perceptual_flops(perceptual_net, visual.reconstruction_size)
    if discriminator is not None:
        flops["discriminator"] = discriminator_flops(discriminator, visual.reconstruction_size)
    return flops


def teacher_flops(vision: nn.Module, positions: int, width: int) -> Flops:
    """FLOPs of the frozen tower's forward pass for a picture."""
    chain = Chain()
    run_vision_tower(chain, vision, positions, positions, width)
    return Flops(chain.parts["vision_tower"].forward)


def siglip_flops(siglip: nn.Module, kept: int, captions: int, caption_tokens: int) -> dict[str, Flops]:
    """FLOPs of a contrastive step for a picture, `kept` of whose positions the tower reads, by tower.

    The products of all pictures with all captions in the loss are left out.
    """
    vision = siglip.config.vision_config
    chain = Chain()
    positions = (vision.image_size // vision.patch_size) ** 2
    run_vision_tower(chain, siglip.vision_model, positions, kept, vision.hidden_size)
    text = Chain(parts=chain.parts)
    run_text_tower(text, siglip.text_model, caption_tokens, captions)
    return chain.parts


def perceptual_flops(net: str, size: int) -> Flops:
    """FLOPs of LPIPS between a picture and its target, with the gradient at the picture.

    Its one-channel maps behind the trunk are left out, under a thousandth.
    """
    trunk, picture = perceptual_network(net).net, torch.empty(1, 3, size, size, device="meta")
    chain = Chain(learns_below=True)
    run_convolutions(chain, "perceptual", trunk, lambda: trunk(picture))
    both = chain.parts["perceptual"]
    return Flops(2 * both.forward, both.to_input)


def perceptual_network(net: str) -> nn.Module:
    """LPIPS on the meta device, frozen."""
    import lpips

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # lpips names torchvision's weights the old way
        with torch.device("meta"):
            network = lpips.LPIPS(net=net, pretrained=False, pnet_rand=True, verbose=False)
    return network.to("meta").requires_grad_(False)  # its constants are made on the CPU in any case


def discriminator_flops(discriminator: nn.Module, size: int) -> Flops:
    """FLOPs for a picture: the generator's gradient through it, and its own step on picture and target."""
    picture = torch.empty(1, 3, size, size, device="meta")
    through, own = Chain(learns_below=True), Chain()
    frozen = copy.deepcopy(discriminator).requires_grad_(False)
    run_convolutions(through, "discriminator", frozen, lambda: frozen(picture))
    run_convolutions(own, "discriminator", discriminator, lambda: discriminator(picture), times=2)
    return through.parts["discriminator"] + own.parts["discriminator"]


def _run_encoder(chain: Chain, model: DualTokenVisualTokenizer) -> tuple[Chain, Chain]:
    """Add tower, projections and codebook searches; return the chains behind the two quantizers."""
    config, vision = model.config, model.backbone.vision_model
    positions, width, pairs = config.positions, config.vision.hidden_size, config.positions**2
    _run_patches(chain, vision, positions)
    taps = {0: chain.fork()}
    for number, layer in enumerate(vision.encoder.layers[: config.semantic_layer], start=1):
        run_encoder_layer(chain, "vision_tower", layer, positions, width)
        taps[number] = chain.fork()
    searched = config.codebook_dim * config.codebook_size * positions
    search = Flops(2.0 * searched * (config.num_quantizers if config.quantizer == "rvq" else 1))
    semantic = taps[config.semantic_layer]
    run_projection(semantic, "projections", model.prequant_semantic, positions, pairs, width)
    semantic.run("codebook_search", search)
    if config.merged_codebook:
        return semantic.fork(), semantic
    pixel = taps[config.reconstruction_layer].fork()
    if config.pixels_of_patches_alone:
        _run_patches(pixel, vision, positions)  # once more, without their positions
    run_projection(pixel, "projections", model.prequant_pixel, positions, pairs, width)
    if config.shortcut_layer is not None:
        shortcut = taps[config.shortcut_layer].fork()
        run_projection(shortcut, "projections", model.prequant_shortcut, positions, pairs, width)
        pixel.learns_below = pixel.learns_below or shortcut.learns_below
    pixel.run("codebook_search", search)
    return pixel, semantic


def run_vision_tower(chain: Chain, vision: nn.Module, positions: int, kept: int, width: int) -> None:
    """Add a whole tower that reads `kept` of a picture's positions, with its pooling head."""
    _run_patches(chain, vision, positions)
    for layer in vision.encoder.layers:
        run_encoder_layer(chain, "vision_tower", layer, kept, width)
    run_pooling_head(chain, "vision_tower", vision.head, kept, width)


def _run_patches(chain: Chain, vision: nn.Module, positions: int) -> None:
    patches = vision.embeddings.patch_embedding
    inputs = patches.in_channels * patches.kernel_size[0] * patches.kernel_size[1]
    chain.run("vision_tower", matmul(positions, inputs, patches.out_channels), learns(vision.embeddings))


def run_text_tower(chain: Chain, text: nn.Module, tokens: int, captions: int = 1) -> None:
    """Add SigLIP's text tower on captions of `tokens`."""
    chain.learns_below = learns(text.embeddings)
    for layer in text.encoder.layers:
        run_encoder_layer(chain, "text_tower", layer, tokens, text.config.hidden_size, captions)
    chain.run_linears("text_tower", nn.Sequential(text.head), captions)


def run_encoder_layer(
    chain: Chain, part: str, layer: nn.Module, positions: int, width: int, sequences: int = 1
) -> None:
    """Add a layer of SigLIP, whose positions all see each other."""
    chain.run_linears(part, layer, positions * sequences)
    chain.run(part, attention(positions**2 * sequences, width))


def run_pooling_head(chain: Chain, part: str, head: nn.Module, positions: int, width: int) -> None:
    """Add SigLIP's attention pooling: one query over all positions, and an MLP on what it finds."""
    trained = learns(head)
    chain.run(part, matmul(positions, width, 2 * width), trained)  # keys and values
    chain.run(part, matmul(1, width, 2 * width) + attention(positions, width), trained)
    chain.run_linears(part, head.mlp, 1)

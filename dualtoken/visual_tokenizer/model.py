"""The DualToken visual tokenizer: one vision tower with a pixel codebook and a semantic codebook.

Shapes: B images, P positions, Q = 2 branches (0 pixel, 1 semantic), D depths, K codes, C width of the tower.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, PreTrainedModel
from transformers import initialization as init
from transformers.utils import ModelOutput

from dualtoken.projection import AttentionProjection, ProjectionAttention
from dualtoken.strict_loading import load_strictly
from dualtoken.visual_tokenizer.backbone import (
    Backbone,
    hidden_states_after,
    load_backbone,
    patches_alone,
    pool,
)
from dualtoken.visual_tokenizer.config import VISION_SIZES, DualTokenVisualTokenizerConfig
from dualtoken.visual_tokenizer.fingerprint import changes_codes, fingerprint_of_codes
from dualtoken.visual_tokenizer.nearest import NonFiniteError
from dualtoken.visual_tokenizer.pixel_decoder import PixelDecoder, ResidualBlock
from dualtoken.visual_tokenizer.quantizer import EMACodebooks, MultiCodebookVQ, QuantizerStats, ResidualVQ


@dataclass
class VisualTokenizerOutput(ModelOutput):
    """What a forward pass of the tokenizer returns."""

    codes: Tensor | None = None  # [B, P, Q, D] int64
    reconstruction: Tensor | None = None  # [B, 3, H, W], about [-1, 1], not clamped
    decoder_features: Tensor | None = None  # [B, C', H, W], input of the decoder's last convolution
    semantic_features: Tensor | None = None  # [B, P, C] behind the semantic post-quantization projection
    pooled: Tensor | None = (
        None  # [B, C] behind the last layers, the final norm and the attention-pooling head
    )
    commitment_loss_pixel: Tensor | None = None  # scalar
    commitment_loss_semantic: Tensor | None = None  # scalar
    text_pooled: Tensor | None = None  # [B, C] of the text tower, where captions were given
    logit_scale: Tensor | None = None  # [1], with it: SigLIP's logits are exp(scale) cosine + bias
    logit_bias: Tensor | None = None  # [1]


class DualTokenVisualTokenizer(PreTrainedModel):
    """Turn images into pixel and semantic codes and back (arXiv 2503.14324, section 3)."""

    config: DualTokenVisualTokenizerConfig
    config_class = DualTokenVisualTokenizerConfig
    base_model_prefix = "visual_tokenizer"
    main_input_name = "pixel_values"
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True
    _keep_in_fp32_modules_strict = ["quantizer_pixel", "quantizer_semantic"]
    _no_split_modules = ["SiglipEncoderLayer", "AttentionProjection"]

    def __init__(self, config: DualTokenVisualTokenizerConfig) -> None:
        super().__init__(config)
        width, dim = config.vision.hidden_size, config.codebook_dim
        self.backbone = Backbone(config.vision, config.text)
        if not config.merged_codebook:
            self.prequant_pixel = AttentionProjection(width, dim, attend=config.pixel_attention)
            if config.shortcut_layer is not None:
                self.prequant_shortcut = AttentionProjection(width, dim, attend=config.pixel_attention)
            self.quantizer_pixel = self._build_quantizer("pixel")
        self.prequant_semantic = AttentionProjection(width, dim)
        self.quantizer_semantic = self._build_quantizer("semantic")
        self.postquant_pixel = AttentionProjection(dim, width, causal=config.causal_post_quantization)
        self.postquant_semantic = AttentionProjection(dim, width, causal=config.causal_post_quantization)
        self.post_quant_conv = ResidualBlock(width, config.decoder_in_channels, first_kernel=1)
        self.decoder = PixelDecoder(
            config.decoder_in_channels,
            config.decoder_channels,
            config.decoder_channel_multipliers,
            config.decoder_num_res_blocks,
            config.decoder_attention_resolutions,
            config.latent_size,
            config.decoder_pixel_shuffle,
        )
        self.post_init()

    def _build_quantizer(self, name: str) -> ResidualVQ | MultiCodebookVQ:
        config = self.config
        common = {
            "decay": config.codebook_decay,
            "restart_unused_codes": config.restart_unused_codes,
            "restart_threshold": config.restart_threshold,
            "seed": 2 * config.codebook_seed + (name == "semantic"),
            "name": name,
        }
        size, dim, depth = config.codebook_size, config.codebook_dim, config.num_quantizers
        if config.quantizer == "mcq":
            return MultiCodebookVQ(size, dim, depth, **common)
        return ResidualVQ(size, dim, depth, config.shared_codebook, **common)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, EMACodebooks):
            if getattr(module.codebook, "_is_hf_initialized", False):
                module.reset_window()  # the only buffer that is not in a checkpoint
            else:
                module.reset_codebook()
        elif isinstance(module, nn.Linear | nn.Conv2d):
            init.kaiming_uniform_(module.weight, a=math.sqrt(5))
            if module.bias is not None:
                init.zeros_(module.bias)
        elif isinstance(module, nn.LayerNorm | nn.GroupNorm):
            init.ones_(module.weight)
            init.zeros_(module.bias)
        elif isinstance(module, ProjectionAttention):
            for bias in (module.q_bias, module.v_bias, module.zero_k_bias):
                init.zeros_(bias)
        elif isinstance(module, Backbone) and module.has_text_tower:
            init.constant_(module.logit_scale, math.log(10.0))  # start of SigLIP's training, arXiv 2303.15343
            init.constant_(module.logit_bias, -10.0)

    # -- forward
    # --------------------------------------------------------------------------------------------------

    def _latents(self, images: Tensor) -> tuple[Tensor | None, Tensor]:
        """Return the latents ``[B, P, dim]`` of the pixel (None if merged) and the semantic branch."""
        config = self.config
        taps = {config.semantic_layer}
        if not config.merged_codebook:
            taps.add(config.reconstruction_layer)
            if config.shortcut_layer is not None:
                taps.add(config.shortcut_layer)
        hidden = hidden_states_after(self.backbone.vision_model, images, taps)
        semantic = self._normalise(self.prequant_semantic(hidden[config.semantic_layer]))
        if config.merged_codebook:
            return None, semantic
        if config.pixels_of_patches_alone:
            pixel = self.prequant_pixel(patches_alone(self.backbone.vision_model, images))
        else:
            pixel = self.prequant_pixel(hidden[config.reconstruction_layer])
        if config.shortcut_layer is not None:
            pixel = pixel + config.shortcut_weight * self.prequant_shortcut(hidden[config.shortcut_layer])
        return self._normalise(pixel), semantic

    def _normalise(self, latents: Tensor) -> Tensor:
        if not self.config.latent_norm:
            return latents
        with torch.autocast(device_type=latents.device.type, enabled=False):
            return F.layer_norm(latents.float(), latents.shape[-1:])

    def _decode_latents(self, quantized: Tensor) -> tuple[Tensor, Tensor]:
        """Return the image ``[B, 3, H, W]`` and the decoder features of pixel latents ``[B, P, dim]``."""
        size = self.config.grid_size
        hidden = self.postquant_pixel(quantized)  # [B, P, C]
        hidden = hidden.transpose(1, 2).unflatten(2, (size, size))
        if self.config.latent_size != size:
            latent_size = (self.config.latent_size,) * 2
            hidden = F.interpolate(hidden, latent_size, mode="bilinear", align_corners=False)
        features = self.decoder.features(self.post_quant_conv(hidden))
        return self.decoder.paint(features), features

    def _pool_latents(self, quantized: Tensor) -> tuple[Tensor, Tensor]:
        """Return features ``[B, P, C]`` and the pooled vector of semantic latents ``[B, P, dim]``."""
        features = self.postquant_semantic(quantized)
        return features, pool(self.backbone.vision_model, features, self.config.semantic_layer)

    def forward(
        self, pixel_values: Tensor, input_ids: Tensor | None = None, paint: bool = True
    ) -> VisualTokenizerOutput:
        """Encode, quantize and decode ``pixel_values [B, 3, H, W]`` in [-1, 1].

        In training mode the quantizers add to their statistics; :meth:`update_codebooks` uses them, once per
        step.

        Args:
            pixel_values: the pictures.
            input_ids: captions ``[B, T]``, to have the text tower's vectors in the output too.
            paint: False leaves out the decoder, and with it `reconstruction` and `decoder_features`.

        Raises:
            ValueError: on images of another size, of integers, or with NaN or infinite values; on captions
                without a text tower.
        """
        latents_pixel, latents_semantic = self._latents(pixel_values)
        with _naming_broken(pixel_values):
            semantic = self.quantizer_semantic(latents_semantic)
            pixel = semantic if latents_pixel is None else self.quantizer_pixel(latents_pixel)
        commitment_pixel = pixel.commitment_loss
        if latents_pixel is None:
            commitment_pixel = torch.zeros_like(commitment_pixel)
        reconstruction, decoder_features = self._decode_latents(pixel.quantized) if paint else (None, None)
        semantic_features, pooled = self._pool_latents(semantic.quantized)
        text: dict[str, Tensor] = {}
        if input_ids is not None:  # here and not by the caller, so that every ZeRO level gathers what is read
            text["text_pooled"] = self.encode_text(input_ids)
            # Copies: ZeRO-3 empties the parameters themselves when the forward pass is over.
            scale, bias = self.backbone.logit_scale.clone(), self.backbone.logit_bias.clone()
            text |= {"logit_scale": scale, "logit_bias": bias}
        return VisualTokenizerOutput(
            codes=torch.stack([pixel.codes, semantic.codes], dim=2),
            reconstruction=reconstruction,
            decoder_features=decoder_features,
            semantic_features=semantic_features,
            pooled=pooled,
            commitment_loss_pixel=commitment_pixel,
            commitment_loss_semantic=semantic.commitment_loss,
            **text,
        )

    # -- use
    # ------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """Return the codes ``[B, P, Q, D]`` int64 of ``images [B, 3, H, W]`` in [-1, 1]."""
        latents_pixel, latents_semantic = self._latents(images)
        with _naming_broken(images):
            semantic = self.quantizer_semantic.encode(latents_semantic)
            pixel = semantic if latents_pixel is None else self.quantizer_pixel.encode(latents_pixel)
        return torch.stack([pixel, semantic], dim=2)

    def lookup(self, codes: Tensor) -> tuple[Tensor, Tensor]:
        """Return the quantized pixel and semantic latents ``[B, P, dim]`` of ``codes [B, P, Q, D]``, fp32.

        Raises:
            ValueError: if the shape or the range of the codes is wrong.
        """
        expected = (self.config.positions, 2, self.config.num_quantizers)
        if codes.ndim != 4 or tuple(codes.shape[1:]) != expected:
            wanted = ", ".join(map(str, expected))
            raise ValueError(f"codes have shape {tuple(codes.shape)}, expected [B, P, Q, D] = [B, {wanted}]")
        codes = codes.long()
        return self._pixel_quantizer.lookup(codes[:, :, 0]), self.quantizer_semantic.lookup(codes[:, :, 1])

    @torch.no_grad()
    def decode(self, codes: Tensor) -> Tensor:
        """Return images ``[B, 3, H, W]``, about [-1, 1] and not clamped, from ``codes [B, P, Q, D]``."""
        return self._decode_latents(self.lookup(codes)[0])[0]

    @torch.no_grad()
    def encode_semantic(self, images_or_codes: Tensor) -> Tensor:
        """Return the pooled vector ``[B, C]`` of the quantized semantic features of images or codes."""
        is_images = images_or_codes.is_floating_point()
        codes = self.encode(images_or_codes) if is_images else images_or_codes
        return self._pool_latents(self.lookup(codes)[1])[1]

    def encode_text(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Return the text vectors ``[B, C]`` of ``input_ids [B, T]``, to compare with ``encode_semantic``.

        Raises:
            ValueError: if the model was built without a text tower.
        """
        if not self.backbone.has_text_tower:
            raise ValueError(
                "this visual tokenizer has no text tower (text_config is None), so it cannot encode text"
            )
        return self.backbone.text_model(input_ids=input_ids, attention_mask=attention_mask).pooler_output

    @property
    def _pixel_quantizer(self) -> ResidualVQ | MultiCodebookVQ:
        return self.quantizer_semantic if self.config.merged_codebook else self.quantizer_pixel

    def quantizers(self) -> dict[str, ResidualVQ | MultiCodebookVQ]:
        """Return the quantizers by name: "pixel" and "semantic", or "merged"."""
        if self.config.merged_codebook:
            return {"merged": self.quantizer_semantic}
        return {"pixel": self.quantizer_pixel, "semantic": self.quantizer_semantic}

    def codebooks(self) -> Tensor:
        """Return ``[Q, Dc, K, dim]`` fp32: one row per depth, summed over depths, is a quantized latent.

        Dc is 1 where all depths share a codebook, else D.
        """
        books = [self._pixel_quantizer, self.quantizer_semantic]
        return torch.stack([quantizer.additive_codebooks() for quantizer in books])

    def set_candidate_slot(self, index: int, total: int) -> None:
        """Say which slice of the restart candidates the next micro-batch fills (see ``EMACodebooks``)."""
        for quantizer in self.quantizers().values():
            quantizer.set_candidate_slot(index, total)

    def update_codebooks(self, group: dist.ProcessGroup | None = None) -> dict[str, QuantizerStats]:
        """Update each codebook from all micro-batches and ranks since the last update; one all-reduce each.

        Call it on every rank after the optimizer step. Quantizers that are ``frozen`` are left out.
        """
        return {name: q.update(group) for name, q in self.quantizers().items() if not q.frozen}

    @property
    def last_layer(self) -> nn.Conv2d:
        """The decoder's last convolution, at whose kernel the adaptive GAN weight compares gradients."""
        return self.decoder.conv_out

    # -- identity ------------------------------------------------------------------------------------------

    def fingerprint(self) -> str:
        """Return the sha256 over everything that can change a code: settings and weights on the way there."""
        return fingerprint_of_codes(self.config, self.state_dict())

    def encoding_state(self) -> dict[str, Tensor]:
        """Return the weights and codebooks between an image and its codes, by name."""
        state = self.state_dict().items()
        return {name: value for name, value in state if changes_codes(name, self.config)}

    def parameters_per_part(self) -> dict[str, int]:
        """Return the number of parameters (and codebook entries) of each part; works on the meta device."""
        counts: dict[str, int] = {}
        tensors = [
            *self.named_parameters(),
            *((n, b) for n, b in self.named_buffers() if n.endswith(".codebook")),
        ]
        for name, tensor in tensors:
            head, *rest = name.split(".")
            part = rest[0] if head == "backbone" else head
            counts[part] = counts.get(part, 0) + tensor.numel()
        return counts

    # -- loading and saving
    # ---------------------------------------------------------------------------------------

    @classmethod
    def from_backbone(
        cls, config: DualTokenVisualTokenizerConfig, path: str | Path
    ) -> DualTokenVisualTokenizer:
        """Build a tokenizer whose towers come from the SigLIP model in folder ``path``.

        The vision tower has to be the one ``config`` describes. The text tower is the folder's own if
        ``config`` has one, and left out if not.

        Raises:
            FileNotFoundError: if there is no model at ``path``.
            ValueError: if the vision towers differ.
        """
        source = load_backbone(path)
        towers: Any = source.config
        expected, found = config.vision.to_dict(), towers.vision_config.to_dict()
        differing = [
            f"{name}: {found[name]} there, {expected[name]} here"
            for name in VISION_SIZES
            if found[name] != expected[name]
        ]
        if differing:
            raise ValueError(f"the backbone in {path} does not fit the config ({'; '.join(differing)})")
        fields = config.to_dict() | {"vision_config": found}
        if config.text_config is not None:
            fields["text_config"] = towers.text_config.to_dict()
        model = cls(cls.config_class.from_dict(fields))
        state = source.state_dict()
        if not model.backbone.has_text_tower:
            state = {name: value for name, value in state.items() if name.startswith("vision_model.")}
        model.backbone.load_state_dict(state, strict=True)
        return model

    def save_pretrained(
        self, save_directory: str | PathLike, is_main_process: bool = True, *args, **kwargs
    ) -> None:
        """Save config, weights (safetensors) and the settings of the image processor.

        ``AutoModel`` and ``AutoImageProcessor`` load the folder, once this module is imported.
        """
        super().save_pretrained(save_directory, is_main_process, *args, **kwargs)
        if is_main_process:
            self.save_image_processor(Path(save_directory))

    def save_image_processor(self, folder: Path) -> None:
        """Save the settings of the image processor."""
        settings = json.dumps(self.config.image_processor_settings(), indent=2)
        (folder / "preprocessor_config.json").write_text(settings + "\n", encoding="utf-8")

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path, *args, output_loading_info: bool = False, **kwargs
    ):
        """Load a saved tokenizer, strictly, and in fp32 unless `dtype` says otherwise.

        Codes depend on the precision of the layers in front of the quantizers, so there is one that does not
        depend on where the tokenizer was trained.

        Raises:
            ValueError: the weights do not fit the config (`load_strictly`).
        """
        kwargs.setdefault("dtype", torch.float32)
        load = super().from_pretrained
        model, report = load_strictly(load, pretrained_model_name_or_path, *args, **kwargs)
        return (model, report) if output_loading_info else model


@contextmanager
def _naming_broken(images: Tensor) -> Iterator[None]:
    """Say so where latents are not finite because the images are not; only then the device is waited for."""
    try:
        yield
    except NonFiniteError:
        if not torch.isfinite(images).all():
            raise NonFiniteError("pixel_values contain NaN or infinity; check the image decoding") from None
        raise


AutoConfig.register(DualTokenVisualTokenizerConfig.model_type, DualTokenVisualTokenizerConfig)
AutoModel.register(DualTokenVisualTokenizerConfig, DualTokenVisualTokenizer)

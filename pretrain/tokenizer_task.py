"""Stage 1: one training step of the visual tokenizer (arXiv 2503.14324, section 3), on two engines."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from omegaconf import MISSING
from open_clip.loss import SigLipLoss
from torch import Tensor, nn
from transformers import AutoTokenizer

from data_pipeline.streams import DatasetError, ImageStreamConfig, ImageTextBatch, image_loader
from dualtoken.perceptual import PerceptualConfig
from dualtoken.visual_tokenizer.backbone import FrozenTeacher, model_folder
from dualtoken.visual_tokenizer.model import DualTokenVisualTokenizer, VisualTokenizerOutput
from dualtoken.visual_tokenizer.quantizer import QuantizerStats
from pretrain.caption_input import CaptionInput, load_text_tokenizer
from pretrain.compilation import compile_parts
from pretrain.config import ConfigError, JobConfig, OptimizerConfig
from pretrain.discriminator import DiscriminatorConfig, PatchDiscriminator
from pretrain.engine import build_engine, count_parameters
from pretrain.export import full_state_dict, rounded_by_engine, save_config
from pretrain.image_input import ImageInput, ImageInputConfig
from pretrain.losses import (
    PerceptualLoss,
    adaptive_gan_weight,
    generator_loss,
    hinge_discriminator_loss,
    last_layer_gradient,
    semantic_distillation_loss,
)
from pretrain.metrics import Averages
from pretrain.optim import freeze_parameters
from pretrain.runtime import Runtime
from pretrain.stepping import NotFiniteError, backward, take_step
from pretrain.tokenizer_flops import tokenizer_step_flops
from pretrain.tokenizer_model import (
    TokenizerModelConfig,
    build_visual_tokenizer,
    expand_frozen,
    freeze_codebooks,
)


@dataclass
class TokenizerLossConfig:
    """Weights of the loss terms; the defaults are those of the released joint phase."""

    mse: float = 5.0
    perceptual: float = 1.0
    perceptual_start_step: int = 0
    gan: float = 0.75
    commitment_pixel: float = 5.0
    commitment_semantic: float = 5.0
    semantic_tokens: float = 5.0
    semantic_tokens_mse: float = 1.0  # share of the MSE inside (MSE - cosine); 0 leaves the cosine alone
    pooled: float = 1.0
    contrastive: float = 0.0  # SigLIP's loss of quantized pictures and captions; the paper only suggests it
    gan_start_step: int = 0
    gan_weight_range: list[float] = field(default_factory=lambda: [0.3, 10.0])


@dataclass
class TokenizerJobConfig(JobConfig):
    """Settings of the tokenizer job."""

    job: str = "tokenizer"
    model: TokenizerModelConfig = field(default_factory=TokenizerModelConfig)
    losses: TokenizerLossConfig = field(default_factory=TokenizerLossConfig)
    perceptual_network: PerceptualConfig = field(default_factory=PerceptualConfig)
    discriminator: DiscriminatorConfig = field(default_factory=DiscriminatorConfig)
    discriminator_optimizer: OptimizerConfig = field(
        default_factory=lambda: OptimizerConfig(lr=7.2e-5, betas=[0.5, 0.9], weight_decay=0.0)
    )
    # Gradients are taken through the discriminator outside its engine, which ZeRO-3 does not allow.
    discriminator_deepspeed: str = "zero1.json"
    images: ImageInputConfig = field(default_factory=ImageInputConfig)
    # Patterns of parameter names, `layers.<semantic.*` among them (see expand_frozen); the released joint
    # phase trains everything but text tower and logit scale.
    frozen: list[str] = field(default_factory=lambda: ["backbone.text_model.*", "backbone.logit_*"])
    frozen_codebooks: list[str] = field(default_factory=list)  # of "pixel", "semantic" ("merged")
    gradient_checkpointing: bool = False  # of the towers' layers and the decoder's levels
    data: ImageStreamConfig = MISSING
    validation_data: ImageStreamConfig | None = None


def compiled_parts(tokenizer: DualTokenVisualTokenizer, teacher: FrozenTeacher) -> dict[str, list[nn.Module]]:
    """What `compile` may name of a visual tokenizer; the teacher's tower is one of the towers."""
    backbone, decoder = tokenizer.backbone, tokenizer.decoder
    towers = [backbone.vision_model, teacher.vision_model]
    towers += [backbone.text_model] if backbone.has_text_tower else []
    layers = [layer for tower in towers for layer in tower.encoder.layers]
    return {"towers": layers, "decoder": [decoder.mid, *decoder.up]}


class TokenizerTask:
    """Trains :class:`DualTokenVisualTokenizer` against a frozen teacher and a discriminator."""

    exported = ("tokenizer", "")

    def __init__(self, config: TokenizerJobConfig, runtime: Runtime):
        self.config, self.runtime = config, runtime
        self.tokenizer = build_visual_tokenizer(config.model)
        freeze_parameters(self.tokenizer, expand_frozen(config.frozen, self.tokenizer.config))
        freeze_codebooks(self.tokenizer, config.frozen_codebooks)
        if config.gradient_checkpointing:
            self.tokenizer.activation_checkpointing_enable({"use_reentrant": False})
        kernel_shape = self.tokenizer.last_layer.weight.shape  # ZeRO may flatten it later
        self.teacher = FrozenTeacher.from_pretrained(
            config.model.backbone, semantic_layer=self.tokenizer.config.semantic_layer
        ).to(runtime.device, runtime.dtype)
        compile_parts(compiled_parts(self.tokenizer, self.teacher), config.compile)
        self.perceptual: PerceptualLoss | None = None
        if config.losses.perceptual > 0 and config.perceptual_network.trunk != "none":
            self.perceptual = PerceptualLoss(config.perceptual_network).to(runtime.device)
        self.frozen_weights = rounded_by_engine(self.tokenizer, runtime)
        self.engines = {"tokenizer": build_engine(self.tokenizer, config, runtime)}
        if config.losses.gan > 0:
            self.engines["discriminator"] = build_engine(
                PatchDiscriminator(config.discriminator),
                config,
                runtime,
                config.discriminator_optimizer,
                config.discriminator_deepspeed,
            )
        self.kernel_shape = kernel_shape
        self.captions: CaptionInput | None = None
        if config.losses.contrastive > 0:
            self.captions = build_captions(self.tokenizer, config, runtime)
            self.siglip_loss = SigLipLoss(rank=runtime.rank, world_size=runtime.world_size)
        self.read_images = ImageInput(config.images, self.tokenizer.config.image_size, runtime)
        pictures = image_loader(
            config.data, config.micro_batch_size, runtime.rank, runtime.world_size, config.seed
        )
        self.train_loader = self.read_images.ahead(pictures)

    def describe(self) -> list[str]:
        """Return a line per part, with its parameters, and where fixed networks and pictures come from."""
        lines = [
            f"{name:<20} {count_parameters(part):>12,} parameters, {count_parameters(part, True):>12,} train"
            for name, part in [*self.tokenizer.backbone.named_children(), *self.tokenizer.named_children()]
        ]
        lines.append(f"perceptual loss: {self.perceptual.source if self.perceptual else 'off'}")
        return [*lines, self.read_images.describe(), self.train_loader.describe()]

    def train_step(self, micro_batches: list[ImageTextBatch]) -> dict[str, Any]:
        """Take one optimizer step of the tokenizer and, once it has started, of the discriminator.

        Codebooks move once per step, after the last micro-batch, from the statistics of all micro-batches and
        ranks; where the optimizers do not move, they stay too.
        """
        averages = Averages(self.runtime.device)
        pictures = torch.zeros((), device=self.runtime.device)
        for index, batch in enumerate(micro_batches):
            images, places = self.read_images(batch)
            if len(images) == 0:
                raise DatasetError(
                    f"a micro-batch has no readable picture ({', '.join(batch.keys[:3])} ...), which a "
                    "step needs on every rank; see rejected.jsonl in the run folder and clean the shards"
                )
            pictures += len(images)
            self.tokenizer.set_candidate_slot(
                index * self.runtime.world_size + self.runtime.rank,
                len(micro_batches) * self.runtime.world_size,
            )
            input_ids = None
            if self.captions is not None:
                texts = [self.captions.choose(batch.keys[p], batch.captions[p]) for p in places]
                input_ids = self.captions.tokenize(texts)
            output, metrics = self.generator_step(images, input_ids)
            if self.gan_is_active:
                metrics["loss/discriminator"] = self.discriminator_step(
                    images, output.reconstruction.detach()
                )
            for name, value in metrics.items():
                averages.add(name, value)
        averages.add("count/images", pictures, 1 / self.runtime.world_size)
        engines = self.engines if self.gan_is_active else {"tokenizer": self.engines["tokenizer"]}
        try:
            figures = take_step(engines, averages)
        except NotFiniteError:
            for quantizer in self.tokenizer.quantizers().values():
                quantizer.reset_window()
            raise
        for branch, stats in self.tokenizer.update_codebooks().items():
            figures |= codebook_figures(branch, stats)
        return figures

    @cached_property
    def flops_of_picture(self) -> dict[str, float]:
        """FLOPs of a step for a picture by part, whichever losses have started."""
        with torch.device("meta"):
            planned = DualTokenVisualTokenizer(self.tokenizer.config)
            critic = PatchDiscriminator(self.config.discriminator) if self.config.losses.gan else None
        for own, parameter in zip(planned.parameters(), self.tokenizer.parameters(), strict=True):
            own.requires_grad_(parameter.requires_grad)
        captions = self.captions.length if self.captions is not None else 0
        net = self.config.perceptual_network.net if self.perceptual else None
        parts = tokenizer_step_flops(planned, self.has_image_losses, captions, net, critic)
        return {name: part.total for name, part in parts.items()}

    def flops(self, amounts: Mapping[str, float]) -> float:
        """FLOPs of steps on so many pictures, with the losses that have started."""
        parts = dict(self.flops_of_picture)
        if not self.gan_is_active:
            parts.pop("discriminator", None)
        if self.runtime.step < self.config.losses.perceptual_start_step:
            parts.pop("perceptual", None)
        return amounts["count/images"] * sum(parts.values())

    @property
    def gan_is_active(self) -> bool:
        """Whether the adversarial loss has started."""
        return "discriminator" in self.engines and self.runtime.step >= self.config.losses.gan_start_step

    @property
    def has_image_losses(self) -> bool:
        """Whether a loss reads the reconstruction; else a step does not run the decoder."""
        return bool(self.config.losses.mse or self.perceptual or self.config.losses.gan)

    def generator_step(
        self, images: Tensor, input_ids: Tensor | None
    ) -> tuple[VisualTokenizerOutput, dict[str, Tensor]]:
        """Forward, loss and backward of the tokenizer for one micro-batch.

        Args:
            images: ``[B, 3, H, W]`` in [-1, 1].
            input_ids: their captions ``[B, T]`` where the contrastive loss is on.
        """
        weights = self.config.losses
        output = self.engines["tokenizer"](images, input_ids, paint=self.has_image_losses)
        with torch.no_grad():
            teacher = self.teacher(images)
        semantic = semantic_distillation_loss(
            output.semantic_features, teacher.semantic_features, weights.semantic_tokens_mse
        )
        pooled = semantic_distillation_loss(output.pooled, teacher.pooled)
        feature_loss = (
            weights.semantic_tokens * semantic
            + weights.pooled * pooled
            + weights.commitment_pixel * output.commitment_loss_pixel
            + weights.commitment_semantic * output.commitment_loss_semantic
        )
        metrics: dict[str, Tensor] = {}
        if input_ids is not None:
            metrics["loss/contrastive"] = self.contrastive_loss(output)
            feature_loss = feature_loss + weights.contrastive * metrics["loss/contrastive"]
        loss, total = feature_loss, feature_loss
        if self.has_image_losses:
            image_gradient, image_metrics = self.image_losses(output, images)
            # The image losses enter through their gradient at the picture: the adaptive weight needs that
            # gradient before the backward pass, and DeepSpeed allows one backward pass per forward pass.
            loss = feature_loss + (output.reconstruction.float() * image_gradient).sum()
            total = image_metrics["loss/total"] + feature_loss
            metrics |= image_metrics
        backward(self.engines["tokenizer"], loss)
        metrics |= {
            "loss/semantic": semantic,
            "loss/pooled": pooled,
            "loss/commitment_pixel": output.commitment_loss_pixel,
            "loss/commitment_semantic": output.commitment_loss_semantic,
            "loss/total": total,
        }
        return output, metrics

    def contrastive_loss(self, output: VisualTokenizerOutput) -> Tensor:
        """SigLIP's loss (arXiv 2303.15343) of this rank's pictures and the captions of all ranks, a scalar.

        It needs the same number of pairs on every rank: where a picture could not be read, the other ranks
        leave out a pair of theirs.
        """
        pairs = self.runtime.smallest(len(output.pooled))
        pictures = F.normalize(output.pooled[:pairs].float(), dim=-1)
        texts = F.normalize(output.text_pooled[:pairs].float(), dim=-1)
        return self.siglip_loss(pictures, texts, output.logit_scale.float().exp(), output.logit_bias.float())

    def image_losses(self, output: VisualTokenizerOutput, images: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the gradient of the image losses at the reconstruction and the values of the losses."""
        weights = self.config.losses
        picture = output.reconstruction.detach().float().requires_grad_()
        terms = {"mse": F.mse_loss(picture, images.float())}
        if self.perceptual is not None and self.runtime.step >= weights.perceptual_start_step:
            terms["perceptual"] = self.perceptual(picture, images.float())
        gradient, unweighted = torch.zeros_like(picture), torch.zeros_like(picture)
        metrics = {"loss/total": torch.zeros((), device=picture.device)}
        for name, loss in terms.items():
            (gradient_of_term,) = torch.autograd.grad(loss, picture)
            weight = getattr(weights, name)
            gradient += weight * gradient_of_term
            unweighted += gradient_of_term
            metrics[f"loss/{name}"] = loss.detach()
            metrics["loss/total"] = metrics["loss/total"] + weight * loss.detach()
        if self.gan_is_active:
            adversarial = generator_loss(self.discriminator(picture))
            (gan_gradient,) = torch.autograd.grad(adversarial, picture)
            gan_weight = self.adaptive_weight(output.decoder_features, unweighted, gan_gradient) * weights.gan
            gradient += gan_weight * gan_gradient
            metrics |= {"loss/gan": adversarial, "gan_weight": gan_weight}
            metrics["loss/total"] = metrics["loss/total"] + (gan_weight * adversarial).detach()
        return gradient, metrics

    @property
    def discriminator(self) -> nn.Module:
        """The discriminator without its engine, for gradients at the picture alone."""
        return self.engines["discriminator"].module

    def adaptive_weight(self, features: Tensor, gradient: Tensor, gan_gradient: Tensor) -> Tensor:
        """Return the GAN weight from the gradients of all ranks at the decoder's last kernel.

        Args:
            features: the kernel's input, ``[B, C', H, W]``.
            gradient: of MSE + LPIPS at the picture, without the recipe's weights, as in the released code.
            gan_gradient: of the adversarial loss at the picture.
        """
        shape = self.kernel_shape
        kernels = torch.stack([last_layer_gradient(features, shape, g) for g in (gradient, gan_gradient)])
        if self.runtime.world_size > 1:
            dist.all_reduce(kernels)
            kernels /= self.runtime.world_size
        return adaptive_gan_weight(kernels[0], kernels[1], *self.config.losses.gan_weight_range)

    def discriminator_step(self, images: Tensor, reconstruction: Tensor) -> Tensor:
        """Forward, hinge loss and backward of the discriminator for one micro-batch."""
        engine = self.engines["discriminator"]
        logits = engine(torch.cat([images, reconstruction.to(images.dtype)]))
        real, fake = logits.chunk(2)
        loss = hinge_discriminator_loss(real, fake)
        backward(engine, loss)
        return loss.detach()

    @torch.no_grad()
    def validate(self) -> dict[str, float]:
        """Return PSNR (dB) and the cosine of quantized and teacher features on held-out pictures."""
        if self.config.validation_data is None:
            return {}
        self.tokenizer.eval()
        loader = image_loader(
            self.config.validation_data,
            self.config.micro_batch_size,
            self.runtime.rank,
            self.runtime.world_size,
            split="val",
        )
        averages = Averages(self.runtime.device)
        for batch in self.runtime.together(loader, self.config.validate_batches):
            images = self.read_images(batch)[0] if batch is not None else ()
            # The last, short batch may hold nothing but broken pictures: then a blank one, not counted.
            counted = len(images)
            if not counted:
                images = torch.zeros(
                    1, 3, *[self.tokenizer.config.image_size] * 2, device=self.runtime.device
                )
            output, teacher = self.tokenizer(images), self.teacher(images)
            # Pictures are in [-1, 1]; figures are for [0, 1], clamped.
            difference = (output.reconstruction.float().clamp(-1, 1) - images) / 2
            squared = difference.square().mean(dim=(1, 2, 3))[:counted]
            averages.add("loss/mse", squared.sum() * 4, counted)
            averages.add("psnr_db", (-10 * torch.log10(squared + 1e-8)).sum(), counted)
            cosine = F.cosine_similarity(output.pooled.float(), teacher.pooled.float(), dim=-1)[:counted]
            averages.add("pooled_cosine", cosine.sum(), counted)
        self.tokenizer.train()
        return averages.reduce()

    def state_dict(self) -> dict[str, Any]:
        """Return this rank's state beyond the engines'."""
        return {"images": self.read_images.state_dict()}

    def load_state_dicts(self, states: list[dict[str, Any]]) -> None:
        """Take back what :meth:`state_dict` gave."""
        self.read_images.load_state_dicts([state["images"] for state in states])

    def export(self, directory: Path) -> None:
        """Write the tokenizer in fp32 and the backbone's text tokenizer, for `from_pretrained`."""
        state = full_state_dict(self.engines["tokenizer"], self.frozen_weights)
        if self.runtime.is_main:
            self.tokenizer.save_pretrained(directory, state_dict=state)
            self.export_assets(directory)

    def export_assets(self, directory: Path) -> None:
        """Write the tokenizer's config and the backbone's text tokenizer."""
        save_config(self.tokenizer, directory)
        self.tokenizer.save_image_processor(directory)
        if self.tokenizer.config.text_config is not None:
            AutoTokenizer.from_pretrained(model_folder(self.config.model.backbone)).save_pretrained(directory)


def build_captions(
    tokenizer: DualTokenVisualTokenizer, config: TokenizerJobConfig, runtime: Runtime
) -> CaptionInput:
    """Captions as the backbone's text tower reads them.

    Raises:
        ConfigError: there is no text tower, or no text tokenizer beside the backbone.
    """
    text_config = tokenizer.config.text_config
    if text_config is None:
        raise ConfigError(
            f"losses.contrastive={config.losses.contrastive} needs a text tower; this tokenizer was built "
            "without one (text_config is None)"
        )
    text_tokenizer = load_text_tokenizer(str(model_folder(config.model.backbone)), "model.backbone")
    return CaptionInput(text_tokenizer, tokenizer.config.text.max_position_embeddings, config.seed, runtime)


def codebook_figures(branch: str, stats: QuantizerStats) -> dict[str, float]:
    """Name a codebook's statistics of one step for the log, by branch and depth."""
    figures: dict[str, float] = {f"codebook_{branch}/usage": stats.codebook_usage}
    for depth, (usage, perplexity) in enumerate(zip(stats.usage, stats.perplexity), start=1):
        figures[f"codebook_{branch}/usage_{depth}"] = usage
        figures[f"codebook_{branch}/perplexity_{depth}"] = perplexity
    figures[f"codebook_{branch}/restarted"] = stats.restarted
    return figures

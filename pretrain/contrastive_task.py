"""Contrastive pretraining of SigLIP (arXiv 2303.15343): the backbone that the tokenizer starts from."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
import torch.nn.functional as F
from omegaconf import MISSING
from open_clip.loss import SigLipLoss
from torch import Tensor, nn
from transformers import SiglipConfig, SiglipImageProcessor, SiglipModel

from data_pipeline.streams import ImageStreamConfig, ImageTextBatch, image_loader
from dualtoken.visual_tokenizer.backbone import load_backbone, pool
from pretrain.caption_input import CaptionInput, load_text_tokenizer
from pretrain.compilation import compile_parts
from pretrain.config import ConfigError, JobConfig
from pretrain.engine import build_engine, count_parameters
from pretrain.export import full_state_dict, save_config
from pretrain.image_input import ImageInput, ImageInputConfig
from pretrain.metrics import Averages
from pretrain.runtime import Runtime
from pretrain.stepping import backward, take_step
from pretrain.tokenizer_flops import siglip_flops


@dataclass
class VisionTowerConfig:
    """Size of the vision tower."""

    image_size: int = 64
    patch_size: int = 8
    hidden_size: int = 128
    intermediate_size: int = 512
    num_hidden_layers: int = 4
    num_attention_heads: int = 4


@dataclass
class TextTowerConfig:
    """Size of the text tower; its vocabulary is the text tokenizer's, its output as wide as the pictures'."""

    hidden_size: int = 128
    intermediate_size: int = 512
    num_hidden_layers: int = 3
    num_attention_heads: int = 4
    max_position_embeddings: int = 16  # tokens; captions are padded and cut to this length


@dataclass
class AugmentationConfig:
    """What is drawn anew every time a picture is seen."""

    max_shift: int = 0  # pixels in each direction, white comes in
    flip: bool = False  # left and right, every other time


@dataclass
class ContrastiveJobConfig(JobConfig):
    """Settings of the contrastive job."""

    job: str = "contrastive"
    init_from: str | None = None  # folder of a SiglipModel to go on from; its sizes replace vision and text
    vision: VisionTowerConfig = field(default_factory=VisionTowerConfig)
    text: TextTowerConfig = field(default_factory=TextTowerConfig)
    text_tokenizer: str = MISSING  # folder of a Hugging Face tokenizer
    initial_scale: float = 10.0  # of the cosine; learned from there, as is the bias
    initial_bias: float = -10.0
    embedding_std: float | None = None  # of new patch, position and token embeddings; default transformers'
    captions_per_picture: int = 1  # languages drawn for a picture in a step, each a term of the loss
    patch_dropout: float = 0.0  # share of a picture's patches that a training step leaves out
    unmasked_steps: int = 0  # the last so many steps see all patches
    images: ImageInputConfig = field(default_factory=ImageInputConfig)
    augmentation: AugmentationConfig = field(default_factory=AugmentationConfig)
    data: ImageStreamConfig = MISSING
    validation_data: ImageStreamConfig | None = None  # pictures of concepts that training does not see
    retrieval_pictures: int = 200  # at most so many candidates, of either kind, in the R@1 of validation

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.patch_dropout < 1 or self.captions_per_picture < 1:
            raise ConfigError(
                f"patch_dropout={self.patch_dropout}, captions_per_picture={self.captions_per_picture}: "
                "expected a share from 0 to below 1, and at least 1"
            )


class ContrastiveModel(nn.Module):
    """SigLIP and its loss in one forward pass, so that every ZeRO level gathers what the loss reads.

    Leaving out patches makes a step cheaper by as much (arXiv 2212.00794).
    """

    def __init__(self, siglip: SiglipModel, rank: int, world_size: int) -> None:
        super().__init__()
        self.siglip = siglip
        self.loss = SigLipLoss(rank=rank, world_size=world_size)
        for parameter in (siglip.logit_scale, siglip.logit_bias):
            deepspeed.zero.register_external_parameter(self, parameter)

    def forward(self, images: Tensor, input_ids: Tensor, patch_dropout: float = 0.0) -> Tensor:
        """Mean over C captions of the loss of B pictures against the captions of all ranks' pictures.

        Args:
            images: [B, 3, H, W]; B is the same on every rank.
            input_ids: [B, C, T].
            patch_dropout: share of the patches to leave out.
        """
        hidden = drop_patches(self.siglip.vision_model.embeddings(images), patch_dropout)
        pictures = F.normalize(pool(self.siglip.vision_model, hidden, layer=0).float(), dim=-1)  # [B, D]
        captions = self.siglip.text_model(input_ids=input_ids.flatten(0, 1)).pooler_output
        captions = F.normalize(captions.float(), dim=-1).unflatten(0, input_ids.shape[:2])  # [B, C, D]
        scale, bias = self.siglip.logit_scale.float().exp(), self.siglip.logit_bias.float()
        # Contiguous, since the loss sends the captions to the other ranks.
        losses = [self.loss(pictures, texts.contiguous(), scale, bias) for texts in captions.unbind(1)]
        return torch.stack(losses).mean()


class ContrastiveTask:
    """Trains a SigLIP model on pictures with captions in several languages."""

    exported = ("siglip", "siglip.")

    def __init__(self, config: ContrastiveJobConfig, runtime: Runtime) -> None:
        if runtime.micro_steps != 1:
            raise ConfigError(
                f"global_batch_size={config.global_batch_size}: every picture of a step is compared with "
                "every caption of it, in one pass; expected micro_batch_size x ranks = "
                f"{config.micro_batch_size * runtime.world_size}, or micro_batch_size=0, which is that"
            )
        self.config, self.runtime = config, runtime
        self.text_tokenizer = load_text_tokenizer(config.text_tokenizer)
        siglip = build_siglip(config, self.text_tokenizer)
        text_length = siglip.config.text_config.max_position_embeddings
        self.captions = CaptionInput(self.text_tokenizer, text_length, config.seed, runtime)
        self.image_size = siglip.config.vision_config.image_size
        self.read_images = ImageInput(config.images, self.image_size, runtime)
        pictures = image_loader(
            config.data, config.micro_batch_size, runtime.rank, runtime.world_size, config.seed
        )
        self.train_loader = self.read_images.ahead(pictures)
        towers = (siglip.vision_model, siglip.text_model)
        compile_parts({"towers": [x for tower in towers for x in tower.encoder.layers]}, config.compile)
        model = ContrastiveModel(siglip, runtime.rank, runtime.world_size)
        self.engines = {"siglip": build_engine(model, config, runtime)}

    @property
    def siglip(self) -> SiglipModel:
        """The model without its engine."""
        return self.engines["siglip"].module.siglip

    def describe(self) -> list[str]:
        """Parameters per tower, and how pictures are read and divided over ranks."""
        towers = {"vision tower": self.siglip.vision_model, "text tower": self.siglip.text_model}
        lines = [f"{name:<20} {count_parameters(part):>12,} parameters" for name, part in towers.items()]
        return [*lines, self.read_images.describe(), self.train_loader.describe()]

    def train_step(self, micro_batches: list[ImageTextBatch]) -> dict[str, Any]:
        """One optimizer step on the one micro-batch of every rank."""
        (batch,) = micro_batches
        images, captions = self.pairs(batch)
        input_ids = torch.stack([self.captions.tokenize(texts) for texts in captions], dim=1)
        images = self.augment(images).to(self.runtime.dtype)
        loss = self.engines["siglip"](images, input_ids, self.patch_dropout)
        backward(self.engines["siglip"], loss)
        averages = Averages(self.runtime.device)
        averages.add("loss/contrastive", loss)
        figures = take_step(self.engines, averages)
        return {**figures, "count/images": self.config.global_batch_size}

    @property
    def patch_dropout(self) -> float:
        """Share of a picture's patches that this step leaves out."""
        masked = self.runtime.step < self.config.steps - self.config.unmasked_steps
        return self.config.patch_dropout if masked else 0.0

    def flops(self, amounts: Mapping[str, float]) -> float:
        """FLOPs of steps on so many pictures, with the patches that are left out at this one."""
        positions = (self.image_size // self.siglip.config.vision_config.patch_size) ** 2
        kept = patches_kept(positions, self.patch_dropout)
        captions = self.config.captions_per_picture
        parts = siglip_flops(self.siglip, kept, captions, self.captions.length)
        return amounts["count/images"] * sum(part.total for part in parts.values())

    def pairs(self, batch: ImageTextBatch) -> tuple[Tensor, list[list[str]]]:
        """Pictures [B, 3, H, W] in [-1, 1] and, `captions_per_picture` times, a caption for each.

        The loss needs the same number on every rank: a picture that cannot be read leaves its place to a
        blank one with an empty caption.
        """
        readable, places = self.read_images(batch)
        captions = [[""] * len(batch) for _ in range(self.config.captions_per_picture)]
        for place in places:
            for number, texts in enumerate(captions):
                texts[place] = self.captions.choose(batch.keys[place], batch.captions[place], number)
        if len(places) == len(batch):
            return readable, captions
        images = readable.new_ones(len(batch), 3, self.image_size, self.image_size)
        images[places] = readable
        return images, captions

    def augment(self, images: Tensor) -> Tensor:
        """Shift and flip pictures [B, 3, H, W] at random."""
        shift = self.config.augmentation.max_shift
        if shift:
            size = self.image_size
            padded = F.pad(images, [shift] * 4, value=1.0)
            corners = torch.randint(0, 2 * shift + 1, (len(images), 2)).tolist()
            pairs = zip(padded, corners, strict=True)
            images = torch.stack([p[:, top : top + size, left : left + size] for p, (top, left) in pairs])
        if self.config.augmentation.flip:
            mirrored = (torch.rand(len(images)) < 0.5).to(images.device, non_blocking=True)
            images = torch.where(mirrored[:, None, None, None], images.flip(-1), images)
        return images

    @torch.no_grad()
    def validate(self) -> dict[str, Any]:
        """Retrieval R@1 in both directions, on pictures that training sees and on held-out ones."""
        figures = self.retrieval("seen", self.config.data)
        if self.config.validation_data is not None:
            figures |= self.retrieval("held_out", self.config.validation_data)
        return figures

    def retrieval(self, name: str, data: ImageStreamConfig) -> dict[str, float]:
        """R@1 among the first `retrieval_pictures` of a data set; equal captions are equally right."""
        self.siglip.eval()
        per_rank = math.ceil(self.config.retrieval_pictures / self.runtime.world_size)
        size = min(self.config.micro_batch_size, per_rank)
        loader = image_loader(data, size, self.runtime.rank, self.runtime.world_size, split="val")
        features: list[tuple[Tensor, Tensor, str]] = []
        for batch in self.runtime.together(loader, math.ceil(per_rank / size)):
            places: list[int] = []
            if batch is not None:
                images, places = self.read_images(batch)
            # The last, short batch may hold nothing but broken pictures; then a blank one that is not kept.
            if not places:
                images = torch.zeros(1, 3, self.image_size, self.image_size, device=self.runtime.device)
            captions = [batch.captions[place] for place in places] or [{}]
            # The first language, so that a figure does not depend on a draw.
            texts = [next(iter(by_language.values()), "") for by_language in captions]
            input_ids = self.captions.tokenize(texts)
            output = self.siglip(input_ids=input_ids, pixel_values=images.to(self.runtime.dtype))
            embeds = output.image_embeds.float().cpu(), output.text_embeds.float().cpu()
            features += list(zip(*embeds, texts, strict=True))[: len(places)]
        loader.close()
        gathered = [features[:per_rank]]
        if self.runtime.world_size > 1:
            gathered = [[] for _ in range(self.runtime.world_size)]
            dist.all_gather_object(gathered, features[:per_rank])
        everything = [feature for of_rank in gathered for feature in of_rank]
        images, texts = (torch.stack([feature[i] for feature in everything]) for i in (0, 1))
        image_to_text, text_to_image = recall_at_1(images @ texts.T, [feature[2] for feature in everything])
        return {
            f"{name}/image_to_text_r1": image_to_text,
            f"{name}/text_to_image_r1": text_to_image,
            f"{name}/chance_r1": 1 / len(everything),
        }

    def state_dict(self) -> dict[str, Any]:
        """Which broken pictures have been recorded."""
        return {"images": self.read_images.state_dict()}

    def load_state_dicts(self, states: list[dict[str, Any]]) -> None:
        """Take back what `state_dict` gave."""
        self.read_images.load_state_dicts([state["images"] for state in states])

    def export(self, directory: Path) -> None:
        """Write the SigLIP model in fp32, its text tokenizer and its image processor."""
        state = full_state_dict(self.engines["siglip"])
        if not self.runtime.is_main:
            return
        prefix = "siglip."
        state = {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}
        self.siglip.save_pretrained(directory, state_dict=state)
        self.export_assets(directory)

    def export_assets(self, directory: Path) -> None:
        """Write the model's config, its text tokenizer and its image processor."""
        save_config(self.siglip, directory)
        self.text_tokenizer.save_pretrained(directory)
        size = {"height": self.image_size, "width": self.image_size}
        SiglipImageProcessor(size=size, image_mean=[0.5] * 3, image_std=[0.5] * 3).save_pretrained(directory)


def drop_patches(hidden: Tensor, share: float) -> Tensor:
    """Another random choice of patches for each picture: [B, P, D] to [B, (1 - share) P, D]."""
    batch, positions, width = hidden.shape
    kept = patches_kept(positions, share)
    if kept == positions:
        return hidden
    chosen = torch.rand(batch, positions).topk(kept, dim=1).indices.to(hidden.device, non_blocking=True)
    return hidden.gather(1, chosen[..., None].expand(-1, -1, width))


def patches_kept(positions: int, share: float) -> int:
    """How many of a picture's patches are left where a share is left out."""
    return max(1, round(positions * (1 - share)))


def recall_at_1(similarity: Tensor, captions: list[str]) -> tuple[float, float]:
    """Share of pictures whose nearest caption is theirs, and of captions whose nearest picture is theirs.

    Args:
        similarity: [N, N], pictures by captions.
        captions: N texts; a text that occurs twice is right for both pictures.
    """
    numbers = {caption: number for number, caption in enumerate(captions)}
    label = torch.tensor([numbers[caption] for caption in captions])
    right_text = label[similarity.argmax(1)] == label
    right_image = label[similarity.argmax(0)] == label
    return right_text.float().mean().item(), right_image.float().mean().item()


def build_siglip(config: ContrastiveJobConfig, text_tokenizer: Any) -> SiglipModel:
    """A new SigLIP model of the recipe's size, or the one to go on from."""
    if config.init_from is not None:
        if not (Path(config.init_from) / "config.json").is_file():
            raise ConfigError(f"init_from={config.init_from}: expected a folder with a SigLIP model")
        return load_backbone(config.init_from)
    text = {
        **asdict(config.text),
        "vocab_size": len(text_tokenizer),
        "projection_size": config.vision.hidden_size,
        "pad_token_id": text_tokenizer.pad_token_id,
        # SiglipTextConfig's defaults are ids of another vocabulary.
        "bos_token_id": None,
        "eos_token_id": None,
    }
    siglip = SiglipModel(SiglipConfig(text_config=text, vision_config=asdict(config.vision)))
    with torch.no_grad():
        siglip.logit_scale.fill_(math.log(config.initial_scale))
        siglip.logit_bias.fill_(config.initial_bias)
        if config.embedding_std is not None:
            for name, parameter in siglip.named_parameters():
                if "embeddings" in name:
                    parameter.normal_(std=config.embedding_std)
    return siglip

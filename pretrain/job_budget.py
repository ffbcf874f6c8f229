"""What a step of each job takes: parameters, FLOPs and memory of a micro-batch, from its recipe alone."""

from __future__ import annotations

from dataclasses import dataclass, field
from math import prod

import torch
from torch import nn

from data_pipeline.streams import DocumentStreamConfig
from dualtoken.unified_model.sequence import ImageLayout
from pretrain.activations import (
    decoder_layer_activations,
    decoder_layer_products,
    encoder_layer_activations,
    feature_activations,
    head_chunk_bytes,
    kept_bytes,
    logits_bytes,
    tokenizer_activations,
)
from pretrain.budget import FP32, ParameterCount
from pretrain.config import ConfigError, JobConfig
from pretrain.contrastive_task import ContrastiveJobConfig, patches_kept
from pretrain.discriminator import PatchDiscriminator
from pretrain.flops import Flops, PackContents, unified_model_flops
from pretrain.mllm_task import MllmJobConfig
from pretrain.planned_models import (
    ModelOptions,
    count_parts,
    planned_siglip,
    planned_tokenizer,
    planned_unified_model,
)
from pretrain.runtime import read_deepspeed_file
from pretrain.tokenizer_flops import (
    encode_flops,
    perceptual_network,
    siglip_flops,
    tokenizer_step_flops,
)
from pretrain.tokenizer_task import TokenizerJobConfig

MARKS = 4  # tokens around a document and its picture


@dataclass
class JobBudget:
    """What a micro-batch of a rank takes.

    Attributes:
        parameters: by part of the model.
        muon: parameters that Muon takes; AdamW takes the others.
        flops: by part.
        recomputed: FLOPs that gradient checkpointing computes once more.
        activations: bytes from forward to backward pass, nothing checkpointed.
        checkpointed: the same with `gradient_checkpointing`; None where the job has none.
        logits: bytes of logits and of gradients made in the forward pass.
        fixed: bytes of networks that do not learn, and of buffers.
        samples: documents or pictures.
        tokens: of a language model; 0 for other jobs.
        images: pictures.
        second: parameters of an engine of its own, and its ZeRO level.
        code_bytes: of a picture as codes; 0 where the job makes none.
        encode: FLOPs of turning a picture into codes; 0 likewise.
    """

    parameters: dict[str, ParameterCount]
    flops: dict[str, Flops]
    recomputed: float
    activations: float
    checkpointed: float | None
    logits: float
    fixed: float
    samples: float
    tokens: float
    images: float
    second: tuple[ParameterCount, int] | None = None
    code_bytes: int = 0
    encode: float = 0.0
    notes: list[str] = field(default_factory=list)

    @property
    def count(self) -> ParameterCount:
        """Of the model's engine."""
        return sum(self.parameters.values(), ParameterCount(0, 0))

    @property
    def gathered(self) -> int:
        """Parameters that ZeRO-3 gathers in a micro-step: of parts that run, forward and backward."""
        found = 0
        for name, count in self.parameters.items():
            if name in self.flops:
                found += count.total * (2 if self.flops[name].backward else 1)
        return found


def job_budget(
    config: JobConfig, weight: int, options: ModelOptions, text_tokens: int = 64, plain_tokens: int = 512
) -> JobBudget:
    """What a micro-batch of a recipe takes.

    Args:
        config: of one of the three jobs.
        weight: bytes of a weight, 2 in bf16, 4 in fp32.
        options: models that the recipe does not have.
        text_tokens: of a document besides its picture; of a caption in the tokenizer's contrastive phase.
        plain_tokens: of a document without a picture.

    Raises:
        ConfigError: the job is another one, or what it names is neither there nor known.
    """
    if isinstance(config, MllmJobConfig):
        return _mllm(config, weight, options, text_tokens, plain_tokens)
    if isinstance(config, TokenizerJobConfig):
        return _tokenizer(config, weight, options)
    if isinstance(config, ContrastiveJobConfig):
        return _contrastive(config, weight, options)
    raise ConfigError(f"job={config.job} cannot be planned; expected mllm, tokenizer or contrastive")


def picture_places(layout: ImageLayout, positions: int) -> tuple[int, int]:
    """Places that a picture of so many codes takes between its marks: one that is read, one that is drawn.

    One in tiles is as large as any can be.
    """
    separator = 1 if layout.features else 0
    drawn = positions + separator
    return (drawn if layout.codes else 0) + layout.most_positions, drawn


def expected_pack(
    data: DocumentStreamConfig, layout: ImageLayout, positions: int, text_tokens: int, plain_tokens: int
) -> PackContents:
    """Average contents of a full pack of a blend, a picture in each document but those of plain text.

    It is drawn in documents of the view `generate` and read in the others.

    Args:
        data: the blend, and the length of a pack.
        layout: what stands for a picture.
        positions: P.
        text_tokens: of a document besides its picture.
        plain_tokens: of a document without one.

    Raises:
        ConfigError: a document with a picture does not fit into a context.
    """
    entries = [entry for entry in data.blend if entry.weight > 0]
    total = sum(entry.weight for entry in entries)
    shares: dict[str, float] = {}
    for entry in entries:
        shares[entry.view] = shares.get(entry.view, 0.0) + entry.weight / total
    plain, drawn = shares.get("text", 0.0), shares.get("generate", 0.0)
    read = 1 - plain - drawn
    of_read, of_drawn = picture_places(layout, positions)
    kinds = {  # share and length of a document
        "read": (read, of_read + text_tokens + MARKS),
        "drawn": (drawn, of_drawn + text_tokens + MARKS),
        "plain": (plain, plain_tokens + 2),
    }
    longest = max(of_read, of_drawn)
    if longest + text_tokens + MARKS > data.context_length:
        raise ConfigError(
            f"a document of a picture of {longest} positions and {text_tokens} tokens is longer than "
            f"data.context_length={data.context_length}; give another --visual-tokenizer or --text-tokens"
        )
    crops = layout.tiles.crops(layout.tiles.largest) if layout.tiles else bool(layout.features)
    documents = data.context_length / sum(share * length for share, length in kinds.values())
    targets = of_drawn - positions + 2  # the marks before and, with features, behind the codes; END
    return PackContents(
        tokens=data.context_length,
        pairs=documents * sum(share * length * (length + 1) / 2 for share, length in kinds.values()),
        visual_positions=documents * (drawn + (read if layout.codes else 0)) * positions,
        text_targets=documents * (read * (text_tokens + 1) + drawn * targets + plain * (plain_tokens + 1)),
        visual_targets=documents * drawn * positions,
        documents=documents,
        pictures=documents * (1 - plain),
        feature_pictures=documents * read * crops,
        feature_positions=documents * read * layout.most_positions,
    )


def _mllm(
    config: MllmJobConfig, weight: int, options: ModelOptions, text_tokens: int, plain_tokens: int
) -> JobBudget:
    model, tokenizer = planned_unified_model(config, options)
    unified, text_config = model.config, model.decoder_config
    layout, positions = unified.image_layout, unified.positions_per_image
    pack = expected_pack(config.data, layout, positions, text_tokens, plain_tokens)
    flops = unified_model_flops(model, pack)
    parts: dict[str, nn.Module] = dict(model.parts())
    if model.post_quantization is not None:
        parts["post_quantization"] = model.post_quantization
    counts = count_parts(model, parts, config.optimizer)

    size = config.sequence_parallel_size
    tokens = pack.tokens / size  # of a rank's stretch
    layer = tokens * decoder_layer_activations(text_config, weight)
    hidden, layers = tokens * text_config.hidden_size, text_config.num_hidden_layers
    ends = hidden * (FP32 + 3 * weight)  # embeddings in front, the last norm behind
    passes = flops["llm"].backward > 0
    keeps_products = config.checkpointing_keeps == "products"
    kept = tokens * decoder_layer_products(text_config, weight) if keeps_products else 0.0
    head = 0.0 if unified.codes_in_vocabulary else head_chunk_bytes(
        min(unified.chunk_size, round(pack.visual_targets)), unified.num_quantizers, unified.head_hidden_size,
        unified.head_intermediate_size or 4 * unified.head_hidden_size, unified.head_num_layers,
        unified.codebook_size, weight,
    )  # fmt: skip
    output_layer = model.get_output_embeddings()
    text = logits_bytes(unified.chunk_size, output_layer.out_features, weight)
    features = {False: 0.0, True: 0.0}
    if model.feature_adapter is not None:
        patches = pack.feature_pictures * unified.features_per_image
        features = {
            checkpoints: feature_activations(
                model, patches, pack.feature_positions, weight, checkpoints, keeps_products
            )
            for checkpoints in features
        }
    # Gradients are made in the forward pass and kept to the backward pass.
    early = sum(c.trained for name, c in counts.items() if name.endswith("_head"))
    runs = 2 if unified.codes_in_vocabulary else 1  # of the output layer, for text and for codes
    early += runs * sum(p.numel() for p in output_layer.parameters() if p.requires_grad)
    checkpointed = ("llm", "vision_tower") if not keeps_products else ()
    places = f"{positions} positions"
    if layout.tiles:
        options.note("pictures in tiles: each as large as takes most positions")
    if layout.features:
        places = "{:,} positions if read, {:,} if drawn".format(*picture_places(layout, positions))
    return JobBudget(
        parameters=counts,
        flops=flops,
        recomputed=sum(
            flops[name].forward for name in checkpointed if name in flops and flops[name].backward
        ),
        activations=(layers * layer + ends if passes else layer) + features[False],
        checkpointed=(layers * (hidden * weight + kept) + layer + ends if passes else layer) + features[True],
        logits=max(head, text) + weight * early,
        fixed=buffer_bytes(model),
        samples=pack.documents,
        tokens=pack.tokens,
        images=pack.pictures,
        code_bytes=2 * prod(unified.code_shape),
        encode=encode_flops(tokenizer),
        notes=[
            f"a pack of {config.data.context_length:,} tokens holds {pack.documents:.1f} documents, "
            f"{pack.pictures:.1f} of a picture ({places}) and {text_tokens} "
            f"tokens, {pack.documents - pack.pictures:.1f} of {plain_tokens} tokens of text alone"
        ],
    )


def _tokenizer(config: TokenizerJobConfig, weight: int, options: ModelOptions) -> JobBudget:
    model = planned_tokenizer(config, options).to(torch.bfloat16 if weight == 2 else torch.float32)
    losses, visual, batch = config.losses, model.config, config.micro_batch_size
    perceptual = losses.perceptual > 0 and config.perceptual_network.trunk != "none"
    paint = bool(losses.mse or perceptual or losses.gan)
    captions = visual.text.max_position_embeddings if losses.contrastive and visual.text else 0
    critic = None
    if losses.gan:
        with torch.device("meta"):
            critic = PatchDiscriminator(config.discriminator).to(model.dtype)
    net = config.perceptual_network.net if perceptual else None
    flops = tokenizer_step_flops(model, paint, captions, net, critic)
    backbone, size = model.backbone, visual.reconstruction_size
    counts = count_parts(model, _tokenizer_parts(model), config.optimizer)
    fixed = buffer_bytes(model) + weight * sum(p.numel() for p in backbone.vision_model.parameters())
    picture = torch.empty(1, 3, size, size, device="meta", requires_grad=True)
    of_losses, second = [0.0], None
    if perceptual:
        network = perceptual_network(config.perceptual_network.net)
        of_losses.append(kept_bytes(network, lambda: network(picture, picture.detach())))
        fixed += FP32 * sum(p.numel() for p in network.parameters())
    if critic is not None:
        of_losses.append(kept_bytes(critic, lambda: critic(picture)))
        level = read_deepspeed_file(config.discriminator_deepspeed)["zero_optimization"]["stage"]
        second = (ParameterCount(*[sum(p.numel() for p in critic.parameters())] * 2), level)
    whole, checkpointed = tokenizer_activations(model, weight, paint)
    both = ("vision_tower", "pixel_decoder")
    return JobBudget(
        parameters=counts,
        flops={name: part * batch for name, part in flops.items()},
        recomputed=batch
        * sum(flops[name].forward for name in both if name in flops and flops[name].backward),
        activations=batch * (whole + max(of_losses)),
        checkpointed=batch * (checkpointed + max(of_losses)),
        logits=0.0,
        fixed=fixed,
        samples=batch,
        tokens=0,
        images=batch,
        second=second,
        code_bytes=visual.positions * 2 * visual.num_quantizers * 2,
        encode=encode_flops(model),
    )


def _tokenizer_parts(model: nn.Module) -> dict[str, nn.Module]:
    children = dict(model.named_children())
    backbone = children.pop("backbone")
    parts: dict[str, nn.Module] = {"vision_tower": backbone.vision_model}
    if backbone.has_text_tower:
        parts["text_tower"] = backbone  # and the loss's scale and bias; the vision tower counts above
    decoder = ("post_quant_conv", "decoder")
    projections = [part for name, part in children.items() if name not in decoder]
    parts["projections"] = nn.ModuleList(projections)
    parts["pixel_decoder"] = nn.ModuleList(children[name] for name in decoder)
    return parts


def _contrastive(config: ContrastiveJobConfig, weight: int, options: ModelOptions) -> JobBudget:
    model = planned_siglip(config, options)
    vision, text, batch = model.config.vision_config, model.config.text_config, config.micro_batch_size
    positions = (vision.image_size // vision.patch_size) ** 2
    kept = patches_kept(positions, config.patch_dropout)
    captions, tokens = config.captions_per_picture, text.max_position_embeddings
    parts = {"vision_tower": model.vision_model, "text_tower": model}  # with the loss's scale and bias
    flops = siglip_flops(model, kept, captions, tokens)
    activations = kept * vision.num_hidden_layers * encoder_layer_activations(vision, weight)
    activations += captions * tokens * text.num_hidden_layers * encoder_layer_activations(text, weight)
    return JobBudget(
        parameters=count_parts(model, parts, config.optimizer),
        flops={name: part * batch for name, part in flops.items()},
        recomputed=0.0,
        activations=batch * activations,
        checkpointed=None,
        logits=0.0,
        fixed=buffer_bytes(model),
        samples=batch,
        tokens=0,
        images=batch,
    )


def buffer_bytes(model: nn.Module) -> float:
    """Bytes of the buffers of a model."""
    return float(sum(buffer.numel() * buffer.element_size() for buffer in model.buffers()))

"""Stage 2: one training step of the unified language model on packed documents (arXiv 2503.14324)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
from omegaconf import MISSING
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from data_pipeline.shards.code_shards import CodeGeometry, expected_features, require_same_codes
from data_pipeline.streams import DocumentLoader, DocumentStreamConfig, document_loader
from dualtoken.processing import DualTokenProcessor
from dualtoken.unified_model.config import WITH_FEATURES, DualTokenConfig, feature_fields, head_settings
from dualtoken.unified_model.model import DualTokenForCausalLM, DualTokenOutput
from dualtoken.unified_model.sequence import PackedBatch, SpecialTokens, add_special_tokens
from dualtoken.unified_model.vision_tower import VisionTower, name_in_siglip
from dualtoken.unified_model.visual_embedder import CODEBOOKS
from dualtoken.visual_tokenizer.backbone import load_backbone, model_folder
from dualtoken.visual_tokenizer.loading import load_visual_tokenizer
from pretrain.compilation import EVERYTHING, compile_parts
from pretrain.config import ConfigError, JobConfig
from pretrain.engine import (
    build_engine,
    count_parameters,
    gathered_for_writing,
    sharded_construction,
)
from pretrain.export import full_state_dict, save_config, saved_weights
from pretrain.flops import PackContents, learns, unified_model_flops
from pretrain.metrics import Averages
from pretrain.optim import freeze_parameters
from pretrain.recomputation import checkpoint_activations
from pretrain.runtime import Runtime
from pretrain.sequence_parallel import (
    own_stretch,
    pack_difference,
    require_same_packs,
    share_attention,
)
from pretrain.stepping import NotFiniteError, backward, take_step
from pretrain.tower_collapse import TowerWatch, packs_with_pictures


@dataclass
class MllmModelConfig:
    """The language model, the heads on it and the vocabularies."""

    visual_tokenizer: str = MISSING  # folder of an exported visual tokenizer: codebooks and geometry
    text_tokenizer: str = MISSING  # folder of a Hugging Face tokenizer; the image tokens are added to it
    llm: str | None = None  # folder or hub name of a base language model; else `llm_config`
    llm_config: dict[str, Any] = field(default_factory=dict)  # with `model_type`
    heads: dict[str, Any] = field(default_factory=dict)  # fields of DualTokenConfig, or a `preset` of them
    # Where heads.visual_input reads continuous features: folder or hub name of the SigLIP they are of.
    vision_tower: str | None = None
    # Of the tower, after which features are taken; null for the last but one.
    feature_layer: int | None = None
    # The tower stays outside: features come out of the shards, as pretokenize --features wrote them.
    precomputed_features: bool = False
    # An exported unified model to go on from (the previous phase), with its language model and its heads.
    init_from: str | None = None


@dataclass
class MllmLossConfig:
    """Weights of the log-likelihoods by modality."""

    text: float = 1.0
    pixel: float = 1.0
    semantic: float = 1.0
    # Weight of the squared log-partition of every classifier, within its modality; PaLM 1e-4, UniTok 5e-5.
    z_loss: float = 0.0


@dataclass
class MllmJobConfig(JobConfig):
    """Settings of the unified-model job."""

    job: str = "mllm"
    model: MllmModelConfig = field(default_factory=MllmModelConfig)
    losses: MllmLossConfig = field(default_factory=MllmLossConfig)
    frozen: list[str] = field(default_factory=list)  # patterns of parameter names
    gradient_checkpointing: bool = False  # of the language model's layers; the heads keep nothing in any case
    # What checkpointed layers keep: their input alone, or the results of matrix products and attention too.
    checkpointing_keeps: Literal["nothing", "products"] = "nothing"
    # Ranks, neighbours, that share each pack, a stretch of it each: for contexts too long for one GPU.
    sequence_parallel_size: int = 1
    data: DocumentStreamConfig = MISSING
    validation_data: DocumentStreamConfig | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.checkpointing_keeps != "nothing" and not self.gradient_checkpointing:
            raise ConfigError(
                f"checkpointing_keeps={self.checkpointing_keeps}: without checkpointing everything is kept; "
                "set gradient_checkpointing=true"
            )
        if self.micro_batch_size != 1:
            raise ConfigError(
                f"micro_batch_size={self.micro_batch_size}: expected 1, a forward pass takes one pack; "
                "make packs longer or shorter by data.context_length"
            )
        self._check_sequence_parallel()

    def _check_sequence_parallel(self) -> None:
        size = self.sequence_parallel_size
        if size < 1:
            raise ConfigError(f"sequence_parallel_size={size}: expected 1, for none, or more")
        for name in ("data", "validation_data"):
            stream = getattr(self, name)
            if size > 1 and getattr(stream, "documents_per_pack", 0):
                raise ConfigError(
                    f"sequence_parallel_size={size} with {name}.documents_per_pack="
                    f"{stream.documents_per_pack}: packs of any length cannot be split; leave one of them out"
                )
            length = getattr(stream, "context_length", 0)
            if length % size:
                raise ConfigError(
                    f"{name}.context_length={length} cannot be split: expected a multiple of "
                    f"sequence_parallel_size={size}, such as {-(-length // size) * size}"
                )
        if size > 1 and {"decoder", EVERYTHING} & set(self.compile):
            raise ConfigError(
                f"compile={','.join(self.compile)} with sequence_parallel_size={size}: what ranks exchange "
                "would break the graphs of decoder layers; leave them out (compile=[heads])"
            )

    def data_ranks(self, world_size: int) -> int:
        """Number of groups that share packs; see `JobConfig.data_ranks`."""
        size = self.sequence_parallel_size
        if world_size % size:
            raise ConfigError(
                f"sequence_parallel_size={size} on {world_size} rank(s): expected a multiple of {size} ranks"
            )
        return world_size // size


def compiled_parts(model: DualTokenForCausalLM) -> dict[str, list[nn.Module]]:
    """What `compile` may name of a unified model; the output layer is a head like the visual ones."""
    heads = [model.get_output_embeddings(), *(head for _, head in model.visual_heads())]
    return {"decoder": list(model.decoder.layers), "heads": heads}


class MllmTask:
    """Trains :class:`DualTokenForCausalLM` by next-token prediction over text and codes."""

    exported = ("model", "")

    def __init__(self, config: MllmJobConfig, runtime: Runtime):
        self.config, self.runtime = config, runtime
        if not Path(config.model.text_tokenizer).is_dir():
            raise ConfigError(
                f"model.text_tokenizer={config.model.text_tokenizer}: expected a folder with a Hugging Face "
                "tokenizer, such as the language model's own or that of `dualtoken sample-data`"
            )
        self.text_tokenizer = AutoTokenizer.from_pretrained(config.model.text_tokenizer)
        if not config.model.init_from:
            add_special_tokens(self.text_tokenizer, features=reads_features(config.model, config.model.heads))
        self.special = SpecialTokens.from_tokenizer(self.text_tokenizer)
        self.model = self.build_model()
        freeze_parameters(self.model, config.frozen)
        if config.gradient_checkpointing:
            checkpoint_activations(self.model, config.checkpointing_keeps)
        if config.sequence_parallel_size > 1:
            share_attention(self.model, config.sequence_parallel_size)
        compile_parts(compiled_parts(self.model), config.compile)
        self.model.to(runtime.device)
        self.train_loader = self.open_documents(config.data, "train")  # its mistakes come before engines
        self.engines = {"model": build_engine(self.model, config, runtime)}
        self.tower_watch = self.watch_tower()

    def build_model(self) -> DualTokenForCausalLM:
        """Build the unified model around the visual tokenizer's codebooks, sharded under ZeRO-3.

        Raises:
            ConfigError: `init_from` is no folder with a model, or there is another model beside it; a vision
                tower is missing, or not read.
            ValueError: `init_from` was trained with another visual or text tokenizer.
        """
        parts = self.config.model
        visual_tokenizer = load_visual_tokenizer(parts.visual_tokenizer)
        fingerprint = visual_tokenizer.fingerprint()
        if parts.init_from:
            for given in ("llm", "llm_config", "vision_tower"):
                if getattr(parts, given):
                    raise ConfigError(
                        f"model.{given} beside model.init_from={parts.init_from}: expected one of the two, "
                        f"the phase before brings its own models; leave model.{given} out"
                    )
            if not (Path(parts.init_from) / "config.json").is_file():
                raise ConfigError(
                    f"model.init_from={parts.init_from}: expected the export folder of a unified model, "
                    "such as the previous phase leaves in its run_dir"
                )
            with sharded_construction(self.config, self.runtime):
                # Exports hold fp32; their config names the precision they were trained in.
                model = DualTokenForCausalLM.from_pretrained(parts.init_from, dtype=torch.float32)
            expected = model.config.tokenizer_fingerprint
            require_same_codes(parts.visual_tokenizer, fingerprint, expected, parts.init_from)
            require_heads(model.config, head_settings(parts.heads), parts.init_from)
            if model.config.special != self.special:
                raise ValueError(
                    f"{parts.init_from} has {model.config.special}, the text tokenizer "
                    f"{parts.text_tokenizer} {self.special}; expected the one it was trained with, "
                    "which is in that folder too"
                )
            first_code = model.config.first_code
            if first_code is not None and len(self.text_tokenizer) > first_code:
                raise ValueError(
                    f"the text tokenizer {parts.text_tokenizer} has {len(self.text_tokenizer)} tokens, but "
                    f"codes begin at row {first_code} of the vocabulary of {parts.init_from}; expected the "
                    "one it was trained with, which is in that folder too"
                )
            return model
        if bool(parts.llm) == bool(parts.llm_config):
            raise ConfigError("model.llm and model.llm_config: give one of the two, a base model or a config")
        text_config = AutoConfig.from_pretrained(parts.llm) if parts.llm else dict(parts.llm_config)
        heads, whole = dict(parts.heads), None
        if parts.vision_tower:
            whole = load_backbone(parts.vision_tower).vision_model
            tower = VisionTower.of_model(whole, parts.feature_layer)
            heads |= feature_fields(tower, inside=not parts.precomputed_features)
        config = DualTokenConfig.for_tokenizers(text_config, self.text_tokenizer, visual_tokenizer, **heads)
        with sharded_construction(self.config, self.runtime):
            if parts.llm:
                model = DualTokenForCausalLM.from_base(config, parts.llm)
            else:
                model = AutoModelForCausalLM.from_config(config)
        model.set_codebooks(visual_tokenizer.codebooks(), fingerprint)
        if model.post_quantization is not None:
            with gathered_for_writing(model.post_quantization):
                model.set_post_quantization(
                    visual_tokenizer.postquant_pixel, visual_tokenizer.postquant_semantic
                )
        if model.vision_tower is not None:
            with gathered_for_writing(model.vision_tower):
                model.set_vision_tower(whole)
        return model

    def watch_tower(self) -> TowerWatch | None:
        """Begin to watch a vision tower that learns, on the first held-out pictures; None if there are none.

        A checkpoint is not loaded yet, so what it is compared with is what the run began with, each time.
        """
        tower, data = self.model.vision_tower, self.config.validation_data
        if tower is None or data is None or not learns(tower):
            return None
        device = self.runtime.device
        packs = packs_with_pictures(self.open_documents(data, "val", shared=True))
        if not packs:
            return None
        self.model.eval()
        with torch.no_grad():
            watch = TowerWatch(tower, packs, lambda pack: self.score(pack.to(device)), self.config.health)
        self.engines["model"].train()
        return watch

    def open_documents(
        self, config: DocumentStreamConfig, split: str, shared: bool = False
    ) -> DocumentLoader:
        """Open a stream of packed documents whose codes are those the model speaks.

        Args:
            config: of the stream.
            split: `train` or `val`.
            shared: whether every rank reads all of it, and not its part.
        """
        model = self.model.config
        return document_loader(
            config,
            self.text_tokenizer,
            CodeGeometry(
                model.positions_per_image, model.num_quantizers, model.codebook_size, model.num_codebooks
            ),
            model.tokenizer_fingerprint,
            0 if shared else self.runtime.data_rank,
            1 if shared else self.runtime.data_ranks,
            self.config.seed,
            split,
            model.image_layout,
            expected_features(model),
        )

    def describe(self) -> list[str]:
        """Return a line per part, with its parameters, and how the data is divided."""
        lines = [
            f"{name:<22} {count_parameters(part):>13,} parameters, {count_parameters(part, True):>13,} train"
            for name, part in self.model.parts().items()
        ]
        if (size := self.config.sequence_parallel_size) > 1:
            own = self.config.data.context_length // size
            lines.append(f"Ulysses: {size} ranks share each pack, {own:,} tokens of it a rank")
        if self.tower_watch is not None:
            lines.append(self.tower_watch.describe())
        elif self.model.vision_tower is not None and learns(self.model.vision_tower):
            lines.append(
                "vision tower not watched: validation_data has no pictures to look for a collapse on"
            )
        return [*lines, self.train_loader.describe()]

    def train_step(self, micro_batches: list[PackedBatch]) -> dict[str, Any]:
        """Take one optimizer step on the documents of all micro-batches and ranks.

        Raises:
            DatasetError: ranks that should share packs have different ones; the step was taken.
        """
        # What the host has to know of packs it asks before they are on the device.
        contents = [PackContents.of_batch(batch, self.special) for batch in micro_batches]
        size = self.config.sequence_parallel_size
        difference = pack_difference(micro_batches, size) if size > 1 else None
        micro_batches = [batch.to(self.runtime.device, non_blocking=True) for batch in micro_batches]
        positions = self.supervised_positions(micro_batches)
        averages = Averages(self.runtime.device)
        for batch in micro_batches:
            output = self.score(batch, self.config.losses.z_loss)
            # Summed over tokens and depths, divided by the positions of the whole step: every supervised
            # position weighs the same, whichever rank and micro-batch it fell into.
            backward(self.engines["model"], self.weighted_sum(output) / positions, reduction="sum")
            add_figures(averages, output)
            averages.add("padding_share", batch.padding, batch.input_ids.numel())
        # Packs are what the recipe counts, documents what papers call a batch.
        totals: dict[str, float] = {"documents": sum(pack.documents for pack in contents)}
        totals["count/tokens"] = sum(pack.tokens for pack in contents)
        totals["count/images"] = sum(pack.pictures for pack in contents)
        work = ("pairs", "visual_positions", "text_targets", "visual_targets", "feature_pictures")
        for name in (*work, "feature_positions"):
            totals[f"work/{name}"] = sum(getattr(pack, name) for pack in contents)
        for name, total in {**totals, **self.train_loader.statistics.figures()}.items():
            # A group counts its packs `size` times.
            averages.add(name, total, size / self.runtime.world_size)
        if difference is not None:
            averages.add("difference", difference)
        try:
            figures = take_step(self.engines, averages)
        except NotFiniteError as error:
            require_same_packs(error.figures.pop("difference", 0.0))
            raise
        require_same_packs(figures.pop("difference", 0.0))
        return figures

    def score(self, batch: PackedBatch, z_loss: float = 0.0) -> DualTokenOutput:
        """Run the model on a pack, or on this rank's stretch of it."""
        size = self.config.sequence_parallel_size
        stretch = own_stretch(batch.input_ids.shape[1], size) if size > 1 else None
        return self.engines["model"](**batch.model_inputs(), z_loss=z_loss, stretch=stretch)

    def flops(self, amounts: Mapping[str, float]) -> float:
        """FLOPs of steps with these amounts; padding, and what is computed twice, not among them."""
        work = {name.partition("/")[2]: total for name, total in amounts.items() if name.startswith("work/")}
        pack = PackContents(tokens=amounts["count/tokens"], **work)
        return sum(part.total for part in unified_model_flops(self.model, pack).values())

    def supervised_positions(self, micro_batches: list[PackedBatch]) -> Tensor:
        """Count the supervised text and visual positions of this step over all ranks, at least 1."""
        count = torch.zeros((), device=self.runtime.device)
        for batch in micro_batches:
            count += (batch.labels != -100).sum() + batch.visual_loss_mask.sum()
        if self.runtime.world_size > 1:
            dist.all_reduce(count)
        return (count / self.config.sequence_parallel_size).clamp(min=1)

    def weighted_sum(self, output: DualTokenOutput) -> Tensor:
        """Sum the negative log-likelihoods of a micro-batch, weighted by modality (equations 5 to 8)."""
        weights = self.config.losses
        text, visual = output.text_nll, output.visual_nll
        if weights.z_loss:
            text, visual = text + output.text_z_loss, visual + output.visual_z_loss
        branches = zip(CODEBOOKS, visual.sum(dim=1))  # [Q, D] -> [Q]
        return weights.text * text + sum(getattr(weights, name) * nll for name, nll in branches)

    def validate(self) -> dict[str, float]:
        """Return the negative log-likelihoods per token and depth (nats) on the validation documents.

        And how a vision tower that learns stands to where it began.
        """
        if self.config.validation_data is None:
            return {}
        self.model.eval()
        averages = Averages(self.runtime.device)
        loader = self.open_documents(self.config.validation_data, "val")
        for batch in self.runtime.together(loader, self.config.validate_batches):
            add_figures(averages, self.score((batch or loader.empty_batch()).to(self.runtime.device)))
        watched = {} if self.tower_watch is None else self.tower_watch.figures()
        return {**averages.reduce(), **watched}

    def state_dict(self) -> dict[str, Any]:
        """Return this rank's state beyond the engine's, of which there is none."""
        return {}

    def load_state_dicts(self, states: list[dict[str, Any]]) -> None:
        """Take back what :meth:`state_dict` gave."""

    def frozen_weights(self) -> dict[str, Tensor]:
        """What a bf16 engine rounded of the parts that this phase leaves alone, from where they came.

        Under ZeRO-3 they are rounded while they are loaded, so they are read once more. A base language model
        is taken as the engine has it: those are released in bf16.
        """
        if self.runtime.dtype == torch.float32 or not self.runtime.is_main:
            return {}
        parts = self.config.model
        names = [name for name, parameter in self.model.named_parameters() if not parameter.requires_grad]
        if parts.init_from:
            return saved_weights(parts.init_from, {name: name for name in names})
        prefix = "post_quantization."
        originals = {f"postquant_{n.removeprefix(prefix)}": n for n in names if n.startswith(prefix)}
        weights = saved_weights(parts.visual_tokenizer, originals)
        prefix = "vision_tower."
        own = [n for n in names if n.startswith(prefix)]
        originals = {f"vision_model.{name_in_siglip(n.removeprefix(prefix))}": n for n in own}
        if originals:
            weights |= saved_weights(model_folder(parts.vision_tower), originals)
        return weights

    def export(self, directory: Path) -> None:
        """Write the model in fp32 with its processor and text tokenizer, as the Auto classes load them."""
        state = full_state_dict(self.engines["model"], self.frozen_weights())
        if self.runtime.is_main:
            self.model.save_pretrained(directory, state_dict=state)
            self.export_assets(directory)

    def export_assets(self, directory: Path) -> None:
        """Write the model's config, its processor and text tokenizer."""
        save_config(self.model, directory)
        processor = DualTokenProcessor.for_config(self.model.config, self.text_tokenizer)
        processor.save_pretrained(directory)


def reads_features(parts: MllmModelConfig, heads: Mapping[str, Any]) -> bool:
    """Whether a new model with these heads reads continuous features of a vision tower.

    Raises:
        ConfigError: a tower is missing, or not read.
    """
    reads = heads.get("visual_input") in WITH_FEATURES
    if reads != bool(parts.vision_tower):
        raise ConfigError(
            f"model.vision_tower={parts.vision_tower} with model.heads.visual_input="
            f"{heads.get('visual_input', 'both')}: expected a SigLIP for "
            f"{', '.join(WITH_FEATURES)}, and none without"
        )
    return reads


def require_heads(config: DualTokenConfig, heads: Mapping[str, Any], folder: str) -> None:
    """Raise ConfigError unless the model in a folder has the fields that a recipe asks of its heads."""
    for name, value in heads.items():
        if (found := getattr(config, name, None)) != value:
            raise ConfigError(
                f"model.heads.{name}={value}, but {folder} has {name}={found}: leave it out, a model keeps "
                "its heads from phase to phase"
            )


def add_figures(averages: Averages, output: DualTokenOutput) -> None:
    """Add a micro-batch's likelihoods and accuracies, per supervised position and, for codes, per depth."""
    averages.add("loss/text", output.text_nll, output.text_count)
    averages.add("accuracy/text", output.text_correct, output.text_count)
    if output.text_z_loss is not None:
        averages.add("z_loss/text", output.text_z_loss, output.text_count)
        for branch, z_loss in zip(CODEBOOKS, output.visual_z_loss):
            averages.add(f"z_loss/{branch}", z_loss.sum(), output.visual_count)
    for branch, nll, correct in zip(CODEBOOKS, output.visual_nll, output.visual_correct):
        averages.add(f"loss/{branch}", nll.sum(), output.visual_count)
        for depth in range(len(nll)):
            averages.add(f"nll_{branch}/depth_{depth + 1}", nll[depth], output.visual_count)
            averages.add(f"accuracy_{branch}/depth_{depth + 1}", correct[depth], output.visual_count)

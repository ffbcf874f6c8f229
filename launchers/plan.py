"""What a recipe takes on a cluster: sizes, memory, FLOPs, communication, time; nothing is run."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from data_pipeline.shards.code_shards import CodeSample, encode_sample
from launchers.errors import UserError
from launchers.gpus import gpu_named
from pretrain.budget import (
    FP32,
    LEVELS,
    HeldBytes,
    ParameterCount,
    SentBytes,
    checkpoint_bytes,
    sent_bytes,
    state_bytes,
)
from pretrain.config import JobConfig, load_job_config
from pretrain.engine import zero_level
from pretrain.flops import Flops
from pretrain.gpus import Gpu
from pretrain.job_budget import JobBudget, job_budget
from pretrain.planned_models import NOT_GIVEN, ModelOptions
from pretrain.runtime import read_deepspeed_file

RESERVE = 3e9  # bytes: CUDA context, NCCL, fragmentation; a guess
TAR_BLOCK = 512


@dataclass(frozen=True)
class Cluster:
    """Where a run is planned for.

    Attributes:
        nodes: machines.
        gpus: of each.
        gpu: their kind, a name in `GPUS`.
        mfu: share of the GPUs' peak that a step's FLOPs take, those of checkpointing not counted.
        intra: bytes/s of a GPU to the others of its node, one direction; None for the data sheet's.
        inter: bytes/s out of a node, one direction; None for an adapter a GPU.
    """

    nodes: int
    gpus: int
    gpu: str
    mfu: float = 0.4
    intra: float | None = None
    inter: float | None = None

    @property
    def ranks(self) -> int:
        """One for each GPU."""
        return self.nodes * self.gpus

    @property
    def link(self) -> float:
        """Bytes/s of a ring of all ranks: it enters and leaves a node once for all its GPUs."""
        figures = gpu_named(self.gpu)
        intra = self.intra or figures.nvlink
        return intra if self.nodes == 1 else min(intra, self.inter or figures.adapter * self.gpus)


@dataclass
class Part:
    """A part's parameters, and FLOPs of a step over all ranks."""

    name: str
    parameters: ParameterCount
    flops: Flops


@dataclass
class Level:
    """What a ZeRO level means for a rank."""

    level: int
    is_recipes: bool
    held: HeldBytes  # as the recipe says
    total: float
    fits: bool
    total_other: float | None  # with checkpointing switched on, or off
    fits_other: bool | None
    sent: SentBytes
    seconds: float  # of sending alone


@dataclass
class Plan:
    """All of it; bytes, FLOPs and seconds."""

    recipe: str
    job: str
    ranks: int
    gpu: str
    gpu_memory: float
    precision: str
    mfu: float
    link: float  # bytes/s of a ring of all ranks
    assumed: list[str]
    parts: list[Part]
    micro_steps: int
    checkpointing: bool | None
    levels: list[Level]
    flops: float  # of a step, over all ranks
    recomputed: float
    seconds_per_step: float
    samples_per_step: float
    sample: str  # what a sample is
    tokens_per_second: float
    images_per_second: float
    steps: int
    hours: float
    gpu_hours: float
    checkpoint: float
    export: float
    code_bytes: int = 0  # of a picture
    shard_bytes: int = 0  # of a picture with a text, in a tar
    codes_per_second: float = 0.0  # bytes, of a node
    encode_seconds: float = 0.0  # of a picture on a GPU, in fp32


def make_plan(
    recipe: str,
    settings: Sequence[str],
    cluster: Cluster,
    options: ModelOptions,
    samples: int | None = None,
    text_tokens: int = 64,
    plain_tokens: int = 512,
) -> Plan:
    """Plan a recipe on a cluster.

    Args:
        recipe: name or path.
        settings: words `key=value`.
        cluster: where it runs.
        options: models that the recipe does not have.
        samples: documents or pictures to train on; None for the recipe's steps.
        text_tokens: of a document besides its picture.
        plain_tokens: of a document without one.

    Raises:
        ConfigError, ValueError: the recipe does not run there, or names what is neither there nor known.
        UserError: no figures of the GPU, or an MFU that is no share.
    """
    gpu = gpu_named(cluster.gpu)
    if not 0 < cluster.mfu <= 1:
        raise UserError(
            f"--mfu {cluster.mfu}: expected a share of the peak, above 0 and up to 1, such as 0.4"
        )
    words = [f"recipe={recipe}", *settings]
    config = load_job_config(words, cluster.ranks, in_place_of_missing=NOT_GIVEN)
    if config.job != "mllm" and (options.llm or options.visual_tokenizer):
        raise UserError(
            f"--llm and --visual-tokenizer are for unified models, {recipe} is a {config.job} job; "
            "its model is set by key=value, such as model.preset=so400m_384"
        )
    in_bf16 = config.precision != "fp32"  # auto: these GPUs compute in it
    weight = 2 if in_bf16 else FP32
    budget = job_budget(config, weight, options, text_tokens, plain_tokens)
    micro_steps = config.micro_steps(cluster.ranks)
    micro_batches = micro_steps * config.data_ranks(cluster.ranks)
    flops = {name: part * micro_batches for name, part in budget.flops.items()}
    total = sum(part.total for part in flops.values())
    checkpointing = getattr(config, "gradient_checkpointing", None)
    seconds = total / (cluster.mfu * cluster.ranks * (gpu.bf16 if in_bf16 else gpu.fp32))
    samples_per_step = budget.samples * micro_batches
    steps = config.steps if samples is None else math.ceil(samples / samples_per_step)
    images = budget.images * micro_batches / seconds
    empty = ParameterCount(0, 0)
    parameters = dict(budget.parameters)
    if budget.second is not None:
        parameters["discriminator"] = budget.second[0]
    everything = sum(parameters.values(), empty)
    plan = Plan(
        recipe=recipe,
        job=config.job,
        ranks=cluster.ranks,
        gpu=cluster.gpu,
        gpu_memory=gpu.memory,
        precision="bf16" if in_bf16 else "fp32",
        mfu=cluster.mfu,
        link=cluster.link,
        assumed=[*options.notes, *budget.notes],
        parts=[
            Part(name, parameters.get(name, empty), flops.get(name, Flops()))
            for name in dict.fromkeys([*parameters, *flops])
        ],
        micro_steps=micro_steps,
        checkpointing=checkpointing,
        levels=[_level(level, config, budget, cluster, gpu, weight) for level in LEVELS],
        flops=total,
        recomputed=budget.recomputed * micro_batches if checkpointing else 0.0,
        seconds_per_step=seconds,
        samples_per_step=samples_per_step,
        sample="document" if config.job == "mllm" else "picture",
        tokens_per_second=budget.tokens * micro_batches / seconds,
        images_per_second=images,
        steps=steps,
        hours=steps * seconds / 3600,
        gpu_hours=steps * seconds / 3600 * cluster.ranks,
        checkpoint=checkpoint_bytes(everything, weight),
        export=float(FP32 * budget.count.total),
    )
    if budget.code_bytes:
        plan.code_bytes = budget.code_bytes
        plan.shard_bytes = shard_bytes(budget.code_bytes, text_tokens)
        plan.encode_seconds = budget.encode / (cluster.mfu * gpu.fp32)
        plan.codes_per_second = images / cluster.nodes * plan.shard_bytes if config.job == "mllm" else 0.0
    return plan


def shard_bytes(code_bytes: int, text_tokens: int) -> int:
    """Bytes in a shard of a picture of `code_bytes` of codes with a text of four letters a token."""
    codes = np.zeros((1, code_bytes // 2, 1, 1), np.uint16)
    members = encode_sample(CodeSample("0" * 9, codes, [{"image": 0}, {"text": "word" * text_tokens}]))
    return sum(TAR_BLOCK + -(-len(content) // TAR_BLOCK) * TAR_BLOCK for _, content in members)


def _level(
    level: int, config: JobConfig, budget: JobBudget, cluster: Cluster, gpu: Gpu, weight: int
) -> Level:
    """What a level holds and sends, with the settings of the recipe's file if that is its level."""
    is_recipes = zero_level(config) == level
    settings = read_deepspeed_file(config.deepspeed if is_recipes else f"zero{level}.json")
    gradient = {"fp32": 4, "bf16": 2, "fp16": 2}.get(settings.get("communication_data_type", ""), weight)
    micro_steps = config.micro_steps(cluster.ranks)
    held = state_bytes(level, cluster.ranks, budget.count, weight, settings["zero_optimization"])
    sent = sent_bytes(level, cluster.ranks, budget.count, weight, micro_steps, gradient, budget.gathered)
    if budget.second is not None:
        count, own_level = budget.second
        zero = read_deepspeed_file(f"zero{own_level}.json")["zero_optimization"]
        held += state_bytes(own_level, cluster.ranks, count, weight, zero)
        sent += sent_bytes(own_level, cluster.ranks, count, weight, micro_steps, gradient)
    checkpointing = getattr(config, "gradient_checkpointing", False)
    activations = {False: budget.activations, True: budget.checkpointed}
    held = replace(
        held, fixed=budget.fixed, activations=activations[checkpointing] or 0.0, logits=budget.logits
    )
    other = activations[not checkpointing]
    total_other = None if other is None else held.total - held.activations + other
    room = gpu.memory - RESERVE
    return Level(
        level=level,
        is_recipes=is_recipes,
        held=held,
        total=held.total,
        fits=held.total <= room,
        total_other=total_other,
        fits_other=None if total_other is None else total_other <= room,
        sent=sent,
        seconds=sent.total / cluster.link,
    )

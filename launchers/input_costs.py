"""What a visual input costs a unified model: positions, parameters, FLOPs by formula, speed as measured."""

from __future__ import annotations

import hashlib
import statistics
from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from data_pipeline.shards.code_shards import CodeGeometry, expected_features
from data_pipeline.streams import document_loader
from dualtoken.unified_model.config import DualTokenConfig
from dualtoken.unified_model.sequence import PackedBatch
from dualtoken.unified_model.vision_tower import VisionTower
from dualtoken.visual_tokenizer.loading import load_visual_tokenizer_config
from dualtoken.visual_tokenizer.model import DualTokenVisualTokenizer
from dualtoken.visual_tokenizer.vq_config import VQTokenizerConfig
from dualtoken.visual_tokenizer.vq_tokenizer import VQTokenizer
from eval.results import read_json
from pretrain.config import load_job_config
from pretrain.flops import Chain, PackContents, run_tower, unified_model_flops
from pretrain.metrics import read_metrics
from pretrain.mllm_task import MllmJobConfig
from pretrain.optim import freeze_parameters
from pretrain.tokenizer_flops import encode_flops

PACKS = 8  # of which documents are counted


def measure_costs(folder: Path) -> dict[str, float]:
    """Figures of a finished training of a unified model.

    `positions` that the decoder reads of a picture, marks included; `tokens` of a document; `parameters` of
    the model without a vision tower; `flops` of a document in a training step, forward and backward pass,
    without a vision tower; `tower_parameters`, `tower_flops` as of `seeing_costs`; `documents_per_second` and
    `tokens_per_second` of this training; `documents_digest` tells which documents its stream begins with.

    Args:
        folder: its run folder, with `config.yaml`, `metrics.jsonl` and `export`.
    """
    done = read_json(folder / "done.json") or {}
    job = load_job_config([f"recipe={folder / 'config.yaml'}"], world_size=done.get("world_size", 1))
    assert isinstance(job, MllmJobConfig)
    config = DualTokenConfig.from_pretrained(folder / "export")
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    freeze_parameters(model, job.frozen)
    batches = first_packs(job, config, folder / "export")
    contents = [PackContents.of_batch(batch, config.special) for batch in batches]
    documents = sum(pack.documents for pack in contents)
    flops = sum(
        part.total
        for pack in contents
        for name, part in unified_model_flops(model, pack).items()
        if name != "vision_tower"
    )
    own = (one for name, one in model.named_parameters() if not name.startswith("vision_tower."))
    parameters = sum(parameter.numel() for parameter in own)
    seeing = seeing_costs(Path(job.model.visual_tokenizer), config, model.vision_tower)
    return {
        "positions": float(positions_of_picture(config)),
        "tokens": sum(pack.tokens for pack in contents) / documents,
        "parameters": float(parameters),
        "flops": flops / documents,
        **seeing,
        **speed(folder),
        "documents_digest": digest(batches),
    }


def digest(batches: Sequence[PackedBatch]) -> float:
    """A number that tells which documents packs hold, and in which order."""
    keys = "\n".join(key for batch in batches for key in batch.keys)
    return float(int(hashlib.sha256(keys.encode()).hexdigest()[:12], 16))  # 48 bits: exact


def first_packs(job: MllmJobConfig, config: DualTokenConfig, text_tokenizer: Path) -> list[PackedBatch]:
    """The first packs that a training of one rank reads."""
    loader = document_loader(
        job.data,
        AutoTokenizer.from_pretrained(text_tokenizer),
        CodeGeometry(
            config.positions_per_image, config.num_quantizers, config.codebook_size, config.num_codebooks
        ),
        config.tokenizer_fingerprint,
        seed=job.seed,
        layout=config.image_layout,
        features=expected_features(config),
    )
    try:
        return [next(loader) for _ in range(PACKS)]
    finally:
        loader.close()


def positions_of_picture(config: DualTokenConfig) -> int:
    """Positions that a picture to read takes in the sequence at most, marks included."""
    layout = config.image_layout
    own = [config.positions_per_image] * layout.codes + [layout.most_positions] * bool(layout.features)
    return 2 + sum(own) + (len(own) - 1)  # the marks, and what stands between codes and features


def seeing_costs(
    visual_tokenizer: Path, config: DualTokenConfig, tower: VisionTower | None
) -> dict[str, float]:
    """Parameters and FLOPs between a picture's pixels and what the decoder reads of it."""
    parameters = flops = 0.0
    if config.image_layout.codes:
        visual = load_visual_tokenizer_config(visual_tokenizer)
        is_vq = isinstance(visual, VQTokenizerConfig)
        with torch.device("meta"):
            tokenizer = VQTokenizer(visual) if is_vq else DualTokenVisualTokenizer(visual)
        parameters += sum(tensor.numel() for tensor in tokenizer.encoding_state().values())
        flops += encode_flops(tokenizer)
    if tower is not None:
        chain = Chain()
        run_tower(chain, "tower", tower, config.features_per_image)
        parameters += sum(parameter.numel() for parameter in tower.parameters())
        flops += chain.parts["tower"].forward
    return {"tower_parameters": parameters, "tower_flops": flops}


def speed(folder: Path) -> dict[str, float]:
    """Documents and tokens a second, over all ranks: medians over the log lines but the first."""
    lines = [record for record in read_metrics(folder / "metrics.jsonl") if record["split"] == "train"]
    lines = lines[1:] or lines
    return {
        "documents_per_second": statistics.median(
            record["documents"] / record["seconds_per_step"] for record in lines
        ),
        "tokens_per_second": statistics.median(record["tokens_per_second"] for record in lines),
    }

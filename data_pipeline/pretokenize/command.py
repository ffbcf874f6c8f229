"""Offline tokenization: image-text shards to dual-code shards, in parallel, resumable, nothing lost.

Any number of workers run this on one output folder (under `deepspeed --module data_pipeline.pretokenize`,
`torchrun`, `srun`, Slurm arrays, or alone). Each claims input shards one by one and writes one output shard
for each; the last to finish writes `rejected.jsonl`, the Energon index and `dataset.json`. A run
that was killed is finished by running the same command again, and gives the same bytes.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from data_pipeline.errors import DatasetError
from data_pipeline.pretokenize.claims import Claims
from data_pipeline.pretokenize.plan import plan_lines
from data_pipeline.pretokenize.run import FINISH, PretokenizeRun, checked_plan
from data_pipeline.pretokenize.shard_tokenizer import Settings, ShardTokenizer
from data_pipeline.shards.code_shards import DatasetManifest
from data_pipeline.shards.image_text_shards import expand_inputs

logger = logging.getLogger(__name__)

_WAIT_SECONDS, _LONGEST_WAIT_SECONDS = 0.2, 5.0


def pretokenize(
    inputs: Sequence[str],
    visual_tokenizer: Any,
    decoder: Callable[[Sequence[bytes]], Any],
    output: str | Path,
    settings: Settings | None = None,
    *,
    vision_tower: Any = None,
    rank: int = 0,
    world_size: int = 1,
    claim_timeout: float = 300.0,
    report: Callable[[str], None] = logger.info,
) -> DatasetManifest:
    """Turn image-text shards into a dual-code data set, together with the other workers on `output`.

    Args:
        inputs: Folders, globs, brace patterns or addresses of input shards.
        visual_tokenizer: What `load_visual_tokenizer` gives, on its device.
        decoder: From `build_image_decoder`, for the tokenizer's image size and device.
        output: Folder of the data set.
        settings: What else changes the output.
        vision_tower: A `VisionTower` on the same device, where `settings.features` says that its features
            are kept.
        rank: Of this worker; it only spreads where workers start.
        world_size: Number of workers.
        claim_timeout: Seconds after which a worker of another machine that gives no sign is taken for dead.
        report: Takes a line about the progress now and then.

    Returns:
        The manifest of the finished data set, the same for every worker.

    Raises:
        DatasetError: No input, no usable sample, or the folder holds something else.
    """
    tokenizer = ShardTokenizer(visual_tokenizer, decoder, settings or Settings(), vision_tower)
    run = PretokenizeRun(checked_plan(inputs, output), tokenizer, Path(output), world_size, report)
    if run.is_finished():
        run.remove_work_folder()
        return run.finished_before()
    claims = None
    try:
        run.agree_on_plan()
        claims = Claims(run.work / "claims", claim_timeout)
        names = list(run.plan)
        start = len(names) * rank // world_size
        left = deque(names[start:] + names[:start])
        wait = _WAIT_SECONDS
        while not run.is_finished():
            if (claimed := run.claim_shard(left, claims)) is not None:
                run.tokenize_shards(claimed, left, claims)
            elif not left and claims.acquire(FINISH):
                if not run.is_finished():
                    run.finish()
                claims.release(FINISH)
            else:
                time.sleep(wait)  # the others are at it; should one die, its claim becomes void
                wait = min(1.5 * wait, _LONGEST_WAIT_SECONDS)
                continue
            wait = _WAIT_SECONDS
    except FileNotFoundError:
        if not run.is_finished():  # else another worker has just removed the work folder
            raise
    finally:
        if claims is not None:
            claims.close()
    run.remove_work_folder()  # a worker that came late may have made it anew
    return DatasetManifest.load(run.output)


def dry_run(
    inputs: Sequence[str],
    visual_tokenizer: Any,
    decoder: Callable[[Sequence[bytes]], Any],
    output: str | Path,
    settings: Settings | None = None,
    *,
    vision_tower: Any = None,
    workers: int = 1,
    report: Callable[[str], None] = logger.info,
) -> None:
    """Report what `pretokenize` with these arguments would do and how long it would take; write nothing.

    Raises:
        DatasetError: As `pretokenize`, or no image of the input can be used.
    """
    tokenizer = ShardTokenizer(visual_tokenizer, decoder, settings or Settings(), vision_tower)
    run = PretokenizeRun(checked_plan(inputs, output), tokenizer, Path(output), workers, report)
    if run.is_finished():
        run.finished_before()
    run.check_plan()
    run.look_for_results()
    done = set(run.plan) if run.is_finished() else run.done
    for line in plan_lines(run.plan, done, tokenizer, workers):
        report(line)
    report("dry run: nothing was written")


def _parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m data_pipeline.pretokenize",
        description="Turn shards of images with text into shards of codes with text.",
    )
    parser.add_argument(
        "--inputs", nargs="+", required=True, help="folders, globs, brace patterns or addresses"
    )
    parser.add_argument("--visual-tokenizer", required=True, help="folder of the visual tokenizer")
    parser.add_argument("--output", required=True, type=Path, help="folder of the data set to be made")
    parser.add_argument(
        "--batch-size", type=int, default=Settings.batch_size, help="images encoded at a time"
    )
    parser.add_argument(
        "--precision",
        default=Settings.precision,
        help="of the towers, fp32 or bf16 (faster on GPUs, and some codes are others: docs/data.md)",
    )
    parser.add_argument(
        "--features",
        default=Settings.features,
        help="for models with continuous features: float16 or bfloat16, those of --vision-tower; "
        "pixels, for a tower in the model; or none",
    )
    parser.add_argument("--vision-tower", help="folder, or name on the hub, of a SigLIP")
    parser.add_argument(
        "--feature-layer", type=int, help="of the tower, after which features are taken; the last but one"
    )
    parser.add_argument(
        "--tiles",
        default=Settings.tiles,
        help="rows x columns of the grids of tiles that pictures are cut into for --features besides: "
        "1x2,2x1,2x2,1x3,3x1, say; none by default",
    )
    parser.add_argument("--backend", default="auto", help="image decoding: auto, dali, torchvision or pil")
    parser.add_argument(
        "--fit", default="resize", help="resize (the whole image) or crop (its central square)"
    )
    parser.add_argument("--decoding-threads", type=int, default=1)
    parser.add_argument("--default-language", default=Settings.default_language, help="of KEY.txt captions")
    parser.add_argument("--prefix-keys", action="store_true", help="put the shard's name before keys")
    parser.add_argument("--chat-template", default=Settings.chat_template, help="qwen, vicuna or plain")
    parser.add_argument("--images-first", action="store_true", help="move the images of a turn to its start")
    parser.add_argument("--generate-images", action="store_true", help="learn the images of documents too")
    parser.add_argument(
        "--on-bad-shard",
        default=Settings.on_bad_shard,
        help="where nothing of a shard can be read, addresses after some tries: stop or skip",
    )
    parser.add_argument(
        "--claim-timeout", type=float, default=300.0, help="seconds until a silent worker is dead"
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="tell what would be done and how long it takes; write nothing"
    )
    parser.add_argument(
        "--workers", type=int, help="workers that --dry-run reckons with, by default those of this launch"
    )
    parser.add_argument("--local_rank", "--local-rank", type=int, default=0, help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def place_among_workers(environment: Mapping[str, str], local_rank: int = 0) -> tuple[int, int, int]:
    """Return rank, number of workers and rank on this machine, as the launcher, array or `srun` says."""
    if "RANK" in environment:
        names = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
    elif "SLURM_ARRAY_TASK_ID" in environment:
        names = ("SLURM_ARRAY_TASK_ID", "SLURM_ARRAY_TASK_COUNT", "SLURM_LOCALID")
    elif "SLURM_PROCID" in environment:
        names = ("SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID")
    else:
        names = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
    rank, world_size, local = (
        int(environment.get(name, default)) for name, default in zip(names, (0, 1, local_rank))
    )
    return rank % world_size, world_size, local


def _run_command(options: argparse.Namespace, report: Callable[[str], None]) -> None:
    if not Path(options.visual_tokenizer).is_dir():
        raise DatasetError(
            f"{options.visual_tokenizer}: no such folder; expected an exported visual tokenizer"
        )
    if options.workers is not None and (options.workers < 1 or not options.dry_run):
        raise ValueError(f"--workers {options.workers}: expected 1 or more, and --dry-run with it")
    expand_inputs(options.inputs)  # a mistake is told before anything is loaded

    import torch

    from data_pipeline.images.decoding import build_image_decoder
    from dualtoken.visual_tokenizer.loading import load_visual_tokenizer

    rank, world_size, local_rank = place_among_workers(os.environ, options.local_rank)
    device = torch.device("cpu")
    if torch.cuda.is_available():
        # Slurm may show each task no device but its own.
        device = torch.device("cuda", 0 if torch.cuda.device_count() == 1 else local_rank)
    settings = Settings(**{field.name: getattr(options, field.name) for field in fields(Settings)})
    visual_tokenizer: Any = load_visual_tokenizer(options.visual_tokenizer)
    visual_tokenizer.to(device)
    image_size = visual_tokenizer.config.image_size
    decoder = build_image_decoder(
        image_size,
        options.backend,
        device,
        options.fit,
        num_threads=options.decoding_threads,
        tiles=settings.tiles_of(image_size),
    )
    report(f"worker {rank} of {world_size}: {decoder.describe()}; encoded in {settings.precision}")
    vision_tower = None
    if options.vision_tower is not None:
        from dualtoken.unified_model.vision_tower import VisionTower
        from dualtoken.visual_tokenizer.backbone import load_backbone

        whole = load_backbone(options.vision_tower).vision_model
        vision_tower = VisionTower.of_model(whole, options.feature_layer).to(device)
    what = (options.inputs, visual_tokenizer, decoder, options.output, settings)
    if options.dry_run:
        if rank == 0:
            workers = options.workers or world_size
            dry_run(*what, vision_tower=vision_tower, workers=workers, report=report)
        return
    pretokenize(
        *what,
        vision_tower=vision_tower,
        rank=rank,
        world_size=world_size,
        claim_timeout=options.claim_timeout,
        report=report,
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; a user's mistake is one line on standard error and exit code 2."""

    def report(line: str) -> None:
        sys.stdout.write(f"pretokenize: {line}\n")
        sys.stdout.flush()

    try:
        _run_command(_parse_arguments(arguments), report)
    except (ValueError, OSError, ImportError) as error:
        sys.stderr.write(f"pretokenize: error: {' '.join(str(error).split())}\n")
        return 2
    return 0

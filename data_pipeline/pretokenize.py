"""Offline tokenization: image-text shards to dual-code shards, in parallel, resumable, nothing lost.

Any number of workers run this on one output folder (under `deepspeed --module data_pipeline.pretokenize`,
`torchrun`, `srun`, Slurm arrays, or alone). Each claims input shards one by one and writes one output shard
for each; the last to finish writes `rejected.jsonl`, the Energon index and `dataset.json`. A run
that was killed is finished by running the same command again, and gives the same bytes.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import logging
import os
import shutil
import sys
import time
from collections import Counter, deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from data_pipeline.code_shards import (
    MANIFEST,
    CodeSample,
    DatasetManifest,
    ShardEntry,
    ShardWriter,
    temporary_name,
    write_atomically,
)
from data_pipeline.errors import DatasetError
from data_pipeline.pretokenize_plan import plan_lines
from data_pipeline.shard_claims import Claims, link_once
from data_pipeline.shard_sources import expand_inputs, is_elsewhere, source_address
from data_pipeline.shard_tokenizer import Rejection, Settings, ShardTokenizer

logger = logging.getLogger(__name__)

WORK_FOLDER = ".pretokenize"
REJECTED = "rejected.jsonl"
_FINISH = "finish"
_REPORT_SECONDS = 10.0
_WAIT_SECONDS, _LONGEST_WAIT_SECONDS = 0.2, 5.0
_LOOK_SECONDS = 5.0


@dataclass
class _ShardResult:
    """What was made of one input shard, kept until the data set is finished."""

    entry: ShardEntry
    rejected: list[Rejection] = field(default_factory=list)


def pretokenize(
    inputs: Sequence[str],
    visual_tokenizer: Any,
    decoder: Callable[[Sequence[bytes]], Any],
    output: str | Path,
    settings: Settings | None = None,
    *,
    rank: int = 0,
    world_size: int = 1,
    claim_timeout: float = 300.0,
    report: Callable[[str], None] = logger.info,
) -> DatasetManifest:
    """Turn image-text shards into a dual-code data set, together with the other workers on `output`.

    Args:
        inputs: Folders, globs, brace patterns or addresses of input shards.
        visual_tokenizer: A `DualTokenVisualTokenizer`, on its device.
        decoder: From `build_image_decoder`, for the tokenizer's image size and device.
        output: Folder of the data set.
        settings: What else changes the output.
        rank: Of this worker; it only spreads where workers start.
        world_size: Number of workers.
        claim_timeout: Seconds after which a worker of another machine that gives no sign is taken for dead.
        report: Takes a line about the progress now and then.

    Returns:
        The manifest of the finished data set, the same for every worker.

    Raises:
        DatasetError: No input, no usable sample, or the folder holds something else.
    """
    tokenizer = ShardTokenizer(visual_tokenizer, decoder, settings or Settings())
    run = _Run(_checked_plan(inputs, output), tokenizer, Path(output), world_size, report)
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
            claimed = run.claim_next(left, claims)
            if claimed is None:
                time.sleep(wait)  # the others are at it; should one die, its claim becomes void
                wait = min(1.5 * wait, _LONGEST_WAIT_SECONDS)
                continue
            wait = _WAIT_SECONDS
            if run.is_finished():
                pass  # meanwhile: its results were removed, not missing
            elif claimed == _FINISH:
                run.finish()
            elif not run.has_result(claimed):
                run.tokenize_shard(claimed, claims)
            claims.release()
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
    workers: int = 1,
    report: Callable[[str], None] = logger.info,
) -> None:
    """Report what `pretokenize` with these arguments would do and how long it would take; write nothing.

    Raises:
        DatasetError: As `pretokenize`, or no image of the input can be used.
    """
    tokenizer = ShardTokenizer(visual_tokenizer, decoder, settings or Settings())
    run = _Run(_checked_plan(inputs, output), tokenizer, Path(output), workers, report)
    if run.is_finished():
        run.finished_before()
    run.check_plan()
    run.look_for_results()
    done = set(run.plan) if run.is_finished() else run.done
    for line in plan_lines(run.plan, done, tokenizer, workers):
        report(line)
    report("dry run: nothing was written")


class _Run:
    """One worker's view of a run."""

    def __init__(
        self,
        plan: dict[str, str],
        tokenizer: ShardTokenizer,
        output: Path,
        world_size: int,
        report: Callable[[str], None],
    ) -> None:
        self.plan, self.tokenizer, self.world_size, self.report = plan, tokenizer, world_size, report
        self.output, self.work = output, output / WORK_FOLDER
        self.keys = self.work / "keys"
        decoder = tokenizer.decoder
        self.description = {
            "fingerprint": tokenizer.visual_tokenizer.fingerprint(),
            **asdict(tokenizer.geometry),
            "image_size": tokenizer.visual_tokenizer.config.image_size,
        }
        self.settings = {
            "decoder": getattr(decoder, "name", ""),
            "fit": getattr(decoder, "fit", ""),
            **asdict(tokenizer.settings),
        }
        self.sources = {name: source_address(shard) for name, shard in plan.items()}
        self.done: set[str] = set()
        """Shards known to have a result; a result stays, so that they need not be looked up again."""
        self._looked = 0.0
        self.shards = self.images = 0
        self.seconds, self._reported = 0.0, time.monotonic()

    def is_finished(self) -> bool:
        """Whether the data set is complete: its manifest is written last."""
        return (self.output / MANIFEST).is_file()

    def manifest(self) -> DatasetManifest:
        """Return the manifest without shards."""
        known = ("fingerprint", "codebook_size", "num_quantizers", "positions", "image_size")
        return DatasetManifest(**{name: self.description[name] for name in known}, settings=self.settings)

    def remove_work_folder(self) -> None:
        """Remove what a finished run needed on its way, also where a worker was killed while doing so."""
        shutil.rmtree(self.work, ignore_errors=True)

    def finished_before(self) -> DatasetManifest:
        """Return the manifest of a data set that is already there; DatasetError if it is another one."""
        found = DatasetManifest.load(self.output)
        found.require(self.output, self.tokenizer.geometry, self.description["fingerprint"])
        sources = {name: entry.source for name, entry in found.shards.items()}
        if found.settings:  # the decoder of `auto` is that of the machine that asks
            known = {**self.settings, **found.settings, "decoder": self.settings["decoder"]}
            difference = self._difference(known, sources)
        else:
            difference = "" if list(sources) == list(self.sources) else "other input shards"
        if difference:
            raise DatasetError(
                f"{self.output}: holds a finished data set with {difference}; "
                "use the same settings and input, or another folder"
            )
        self.report(f"{self.output} is finished: {found.samples_out} samples of {found.samples_in}")
        return found

    def agree_on_plan(self) -> None:
        """Write down what is to be done, or check that the run under way in the folder is this one."""
        self.keys.mkdir(parents=True, exist_ok=True)
        path = self.work / "plan.json"
        own = temporary_name(path)
        plan = {**self.description, "settings": self.settings, "shards": self.sources}
        write_atomically(own, json.dumps(plan, indent=2))
        try:
            link_once(own, path)  # the first worker's plan stands
        finally:
            own.unlink()
        self.check_plan()

    def check_plan(self) -> None:
        """Raise DatasetError if the run under way in the folder, if any, is not this one."""
        path = self.work / "plan.json"
        if not path.is_file():
            return
        found = json.loads(path.read_text())
        difference = _first_difference(found, self.description)
        if "settings" not in found:
            difference = difference or "the plan of an older version"
        if difference := difference or self._difference(found["settings"], found["shards"]):
            raise DatasetError(
                f"{self.output}: holds an unfinished run with {difference}; "
                "use the same settings and input, or another folder"
            )

    def _difference(self, settings: dict[str, Any], sources: dict[str, str]) -> str:
        """Say in what a run with these settings and inputs differs from this one, "" if in nothing."""
        if difference := _first_difference(settings, self.settings):
            return difference
        for name, expected in self.sources.items():
            if name not in sources:
                return f"inputs that lack {expected}"
            if sources[name] != expected:
                return f"input {sources[name]}, not {expected}"
        if list(sources) != list(self.sources):
            more = [source for name, source in sources.items() if name not in self.sources]
            return f"input {more[0]}, which is not given now" if more else "its inputs in another order"
        return ""

    def _result_path(self, name: str) -> Path:
        return self.work / f"{name}.json"

    def has_result(self, name: str) -> bool:
        """Whether a shard is done."""
        if name not in self.done and self._result_path(name).is_file():
            self.done.add(name)
        return name in self.done

    def look_for_results(self) -> None:
        """Note which shards are done, now and then: one look at the folder in place of one at each shard."""
        if self._looked and time.monotonic() - self._looked < _LOOK_SECONDS:
            return
        with contextlib.suppress(FileNotFoundError), os.scandir(self.work) as entries:
            found = {
                entry.name.removesuffix(".json") for entry in entries if entry.name.endswith(".tar.json")
            }
            self.done |= found & self.plan.keys()
        self._looked = time.monotonic()

    def claim_next(self, left: deque[str], claims: Claims) -> str | None:
        """Claim a shard of `left` or, once all are done, the end of the run; None if others hold the rest.

        What is done is removed from `left`, what others are at goes to its end.
        """
        self.look_for_results()
        for _ in range(len(left)):
            name = left.popleft()
            if not self.has_result(name):
                left.append(name)
                if claims.acquire(name):
                    return name
        return _FINISH if not left and claims.acquire(_FINISH) else None

    def tokenize_shard(self, name: str, claims: Claims) -> None:
        """Make one output shard and its result; given up if the claim is lost on the way."""
        started = time.monotonic()
        path = self.output / name
        rejected: list[Rejection] = []
        first = last = ""
        try:
            with ShardWriter(path, self.tokenizer.geometry, claims.still_held) as writer:
                prefix = f"{path.stem}/" if self.tokenizer.settings.prefix_keys else ""
                for item in self.tokenizer(self.plan[name], prefix):
                    if isinstance(item, CodeSample):
                        if not first:
                            first = item.key
                            self._check_key(first, name)
                        last = item.key
                        writer.write(item)
                        self.images += len(item.codes)
                    else:
                        rejected.append(item)
                    self._report_progress(name, started)
        except OSError:
            if claims.still_held():
                raise
            return  # taken for dead: whoever has the claim now has removed the temporary file
        entry = writer.entry
        if entry is None:  # the claim is lost
            return
        if not entry.samples:
            path.unlink(missing_ok=True)
            entry.sha256 = ""
        entry.rejected, entry.samples_in = len(rejected), entry.samples + len(rejected)
        entry.source = self.sources[name]
        self.seconds += time.monotonic() - started
        self.shards += 1
        for key in {first, last} if entry.samples else ():
            self._note_key(key, name)
        if claims.still_held():
            write_atomically(self._result_path(name), json.dumps(asdict(_ShardResult(entry, rejected))))
            self.done.add(name)
            self._report_shard(name, entry)

    # Whether all keys are unique is seen only in the index, at the end. Where they repeat from shard to
    # shard, the first or last one mostly does: those of finished shards are kept, in a file each.

    def _key_path(self, key: str) -> Path:
        return self.keys / hashlib.sha256(key.encode()).hexdigest()

    def _check_key(self, key: str, name: str) -> None:
        with contextlib.suppress(FileNotFoundError):
            if (other := self._key_path(key).read_text()) != name:
                raise DatasetError(
                    f"{self.output}: key {key} occurs more than once, in {other} and {name}; keys must be "
                    "unique in a data set: use --prefix-keys and another output folder"
                )

    def _note_key(self, key: str, name: str) -> None:
        own = temporary_name(self._key_path(key))
        own.write_text(name)
        link_once(own, self._key_path(key))
        own.unlink()
        self._check_key(key, name)

    def _report_progress(self, name: str, started: float) -> None:
        now = time.monotonic()
        if now - self._reported > _REPORT_SECONDS:
            self._reported = now
            rate = self.images / (self.seconds + now - started)
            self.report(f"{name}: {self.images} images by this worker, {rate:.1f} images/s")

    def _report_shard(self, name: str, entry: ShardEntry) -> None:
        self.look_for_results()
        done = len(self.done)
        left = len(self.plan) - done
        eta = left * self.seconds / self.shards / self.world_size
        ending = f", about {eta:.0f} s left" if left else ""
        self.report(
            f"{name}: {entry.samples} samples, {entry.rejected} rejected; {done} of {len(self.plan)} shards, "
            f"{self.images / max(self.seconds, 1e-9):.1f} images/s{ending}"
        )

    def finish(self) -> None:
        """Write `rejected.jsonl`, the index and `dataset.json`, then remove what was needed on the way."""
        from data_pipeline.shard_index import prepare_dataset

        for leftover in self.output.glob(".*.tmp"):  # of workers that were killed
            leftover.unlink(missing_ok=True)
        manifest, lines = self.manifest(), []
        for name in self.plan:
            result = json.loads(self._result_path(name).read_text())
            manifest.add(name, ShardEntry(**result["entry"]))
            lines += [json.dumps(line, ensure_ascii=False) + "\n" for line in result["rejected"]]
        write_atomically(self.output / REJECTED, "".join(lines))
        if not manifest.samples_out:
            raise DatasetError(f"{self.output}: no sample could be used; see {REJECTED}")
        prepare_dataset(self.output)
        manifest.save(self.output)
        self.remove_work_folder()
        self.report(
            f"{self.output}: {manifest.samples_in} samples in, {manifest.samples_out} out, "
            f"{manifest.rejected} rejected, {manifest.images} images in {len(manifest.shards)} shards"
        )


def _first_difference(found: dict[str, Any], expected: dict[str, Any]) -> str:
    names = (name for name, value in expected.items() if found.get(name) != value)
    return next((f"{name} {found.get(name)}, not {expected[name]}" for name in names), "")


def _checked_plan(inputs: Sequence[str], output: str | Path) -> dict[str, str]:
    shards = expand_inputs(inputs)
    for shard in shards:
        if not is_elsewhere(shard) and Path(shard).resolve().is_relative_to(Path(output).resolve()):
            raise DatasetError(f"{shard}: is in the output folder; choose a folder apart from the input")
    return plan_outputs(shards)


def plan_outputs(shards: Sequence[str]) -> dict[str, str]:
    """Return name of the output shard -> input shard; names that repeat get the number of their shard."""
    names = [Path(source_address(shard)).name.partition(".")[0] for shard in shards]
    counts = Counter(names)
    plan: dict[str, str] = {}
    for index, (name, shard) in enumerate(zip(names, shards)):
        repeated = counts[name] > 1
        while repeated:
            name = f"{index:06d}-{name}"
            repeated = name in counts  # a shard may have been called so
        plan[f"{name}.tar"] = shard
    return plan


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
        names = ("SLURM_ARRAY_TASK_ID", "SLURM_ARRAY_TASK_COUNT", "LOCAL_RANK")
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

    from data_pipeline.image_decoding import build_image_decoder
    from dualtoken.visual_tokenizer import DualTokenVisualTokenizer

    rank, world_size, local_rank = place_among_workers(os.environ, options.local_rank)
    device = torch.device("cpu")
    if torch.cuda.is_available():
        # Slurm may show each task no device but its own.
        device = torch.device("cuda", 0 if torch.cuda.device_count() == 1 else local_rank)
    visual_tokenizer = DualTokenVisualTokenizer.from_pretrained(options.visual_tokenizer).to(device).eval()
    decoder = build_image_decoder(
        visual_tokenizer.config.image_size,
        options.backend,
        device,
        options.fit,
        num_threads=options.decoding_threads,
    )
    report(f"worker {rank} of {world_size}: {decoder.describe()}")
    settings = Settings(**{field.name: getattr(options, field.name) for field in fields(Settings)})
    what = (options.inputs, visual_tokenizer, decoder, options.output, settings)
    if options.dry_run:
        if rank == 0:
            dry_run(*what, workers=options.workers or world_size, report=report)
        return
    pretokenize(
        *what,
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


if __name__ == "__main__":
    sys.exit(main())

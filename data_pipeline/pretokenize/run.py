"""One worker's view of a pretokenize run: its plan, what is done, what to do next, the end."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from data_pipeline.errors import DatasetError
from data_pipeline.pretokenize.claims import Claims, link_once
from data_pipeline.pretokenize.keys import EdgeKeys
from data_pipeline.pretokenize.overlap import overlapped
from data_pipeline.pretokenize.shard_tokenizer import (
    Batch,
    DecodedBatch,
    EncodedBatch,
    Rejection,
    Settings,
    ShardTokenizer,
)
from data_pipeline.shards.code_shards import (
    MANIFEST,
    CodeSample,
    DatasetManifest,
    ShardEntry,
    ShardWriter,
    temporary_name,
    write_atomically,
)
from data_pipeline.shards.image_text_shards import expand_inputs, source_address
from data_pipeline.shards.remote_files import is_remote

WORK_FOLDER = ".pretokenize"
REJECTED = "rejected.jsonl"
FINISH = "finish"
_REPORT_SECONDS = 10.0
_LOOK_SECONDS = 5.0
_MOST_TAKEN = 16


@dataclass
class ShardOnTheWay:
    """An output shard that is being made."""

    name: str
    writer: ShardWriter
    rejected: list[Rejection] = field(default_factory=list)
    first_key: str = ""
    last_key: str = ""
    lost: bool = False
    """Whether another worker has the claim now."""


@dataclass
class ShardResult:
    """What was made of one input shard, kept until the data set is finished."""

    entry: ShardEntry
    rejected: list[Rejection] = field(default_factory=list)


class PretokenizeRun:
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
        self.keys = EdgeKeys(self.work / "keys", output)
        decoder = tokenizer.decoder
        self.description = {
            "fingerprint": tokenizer.visual_tokenizer.fingerprint(),
            **asdict(tokenizer.geometry),
            "image_size": tokenizer.visual_tokenizer.config.image_size,
        }
        if tokenizer.features is not None:
            self.description["vision_tower"] = tokenizer.features.fingerprint
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
        self.seconds = 0.0
        """At work on shards."""
        self._counted = self._reported = time.monotonic()

    def is_finished(self) -> bool:
        """Whether the data set is complete: its manifest is written last."""
        return (self.output / MANIFEST).is_file()

    def manifest(self) -> DatasetManifest:
        """Return the manifest without shards."""
        known = ("fingerprint", *vars(self.tokenizer.geometry), "image_size")
        described = {name: self.description[name] for name in known}
        return DatasetManifest(**described, settings=self.settings, features=self.tokenizer.features)

    def remove_work_folder(self) -> None:
        """Remove what a finished run needed on its way, also where a worker was killed while doing so."""
        shutil.rmtree(self.work, ignore_errors=True)

    def finished_before(self) -> DatasetManifest:
        """Return the manifest of a data set that is already there; DatasetError if it is another one."""
        found = DatasetManifest.load(self.output)
        found.require(
            self.output, self.tokenizer.geometry, self.description["fingerprint"], self.tokenizer.features
        )
        sources = {name: entry.source for name, entry in found.shards.items()}
        if found.settings:  # the decoder of `auto` is that of the machine that asks
            known = {**self._as_told(found.settings), "decoder": self.settings["decoder"]}
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
        self.keys.folder.mkdir(parents=True, exist_ok=True)
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
        found = {"num_codebooks": 2, **json.loads(path.read_text(encoding="utf-8"))}  # older plans lack it
        difference = _first_difference(found, self.description)
        if "settings" not in found:
            difference = difference or "the plan of an older version"
        settings = self._as_told(found.get("settings", {}))
        if difference := difference or self._difference(settings, found["shards"]):
            raise DatasetError(
                f"{self.output}: holds an unfinished run with {difference}; "
                "use the same settings and input, or another folder"
            )

    def _as_told(self, settings: dict[str, Any]) -> dict[str, Any]:
        """Settings of a run; what was no setting yet when it was made has its default."""
        return {**self.settings, **asdict(Settings()), **settings}

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

    def claim_shard(self, left: deque[str], claims: Claims) -> str | None:
        """Claim a shard of `left`; None if none is to be had now, or the data set is complete.

        What is done is removed from `left`, what others are at goes to its end. Of very many that others are
        at, some are asked for at a time: near the end each of very many workers would ask for all again and
        again, which a network file system feels.
        """
        self.look_for_results()
        taken = 0
        for _ in range(len(left)):
            name = left.popleft()
            if name not in claims:
                if self.has_result(name):
                    continue
                if claims.acquire(name):
                    if not self.is_finished() and not self.has_result(name):
                        left.append(name)
                        return name
                    claims.release(name)  # another worker was done just before
                taken += 1
            left.append(name)
            if taken == _MOST_TAKEN:
                break
        return None

    def tokenize_shards(self, name: str, left: deque[str], claims: Claims) -> None:
        """Make the output shards of `name`, which is claimed, and of what can be claimed meanwhile.

        A shard is given up if its claim is lost on the way.
        """
        on_the_way: dict[str, ShardOnTheWay] = {}
        self._counted = time.monotonic()

        def batches() -> Iterator[tuple[str, Batch]]:
            claimed: str | None = name
            while claimed is not None:
                prefix = f"{Path(claimed).stem}/" if self.tokenizer.settings.prefix_keys else ""
                for batch in self.tokenizer.read(self.plan[claimed], prefix):
                    yield claimed, batch
                claimed = self.claim_shard(left, claims)

        def decode(batch: tuple[str, Batch]) -> tuple[str, DecodedBatch]:
            return batch[0], self.tokenizer.decode(batch[1])

        def encode(batch: tuple[str, DecodedBatch]) -> tuple[ShardOnTheWay, EncodedBatch]:
            name, decoded = batch
            if name not in on_the_way:
                still_held = partial(claims.still_held, name)
                tokenizer = self.tokenizer
                path = self.output / name
                writer = ShardWriter(path, tokenizer.geometry, still_held, tokenizer.features)
                writer.open()
                on_the_way[name] = ShardOnTheWay(name, writer)
            self._check_keys(on_the_way[name], decoded)
            return on_the_way[name], self.tokenizer.encode(decoded)

        def write(batch: tuple[ShardOnTheWay, EncodedBatch]) -> None:
            shard, encoded = batch
            self._write(shard, encoded, claims)
            if encoded.last:
                del on_the_way[shard.name]
                claims.release(shard.name)

        try:
            for _ in overlapped(batches(), decode, encode, write):
                pass
        finally:
            for shard in on_the_way.values():
                shard.writer.discard()

    def _check_keys(self, shard: ShardOnTheWay, batch: DecodedBatch) -> None:
        """Look at the first and last keys of a shard before more of it is encoded."""
        keys = batch.keys
        if keys:
            shard.last_key = keys[-1]
            if not shard.first_key:
                shard.first_key = keys[0]
                self.keys.check(shard.first_key, shard.name)
        if batch.last and shard.last_key:
            self.keys.check(shard.last_key, shard.name)

    def _write(self, shard: ShardOnTheWay, batch: EncodedBatch, claims: Claims) -> None:
        """Write what became of a batch and, after the last one, the shard's result."""
        if shard.lost:
            return
        try:
            for item in self.tokenizer.collect(batch):
                if isinstance(item, CodeSample):
                    shard.writer.write(item)
                    self.images += len(item.codes)
                else:
                    shard.rejected.append(item)
            self._report_progress(shard.name)
            if batch.last:
                shard.writer.commit()
        except OSError:
            if claims.still_held(shard.name):
                raise
            shard.writer.discard()
            shard.lost = True  # taken for dead: whoever has the claim now has removed the temporary file
            return
        entry = shard.writer.entry
        if not batch.last or entry is None:  # None: the claim is lost
            return
        if not entry.samples:
            shard.writer.path.unlink(missing_ok=True)
            entry.sha256 = ""
        entry.rejected, entry.samples_in = len(shard.rejected), entry.samples + len(shard.rejected)
        entry.source = self.sources[shard.name]
        self.shards += 1
        self._count_seconds()
        for key in {shard.first_key, shard.last_key} if entry.samples else ():
            self.keys.note(key, shard.name)
        if claims.still_held(shard.name):
            result = ShardResult(entry, shard.rejected)
            write_atomically(self._result_path(shard.name), json.dumps(asdict(result)))
            self.done.add(shard.name)
            self._report_shard(shard.name, entry)

    def _count_seconds(self) -> None:
        now = time.monotonic()
        self.seconds += now - self._counted
        self._counted = now

    def _report_progress(self, name: str) -> None:
        now = time.monotonic()
        if now - self._reported > _REPORT_SECONDS:
            self._reported = now
            self._count_seconds()
            self.report(
                f"{name}: {self.images} images by this worker, {self.images / self.seconds:.1f} images/s"
            )

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
        from data_pipeline.shards.index import prepare_dataset

        for leftover in self.output.glob(".*.tmp"):  # of workers that were killed
            leftover.unlink(missing_ok=True)
        manifest, lines = self.manifest(), []
        for name in self.plan:
            result = json.loads(self._result_path(name).read_text(encoding="utf-8"))
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


def checked_plan(inputs: Sequence[str], output: str | Path) -> dict[str, str]:
    """Return name of the output shard -> input shard; DatasetError if an input is missing or an output."""
    shards = expand_inputs(inputs)
    for shard in shards:
        if not is_remote(shard) and Path(shard).resolve().is_relative_to(Path(output).resolve()):
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

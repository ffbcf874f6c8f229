"""A training checkpoint's model as a folder for `from_pretrained`, tensor by tensor."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch import Tensor

from data_pipeline.names import is_below
from eval.progress import with_progress
from launchers.conversions.report import Report, new_folder, require_new, written
from launchers.conversions.weight_files import SHARD_BYTES, WeightFiles, write_weights
from launchers.errors import UserError
from pretrain.checkpoints.finding import (
    ASSETS,
    CONTENTS,
    FORMAT_VERSION,
    SHARED,
    STATE_FILE,
    complete_checkpoints,
    damage_of,
    read_state,
)
from pretrain.checkpoints.fragments import FragmentReader, read_index


def export_checkpoint(
    checkpoint: Path,
    output: Path,
    frozen_from: Path | None = None,
    verify: bool = True,
    shard_bytes: int = SHARD_BYTES,
) -> Iterator[str]:
    """Write the model of a checkpoint of any number of ranks and ZeRO level; yields lines on it.

    What the run itself would export at this step, from fp32 masters, without starting it: nothing but the
    checkpoint is read, no rank, GPU or DeepSpeed is needed, and no more than a file of the result is held.

    Args:
        checkpoint: a step's folder; or a run's folder, whose newest complete one is taken.
        output: new folder.
        frozen_from: model folder to take frozen parameters from. A bf16 run holds them rounded.
        verify: compare the hashes of all files first.
        shard_bytes: size of a file of the result.

    Raises:
        UserError: there is no complete checkpoint, a file is not what was written, or `frozen_from` is of
            another model; nothing is written.
    """
    require_new(output)
    folder, state = _find(checkpoint)
    if verify:
        for name, expected in with_progress(list(state["files"].items()), "comparing hashes"):
            if damage_of(folder, name, expected):
                raise UserError(
                    f"{folder / name} is not what was written: take an earlier step's folder, or copy it "
                    "again"
                )
    engine, prefix = state["exported"]
    contents = json.loads((folder / engine / CONTENTS).read_text(encoding="utf-8"))
    index = read_index(folder, [name for name in state["files"] if name.startswith(f"{engine}/rank_")])
    index |= read_index(folder, [f"{engine}/{SHARED}"])
    reader = FragmentReader(folder, index)
    given = WeightFiles(frozen_from) if frozen_from else None
    report = Report("checkpoint", {"checkpoint": str(folder)})
    tensors = _Tensors(contents, prefix, reader, given, report)

    def in_order() -> Iterator[tuple[str, Tensor]]:
        for name in with_progress(tensors.names, "writing weights"):
            yield name.removeprefix(prefix), tensors.read(name)

    with new_folder(output, report) as made:
        write_weights(made, in_order(), shard_bytes)
        for path in (folder / ASSETS).iterdir():
            (shutil.copytree if path.is_dir() else shutil.copyfile)(path, made / path.name)
    saved = state["engines"][engine]
    yield f"step {state['step']} of job {state['job']}, {state['world_size']} rank(s), ZeRO-{saved['zero']}"
    yield from report.lines()
    yield written(output)


class _Tensors:
    """Whole tensors of the model by name, in fp32 as exports have them."""

    def __init__(
        self,
        contents: dict[str, Any],
        prefix: str,
        reader: FragmentReader,
        given: WeightFiles | None,
        report: Report,
    ) -> None:
        self.reader = reader
        self.given = given
        self.prefix = prefix
        self.parameters, self.buffers = contents["parameters"], contents["buffers"]
        every = {**self.parameters, **self.buffers}
        self.names = [name for name in every if name.startswith(prefix)]
        report.renamed = {name: name.removeprefix(prefix) for name in self.names}
        report.dropped = [name for name in every if not name.startswith(prefix)]
        frozen = [name for name in self.names if not self.parameters.get(name, {}).get("trained", True)]
        rounded = [name for name in frozen if self.parameters[name]["dtype"] != "float32"]
        self.from_given = set(frozen) if given is not None else set()
        if given is not None:
            shapes = given.shapes()
            for name in frozen:
                here, there = tuple(self.parameters[name]["shape"]), shapes.get(name.removeprefix(prefix))
                if here != there:
                    raise UserError(
                        f"{given.folder} has {name} {there}, the checkpoint {here}: another model"
                    )
            report.notes.append(f"frozen: {len(frozen)} weights from {given.folder}")
        elif rounded:
            kept = self.parameters[rounded[0]]["dtype"]
            report.notes.append(
                f"frozen: {len(rounded)} weights as the run held them, in {kept}; --frozen-from takes them "
                "from the model that it started from"
            )

    def read(self, name: str) -> Tensor:
        """A tensor, put together from the pieces of all ranks."""
        if self.given is not None and name in self.from_given:
            tensor = self.given[name.removeprefix(self.prefix)]
        elif name in self.parameters:
            tensor = self.reader.whole(f"weight/{name}", self.parameters[name]["shape"])
        else:
            tensor = self.reader.whole(f"buffer/{name}", self.buffers[name]["shape"])
        return tensor.float() if tensor.is_floating_point() else tensor


def _find(place: Path) -> tuple[Path, dict[str, Any]]:
    """The step folder that is meant and what it says."""
    folder = place
    if not (place / STATE_FILE).exists():
        found = complete_checkpoints(place / "checkpoints") or complete_checkpoints(place)
        if not found:
            raise UserError(f"{place} has no complete checkpoint: expected a step's folder or a run's")
        folder = found[0]
    state = read_state(folder)
    if state is None or state["format_version"] != FORMAT_VERSION:
        raise UserError(f"{folder} is not a checkpoint of format version {FORMAT_VERSION}")
    for name in state["files"]:
        if not is_below(name):
            raise UserError(f"{folder / STATE_FILE} names the file {name}, outside its folder")
    return folder, state

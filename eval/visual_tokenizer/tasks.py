"""What the tasks of a visual tokenizer on the user's data share: their inputs, settings and files."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from dualtoken.visual_tokenizer.model import DualTokenVisualTokenizer
from eval.inputs import to_picture
from eval.results import Case, TaskResult, write_json
from eval.visual_tokenizer.batches import (
    FITS,
    Fit,
    PictureBatch,
    Share,
    build_decoder,
    iterate_batches,
    read_batch,
)
from eval.visual_tokenizer.pictures import PictureSet


@dataclass(frozen=True)
class TokenizerJob:
    """What a task reads, where it writes, and how pictures are cut and dealt out."""

    visual_tokenizer: Path
    data: Path
    output: Path  # of the whole evaluation; a task writes to the folder of its name in it
    fit: Fit = "center_crop"
    count: int | None = None  # pictures drawn at random; all by default
    seed: int = 0  # of the draw
    batch_size: int = 32
    share: Share = Share()

    def batches(self, pictures: PictureSet, image_size: int, what: str) -> Iterator[PictureBatch]:
        """This rank's batches."""
        return iterate_batches(pictures, image_size, self.batch_size, self.fit, self.share, what)

    def settings(self, tokenizer: DualTokenVisualTokenizer, pictures: PictureSet) -> dict[str, Any]:
        """Everything of this that decides a figure, for results."""
        return {
            "visual_tokenizer": str(self.visual_tokenizer),
            "codes_fingerprint": tokenizer.fingerprint(),
            "precision": str(tokenizer.dtype).removeprefix("torch."),
            "data": str(self.data),
            "data_kind": pictures.kind,
            "image_size": tokenizer.config.image_size,
            "preprocessing": f"{self.fit}: {FITS[self.fit]}",
            "count": self.count,
            "seed": self.seed,
            "batch_size": self.batch_size,
        }


@dataclass(frozen=True)
class Shown:
    """A picture to show as a case."""

    number: int  # in its set
    lines: list[str]
    score: float


def save_cases(
    job: TokenizerJob,
    pictures: PictureSet,
    image_size: int,
    folder: str,
    shown: Sequence[Shown],
    drawn: Callable[[Tensor], Tensor] = lambda images: images,
) -> list[Case]:
    """Write pictures to a folder below the output, as cases of a result.

    Args:
        job: how they are cut and where they go.
        pictures: the set.
        image_size: S.
        folder: name below the output.
        shown: which, with what is said of them.
        drawn: makes what is shown [N, 3, H, W] of the pictures [N, 3, S, S].
    """
    if not shown:
        return []
    (job.output / folder).mkdir(parents=True, exist_ok=True)
    images = read_batch(pictures, [one.number for one in shown], build_decoder(image_size, job.fit))
    cases = []
    for index, (image, one) in enumerate(zip(drawn(images), shown, strict=True)):
        name = f"{folder}/{index:02d}.png"
        to_picture(image).save(job.output / name)
        cases.append(Case(name, one.lines, one.score))
    return cases


def write_result(result: TaskResult, output: Path) -> TaskResult:
    """Write a result as `TASK/result.json` below `output`; returns it."""
    write_json(output / result.task / "result.json", result.as_json())
    return result

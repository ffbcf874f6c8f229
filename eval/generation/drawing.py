"""Drawing the prompts of a benchmark, on any number of ranks, so that a killed run goes on.

In the output folder lie `settings.json`, what decides the pictures; `pictures/` in the layout of the
benchmark's judge; and `prompts.jsonl`, which picture is of which prompt. Ranks need no connection, only the
folder: each draws what is missing of its own slice. The seed of a picture comes from its prompt's name and
its number, so that neither ranks nor batches nor what else is drawn change it.
"""

import hashlib
import io
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from PIL import Image

from data_pipeline.shards.code_shards import temporary_name, write_atomically
from dualtoken.generation.generators import generate_images
from dualtoken.generation.sampling import Sampling
from eval.agreement import agree
from eval.benchmark_files import BenchmarkError, field_of, find_image, read_json_lines
from eval.generation.prompts import GENEVAL, Layout, Prompt, PromptSet
from eval.generation.writing import decode_codes
from eval.inputs import PRECISIONS, load_models, to_picture
from eval.model_files import fingerprint_of_files
from eval.progress import counted
from eval.results import versions

PICTURES, PROMPTS = "pictures", "prompts.jsonl"
NOT_DECIDING = ("versions",)  # they round differently
JPEG = {"format": "JPEG", "quality": 95, "subsampling": "4:4:4"}  # the little loss that a judge's .jpg allows


@dataclass(frozen=True)
class DrawingSettings:
    """How pictures are sampled.

    Raises:
        ValueError: a value is out of range, or a prompt's pictures would all be the same.
    """

    per_prompt: int | None = None  # pictures; None for as many as the benchmark wants
    guidance_scale: float = 3.0
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        Sampling(self.temperature, self.top_k, self.top_p)  # which checks them
        if self.per_prompt is not None and self.per_prompt < 1:
            raise ValueError(f"{self.per_prompt} pictures a prompt; expected 1 or more")
        if self.temperature == 0 and (self.per_prompt or 1) > 1:
            raise ValueError(
                f"temperature 0 draws the same picture {self.per_prompt} times; draw 1 a prompt, or choose a "
                "temperature above 0"
            )

    def of(self, layout: Layout) -> "DrawingSettings":
        """The same, with the number of pictures a prompt.

        Raises:
            ValueError: the layout has no places for so many.
        """
        count = self.per_prompt or layout.per_prompt
        if layout.most is not None and count > layout.most:
            raise ValueError(
                f"{count} pictures a prompt; the layout of {layout.name} has places for {layout.most}"
            )
        return replace(self, per_prompt=count)


@dataclass(frozen=True)
class Drawing:
    """A picture to draw, or drawn."""

    prompt: Prompt
    sample: int  # number among the prompt's pictures, from 0
    place: str  # below the folder of pictures
    path: Path

    def seed(self, seed: int) -> int:
        """The picture's own seed, of the run's."""
        name = f"{seed} {self.prompt.key} {self.sample}".encode()
        return int.from_bytes(hashlib.sha256(name).digest()[:7], "big")


class Artist:
    """A unified model with its visual tokenizer, loaded to draw.

    Raises:
        FileNotFoundError: one of them is missing.
        DatasetError: the model was trained with another visual tokenizer.
    """

    def __init__(self, model: Path, visual_tokenizer: Path, precision: str = "fp32") -> None:
        if precision not in PRECISIONS:
            raise ValueError(f"precision is {precision!r}, expected {' or '.join(PRECISIONS)}")
        self.model, self.text_tokenizer, self.visual_tokenizer = load_models(
            model, visual_tokenizer, precision
        )
        self.settings = {
            "model": fingerprint_of_files(model),
            "visual_tokenizer": fingerprint_of_files(visual_tokenizer),
            "precision": precision,
        }

    @torch.no_grad()
    def draw(
        self, texts: Sequence[str], seeds: Sequence[int], settings: DrawingSettings
    ) -> list[Image.Image]:
        """A picture for each text."""
        codes = generate_images(
            self.model,
            self.text_tokenizer,
            texts,
            guidance_scale=settings.guidance_scale,
            temperature=settings.temperature,
            top_k=settings.top_k,
            top_p=settings.top_p,
            seed=list(seeds),
        )
        return [to_picture(image) for image in decode_codes(self.visual_tokenizer, codes)]


def drawings_of(prompts: PromptSet, folder: Path, settings: DrawingSettings) -> list[Drawing]:
    """The pictures of a set of prompts, in order, below a folder in the set's layout."""
    drawings = []
    for prompt in prompts.prompts:
        for sample in range(settings.of(prompts.layout).per_prompt or 0):
            place = prompts.layout.place(prompt, sample)
            drawings.append(Drawing(prompt, sample, place, folder / place))
    return drawings


def draw_prompts(
    prompts: PromptSet,
    artist: Artist,
    output: Path,
    settings: DrawingSettings,
    rank: int = 0,
    world_size: int = 1,
    batch_size: int = 16,
    say: Callable[[str], None] = lambda line: None,
) -> list[Drawing] | None:
    """Draw what is missing of this rank's slice of the pictures.

    Args:
        prompts: all of them, whatever the rank.
        artist: the model.
        output: folder, the same for all ranks.
        settings: of the sampling.
        rank: of this process.
        world_size: number of processes.
        batch_size: pictures drawn at a time.
        say: takes a line now and then; on a terminal a bar is drawn as well.

    Returns:
        All pictures; None while other ranks have some to draw.

    Raises:
        BenchmarkError: the folder holds pictures by other settings.
        ValueError: the layout has no places for so many pictures of a prompt.
    """
    if not 0 <= rank < world_size or batch_size < 1:
        raise BenchmarkError(
            f"rank {rank} of {world_size}, batch size {batch_size}; expected a rank from 0 and at least 1 "
            "picture at a time"
        )
    folder = output / PICTURES
    settings = settings.of(prompts.layout)
    drawings = drawings_of(prompts, folder, settings)
    decides = {"prompts": prompts.digest, **asdict(settings), **artist.settings, "versions": versions()}
    agree(output, decides, "pictures", NOT_DECIDING)
    rows = ({"picture": str(one.path.relative_to(output)), "prompt": one.prompt.text} for one in drawings)
    write_atomically(output / PROMPTS, "".join(f"{json.dumps(row, ensure_ascii=False)}\n" for row in rows))
    length = -(-len(drawings) // world_size)
    missing = [one for one in drawings[rank * length : (rank + 1) * length] if not one.path.exists()]
    bar = None if world_size == 1 else False  # one bar a rank would be drawn over another
    with counted(len(missing), "pictures", say, bar) as advance:
        for start in range(0, len(missing), batch_size):
            batch = missing[start : start + batch_size]
            seeds = [one.seed(settings.seed) for one in batch]
            for one, picture in zip(
                batch, artist.draw([one.prompt.text for one in batch], seeds, settings), strict=True
            ):
                one.path.parent.mkdir(parents=True, exist_ok=True)
                if prompts.layout is GENEVAL:
                    line = json.dumps(one.prompt.row, ensure_ascii=False)
                    write_atomically(one.path.parents[1] / "metadata.jsonl", f"{line}\n")
                _save(picture, one.path)
            advance(len(batch))
    return drawings if all(one.path.exists() for one in drawings) else None


def listed_drawings(folder: Path) -> list[Drawing]:
    """Pictures with their prompts, as the `prompts.jsonl` of a folder names them: `{picture, prompt}`.

    Raises:
        BenchmarkError: the list or a picture is missing.
    """
    listing = folder / PROMPTS
    found = []
    for number, row in read_json_lines(listing):
        where = f"{listing}, line {number}"
        place = field_of(row, "picture", str, where)
        prompt = Prompt(place, field_of(row, "prompt", str, where))
        found.append(Drawing(prompt, 0, place, find_image([folder], place, where)))
    if not found:
        raise BenchmarkError(f"{listing} names no pictures; expected lines {{picture, prompt}}")
    return found


def _save(picture: Image.Image, path: Path) -> None:
    """Write a picture under its name once it is whole."""
    buffer = io.BytesIO()
    picture.save(buffer, **(JPEG if path.suffix == ".jpg" else {"format": "PNG"}))
    temporary = temporary_name(path)
    temporary.write_bytes(buffer.getvalue())
    os.replace(temporary, path)

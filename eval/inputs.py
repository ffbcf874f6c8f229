"""What the measures read: where a run's results lie, pictures and codes from shards, exported models."""

import json
import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch
from PIL import Image
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from data_pipeline.images.decoding import build_image_decoder
from data_pipeline.shards.code_shards import CodeSample, DatasetManifest, iterate_shard, require_same_codes
from data_pipeline.streams import ImageStreamConfig, image_loader
from dualtoken.unified_model.config import DualTokenConfig
from dualtoken.unified_model.model import DualTokenForCausalLM
from dualtoken.visual_tokenizer import loading
from dualtoken.visual_tokenizer.loading import VisualTokenizer
from dualtoken.visual_tokenizer.model import DualTokenVisualTokenizer
from eval.metrics.images import to_unit_range

T = TypeVar("T")
READ_BATCH = 64
PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class EvaluationPaths:
    """Folders and settings every measure draws from; `from_run` knows the layout of the quickstart."""

    siglip: Path
    visual_tokenizer: Path
    model: Path
    seen_images: Path
    held_out_images: Path
    seen_codes: Path
    held_out_codes: Path
    sample_data: Path
    benchmarks: Path
    output: Path
    vision_tower: str | Path | None = None  # of a model that reads features made outside of it

    @classmethod
    def from_run(cls, run: Path, **replaced: str | Path | None) -> "EvaluationPaths":
        """Paths below the folder of a quickstart; those given in `replaced` (and not None) lie elsewhere."""
        found = {
            "siglip": run / "siglip" / "export",
            "visual_tokenizer": run / "tokenizer" / "export",
            "model": run / "mllm" / "export",
            "seen_images": run / "sample_data" / "images" / "train" / "drawings",
            "held_out_images": run / "sample_data" / "images" / "val" / "drawings",
            "seen_codes": run / "codes" / "train",
            "held_out_codes": run / "codes" / "val",
            "sample_data": run / "sample_data",
            "benchmarks": run / "sample_data" / "benchmarks",
            "output": run / "evaluation",
        }
        return cls(**{**found, **{name: path for name, path in replaced.items() if path is not None}})

    def images(self) -> dict[str, Path]:
        """Image-text shards by split."""
        return {"held_out": self.held_out_images, "seen": self.seen_images}

    def scenes(self) -> dict[str, Path]:
        """Image-text shards of the sample data's scenes by split."""
        images = self.sample_data / "images"
        return {"held_out": images / "val" / "scenes", "seen": images / "train" / "scenes"}

    def codes(self) -> dict[str, Path]:
        """Dual-code shards by split."""
        return {"held_out": self.held_out_codes, "seen": self.seen_codes}


@dataclass
class Pictures:
    """Pictures with their captions, in one order."""

    keys: list[str]
    captions: list[dict[str, str]]
    images: Tensor  # [N, 3, S, S] in [-1, 1]

    def __len__(self) -> int:
        return len(self.keys)


def choose(items: Iterable[T], count: int | None, seed: int = 0) -> list[T]:
    """Draw `count` items at random from a stream without keeping it all, in the stream's order.

    Every item has the same chance (reservoir sampling); `None`, or more than there are, takes all.
    """
    if count is None:
        return list(items)
    generator = random.Random(seed)
    kept: list[tuple[int, T]] = []
    for index, item in enumerate(items):
        if index < count:
            kept.append((index, item))
        elif (place := generator.randrange(index + 1)) < count:
            kept[place] = (index, item)
    return [item for _, item in sorted(kept, key=lambda pair: pair[0])]


def load_pictures(folder: Path, image_size: int, count: int | None = None, seed: int = 0) -> Pictures:
    """Read pictures from image-text shards, resized to a square as in training and pretokenization.

    Args:
        folder: prepared image-text shards.
        image_size: side of the pictures in pixels.
        count: how many to draw at random; all by default.
        seed: of the draw.

    Raises:
        ValueError: the folder cannot be read, or a picture in it cannot be decoded.
    """
    loader = image_loader(ImageStreamConfig(path=str(folder)), READ_BATCH, split="val")

    def samples() -> Iterator[tuple[str, bytes, dict[str, str]]]:
        for batch in loader:
            yield from zip(batch.keys, batch.image_bytes, batch.captions, strict=True)

    chosen = choose(samples(), count, seed)
    if not chosen:
        raise ValueError(f"no pictures in {folder}; expected image-text shards")
    decode = build_image_decoder(image_size)
    images = []
    for start in range(0, len(chosen), READ_BATCH):
        part = chosen[start : start + READ_BATCH]
        decoded = decode([data for _, data, _ in part])
        if decoded.rejected:
            bad = decoded.rejected[0]
            raise ValueError(f"{folder}: picture {part[bad.index][0]} cannot be decoded: {bad.reason}")
        images.append(decoded.images)
    return Pictures([key for key, _, _ in chosen], [captions for _, _, captions in chosen], torch.cat(images))


def load_visual_tokenizer(folder: Path) -> VisualTokenizer:
    """Load an exported visual tokenizer for use, on the GPU if there is one.

    Raises:
        FileNotFoundError: there is none in the folder.
    """
    require_export(folder, "visual tokenizer", "dualtoken train quickstart_tokenizer")
    return loading.load_visual_tokenizer(folder).requires_grad_(False).to(default_device())


def load_dual_tokenizer(folder: Path) -> DualTokenVisualTokenizer:
    """Load an exported visual tokenizer for what only ours has: semantic codes, towers, phases.

    Raises:
        FileNotFoundError: there is none in the folder.
        ValueError: it is a VQ model of others.
    """
    model = load_visual_tokenizer(folder)
    if not isinstance(model, DualTokenVisualTokenizer):
        raise ValueError(
            f"{folder} holds the {model.config.vq.model_type!r} of others, which has no semantic codes; "
            "expected a DualToken visual tokenizer"
        )
    return model


def require_export(folder: Path, what: str, made_by: str) -> None:
    """Raise FileNotFoundError with advice if a folder holds no exported model."""
    if not (Path(folder) / "config.json").is_file():
        raise FileNotFoundError(
            f"no {what} in {folder}: expected a folder with config.json, as `{made_by}` exports it"
        )


def model_type_of(folder: Path) -> str | None:
    """What a model's config.json calls it.

    Raises:
        ValueError: the file is no config.
    """
    path = Path(folder) / "config.json"
    try:
        return json.loads(path.read_text(encoding="utf-8")).get("model_type")
    except (ValueError, AttributeError):
        raise ValueError(f"{path} is no model's config: expected a JSON object") from None


def default_device() -> torch.device:
    """The GPU if there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def to_picture(image: Tensor) -> Image.Image:
    """An image [3, H, W] in [-1, 1] as an 8-bit picture, values rounded."""
    pixels = (to_unit_range(image) * 255).round().to(torch.uint8)
    return Image.fromarray(pixels.permute(1, 2, 0).cpu().numpy())


def load_codes(folder: Path, count: int | None = None, seed: int = 0) -> list[CodeSample]:
    """Read pairs of one image and its captions from dual-code shards, `count` of them drawn at random.

    Raises:
        DatasetError: the folder holds no finished dual-code data set.
        ValueError: it holds no image with captions.
    """
    manifest = DatasetManifest.load(folder)
    shards = (Path(folder) / name for name, entry in manifest.shards.items() if entry.samples)
    samples = (sample for shard in shards for sample in iterate_shard(shard))
    pairs = (sample for sample in samples if len(sample.codes) == 1 and sample.captions)
    chosen = choose(pairs, count, seed)
    if not chosen:
        raise ValueError(f"{folder} holds no image with captions, which this measure needs")
    return chosen


def pictures_of(samples: Sequence[CodeSample], codes: Path, images: Path, image_size: int) -> Tensor:
    """The pictures [N, 3, S, S] in [-1, 1] that samples of the data set `codes` were made from.

    Raises:
        ValueError: one of them is not among the image-text shards `images`.
    """
    pictures = load_pictures(images, image_size)
    place = {key: number for number, key in enumerate(pictures.keys)}
    if missing := [sample.key for sample in samples if sample.key not in place]:
        raise ValueError(f"{images} lacks the picture {missing[0]} that the codes in {codes} were made from")
    return pictures.images[[place[sample.key] for sample in samples]]


def stack_codes(samples: Sequence[CodeSample]) -> Tensor:
    """The codes of each sample's one image as int64: [N, P, Q, D]."""
    return torch.stack([torch.from_numpy(sample.codes[0].astype("int64")) for sample in samples])


def draw_prompts(samples: Sequence[CodeSample]) -> list[dict]:
    """One prompt for each sample, the languages taking turns."""
    prompts = []
    for index, sample in enumerate(samples):
        languages = list(sample.captions)
        language = languages[index % len(languages)]
        prompts.append({"key": sample.key, "language": language, "prompt": sample.captions[language]})
    return prompts


def load_unified_model(
    folder: Path, precision: str = "fp32"
) -> tuple[DualTokenForCausalLM, PreTrainedTokenizerBase]:
    """Load an exported unified model with its text tokenizer for use, on the GPU if there is one.

    In bf16 the codebooks stay fp32.

    Raises:
        FileNotFoundError: there is none in the folder.
        ValueError: it is a model of another kind.
    """
    require_export(folder, "unified model", "dualtoken train quickstart_mllm")
    if (kind := model_type_of(folder)) != DualTokenConfig.model_type:
        raise ValueError(f"{folder} holds a {kind!r} model, expected a unified model (dualtoken)")
    # Exports are fp32; one that somebody saved in another type is measured in fp32 like the others.
    model = DualTokenForCausalLM.from_pretrained(folder, dtype=PRECISIONS[precision])
    return model.eval().requires_grad_(False).to(default_device()), AutoTokenizer.from_pretrained(folder)


def load_models(
    unified: Path, visual_tokenizer: Path, precision: str = "fp32"
) -> tuple[DualTokenForCausalLM, PreTrainedTokenizerBase, VisualTokenizer]:
    """Load a unified model, its text tokenizer and the visual tokenizer whose codes it speaks, for use.

    `precision` is the unified model's; the visual tokenizer computes in fp32, as codes are made by default.

    Raises:
        FileNotFoundError: one of them is missing.
        DatasetError: the model was trained with another visual tokenizer.
    """
    model, text_tokenizer = load_unified_model(unified, precision)
    tokenizer = load_visual_tokenizer(visual_tokenizer)
    require_same_codes(visual_tokenizer, tokenizer.fingerprint(), model.config.tokenizer_fingerprint)
    return model, text_tokenizer, tokenizer

"""How well pictures agree with their prompts: CLIP score, by a CLIP or a SigLIP from a folder."""

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoTokenizer,
    CLIPImageProcessor,
    CLIPModel,
    PreTrainedModel,
    SiglipImageProcessor,
    SiglipModel,
)

from dualtoken.strict_loading import load_strictly
from eval.generation.drawing import Drawing
from eval.generation.findings import Finding, mean
from eval.generation.folders import read_picture
from eval.model_files import fingerprint_of_files
from eval.progress import counted

KINDS = {"clip": CLIPModel, "siglip": SiglipModel}
EXPECTED = (
    "expected a folder of a CLIP (such as openai/clip-vit-large-patch14) or a SigLIP (such as the one a "
    "quickstart exports), with its text tokenizer, as save_pretrained writes it; nothing is downloaded"
)


class ClipScorer:
    """100 max(cos, 0) of a picture's and a prompt's features (arXiv 2104.08718, without its factor 2.5)."""

    def __init__(self, folder: Path, device: str | torch.device = "cpu") -> None:
        """Load a model.

        Raises:
            FileNotFoundError: the folder has no model.
            ValueError: it has a model of another kind, weights that do not fit, or no text tokenizer.
        """
        if not (folder / "config.json").is_file():
            raise FileNotFoundError(f"no CLIP in {folder}: {EXPECTED}")
        config = AutoConfig.from_pretrained(folder)
        if config.model_type not in KINDS:
            raise ValueError(f"{folder} holds a {config.model_type!r} model: {EXPECTED}")
        try:
            self.tokenizer = AutoTokenizer.from_pretrained(folder)
        except (OSError, ValueError) as error:
            raise ValueError(f"{folder} has no text tokenizer that can be read: {EXPECTED}") from error
        model: PreTrainedModel = load_strictly(
            KINDS[config.model_type].from_pretrained, folder, dtype=torch.float32
        )[0]
        self.model = model.eval().requires_grad_(False).to(device)
        self.processor = _image_processor(folder, self.model)
        self.name = "CLIP score" if config.model_type == "clip" else "CLIP score by SigLIP"
        self.settings = {"clip": config.model_type, "clip_fingerprint": fingerprint_of_files(folder)}

    @torch.no_grad()
    def score(self, pictures: Sequence[Image.Image], prompts: Sequence[str]) -> list[float]:
        """The score of each picture with its own prompt, in [0, 100]."""
        pixels = self.processor(images=list(pictures), return_tensors="pt")["pixel_values"]
        # SigLIP is trained with padding and reads it; CLIP does neither.
        padded = "max_length" if self.model.config.model_type == "siglip" else True
        length = self.model.config.text_config.max_position_embeddings
        texts = self.tokenizer(
            list(prompts), padding=padded, truncation=True, max_length=length, return_tensors="pt"
        )
        given = {"input_ids": texts["input_ids"]}
        if self.model.config.model_type == "clip":
            given["attention_mask"] = texts["attention_mask"]
        device = self.model.device
        images = _pooled(self.model.get_image_features(pixel_values=pixels.to(device)))
        words = _pooled(self.model.get_text_features(**{name: one.to(device) for name, one in given.items()}))
        cosine = torch.nn.functional.cosine_similarity(images, words)  # [B]
        return (100 * cosine.clamp(min=0)).tolist()


def score_by_clip(
    scorer: ClipScorer,
    drawings: Sequence[Drawing],
    batch_size: int = 16,
    say: Callable[[str], None] = lambda line: None,
) -> Finding:
    """The mean score of pictures with their prompts, and each picture's.

    Raises:
        BenchmarkError: a picture cannot be read.
    """
    scores: list[float] = []
    with counted(len(drawings), "pictures scored", say) as advance:
        for start in range(0, len(drawings), batch_size):
            batch = drawings[start : start + batch_size]
            pictures = [Image.fromarray(read_picture(one.path)) for one in batch]
            scores += scorer.score(pictures, [one.prompt.text for one in batch])
            advance(len(batch))
    by_place = dict(zip((one.place for one in drawings), scores, strict=True))
    categories: dict[str, list[float]] = {}
    for one in drawings:
        if one.prompt.category is not None:
            categories.setdefault(one.prompt.category, []).append(by_place[one.place])
    rows = [
        {"category": name, scorer.name: mean(part), "pictures": len(part)}
        for name, part in categories.items()
    ]
    return Finding(
        headline=scorer.name,
        value=mean(scores),
        figures={scorer.name: mean(scores)},
        tables={f"{scorer.name} by category": rows} if rows else {},
        scores={place: score / 100 for place, score in by_place.items()},
        remarks={place: f"{scorer.name}: {score:.1f}" for place, score in by_place.items()},
        settings=scorer.settings,
    )


def _image_processor(folder: Path, model: PreTrainedModel) -> CLIPImageProcessor | SiglipImageProcessor:
    """The folder's own, or, as SigLIPs exported here have none, the published way of its kind."""
    if (folder / "preprocessor_config.json").is_file():
        return AutoImageProcessor.from_pretrained(folder)
    side = model.config.vision_config.image_size
    square = {"height": side, "width": side}
    if model.config.model_type == "clip":
        return CLIPImageProcessor(size={"shortest_edge": side}, crop_size=square)
    return SiglipImageProcessor(size=square, resample=Image.Resampling.BICUBIC)


def _pooled(output: object) -> Tensor:
    """Features [B, C]: transformers 5 returns them in an output of the tower."""
    return getattr(output, "pooler_output", output)

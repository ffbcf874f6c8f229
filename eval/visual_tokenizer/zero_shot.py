"""Zero-shot classification of the user's pictures, by quantized and by continuous features."""

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from eval.cases import CASES
from eval.inputs import load_dual_tokenizer
from eval.progress import with_progress
from eval.results import Case, TaskResult
from eval.visual_tokenizer.class_names import class_names
from eval.visual_tokenizer.gathering import Part, gather
from eval.visual_tokenizer.matching import Matchers, load_matchers
from eval.visual_tokenizer.pictures import PictureSet, open_pictures
from eval.visual_tokenizer.tasks import Shown, TokenizerJob, save_cases, write_result

TASK = "zero_shot"
TOP = (1, 5)
TEXTS = 400  # through the text tower at a time


class TextTower:
    """A text encoder as open_clip's classifier builder calls it."""

    def __init__(self, encode: Callable[[Tensor], Tensor]) -> None:
        self.encode = encode

    def encode_text(self, tokens: Tensor, normalize: bool = False) -> Tensor:
        """Vectors [B, C] of token ids [B, T]."""
        features = self.encode(tokens).float()
        return F.normalize(features, dim=-1) if normalize else features


def build_classifier(
    encode: Callable[[Tensor], Tensor],
    tokens: Callable[[Sequence[str]], Tensor],
    names: Sequence[str],
    templates: Sequence[Callable[[str], str]],
) -> Tensor:
    """A class's vector for each name, [N, C]: texts normalised, their mean normalised, by open_clip.

    Args:
        encode: vectors [B, C] of token ids.
        tokens: token ids of texts.
        names: of the classes.
        templates: sentences about a name (open_clip: 80 for ImageNet).
    """
    from open_clip import build_zero_shot_classifier  # seconds

    at_a_time = max(1, TEXTS // len(templates))
    parts = [names[at : at + at_a_time] for at in range(0, len(names), at_a_time)]
    columns = [
        build_zero_shot_classifier(TextTower(encode), tokens, part, templates, num_classes_per_batch=None)
        for part in with_progress(parts, "encoding class names")
    ]
    return torch.cat(columns, dim=1).T


def places_of(features: Tensor, classifier: Tensor, labels: Sequence[int]) -> tuple[Tensor, Tensor]:
    """How many classes come before each picture's own, and which comes first: two [B] int64.

    Of equally near classes the earlier comes first, so that features that are all the same are right no more
    often than luck would be.

    Raises:
        ValueError: features are not finite.
    """
    logits = F.normalize(features.float(), dim=-1) @ classifier.T  # [B, N]
    if not torch.isfinite(logits).all():
        raise ValueError("got features that are NaN or infinite; check the model's weights")
    order = logits.argsort(dim=1, descending=True, stable=True).cpu()
    return (order == torch.tensor(labels)[:, None]).int().argmax(dim=1), order[:, 0]


def measure(
    job: TokenizerJob, siglip: Path | str | None = None, names: str | Path | None = None
) -> TaskResult | None:
    """Classify pictures by the texts of open_clip's 80 templates; writes `zero_shot/`.

    Args:
        job: tokenizer, labelled pictures and where to write.
        siglip: what the tokenizer was built on, for the text tokenizer and continuous features.
        names: of the classes (see `class_names`).

    Returns:
        the result, for the rank that is done last; None for the others.

    Raises:
        FileNotFoundError: a model is missing.
        ValueError: the tokenizer has no text tower, or pictures, labels or names cannot be used.
    """
    from open_clip import OPENAI_IMAGENET_TEMPLATES as templates  # seconds

    everything = open_pictures(job.data).with_labels()
    called = class_names(everything, names)
    pictures = everything.draw(job.count, job.seed)
    tokenizer = load_dual_tokenizer(job.visual_tokenizer)
    matchers = load_matchers(tokenizer, job.visual_tokenizer, siglip)
    settings = {
        **job.settings(tokenizer, pictures),
        "siglip": None if siglip is None else str(siglip),
        "class_names": str(names or "of the data"),
        "class_names_sha256": hashlib.sha256("\n".join(called).encode()).hexdigest(),
        "classes": len(called),
        "templates": f"open_clip's {len(templates)} for ImageNet",
    }
    part = _measure_share(job, pictures, matchers, called, templates, tokenizer.config.image_size)
    whole = gather(job.output / TASK, job.share, settings, part, len(pictures))
    if whole is None:
        return None
    result = _result(job, pictures, called, whole, settings, tokenizer.config.image_size)
    return write_result(result, job.output)


@torch.no_grad()
def _measure_share(
    job: TokenizerJob,
    pictures: PictureSet,
    matchers: Matchers,
    names: Sequence[str],
    templates: Sequence[Callable[[str], str]],
    image_size: int,
) -> Part:
    classifiers: dict[str, Tensor] = {}
    built: dict[Callable, Tensor] = {}
    for way, matcher in matchers.ways.items():
        encode = matcher.encode_texts
        if encode not in built:
            built[encode] = build_classifier(encode, matchers.tokens, names, templates)
        classifiers[way] = built[encode]
    numbers: list[int] = []
    found: dict[str, list[np.ndarray]] = {
        f"{way}.{what}": [] for way in classifiers for what in ("place", "first")
    }
    for batch in job.batches(pictures, image_size, "classifying"):
        numbers += batch.numbers
        labels = [pictures.pictures[number].label for number in batch.numbers]
        images = batch.images.to(matchers.device)
        for way, matcher in matchers.ways.items():
            place, first = places_of(matcher.encode_images(images), classifiers[way], labels)
            found[f"{way}.place"].append(place.numpy())
            found[f"{way}.first"].append(first.numpy())
    return Part.of_batches(numbers, found)


def _result(
    job: TokenizerJob,
    pictures: PictureSet,
    names: Sequence[str],
    whole: Part,
    settings: dict,
    image_size: int,
) -> TaskResult:
    ways = [name.removesuffix(".place") for name in whole.rows if name.endswith(".place")]
    figures = {
        f"top-{k}, {way}": 100 * float((whole.rows[f"{way}.place"] < k).mean()) for way in ways for k in TOP
    }
    labels = np.array([picture.label for picture in pictures.pictures])
    place, first = whole.rows["quantized.place"], whole.rows["quantized.first"]
    order = np.argsort(place, kind="stable")
    wrong = [int(number) for number in order[::-1] if place[number] > 0][:CASES]
    right = [int(number) for number in order if place[number] == 0][:CASES]

    def cases(numbers: list[int], name: str) -> list[Case]:
        shown = [
            Shown(
                number,
                [
                    pictures.pictures[number].key,
                    f"class: {names[labels[number]]}",
                    f"taken for: {names[first[number]]}",
                    f"classes before its own: {place[number]} of {len(names)}",
                ],
                score=1 / (1 + float(place[number])),
            )
            for number in numbers
        ]
        return save_cases(job, pictures, image_size, f"{TASK}/{name}", shown)

    return TaskResult(
        task=TASK,
        headline="top-1",
        value=figures["top-1, quantized"],
        unit="%",
        count=len(pictures),
        chance=100 / len(names),
        trials=len(pictures),
        figures={**figures, "top-5, chance": 100 * min(5, len(names)) / len(names)},
        tables={"Classes": _by_class(whole, ways, labels, names)},
        worst=cases(wrong, "worst"),
        best=cases(right, "best"),
        settings=settings,
    )


def _by_class(whole: Part, ways: Sequence[str], labels: np.ndarray, names: Sequence[str]) -> list[dict]:
    rows = []
    for label in np.unique(labels):
        here = labels == label
        taken = whole.rows["quantized.first"][here]
        wrong = np.bincount(taken[taken != label], minlength=len(names))
        rows.append(
            {
                "class": names[label],
                "pictures": int(here.sum()),
                **{
                    f"top-{k}, {way}": 100 * float((whole.rows[f"{way}.place"][here] < k).mean())
                    for way in ways
                    for k in TOP
                },
                "mostly mistaken for": names[int(wrong.argmax())] if wrong.any() else "",
            }
        )
    return rows

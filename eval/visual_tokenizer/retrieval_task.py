"""Retrieval on the user's pictures with captions: a picture by a caption and a caption by a picture."""

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from eval.cases import CASES
from eval.inputs import load_dual_tokenizer
from eval.metrics.recall import first_hits, recall_at
from eval.results import Case, TaskResult
from eval.visual_tokenizer.gathering import Part, gather
from eval.visual_tokenizer.matching import Matchers, load_matchers
from eval.visual_tokenizer.pictures import Picture, PictureSet, Place, open_pictures, picture_files
from eval.visual_tokenizer.tasks import Shown, TokenizerJob, save_cases, write_result

TASK = "retrieval"
KS = (1, 5, 10)
KARPATHY = "dataset_*.json"


def open_captioned(folder: Path, language: str, split: str = "test") -> PictureSet:
    """Pictures with captions: Karpathy's split file with the pictures below its folder, or shards.

    Args:
        folder: holds `dataset_flickr8k.json` (or flickr30k, coco) and the pictures at any depth, or shards.
        language: which captions of shards that have several languages.
        split: of Karpathy's file.

    Raises:
        ValueError: there is neither, or a picture or its captions are missing.
    """
    files = sorted(folder.glob(KARPATHY)) if folder.is_dir() else []
    if len(files) > 1:
        raise ValueError(f"{folder} has {len(files)} files {KARPATHY}; keep the one whose pictures are there")
    return _karpathy(files[0], split) if files else open_pictures(folder).with_captions(language)


def _karpathy(path: Path, split: str) -> PictureSet:
    try:
        images = json.loads(path.read_text(encoding="utf-8"))["images"]
        wanted = [
            (one["filename"], tuple(sentence["raw"].strip() for sentence in one["sentences"]))
            for one in images
            if one["split"] == split
        ]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{path} is no file of Karpathy's splits ({type(error).__name__}: {error}); expected images with "
            "filename, split and sentences with raw"
        ) from None
    if not wanted:
        raise ValueError(f"{path} has no pictures of the split {split!r}")
    places = {name.rpartition("/")[2]: path.parent / name for name in picture_files(path.parent)}
    pictures = []
    for name, captions in wanted:
        if name not in places:
            raise ValueError(
                f"{path}: no picture {name} below {path.parent}; put the data set's pictures there"
            )
        if not captions:
            raise ValueError(f"{path}: {name} has no sentences")
        pictures.append(Picture(name, Place(places[name]), captions=captions))
    return PictureSet(path.parent, f"Karpathy's split {split!r} of {path.name}", pictures)


def measure(job: TokenizerJob, siglip: Path | str | None = None, language: str = "en") -> TaskResult | None:
    """Find pictures by captions and captions by pictures, among all of the set; writes `retrieval/`.

    Args:
        job: tokenizer, pictures with captions and where to write.
        siglip: what the tokenizer was built on, for the text tokenizer and continuous features.
        language: which captions of shards that have several languages.

    Returns:
        the result, for the rank that is done last; None for the others.

    Raises:
        FileNotFoundError: a model is missing.
        ValueError: the tokenizer has no text tower, or pictures or captions cannot be used.
    """
    pictures = open_captioned(job.data, language).draw(job.count, job.seed)
    tokenizer = load_dual_tokenizer(job.visual_tokenizer)
    matchers = load_matchers(tokenizer, job.visual_tokenizer, siglip)
    size = tokenizer.config.image_size
    settings = {
        **job.settings(tokenizer, pictures),
        "siglip": None if siglip is None else str(siglip),
        "language": language,
        "captions": sum(len(picture.captions) for picture in pictures.pictures),
    }
    part = _measure_share(job, pictures, matchers, size)
    whole = gather(job.output / TASK, job.share, settings, part, len(pictures))
    if whole is None:
        return None
    return write_result(_result(job, pictures, whole, settings, size), job.output)


@torch.no_grad()
def _measure_share(job: TokenizerJob, pictures: PictureSet, matchers: Matchers, image_size: int) -> Part:
    most = max(len(picture.captions) for picture in pictures.pictures)
    numbers: list[int] = []
    found: dict[str, list[np.ndarray]] = {}
    for batch in job.batches(pictures, image_size, "encoding pictures and captions"):
        numbers += batch.numbers
        images = batch.images.to(matchers.device)
        captions = [pictures.pictures[number].captions for number in batch.numbers]
        tokens = matchers.tokens([text for some in captions for text in some])
        encoded: dict = {}  # ways that share a text tower share its vectors
        for way, matcher in matchers.ways.items():
            encode = matcher.encode_texts
            if encode not in encoded:
                texts = encode(tokens).float().cpu().split([len(some) for some in captions])
                rows = [F.pad(one, (0, 0, 0, most - len(one))) for one in texts]
                encoded[encode] = torch.stack(rows).numpy()  # [B, most, C], zeros where a picture has fewer
            found.setdefault(f"{way}.images", []).append(matcher.encode_images(images).float().cpu().numpy())
            found.setdefault(f"{way}.texts", []).append(encoded[encode])
    return Part.of_batches(numbers, found)


def _result(
    job: TokenizerJob, pictures: PictureSet, whole: Part, settings: dict, image_size: int
) -> TaskResult:
    owners = [number for number, one in enumerate(pictures.pictures) for _ in one.captions]
    inside = [place for one in pictures.pictures for place in range(len(one.captions))]
    own = list(range(len(pictures)))
    ways = [name.removesuffix(".images") for name in whole.rows if name.endswith(".images")]
    figures: dict[str, float] = {}
    rows = []
    for way in ways:
        images = torch.from_numpy(whole.rows[f"{way}.images"])
        texts = torch.from_numpy(whole.rows[f"{way}.texts"][owners, inside])
        directions = {
            "picture by caption": recall_at(texts, images, owners, own, KS),
            "caption by picture": recall_at(images, texts, own, owners, KS),
        }
        for direction, found in directions.items():
            row = {"direction": direction, "features": way}
            for k, one in found.items():
                figures[f"R@{k}, {direction}, {way}"] = row[f"R@{k}"] = 100 * one.recall
                row[f"chance of R@{k}"] = 100 * one.chance
            rows.append(row)
        if way == "quantized":
            before = first_hits(texts, images, owners, own).tolist()
            chance = directions["picture by caption"][1].chance
    captions = [text for one in pictures.pictures for text in one.captions]
    order = sorted(range(len(owners)), key=before.__getitem__)

    def cases(chosen: Sequence[int], name: str) -> list[Case]:
        shown = [
            Shown(
                owners[index],
                [
                    pictures.pictures[owners[index]].key,
                    f"caption: {captions[index]}",
                    f"pictures before its own: {before[index]} of {len(pictures)}",
                ],
                score=1 / (1 + before[index]),
            )
            for index in chosen
        ]
        return save_cases(job, pictures, image_size, f"{TASK}/{name}", shown)

    return TaskResult(
        task=TASK,
        headline="R@1, picture by caption",
        value=figures["R@1, picture by caption, quantized"],
        unit="%",
        count=len(pictures),
        chance=100 * chance,
        trials=len(owners),
        figures=figures,
        tables={"Recall, %": rows},
        worst=cases([index for index in order[::-1] if before[index] > 0][:CASES], "worst"),
        best=cases([index for index in order if before[index] == 0][:CASES], "best"),
        settings=settings,
    )

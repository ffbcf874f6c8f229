"""Reconstruction of the user's pictures: MSE, L1, LPIPS, PSNR, SSIM, Fréchet distance, use of codebooks."""

import csv
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from dualtoken.perceptual import PerceptualConfig, describe, load_lpips
from dualtoken.visual_tokenizer.model import DualTokenVisualTokenizer
from eval.cases import CASES
from eval.inputs import load_visual_tokenizer
from eval.metrics.frechet import FeatureStatistics, frechet_distance
from eval.metrics.inception import FeatureExtractor
from eval.results import Case, TaskResult
from eval.visual_tokenizer.code_use import count_by_depth, entropies_by_depth, table_of_counts
from eval.visual_tokenizer.gathering import Part, gather
from eval.visual_tokenizer.pictures import PictureSet, open_pictures
from eval.visual_tokenizer.reconstruction import QUALITIES, reconstruct_batch
from eval.visual_tokenizer.saved_pictures import SAVED, SAVED_WORDS
from eval.visual_tokenizer.tasks import Shown, TokenizerJob, save_cases, write_result

TASK = "reconstruction"
NAMES = {"psnr": "PSNR", "ssim": "SSIM", "mse": "MSE", "l1": "L1", "lpips": "LPIPS"}
FEW_PICTURES = 50_000  # a Fréchet distance of fewer is biased; published ones are of ImageNet's 50,000


def measure(
    job: TokenizerJob,
    lpips: PerceptualConfig | None = None,
    extractor: FeatureExtractor | None = None,
    saved: str = "png",
) -> TaskResult | None:
    """Measure the reconstruction of pictures; writes `reconstruction/`.

    Args:
        job: tokenizer, pictures and where to write.
        lpips: network and weights of LPIPS, which is left out without.
        extractor: features of the Fréchet distance between originals and reconstructions, which is left out
            without; by Inception's it is called rFID.
        saved: how pictures are made 8-bit for it: `png`, or `reference` as the released code.

    Returns:
        the result, for the rank that is done last; None for the others.

    Raises:
        FileNotFoundError: there is no tokenizer.
        ValueError: pictures or weights cannot be used; the message names the file.
    """
    if saved not in SAVED:
        raise ValueError(f"saved is {saved!r}; expected one of {', '.join(SAVED)}")
    tokenizer = load_visual_tokenizer(job.visual_tokenizer)
    network = None if lpips is None else load_lpips(lpips).to(tokenizer.device)
    pictures = open_pictures(job.data).draw(job.count, job.seed)
    settings = {
        **job.settings(tokenizer, pictures),
        "lpips": None if lpips is None else describe(lpips),
        "frechet_features": None if extractor is None else f"{extractor.name}, {extractor.fingerprint}",
        "frechet_pictures": None if extractor is None else f"{saved}: {SAVED_WORDS[saved]}",
    }
    part = _measure_share(job, tokenizer, pictures, network, extractor, saved)
    whole = gather(job.output / TASK, job.share, settings, part, len(pictures))
    if whole is None:
        return None
    return write_result(_result(job, tokenizer, pictures, whole, extractor, settings), job.output)


@torch.no_grad()
def _measure_share(
    job: TokenizerJob,
    tokenizer: DualTokenVisualTokenizer,
    pictures: PictureSet,
    network: nn.Module | None,
    extractor: FeatureExtractor | None,
    saved: str,
) -> Part:
    config = tokenizer.config
    numbers: list[int] = []
    rows: dict[str, list[np.ndarray]] = {name: [] for name in (*QUALITIES, "lpips", "entropies")}
    counts = np.zeros((2, config.num_quantizers, config.codebook_size), dtype=np.int64)
    statistics = [] if extractor is None else [FeatureStatistics(extractor.dim) for _ in range(2)]
    for batch in job.batches(pictures, config.image_size, "reconstructing"):
        numbers += batch.numbers
        originals = batch.images.to(tokenizer.device)
        found = reconstruct_batch(tokenizer, originals)
        for name in QUALITIES:
            rows[name].append(getattr(found, name).cpu().numpy())
        if network is not None:
            rows["lpips"].append(network(found.images, originals).double().flatten().cpu().numpy())
        codes = found.codes.cpu()
        counts += count_by_depth(codes, config.codebook_size)
        rows["entropies"].append(entropies_by_depth(codes))
        for one, images in zip(statistics, (originals, found.images)):
            one.update(extractor(SAVED[saved](images)))
    sums = {"codes": counts}
    for side, one in zip(("originals", "reconstructions"), statistics):
        sums |= {f"{side}.{name}": values for name, values in one.state().items()}
    return Part.of_batches(numbers, rows, sums)


def _result(
    job: TokenizerJob,
    tokenizer: DualTokenVisualTokenizer,
    pictures: PictureSet,
    whole: Part,
    extractor: FeatureExtractor | None,
    settings: dict[str, Any],
) -> TaskResult:
    measured = {name: values for name, values in whole.rows.items() if name in NAMES}
    figures = {NAMES[name]: math.fsum(values) / len(values) for name, values in measured.items()}
    headline, unit, notes = "PSNR", "dB", []
    if extractor is not None:
        headline, unit = ("rFID" if extractor.name == "FID" else extractor.name), ""
        figures[headline] = _distance(whole)
        if len(pictures) < FEW_PICTURES:
            notes.append(
                f"{headline} of {len(pictures)} pictures compares with others of as many pictures only; "
                f"published figures are of {FEW_PICTURES}"
            )
    if "stlpips" in str(settings["lpips"]):
        notes.append("LPIPS by stlpips weights, a relative of the published LPIPS whose figures differ")
    table = job.output / TASK / "per_picture.csv"
    _write_table(table, pictures, measured)
    order = np.argsort(measured["psnr"], kind="stable").tolist()
    half = len(order) // 2

    def beside(images: Tensor) -> Tensor:
        return torch.cat([images, reconstruct_batch(tokenizer, images).images.cpu()], dim=3)

    def cases(numbers: Sequence[int], name: str) -> list[Case]:
        shown = _shown(pictures, measured, numbers)
        return save_cases(job, pictures, tokenizer.config.image_size, f"{TASK}/{name}", shown, beside)

    return TaskResult(
        task=TASK,
        headline=headline,
        value=figures[headline],
        unit=unit,
        count=len(pictures),
        higher_is_better=extractor is None,
        figures=figures,
        tables={"Codebooks": table_of_counts(whole.sums["codes"], whole.rows["entropies"])},
        worst=cases(order[: min(CASES, len(order) - half)], "worst"),
        best=cases(order[::-1][: min(CASES, half)], "best"),
        files=[table.relative_to(job.output).as_posix()],
        notes=notes,
        settings=settings,
    )


def _distance(whole: Part) -> float:
    first, second = (
        FeatureStatistics.from_state(
            {name: whole.sums[f"{side}.{name}"] for name in ("count", "sum", "outer")}
        )
        for side in ("originals", "reconstructions")
    )
    return frechet_distance(first, second)


def _write_table(path: Path, pictures: PictureSet, measured: dict[str, np.ndarray]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", newline="", encoding="utf-8") as file:
        table = csv.writer(file)
        table.writerow(["picture", *measured])
        for number, picture in enumerate(pictures.pictures):
            table.writerow([picture.key, *(repr(float(values[number])) for values in measured.values())])


def _shown(pictures: PictureSet, measured: dict[str, np.ndarray], numbers: Sequence[int]) -> list[Shown]:
    def lines(number: int) -> list[str]:
        figures = ", ".join(f"{NAMES[name]} {values[number]:.4g}" for name, values in measured.items())
        return [pictures.pictures[number].key, figures, "left the original, right the reconstruction"]

    return [Shown(number, lines(number), float(measured["psnr"][number])) for number in numbers]

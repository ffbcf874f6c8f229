"""The measure `scenes`: drawn, answered and captioned, held-out combinations beside trained ones."""

from __future__ import annotations

import json
from collections.abc import Collection
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from data_pipeline.shards.code_shards import DatasetManifest, require_same_codes
from data_pipeline.sources.scenes.parts import Combination, hold_out
from eval.inputs import EvaluationPaths, load_models, to_picture
from eval.results import write_json
from eval.scenes.answered import measure_answers
from eval.scenes.captioned import measure_captions
from eval.scenes.detector import SceneDetector
from eval.scenes.drawn import measure_detector, measure_drawn
from eval.scenes.samples import load_scenes, read_scenes
from eval.seeing import load_sight

SCENES = {"held_out": 144, "seen": 48}  # at most
MEASURED = ("drawn", "answers", "captions")
GUIDANCE_SCALE = 1.0


def held_out_combinations(sample_data: Path) -> frozenset[Combination]:
    """The combinations that a folder of sample data holds out, by its settings.

    Raises:
        FileNotFoundError: the folder has no summary.
    """
    path = sample_data / "summary.json"
    if not path.is_file():
        raise FileNotFoundError(f"no {path}: scenes are measured of what `dualtoken sample-data` wrote")
    settings = json.loads(path.read_text(encoding="utf-8"))["settings"]
    return hold_out(settings["held_out"], settings["seed"])


@torch.no_grad()
def run(
    paths: EvaluationPaths,
    count: int | None = None,
    seed: int = 0,
    measured: Collection[str] = MEASURED,
) -> dict:
    """Measure scenes of held-out and of trained combinations; write `scenes.json` and the pictures.

    Args:
        paths: of the models and the data.
        count: scenes of each split at most; None for the measure's own number.
        seed: of which scenes and questions.
        measured: what is measured of `MEASURED`: a model that never learned to draw may be spared it.

    Raises:
        FileNotFoundError: a model or the sample data are missing.
        ValueError: model, codes, visual tokenizer and vision tower do not belong together, or a sample says
            no scene.
    """
    model, text_tokenizer, tokenizer = load_models(paths.model, paths.visual_tokenizer)
    sight = load_sight(model.config, text_tokenizer, tokenizer, paths.vision_tower)
    held_out = held_out_combinations(paths.sample_data)
    detector = SceneDetector(sight.image_size)
    trained = [scene for _, scene in read_scenes(paths.scenes()["seen"])]
    result: dict = {"training_scenes": len(trained), "detector": {}, "splits": {}}
    for name, folder in paths.codes().items():
        require_same_codes(
            folder, DatasetManifest.load(folder).fingerprint, model.config.tokenizer_fingerprint
        )
        most = min(count or SCENES[name], SCENES[name])
        samples = load_scenes(folder, paths.scenes()[name], sight, most, seed)
        pictures = paths.output / "scenes" / name
        pictures.mkdir(parents=True, exist_ok=True)

        def save(image: Tensor, title: str, pictures: Path = pictures) -> str:
            to_picture(image * 2 - 1).save(pictures / f"{title}.png")
            return str((pictures / f"{title}.png").relative_to(paths.output))

        result["detector"][name] = measure_detector(detector, tokenizer, samples)
        measures = {
            "drawn": partial(
                measure_drawn, model, text_tokenizer, tokenizer, detector, samples, held_out, GUIDANCE_SCALE,
                save,
            ),
            "answers": partial(measure_answers, model, text_tokenizer, samples, trained, seed),
            "captions": partial(measure_captions, model, text_tokenizer, samples),
        }  # fmt: skip
        result["splits"][name] = {part: measures[part]() for part in MEASURED if part in measured}
    write_json(paths.output / "scenes.json", result)
    return result

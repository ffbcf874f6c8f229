"""Scenes drawn from their captions, judged by the detector, part by part (as GenEval, arXiv 2310.11513)."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from data_pipeline.sources.scenes.parts import KINDS, Combination, Scene
from dualtoken.generation.generators import generate_images
from dualtoken.unified_model.model import DualTokenForCausalLM
from dualtoken.visual_tokenizer.model import DualTokenVisualTokenizer
from eval.generation.writing import decode_codes
from eval.inputs import draw_prompts
from eval.metrics.images import to_unit_range
from eval.scenes.correctness import right_parts, shares
from eval.scenes.detector import Found, SceneDetector
from eval.scenes.samples import SceneSamples

BATCH = 48


def measure_detector(
    detector: SceneDetector, tokenizer: DualTokenVisualTokenizer, samples: SceneSamples
) -> dict[str, dict[str, float]]:
    """How often the detector is right about true pictures, and about what their codes keep: the ceiling."""
    kept = to_unit_range(decode_codes(tokenizer, samples.codes).clamp(-1, 1))
    return {
        name: shares(judge(samples.scenes, detector.read(images)))
        for name, images in (("true", samples.pictures), ("reconstructed", kept))
    }


def judge(scenes: Sequence[Scene], found: Sequence[Found | None]) -> list[dict[str, bool]]:
    """Judge what was found of each scene."""
    return [right_parts(scene, one) for scene, one in zip(scenes, found, strict=True)]


def by_chance(scenes: Sequence[Scene], found: Sequence[Found | None]) -> dict[str, float]:
    """What the same findings have right of the other scenes: the mean over all pairs of different ones."""
    pairs = itertools.product(enumerate(scenes), enumerate(found))
    return shares([right_parts(scene, one) for (i, scene), (j, one) in pairs if i != j])


def draw(
    model: DualTokenForCausalLM,
    text_tokenizer: PreTrainedTokenizerBase,
    tokenizer: DualTokenVisualTokenizer,
    prompts: Sequence[str],
    guidance_scale: float,
) -> Tensor:
    """The likeliest picture, code by code, for each prompt: [N, 3, S, S] in [0, 1]."""
    drawn = [
        generate_images(
            model, text_tokenizer, prompts[start : start + BATCH], guidance_scale, temperature=0.0
        )
        for start in range(0, len(prompts), BATCH)
    ]
    return to_unit_range(decode_codes(tokenizer, torch.cat(drawn)).clamp(-1, 1))


def measure_drawn(
    model: DualTokenForCausalLM,
    text_tokenizer: PreTrainedTokenizerBase,
    tokenizer: DualTokenVisualTokenizer,
    detector: SceneDetector,
    samples: SceneSamples,
    held_out: frozenset[Combination],
    guidance_scale: float,
    save: Callable[[Tensor, str], str],
) -> dict[str, Any]:
    """Draw every scene from a caption, the languages taking turns, and judge the pictures.

    Args:
        model: the unified model.
        text_tokenizer: its text tokenizer.
        tokenizer: the visual tokenizer whose codes it writes.
        detector: what looks at the pictures.
        samples: scenes to draw.
        held_out: combinations never trained on; scenes are also judged apart by the kind of theirs.
        guidance_scale: of classifier-free guidance; 1 for none.
        save: writes a picture in [0, 1] under a name and returns its path for the report.
    """
    rows = draw_prompts(samples.samples)
    images = draw(model, text_tokenizer, tokenizer, [row["prompt"] for row in rows], guidance_scale)
    found = detector.read(images)
    judged = judge(samples.scenes, found)
    for number, row in enumerate(rows):
        row["right"] = judged[number]
        row["found"] = str(found[number])
        row["picture"] = save(images[number], f"{number:03d}-drawn")
        row["true_picture"] = save(samples.pictures[number], f"{number:03d}-true")
    languages = [row["language"] for row in rows]
    kinds = [kind_of(scene, held_out) for scene in samples.scenes]
    return {
        "scenes": len(rows),
        "guidance_scale": guidance_scale,
        "shares": shares(judged),
        "chance": by_chance(samples.scenes, found),
        "by_combination": _apart(judged, kinds, KINDS),
        "by_language": _apart(judged, languages, list(dict.fromkeys(languages))),
        "rows": rows,
    }


def kind_of(scene: Scene, held_out: frozenset[Combination]) -> str:
    """The kind of the held-out combination that a scene shows; nothing for one of trained combinations."""
    return next((one.kind for one in scene.combinations() if one in held_out), "")


def _apart(
    judged: Sequence[Mapping[str, bool]], groups: Sequence[str], names: Sequence[str]
) -> dict[str, dict[str, float]]:
    chosen = {
        name: [one for one, group in zip(judged, groups, strict=True) if group == name] for name in names
    }
    return {name: {**shares(ones), "scenes": len(ones)} for name, ones in chosen.items() if ones}

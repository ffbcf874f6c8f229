"""Captions of scenes, word for word and by parts."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedTokenizerBase

from data_pipeline.sources.scenes.captions import captions, read_caption
from dualtoken.unified_model.model import DualTokenForCausalLM
from eval.generation.writing import write_captions
from eval.scenes.correctness import ALL, shares
from eval.scenes.detector import Found
from eval.scenes.drawn import by_chance, judge
from eval.scenes.samples import SceneSamples

MOST_TOKENS = 48


def measure_captions(
    model: DualTokenForCausalLM, text_tokenizer: PreTrainedTokenizerBase, samples: SceneSamples
) -> dict[str, Any]:
    """Caption every scene in every language and read the captions back.

    A caption is exact where the grammar has it for the scene, in whatever words; what the grammar cannot read
    has no part right.
    """
    languages = list(dict.fromkeys(name for sample in samples.samples for name in sample.captions or {}))
    found: dict[str, Any] = {}
    for language in languages:
        written = write_captions(model, text_tokenizer, samples.images, language, MOST_TOKENS)
        scenes = [read_caption(text, language) for text in written]
        read = [None if scene is None else Found.of(scene) for scene in scenes]
        judged = judge(samples.scenes, read)
        exact = [
            text in captions(scene, language) for text, scene in zip(written, samples.scenes, strict=True)
        ]
        found[language] = {
            "scenes": len(samples),
            "shares": {**shares(judged), "exact": sum(exact) / len(exact)},
            "chance": by_chance(samples.scenes, read),
            "unreadable": sum(scene is None for scene in scenes) / len(scenes),
            "written": written,
            "right": [one[ALL] for one in judged],
        }
    return found

"""What can answer a benchmark's questions; `load_answerer` tells by config.json what a folder holds."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from dualtoken.unified_model.config import DualTokenConfig
from eval.inputs import PRECISIONS, model_type_of
from eval.understanding.benchmark import Question
from eval.understanding.transformers_models import TransformersAnswerer
from eval.understanding.unified import UnifiedAnswerer


class Answerer(Protocol):
    """A model that answers questions about pictures, always the same: greedily."""

    name: str
    settings: dict[str, Any]
    """What decides its answers besides its files; under `versions`, what they may differ by in rounding."""
    fingerprint: str
    """Of its files, as `eval.model_files.fingerprint_of_files` takes it."""

    def answer(self, questions: Sequence[Question], max_new_tokens: int) -> list[str]:
        """What it writes after each question, without white space around."""
        ...

    def choose(self, questions: Sequence[Question]) -> list[list[float]]:
        """The log-likelihood (nats) of each option of each question."""
        ...


def load_answerer(
    model: str | Path,
    visual_tokenizer: Path | None = None,
    template: str | None = None,
    precision: str = "fp32",
    at_a_time: int | None = None,
    vision_tower: str | Path | None = None,
) -> Answerer:
    """Load what answers: a unified model's folder, or a model that transformers loads for pictures with text.

    Args:
        model: a folder, or a name on the hub.
        visual_tokenizer: folder of the one that a unified model was trained with; others have no use for it.
        template: of a unified model's prompts (qwen, vicuna or none), by default as `dualtoken chat` chooses.
        precision: fp32 or bf16.
        at_a_time: how many of the questions that it is given together it writes answers to at a time; all by
            default.
        vision_tower: SigLIP of a unified model that was trained on stored features: a folder, or a name on
            the hub.

    Raises:
        FileNotFoundError: the folder holds no model.
        ValueError: an argument does not fit the model, or it cannot answer questions about pictures.
    """
    if precision not in PRECISIONS:
        raise ValueError(f"precision is {precision!r}, expected {' or '.join(PRECISIONS)}")
    folder = Path(model)
    on_hub = not folder.is_dir() and not folder.is_absolute() and len(folder.parts) <= 2  # owner/name
    if not on_hub and not (folder / "config.json").is_file():
        raise FileNotFoundError(f"no model in {folder}: expected a folder with config.json")
    if on_hub or model_type_of(folder) != DualTokenConfig.model_type:
        if template is not None:
            raise ValueError(
                f"{model} is no unified model and has a chat template of its own: leave the template "
                f"{template!r} out"
            )
        if vision_tower is not None:
            raise ValueError(f"{model} is no unified model: leave the vision tower {vision_tower} out")
        return TransformersAnswerer(model, precision, at_a_time)
    if visual_tokenizer is None:
        raise ValueError(f"{model} is a unified model: name the visual tokenizer that it was trained with")
    return UnifiedAnswerer(folder, visual_tokenizer, template, precision, at_a_time, vision_tower)

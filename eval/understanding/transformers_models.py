"""Answers of other models: whatever the pipeline `image-text-to-text` of transformers loads."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image
from transformers import pipeline
from transformers.utils import cached_file
from transformers.utils import logging as transformers_logging

from data_pipeline.images.decoding import decode_rgb
from data_pipeline.images.header import BadImageError
from eval.inputs import PRECISIONS, default_device
from eval.model_files import fingerprint_of_files
from eval.results import versions
from eval.understanding.benchmark import Question
from eval.understanding.pictures import for_each_picture, picture_bytes, undecodable


class TransformersAnswerer:
    """A folder or a name on the hub, asked by the chat template of its own processor.

    Raises:
        ValueError: the model cannot be loaded for pictures with text, or its processor has no chat template.
    """

    def __init__(self, model: str | Path, precision: str = "fp32", at_a_time: int | None = None) -> None:
        self._at_a_time = at_a_time
        transformers_logging.disable_progress_bar()
        self.name = str(model)
        try:
            self._pipeline = pipeline(
                "image-text-to-text", model=self.name, dtype=PRECISIONS[precision], device=default_device()
            )
            config = cached_file(self.name, "config.json")
        except (OSError, ValueError, KeyError, TypeError, ImportError) as error:
            reason = " ".join(str(error).split())[:200]  # of hundreds of classes and their tracebacks
            raise ValueError(
                f"{model}: transformers cannot load it for pictures with text ({reason}); "
                "expected a model and its processor, in a folder or by their name on the hub"
            ) from error
        processor = self._pipeline.processor
        if not getattr(processor, "chat_template", None):
            raise ValueError(
                f"{model}: its processor has no chat template, so how to ask it is not known; "
                "put the model's chat_template.jinja into its folder"
            )
        words = processor.tokenizer
        words.padding_side = "left"
        words.pad_token = words.pad_token or words.eos_token
        self.fingerprint = fingerprint_of_files(Path(config).parent)
        self.settings: dict[str, Any] = {
            "precision": precision,
            "template": "of its processor",
            "versions": versions(),
        }

    def answer(self, questions: Sequence[Question], max_new_tokens: int) -> list[str]:
        """What the model writes after each question, without white space around."""
        pictures = for_each_picture(questions, lambda some: [_picture(question) for question in some])
        chats = [
            [{"role": "user", "content": [{"type": "image", "image": picture}, _words(question)]}]
            for question, picture in zip(questions, pictures, strict=True)
        ]
        greedy = {"max_new_tokens": max_new_tokens, "do_sample": False, "num_beams": 1}
        found = self._pipeline(
            text=chats,
            batch_size=self._at_a_time or len(chats),
            return_full_text=False,
            generate_kwargs=greedy,
        )
        return [answers[0]["generated_text"].strip() for answers in found]

    def choose(self, questions: Sequence[Question]) -> list[list[float]]:
        """Not offered.

        Raises:
            ValueError: always.
        """
        raise ValueError(
            f"{self.name} is no unified model: likelihoods of answers are not offered for it; ask it by text"
        )


def _picture(question: Question) -> Image.Image:
    try:
        return Image.fromarray(decode_rgb(picture_bytes(question)))
    except BadImageError as error:
        raise undecodable(question, str(error)) from error


def _words(question: Question) -> dict[str, str]:
    return {"type": "text", "text": question.prompt}

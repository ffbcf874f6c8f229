"""Answers of an exported unified model, asked as it was trained on conversations."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from data_pipeline.shards.conversations import IMAGE_TAG, conversation_parts
from data_pipeline.streams.views import document_of
from dualtoken.generation.generators import generate_text
from dualtoken.generation.likelihood import OptionLikelihood, option_log_likelihoods
from dualtoken.generation.sampling import Sampling
from dualtoken.unified_model.sequence import Document, ImagePart, TextPart
from eval.inputs import load_models
from eval.model_files import fingerprint_of_files
from eval.results import versions
from eval.seeing import load_sight
from eval.templates import NO_TEMPLATE, default_template, template_named, with_images_first
from eval.understanding.benchmark import Question
from eval.understanding.pictures import for_each_picture, picture_bytes, undecodable

TEMPLATES_TO_ASK = ("qwen", "vicuna", "none")  # by `plain` a model would not see the question
DECODING_THREADS = 4
GREEDY = Sampling(temperature=0.0)


class UnifiedAnswerer:
    """An exported unified model with the visual tokenizer whose codes it speaks.

    A question is the user's turn of a conversation, the picture before it, laid out as in training.

    Raises:
        FileNotFoundError, DatasetError: as `load_models`.
        ValueError: the template is unknown; the vision tower is not the model's, or it has no use for one.
    """

    def __init__(
        self,
        model: Path,
        visual_tokenizer: Path,
        template: str | None = None,
        precision: str = "fp32",
        at_a_time: int | None = None,
        vision_tower: str | Path | None = None,
    ) -> None:
        template = template or default_template(model)
        if template not in TEMPLATES_TO_ASK:
            raise ValueError(f"template is {template!r}, expected one of {', '.join(TEMPLATES_TO_ASK)}")
        self.name = str(model)
        self._at_a_time = at_a_time  # prompts under way; the next takes the place of one that ended
        self.template = template_named(template)
        self.model, self.text_tokenizer, self.visual_tokenizer = load_models(
            model, visual_tokenizer, precision
        )
        self._sight = load_sight(self.model.config, self.text_tokenizer, self.visual_tokenizer, vision_tower)
        self._decode = self._sight.decoder(DECODING_THREADS)
        self.fingerprint = fingerprint_of_files(model)
        self.settings: dict[str, Any] = {
            "precision": precision,
            "template": template,
            "visual_tokenizer": self.visual_tokenizer.fingerprint(),
            "versions": versions(),
        }
        if self._sight.vision_tower is not None:
            self.settings["vision_tower"] = self._sight.vision_tower.fingerprint()

    def answer(self, questions: Sequence[Question], max_new_tokens: int) -> list[str]:
        """What the model writes up to the mark that ends a turn, without white space around."""
        return [text.strip() for text in self.write(self.prompts(questions), max_new_tokens)]

    def choose(self, questions: Sequence[Question]) -> list[list[float]]:
        """The log-likelihood (nats) of each option of each question, where the answer begins."""
        found = self.compare(self.prompts(questions), [question.options for question in questions])
        return [[option.log_likelihood for option in row] for row in found]

    def write(
        self, prompts: Sequence[Document], max_new_tokens: int, sampling: Sampling = GREEDY
    ) -> list[str]:
        """What the model writes after each prompt, up to the mark that ends a turn."""
        return generate_text(
            self.model,
            self.text_tokenizer,
            prompts,
            max_new_tokens,
            sampling.temperature,
            sampling.top_k,
            sampling.top_p,
            stop=self.template.assistant[1],
            batch_size=self._at_a_time,
        )

    def compare(
        self, prompts: Sequence[Document], options: Sequence[Sequence[str]]
    ) -> list[list[OptionLikelihood]]:
        """How likely each prompt's options are where the answer begins."""
        # Without a template an answer goes on in the line of the question, as captions do.
        space = " " if self.template is NO_TEMPLATE else ""
        texts = [[space + option for option in given] for given in options]
        return option_log_likelihoods(self.model, self.text_tokenizer, prompts, texts)

    def prompts(self, questions: Sequence[Question]) -> list[Document]:
        """Documents that end where the answer begins.

        Raises:
            BenchmarkError: a picture cannot be decoded; the message names question and file.
            ConversationError: a question holds an image tag; the message names it.
        """
        return [
            self.document(
                [{"from": "human", "value": with_images_first(question.prompt, 1, self.template)}],
                [image],
                f"question {question.question_id}",
            )
            for question, image in zip(questions, self.look(questions), strict=True)
        ]

    def document(self, turns: Sequence[dict[str, str]], images: Sequence[ImagePart], name: str) -> Document:
        """A conversation up to where the answer begins.

        Args:
            turns: as `conversation_parts` takes them, with an image tag for each picture.
            images: what the model reads of the pictures, in the order of their tags.
            name: what an error calls the conversation.

        Raises:
            ConversationError: the tags are not as many as the pictures, or it is not the model's turn.
        """
        parts = conversation_parts(turns, len(images), self.template, name=name, answered=False)
        return document_of(parts, images, name)

    def look(self, questions: Sequence[Question]) -> list[ImagePart]:
        """What the model reads of each question's picture; questions about the same one have it made once.

        Raises:
            BenchmarkError: a picture cannot be decoded; the message names question and file.
            ValueError: a vision tower is missing.
        """
        return for_each_picture(questions, self._look) if questions else []

    def _look(self, questions: Sequence[Question]) -> list[ImagePart]:
        decoded = self._decode([picture_bytes(question) for question in questions])
        if decoded.rejected:
            bad = decoded.rejected[0]
            raise undecodable(questions[bad.index], bad.reason)
        return self._sight.look(decoded)


def written_out(prompt: Document) -> str:
    """A prompt as LLaVA's scripts write it, with an image tag for the picture.

    The space that ends vicuna's `ASSISTANT: ` is left out: LLaVA counts it to the answer. The models here
    have read it before each answer in training, so it is part of what they are asked.
    """
    parts = (part.text if isinstance(part, TextPart) else IMAGE_TAG for part in prompt.parts)
    return "".join(parts).removesuffix(" ")

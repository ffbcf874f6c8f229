"""A conversation with a unified model: what was said and shown, laid out as in training."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from data_pipeline.shards.conversations import IMAGE_TAG, TEMPLATES, ChatTemplate, conversation_parts
from data_pipeline.streams.views import document_of
from dualtoken.generation.generators import generate_images, stream
from dualtoken.generation.sampling import Sampling
from dualtoken.unified_model.model import DualTokenForCausalLM
from dualtoken.unified_model.sequence import Document, ImagePart, tokenize_document
from eval.seeing import Sight
from eval.templates import with_images_first
from launchers.errors import UserError
from launchers.use import decode_files

MOST_IMAGES = 4  # in one answer


class Chat:
    """A conversation as the model was trained on them: turns with image tags, and the images.

    Args:
        model: the unified model.
        text_tokenizer: its text tokenizer.
        sight: what it reads of pictures.
        template: what stands around the turns.
        system: system prompt; None for the template's own.
        guidance_scale: of drawn pictures.
        sampling: of words and codes; the likeliest by default.
        max_new_tokens: of an answer's text.
        seed: of the first answer; the next ones count on from it.
    """

    def __init__(
        self,
        model: DualTokenForCausalLM,
        text_tokenizer: Any,
        sight: Sight,
        template: ChatTemplate = TEMPLATES["qwen"],
        system: str | None = None,
        guidance_scale: float = 1.0,
        sampling: Sampling | None = None,
        max_new_tokens: int = 256,
        seed: int = 0,
    ) -> None:
        self.model, self.text_tokenizer, self.sight = model, text_tokenizer, sight
        self.template, self.system = template, system
        self.guidance_scale, self.sampling, self.seed = guidance_scale, sampling or Sampling(0.0), seed
        self.max_new_tokens = max_new_tokens
        self.reset()

    def reset(self) -> None:
        """Forget everything said, shown and attached."""
        self.turns: list[dict[str, str]] = []
        self.images: list[ImagePart] = []  # in the order of the tags
        self.attached: list[ImagePart] = []

    def attach(self, path: Path) -> None:
        """Read a picture file for the next message."""
        self.attached += self.sight.look(decode_files([path], self.sight.decoder()))

    def ask(self, text: str) -> Document:
        """The conversation up to the place where the answer to `text` begins.

        Attached pictures stand in the places of its image tags; without tags before it, each on a line of
        its own, as in LLaVA's conversations.
        """
        return self._document([*self.turns, self._message(text)], [*self.images, *self.attached])

    def say(self, text: str, progress: Callable[[int, int], None] | None = None) -> Iterator[str | ImagePart]:
        """Send a message; yields the answer's text and images as they come, and keeps both turns at its end.

        Raises:
            ValueError: tags and attached pictures differ in number.
            UserError: the conversation is too long for the model, or it answered nothing.
        """
        document = self.ask(text)
        room = self._room(document)
        words = min(self.max_new_tokens, room)
        answer, written, drawn = "", "", []
        images = min(MOST_IMAGES, (room - words) // self._tokens_of_drawn())
        pieces = stream(
            self.model, self.text_tokenizer, document, words, images,
            self.guidance_scale, self.sampling, self.sampling, self._next_seed(),
            self.template.assistant[1], progress, self._see,
        )  # fmt: skip
        for piece in pieces:
            if isinstance(piece, ImagePart):
                answer, written = f"{answer}{_without_tags(written)}{IMAGE_TAG}", ""
                drawn.append(piece)
            else:
                written += piece
            yield piece
        answer += _without_tags(written)
        if not answer.strip():
            raise UserError(
                "the model answered nothing, so your message is forgotten; attached pictures stay"
            )
        self._keep(text, answer, drawn)

    def draw(self, text: str, progress: Callable[[int, int], None] | None = None) -> Tensor:
        """Send a message that is answered by an image alone: its codes [P, Q, D]; keeps both turns."""
        document = self.ask(text)
        if self._room(document) < self._tokens_of_drawn():
            raise self._too_long()
        chosen = self.sampling
        codes = generate_images(
            self.model, self.text_tokenizer, [document], self.guidance_scale,
            chosen.temperature, chosen.top_k, chosen.top_p, self._next_seed(), progress,
        )[0].cpu()  # fmt: skip
        self._keep(text, IMAGE_TAG, [self.sight.drawn(codes)])
        return codes

    def _message(self, text: str) -> dict[str, str]:
        tags, count = text.count(IMAGE_TAG), len(self.attached)
        if not tags and count:
            text = with_images_first(text, count, self.template)
        elif tags != count:
            raise ValueError(
                f"the text has {tags} {IMAGE_TAG} tags but {count} images; attach one for each by /image"
            )
        return {"from": "human", "value": text}

    def _document(self, turns: Sequence[dict[str, str]], images: Sequence[ImagePart]) -> Document:
        parts = conversation_parts(turns, len(images), self.template, self.system, answered=False)
        return document_of(parts, images, "chat")

    def _see(self, codes: Tensor) -> Any:
        return self.sight.drawn(codes).features

    def _tokens_of_drawn(self) -> int:
        """Tokens of a picture that was drawn, once the conversation goes on after it."""
        config = self.model.config
        features = config.image_layout.most_positions
        return config.positions_per_image + 2 + (1 + features if features else 0)

    def _keep(self, text: str, answer: str, drawn: Sequence[ImagePart]) -> None:
        self.turns += [self._message(text), {"from": "gpt", "value": answer}]
        self.images += [*self.attached, *drawn]
        self.attached = []

    def _next_seed(self) -> int:
        return self.seed + len(self.turns) // 2

    def _room(self, document: Document) -> int:
        """Tokens left after the document in what the decoder can take."""
        special, layout = self.model.config.special, self.model.config.image_layout
        length = len(tokenize_document(document, self.text_tokenizer, special, end=False, layout=layout))
        room = self.model.decoder_config.max_position_embeddings - length
        if room < 1:
            raise self._too_long()
        return room

    def _too_long(self) -> UserError:
        most = self.model.decoder_config.max_position_embeddings
        return UserError(f"the conversation is too long for the model's {most} tokens; /reset forgets it")


def _without_tags(text: str) -> str:
    """A tag that the model spelled out is no image."""
    return text.replace(IMAGE_TAG, "")

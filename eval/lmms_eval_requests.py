"""What lmms-eval asks, read: how answers are to be written, and messages as turns of a conversation."""

from __future__ import annotations

import io
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image, ImageOps

from data_pipeline.shards.conversations import IMAGE_TAG, ChatTemplate
from dualtoken.generation.sampling import Sampling
from eval.templates import with_images_first
from eval.understanding.unified import GREEDY

logger = logging.getLogger(__name__)

MAX_NEW_TOKENS = 128  # where a task does not say
DELIMITER = "\n\n"  # what lmms-eval puts under `until` where a task does not say
ONLY_ONE = ("num_beams", "num_return_sequences", "n", "best_of", "repetition_penalty", "length_penalty")
HONOURED = ("max_new_tokens", "max_gen_toks", "do_sample", "temperature", "top_k", "top_p", "until")
PICTURE_ENDINGS = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tiff")


@dataclass(frozen=True)
class Generation:
    """How a task wants its answers written."""

    max_new_tokens: int = MAX_NEW_TOKENS
    sampling: Sampling = GREEDY
    until: tuple[str, ...] = ()

    @classmethod
    def of(cls, wanted: Mapping[str, Any], task: str) -> Generation:
        """Read a task's `generation_kwargs`; what has no meaning here is logged.

        Raises:
            ValueError: something would change answers and is not offered; the message names the task.
        """
        for name in ONLY_ONE:
            if wanted.get(name) not in (None, 1):
                raise ValueError(
                    f"task {task}: {name} is {wanted[name]!r}, expected 1: others are not offered; "
                    f"change it with --gen_kwargs {name}=1"
                )
        do_sample, temperature = wanted.get("do_sample"), wanted.get("temperature")
        if do_sample and temperature is None:
            raise ValueError(
                f"task {task}: do_sample without a temperature; give one with --gen_kwargs temperature=1.0"
            )
        sampling = GREEDY
        if temperature and do_sample in (None, True):
            top_k, top_p = wanted.get("top_k") or 0, wanted.get("top_p")
            sampling = Sampling(temperature, max(top_k, 0), 1.0 if top_p is None else top_p)
        ignored = {name: value for name, value in wanted.items() if name not in (*HONOURED, *ONLY_ONE)}
        if temperature and sampling is GREEDY:  # as in transformers, do_sample decides
            ignored["temperature"] = temperature
        given = wanted.get("until") or ()
        until = [given] if isinstance(given, str) else list(given)
        if DELIMITER in until:  # it would cut long answers; lmms-eval's own models leave it out too
            until.remove(DELIMITER)
            ignored["until"] = DELIMITER
        for name, value in ignored.items():
            logger.warning("task %s: %s %r is not used", task, name, value)
        tokens = wanted.get("max_new_tokens") or wanted.get("max_gen_toks") or MAX_NEW_TOKENS
        return cls(int(tokens), sampling, tuple(filter(None, until)))

    def cut(self, text: str) -> str:
        """The answer before the first of the strings that end it, without white space around."""
        ends = [place for end in self.until if (place := text.find(end)) >= 0]
        return text[: min(ends, default=None)].strip()


@dataclass(frozen=True)
class Conversation:
    """A conversation up to where the model is to answer."""

    name: str
    turns: list[dict[str, str]]  # with an image tag for each picture
    pictures: list[Any]  # of PIL, or paths

    @classmethod
    def of(cls, messages: Sequence[Mapping[str, Any]], template: ChatTemplate, name: str) -> Conversation:
        """Read messages of lmms-eval, whose contents are lists of texts and pictures.

        Pictures before the text stand as in LLaVA's data, others just where they are. A text with image tags
        says itself where the pictures of its message stand.

        Raises:
            ValueError: there is something else in a message, such as a video.
        """
        turns, pictures = [], []
        for message in messages:
            content = message["content"]
            if other := {part["type"] for part in content} - {"text", "image"}:
                raise ValueError(
                    f"{name} has {' and '.join(sorted(other))}; the model reads text and pictures alone, "
                    "leave the task out"
                )
            pictures += [part["url"] for part in content if part["type"] == "image"]
            text = "".join(part.get("text", "") for part in content)
            if IMAGE_TAG not in text:
                kinds = [part["type"] for part in content]
                first = kinds.index("text") if "text" in kinds else len(kinds)
                rest = "".join(part.get("text", IMAGE_TAG) for part in content[first:])
                text = with_images_first(rest, first, template)
            turns.append({"from": message["role"], "value": text})
        return cls(name, turns, pictures)

    @classmethod
    def of_text(
        cls, text: str, pictures: Sequence[Any] | None, template: ChatTemplate, name: str
    ) -> Conversation:
        """A question of lmms-eval's simple flavour: the pictures, then the text."""
        content = [{"type": _kind(picture), "url": picture} for picture in pictures or ()]
        messages = [{"role": "user", "content": [*content, {"type": "text", "text": text}]}]
        return cls.of(messages, template, name)


def _kind(visual: Any) -> str:
    """What lmms-eval calls a visual: pictures of PIL or their paths are images."""
    is_picture = isinstance(visual, Image.Image) or str(visual).lower().endswith(PICTURE_ENDINGS)
    return "image" if is_picture else "video or sound"


def picture_file(picture: Any) -> bytes:
    """The bytes of a picture's file; one of PIL is written as PNG, so that no pixel changes."""
    if not isinstance(picture, Image.Image):
        return Path(picture).read_bytes()
    upright = ImageOps.exif_transpose(picture)
    file = io.BytesIO()
    (upright.convert("RGB") if upright.mode in ("CMYK", "YCbCr", "HSV", "LAB", "F") else upright).save(
        file, "PNG", compress_level=1
    )
    return file.getvalue()

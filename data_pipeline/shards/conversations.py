"""LLaVA conversations and interleaved documents (OBELICS, MMC4) -> ordered parts of text and images.

Pure functions. The result is what a dual-code shard keeps under `parts`: `{"text": ..., "loss": ...}`, with
`"markup": true` where the text is marks of the chat template and not what somebody wrote, and
`{"image": i, "loss": ...}`, where `loss` says that the model learns to generate the image. Texts are copied
as they are: a `<|im_end|>` that a user typed stays ordinary characters.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

IMAGE_TAG = "<image>"
_USER, _ASSISTANT, _SYSTEM = "user", "assistant", "system"
_ROLES = {
    "human": _USER,
    "user": _USER,
    "gpt": _ASSISTANT,
    "assistant": _ASSISTANT,
    "model": _ASSISTANT,
    "system": _SYSTEM,
}

Part = dict[str, Any]


class ConversationError(ValueError):
    """A conversation or document that does not fit its format or its images; the message is one line."""


@dataclass(frozen=True)
class ChatTemplate:
    """What stands around the turns of a conversation; `{}` in `system` takes the system prompt."""

    system: str
    default_system: str
    user: tuple[str, str]
    """Before and after a user's turn."""
    assistant: tuple[str, str]
    """Before an assistant's turn, not learned, and after it, learned: turns have to be ended."""
    after_assistant: str = ""
    """After the end of an assistant's turn, not learned."""
    user_turns: bool = True
    """Whether the words of the user are kept; without them their images are."""


TEMPLATES = {
    # Qwen's ChatML.
    "qwen": ChatTemplate(
        system="<|im_start|>system\n{}<|im_end|>\n",
        default_system="You are a helpful assistant.",
        user=("<|im_start|>user\n", "<|im_end|>\n"),
        assistant=("<|im_start|>assistant\n", "<|im_end|>"),
        after_assistant="\n",
    ),
    # LLaVA-1.5 with Vicuna (`conv_vicuna_v1`); `</s>` is one token in LLaMA's text tokenizer only.
    "vicuna": ChatTemplate(
        system="{} ",
        default_system="A chat between a curious user and an artificial intelligence assistant. "
        "The assistant gives helpful, detailed, and polite answers to the user's questions.",
        user=("USER: ", " "),
        assistant=("ASSISTANT: ", "</s>"),
    ),
    # LLaVA's first stage: the pictures, then the caption (`conv_llava_plain`).
    "plain": ChatTemplate(
        system="", default_system="", user=("", ""), assistant=("", "\n"), user_turns=False
    ),
}


class _Parts:
    """Collects parts, joining neighbouring texts of one kind and numbering images in their order."""

    def __init__(self) -> None:
        self.parts: list[Part] = []
        self.images = 0

    def text(self, text: str, loss: bool, markup: bool = False) -> None:
        if not text:
            return
        last = self.parts[-1] if self.parts else {}
        if "text" in last and (last["loss"], last.get("markup", False)) == (loss, markup):
            last["text"] += text
            return
        part: Part = {"text": text, "loss": loss}
        if markup:
            part["markup"] = True
        self.parts.append(part)

    def image(self, loss: bool, index: int | None = None) -> None:
        self.parts.append({"image": self.images if index is None else index, "loss": loss})
        self.images += 1


def _turns(conversation: Any, name: str, answered: bool) -> list[tuple[str, list[str]]]:
    """Check a conversation's form and return per turn its role and its text, cut where images stand."""
    if not isinstance(conversation, list) or not conversation:
        raise ConversationError(f"{name}: conversations are {conversation!r:.60}, expected a list of turns")
    turns: list[tuple[str, list[str]]] = []
    for number, turn in enumerate(conversation, start=1):
        said = turn if isinstance(turn, dict) else {}
        role, text = said.get("from", said.get("role")), said.get("value", said.get("content"))
        if not isinstance(role, str) or role not in _ROLES or not isinstance(text, str):
            raise ConversationError(
                f'{name}: turn {number} is {turn!r:.80}, expected {{"from": "human" or "gpt", "value": text}}'
            )
        turns.append((_ROLES[role], [text] if said.get("words") is True else text.split(IMAGE_TAG)))
    spoken = turns[1:] if turns[0][0] == _SYSTEM else turns
    for number, (role, stretches) in enumerate(spoken, start=1):
        expected = _USER if number % 2 else _ASSISTANT
        if role != expected:
            raise ConversationError(f"{name}: turn {number} is the {role}'s, expected the {expected}'s")
        if role == _ASSISTANT and not IMAGE_TAG.join(stretches).strip():
            raise ConversationError(f"{name}: turn {number}, an answer, is empty")
    if answered and (not spoken or spoken[-1][0] != _ASSISTANT):
        raise ConversationError(
            f"{name}: the conversation ends without an answer, so there is nothing to learn"
        )
    if not answered and (not spoken or spoken[-1][0] != _USER):
        raise ConversationError(
            f"{name}: the conversation ends without a question, so there is no answer due"
        )
    return turns


def conversation_parts(
    conversation: Sequence[dict[str, Any]],
    num_images: int,
    template: str | ChatTemplate = "qwen",
    system: str | None = None,
    images_first: bool = False,
    name: str = "conversation",
    answered: bool = True,
) -> list[Part]:
    """Turn a LLaVA conversation into parts.

    The answers and the mark that ends them are learned, everything else is read. The n-th `<image>` tag
    stands for the n-th image; one in a user's turn is read, one in an answer is generated.

    Args:
        conversation: turns `{"from": "human" | "gpt" | "system", "value": text}` (`role` and `content` too);
            with `"words": true` an `<image>` in the text is what somebody wrote and stands for no image.
        num_images: how many images the sample has.
        template: `qwen`, `vicuna` (v1) or `plain` (LLaVA's captions: the user's words are left out), or one
            of your own.
        system: system prompt; None for the template's own, "" for none. A system turn goes before both.
        images_first: move the images of a turn to its start, one line each, as LLaVA-1.5 does.
        name: what error messages call the conversation, its key for example.
        answered: False for a conversation that ends with the user's turn: the parts end where the answer
            begins, for a model to write it.

    Raises:
        ConversationError: turns are malformed or do not alternate, or tags and images differ in number.
        ValueError: the template is unknown.
    """
    if isinstance(template, str) and template not in TEMPLATES:
        raise ValueError(f"template is {template!r}, expected one of {', '.join(TEMPLATES)}")
    style = TEMPLATES[template] if isinstance(template, str) else template
    turns = _turns(conversation, name, answered)
    tags = sum(len(stretches) - 1 for _, stretches in turns)
    if tags != num_images:
        raise ConversationError(
            f"{name}: {tags} {IMAGE_TAG} tags for {num_images} images; every image needs one tag in the text"
        )
    parts = _Parts()
    prompt, *more = (style.default_system if system is None else system).split(IMAGE_TAG)
    if turns[0][0] == _SYSTEM:
        prompt, *more = turns.pop(0)[1]
    if more:
        raise ConversationError(f"{name}: an {IMAGE_TAG} tag in the system turn")
    if style.system and prompt:
        before, after = style.system.split("{}")
        parts.text(before, loss=False, markup=True)
        parts.text(prompt, loss=False)
        parts.text(after, loss=False, markup=True)
    for role, stretches in turns:
        learned = role == _ASSISTANT
        before, after = style.assistant if learned else style.user
        parts.text(before, loss=False, markup=True)
        _add_text_with_images(parts, stretches, learned, images_first, keep_text=learned or style.user_turns)
        parts.text(after, loss=learned, markup=True)
        if learned:
            parts.text(style.after_assistant, loss=False, markup=True)
    if not answered:
        parts.text(style.assistant[0], loss=False, markup=True)
    return parts.parts


def _add_text_with_images(
    parts: _Parts, stretches: list[str], loss: bool, images_first: bool, keep_text: bool
) -> None:
    if images_first and len(stretches) > 1:
        words = " ".join(stretch.strip() for stretch in stretches).strip()
        stretches = ["", *["\n"] * (len(stretches) - 2), f"\n{words}"]
    for number, stretch in enumerate(stretches):
        if number:
            parts.image(loss)
        if keep_text:
            parts.text(stretch, loss)


def interleaved_parts(
    document: Any, num_images: int, generate_images: bool = False, name: str = "document"
) -> list[Part]:
    """Turn an interleaved document into parts; its texts are learned.

    Three forms are understood: a list of `{"text": ...}` and `{"image": i}` (also under `parts`, and with
    their own `loss`); OBELICS, `texts` and `images` of one length, where one of the two, or both, is null;
    MMC4, sentences `text_list` and `image_info` with the `matched_text_index` of the sentence that an image
    stands before.

    Args:
        document: the decoded json.
        num_images: how many images the sample has, in the order of the document (MMC4: of `image_info`).
        generate_images: learn to generate the images too.
        name: what error messages call the document.

    Raises:
        ConversationError: the form is not one of these, or it names other images than there are.
    """
    if isinstance(document, dict) and isinstance(document.get("parts"), list):
        document = document["parts"]
    if isinstance(document, list):
        parts = _own_parts(document, generate_images, name)
    elif isinstance(document, dict) and {"texts", "images"} <= document.keys():
        parts = _obelics_parts(document, generate_images, name)
    elif isinstance(document, dict) and {"text_list", "image_info"} <= document.keys():
        parts = _mmc4_parts(document, generate_images, name)
    else:
        keys = sorted(document) if isinstance(document, dict) else type(document).__name__
        raise ConversationError(
            f"{name}: found {keys}, expected a list of parts, `texts` and `images`, "
            "or `text_list` and `image_info`"
        )
    named = sorted(part["image"] for part in parts if "image" in part)
    if named != list(range(num_images)):
        raise ConversationError(
            f"{name}: names the images {named}, but there are {num_images}, counted from 0"
        )
    if not parts:
        raise ConversationError(f"{name}: the document is empty")
    return parts


def _own_parts(document: list[Any], generate_images: bool, name: str) -> list[Part]:
    parts = _Parts()
    for number, part in enumerate(document, start=1):
        fields = part if isinstance(part, dict) else {}
        text, image = fields.get("text"), fields.get("image")
        loss = fields.get("loss", generate_images if text is None else True)
        if not isinstance(loss, bool) or (text is None) == (image is None):
            raise ConversationError(
                f'{name}: part {number} is {part!r:.80}, expected {{"text"}} or {{"image"}}'
            )
        if isinstance(text, str):
            parts.text(text, loss, fields.get("markup", False))
        elif isinstance(image, int) and not isinstance(image, bool):
            parts.image(loss, image)
        else:
            raise ConversationError(
                f"{name}: part {number} is {part!r:.80}, expected a text or an image's number"
            )
    return parts.parts


def _obelics_parts(document: dict[str, Any], generate_images: bool, name: str) -> list[Part]:
    texts, images = document["texts"], document["images"]
    if not isinstance(texts, list) or not isinstance(images, list) or len(texts) != len(images):
        raise ConversationError(f"{name}: `texts` and `images` must be lists of one length")
    parts = _Parts()
    for number, (text, image) in enumerate(zip(texts, images), start=1):
        if text is None and image is None:  # a row of nothing
            continue
        if (text is not None and image is not None) or not isinstance(text, str | None):
            raise ConversationError(f"{name}: entry {number} must be either a text or an image")
        if text is None:
            parts.image(generate_images)
        else:
            parts.text(text, loss=True)
    return parts.parts


def _mmc4_parts(document: dict[str, Any], generate_images: bool, name: str) -> list[Part]:
    sentences, infos = document["text_list"], document["image_info"]
    if not isinstance(sentences, list) or not all(isinstance(sentence, str) for sentence in sentences):
        raise ConversationError(f"{name}: `text_list` must be a list of sentences")
    before: dict[int, list[int]] = {}
    for image, info in enumerate(infos if isinstance(infos, list) else []):
        at = info.get("matched_text_index") if isinstance(info, dict) else None
        if not isinstance(at, int) or not 0 <= at < len(sentences):
            raise ConversationError(
                f"{name}: image {image} has matched_text_index {at}, expected 0 to {len(sentences) - 1}"
            )
        before.setdefault(at, []).append(image)
    parts = _Parts()
    for number, sentence in enumerate(sentences):
        for image in before.get(number, []):
            parts.image(generate_images, image)
        parts.text(sentence if number == 0 else f" {sentence}", loss=True)
    return parts.parts

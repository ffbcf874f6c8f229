"""`dualtoken chat`: a conversation with a unified model, line by line, in a terminal or through a pipe."""

import contextlib
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from data_pipeline.shards.conversations import IMAGE_TAG, ChatTemplate
from dualtoken.generation.sampling import Sampling
from dualtoken.unified_model.sequence import ImagePart
from eval.inputs import load_models, to_picture
from eval.seeing import load_sight
from eval.templates import default_template, template_named, views_learned
from launchers.conversation import Chat
from launchers.errors import UserError
from launchers.use import drawing_progress, free_names

HELP = """\
/image PATH    attach a picture to your next message; <image> in the message marks its place
/draw PROMPT   have a picture drawn for the prompt and for what was said and shown before (editing)
/reset         forget the conversation
/help          this list
/quit          end (Ctrl-D too); Ctrl-C stops an answer, which is then forgotten"""


def choose_template(wanted: str | None, model: Path) -> tuple[ChatTemplate, list[str]]:
    """The chat template to use, and what to say about it."""
    views = views_learned(model)
    notes = []
    if views is not None and "document" not in views:
        notes.append(
            f"note: this model was never trained on conversations, but on {', '.join(sorted(views))}: "
            "expect it to name a picture after `/image PATH` and `English:`, and to /draw; /reset in between"
        )
    if wanted == "plain":
        notes.append("note: by the template plain the model sees your pictures, not your words")
    return template_named(wanted or default_template(model)), notes


def chat(
    images: Sequence[Path],
    model: Path,
    visual_tokenizer: Path,
    template: str | None,
    system: str | None,
    output: Path,
    guidance_scale: float,
    sampling: dict,
    seed: int,
    max_new_tokens: int,
    vision_tower: str | None = None,
    precision: str = "fp32",
) -> None:
    """Talk until the input ends; pictures go to `output`, notes and mistakes to standard error.

    Raises:
        UserError, ValueError, OSError: a model or one of `images` cannot be read.
    """
    chosen = Sampling(**sampling)
    if sys.stdin is None:
        raise UserError("standard input is closed; type messages, or send them through a pipe")
    unified, text_tokenizer, tokenizer = load_models(model, visual_tokenizer, precision)
    sight = load_sight(unified.config, text_tokenizer, tokenizer, vision_tower)
    style, notes = choose_template(template, model)
    if system and not style.system:
        raise UserError("this chat template has no place for a system prompt: leave --system out")
    talk = Chat(unified, text_tokenizer, sight, style, system, guidance_scale, chosen, max_new_tokens, seed)
    for path in images:
        talk.attach(path)
    if sys.stdin.isatty():
        notes.append("/help lists the commands, Ctrl-D ends")
    for note in notes:
        _note(note)
    for line in _lines():
        try:
            if not _obey(talk, line, output):
                return
        except (UserError, ValueError, OSError) as error:
            _note("error: " + " ".join(str(error).split()))
        except KeyboardInterrupt:
            _note("\nstopped; this message and its answer are forgotten")


def _lines() -> Iterator[str]:
    """What the user types, until the input ends."""
    prompt = "> " if sys.stdin.isatty() else ""
    if prompt:
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401  # gives `input` its editing and history
    while True:
        try:
            line = input(prompt)
        except EOFError:
            return
        except KeyboardInterrupt:
            _note("\n/quit or Ctrl-D ends")
            continue
        yield line


def _obey(talk: Chat, line: str, output: Path) -> bool:
    """Do what a line asks for; False if that is to end."""
    command, _, rest = line.strip().partition(" ")
    rest = rest.strip()
    if command == "/quit":
        return False
    if command == "/help":
        _show(f"{HELP}\n")
    elif command == "/reset":
        talk.reset()
        _note("forgotten")
    elif command == "/image":
        if not rest:
            raise UserError("/image needs the path of a picture file")
        talk.attach(Path(rest.strip("\"'")).expanduser())
        _note(f"attached to your next message: {rest}")
    elif command == "/draw":
        _save(talk.draw(rest, drawing_progress()), rest, talk, output)
    elif command.startswith("/"):
        raise UserError(f"unknown command {command}; /help lists them")
    elif command or talk.attached:
        _answer(talk, line, output)
    return True


def _answer(talk: Chat, text: str, output: Path) -> None:
    """Show an answer as it is written; pictures on lines of their own."""
    fresh = True  # nothing on the line yet
    try:
        for piece in talk.say(text, drawing_progress()):
            if isinstance(piece, ImagePart):
                _show("" if fresh else "\n")
                fresh = True
                _save(piece.codes, text, talk, output)
            else:
                _show(piece)
                fresh = piece.endswith("\n")
    finally:
        _show("" if fresh else "\n")


def _save(codes: Any, name: str, talk: Chat, output: Path) -> None:
    tokenizer = talk.sight.visual_tokenizer
    picture = tokenizer.decode(codes[None].to(tokenizer.device))[0]
    (target,) = free_names(output, [name.replace(IMAGE_TAG, " ")])
    to_picture(picture.float().cpu()).save(target)
    _show(f"[picture: {target}]\n")


def _show(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


def _note(text: str) -> None:
    sys.stderr.write(f"{text}\n")
    sys.stderr.flush()

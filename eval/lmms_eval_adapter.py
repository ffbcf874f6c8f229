"""The unified model for lmms-eval: `lmms-eval --model dualtoken --model_args pretrained=DIR,...`.

lmms-eval finds `manifests` by the entry point `lmms_eval.models`. Its chat flavour asks what tasks generate
from messages; choosing by likelihood and several rounds it knows in its simple flavour only
(`--force_simple`). Documents are those of `eval.understanding`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from importlib.util import find_spec
from itertools import groupby
from pathlib import Path
from typing import Any

import torch

from dualtoken.unified_model.sequence import Document
from eval.inputs import default_device
from eval.lmms_eval_requests import Conversation, Generation, picture_file
from eval.progress import counted
from eval.understanding.benchmark import Question
from eval.understanding.models import load_answerer
from eval.understanding.unified import UnifiedAnswerer

if find_spec("lmms_eval"):
    from lmms_eval.api.instance import GenerationResult
    from lmms_eval.api.model import lmms
    from loguru import logger
else:
    lmms = None


def manifests() -> list[Any]:
    """What lmms-eval registers: the model `dualtoken` in both of its flavours."""
    # Not above: importing its models makes lmms-eval ask for this.
    from lmms_eval.models.registry_v2 import ModelManifest

    chat, simple = (f"{__name__}.{flavour.__name__}" for flavour in (DualTokenChat, DualTokenSimple))
    return [ModelManifest("dualtoken", chat_class_path=chat, simple_class_path=simple)]


class DualTokenChat(lmms or object):  # type: ignore[misc]
    """An exported unified model, asked by messages.

    With several processes (`accelerate launch`) each has the model on a device of its own and its share of
    the requests, as lmms-eval deals them.

    Args:
        pretrained: folder of the unified model.
        visual_tokenizer: folder of the one that it was trained with.
        chat_template: qwen, vicuna or none; as `dualtoken chat` chooses by default.
        precision: fp32 or bf16.
        batch_size: requests at a time.
        max_batch_size: belongs to an automatic batch size, which is not offered.
        device: cuda or cpu, or one of several GPUs; by default the GPU if there is one.
        vision_tower: SigLIP of a model that was trained on stored features.

    Raises:
        ImportError: lmms-eval is not installed.
        FileNotFoundError, ValueError: as `load_answerer`, or an argument is not offered.
    """

    is_simple = False

    def __init__(
        self,
        pretrained: str,
        visual_tokenizer: str | None = None,
        chat_template: str | None = None,
        precision: str = "fp32",
        batch_size: int | str = 1,
        max_batch_size: int | None = None,
        device: str | None = None,
        vision_tower: str | None = None,
    ) -> None:
        if lmms is None:
            raise ImportError("lmms-eval is not installed; pip install 'dualtoken[lmms-eval]'")
        super().__init__()
        if not str(batch_size).isdecimal() or int(batch_size) < 1 or max_batch_size is not None:
            raise ValueError(
                f"batch_size is {batch_size!r}, max_batch_size {max_batch_size!r}; expected a number from 1, "
                "and no maximum: an automatic batch size is not offered"
            )
        from accelerate import Accelerator

        self.accelerator = Accelerator()  # puts each of several processes on a GPU of its own
        self._rank, self._world_size = self.accelerator.process_index, self.accelerator.num_processes
        _choose_device(device, alone=self._world_size == 1)
        self.batch_size, self.device = int(batch_size), default_device()
        answerer = load_answerer(
            pretrained,
            Path(visual_tokenizer) if visual_tokenizer else None,
            chat_template,
            precision,
            vision_tower=vision_tower,
        )
        if not isinstance(answerer, UnifiedAnswerer):
            raise ValueError(f"{pretrained} is no unified model; lmms-eval has models of its own for others")
        self.answerer: UnifiedAnswerer | None = answerer

    def clean(self) -> None:
        """Let go of the model: lmms-eval calls this after its last request, before judges are loaded."""
        self.answerer = None
        super().clean()

    def generate_until(self, requests: Sequence[Any]) -> list[str]:
        """What the model writes for each request, up to the mark that ends a turn or the task's `until`."""
        answers: list[str] = []
        with self._progress(len(requests), "answers") as advance:
            for (task, wanted), same in groupby(requests, key=self._task_and_wishes):
                generation = Generation.of(wanted, task)
                for batch in self._batches(list(same)):
                    answers += self._write([self._conversation(request) for request in batch], generation)
                    advance(len(batch))
        return answers

    def loglikelihood(self, requests: Sequence[Any]) -> list[Any]:
        """How likely continuations of questions are: a loss, and whether each token is the likeliest.

        The loss is the negative log-likelihood in nats, summed over tokens: lmms-eval takes the option with
        the least (its `multiple_choice` and its own models; not its `perplexity`). White space before an
        option is left out, since an answer begins where the template has put it. A question's options are
        scored after one reading of it.
        """
        found: list[Any] = []
        with self._progress(len(requests), "options") as advance:
            questions = [list(same) for _, same in groupby(requests, key=_question)]
            for batch in self._batches(questions):
                prompts = self._prompts([self._conversation(options[0]) for options in batch])
                texts = [[self._continuation(request) for request in options] for options in batch]
                for option in (option for row in self.answerer.compare(prompts, texts) for option in row):
                    found.append(_whole((-option.log_likelihood, option.most_likely)))
                advance(sum(map(len, batch)))
        return found

    def generate_until_multi_round(self, requests: Sequence[Any]) -> list[Any]:
        """All answers to each request, whose task makes the next question of those before it.

        Each round is a conversation of its own, as with lmms-eval's models: the task repeats what is to be
        known of earlier ones.
        """
        found: list[Any] = []
        with self._progress(len(requests), "conversations") as advance:
            for request in requests:
                text, wanted, doc_to_visual, next_round, doc_id, task, split = request.args
                generation, document = Generation.of(wanted, task), self.task_dict[task][split][doc_id]
                pictures, said, info, done, rounds = doc_to_visual(document), [], None, False, 0
                while not done:
                    said = [*said, *self._write([self._asked(text, pictures, task, doc_id)], generation)]
                    rounds += 1
                    pictures, text, done, said, info = next_round(
                        document, previous_output=said, round_idx=rounds, previous_round_info=info
                    )
                found.append(_whole(tuple(said)))
                advance(1)
        return found

    def _task_and_wishes(self, request: Any) -> tuple[str, Mapping[str, Any]]:
        return request.args[4], next(value for value in request.args if isinstance(value, dict))

    def _conversation(self, request: Any) -> Conversation:
        _, doc_to_messages, _, doc_id, task, split = request.args
        messages = doc_to_messages(self.task_dict[task][split][doc_id])
        return Conversation.of(messages, self.answerer.template, f"task {task}, document {doc_id}")

    def _asked(self, text: str, pictures: Sequence[Any] | None, task: str, doc_id: Any) -> Conversation:
        return Conversation.of_text(text, pictures, self.answerer.template, f"task {task}, document {doc_id}")

    def _continuation(self, request: Any) -> str:
        option = request.args[1]
        if callable(option):  # tasks of the type `loglikelihood` have the answer's function there
            doc_id, task, split = request.args[3:]
            option = option(self.task_dict[task][split][doc_id])
        return str(option).lstrip()

    def _write(self, conversations: Sequence[Conversation], generation: Generation) -> list[str]:
        prompts = self._prompts(conversations)
        texts = self.answerer.write(prompts, generation.max_new_tokens, generation.sampling)
        return [generation.cut(text) for text in texts]

    def _prompts(self, conversations: Sequence[Conversation]) -> list[Document]:
        pictures = [
            Question(one.name, one.name, "", picture_file(picture))
            for one in conversations
            for picture in one.pictures
        ]
        images = iter(self.answerer.look(pictures))
        return [
            self.answerer.document(one.turns, [next(images) for _ in one.pictures], one.name)
            for one in conversations
        ]

    def _batches(self, items: Sequence[Any]) -> Iterator[Sequence[Any]]:
        for start in range(0, len(items), self.batch_size):
            yield items[start : start + self.batch_size]

    def _progress(self, count: int, what: str) -> Any:
        return counted(count, what, logger.info, bar=None if self._rank == 0 else False)


class DualTokenSimple(DualTokenChat):
    """The same model asked by a text and its pictures: for `--force_simple`."""

    is_simple = True

    def _conversation(self, request: Any) -> Conversation:
        if len(request.args) == 2:  # an option without its question
            raise ValueError(
                "the metric acc_mutual_info wants log-likelihoods where acc wants losses, which lmms-eval "
                "does not tell apart; leave acc_mutual_info out of the task"
            )
        text, _, doc_to_visual, doc_id, task, split = request.args
        return self._asked(text, doc_to_visual(self.task_dict[task][split][doc_id]), task, doc_id)


def _question(request: Any) -> tuple[Any, ...]:
    """What options of one question have in common: its text, and task, split and number of its document."""
    return (request.args[0], *request.args[3:])


def _whole(answer: tuple[Any, ...]) -> Any:
    """An answer that is no text, kept as it is: bare tuples lmms-eval 0.7 turns into their text."""
    return GenerationResult(answer)


def _choose_device(device: str | None, alone: bool) -> None:
    """Make `default_device` the one that is asked for.

    Raises:
        ValueError: it is not there, or it is the CPU where there is a GPU.
    """
    if device is None:
        return
    wanted = torch.device(device)
    if wanted.type != default_device().type:
        raise ValueError(
            f"device is {device!r}, but models go to {default_device().type} here; "
            "CUDA_VISIBLE_DEVICES= hides GPUs, which leaves the CPU"
        )
    if wanted.type == "cuda" and wanted.index is not None and alone:
        torch.cuda.set_device(wanted)

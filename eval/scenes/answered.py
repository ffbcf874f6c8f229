"""Questions about scenes: answers by kind, POPE's yes and no, options by letter and by likelihood."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase

from data_pipeline.shards.conversations import IMAGE_TAG, TEMPLATES, conversation_parts
from data_pipeline.sources.scenes.parts import Scene
from data_pipeline.sources.scenes.questions import (
    BY_LETTER,
    IN_A_WORD,
    KINDS,
    LETTERS,
    AbsentThings,
    facts,
    is_there,
    lettered,
)
from data_pipeline.streams.views import document_of
from dualtoken.generation.generators import generate_text
from dualtoken.generation.likelihood import option_log_likelihoods
from dualtoken.unified_model.model import DualTokenForCausalLM
from dualtoken.unified_model.sequence import Document, ImagePart
from eval.scenes.samples import SceneSamples

TEMPLATE = "qwen"
MOST_TOKENS = 8
AT_A_TIME = 32
YES_NO, CHOICE = "yes/no", "choice"


@dataclass(frozen=True)
class Asked:
    """A question about one scene and what is right."""

    scene: int  # place among the samples
    kind: str  # of `KINDS`, or `yes/no` or `choice`
    text: str
    answer: str
    category: str = ""  # how an absent thing was chosen
    options: tuple[str, ...] = ()
    possible: int = 2  # how many different answers there are


def questions_about(scenes: Sequence[Scene], trained: Sequence[Scene], draw: random.Random) -> list[Asked]:
    """What is asked of each scene: each kind it has, one thing that is there and one that is not, options."""
    absent = AbsentThings(trained)
    asked = []
    for place, scene in enumerate(scenes):
        for kind in KINDS:
            if found := facts(scene, [kind]):
                fact = draw.choice(found)
                possible = 1 + len(fact.others)
                asked.append(
                    Asked(place, kind, f"{fact.question}{IN_A_WORD}", fact.answer, possible=possible)
                )
        category = AbsentThings.CATEGORIES[place % len(AbsentThings.CATEGORIES)]
        there = draw.choice(scene.items).thing
        for thing, answer in ((there, "yes"), (absent.draw(scene, category, draw), "no")):
            asked.append(Asked(place, YES_NO, f"{is_there(thing)}{IN_A_WORD}", answer, category))
        fact = draw.choice(facts(scene))
        options, right = fact.options(draw)
        text = f"{lettered(fact.question, options)}{BY_LETTER}"
        asked.append(
            Asked(place, CHOICE, text, LETTERS[right], options=tuple(options), possible=len(options))
        )
    return asked


def prompt_document(image: ImagePart, question: str) -> Document:
    """A question about an image up to where the answer begins."""
    turns = [{"from": "human", "value": f"{IMAGE_TAG}\n{question}"}]
    return document_of(conversation_parts(turns, 1, TEMPLATE, answered=False), [image], "question")


def measure_answers(
    model: DualTokenForCausalLM,
    text_tokenizer: PreTrainedTokenizerBase,
    samples: SceneSamples,
    trained: Sequence[Scene],
    seed: int,
) -> dict[str, Any]:
    """Ask about every scene; an answer counts if it is the right word, whatever its case.

    Args:
        model: the unified model.
        text_tokenizer: its text tokenizer.
        samples: scenes to ask about.
        trained: scenes of the training set, whose statistics choose absent things as in POPE.
        seed: of the questions.
    """
    asked = questions_about(samples.scenes, trained, random.Random(seed))
    prompts = [prompt_document(samples.images[one.scene], one.text) for one in asked]
    # Long and short prompts apart, so that none waits for another.
    order = sorted(range(len(asked)), key=lambda place: len(asked[place].text))
    written = generate_text(
        model,
        text_tokenizer,
        [prompts[place] for place in order],
        MOST_TOKENS,
        stop=TEMPLATES[TEMPLATE].assistant[1],
        batch_size=AT_A_TIME,
    )
    answers = [text.strip() for _, text in sorted(zip(order, written, strict=True))]
    right = [text.lower() == one.answer.lower() for text, one in zip(answers, asked, strict=True)]
    by_kind = {
        kind: [(one, ok) for one, ok in zip(asked, right, strict=True) if one.kind == kind]
        for kind in (*KINDS, YES_NO, CHOICE)
    }
    # A few scenes may have nothing of a kind: where several of one thing are, for example.
    kinds = {kind: _accuracy(judged) for kind, judged in by_kind.items() if judged}
    rows = [
        {"scene": one.scene, "kind": one.kind, "question": one.text, "answer": text, "right": one.answer}
        for one, text in zip(asked, answers, strict=True)
    ]
    choices = [place for place, one in enumerate(asked) if one.kind == CHOICE]
    return {
        "kinds": kinds,
        "pope": _pope([(one, text) for one, text in zip(asked, answers, strict=True) if one.kind == YES_NO]),
        "choice_by_likelihood": _by_likelihood(
            model, text_tokenizer, [asked[place] for place in choices], [prompts[place] for place in choices]
        ),
        "rows": rows,
    }


def _accuracy(judged: Sequence[tuple[Asked, bool]]) -> dict[str, float]:
    commonest = Counter(one.answer for one, _ in judged).most_common(1)[0][1]
    return {
        "questions": len(judged),
        "accuracy": sum(ok for _, ok in judged) / len(judged),
        "chance": sum(1 / one.possible for one, _ in judged) / len(judged),
        "majority": commonest / len(judged),
    }


def _pope(answered: Sequence[tuple[Asked, str]]) -> dict[str, dict[str, float]]:
    """POPE's figures by how absent things were chosen: `no` is an answer that says no, `yes` all others."""
    found = {}
    for category in AbsentThings.CATEGORIES:
        pairs = [
            (one.answer == "yes", text.lower() != "no") for one, text in answered if one.category == category
        ]
        if not pairs:
            continue
        said = sum(yes for _, yes in pairs)
        hits = sum(truth and yes for truth, yes in pairs)
        true = sum(truth for truth, _ in pairs)
        found[category] = {
            "questions": len(pairs),
            "accuracy": sum(truth == yes for truth, yes in pairs) / len(pairs),
            "f1": 2 * hits / (said + true) if said + true else 0.0,
            "yes": said / len(pairs),
            "f1_of_always_yes": 2 * true / (len(pairs) + true),
        }
    return found


def _by_likelihood(
    model: DualTokenForCausalLM,
    text_tokenizer: PreTrainedTokenizerBase,
    asked: Sequence[Asked],
    prompts: Sequence[Document],
) -> dict[str, float]:
    """The likeliest letter, whatever the model would write."""
    right = 0
    for start in range(0, len(asked), AT_A_TIME):
        part = asked[start : start + AT_A_TIME]
        letters = [list(LETTERS[: len(one.options)]) for one in part]
        scored = option_log_likelihoods(model, text_tokenizer, prompts[start : start + AT_A_TIME], letters)
        for one, options in zip(part, scored, strict=True):
            best = max(range(len(options)), key=lambda place: options[place].log_likelihood)
            right += LETTERS[best] == one.answer
    return {
        "questions": len(asked),
        "accuracy": right / len(asked),
        "chance": sum(1 / one.possible for one in asked) / len(asked),
    }

"""How likely the unified model holds given documents, and answers to choose from, for evaluation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence

from dualtoken.generation.decoding import evaluating
from dualtoken.generation.generators import Prompt, open_documents
from dualtoken.generation.rows import Rows
from dualtoken.unified_model.model import DualTokenForCausalLM
from dualtoken.unified_model.sequence import PackedBatch, TokenizedDocument, pack_documents


@dataclass
class DocumentNLL:
    """Negative log likelihoods, in nats, summed over a document's targets, and the targets' numbers."""

    key: str
    text_nll: float
    text_count: int
    visual_nll: torch.Tensor  # [Q, D]
    visual_count: int


@torch.no_grad()
def document_nll(
    model: DualTokenForCausalLM, documents: Sequence[TokenizedDocument], context_length: int = 4096
) -> list[DocumentNLL]:
    """Score documents, several at a time, packed into rows of up to `context_length` tokens.

    A longer document gets a row of its own. Results are in the order of `documents`.
    """
    device = model.device
    results: list[DocumentNLL] = []
    row: list[TokenizedDocument] = []
    with evaluating(model):
        for document in documents:
            if row and sum(map(len, row)) + len(document) > context_length:
                results.extend(_score(model, pack_documents(row).to(device)))
                row = []
            row.append(document)
        if row:
            results.extend(_score(model, pack_documents(row).to(device)))
    return results


@dataclass(frozen=True)
class OptionLikelihood:
    """How likely an option is after its prompt."""

    log_likelihood: float  # nats, summed over its tokens
    tokens: int
    most_likely: bool  # whether each of its tokens is the most likely one after those before it


@torch.no_grad()
def option_log_likelihoods(
    model: DualTokenForCausalLM,
    text_tokenizer: Any,
    prompts: Sequence[Prompt],
    options: Sequence[Sequence[str]],
) -> list[list[OptionLikelihood]]:
    """Score each prompt's options as continuations of it.

    A prompt is read once; its options then stand side by side after it, each seeing the prompt and itself.

    Args:
        model: the unified model, with codebooks.
        text_tokenizer: the text tokenizer it was trained with.
        prompts: texts, or documents of text and images; all at once, so give as many as memory holds.
        options: of each prompt, any number. An option is tokenized on its own, as the model would write it
            after the prompt's last token, not together with the prompt's last word; a space before a word
            belongs to the option. Special tokens spelled out in it are ordinary characters.

    Raises:
        ValueError: there are no prompts, a prompt has no options, or an option has no tokens.
    """
    if len(prompts) != len(options) or not prompts:
        raise ValueError(
            f"got {len(prompts)} prompts and options of {len(options)}; give at least one prompt, and each "
            "its options"
        )
    tokens = [_option_tokens(text_tokenizer, given, index) for index, given in enumerate(options)]
    with evaluating(model):
        rows = Rows(model, open_documents(prompts, text_tokenizer, model))
        states = _states(rows, tokens)  # [R, 1 + n, H]
        where: list[tuple[int, int]] = []  # row and state before each target
        for row, given in enumerate(tokens):
            read = 0
            for option in given:
                where += [(row, 0), *((row, read + place) for place in range(1, len(option)))]
                read += len(option) - 1
        before = torch.tensor(where, device=model.device).unbind(1)
        flat = [option for given in tokens for option in given]
        targets = torch.tensor([token for option in flat for token in option], device=model.device)
        scores = model.get_output_embeddings()(states[before], targets)
    lengths = [len(option) for option in flat]
    found = iter(
        OptionLikelihood(-float(nll.double().sum()), len(nll), bool(correct.all()))
        for nll, correct in zip(
            scores.nll.cpu().split(lengths), scores.correct.cpu().split(lengths), strict=True
        )
    )
    return [[next(found) for _ in given] for given in tokens]


def _option_tokens(text_tokenizer: Any, options: Sequence[str], index: int) -> list[list[int]]:
    if isinstance(options, str) or not options:
        raise ValueError(f"prompt {index} has the options {options!r}; expected a list of at least one text")
    tokens = [
        text_tokenizer(option, add_special_tokens=False, split_special_tokens=True)["input_ids"]
        for option in options
    ]
    for number, option in enumerate(tokens):
        if not option:
            raise ValueError(
                f"option {number} of prompt {index} is {options[number]!r}, which has no tokens; "
                "leave it out, or give a text"
            )
    return tokens


def _states(rows: Rows, tokens: list[list[list[int]]]) -> torch.Tensor:
    """Hidden states [R, 1 + n, H]: at each prompt's end, then at each option's tokens but its last."""
    device = rows.hidden.device
    read = [
        [
            (token, number, place)
            for number, option in enumerate(given)
            for place, token in enumerate(option[:-1])
        ]
        for given in tokens
    ]
    count = max(map(len, read))
    if count == 0:
        return rows.hidden[:, None]
    padded = pad_sequence(
        [torch.tensor(row, dtype=torch.int64, device=device).view(-1, 3) for row in read],
        batch_first=True,
        padding_value=-1,
    )
    ids, option, place = padded.clamp(min=0)[..., 0], padded[..., 1], padded[..., 2].clamp(min=0)  # [R, n]
    ends, order = rows.ends()[:, None], torch.arange(count, device=device)
    # Every place as counted from the prompt's end: before it the prompt, then the tokens of all options.
    after = torch.arange(max(rows.lengths) + count, device=device) - ends  # [R, S]
    option_there = option.gather(1, after.clamp(0, count - 1))
    same = option_there[:, None] == option[..., None]  # [R, n, S]
    mask = (after[:, None] < 0) | (same & (after[:, None] <= order[:, None]))
    hidden = rows.attend(
        rows.model.get_input_embeddings()(ids), ends + order, position_ids=ends + place, mask=mask[:, None]
    )
    return torch.cat([rows.hidden[:, None], hidden], dim=1)


def _score(model: DualTokenForCausalLM, pack: PackedBatch) -> list[DocumentNLL]:
    output = model(**pack.model_inputs())
    count = len(pack.keys)
    text_of, visual_of = (
        torch.bucketize(positions, pack.cu_seqlens[1:].long(), right=True)
        for positions in (output.text_positions, output.visual_positions)
    )
    of_text, of_codes = output.text_position_nll, output.visual_position_nll
    text = of_text.new_zeros(count).index_add(0, text_of, of_text)
    visual = of_codes.new_zeros(count, *of_codes.shape[1:]).index_add(0, visual_of, of_codes)
    text_counts = text_of.bincount(minlength=count).tolist()
    visual_counts = visual_of.bincount(minlength=count).tolist()
    return [
        DocumentNLL(key, float(text[i]), text_counts[i], visual[i].cpu(), visual_counts[i])
        for i, key in enumerate(pack.keys)
    ]

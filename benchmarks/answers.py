"""Answers a second to questions about pictures: together, one by one, and by transformers' `generate`.

The decoder has random weights, so it is given a way to end: the end token's row of the output layer is
stretched until that token is the most likely one now and then. Answers are the most likely tokens, the same
for all contestants, which is checked token by token; they end where the end token comes, so their lengths
are mixed, or at `--max-new-tokens`. transformers runs the same weights in its own Qwen2ForCausalLM on the
same embedded prompts, padded on the left, batch by batch, its prompts embedded within the time taken. Options
are scored after one reading of their prompt, and as a packed document for each.

Contestants take turns, round by round; the figures are the medians, with the range of the rounds. With one
thread it is the CPU time of the process, which other programs disturb less; with more, wall time. Run:
``python -m benchmarks.answers [--threads 2]``.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

from benchmarks.quantizer import processor
from dualtoken.generation.generators import generate_text, open_document
from dualtoken.generation.likelihood import document_nll, option_log_likelihoods
from dualtoken.unified_model.config import DualTokenConfig
from dualtoken.unified_model.model import DualTokenForCausalLM
from dualtoken.unified_model.sequence import (
    Document,
    ImagePart,
    SpecialTokens,
    TextPart,
    add_special_tokens,
    tokenize_document,
)

CODES, DEPTH, OPTIONS = 1024, 4, 4
TOGETHER, BY_BATCH, ALONE, LIBRARY = "together", "batch by batch", "one by one", "transformers"


def word_tokenizer(words: int) -> PreTrainedTokenizerFast:
    """A token for each of the words w0, w1, ..."""
    backend = Tokenizer(models.WordLevel({f"w{i}": i for i in range(words)}, unk_token="w0"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    text_tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend)
    add_special_tokens(text_tokenizer)
    return text_tokenizer


def build_model(args: argparse.Namespace, text_tokenizer: PreTrainedTokenizerFast) -> DualTokenForCausalLM:
    """A model with random weights that ends its texts now and then."""
    special = SpecialTokens.from_tokenizer(text_tokenizer)
    decoder = Qwen2Config(
        hidden_size=args.width, intermediate_size=args.width * 11 // 4, num_hidden_layers=args.layers,
        num_attention_heads=args.width // 64, num_key_value_heads=max(args.width // 256, 1),
        vocab_size=len(text_tokenizer), tie_word_embeddings=False,
    )  # fmt: skip
    config = DualTokenConfig(
        text_config=decoder, codebook_size=CODES, codebook_dim=16, num_quantizers=DEPTH,
        positions_per_image=args.positions, head_hidden_size=64, head_num_layers=1,
        head_num_attention_heads=2, special_tokens=vars(special),
    )  # fmt: skip
    model = DualTokenForCausalLM._from_config(config).eval()
    model.set_codebooks(torch.randn(2, 1, CODES, 16))
    with torch.no_grad():
        output = model.get_output_embeddings().weight
        output[sorted(special.ids())] *= 0.0  # never chosen, so nobody has to forbid them
        output[special.end_of_text] = torch.randn(args.width) * 0.02 * args.end
        # What the last token was outweighs what all prompts have in common, so that no two texts are alike.
        model.get_input_embeddings().weight.normal_()
    return model


def build_questions(args: argparse.Namespace) -> tuple[list[Document], list[list[str]]]:
    """Questions of 8 to 48 words about a picture each, and options of 1 to 6 words."""
    generator = torch.Generator().manual_seed(1)

    def text(shortest: int, longest: int) -> str:
        count = int(torch.randint(shortest, longest + 1, (), generator=generator))
        return " ".join(f"w{i}" for i in torch.randint(args.words, (count,), generator=generator).tolist())

    questions = [
        Document(
            [
                ImagePart(torch.randint(CODES, (args.positions, 2, DEPTH), generator=generator)),
                TextPart(text(8, 48), loss=False),
            ]
        )
        for _ in range(args.questions)
    ]
    return questions, [[text(1, 6) for _ in range(OPTIONS)] for _ in questions]


def library_answers(
    llm: Qwen2ForCausalLM,
    model: DualTokenForCausalLM,
    text_tokenizer: Any,
    questions: list[Document],
    max_new_tokens: int,
) -> list[str]:
    """One batch of answers by transformers' `generate`."""
    end = model.config.special.end_of_text
    documents = [open_document(question, text_tokenizer, model) for question in questions]
    longest = max(map(len, documents))
    ids = torch.full((len(documents), longest), end)
    mask = torch.zeros_like(ids)
    for row, document in enumerate(documents):
        ids[row, longest - len(document) :] = document.input_ids
        mask[row, longest - len(document) :] = 1
    codes = torch.cat([document.codes for document in documents])
    written = llm.generate(
        inputs_embeds=model.embed(ids, codes),
        attention_mask=mask,
        max_new_tokens=max_new_tokens,
        do_sample=False,
        eos_token_id=end,
        pad_token_id=end,
    )
    return text_tokenizer.batch_decode(written, skip_special_tokens=True)


def by_batch(answer: Callable[[list], list], items: list, size: int) -> list:
    """Answer so many at a time."""
    return [one for start in range(0, len(items), size) for one in answer(items[start : start + size])]


def options_apart(
    model: DualTokenForCausalLM, text_tokenizer: Any, asked: list[tuple[Document, list[str]]]
) -> list[list[float]]:
    """Score each option as a document of its own, all packed."""
    special = model.config.special
    documents = [
        tokenize_document(Document([*question.parts, TextPart(option)]), text_tokenizer, special, end=False)
        for question, options in asked
        for option in options
    ]
    scores = [-score.text_nll for score in document_nll(model, documents)]
    return [scores[start : start + OPTIONS] for start in range(0, len(scores), OPTIONS)]


def measure(
    contestants: dict[str, Callable[[], Any]], rounds: int, threads: int
) -> tuple[dict[str, list[float]], dict[str, Any]]:
    """Return the seconds of each contestant's rounds, interleaved, and what each answered."""
    clock = time.process_time if threads == 1 else time.perf_counter
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    answers = {}
    for _ in range(rounds):
        for name, answer in contestants.items():
            start = clock()
            answers[name] = answer()
            seconds[name].append(clock() - start)
    return seconds, answers


def show(seconds: dict[str, list[float]], count: int, unit: str, baseline: str) -> None:
    """Print rates and, round by round, the ratios to the baseline's."""
    for name, spent in seconds.items():
        rates = sorted(count / one for one in spent)
        ratios = sorted(other / one for other, one in zip(seconds[baseline], spent, strict=True))
        print(
            f"  {name:15} {statistics.median(rates):7.2f} {unit}/s ({rates[0]:.2f} to {rates[-1]:.2f})"
            f"   {statistics.median(ratios):5.2f}x {baseline} ({ratios[0]:.2f} to {ratios[-1]:.2f})"
        )


@torch.no_grad()
def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--questions", type=int, default=64)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--max-new-tokens", type=int, default=128)
    parser.add_argument("--end", type=float, default=1.8, help="how far the end token's row is stretched")
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--words", type=int, default=32000)
    parser.add_argument("--positions", type=int, default=64, help="visual positions of a picture")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    text_tokenizer = word_tokenizer(args.words)
    model = build_model(args, text_tokenizer)
    questions, options = build_questions(args)
    library_config = Qwen2Config(**model.decoder_config.to_dict())
    llm = Qwen2ForCausalLM._from_config(library_config, attn_implementation="sdpa").eval()
    llm.load_state_dict(model.llm.state_dict())

    def ours(asked: list[Document], **settings: int) -> list[str]:
        return generate_text(model, text_tokenizer, asked, args.max_new_tokens, **settings)

    def library(asked: list[Document]) -> list[str]:
        return library_answers(llm, model, text_tokenizer, asked, args.max_new_tokens)

    def shared(asked: list[tuple[Document, list[str]]]) -> list[list[float]]:
        scored = option_log_likelihoods(model, text_tokenizer, *zip(*asked, strict=True))
        return [[one.log_likelihood for one in row] for row in scored]

    answering = {
        TOGETHER: lambda: ours(questions, batch_size=args.batch),
        BY_BATCH: lambda: by_batch(ours, questions, args.batch),
        ALONE: lambda: by_batch(ours, questions, 1),
        LIBRARY: lambda: by_batch(library, questions, args.batch),
    }
    asked = list(zip(questions, options, strict=True))
    scoring = {
        "shared prompt": lambda: by_batch(shared, asked, args.batch),
        "documents": lambda: by_batch(lambda a: options_apart(model, text_tokenizer, a), asked, args.batch),
    }
    for answer in (ours, library):
        answer(questions[:2])  # what happens once, the first time
    seconds, answers = measure(answering, args.rounds, args.threads)
    for name, given in answers.items():
        if given != answers[ALONE]:
            different = sum(a != b for a, b in zip(given, answers[ALONE], strict=True))
            raise SystemExit(f"{different} answers of '{name}' are not those of '{ALONE}'")
    scoring_seconds, scored = measure(scoring, args.rounds, args.threads)
    shared_scores, apart = (torch.tensor(scores, dtype=torch.float64) for scores in scored.values())
    difference = float((shared_scores - apart).abs().max() / apart.abs().max())
    if difference > 1e-4:
        raise SystemExit(f"likelihoods with a shared prompt differ by {difference:.1e} of the largest")

    lengths = sorted(len(answer.split()) for answer in answers[ALONE])
    capped = lengths.count(args.max_new_tokens)
    prompts = [len(open_document(question, text_tokenizer, model)) for question in questions]
    print(
        f"{args.questions} questions, prompts of {min(prompts)} to {max(prompts)} tokens, {args.positions} "
        f"of them a picture; width {args.width}, {args.layers} layers, vocabulary {len(text_tokenizer)}, "
        f"fp32; batches of {args.batch}\n{processor()}, {args.threads} thread(s), torch {torch.__version__}, "
        f"transformers {transformers.__version__}, {time.strftime('%F')}; "
        f"{'CPU' if args.threads == 1 else 'wall'} time, {args.rounds} rounds, median (range)\n"
        f"answers of {lengths[0]} to {lengths[-1]} tokens, median {statistics.median(lengths):.0f}, mean "
        f"{statistics.mean(lengths):.1f}, {capped} at the limit; equal token for token"
    )
    show(seconds, args.questions, "answers", ALONE)
    print("against transformers")
    show({name: seconds[name] for name in (TOGETHER, BY_BATCH, LIBRARY)}, args.questions, "answers", LIBRARY)
    print(f"{OPTIONS} options a question of 1 to 6 tokens, scores equal to {difference:.0e}")
    show(scoring_seconds, args.questions, "questions", "documents")


if __name__ == "__main__":
    main()

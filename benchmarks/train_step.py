"""Time of a training step of the unified model: packed documents against padding each batch to its longest.

One optimizer step (forward, backward, AdamW) on the same documents, a mix of captions, pictures to generate,
interleaved documents and text. "packed" fills contexts as the streams do; "padded" takes the documents as
they come and pads each batch to its longest; both then run the same model, in which padding costs what
tokens cost, but no classifier. Useful tokens are those that are not padding. CPU time of one thread, the
contenders in turn, best of some rounds; the losses have to agree. Run: ``python -m benchmarks.train_step``.
"""

from __future__ import annotations

import argparse
import json
import random
import string
import time
from collections.abc import Callable
from pathlib import Path

import torch
from transformers import Qwen2Config

from benchmarks.quantizer import processor
from benchmarks.streams import byte_tokenizer
from data_pipeline.streams.packing import pack_lengths
from dualtoken.unified_model.config import DualTokenConfig
from dualtoken.unified_model.model import DualTokenForCausalLM
from dualtoken.unified_model.sequence import (
    Document,
    ImagePart,
    PackedBatch,
    SpecialTokens,
    TextPart,
    TokenizedDocument,
    add_special_tokens,
    pack_documents,
    tokenize_document,
)


def build_documents(args: argparse.Namespace) -> tuple[list[TokenizedDocument], SpecialTokens, int]:
    """Draw the documents; returns the special tokens and the vocabulary's size too."""
    text_tokenizer = byte_tokenizer()
    add_special_tokens(text_tokenizer)
    special = SpecialTokens.from_tokenizer(text_tokenizer)
    draw = random.Random(args.seed)

    def text(least: int, most: int, loss: bool = True) -> TextPart:
        return TextPart("".join(draw.choices(string.ascii_lowercase, k=draw.randint(least, most))), loss)

    def image(loss: bool) -> ImagePart:
        codes = torch.randint(args.codes, (args.positions, 2, args.depth))
        return ImagePart(codes, loss)

    def document(kind: float) -> Document:
        if kind < 0.25:
            return Document([image(False), text(10, 60)])
        if kind < 0.5:
            return Document([text(10, 60, False), image(True)])
        if kind < 0.75:
            parts = [[text(10, 150), image(True)] for _ in range(draw.randint(1, 4))]
            return Document([part for pair in parts for part in pair])
        length = min(max(int(draw.lognormvariate(5, 0.8)), 20), args.context - 2)
        return Document([text(length, length)])

    documents = [document(draw.random()) for _ in range(args.documents)]
    tokenized = [tokenize_document(document, text_tokenizer, special) for document in documents]
    return tokenized, special, len(text_tokenizer)


def build_model(args: argparse.Namespace, special: SpecialTokens, vocabulary: int) -> DualTokenForCausalLM:
    """Return a model with random weights and codebooks."""
    decoder = Qwen2Config(
        hidden_size=args.hidden, intermediate_size=3 * args.hidden, num_hidden_layers=args.layers,
        num_attention_heads=args.hidden // 64, num_key_value_heads=args.hidden // 64,
        vocab_size=-(-vocabulary // 64) * 64, tie_word_embeddings=True,
    )  # fmt: skip
    config = DualTokenConfig(
        text_config=decoder, codebook_size=args.codes, num_quantizers=args.depth,
        positions_per_image=args.positions, head_hidden_size=args.hidden, head_num_layers=args.head_layers,
        head_num_attention_heads=args.hidden // 64, special_tokens=vars(special),
    )  # fmt: skip
    model = DualTokenForCausalLM._from_config(config)
    model.set_codebooks(torch.randn(2, 1, args.codes, config.codebook_dim))
    return model.train()


def packed(documents: list[TokenizedDocument], args: argparse.Namespace) -> list[PackedBatch]:
    """Fill contexts as the streams do."""
    bins = pack_lengths([len(document) for document in documents], args.context)
    return [pack_documents([documents[i] for i in items], args.context) for items in bins]


def padded(documents: list[TokenizedDocument], args: argparse.Namespace) -> list[PackedBatch]:
    """Take batches as they come; each document is as long as the longest of its batch."""
    batches = []
    for start in range(0, len(documents), args.batch):
        batch = documents[start : start + args.batch]
        longest = max(map(len, batch))
        rows = [pack_documents([document], longest) for document in batch]
        batches.append(
            PackedBatch(
                input_ids=torch.cat([row.input_ids for row in rows], dim=1),
                position_ids=torch.arange(longest).repeat(len(rows))[None],
                cu_seqlens=torch.arange(0, (len(rows) + 1) * longest, longest, dtype=torch.int32),
                max_seqlen=longest,
                labels=torch.cat([row.labels for row in rows], dim=1),
                codes=torch.cat([row.codes for row in rows if len(row.codes)] or [rows[0].codes]),
                visual_loss_mask=torch.cat([row.visual_loss_mask for row in rows]),
                keys=[key for row in rows for key in row.keys],
                padding=sum(row.padding for row in rows),
            )
        )
    return batches


def step(model: DualTokenForCausalLM, optimizer: torch.optim.Optimizer, batches: list[PackedBatch]) -> float:
    """Take an optimizer step on all batches; returns the loss per supervised position."""
    count = sum(int((batch.labels != -100).sum() + batch.visual_loss_mask.sum()) for batch in batches)
    total = 0.0
    for batch in batches:
        output = model(**batch.model_inputs())
        loss = (output.text_nll + output.visual_nll.sum()) / count
        loss.backward()
        total += loss.item()
    optimizer.step()
    optimizer.zero_grad()
    return total


def main() -> None:
    """Measure, print, and write JSON if asked to."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--documents", type=int, default=48)
    parser.add_argument("--context", type=int, default=1024, help="tokens in a pack")
    parser.add_argument("--batch", type=int, default=8, help="documents in a padded batch")
    parser.add_argument("--positions", type=int, default=64, help="per image")
    parser.add_argument("--hidden", type=int, default=256, help="width of language model and heads")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--head-layers", type=int, default=2)
    parser.add_argument("--depth", type=int, default=4)
    parser.add_argument("--codes", type=int, default=2048)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="write the figures there too")
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(args.seed)
    documents, special, vocabulary = build_documents(args)
    model = build_model(args, special, vocabulary)
    # A rate of 0: every step is taken from the same weights, so that the losses can be compared.
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0, fused=True)
    layouts: dict[str, Callable] = {"packed": packed, "padded": padded}
    batches = {name: layout(documents, args) for name, layout in layouts.items()}
    step(model, optimizer, batches["packed"][:1])  # allocates optimizer state and buffers
    seconds = dict.fromkeys(batches, float("inf"))
    losses = {}
    for _ in range(args.rounds):
        for name, those in batches.items():
            start = time.process_time()
            losses[name] = step(model, optimizer, those)
            seconds[name] = min(seconds[name], time.process_time() - start)
    useful = sum(map(len, documents))
    total = {name: sum(batch.input_ids.numel() for batch in those) for name, those in batches.items()}
    print(
        f"{args.documents} documents of {min(map(len, documents))} to {max(map(len, documents))} tokens, "
        f"{args.layers} layers of width {args.hidden}, heads of {args.head_layers} layers, "
        f"depth {args.depth}, K {args.codes}, fp32, best of {args.rounds}; one thread; "
        f"torch {torch.__version__}, {processor()}, {time.strftime('%F')}"
    )
    for name in batches:
        print(
            f"{name}: {len(batches[name])} batches, padding {1 - useful / total[name]:.1%}, "
            f"{seconds[name]:.2f} s CPU a step, {useful / seconds[name]:,.0f} useful tokens/s, "
            f"loss {losses[name]:.5f}"
        )
    print(f"packed / padded: {seconds['padded'] / seconds['packed']:.2f}x useful tokens/s")
    if abs(losses["packed"] - losses["padded"]) > 1e-4 * losses["packed"]:
        raise SystemExit("the losses differ: the two did not train on the same thing")
    if args.json:
        figures = {"useful_tokens": useful, "tokens": total, "seconds": seconds, "losses": losses}
        args.json.write_text(
            json.dumps({"options": {**vars(args), "json": None}, **figures}, indent=1), encoding="utf-8"
        )


if __name__ == "__main__":
    main()

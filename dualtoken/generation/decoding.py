"""Writing tokens and codes into documents: the machinery of `generation`.

Documents are written side by side in rows (`rows.py`); what comes out of one does not depend on its
neighbours.

Shapes: N documents, R rows (2 N with guidance), P positions per image, Q codebooks, D depths, H width.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import islice
from typing import Any

import torch

from dualtoken.generation.rows import Rows
from dualtoken.generation.sampling import Sampling, row_noise
from dualtoken.unified_model.model import DualTokenForCausalLM
from dualtoken.unified_model.sequence import (
    IGNORE_INDEX,
    Document,
    TokenizedDocument,
    join_features,
    tokenize_document,
)

Seed = int | Sequence[int] | None


def write_images(
    model: DualTokenForCausalLM,
    opened: list[TokenizedDocument],
    guidance_scale: float,
    sampling: Sampling,
    seed: Seed,
    progress: Callable[[int, int], None] | None = None,
) -> torch.Tensor:
    """Write an image into each document that ends with the image-start token: codes [N, P, Q, D]."""
    if not opened:
        raise ValueError("no prompts to generate images for; give at least one")
    if not math.isfinite(guidance_scale):
        raise ValueError(f"guidance_scale={guidance_scale}; expected a number, 1 for none")
    special, config = model.config.special, model.config
    count, positions = len(opened), config.positions_per_image
    guided = guidance_scale != 1.0
    if guided:
        empty = tokenize_document(Document([]), None, special, end=False)
        opened = opened + [append(empty, [special.image_gen_start])] * count
    with evaluating(model):
        rows = Rows(model, opened)
        device = rows.hidden.device
        noise = row_noise(seed, count, config.code_shape, device)
        codes = torch.empty(noise.shape, dtype=torch.int64, device=device)
        features = model.new_feature_cache()
        for position in range(positions):
            for q in range(config.num_codebooks):
                codes[:, position, q] = _write_codes(
                    model, q, rows.hidden, guidance_scale, sampling, noise[:, position, q]
                )
            if progress is not None:
                progress(position + 1, positions)
            if position + 1 < positions:
                embedded = model.embed_next(codes[:, position], position, features)
                rows.feed(embedded.repeat(2, 1) if guided else embedded)
    return codes


def _write_codes(
    model: DualTokenForCausalLM,
    q: int,
    hidden: torch.Tensor,  # [R, H]
    guidance_scale: float,
    sampling: Sampling,
    noise: torch.Tensor,  # [N, D]
) -> torch.Tensor:
    """Choose one position's codes of codebook q, depth by depth: [N, D]."""
    guided = len(hidden) != len(noise)
    if model.config.codes_in_vocabulary:
        logits = _guided(model.code_logits(hidden), guided, guidance_scale)
        return sampling.choose(logits, noise[:, 0])[:, None]
    projector, head = model.visual_heads()[q]
    cache = head.new_cache(len(hidden))
    inputs = projector(hidden)
    codes: list[torch.Tensor] = []
    total = None
    for depth in range(noise.shape[1]):
        logits = _guided(head.step(inputs, cache), guided, guidance_scale)
        code = sampling.choose(logits, noise[:, depth])
        codes.append(code)
        vector = model.codebooks.look_up(q, depth, code)
        total = vector if total is None else total + vector
        inputs = total.repeat(2, 1) if guided else total
    return torch.stack(codes, dim=1)


def _guided(logits: torch.Tensor, guided: bool, guidance_scale: float) -> torch.Tensor:
    """Guide logits [2 N, K] of rows with prompts by those without, which lie behind them: [N, K]."""
    if not guided:
        return logits.float()
    conditional, unconditional = logits.float().chunk(2)
    return unconditional + guidance_scale * (conditional - unconditional)


def text_steps(
    model: DualTokenForCausalLM,
    text_tokenizer: Any,
    documents: list[TokenizedDocument],
    max_new_tokens: int,
    sampling: Sampling,
    seed: Seed,
    stop_at_image: bool = False,
    stop: Sequence[int] = (),
    batch_size: int | None = None,
) -> Iterator[dict[int, int]]:
    """Yield document -> token of those being written until all have ended; end tokens are not yielded.

    A document that ends leaves the batch, and the next one of those that wait takes its place.

    Args:
        model: the unified model, with codebooks.
        text_tokenizer: the text tokenizer it was trained with.
        documents: to be continued.
        max_new_tokens: of each.
        sampling: how to choose tokens.
        seed: as of `row_noise`, for all documents.
        stop_at_image: whether the image-start token may be chosen; it is yielded and ends its document.
        stop: tokens, one after the other, that end a document; they are yielded.
        batch_size: documents at a time at most; None for all.
    """
    if not documents:
        raise ValueError("no prompts to continue; give at least one")
    if batch_size is not None and batch_size < 1:
        raise ValueError(f"batch_size={batch_size}; expected at least 1, or None for all prompts at once")
    if max_new_tokens < 1:
        return
    special, stop = model.config.special, list(stop)
    end = {special.end_of_text, text_tokenizer.eos_token_id}
    forbidden = sorted(special.ids() - end - ({special.image_gen_start} if stop_at_image else set()))
    noise = row_noise(seed, len(documents), (max_new_tokens,), model.device)
    written: list[list[int]] = [[] for _ in documents]
    waiting = iter(range(len(documents)))
    rows = Rows(model)
    writing: list[int] = []  # the document in each row
    with evaluating(model):
        while True:
            coming = list(islice(waiting, (batch_size or len(documents)) - len(writing)))
            if coming:
                rows.add([documents[document] for document in coming])
                writing += coming
            if not writing:
                return
            logits = model.get_output_embeddings()(rows.hidden).float()
            logits[:, forbidden] = float("-inf")
            logits[:, len(text_tokenizer) :] = float("-inf")  # rows that only pad the embedding
            tokens = sampling.choose(logits, noise[writing, [len(written[document]) for document in writing]])
            step: dict[int, int] = {}
            ended: set[int] = set()
            for row, (document, token) in enumerate(zip(writing, tokens.tolist(), strict=True)):
                so_far = written[document]
                if token not in end:
                    step[document] = token
                    so_far.append(token)
                stopped = bool(stop) and so_far[-len(stop) :] == stop
                if (
                    token in end
                    or token == special.image_gen_start
                    or stopped
                    or len(so_far) == max_new_tokens
                ):
                    ended.add(row)
            if step:
                yield step
            if ended:
                staying = rows.drop(ended)
                writing, tokens = [writing[row] for row in staying], tokens[staying]
            if writing:
                rows.feed(model.get_input_embeddings()(tokens))


def append(
    document: TokenizedDocument,
    ids: list[int],
    codes: torch.Tensor | None = None,
    features: torch.Tensor | None = None,
    feature_order: torch.Tensor | None = None,
) -> TokenizedDocument:
    """Return the document with tokens at its end.

    `codes` [V, Q, D], `features` and `feature_order` (as of `TokenizedDocument`) are those of the image
    positions among them.
    """
    tokens = torch.tensor(ids, dtype=torch.int64)
    added = document.codes[:0] if codes is None else codes
    seen = ((document.features, document.feature_order), (features, feature_order))
    joined, order = join_features([(given, own) for given, own in seen if given is not None])
    return replace(
        document,
        input_ids=torch.cat([document.input_ids, tokens]),
        labels=torch.cat([document.labels, torch.full_like(tokens, IGNORE_INDEX)]),
        codes=torch.cat([document.codes, added]) if len(document.codes) else added,
        visual_loss_mask=torch.cat([document.visual_loss_mask, torch.zeros(len(added), dtype=torch.bool)]),
        features=joined,
        feature_order=order,
    )


@contextlib.contextmanager
def evaluating(model: torch.nn.Module) -> Iterator[None]:
    """Hold a model in evaluation mode, and leave it as it was."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)

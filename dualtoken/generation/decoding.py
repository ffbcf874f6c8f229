"""Writing tokens and codes into documents: the machinery of `generation`.

Prompts of different lengths are padded on the left; the padding is masked and positions count from the
first real token, so a prompt's result does not depend on its neighbours.

Shapes: N documents, R rows (2 N with guidance), P positions per image, Q = 2 codebooks, D depths, H width.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from transformers import DynamicCache

from dualtoken.generation.sampling import Sampling, row_noise
from dualtoken.unified_model.model import CODEBOOKS, DualTokenForCausalLM
from dualtoken.unified_model.sequence import IGNORE_INDEX, Document, TokenizedDocument, tokenize_document

Seed = int | Sequence[int] | None


class Rows:
    """Documents being continued side by side: the decoder's cache and the hidden state at each row's end."""

    def __init__(self, model: DualTokenForCausalLM, documents: Sequence[TokenizedDocument]) -> None:
        device = model.device
        lengths = torch.tensor([len(document) for document in documents], device=device)
        longest = int(lengths.max())
        input_ids = torch.full((len(documents), longest), model.config.special.end_of_text, device=device)
        for row, document in enumerate(documents):
            input_ids[row, longest - len(document) :] = document.input_ids.to(device)
        with_images = [document.codes.to(device).long() for document in documents if len(document.codes)]
        codes, _ = model.checked_codes(input_ids, torch.cat(with_images) if with_images else None)
        self.model = model
        self.cache = DynamicCache(config=model.decoder_config)
        self.padding = longest - lengths  # [R]
        self.padded = bool(self.padding.any())
        self.lengths = lengths
        place = torch.arange(longest, device=device)
        mask = None
        if self.padded:
            # A padding position sees itself: a softmax over nothing would spread NaN through its values.
            visible = (place >= self.padding[:, None])[:, None, :] | torch.eye(
                longest, dtype=torch.bool, device=device
            )
            mask = (visible & (place <= place[:, None]))[:, None]
        self.hidden = self._run(
            model.embed(input_ids, model.codebooks(codes)), (place - self.padding[:, None]).clamp(min=0), mask
        )

    def feed(self, embeddings: torch.Tensor) -> None:
        """Append one position per row, embedded [R, H]; updates `hidden` [R, H]."""
        mask = None
        if self.padded:
            seen = self.cache.get_seq_length() + 1
            mask = torch.arange(seen, device=embeddings.device) >= self.padding[:, None]
            mask = mask[:, None, None]
        self.hidden = self._run(embeddings[:, None], self.lengths[:, None], mask)
        self.lengths = self.lengths + 1

    def _run(
        self, embeddings: torch.Tensor, position_ids: torch.Tensor, mask: torch.Tensor | None
    ) -> torch.Tensor:
        return self.model.decoder(
            inputs_embeds=embeddings,
            position_ids=position_ids,
            attention_mask=mask,
            past_key_values=self.cache,
            use_cache=True,
        ).last_hidden_state[:, -1]


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
    special, config = model.config.special, model.config
    count, positions = len(opened), config.positions_per_image
    guided = guidance_scale != 1.0
    if guided:
        empty = tokenize_document(Document([]), None, special, end=False)
        opened = opened + [append(empty, [special.image_gen_start])] * count
    with _evaluating(model):
        rows = Rows(model, opened)
        device = rows.hidden.device
        noise = row_noise(seed, count, (positions, len(CODEBOOKS), config.num_quantizers), device)
        codes = torch.empty(noise.shape, dtype=torch.int64, device=device)
        features = model.new_feature_cache()
        for position in range(positions):
            for q in range(len(CODEBOOKS)):
                codes[:, position, q] = _write_codes(
                    model, q, rows.hidden, guidance_scale, sampling, noise[:, position, q]
                )
            if progress is not None:
                progress(position + 1, positions)
            if position + 1 < positions:
                embedded = model.embed_next(codes[:, position], features)
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
    projector, head = model.visual_heads()[q]
    guided = len(hidden) != len(noise)
    cache = head.new_cache(len(hidden))
    inputs = projector(hidden)
    codes: list[torch.Tensor] = []
    total = None
    for depth in range(noise.shape[1]):
        logits = head.step(inputs, cache).float()
        if guided:
            conditional, unconditional = logits.chunk(2)
            logits = unconditional + guidance_scale * (conditional - unconditional)
        code = sampling.choose(logits, noise[:, depth])
        codes.append(code)
        vector = model.codebooks.look_up(q, depth, code)
        total = vector if total is None else total + vector
        inputs = total.repeat(2, 1) if guided else total
    return torch.stack(codes, dim=1)


def text_steps(
    model: DualTokenForCausalLM,
    text_tokenizer: Any,
    documents: list[TokenizedDocument],
    max_new_tokens: int,
    sampling: Sampling,
    seed: Seed,
    stop_at_image: bool = False,
) -> Iterator[dict[int, int]]:
    """Yield row -> token of the rows still writing until all have ended; end tokens are not yielded.

    With `stop_at_image` the image-start token may be chosen; it is yielded and ends its row.
    """
    if not documents:
        raise ValueError("no prompts to continue; give at least one")
    special = model.config.special
    stop = {special.end_of_text}
    if text_tokenizer.eos_token_id is not None:
        stop.add(text_tokenizer.eos_token_id)
    forbidden = special.ids() - stop - ({special.image_gen_start} if stop_at_image else set())
    with _evaluating(model):
        rows = Rows(model, documents)
        noise = row_noise(seed, len(documents), (max_new_tokens,), rows.hidden.device)
        writing = set(range(len(documents)))
        for index in range(max_new_tokens):
            logits = model.get_output_embeddings()(rows.hidden).float()
            logits[:, sorted(forbidden)] = float("-inf")
            logits[:, len(text_tokenizer) :] = float("-inf")  # rows that only pad the embedding
            tokens = sampling.choose(logits, noise[:, index])
            chosen = {row: token for row, token in enumerate(tokens.tolist()) if row in writing}
            writing -= {row for row, token in chosen.items() if token in stop}
            step = {row: token for row, token in chosen.items() if row in writing}
            writing -= {row for row, token in step.items() if token == special.image_gen_start}
            if step:
                yield step
            if not writing:
                return
            if index + 1 < max_new_tokens:
                rows.feed(model.get_input_embeddings()(tokens))


def append(
    document: TokenizedDocument, ids: list[int], codes: torch.Tensor | None = None
) -> TokenizedDocument:
    """Return the document with tokens, and codes [V, Q, D] of image positions among them, at its end."""
    tokens = torch.tensor(ids, dtype=torch.int64)
    added = document.codes[:0] if codes is None else codes
    return replace(
        document,
        input_ids=torch.cat([document.input_ids, tokens]),
        labels=torch.cat([document.labels, torch.full_like(tokens, IGNORE_INDEX)]),
        codes=torch.cat([document.codes, added]) if len(document.codes) else added,
        visual_loss_mask=torch.cat([document.visual_loss_mask, torch.zeros(len(added), dtype=torch.bool)]),
    )


@contextlib.contextmanager
def _evaluating(model: torch.nn.Module) -> Iterator[None]:
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)

"""How likely the unified model holds given documents, for evaluation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

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
    training = model.training
    model.eval()
    results: list[DocumentNLL] = []
    row: list[TokenizedDocument] = []
    for document in documents:
        if row and sum(map(len, row)) + len(document) > context_length:
            results.extend(_score(model, pack_documents(row).to(device)))
            row = []
        row.append(document)
    if row:
        results.extend(_score(model, pack_documents(row).to(device)))
    model.train(training)
    return results


def _score(model: DualTokenForCausalLM, pack: PackedBatch) -> list[DocumentNLL]:
    output = model(**pack.model_inputs())
    count = len(pack.keys)
    text_of, visual_of = (
        torch.bucketize(positions, pack.cu_seqlens[1:].long(), right=True)
        for positions in (output.text_positions, output.visual_positions)
    )
    text = torch.zeros(count, device=text_of.device).index_add(0, text_of, output.text_position_nll)
    shape = (count, *output.visual_nll.shape)
    visual = torch.zeros(shape, device=text_of.device).index_add(0, visual_of, output.visual_position_nll)
    text_counts = text_of.bincount(minlength=count).tolist()
    visual_counts = visual_of.bincount(minlength=count).tolist()
    return [
        DocumentNLL(key, float(text[i]), text_counts[i], visual[i].cpu(), visual_counts[i])
        for i, key in enumerate(pack.keys)
    ]

"""Documents being continued side by side: the decoder's keys and values, and the hidden state at each end.

Position p of a document lies at place p of its row, however long its neighbours are. Nothing is padded, so a
row's result does not depend on the others; rows end and begin while others go on.

Shapes: R rows, T tokens of all documents that begin together, S places, H width of the decoder.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import torch
from transformers import Cache

from dualtoken.unified_model.model import DualTokenForCausalLM
from dualtoken.unified_model.sequence import TokenizedDocument, pack_documents

PLACES_AT_A_TIME = 128  # by which the cache grows: in place from token to token, copied once in so many


class RowCache(Cache):
    """Keys and values [rows, heads, places, head_dim] of each layer, written in place.

    Before the decoder runs, `rows` and `places` [B, n] say where the keys of its B x n inputs go, and `seen`
    how many places of the first B rows it attends to; None for packed documents, which attend to themselves.
    """

    def __init__(self) -> None:
        super().__init__(layers=[])
        self.kept: list[tuple[torch.Tensor, torch.Tensor]] = []  # keys and values of each layer
        self.rows: torch.Tensor
        self.places: torch.Tensor
        self.seen: int | None = None
        self.needed = (0, 0)  # rows and places

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Keep keys and values [B, heads, n, head_dim] of a layer; return those to attend to."""
        if layer_idx == len(self.kept):
            self.kept.append((key_states.new_zeros(0, 0, 0, 0), value_states.new_zeros(0, 0, 0, 0)))
        keys, values = self.kept[layer_idx]
        keys, values = self._written(keys, key_states), self._written(values, value_states)
        self.kept[layer_idx] = keys, values
        if self.seen is None:
            return key_states, value_states
        count = len(key_states)
        return keys[:count, :, : self.seen], values[:count, :, : self.seen]

    def move(self, sources: list[int], targets: list[int]) -> None:
        """Let rows take other rows' places."""
        for keys, values in self.kept:
            keys[targets], values[targets] = keys[sources], values[sources]

    def _written(self, kept: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
        rows, places = self.needed
        if rows > kept.shape[0] or places > kept.shape[2]:
            rows = max(rows, kept.shape[0])
            places = max(-(-places // PLACES_AT_A_TIME) * PLACES_AT_A_TIME, kept.shape[2])
            # Zeros: what a mask hides still takes part in the sum, times zero, which a NaN would survive.
            grown = new.new_zeros(rows, new.shape[1], places, new.shape[3])
            if kept.numel():
                grown[: kept.shape[0], :, : kept.shape[2]] = kept
            kept = grown
        kept[self.rows, :, self.places] = new.transpose(1, 2)
        return kept


class Rows:
    """Documents being continued: `hidden` [R, H] at the end of each, `lengths` in tokens."""

    def __init__(self, model: DualTokenForCausalLM, documents: Sequence[TokenizedDocument] = ()) -> None:
        self.model = model
        self.lengths: list[int] = []
        self.cache = RowCache()
        self.hidden = torch.empty(0)
        if documents:
            self.add(documents)

    def add(self, documents: Sequence[TokenizedDocument]) -> None:
        """Begin further documents, in rows after the others.

        They run as training runs them, packed into one row: no token of padding is computed.
        """
        pack = pack_documents(documents).to(self.model.device)
        seen = {"features": pack.features, "feature_order": pack.feature_order}
        codes, _ = self.model.checked_codes(pack.input_ids, pack.codes, **seen)
        borders = pack.cu_seqlens.long()
        rows = torch.arange(len(documents), device=borders.device) + len(self.lengths)
        hidden = self._run(
            self.model.embed(pack.input_ids, codes, **seen),
            rows.repeat_interleave(borders.diff(), output_size=pack.input_ids.shape[1])[None],
            pack.position_ids,
            needed=(len(self.lengths) + len(documents), pack.max_seqlen),
            cu_seq_lens_q=pack.cu_seqlens,
            cu_seq_lens_k=pack.cu_seqlens,
            max_length_q=pack.max_seqlen,
            max_length_k=pack.max_seqlen,
        )[0, borders[1:] - 1]
        self.hidden = torch.cat([self.hidden, hidden]) if self.lengths else hidden
        self.lengths += [len(document) for document in documents]

    def feed(self, embeddings: torch.Tensor) -> None:
        """Append one position per row, embedded [R, H]; updates `hidden`."""
        places = self.ends()[:, None]
        mask = None
        if len(set(self.lengths)) > 1:
            mask = torch.arange(max(self.lengths) + 1, device=places.device) <= places  # [R, S]
            mask = mask[:, None, None]
        self.hidden = self.attend(embeddings[:, None], places, places, mask)[:, 0]
        self.lengths = [length + 1 for length in self.lengths]

    def attend(
        self,
        embeddings: torch.Tensor,
        places: torch.Tensor,
        position_ids: torch.Tensor,
        mask: torch.Tensor | None,
    ) -> torch.Tensor:
        """Run n further inputs of each row without counting them as its own.

        Args:
            embeddings: [R, n, H].
            places: [R, n] where their keys go, from the row's end on.
            position_ids: [R, n].
            mask: [R, 1, n, S] bool, the places that each sees, up to the longest row's end + n; None where
                each sees all up to its own.

        Returns:
            Hidden states [R, n, H].
        """
        seen = max(self.lengths) + embeddings.shape[1]
        rows = torch.arange(len(self.lengths), device=places.device)[:, None].expand_as(places)
        needed = (len(self.lengths), seen)
        return self._run(
            embeddings, rows, places, needed, seen, position_ids=position_ids, attention_mask=mask
        )

    def ends(self) -> torch.Tensor:
        """The first free place of each row, [R]."""
        return torch.tensor(self.lengths, device=self.model.device)

    def drop(self, ended: Collection[int]) -> list[int]:
        """Let rows go; the last ones take their places. Returns which row now lies at each place."""
        staying = [row for row in range(len(self.lengths)) if row not in ended]
        order = list(range(len(staying)))
        free = [row for row in order if row in ended]
        last = [row for row in staying if row >= len(staying)]
        for row, source in zip(free, last, strict=True):
            order[row] = source
        if free:
            self.cache.move(last, free)
        self.hidden = self.hidden[order]
        self.lengths = [self.lengths[row] for row in order]
        return order

    def _run(
        self,
        embeddings: torch.Tensor,
        rows: torch.Tensor,
        places: torch.Tensor,
        needed: tuple[int, int],
        seen: int | None = None,
        **inputs: Any,
    ) -> torch.Tensor:
        cache = self.cache
        cache.rows, cache.places, cache.needed, cache.seen = rows, places, needed, seen
        inputs = {"position_ids": places, **inputs}
        return self.model.decoder(
            inputs_embeds=embeddings, past_key_values=cache, use_cache=True, **inputs
        ).last_hidden_state

"""Text to token ids in a stream: a transformers tokenizer without its bookkeeping, short texts remembered."""

from __future__ import annotations

import os
from functools import lru_cache
from typing import Any

_SHORT = 200
_REMEMBERED = 1 << 16


class TextEncoder:
    """Stands in for a fast transformers tokenizer where documents are tokenized, with the same ids.

    Captions are short and come again every epoch, and so do the words before them; the tokenizer's own call
    spends several times the tokenization on results that are not used here.
    """

    def __init__(self, text_tokenizer: Any) -> None:
        """Wrap a transformers tokenizer; one without a `tokenizers` backend is called as it is."""
        self.text_tokenizer = text_tokenizer
        self._backend: Any = getattr(text_tokenizer, "backend_tokenizer", None)
        # Texts come one at a time: handing each to a pool of threads would double what it takes.
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
        self._remembered = lru_cache(maxsize=_REMEMBERED)(self._encode)

    def __call__(
        self, text: str, add_special_tokens: bool = False, split_special_tokens: bool = False
    ) -> dict[str, list[int]]:
        """Return `{"input_ids": ids}` as the tokenizer does for one text."""
        if self._backend is None or add_special_tokens:
            return self.text_tokenizer(
                text, add_special_tokens=add_special_tokens, split_special_tokens=split_special_tokens
            )
        encode = self._remembered if len(text) <= _SHORT else self._encode
        return {"input_ids": list(encode(text, split_special_tokens))}

    def _encode(self, text: str, split_special_tokens: bool) -> tuple[int, ...]:
        if self._backend.encode_special_tokens != split_special_tokens:
            self._backend.encode_special_tokens = split_special_tokens
        # Settings of the last call for somebody else, which go into the tokenizer's file too.
        if self._backend.truncation is not None:
            self._backend.no_truncation()
        if self._backend.padding is not None:
            self._backend.no_padding()
        (encoding,) = self._backend.encode_batch_fast([text], add_special_tokens=False)  # no offsets
        return tuple(encoding.ids)

    def convert_ids_to_tokens(self, ids: list[int]) -> list[str]:
        """Return the tokens of ids."""
        return self.text_tokenizer.convert_ids_to_tokens(ids)

"""Special tokens, documents of text and images, and packs of documents: the sequences the model reads.

A document is laid out as ``BEGIN part part ... END``. END is ``<|endoftext|>`` where the text tokenizer has
it, as Qwen's do, and else the tokenizer's own end token; BEGIN is the tokenizer's own begin token, or END if
it has none. So a LLaMA reads the ``<s> ... </s>`` that it knows. Text parts are their tokens. An image the
model reads stands between ``<|vision_start|>`` and ``<|vision_end|>``, one it has to generate between
``<|image_gen_start|>`` and ``<|image_gen_end|>``; in between, each of its P positions holds
``<|image_pad|>`` and its codes travel beside the tokens. Labels follow the transformers convention:
``labels[i]`` is the token at ``i``, to be predicted from the positions before it, or -100.

A model that reads continuous features has them in place of the codes of images it reads, or after them, as
UniToken does: codes, ``<|image_sep|>``, N times ``<|image_feature|>``, all between the same two marks. An
image it writes always has its codes and the separator, and features only if something follows it: while it is
written they do not exist. `ImageLayout` says which. Of images in tiles (`Tiles`) ``<|image_feature|>`` also
holds the places of the ends of rows, and as many as the image's size asks for.

Shapes: T tokens, V visual positions of a document or pack, P positions per image, Q codebooks (0 pixel, 1
semantic, if any), D quantizers, I images with features, N features per image, C their width, S pixels a side;
of images in tiles, F crops with N features each, m features that are read of them at M positions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from itertools import accumulate
from typing import Any

import numpy as np
import torch

from dualtoken.unified_model.tiles import Tiles, order_of_ordered

IGNORE_INDEX = -100
IMAGE_TAG = "<image>"
"""Marks the place of an image in a text that comes with images."""

SPECIAL: dict[str, str] = {
    "end_of_text": "<|endoftext|>",
    "vision_start": "<|vision_start|>",
    "vision_end": "<|vision_end|>",
    "image_pad": "<|image_pad|>",
    "image_gen_start": "<|image_gen_start|>",
    "image_gen_end": "<|image_gen_end|>",
}
"""Field of `SpecialTokens` -> the token's text. The first four are part of Qwen's tokenizer."""

FEATURE_SPECIAL: dict[str, str] = {
    "image_sep": "<|image_sep|>",
    "image_feature": "<|image_feature|>",
}
"""The same of the tokens that only models with continuous features need."""


@dataclass(frozen=True)
class SpecialTokens:
    """Ids of the special tokens, looked up by name in a text tokenizer."""

    end_of_text: int
    vision_start: int
    vision_end: int
    image_pad: int
    image_gen_start: int
    image_gen_end: int
    begin_of_text: int = -1
    """What opens a document; -1, and where saved without, for `end_of_text`."""
    image_sep: int = -1
    """What stands between codes and continuous features; -1, as the next, where the tokenizer lacks it."""
    image_feature: int = -1
    """What holds the place of a continuous feature."""

    def __post_init__(self) -> None:
        if self.begin_of_text < 0:
            object.__setattr__(self, "begin_of_text", self.end_of_text)

    @classmethod
    def from_tokenizer(cls, text_tokenizer: Any) -> SpecialTokens:
        """Look up the ids in a transformers tokenizer; ValueError names the tokens it lacks."""
        vocabulary = text_tokenizer.get_vocab()
        missing = _missing(text_tokenizer)
        if missing:
            raise ValueError(
                f"the text tokenizer lacks the special tokens {', '.join(missing)}; "
                "add them with dualtoken.unified_model.sequence.add_special_tokens(text_tokenizer) "
                "and save it again"
            )
        found = {field: vocabulary.get(token) for field, token in SPECIAL.items()}
        if found["end_of_text"] is None:
            found["end_of_text"] = text_tokenizer.eos_token_id
        begin = text_tokenizer.bos_token_id
        found |= {field: vocabulary.get(token, -1) for field, token in FEATURE_SPECIAL.items()}
        return cls(**found, begin_of_text=-1 if begin is None else begin)

    @property
    def has_features(self) -> bool:
        """Whether there are tokens for continuous features."""
        return self.image_sep >= 0 and self.image_feature >= 0

    def ids(self) -> set[int]:
        """Return the ids that there are, six to nine."""
        return {getattr(self, field.name) for field in fields(self)} - {-1}


def add_special_tokens(text_tokenizer: Any, features: bool = False) -> int:
    """Add those special tokens that the text tokenizer lacks and return how many were added.

    ``<|endoftext|>`` is not added where the tokenizer has an end token of its own, which the model knows.
    A model built for the tokenizer before has to be resized when the result is not zero.

    Args:
        text_tokenizer: a transformers tokenizer.
        features: also those that a model with continuous features needs.
    """
    from transformers import AddedToken

    missing = _missing(text_tokenizer)
    if features:
        vocabulary = text_tokenizer.get_vocab()
        missing += [token for token in FEATURE_SPECIAL.values() if token not in vocabulary]
    tokens = [AddedToken(token, special=True, normalized=False) for token in missing]
    return text_tokenizer.add_tokens(tokens, special_tokens=True) if tokens else 0


def _missing(text_tokenizer: Any) -> list[str]:
    vocabulary = text_tokenizer.get_vocab()
    has_end = text_tokenizer.eos_token_id is not None
    needed = [token for field, token in SPECIAL.items() if field != "end_of_text" or not has_end]
    return [token for token in needed if token not in vocabulary]


@dataclass
class TextPart:
    """A stretch of text; `loss` says whether the model learns to write it.

    Special tokens spelled out in the text are ordinary characters, unless `markup` is set: then the
    tokenizer's own marks (the chat template's turn marks, say) count, and only those of `SPECIAL` and
    `FEATURE_SPECIAL` are refused.
    """

    text: str
    loss: bool = True
    markup: bool = False


@dataclass(frozen=True)
class ImageLayout:
    """What stands in the sequence for an image, as the model was built to read it."""

    codes: bool = True
    """Whether an image that is read has its codes; one that is written always has."""
    features: int = 0
    """Continuous features per image, N, or per crop of one; 0 without."""
    tiles: Tiles | None = None
    """How images are cut; None where the whole image is all that features are of."""

    @property
    def most_positions(self) -> int:
        """Positions of features that an image takes at most, ends of rows among them."""
        return len(self.tiles.order(self.tiles.largest, self.features)) if self.tiles else self.features


@dataclass
class ImagePart:
    """An image; `loss` says whether the model learns to generate it.

    `codes` are integers [P, Q, D]; None where the model reads only features of it. `features` are floats
    [N, C], or the image itself as uint8 [3, S, S], of which a vision tower in the model makes them; a layout
    without features leaves them alone. For a layout with tiles they are floats [m, C] (`tiles.in_order`), or
    the crops as uint8 [F, 3, S, S], and `size` is the image's height and width before it was resized.
    """

    codes: np.ndarray | torch.Tensor | None
    loss: bool = False
    features: torch.Tensor | None = None
    size: tuple[int, int] | None = None


def require_image_codes(codes: Any, expected: tuple[int, int, int], index: int) -> None:
    """Raise ValueError unless the codes of image `index` have the model's shape [P, Q, D]."""
    if tuple(codes.shape) != expected:
        raise ValueError(
            f"codes of image {index} have shape {tuple(codes.shape)}, expected {expected} "
            "(positions, codebooks, depths); they come from another visual tokenizer or image size"
        )


@dataclass
class Document:
    """Ordered text and image parts that attend to each other and to nothing else."""

    parts: list[TextPart | ImagePart]
    key: str = ""


@dataclass
class TokenizedDocument:
    """A document as tokens and codes.

    `input_ids` int64 [T]; `codes` [V, Q, D] in the order of the image-pad positions, in the integer type
    they came in ([0, 2, 0] without images); `labels` int64 [T]; `visual_loss_mask` bool [V]; `features`
    [I, N, C] or uint8 [I, 3, S, S] in the order of the images that have them, None without. Of images in
    tiles, `features` [m, C] or uint8 [F, 3, S, S] of all of them, and `feature_order` int64 [M, 2], at each
    position the crop (or feature) and the place in it, crop -1 for the end of a row.
    """

    input_ids: torch.Tensor
    codes: torch.Tensor
    labels: torch.Tensor
    visual_loss_mask: torch.Tensor
    key: str = ""
    features: torch.Tensor | None = None
    feature_order: torch.Tensor | None = None

    def __len__(self) -> int:
        return self.input_ids.shape[0]


def tokenize_document(
    document: Document,
    text_tokenizer: Any,
    special: SpecialTokens,
    end: bool = True,
    layout: ImageLayout | None = None,
) -> TokenizedDocument:
    """Lay a document out as tokens, codes, features and labels.

    Targets are the tokens of text parts with loss, ``<|image_gen_start|>`` and ``<|image_sep|>`` of images
    with loss, and the closing END if the last part has loss; an END that the last part spells out is not
    repeated. The token that closes an image is forced when generating, so it is never a target.

    Args:
        document: the parts, in order.
        text_tokenizer: a transformers tokenizer that knows the special tokens.
        special: their ids.
        end: whether to close the document; a prompt to be continued is left open.
        layout: what stands for an image (`DualTokenConfig.image_layout`); its codes by default.

    Raises:
        ValueError: on codes that are not [P, Q, D] or differ in shape between the images of the document, on
            features likewise, or on an image that lacks what the layout asks for.
    """
    builder = _Builder(text_tokenizer, special, layout or ImageLayout())
    builder.add(special.begin_of_text, loss=False)
    for index, part in enumerate(document.parts):
        if isinstance(part, TextPart):
            builder.add_text(part, document.key)
        elif isinstance(part, ImagePart):
            builder.add_image(part, document.key, followed=not end or index + 1 < len(document.parts))
        else:
            raise ValueError(
                f"document {document.key!r}: a part is a {type(part).__name__}, "
                "expected TextPart or ImagePart"
            )
    if end and not (builder.length > 1 and builder.last == special.end_of_text):
        builder.add(special.end_of_text, loss=bool(document.parts) and document.parts[-1].loss)
    return builder.build(document.key)


class _Builder:
    """Collects the tokens, labels, codes and features of one document, for `build` to make arrays of."""

    def __init__(self, text_tokenizer: Any, special: SpecialTokens, layout: ImageLayout) -> None:
        self.text_tokenizer = text_tokenizer
        self.special = special
        self.layout = layout
        self.features: list[tuple[torch.Tensor, torch.Tensor | None]] = []
        self.codes: list[torch.Tensor] = []
        self.length = 0
        self._runs: list[tuple[int | list[int], int, bool]] = []  # tokens, or one so many times; loss
        self._image_loss: list[bool] = []  # of the images with codes

    @property
    def last(self) -> int:
        tokens = self._runs[-1][0]
        return tokens if isinstance(tokens, int) else tokens[-1]

    def add(self, token: int, loss: bool, times: int = 1) -> None:
        self._runs.append((token, times, loss))
        self.length += times

    def add_text(self, part: TextPart, key: str) -> None:
        if not part.text:
            return
        ids = self.text_tokenizer(part.text, add_special_tokens=False, split_special_tokens=not part.markup)[
            "input_ids"
        ]
        if part.markup:
            self._require_own_marks(ids, key)
        if ids:
            self._runs.append((ids, len(ids), part.loss))
            self.length += len(ids)

    def _require_own_marks(self, ids: list[int], key: str) -> None:
        found = sorted(self.special.ids().intersection(ids))
        # A tokenizer's own end token may end the turns of a chat, as Vicuna's do.
        placed = {*SPECIAL.values(), *FEATURE_SPECIAL.values()}
        names = [n for n in self.text_tokenizer.convert_ids_to_tokens(found) if n in placed]
        if names:
            raise ValueError(
                f"document {key!r}: the text spells out {', '.join(names)}, which only the layout may place; "
                "put images in as ImagePart"
            )

    def add_image(self, part: ImagePart, key: str, followed: bool) -> None:
        special, layout = self.special, self.layout
        start, stop = special.vision_start, special.vision_end
        if part.loss:
            start, stop = special.image_gen_start, special.image_gen_end
        self.add(start, loss=part.loss)
        if part.loss or layout.codes:
            self.add_codes(part, key)
            if layout.features:
                self.add(special.image_sep, loss=part.loss)
        if layout.features and (followed or not part.loss):
            self.add_features(part, key)
        self.add(stop, loss=False)

    def add_codes(self, part: ImagePart, key: str) -> None:
        if part.codes is None:
            raise ValueError(
                f"document {key!r}: an image has no codes, expected [positions, codebooks, quantizers]; "
                "encode it with the visual tokenizer"
            )
        # Several times as fast as `as_tensor`, which a stream of documents feels.
        is_array = isinstance(part.codes, np.ndarray)
        codes = torch.from_numpy(part.codes) if is_array else torch.as_tensor(part.codes)
        if codes.dim() != 3 or 0 in codes.shape:
            raise ValueError(
                f"document {key!r}: codes of an image have shape {tuple(codes.shape)}, expected "
                "[positions, codebooks, quantizers]"
            )
        if codes.is_floating_point():
            raise ValueError(f"document {key!r}: codes are {codes.dtype}, expected integers")
        if self.codes and codes.shape != self.codes[0].shape:
            raise ValueError(
                f"document {key!r}: images of one document have codes of shapes "
                f"{tuple(self.codes[0].shape)} and {tuple(codes.shape)}; "
                "tokenize all images with one visual tokenizer"
            )
        self.add(self.special.image_pad, loss=False, times=codes.shape[0])
        self.codes.append(codes)
        self._image_loss.append(part.loss)

    def add_features(self, part: ImagePart, key: str) -> None:
        features, order = image_features(part, self.layout, key)
        first = self.features[0][0] if self.features else features
        if (features.shape[1:], features.dtype) != (first.shape[1:], first.dtype):
            raise ValueError(
                f"document {key!r}: images of one document have features of shapes {tuple(first.shape[1:])} "
                f"and {tuple(features.shape[1:])}, types {first.dtype} and {features.dtype}; make those of "
                "all with one vision tower"
            )
        positions = self.layout.features if order is None else len(order)
        self.add(self.special.image_feature, loss=False, times=positions)
        self.features.append((features, order))

    def build(self, key: str) -> TokenizedDocument:
        input_ids = np.empty(self.length, np.int64)
        labels = np.full(self.length, IGNORE_INDEX, np.int64)
        start = 0
        for tokens, count, loss in self._runs:
            stop = start + count
            input_ids[start:stop] = tokens
            if loss:
                labels[start:stop] = input_ids[start:stop]
            start = stop
        if len(self.codes) == 1:
            codes = self.codes[0]
        else:
            codes = torch.cat(self.codes) if self.codes else torch.zeros(0, 2, 0, dtype=torch.int64)
        visual_loss = np.empty(codes.shape[0], bool)
        for index, loss in enumerate(self._image_loss):
            positions = self.codes[index].shape[0]
            visual_loss[index * positions : (index + 1) * positions] = loss
        features, order = join_features(self.features)
        return TokenizedDocument(
            input_ids=torch.from_numpy(input_ids),
            codes=codes,
            labels=torch.from_numpy(labels),
            visual_loss_mask=torch.from_numpy(visual_loss),
            key=key,
            features=features,
            feature_order=order,
        )


def image_features(
    part: ImagePart, layout: ImageLayout, key: str = ""
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Return what stands for an image's continuous features, and their order if it is in tiles.

    Args:
        part: the image.
        layout: one with features.
        key: of its document, for messages.

    Returns:
        `features` and `feature_order` as of `TokenizedDocument`, of this image alone.

    Raises:
        ValueError: the image lacks what the layout asks for, or has it in another shape.
    """
    features, tiles = part.features, layout.tiles
    if features is None:
        raise ValueError(
            f"document {key!r}: an image has no continuous features, which the model reads; pretokenize "
            "with --features, or give the image itself to a model with a vision tower"
        )
    are_pixels, order, shape = features.dtype == torch.uint8, None, tuple(features.shape)
    if tiles is None:
        fits = len(shape) == 3 if are_pixels else shape[:-1] == (layout.features,)
        expected = f"floats [{layout.features}, width] or pixels uint8 [3, size, size]"
    else:
        if part.size is None:
            raise ValueError(
                f"document {key!r}: an image has no size, which tells a model of tiles how it was cut; give "
                "ImagePart the height and width that it had before"
            )
        order = tiles.order(part.size, layout.features)
        crops, read = tiles.crops(part.size), int((order[:, 0] >= 0).sum())
        fits = len(shape) == 4 and shape[0] == crops if are_pixels else shape[:-1] == (read,)
        expected = f"floats [{read}, width] or pixels uint8 [{crops}, 3, size, size] at size {part.size}"
        order = order if are_pixels else order_of_ordered(order)
    if not fits:
        raise ValueError(
            f"document {key!r}: features of an image have shape {shape} and type {features.dtype}, expected "
            f"{expected}"
        )
    return (features[None] if tiles is None else features), order


def join_features(
    given: Sequence[tuple[torch.Tensor, torch.Tensor | None]],
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """Put `features` and `feature_order` (as of `TokenizedDocument`) of several after each other."""
    if not given:
        return None, None
    starts = accumulate((len(features) for features, _ in given), initial=0)
    orders = [_moved(order, start) for (_, order), start in zip(given, starts) if order is not None]
    return torch.cat([features for features, _ in given]), torch.cat(orders) if orders else None


def features_in_order(
    features: torch.Tensor, order: torch.Tensor
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """Return those features that a part of their order needs, and the order of them alone."""
    crops = order[order[:, 0] >= 0, 0]
    if not len(crops):
        return None, None
    first, last = int(crops.min()), int(crops.max())
    return features[first : last + 1], _moved(order, -first)


def _moved(order: torch.Tensor, by: int) -> torch.Tensor:
    """Count an order's crops from another one on."""
    crops, places = order.unbind(1)
    return torch.stack([torch.where(crops < 0, crops, crops + by), places], dim=1)


@dataclass
class PackedBatch:
    """Several documents in one row; attention stays within a document.

    `input_ids`, `position_ids` (restarting per document) and `labels` int64 [1, T]; `cu_seqlens` int32 [n +
    1], the borders of the n documents, the padding being the last of them; `max_seqlen` the longest;
    `codes` int64 [V, Q, D]; `visual_loss_mask` bool [V]; `keys` of the documents; `padding` the number of
    padding tokens; `features` and `feature_order` as of `TokenizedDocument`, of all documents.
    """

    input_ids: torch.Tensor
    position_ids: torch.Tensor
    cu_seqlens: torch.Tensor
    max_seqlen: int
    labels: torch.Tensor
    codes: torch.Tensor
    visual_loss_mask: torch.Tensor
    keys: list[str]
    padding: int = 0
    features: torch.Tensor | None = None
    feature_order: torch.Tensor | None = None

    def to(self, device: torch.device | str, non_blocking: bool = False) -> PackedBatch:
        """Return the batch on a device."""
        return self._map(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> PackedBatch:
        """Return the batch in page-locked memory."""
        return self._map(torch.Tensor.pin_memory)

    def model_inputs(self) -> dict[str, Any]:
        """Return the arguments of `DualTokenForCausalLM.forward`."""
        inputs = {field.name: getattr(self, field.name) for field in fields(self)}
        return {n: v for n, v in inputs.items() if v is not None and n not in ("keys", "padding")}

    def _map(self, function: Any) -> PackedBatch:
        tensors = {f.name: getattr(self, f.name) for f in fields(self)}
        return replace(self, **{n: function(v) for n, v in tensors.items() if isinstance(v, torch.Tensor)})


def pack_documents(documents: Sequence[TokenizedDocument], context_length: int | None = None) -> PackedBatch:
    """Pack documents into one row, padded to `context_length` by a document of its own without targets.

    Without `context_length` nothing is padded. ValueError if there is no document, if they do not fit, or
    if their images have codes of different depth or features of different shape or type.
    """
    if not documents:
        raise ValueError("cannot pack an empty list of documents")
    lengths = [len(document) for document in documents]
    total = sum(lengths)
    padding = 0 if context_length is None else context_length - total
    if padding < 0:
        raise ValueError(
            f"{len(documents)} documents of together {total} tokens do not fit the context of "
            f"{context_length}; pack fewer, split the longest or raise context_length"
        )
    codes = [document.codes for document in documents if document.codes.shape[0]]
    depths = {given.shape[1:] for given in codes}
    if len(depths) > 1:
        raise ValueError(
            f"codes of different shapes {sorted(map(tuple, depths))} in one pack; "
            "tokenize all images with one visual tokenizer"
        )
    if len({given.dtype for given in codes}) > 1:
        codes = [given.to(torch.int64) for given in codes]
    seen = [(one.features, one.feature_order) for one in documents if one.features is not None]
    kinds = {(tuple(given.shape[1:]), str(given.dtype)) for given, _ in seen}
    if len(kinds) > 1:
        raise ValueError(
            f"features of different shapes and types {sorted(kinds)} in one pack; "
            "make those of all images with one vision tower"
        )
    features, order = join_features(seen)
    input_ids = [document.input_ids for document in documents]
    labels = [document.labels for document in documents]
    if padding:
        lengths.append(padding)
        input_ids.append(torch.full((padding,), int(documents[0].input_ids[0])))
        labels.append(torch.full((padding,), IGNORE_INDEX))
    longest = max(lengths)
    counting = np.arange(longest)
    positions = np.concatenate([counting[:length] for length in lengths])
    return PackedBatch(
        input_ids=torch.cat(input_ids)[None],
        position_ids=torch.from_numpy(positions)[None],
        cu_seqlens=torch.from_numpy(np.array([0, *accumulate(lengths)], np.int32)),
        max_seqlen=longest,
        labels=torch.cat(labels)[None],
        codes=torch.cat(codes).to(torch.int64) if codes else torch.zeros(0, 2, 0, dtype=torch.int64),
        visual_loss_mask=torch.cat([document.visual_loss_mask for document in documents]),
        keys=[document.key for document in documents],
        padding=padding,
        features=features,
        feature_order=order,
    )

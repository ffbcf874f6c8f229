"""Layout of documents as tokens, codes and labels, and their packing."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dualtoken.unified_model.sequence import (
    SPECIAL,
    Document,
    ImagePart,
    SpecialTokens,
    TextPart,
    add_special_tokens,
    pack_documents,
    tokenize_document,
)
from tests.support.unified_support import IDS, TOKENIZER, byte_tokenizer, llama_tokenizer


def image(positions=4, depth=3, start=0, dtype=np.uint16):
    return np.arange(start, start + positions * 2 * depth).reshape(positions, 2, depth).astype(dtype)


def text_ids(text):
    return TOKENIZER(text, add_special_tokens=False)["input_ids"]


def test_special_tokens_are_added_once_and_missing_ones_are_named():
    text_tokenizer = byte_tokenizer(special=False)
    with pytest.raises(ValueError, match=r"lacks .*<\|endoftext\|>.*<\|image_gen_end\|>.*add_special_tokens"):
        SpecialTokens.from_tokenizer(text_tokenizer)
    assert add_special_tokens(text_tokenizer) == len(SPECIAL) == 6
    assert add_special_tokens(text_tokenizer) == 0
    ids = SpecialTokens.from_tokenizer(text_tokenizer)
    assert text_tokenizer.convert_tokens_to_ids("<|image_gen_end|>") == ids.image_gen_end
    assert len(ids.ids()) == 6


def test_layout_of_a_caption_document():
    parts = [ImagePart(image()), TextPart("Say:", loss=False), TextPart(" cat")]
    document = tokenize_document(Document(parts, "k"), TOKENIZER, IDS)
    say, cat = text_ids("Say:"), text_ids(" cat")
    eot = IDS.end_of_text
    expected = [eot, IDS.vision_start, *[IDS.image_pad] * 4, IDS.vision_end, *say, *cat, eot]
    assert document.input_ids.tolist() == expected
    assert document.labels.tolist() == [-100] * (7 + len(say)) + [*cat, eot]
    assert document.codes.dtype == torch.uint16 and document.codes.tolist() == image().tolist()
    assert document.visual_loss_mask.tolist() == [False] * 4
    assert document.key == "k" and len(document) == len(expected)


def test_layout_of_a_generation_document():
    parts = [TextPart("cat", loss=False), ImagePart(image(), loss=True)]
    document = tokenize_document(Document(parts), TOKENIZER, IDS)
    cat, eot = text_ids("cat"), IDS.end_of_text
    assert document.input_ids.tolist() == [
        eot, *cat, IDS.image_gen_start, *[IDS.image_pad] * 4, IDS.image_gen_end, eot,
    ]  # fmt: skip
    assert document.labels.tolist() == [
        -100, *[-100] * len(cat), IDS.image_gen_start, *[-100] * 4, -100, eot,
    ]  # fmt: skip
    assert document.visual_loss_mask.all() and len(document.visual_loss_mask) == 4


def test_a_document_without_loss_at_its_end_has_no_target_there():
    document = tokenize_document(Document([TextPart("a"), TextPart("b", loss=False)]), TOKENIZER, IDS)
    assert document.labels.tolist() == [-100, *text_ids("a"), -100, -100]
    assert document.codes.shape == (0, 2, 0)
    opened = tokenize_document(Document([TextPart("a")]), TOKENIZER, IDS, end=False)
    assert opened.input_ids.tolist() == [IDS.end_of_text, *text_ids("a")]


def test_text_cannot_smuggle_in_special_tokens():
    spelled = "x<|image_pad|><|endoftext|>"
    document = tokenize_document(Document([TextPart(spelled)]), TOKENIZER, IDS)
    assert not IDS.ids() & set(document.input_ids[1:-1].tolist())
    assert TOKENIZER.decode(document.input_ids[1:-1]) == spelled
    with pytest.raises(ValueError, match=r"spells out .*<\|image_pad\|>.*ImagePart"):
        tokenize_document(Document([TextPart(spelled, markup=True)]), TOKENIZER, IDS)


def test_markup_reads_the_tokenizers_own_marks():
    text_tokenizer = byte_tokenizer()
    text_tokenizer.add_special_tokens({"eos_token": "<|im_end|>"})
    mark = text_tokenizer.convert_tokens_to_ids("<|im_end|>")
    ids = SpecialTokens.from_tokenizer(text_tokenizer)
    plain = tokenize_document(Document([TextPart("<|im_end|>")]), text_tokenizer, ids)
    marked = tokenize_document(Document([TextPart("<|im_end|>", markup=True)]), text_tokenizer, ids)
    assert mark not in plain.input_ids.tolist()
    assert marked.input_ids.tolist()[1:-1] == [mark]


def test_a_llama_reads_its_own_begin_and_end():
    text_tokenizer = llama_tokenizer()
    assert add_special_tokens(text_tokenizer) == 5 and add_special_tokens(text_tokenizer) == 0
    assert "<|endoftext|>" not in text_tokenizer.get_vocab()
    special = SpecialTokens.from_tokenizer(text_tokenizer)
    begin, end = text_tokenizer.bos_token_id, text_tokenizer.eos_token_id
    assert (special.begin_of_text, special.end_of_text) == (begin, end) and len(special.ids()) == 7
    cat = text_ids("cat")
    document = tokenize_document(Document([TextPart("cat")]), text_tokenizer, special)
    assert document.input_ids.tolist() == [begin, *cat, end]
    assert document.labels.tolist() == [-100, *cat, end]
    # Vicuna's turns end with the same token: the last of them ends the document.
    turns = [TextPart("Q", loss=False), TextPart("cat"), TextPart("</s>", markup=True)]
    document = tokenize_document(Document(turns * 2), text_tokenizer, special)
    turn = [*text_ids("Q"), *cat, end]
    assert document.input_ids.tolist() == [begin, *turn, *turn]
    assert document.labels.tolist() == [-100, *([-100, *cat, end] * 2)]
    opened = tokenize_document(Document([]), text_tokenizer, special, end=False)
    assert opened.input_ids.tolist() == [begin]
    with pytest.raises(ValueError, match=r"spells out <\|image_pad\|>, which"):
        tokenize_document(Document([TextPart("<|image_pad|></s>", markup=True)]), text_tokenizer, special)


def test_a_qwen_keeps_its_end_of_text_whatever_its_eos_is():
    """Qwen2.5 has no begin token; its base model's end token is `<|endoftext|>`, the chat model's not."""
    for eos in ("<|endoftext|>", "<|im_end|>"):
        text_tokenizer = byte_tokenizer()
        text_tokenizer.add_special_tokens({"eos_token": eos})
        special = SpecialTokens.from_tokenizer(text_tokenizer)
        assert special == IDS and special.begin_of_text == special.end_of_text
        empty = tokenize_document(Document([]), text_tokenizer, special)
        assert empty.input_ids.tolist() == [IDS.end_of_text] * 2


@pytest.mark.parametrize(
    "parts, message",
    [
        (
            [ImagePart(np.zeros((4, 3), np.uint16))],
            r"shape \(4, 3\), expected \[positions, codebooks, quantizers",
        ),
        ([ImagePart(np.zeros((4, 2, 3), np.float32))], "float32, expected integers"),
        ([ImagePart(image(4)), ImagePart(image(5))], r"\(4, 2, 3\) and \(5, 2, 3\)"),
        (["text"], "a part is a str, expected TextPart or ImagePart"),
    ],
)
def test_wrong_parts_are_named(parts, message):
    with pytest.raises(ValueError, match=message):
        tokenize_document(Document(parts, "k"), TOKENIZER, IDS)


def test_pack_keeps_documents_apart_and_pads_with_one_of_its_own():
    documents = [
        tokenize_document(Document([TextPart("cat", loss=False), ImagePart(image(), loss=True)], "a"),
                          TOKENIZER, IDS),
        tokenize_document(Document([TextPart("dog")], "b"), TOKENIZER, IDS),
        tokenize_document(Document([ImagePart(image(start=50)), TextPart("x")], "c"), TOKENIZER, IDS),
    ]  # fmt: skip
    total = sum(map(len, documents))
    pack = pack_documents(documents, total + 7)
    assert pack.input_ids.shape == pack.labels.shape == pack.position_ids.shape == (1, total + 7)
    assert pack.padding == 7 and pack.keys == ["a", "b", "c"]
    borders = pack.cu_seqlens.tolist()
    assert borders == [0, *np.cumsum([*map(len, documents), 7])] and pack.cu_seqlens.dtype == torch.int32
    assert pack.max_seqlen == max([*map(len, documents), 7])
    for document, start, stop in zip(documents, borders, borders[1:], strict=False):
        assert torch.equal(pack.input_ids[0, start:stop], document.input_ids)
        assert torch.equal(pack.labels[0, start:stop], document.labels)
        assert pack.position_ids[0, start:stop].tolist() == list(range(len(document)))
    assert (pack.labels[0, total:] == -100).all() and pack.position_ids[0, total:].tolist() == list(range(7))
    assert pack.codes.dtype == torch.int64
    assert pack.codes.tolist() == [*image().tolist(), *image(start=50).tolist()]
    assert pack.visual_loss_mask.tolist() == [True] * 4 + [False] * 4
    assert (pack.input_ids == IDS.image_pad).sum() == len(pack.codes)
    assert set(pack.model_inputs()) == {
        "input_ids", "position_ids", "cu_seqlens", "max_seqlen", "labels", "codes", "visual_loss_mask",
    }  # fmt: skip


def test_pack_errors():
    text = tokenize_document(Document([TextPart("dog")]), TOKENIZER, IDS)
    with pytest.raises(ValueError, match="together 10 tokens do not fit the context of 9"):
        pack_documents([text, text], 9)
    with pytest.raises(ValueError, match="empty list"):
        pack_documents([], 9)
    shallow = tokenize_document(Document([ImagePart(image(depth=2))]), TOKENIZER, IDS)
    deep = tokenize_document(Document([ImagePart(image(depth=3))]), TOKENIZER, IDS)
    with pytest.raises(ValueError, match=r"different shapes \[\(2, 2\), \(2, 3\)\]"):
        pack_documents([shallow, deep], 100)


def test_pack_moves_between_devices():
    pack = pack_documents([tokenize_document(Document([ImagePart(image())], "k"), TOKENIZER, IDS)])
    moved = pack.to("meta")
    assert moved.codes.is_meta and moved.input_ids.is_meta and moved.keys == ["k"] and moved.padding == 0
    assert not pack.codes.is_meta


part = st.one_of(
    st.builds(TextPart, st.text(max_size=12), st.booleans()),
    st.builds(lambda start, loss: ImagePart(image(2, 1, start), loss), st.integers(0, 60_000), st.booleans()),
)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.lists(part, max_size=4), min_size=1, max_size=4), st.integers(0, 9))
def test_packing_loses_nothing(documents, room):
    tokenized = [
        tokenize_document(Document(parts, str(i)), TOKENIZER, IDS) for i, parts in enumerate(documents)
    ]
    pack = pack_documents(tokenized, sum(map(len, tokenized)) + room)
    assert pack.padding == room
    assert pack.input_ids[0, : pack.input_ids.shape[1] - room].tolist() == [
        token for document in tokenized for token in document.input_ids.tolist()
    ]
    codes = [p.codes for parts in documents for p in parts if isinstance(p, ImagePart)]
    assert len(pack.codes) == 2 * len(codes) == int((pack.input_ids == IDS.image_pad).sum())
    if codes:
        assert pack.codes.tolist() == np.concatenate(codes).tolist()
    texts = ["".join(p.text for p in parts if isinstance(p, TextPart)) for parts in documents]
    for text, document in zip(texts, tokenized, strict=True):
        kept = [t for t in document.input_ids.tolist() if t not in IDS.ids()]
        assert TOKENIZER.decode(kept) == text

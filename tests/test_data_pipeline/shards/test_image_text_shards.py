"""What a sample says: captions, a conversation, both."""

import json

import pytest

from data_pipeline.shards.conversations import conversation_parts
from data_pipeline.shards.image_text_shards import (
    BadSampleError,
    SourceSettings,
    image_parts,
    read_captions,
    read_sample,
    read_shard,
)
from tests.test_data_pipeline.streams.test_streams import write_tar

TALK = [
    {"from": "human", "value": "<image>\nWhat is it?"},
    {"from": "gpt", "value": "An egg."},
]
CAPTIONS = {"en": "an egg", "de": "ein Ei"}


def sample(record, images=("png",), **more):
    parts = {name: b"picture" for name in images} | {name: text.encode() for name, text in more.items()}
    return {**parts, "json": json.dumps(record).encode()}


def test_captions_stay_beside_a_conversation_about_one_image():
    read = read_sample("k", sample({"conversations": TALK, "captions": CAPTIONS}))
    assert read.captions == CAPTIONS
    assert read.parts == conversation_parts(TALK, 1) and read.images == [b"picture"]


@pytest.mark.parametrize(
    ("more", "text", "expected"),
    [
        ({"caption": "an egg"}, {}, {"nl": "an egg"}),
        ({}, {"txt": " an egg\n"}, {"nl": "an egg"}),
        ({}, {"txt": "\ufeffan egg\r\n"}, {"nl": "an egg"}),  # as Windows marks UTF-8
        ({"captions": {"en": " ", "de": "ein Ei"}}, {}, {"de": "ein Ei"}),
        ({"captions": {"en": "\n"}}, {}, None),
        ({"captions": {}}, {}, None),
        ({}, {}, None),
    ],
)
def test_in_whatever_form_captions_stand(more, text, expected):
    settings = SourceSettings(default_language="nl")
    read = read_sample("k", sample({"conversations": TALK, **more}, **text), settings)
    assert read.captions == expected and read.parts == conversation_parts(TALK, 1)


def test_captions_stay_beside_a_document_about_one_image():
    document = [{"text": "Look: ", "loss": True}, {"image": 0, "loss": False}]
    read = read_sample("k", sample({"parts": document, "captions": CAPTIONS}))
    assert read.parts == document and read.captions == CAPTIONS
    assert read_sample("k", sample({"parts": document})).captions is None


def test_captions_of_no_or_several_images_belong_to_none_of_them():
    words = [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]
    read = read_sample("k", sample({"conversations": words, "captions": CAPTIONS}, images=()))
    assert read.captions is None and read.images == []
    two = [{"from": "human", "value": "<image><image>\nSame?"}, {"from": "gpt", "value": "No."}]
    read = read_sample("k", sample({"conversations": two, "captions": CAPTIONS}, images=("0.png", "1.png")))
    assert read.captions is None and len(read.images) == 2


def test_a_pair_reads_as_before():
    read = read_sample("k", sample({"captions": CAPTIONS}))
    assert read.parts == [{"image": 0, "loss": False}, {"text": "an egg"}] and read.captions == CAPTIONS


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"conversations": TALK, "captions": ["an egg"]}, r"captions are \['an egg'\], expected an object"),
        ({"conversations": TALK, "captions": {"en": 5}}, r"captions are \{'en': 5\}, expected an object"),
        ({"conversations": TALK[:1], "captions": CAPTIONS}, "the conversation ends without an answer"),
        ({"captions": {"en": " "}}, "^no caption$"),
        ({"conversations": [{"from": ["human"], "value": "Hi"}]}, "turn 1 is .*, expected"),
    ],
)
def test_what_cannot_be_read_is_named(record, message):
    with pytest.raises(BadSampleError, match=message):
        read_sample("k", sample(record))


def test_json_of_very_many_levels_costs_its_sample_only():
    parts = {"png": b"picture", "json": b"[" * 200_000}
    with pytest.raises(BadSampleError, match="json cannot be read: .*recursion"):
        read_sample("k", parts)
    with pytest.raises(BadSampleError, match="caption cannot be read: .*recursion"):
        read_captions(parts, "en")


def test_images_of_different_formats_are_in_the_order_of_their_numbers():
    names = ["10.png", "1.jpg", "2.webp", "0.jpeg"]
    parts = {name: name.encode() for name in names} | {"json": b'{"parts": []}'}
    assert image_parts(parts) == ["0.jpeg", "1.jpg", "2.webp", "10.png"]
    document = [{"image": 3}, {"text": "of"}, {"image": 0}, {"image": 1}, {"image": 2}]
    read = read_sample("k", {**parts, "json": json.dumps({"parts": document}).encode()})
    assert read.images == [b"0.jpeg", b"1.jpg", b"2.webp", b"10.png"]


def test_names_in_capitals_say_the_same(tmp_path):
    write_tar(
        tmp_path / "a.tar", [("DSC_1.JPG", b"1"), ("DSC_1.TXT", b"one"), ("b.1.PNG", b"2"), ("b.JSON", b"{")]
    )
    (key, parts), (_, other) = read_shard(str(tmp_path / "a.tar"))
    assert (key, parts) == ("DSC_1", {"jpg": b"1", "txt": b"one"}) and other.keys() == {"1.png", "json"}
    assert read_sample(key, parts).captions == {"en": "one"}

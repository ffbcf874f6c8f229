"""Sets of pictures: what lies there is recognised, read once a batch, the same for any number of ranks."""

import pytest
import torch
from torchvision import transforms

from eval.inputs import load_pictures
from eval.visual_tokenizer.batches import CentreCropDecoder, Share, build_decoder, iterate_batches, read_batch
from eval.visual_tokenizer.pictures import open_pictures
from tests.test_eval.visual_tokenizer.conftest import picture, write_shard


def test_class_folders_give_labels_by_their_sorted_names(classes):
    found = open_pictures(classes)
    assert found.kind == "folder of classes"
    assert found.classes == ("black", "blue", "green", "orange", "red", "yellow")
    assert len(found) == 11
    assert {one.key: one.label for one in found.pictures}["red/00.png"] == 4
    assert found.with_labels() is found


def test_pictures_beside_class_folders_have_no_labels(tmp_path):
    (tmp_path / "deep" / "er").mkdir(parents=True)
    for name in ("b.png", "deep/er/a.JPG", ".hidden.png"):
        picture(0).save(tmp_path / name, "PNG")
    found = open_pictures(tmp_path)
    assert [one.key for one in found.pictures] == ["b.png", "deep/er/a.JPG"]
    with pytest.raises(
        ValueError, match=r"pictures outside class folders; expected one folder for each class"
    ):
        found.with_labels()
    with pytest.raises(ValueError, match=r"has no captions; expected shards .* or Karpathy's dataset_"):
        found.with_captions("en")


def test_shards_give_labels_and_captions(tmp_path):
    write_shard(
        tmp_path / "a.tar", [("x", {"cls": "2", "txt": "one\n two \n\n"}), ("y", {"cls": "0", "txt": "red"})]
    )
    write_shard(
        tmp_path / "b.tar",
        [
            ("x", {"json": {"label": 1, "captions": ["p", "q"]}}),
            ("z", {"json": {"label": 3, "captions": {"en": "r"}}}),
        ],
    )
    found = open_pictures(tmp_path)
    assert [one.key for one in found.pictures] == ["a/x", "a/y", "b/x", "b/z"]
    assert [one.label for one in found.with_labels().pictures] == [2, 0, 1, 3]
    assert [one.captions for one in found.with_captions("en").pictures] == [
        ("one", "two"), ("red",), ("p", "q"), ("r",),
    ]  # fmt: skip
    with pytest.raises(ValueError, match=r"b.tar, b/z: captions in \['en'\], none in 'de'"):
        found.with_captions("de")
    images = read_batch(found, [1], build_decoder(16, "square"))
    (tmp_path / "y.png").parent.mkdir(exist_ok=True)
    picture(1).save(tmp_path / "y.png")
    torch.testing.assert_close(
        images[0], build_decoder(16, "square")([(tmp_path / "y.png").read_bytes()]).images[0]
    )


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ({"cls": "cat"}, "a.tar, k: its class is 'cat'; expected cls, or label in json, a number from 0"),
        ({"txt": "x"}, "a.tar, k: its class is None"),
        ({"json": "{"}, "a.tar, k: its json cannot be read"),
    ],
)
def test_bad_labels_are_named(tmp_path, parts, message):
    with pytest.raises(ValueError, match=message):
        open_pictures(write_shard(tmp_path / "a.tar", [("k", parts)])).with_labels()


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ({"cls": "1"}, "a.tar, k: its captions are None; expected text"),
        ({"txt": "\n"}, "a.tar, k: no caption; expected txt, or json"),
        ({"json": {"captions": [1]}}, r"a.tar, k: its captions are \[1\]; expected text"),
    ],
)
def test_bad_captions_are_named(tmp_path, parts, message):
    with pytest.raises(ValueError, match=message):
        open_pictures(write_shard(tmp_path / "a.tar", [("k", parts)])).with_captions("en")


def test_folders_that_are_not_clear_are_refused(tmp_path, classes):
    with pytest.raises(
        ValueError, match=r"no folder .*; expected a folder of pictures, or of WebDataset shards"
    ):
        open_pictures(tmp_path / "nothing")
    with pytest.raises(ValueError, match=r"holds neither; expected pictures \(bmp, jpeg, .*\) or WebDataset"):
        open_pictures(tmp_path)
    write_shard(tmp_path / "a.tar", [("k", {})])
    picture(0).save(tmp_path / "b.png")
    with pytest.raises(ValueError, match=r"holds both shards \(a.tar\) and pictures \(b.png\)"):
        open_pictures(tmp_path)
    (tmp_path / "b.png").unlink()
    whole = (tmp_path / "a.tar").read_bytes()
    (tmp_path / "a.tar").write_bytes(whole[:700])
    with pytest.raises(ValueError, match=r"a.tar cannot be read: truncated"):
        open_pictures(tmp_path)


def test_a_picture_that_cannot_be_decoded_is_named(tmp_path):
    picture(0).save(tmp_path / "a.png")
    (tmp_path / "b.jpg").write_bytes(b"nothing")
    batches = iterate_batches(open_pictures(tmp_path), 16, 4, "square", Share(), "reading")
    with pytest.raises(ValueError, match=r"b.jpg: not a picture that can be measured"):
        list(batches)


def test_draws_are_of_the_seed_and_in_order(classes):
    found = open_pictures(classes)
    first, again, other = (found.draw(5, seed) for seed in (0, 0, 1))
    keys = [one.key for one in first.pictures]
    assert keys == sorted(keys) == [one.key for one in again.pictures]
    assert keys != [one.key for one in other.pictures]
    assert found.draw(None, 0) is found.draw(99, 0) is found


def test_ranks_share_whole_batches(classes):
    found = open_pictures(classes)

    def batches(rank, world_size):
        return list(iterate_batches(found, 16, 3, "center_crop", Share(rank, world_size), "reading"))

    alone, first, second = batches(0, 1), batches(0, 2), batches(1, 2)
    assert [one.numbers for one in alone] == [range(0, 3), range(3, 6), range(6, 9), range(9, 11)]
    assert [one.numbers for one in first] == [range(0, 3), range(6, 9)]
    assert torch.equal(second[1].images, alone[3].images)
    assert batches(4, 5) == []
    with pytest.raises(ValueError, match=r"rank 2 of 2; expected a rank from 0 to 1"):
        Share(2, 2)


@pytest.mark.parametrize("index", [0, 1])
def test_centre_crop_is_torchvisions(tmp_path, index):
    picture(index).save(tmp_path / "a.png")
    found = read_batch(open_pictures(tmp_path), [0], build_decoder(16, "center_crop"))
    steps = [
        transforms.Resize(16, transforms.InterpolationMode.BICUBIC),
        transforms.CenterCrop(16),
        transforms.ToTensor(),
        transforms.Normalize([0.5] * 3, [0.5] * 3),
    ]
    torch.testing.assert_close(found[0], transforms.Compose(steps)(picture(index)))
    assert isinstance(build_decoder(16, "center_crop"), CentreCropDecoder)
    with pytest.raises(ValueError, match=r"fit is 'pad'; expected one of center_crop, square"):
        build_decoder(16, "pad")


def test_square_is_what_training_sees(run):
    shards = run / "sample_data" / "images" / "val" / "drawings"
    found = read_batch(open_pictures(shards), range(5), build_decoder(16, "square"))
    assert torch.equal(found, load_pictures(shards, 16).images)

"""`dualtoken convert tokenizer` and `analyze-layers`: files in, files out, nothing half written."""

import json

import pytest
import torch
from transformers import SiglipModel

from dualtoken.plain_tensors import read_tensors
from dualtoken.visual_tokenizer.config import preset_config
from dualtoken.visual_tokenizer.model import DualTokenVisualTokenizer
from dualtoken.visual_tokenizer.released import load_released
from tests.support.command import call
from tests.support.released_reference import config, random_state
from tests.support.tiny_run import picture
from tests.test_dualtoken.visual_tokenizer.test_released import write


@pytest.fixture
def dualtoken(capsys):
    """Run the command; returns exit code, lines printed and lines of errors."""

    def run(*words):
        code, out, err = call(words, capsys)
        return code, out.splitlines(), err.splitlines()

    return run


def from_released(source, checkpoint, output):
    files = ("--config", source, "--checkpoint", checkpoint)
    return ("convert", "tokenizer", "--from", "released", *files, "--out", output)


def test_there_and_back_bit_for_bit(dualtoken, tmp_path):
    state = random_state(config())
    files = write(tmp_path / "released", config(), state)
    code, lines, _ = dualtoken(*from_released(*files, tmp_path / "ours"))
    assert code == 0 and "written" in lines[-1]
    ours = DualTokenVisualTokenizer.from_pretrained(tmp_path / "ours")
    assert ours.fingerprint() == load_released(*files).fingerprint()
    code, _, _ = dualtoken(
        "convert", "tokenizer", "--to", "released", "--model", tmp_path / "ours", "--out", tmp_path / "back"
    )
    assert code == 0
    back = read_tensors(tmp_path / "back" / "epoch_0.pt")["state_dict"]
    assert back.keys() == state.keys()
    assert all(torch.equal(back[name], tensor) for name, tensor in state.items())


def test_the_report_names_every_weight(dualtoken, tmp_path):
    state = random_state(config()) | {"siglip_model.vision_model.embeddings.position_ids": torch.arange(25)}
    files = write(tmp_path / "released", config(), state)
    _, lines, _ = dualtoken(*from_released(*files, tmp_path / "ours"))
    said = json.loads((tmp_path / "ours" / "conversion.json").read_text(encoding="utf-8"))
    assert said["renamed"].keys() | set(said["dropped"]) == state.keys()
    ours = DualTokenVisualTokenizer.from_pretrained(tmp_path / "ours").state_dict()
    assert set(said["renamed"].values()) | set(said["new"]) == ours.keys()
    assert "NEW: 2 weights (quantizer_pixel 1, quantizer_semantic 1)" in lines
    assert "dropped: 1 weights (siglip_model 1)" in lines
    assert "attention behind the quantizers: causal" in lines
    dualtoken(
        "convert", "tokenizer", "--to", "released", "--model", tmp_path / "ours", "--out", tmp_path / "b"
    )
    back = json.loads((tmp_path / "b" / "conversion.json").read_text(encoding="utf-8"))
    assert back["renamed"].keys() | set(back["dropped"]) == ours.keys()
    written = {name for names in back["renamed"].values() for name in names.split(", ")}
    assert written == read_tensors(tmp_path / "b" / "epoch_0.pt")["state_dict"].keys()


def test_a_checkpoint_with_full_attention(dualtoken, tmp_path):
    files = write(tmp_path / "released", config(), random_state(config()))
    code, lines, _ = dualtoken(*from_released(*files, tmp_path / "ours"), "--full-attention")
    assert code == 0 and "attention behind the quantizers: full (--full-attention)" in lines
    where = ("--model", tmp_path / "ours", "--out", tmp_path / "back")
    code, _, errors = dualtoken("convert", "tokenizer", "--to", "released", *where)
    assert code == 2 and "no place for causal_post_quantization=False" in errors[0]


def test_wrong_weights_are_listed_and_nothing_is_written(dualtoken, tmp_path):
    state = random_state(config())
    del state["decoder.conv_in.bias"]
    files = write(tmp_path / "released", config(), state)
    code, _, errors = dualtoken(*from_released(*files, tmp_path / "ours"))
    assert code == 2 and "1 missing: decoder.conv_in.bias" in errors[0]
    assert [path.name for path in tmp_path.iterdir()] == ["released"]


def test_nothing_is_overwritten(dualtoken, tmp_path):
    files = write(tmp_path / "released", config(), random_state(config()))
    (tmp_path / "ours").mkdir()
    (tmp_path / "ours" / "mine.txt").write_text("x", encoding="utf-8")
    code, _, errors = dualtoken(*from_released(*files, tmp_path / "ours"))
    assert code == 2 and "ours exists: choose another --out" in errors[0]
    assert [path.name for path in (tmp_path / "ours").iterdir()] == ["mine.txt"]


def test_options_that_do_not_belong_together(dualtoken, tmp_path):
    code, _, errors = dualtoken("convert", "tokenizer", "--from", "released", "--out", tmp_path / "ours")
    assert code == 2 and "--from released --config FILE --checkpoint FILE" in errors[0]


def test_analyze_layers(dualtoken, tmp_path):
    torch.manual_seed(0)
    SiglipModel(preset_config("tiny").backbone_config()).save_pretrained(tmp_path / "siglip")
    (tmp_path / "images").mkdir()
    for index in range(5):
        picture(index).save(tmp_path / "images" / f"{index}.png")
    where = ("--backbone", tmp_path / "siglip", "--out", tmp_path / "layers")
    code, lines, _ = dualtoken("analyze-layers", tmp_path / "images", *where)
    assert code == 0
    assert any(line.startswith("reconstruction layer") and "first quarter" in line for line in lines)
    found = json.loads((tmp_path / "layers" / "layers.json").read_text(encoding="utf-8"))
    assert found["pictures"] == 5 and found["proposed"]["semantic_layer"] == 3 and found["read"] is None
    matrix = torch.tensor(found["matrix"])
    assert matrix.shape == (4, 4)
    torch.testing.assert_close(matrix.diagonal(), torch.ones(4))
    assert (tmp_path / "layers" / "layers.png").stat().st_size > 1000
    code, _, errors = dualtoken("analyze-layers", tmp_path / "siglip", *where)
    assert code == 2 and "no pictures in" in errors[0]
    code, _, errors = dualtoken("analyze-layers", tmp_path / "images", "--backbone", tmp_path)
    assert code == 2 and "no SigLIP backbone at" in errors[0]

"""`dualtoken reconstruct`, `generate`, `caption` and `evaluate` on tiny real models and picture files."""

import io

import pytest
import torch
from PIL import Image

from tests.support.command import call
from tests.support.tiny_run import make_tiny_run, picture


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return make_tiny_run(tmp_path_factory.mktemp("run"))


@pytest.fixture
def dualtoken(run, tmp_path, monkeypatch, capsys):
    """Call the command in an empty folder with two pictures; gives exit code, output and errors."""
    monkeypatch.chdir(tmp_path)
    picture(0).save("red one.png")
    picture(1).save("green.jpg")
    models = [f"--visual-tokenizer={run / 'tokenizer' / 'export'}", f"--model={run / 'mllm' / 'export'}"]

    def run_command(command, *arguments):
        options = models if command in ("generate", "caption") else models[: command == "reconstruct"]
        code, out, err = call([command, *arguments, *options], capsys)
        return code, out.splitlines(), err

    return run_command


def test_reconstruct(dualtoken, tmp_path):
    code, lines, _ = dualtoken("reconstruct", "red one.png", "green.jpg")
    assert code == 0
    assert lines[0].startswith("red one.png -> reconstructed/red-one.png (left the input")
    assert len(lines) == 2
    with Image.open(tmp_path / "reconstructed" / "green.png") as pair:
        assert pair.size == (32, 16)
        assert pair.getpixel((8, 8))[1] > 100 > pair.getpixel((8, 8))[0]  # the input's green on the left


def test_generate(dualtoken, tmp_path):
    def pixels(name):
        return (tmp_path / "generated" / name).read_bytes()

    sampled = ("--guidance-scale", "2", "--temperature", "1")
    code, lines, _ = dualtoken("generate", "red", "blue", *sampled, "--seed", "3")
    assert code == 0
    assert lines == ["'red' -> generated/red.png", "'blue' -> generated/blue.png"]
    # The same batch: rounding differs between batch sizes, and a draw on the border with it.
    dualtoken("generate", "red", "blue", *sampled, "--seed", "3")
    assert pixels("red.png") == pixels("red-2.png")
    dualtoken("generate", "red", "blue", *sampled, "--seed", "4")
    assert pixels("red.png") != pixels("red-3.png")
    # By default the likeliest codes: the seed does not matter.
    for seed in ("3", "4"):
        dualtoken("generate", "a circle", "--seed", seed)
    assert pixels("a-circle.png") == pixels("a-circle-2.png")


def test_generate_from_pictures(dualtoken, run, tmp_path):
    code, lines, _ = dualtoken("generate", "like <image>", "like", "--image", "red one.png")
    assert code == 0
    assert lines == ["'like <image>' -> generated/like-image.png", "'like' -> generated/like.png"]
    pictures = [(tmp_path / "generated" / name).read_bytes() for name in ("like-image.png", "like.png")]
    assert pictures[0] != pictures[1]
    dualtoken("generate", "like <image>", "like", "--image", "green.jpg")
    assert (tmp_path / "generated" / "like-image-2.png").read_bytes() != pictures[0]


def test_caption(dualtoken):
    code, lines, _ = dualtoken("caption", "red one.png", "green.jpg", "--language", "de")
    assert code == 0
    assert [line.partition(":")[0] for line in lines] == ["red one.png", "green.jpg"]


def test_precision_is_of_the_unified_model(dualtoken, run, monkeypatch):
    from eval import inputs
    from launchers import chat, use

    loaded = []

    def noting(*words):
        models = inputs.load_models(*words)
        loaded.append((models[0].dtype, models[2].dtype))
        return models

    monkeypatch.setattr(use, "load_models", noting)
    monkeypatch.setattr(chat, "load_models", noting)
    monkeypatch.setattr("sys.stdin", io.StringIO("What?\n"))
    export = [f"--visual-tokenizer={run / 'tokenizer' / 'export'}", f"--model={run / 'mllm' / 'export'}"]
    for words in (["generate", "red"], ["caption", "green.jpg"], ["chat", *export, "--max-new-tokens", "3"]):
        for precision, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
            assert dualtoken(*words, "--precision", precision)[0] == 0
            assert loaded.pop() == (dtype, torch.float32)


@pytest.mark.parametrize(
    ("command", "arguments", "message"),
    [
        ("reconstruct", ["gone.png"], "no such file: gone.png"),
        ("generate", ["red", "--out", "green.jpg/a"], "Not a directory: 'green.jpg/a'"),
        ("chat", [], "standard input is closed; type messages, or send them through a pipe"),
        ("generate", ["a <image> here"], "the text has 1 <image> tags but 0 images; give one image for each"),
        ("generate", ["red", "--image", "green.jpg"], "the text has 0 <image> tags but 1 images"),
        ("caption", ["gone.png"], "no such file: gone.png"),
        ("generate", ["red", "--top-p", "0"], "top_p=0.0; expected more than 0"),
        ("generate", ["red", "--temperature", "-1"], "temperature=-1.0; expected 0"),
        ("generate", ["red", "--temperature", "nan"], "temperature=nan; expected 0"),
        ("generate", ["red", "--guidance-scale", "nan"], "guidance_scale=nan; expected a number"),
        ("caption", ["green.jpg", "--max-new-tokens", "0"], "'--max-new-tokens'"),
    ],
)
def test_mistakes_are_one_line(dualtoken, monkeypatch, command, arguments, message):
    monkeypatch.setattr("sys.stdin", None)
    code, _, err = dualtoken(command, *arguments)
    assert code == 2
    assert message in err and err.startswith("error: ") and err.count("\n") == 1


def test_models_in_the_wrong_place_are_told_by_their_kind(run, capsys):
    """Other models' configs would pass as the unified model's, until something deep inside does not fit."""
    for job, kind in (("tokenizer", "dualtoken_visual_tokenizer"), ("siglip", "siglip")):
        code, _, err = call(["generate", "red", "--model", run / job / "export"], capsys)
        assert code == 2
        assert f"holds a '{kind}' model, expected a unified model" in err


def test_what_is_wrong_in_a_worker_is_one_line(dualtoken, run, tmp_path):
    code, _, err = dualtoken("evaluate", "layers", "reconstruction", "--run", str(tmp_path / "nowhere"))
    assert code == 2
    assert err.startswith("error: no ") and err.count("\n") == 1

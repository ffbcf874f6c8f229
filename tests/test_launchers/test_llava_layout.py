"""`dualtoken convert llava`: LLaVA's names and modules compute what the embedder does; back bit for bit."""

import json
import re
import shutil
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from dualtoken.plain_tensors import read_tensors
from dualtoken.unified_model.model import DualTokenForCausalLM
from dualtoken.visual_tokenizer.model import DualTokenVisualTokenizer
from launchers.conversions.llava import NAMES
from launchers.conversions.weight_files import WeightFiles
from tests.support.convert_support import run, unified, write_base, write_visual_tokenizer
from tests.test_house import ROOT

FEATURES = "visual_features=post_quantization"


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("llava")
    write_base(root / "qwen2", "qwen2")
    write_base(root / "llama", "llama")
    write_visual_tokenizer(root / "eyes")
    return root


@pytest.fixture(scope="module")
def tower():
    """The class that docs/convert.md tells a user of LLaVA to add."""
    page = (ROOT / "docs/convert.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"<!-- example: tower -->\n```python\n(.*?)```", page, re.DOTALL)
    names = {}
    exec(code, names)
    return names["DualTokenTower"]


def export(capsys, folders, model, output):
    where = ("--model", model, "--visual-tokenizer", folders / "eyes", "--out", output)
    code, lines, errors = run(capsys, "llava", *where)
    assert code == 0, errors
    return lines


@pytest.mark.parametrize(
    "kind, more, width",
    [
        ("llama", ("visual_features=code_vectors",), 16),
        ("qwen2", (FEATURES,), 64),
        ("llama", ("visual_input=semantic", "embedder=mlp_concat"), 8),
    ],
)
def test_llava_computes_what_the_model_reads(folders, tower, tmp_path, capsys, kind, more, width):
    unified(capsys, folders / kind, folders / "eyes", tmp_path / "unified", *more)
    lines = export(capsys, folders, tmp_path / "unified", tmp_path / "llava")
    assert lines[0].startswith("renamed: 4 weights") and "llm" in lines[1]
    config = json.loads((tmp_path / "llava/config.json").read_text(encoding="utf-8"))
    assert config["model_type"] == {"llama": "llava_llama", "qwen2": "llava_qwen"}[kind]
    assert (config["mm_projector_type"], config["mm_hidden_size"]) == ("mlp2x_gelu", width)
    weights = load_file(tmp_path / "llava/mm_projector.safetensors")
    pickled = read_tensors(tmp_path / "llava/mm_projector.bin")
    assert weights.keys() == pickled.keys() == set(NAMES.values())
    assert all(torch.equal(weights[name], pickled[name]) for name in weights)
    # As `build_vision_projector` and `get_w` of LLaVA do it.
    hidden = config["hidden_size"]
    projector = nn.Sequential(nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, hidden))
    projector.load_state_dict({name.split("mm_projector.")[1]: value for name, value in weights.items()})
    images = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
    eyes = tower(config["mm_vision_tower"], SimpleNamespace(**config), delay_load=True)
    assert not eyes.is_loaded
    eyes.load_model(device_map="auto")
    assert eyes.hidden_size == width and eyes.num_patches == 16
    model = DualTokenForCausalLM.from_pretrained(tmp_path / "unified")
    tokenizer = DualTokenVisualTokenizer.from_pretrained(folders / "eyes")
    with torch.no_grad():
        codes = tokenizer.encode(images).flatten(0, 1)
        ids = torch.full((1, len(codes)), model.config.special.image_pad)
        expected = model.embed(ids, codes)[0]
        features = eyes(images)
        assert torch.equal(features, eyes.half().to(device="cpu", dtype=torch.float16)(images))
        found = projector(features).flatten(0, 1)
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-5)


def test_there_and_back_bit_for_bit(folders, tmp_path, capsys):
    first, second = tmp_path / "first", tmp_path / "second"
    unified(capsys, folders / "llama", folders / "eyes", first, "--seed", 1)
    unified(capsys, folders / "llama", folders / "eyes", second, "--seed", 2)
    export(capsys, folders, first, tmp_path / "llava")
    for source in (tmp_path / "llava", tmp_path / "llava/mm_projector.bin"):
        shutil.rmtree(tmp_path / "mixed", ignore_errors=True)
        where = ("--model", second, "--projector", source, "--out", tmp_path / "mixed")
        code, lines, errors = run(capsys, "llava", *where)
        assert code == 0, errors
        mixed, projector, rest = (WeightFiles(folder) for folder in (tmp_path / "mixed", first, second))
        assert mixed.keys() == rest.keys()
        for name in mixed:
            assert torch.equal(mixed[name], (projector if name in NAMES else rest)[name]), name
        assert not torch.equal(projector[next(iter(NAMES))], rest[next(iter(NAMES))])
    assert DualTokenForCausalLM.from_pretrained(tmp_path / "mixed").config.to_dict() == (
        DualTokenForCausalLM.from_pretrained(second).config.to_dict()
        | {"_name_or_path": str(tmp_path / "mixed")}
    )
    said = json.loads((tmp_path / "mixed/conversion.json").read_text(encoding="utf-8"))
    assert said["conversion"] == "projector of LLaVA" and said["dropped"] == list(NAMES)


def test_what_llava_cannot_express_is_refused(folders, tmp_path, capsys):
    def fails(message, *words):
        code, _, errors = run(capsys, "llava", *words, "--out", tmp_path / "out")
        assert code == 2 and len(errors) == 1 and message in errors[0], errors
        assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".out*"))

    model, eyes = tmp_path / "unified", folders / "eyes"
    unified(capsys, folders / "llama", eyes, model, "embedder=mlp_concat")
    fails("an MLP for each codebook; LLaVA's mlp2x_gelu is one", "--model", model, "--visual-tokenizer", eyes)
    fails("expected either --visual-tokenizer FOLDER", "--model", model)
    shutil.rmtree(model)
    unified(capsys, folders / "llama", eyes, model)
    other = write_visual_tokenizer(tmp_path / "other", codebook_seed=5, codebook_dim=16)
    fails("codes were made by the visual tokenizer", "--model", model, "--visual-tokenizer", other)
    config = json.loads((model / "config.json").read_text(encoding="utf-8"))
    config["text_config"]["model_type"] = "phi3"
    odd = tmp_path / "odd"
    shutil.copytree(model, odd)
    (odd / "config.json").write_text(json.dumps(config), encoding="utf-8")
    fails("has a decoder of the kind 'phi3'; LLaVA has classes", "--model", odd, "--visual-tokenizer", eyes)
    export(capsys, folders, model, tmp_path / "llava")
    path = tmp_path / "llava/mm_projector.safetensors"
    weights = load_file(path)
    save_file({**weights, "model.mm_projector.4.bias": torch.zeros(2)}, path)
    fails("1 superfluous (model.mm_projector.4.bias)", "--model", model, "--projector", path)
    save_file({name: tensor[..., :-1].contiguous() for name, tensor in weights.items()}, path)
    fails(
        "4 misshapen (visual_embedder.mlps.0.down.bias (31,), not (32,)",
        "--model",
        model,
        "--projector",
        path,
    )
    fails("no projector at", "--model", model, "--projector", eyes)

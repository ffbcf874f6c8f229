"""`dualtoken convert unified` and `llm`: what training builds, there and back, a shard in memory."""

import json
import shutil
import weakref

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoProcessor, AutoTokenizer

from dualtoken.unified_model.model import DualTokenForCausalLM
from dualtoken.unified_model.sequence import SpecialTokens, add_special_tokens
from launchers.conversions.llm import extract_llm
from launchers.conversions.unified import build_unified
from launchers.conversions.weight_files import WeightFiles
from pretrain.config import load_job_config
from pretrain.export import save_config
from pretrain.mllm_task import MllmTask
from pretrain.random_state import seed_everything
from pretrain.runtime import Runtime
from tests.support.convert_support import HEADS, run, unified, write_base, write_visual_tokenizer


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Both language models, in the types that they are released in, and a visual tokenizer."""
    root = tmp_path_factory.mktemp("folders")
    write_base(root / "qwen2", "qwen2", torch.bfloat16, max_shard_size="10KB")
    write_base(root / "llama", "llama")
    write_visual_tokenizer(root / "eyes")
    return root


def same_files(first, second, prefix=""):
    found, expected = WeightFiles(first), WeightFiles(second)
    assert found.keys() == expected.keys()
    return all(
        torch.equal(found[name], expected[name]) and found[name].dtype == expected[name].dtype
        for name in expected
        if name.startswith(prefix)
    )


def report_of(folder):
    return json.loads((folder / "conversion.json").read_text(encoding="utf-8"))


def build_as_in_training(base, eyes, seed, more, init_from=None):
    """What `MllmTask` builds for a recipe with these settings."""
    words = [
        "recipe=mllm_align",
        f"seed={seed}",
        f"model.llm={'null' if init_from else base}",
        f"model.init_from={init_from or 'null'}",
        f"model.text_tokenizer={init_from or base}",
        f"model.visual_tokenizer={eyes}",
        *(f"model.heads.{word}" for word in (*HEADS, *more)),
        "data.blend=[]",
        "deepspeed=zero1.json",
        "run_dir=unused",
    ]
    task = MllmTask.__new__(MllmTask)
    task.config = load_job_config(words, world_size=1)
    task.runtime = Runtime(0, 0, 1, torch.device("cpu"), torch.float32, seed, 1, base)
    seed_everything(seed)
    task.text_tokenizer = AutoTokenizer.from_pretrained(init_from or base)
    if not init_from:
        add_special_tokens(task.text_tokenizer)
    task.special = SpecialTokens.from_tokenizer(task.text_tokenizer)
    return task.build_model()


@pytest.mark.parametrize(
    "kind, more",
    [
        ("qwen2", ("visual_features=code_vectors",)),
        ("llama", ("visual_features=post_quantization", "embedder=mlp_concat")),
    ],
)
def test_unified_is_what_training_builds(folders, tmp_path, capsys, kind, more):
    lines = unified(capsys, folders / kind, folders / "eyes", tmp_path / "unified", *more, "--seed", 3)
    built = build_as_in_training(folders / kind, folders / "eyes", 3, more)
    built.save_pretrained(tmp_path / "expected", state_dict=built.state_dict())
    save_config(built, tmp_path / "expected")
    assert same_files(tmp_path / "unified", tmp_path / "expected")
    configs = [
        json.loads((tmp_path / name / "config.json").read_text(encoding="utf-8"))
        for name in ("unified", "expected")
    ]
    assert configs[0] == configs[1]
    taken = build_as_in_training(folders / kind, folders / "eyes", 9, more, tmp_path / "unified")
    assert all(torch.equal(value, taken.state_dict()[name]) for name, value in built.state_dict().items())
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "unified")
    processor = AutoProcessor.from_pretrained(tmp_path / "unified")
    assert isinstance(loaded, DualTokenForCausalLM) and processor.special == loaded.config.special
    said = report_of(tmp_path / "unified")
    assert len(said["renamed"]) == len(WeightFiles(folders / kind))
    assert {name.split(".")[0] for name in said["new"]} == {
        "visual_embedder", "pixel_projector", "semantic_projector", "pixel_head", "semantic_head"
    }  # fmt: skip
    rows = [line for line in lines if line.startswith("NEW: rows")]
    assert rows == (["NEW: rows 258 to 319 of the embedding and the output layer"] if kind == "llama" else [])
    assert any(line.startswith("NEW: ") and "pixel_head 7" in line for line in lines)


def test_a_base_that_cannot_be_streamed_is_loaded_whole_and_says_so(folders, tmp_path, capsys):
    base = tmp_path / "pickled"
    shutil.copytree(folders / "llama", base)
    model = AutoModelForCausalLM.from_pretrained(base)
    torch.save(model.state_dict(), base / "pytorch_model.bin")
    (base / "model.safetensors").unlink()
    lines = unified(capsys, base, folders / "eyes", tmp_path / "whole")
    assert any("loaded whole" in line for line in lines)
    lines = unified(capsys, folders / "llama", folders / "eyes", tmp_path / "streamed")
    assert not any("loaded whole" in line for line in lines)
    assert same_files(tmp_path / "whole", tmp_path / "streamed")


@pytest.mark.parametrize("kind, dtype", [("qwen2", "bfloat16"), ("llama", None)])
def test_llm_there_and_back(folders, tmp_path, capsys, kind, dtype):
    base = folders / kind
    unified(capsys, base, folders / "eyes", tmp_path / "unified")
    more = ("--dtype", dtype) if dtype else ()
    where = ("--model", tmp_path / "unified", "--base", base, "--out", tmp_path / "llm")
    code, lines, errors = run(capsys, "llm", *where, *more)
    assert code == 0, errors
    assert same_files(tmp_path / "llm", base)
    assert ("rounded from float32 to bfloat16" in lines) == bool(dtype)
    assert any(line.startswith("dropped: rows 258 to 319 of") for line in lines) == (kind == "llama")
    found, expected = (AutoModelForCausalLM.from_pretrained(path) for path in (tmp_path / "llm", base))
    assert found.config.to_dict() | {"_name_or_path": ""} == expected.config.to_dict() | {"_name_or_path": ""}
    assert found.generation_config.max_new_tokens == 7
    assert (found.lm_head.weight is found.model.embed_tokens.weight) == (kind == "qwen2")
    tokenizers = [AutoTokenizer.from_pretrained(path) for path in (tmp_path / "llm", base)]
    assert tokenizers[0].get_vocab() == tokenizers[1].get_vocab()


@pytest.mark.parametrize("kind", ["qwen2", "llama"])
def test_llm_with_all_its_rows_says_the_same(folders, tmp_path, capsys, kind):
    unified(capsys, folders / kind, folders / "eyes", tmp_path / "unified")
    code, lines, _ = run(capsys, "llm", "--model", tmp_path / "unified", "--out", tmp_path / "llm")
    assert code == 0 and any(line.startswith("dropped: ") and "pixel_head 7" in line for line in lines)
    words = AutoTokenizer.from_pretrained(tmp_path / "llm")
    assert "<|image_gen_start|>" in words.get_vocab()
    ids = words("some words to read", return_tensors="pt").input_ids
    ours = DualTokenForCausalLM.from_pretrained(tmp_path / "unified").eval()
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "llm").eval()
    with torch.no_grad():
        found = theirs(ids).logits
        hidden = ours.decoder(inputs_embeds=ours.get_input_embeddings()(ids)).last_hidden_state
        torch.testing.assert_close(found, hidden @ ours.get_output_embeddings().weight.T)
        rows = AutoConfig.from_pretrained(folders / kind).vocab_size
        base = AutoModelForCausalLM.from_pretrained(folders / kind, dtype=torch.float32)
        torch.testing.assert_close(found[..., :rows], base(ids).logits)
    (tmp_path / "again").mkdir()  # an empty folder is no obstacle
    unified(
        capsys, tmp_path / "llm", folders / "eyes", tmp_path / "again"
    )  # rows and tokens are there already
    assert same_files(tmp_path / "again", tmp_path / "unified", "llm.")


class LiveBytes:
    """Bytes of the tensors that were read from files and are still alive, and their peak."""

    def __init__(self, monkeypatch):
        self.now = self.peak = 0
        read = WeightFiles.__getitem__

        def counted(files, name):
            tensor = read(files, name)
            self.now += tensor.nbytes
            self.peak = max(self.peak, self.now)
            weakref.finalize(tensor, self.forget, tensor.nbytes)
            return tensor

        monkeypatch.setattr(WeightFiles, "__getitem__", counted)

    def forget(self, count):
        self.now -= count


def test_a_shard_is_held_and_not_the_model(folders, tmp_path, monkeypatch):
    files = WeightFiles(folders / "llama")
    largest = max(files[name].nbytes for name in files)
    total = sum(files[name].nbytes for name in files)
    shard = largest
    assert total > shard + largest
    live = LiveBytes(monkeypatch)
    list(
        build_unified(
            folders / "llama", None, folders / "eyes", tmp_path / "unified", HEADS, shard_bytes=shard
        )
    )
    assert 0 < live.peak <= shard + 2 * largest and live.now == 0  # a shard, embedding and output layer
    index = json.loads((tmp_path / "unified/model.safetensors.index.json").read_text(encoding="utf-8"))
    assert len(set(index["weight_map"].values())) > 2
    live.peak = 0
    list(extract_llm(tmp_path / "unified", tmp_path / "llm", shard_bytes=shard))
    assert 0 < live.peak <= shard + largest and live.now == 0
    AutoModelForCausalLM.from_pretrained(tmp_path / "llm")


def test_mistakes_are_one_line_and_nothing_is_written(folders, tmp_path, capsys):
    def fails(message, *words):
        code, _, errors = run(capsys, *words, "--out", tmp_path / "out")
        assert code == 2 and len(errors) == 1 and message in errors[0], errors
        assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".out*"))

    llama, eyes, qwen = (folders / name for name in ("llama", "eyes", "qwen2"))
    build = ("unified", "--visual-tokenizer", eyes, "--llm")
    fails("no language model in", *build, tmp_path)
    fails("did you mean embedder?", *build, llama, "embeder=mlp_concat")
    fails("no folder", *build, llama, "--text-tokenizer", tmp_path / "none")
    fails("no visual tokenizer in", "unified", "--visual-tokenizer", tmp_path, "--llm", llama)
    unified(capsys, llama, eyes, tmp_path / "unified")
    fails("is a unified model; `dualtoken convert llm`", *build, tmp_path / "unified")
    fails("holds a 'llama' model; expected a unified model", "llm", "--model", llama)
    take = ("llm", "--model", tmp_path / "unified")
    fails("do not fit the config:", *take, "--base", qwen)
    broken = tmp_path / "broken"
    shutil.copytree(tmp_path / "unified", broken)
    data = (broken / "model.safetensors").read_bytes()
    (broken / "model.safetensors").write_bytes(data[: len(data) // 2])
    fails("model.safetensors cannot be read", "llm", "--model", broken)
    index = {"weight_map": {"x": "../unified/model.safetensors"}}
    (broken / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    fails("no weights at", "llm", "--model", broken)
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "mine").touch()
    code, _, errors = run(capsys, *take, "--out", tmp_path / "taken")
    assert code == 2 and "taken exists: choose another --out" in errors[0]

"""Both training jobs on real files: ranks make no difference, and a killed run goes on exactly."""

import json
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from data_pipeline.streams.plain_state import from_plain
from launchers.conversions.checkpoint import export_checkpoint
from launchers.conversions.weight_files import WeightFiles
from launchers.errors import UserError
from tests.support.distributed import Ranks, run_module
from tests.support.same_folder import assert_same_folder
from tests.support.unified_support import byte_tokenizer
from tests.test_pretrain.test_contrastive import write_pictures, write_text_tokenizer

STEPS = 6


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Pictures (the last one broken), an untrained tiny SigLIP and its text tokenizer."""
    from transformers import SiglipModel

    from dualtoken.visual_tokenizer.config import preset_config

    folder = tmp_path_factory.mktemp("jobs")
    write_pictures(folder / "images", 33)
    torch.manual_seed(0)
    SiglipModel(preset_config("tiny").backbone_config()).save_pretrained(folder / "siglip")
    write_text_tokenizer(folder / "siglip")
    byte_tokenizer().save_pretrained(folder / "text_tokenizer")
    return folder


def losses(run: Path) -> dict[int, dict[str, float]]:
    """Losses by training step, without the total, which holds the adaptive GAN weight."""
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return {
        record["step"]: {
            k: v for k, v in record.items() if k.startswith(("loss", "nll")) and k != "loss/total"
        }
        for record in records
        if record["split"] == "train"
    }


def assert_same_losses(found: Path, expected: Path, tolerance: float) -> None:
    found_losses, expected_losses = losses(found), losses(expected)
    assert list(found_losses) == list(expected_losses) == list(range(1, STEPS + 1))
    for step, figures in expected_losses.items():
        assert found_losses[step] == pytest.approx(figures, rel=tolerance, abs=tolerance), f"step {step}"


def assert_same_weights(found: Path, expected: Path, tolerance: float) -> None:
    weights, others = (load_file(folder / "model.safetensors") for folder in (found, expected))
    assert weights.keys() == others.keys()
    for name, value in others.items():
        torch.testing.assert_close(
            weights[name], value, rtol=0, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}"
        )


def common(run: Path, world_size: int) -> list[str]:
    # One rank with two readers reads, in turn, what two ranks read side by side.
    return [
        f"run_dir={run}",
        f"steps={STEPS}",
        "log_every=1",
        f"data.num_workers={2 if world_size == 1 else 0}",
        "wandb.mode=disabled",
        "precision=fp32",  # figures are compared exactly
        "resume=auto",
    ]


def tokenizer_words(folder: Path, run: str, world_size: int) -> list[str]:
    return [
        "job=tokenizer",
        *common(folder / run, world_size),
        "global_batch_size=8",
        "micro_batch_size=4",
        "deepspeed=zero2.json",
        "model.preset=tiny",
        f"model.backbone={folder / 'siglip'}",
        "optimizer.lr=0.003",
        "losses.gan_start_step=2",
        # Fixed, since the adaptive weight is taken per micro-step over its ranks: two micro-steps of one rank
        # have two weights where one micro-step of two ranks has one.
        "losses.gan_weight_range=[1,1]",
        "perceptual_network.trunk=none",
        "discriminator.channels=8",
        "discriminator.num_layers=2",
        f"data.path={folder / 'images'}",
        f"validation_data.path={folder / 'images'}",
    ]


@pytest.fixture(scope="module")
def tokenizer_run(folder) -> Path:
    run_module("pretrain.train", tokenizer_words(folder, "tokenizer", 2), 2).check()
    return folder / "tokenizer"


def test_two_ranks_train_the_tokenizer_like_one(folder, tokenizer_run):
    run_module("pretrain.train", tokenizer_words(folder, "tokenizer_alone", 1), 1).check()
    assert_same_losses(tokenizer_run, folder / "tokenizer_alone", tolerance=1e-3)
    figures = losses(tokenizer_run)
    assert "loss/gan" not in figures[2] and "loss/gan" in figures[3]  # two steps without the discriminator
    assert figures[STEPS]["loss/mse"] < figures[1]["loss/mse"]


def test_a_broken_picture_is_recorded_once_and_training_goes_on(tokenizer_run):
    lines = (tokenizer_run / "rejected.jsonl").read_text(encoding="utf-8").splitlines()
    records = [json.loads(line) for line in lines]
    assert {record["key"] for record in records} == {"0032"}
    assert all(record["reason"] for record in records)
    assert len(records) <= 2  # at most one line per rank that met it, however often


def test_the_exported_tokenizer_encodes_and_decodes(tokenizer_run):
    from dualtoken.visual_tokenizer.model import DualTokenVisualTokenizer

    tokenizer = DualTokenVisualTokenizer.from_pretrained(tokenizer_run / "export").eval()
    images = torch.rand(2, 3, 16, 16) * 2 - 1
    codes = tokenizer.encode(images)
    assert codes.shape == (2, 16, 2, 2)
    with torch.no_grad():
        torch.testing.assert_close(tokenizer.decode(codes), tokenizer(images).reconstruction, rtol=0, atol=0)


@pytest.fixture(scope="module")
def codes(folder, tokenizer_run) -> Path:
    arguments = ["--inputs", str(folder / "images"), "--output", str(folder / "codes")]
    arguments += ["--visual-tokenizer", str(tokenizer_run / "export")]
    run_module("data_pipeline.pretokenize", arguments, 1).check()
    return folder / "codes"


def mllm_words(folder: Path, run: str, world_size: int) -> list[str]:
    sizes = "hidden_size: 32, intermediate_size: 48, num_hidden_layers: 2, num_attention_heads: 2"
    blend = ", ".join(f"{{path: {folder / 'codes'}, view: {view}}}" for view in ("generate", "caption"))
    return [
        "job=mllm",
        *common(folder / run, world_size),
        "global_batch_size=4",  # two micro-batches on each of two ranks
        "micro_batch_size=1",
        "deepspeed=zero3.json",
        f"model.visual_tokenizer={folder / 'tokenizer' / 'export'}",
        f"model.text_tokenizer={folder / 'text_tokenizer'}",
        f"model.llm_config={{model_type: qwen2, vocab_size: 264, num_key_value_heads: 2, {sizes}}}",
        "model.heads={head_hidden_size: 24, head_num_layers: 1, head_num_attention_heads: 2}",
        "optimizer.lr=0.003",
        "data.context_length=128",
        "data.contexts_held=2",
        f"data.blend=[{blend}]",
        "validation_data.context_length=128",
        f"validation_data.blend=[{blend}]",
    ]


@pytest.fixture(scope="module")
def mllm_run(folder, codes) -> Path:
    run_module("pretrain.train", mllm_words(folder, "mllm", 2), 2).check()
    return folder / "mllm"


def test_two_ranks_train_the_unified_model_like_one(folder, mllm_run):
    """Two micro-batches on each of two ranks, and four on one: every step the same, to the last weight."""
    run_module("pretrain.train", mllm_words(folder, "mllm_alone", 1), 1).check()
    assert_same_losses(mllm_run, folder / "mllm_alone", tolerance=1e-3)
    assert_same_weights(mllm_run / "export", folder / "mllm_alone" / "export", tolerance=1e-5)


def test_the_model_of_a_checkpoint_is_what_the_run_exports(folder, tokenizer_run, mllm_run):
    """Put together from the pieces of two ranks under ZeRO-2 and ZeRO-3, without starting the run."""
    for run, shard in ((tokenizer_run, 2 << 30), (mllm_run, 2 << 30)):
        out = folder / f"{run.name}_of_checkpoint"
        lines = list(export_checkpoint(run, out, shard_bytes=shard))
        assert lines[0].startswith(f"step {STEPS} of job {run.name}, 2 rank(s), ZeRO-")
        assert_same_folder(out, run / "export")
    # In files of 20 kB with an index: the same tensors.
    list(export_checkpoint(mllm_run, folder / "in_parts", shard_bytes=20_000))
    assert len(list((folder / "in_parts").glob("model-*.safetensors"))) > 3
    whole = load_file(mllm_run / "export" / "model.safetensors")
    parts = WeightFiles(folder / "in_parts")
    assert parts.keys() == whole.keys() and all(torch.equal(parts[name], whole[name]) for name in whole)


def test_checkpoints_that_are_no_model_are_refused(folder, mllm_run):
    copy = shutil.copytree(mllm_run / "checkpoints", folder / "copied" / "checkpoints")
    out = folder / "refused_model"
    step = copy / f"step_{STEPS:08d}"
    file = step / "model" / "rank_00001.safetensors"
    content = file.read_bytes()
    file.write_bytes(content[:-4] + b"abcd")
    with pytest.raises(UserError, match=r"rank_00001.safetensors is not what was written: take an earlier"):
        list(export_checkpoint(folder / "copied", out))
    file.write_bytes(content)
    with pytest.raises(UserError, match=r"has llm\.model\.norm\.weight None, the checkpoint \(32,\): another"):
        contents = json.loads((step / "model" / "contents.json").read_text(encoding="utf-8"))
        contents["parameters"]["llm.model.norm.weight"]["trained"] = False
        (step / "model" / "contents.json").write_text(json.dumps(contents), encoding="utf-8")
        list(export_checkpoint(step, out, frozen_from=folder / "tokenizer" / "export", verify=False))
    state = json.loads((step / "state.json").read_text(encoding="utf-8"))
    state["files"]["../outside"] = {"bytes": 0, "sha256": ""}
    (step / "state.json").write_text(json.dumps(state), encoding="utf-8")
    with pytest.raises(UserError, match=r"names the file \.\./outside, outside its folder"):
        list(export_checkpoint(step, out))
    with pytest.raises(UserError, match="has no complete checkpoint: expected a step's folder or a run's"):
        list(export_checkpoint(folder / "images", out))
    assert not out.exists()


def kill_and_go_on(run: Path, words: list[str], after_step: int) -> None:
    """Kill both ranks once a step is logged and a checkpoint written, then start the same command again."""
    with Ranks("pretrain.train", words) as ranks:
        deadline = time.monotonic() + 300
        metrics, latest = run / "metrics.jsonl", run / "checkpoints" / "latest"
        while not (latest.exists() and f'"step": {after_step}' in metrics.read_text(encoding="utf-8")):
            assert time.monotonic() < deadline, ranks.output_of(0)
            time.sleep(0.01)
        ranks.send(signal.SIGKILL)
        assert ranks.wait().returncodes == [-signal.SIGKILL] * 2
    assert not (run / "done.json").exists()
    resumed = run_module("pretrain.train", words).check()
    assert "resumed from" in resumed.outputs[0]


def test_a_killed_tokenizer_run_goes_on_exactly(folder, tokenizer_run):
    """Two engines with their optimizers, codebooks with their averages, what is known of broken pictures."""
    run = folder / "tokenizer_killed"
    kill_and_go_on(run, [*tokenizer_words(folder, run.name, 2), "checkpoint_every=3"], after_step=4)
    assert losses(run) == losses(tokenizer_run)
    assert {"loss/gan", "loss/discriminator"} <= losses(run)[3].keys()  # they began before the checkpoint
    found, expected = last_checkpoint(run), last_checkpoint(tokenizer_run)
    assert found.keys() == expected.keys()
    parts = " ".join(expected)
    assert all(part in parts for part in ("exp_avg", "embed_sum", "num_updates", "rejected_keys"))
    for place, value in expected.items():
        same = torch.equal(found[place], value) if isinstance(value, torch.Tensor) else found[place] == value
        assert same, place


def last_checkpoint(run: Path) -> dict[str, torch.Tensor | list[str]]:
    """Tensors of all engines and ranks, and which broken pictures each rank knows, by their place."""
    found: dict[str, torch.Tensor | list[str]] = {}

    def collect(value, place: str) -> None:
        if isinstance(value, torch.Tensor) or place.endswith("rejected_keys"):
            found[place] = value
        elif isinstance(value, dict | list | tuple):
            items = value.items() if isinstance(value, dict) else enumerate(value)
            for key, inner in items:
                collect(inner, f"{place}/{key}")

    folder = run / "checkpoints" / f"step_{STEPS:08d}"
    for path in sorted(folder.rglob("*.safetensors")):
        collect(load_file(path), str(path.relative_to(folder)))
    for path in sorted(folder.glob("rank_*.json")):
        collect(from_plain(json.loads(path.read_text(encoding="utf-8"))), path.name)
    return found


def test_a_killed_unified_model_run_goes_on_exactly(folder, mllm_run):
    run = folder / "mllm_killed"
    kill_and_go_on(run, [*mllm_words(folder, run.name, 2), "checkpoint_every=2"], after_step=3)
    assert losses(run) == losses(mllm_run)


def test_codes_of_another_tokenizer_are_refused(folder, codes):
    """One line, exit code 2, before anything is trained."""
    words = [w for w in mllm_words(folder, "refused", 1) if not w.startswith("model.visual_tokenizer")]
    from dualtoken.visual_tokenizer.config import preset_config
    from dualtoken.visual_tokenizer.model import DualTokenVisualTokenizer

    torch.manual_seed(1)
    DualTokenVisualTokenizer(preset_config("tiny")).save_pretrained(folder / "another")
    finished = run_module("pretrain.train", [*words, f"model.visual_tokenizer={folder / 'another'}"], 1)
    assert finished.returncodes == [2]
    assert "codes were made by the visual tokenizer" in finished.output
    assert "Traceback" not in finished.output

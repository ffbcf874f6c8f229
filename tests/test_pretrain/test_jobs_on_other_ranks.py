"""Both jobs go on with other ranks: no sample is lost or doubled, nothing that was loaded differs."""

import json
import shutil
from pathlib import Path

import pytest

from data_pipeline.streams import prepare_dataset
from tests.support.distributed import run_function
from tests.support.recording_tasks import MLLM, TOKENIZER
from tests.support.tiny_run import make_tiny_run
from tests.test_pretrain.test_trainer import figures
from tests.test_pretrain.test_world_sizes import assert_loaded_is_saved, train_on

PICTURES = 12  # of the tiny run; each of two readers has six
STEPS = 3  # of four pictures: one pass
JOBS = ["tokenizer", "mllm"]


def words(folder: Path, run: str, job: str, steps: int) -> list[str]:
    common = [
        f"run_dir={folder / run / job}",
        f"steps={steps}",
        "global_batch_size=4",
        "micro_batch_size=1",
        "log_every=1",
        "optimizer.schedule=constant",  # whatever the number of steps that a part is given
        "wandb.mode=disabled",
        "precision=fp32",
        "data.shuffle_buffer_size=0",  # one pass after the other
        "data.slice_length=2",
    ]
    if job == "tokenizer":
        return [
            f"job={TOKENIZER}",
            *common,
            "deepspeed=zero2.json",
            "optimizer.name=muon",
            "gradient_clipping=0",
            "model.preset=tiny",
            f"model.backbone={folder / 'siglip' / 'export'}",
            f"data.path={folder / 'sample_data' / 'images' / 'train' / 'drawings'}",
            "perceptual_network.trunk=none",
            "losses.gan_start_step=0",
            "discriminator.channels=8",
            "discriminator.num_layers=2",
        ]
    sizes = "hidden_size: 32, intermediate_size: 48, num_hidden_layers: 2, num_attention_heads: 2"
    codes = folder / "codes" / "train"
    return [
        f"job={MLLM}",
        *common,
        "deepspeed=zero3.json",
        f"model.visual_tokenizer={folder / 'tokenizer' / 'export'}",
        f"model.text_tokenizer={folder / 'siglip' / 'export'}",
        f"model.llm_config={{model_type: qwen2, vocab_size: 64, num_key_value_heads: 2, {sizes}}}",
        "model.heads={head_hidden_size: 24, head_num_layers: 1, head_num_attention_heads: 2}",
        "frozen=['llm.model.layers.0.*']",
        "data.context_length=64",
        "data.contexts_held=2",
        f"data.blend=[{{path: {codes}, view: caption}}, {{path: {codes}, view: generate}}]",
    ]


def train_jobs(folder: Path, run: str, steps: int, resumed: bool) -> None:
    for job in JOBS:
        train_on(words(folder, run, job, steps), resumed)


def train_twice(folder: Path) -> None:
    train_jobs(folder, "whole", STEPS, False)
    train_jobs(folder, "2", 1, False)


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    """Two ranks make a pass; two begin one, and four, then two, or one alone, end it."""
    folder = make_tiny_run(tmp_path_factory.mktemp("other_ranks"))
    prepare_dataset(folder / "codes" / "train")

    def ranks(number: int, function, *arguments) -> None:
        run_function(function, folder, *arguments, world_size=number, process_group=False, timeout=900)

    ranks(2, train_twice)
    shutil.copytree(folder / "2", folder / "2_to_1")
    shutil.copytree(folder / "2", folder / "2_to_4")
    ranks(1, train_jobs, "2_to_1", STEPS, True)
    ranks(4, train_jobs, "2_to_4", 2, True)
    shutil.copytree(folder / "2_to_4", folder / "4_to_2", ignore=shutil.ignore_patterns("loaded"))
    ranks(2, train_jobs, "4_to_2", STEPS, True)
    return folder


def keys_by_step(run: Path) -> dict[int, list[str]]:
    """Keys of all ranks at each step, in the order of their names."""
    found: dict[int, list[str]] = {}
    for path in run.glob("keys.*.jsonl"):
        for line in path.read_text(encoding="utf-8").splitlines():
            record = json.loads(line)
            found.setdefault(record["step"], []).extend(record["keys"])
    return {step: sorted(keys) for step, keys in sorted(found.items())}


@pytest.mark.parametrize("job", JOBS)
@pytest.mark.parametrize("way", ["2_to_1", "4_to_2"])
def test_no_sample_is_lost_or_doubled(runs, job, way):
    whole, found = keys_by_step(runs / "whole" / job), keys_by_step(runs / way / job)
    assert list(found) == [0, 1, 2] and found == whole
    if job == "tokenizer":  # steps of pictures end where a pass ends; packs hold documents back
        assert sorted(key for keys in found.values() for key in keys) == [
            f"picture{number:02d}" for number in range(PICTURES)
        ]


@pytest.mark.parametrize("job", JOBS)
@pytest.mark.parametrize(
    ("saved", "way", "step"), [("2", "2_to_1", 1), ("2", "2_to_4", 1), ("2_to_4", "4_to_2", 2)]
)
def test_what_is_loaded_is_what_was_saved(runs, job, saved, way, step):
    found = assert_loaded_is_saved(runs / saved / job, runs / way / job, step)
    expected = {
        "tokenizer": {"tokenizer/momentum_buffer", "tokenizer/buffer", "discriminator/exp_avg"},
        "mllm": {"model/exp_avg", "model/buffer", "model/weight"},
    }[job]
    assert expected <= {key.rpartition("/")[0] for key in found}


@pytest.mark.parametrize("way", ["2_to_1", "4_to_2"])
def test_losses_of_the_unified_model_go_on(runs, way):
    whole, found = figures(runs / "whole" / "mllm"), figures(runs / way / "mllm")
    for step in range(1, STEPS + 1):
        for name in ("loss/text", "loss/pixel", "loss/semantic"):
            assert found[step][name] == pytest.approx(whole[step][name], rel=1e-4), (step, name)

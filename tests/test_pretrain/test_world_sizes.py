"""A run goes on with another number of ranks or another ZeRO level: same weights to the bit, same losses."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch

from pretrain.checkpoints.fragments import FragmentReader, read_index
from tests.support.distributed import run_function, run_module
from tests.test_pretrain.test_trainer import figures, toy_arguments

# Global batch 16 = micro-batch 4 x 4, 2 or 1 micro-steps on 1, 2 or 4 ranks. The toy has frozen parameters
# and a buffer that training changes; `two_engines` adds one at ZeRO-1.
MUON = ["optimizer.name=muon", "gradient_clipping=0"]
VARIANTS = {
    "zero1": ("zero1", ["two_engines=true"]),
    "zero2_muon": ("zero2", MUON),
    "zero3": ("zero3", []),
    "zero3_muon_bf16": ("zero3", [*MUON, "precision=bf16"]),
}
SLOW_VARIANTS = {
    "zero1_muon": ("zero1", MUON),
    "zero2": ("zero2", ["two_engines=true"]),
    "zero3_muon": ("zero3", MUON),
    "zero1_muon_bf16": ("zero1", [*MUON, "precision=bf16"]),
    "zero2_bf16": ("zero2", ["precision=bf16"]),
    "zero3_bf16": ("zero3", ["precision=bf16"]),
    "offload": ("zero3_offload", []),
}
# What a run of another level goes on at, in the same number of ranks.
OTHER_LEVEL = {"zero1": "zero3", "zero2_muon": "zero3", "zero3_muon_bf16": "zero1"}
WAYS = ["2_to_1", "2_to_4", "4_to_2"]
STEPS, FIRST_STOP, SECOND_STOP = 7, 3, 5
# Sums over ranks are taken in another order: fp32 losses agree to 2e-5, bf16 ones to bf16's own precision.
TOLERANCE = {"fp32": 2e-5, "bf16": 2e-2}


def run(folder: Path, level: str, settings: list[str], *more: str, resumed: bool = False) -> None:
    """Train a toy of STEPS steps."""
    train_on(toy_arguments(folder, level, *settings, f"steps={STEPS}", *more), resumed)


def train_on(words: list[str], resumed: bool) -> None:
    """Start the trainer; if it resumes, save what it has loaded at once beside the run; and train on."""
    from pretrain.config import job_classes, load_job_config
    from pretrain.runtime import start_runtime
    from pretrain.trainer import Trainer

    config = load_job_config(words)
    runtime = start_runtime(config)
    trainer = Trainer(config, runtime, job_classes(config.job)[1](config, runtime))
    if resumed:
        trainer._start_or_resume()
        own, trainer.checkpoints.folder = trainer.checkpoints.folder, Path(config.run_dir) / "loaded"
        trainer._started = 0.0
        trainer._save(background=False)
        trainer.checkpoints.folder = own
        trainer.log.close()
    trainer.run()


def start(folder: Path, variants: dict) -> None:
    """Run every variant to its end, and once more to its first stop."""
    for name, (level, settings) in variants.items():
        run(folder / "whole" / name, level, settings)
        run(folder / "stopped" / name, level, settings, f"signal_at_step={FIRST_STOP - 1}")


def go_on(folder: Path, variants: dict, *more: str) -> None:
    for name, (level, settings) in variants.items():
        run(folder / name, level, settings, *more, resumed=True)


def end(folder: Path, variants: dict) -> None:
    go_on(folder / "4_to_2", variants)
    changed = {name: (level, variants[name][1]) for name, level in OTHER_LEVEL.items() if name in variants}
    go_on(folder / "level", changed)


def on_other_ranks(folder: Path, variants: dict) -> Path:
    """Two ranks stop; one goes on; four go on and stop; two go on from there, and at another level."""

    def ranks(number: int, function, *arguments) -> None:
        run_function(function, *arguments, world_size=number, process_group=False, timeout=900)

    ranks(2, start, folder, variants)
    for way in ("2_to_1", "2_to_4", "level"):
        shutil.copytree(folder / "stopped", folder / way)
    ranks(1, go_on, folder / "2_to_1", variants)
    ranks(4, go_on, folder / "2_to_4", variants, f"signal_at_step={SECOND_STOP - 1}")
    shutil.copytree(folder / "2_to_4", folder / "4_to_2")
    for loaded in (folder / "4_to_2").glob("*/loaded"):
        shutil.rmtree(loaded)
    ranks(2, end, folder, variants)
    return folder


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    return on_other_ranks(tmp_path_factory.mktemp("runs"), VARIANTS)


@pytest.fixture(scope="module")
def slow_runs(tmp_path_factory) -> Path:
    return on_other_ranks(tmp_path_factory.mktemp("slow_runs"), SLOW_VARIANTS)


def wholes(checkpoint: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a checkpoint's engines, put together from the pieces of all ranks."""
    found = {}
    for folder in checkpoint.iterdir():
        if not (folder / "contents.json").exists():
            continue
        index = read_index(folder, sorted(path.name for path in folder.glob("*.safetensors")))
        reader = FragmentReader(folder, index)
        for key, places in index.items():
            found[f"{folder.name}/{key}"] = reader.read(key, 0, max(place.stop for place in places))
    return found


def assert_same_when_loaded(runs: Path, way: str, variant: str) -> None:
    """As `assert_loaded_is_saved`, and everything a variant should have is there."""
    source, step = ("2_to_4", SECOND_STOP) if way == "4_to_2" else ("stopped", FIRST_STOP)
    saved = assert_loaded_is_saved(runs / source / variant, runs / way / variant, step)
    kinds = {key.split("/")[1] for key in saved}
    assert {"weight", "buffer", "exp_avg", "exp_avg_sq"} <= kinds
    assert ("muon" in variant) == ("momentum_buffer" in kinds)
    assert saved["model/weight/frozen.weight"].numel() == 8 * 16


def assert_loaded_is_saved(saved_run: Path, loaded_run: Path, step: int) -> dict[str, torch.Tensor]:
    """What was loaded is what was saved, to the bit: masters, optimizer states, frozen parts, buffers."""
    saved = wholes(saved_run / "checkpoints" / f"step_{step:08d}")
    loaded = wholes(loaded_run / "loaded" / f"step_{step:08d}")
    assert saved.keys() == loaded.keys()
    for key, tensor in saved.items():
        assert tensor.dtype == loaded[key].dtype and torch.equal(tensor, loaded[key]), key
    return saved


def last_checkpoint(run: Path) -> Path:
    return run / "checkpoints" / (run / "checkpoints" / "latest").read_text(encoding="utf-8")


def assert_losses_go_on(runs: Path, way: str, variant: str) -> None:
    """The losses of all steps are those of two undisturbed ranks."""
    whole, resumed = figures(runs / "whole" / variant), figures(runs / way / variant)
    steps = SECOND_STOP if way == "2_to_4" else STEPS
    assert sorted(resumed) == list(range(1, steps + 1))
    tolerance = TOLERANCE["bf16" if "bf16" in variant else "fp32"]
    for step in resumed:
        losses = {key: value for key, value in whole[step].items() if key.startswith(("loss/", "lr"))}
        assert losses
        for key, value in losses.items():
            assert resumed[step][key] == pytest.approx(value, rel=tolerance), (step, key)
    state = json.loads((last_checkpoint(runs / way / variant) / "state.json").read_text(encoding="utf-8"))
    assert state["step"] == steps and state["world_size"] == (2 if way == "level" else int(way[-1]))


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("way", WAYS)
def test_another_number_of_ranks_goes_on(runs, way, variant):
    assert_same_when_loaded(runs, way, variant)
    assert_losses_go_on(runs, way, variant)


@pytest.mark.parametrize("variant", OTHER_LEVEL)
def test_another_zero_level_goes_on(runs, variant):
    assert_same_when_loaded(runs, "level", variant)
    assert_losses_go_on(runs, "level", variant)


@pytest.mark.slow
@pytest.mark.parametrize("variant", SLOW_VARIANTS)
@pytest.mark.parametrize("way", WAYS)
def test_another_number_of_ranks_goes_on_in_other_settings(slow_runs, way, variant):
    assert_same_when_loaded(slow_runs, way, variant)
    assert_losses_go_on(slow_runs, way, variant)


def test_another_model_is_refused(runs, tmp_path):
    shutil.copytree(runs / "stopped" / "zero1" / "checkpoints", tmp_path / "checkpoints")
    words = toy_arguments(tmp_path, "zero1", "two_engines=true", "width=8")
    finished = run_module("pretrain.train", words, world_size=1)
    assert finished.returncodes == [2]
    message = r"error: .*frozen\.weight has shape \[16, 8\] there and \[8, 8\] in this run"
    assert re.search(message, finished.output)

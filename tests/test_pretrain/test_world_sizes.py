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

# Global batch 16 = micro-batch 4 x 4, 2 or 1 micro-steps on 1, 2 or 4 ranks. The toy has frozen parameters and a
# buffer that training changes; `two_engines` adds one at ZeRO-1.
MUON = ["optimizer.name=muon", "gradient_clipping=0"]
VARIANTS = {
    "zero1": ("zero1", ["two_engines=true"]),
    "zero2": ("zero2", ["two_engines=true"]),
    "zero3": ("zero3", ["two_engines=true"]),
    "zero2_muon": ("zero2", MUON),
    "zero3_muon_bf16": ("zero3", [*MUON, "precision=bf16"]),
}
SLOW_VARIANTS = {
    "zero1_muon": ("zero1", MUON),
    "zero3_muon": ("zero3", MUON),
    "zero1_muon_bf16": ("zero1", [*MUON, "precision=bf16"]),
    "zero2_bf16": ("zero2", ["precision=bf16"]),
    "zero3_bf16": ("zero3", ["precision=bf16"]),
    "offload": ("zero3_offload", []),
}
# What a run of another level goes on at, in the same number of ranks.
OTHER_LEVEL = {"zero1": "zero3", "zero3": "zero2", "zero2_muon": "zero3", "zero3_muon_bf16": "zero1"}
STEPS = 6
# Sums over ranks are taken in another order: fp32 losses agree to 2e-5, bf16 ones to bf16's own precision.
TOLERANCE = {"fp32": 2e-5, "bf16": 2e-2}


def run(folder: Path, level: str, settings: list[str], *more: str, resumed: bool = False) -> None:
    """Start the trainer; if it resumes, save what it has loaded at once beside the run; and train on."""
    from pretrain.config import job_classes, load_job_config
    from pretrain.runtime import start_runtime
    from pretrain.trainer import Trainer

    config = load_job_config(toy_arguments(folder, level, *settings, f"steps={STEPS}", *more))
    runtime = start_runtime(config)
    trainer = Trainer(config, runtime, job_classes(config.job)[1](config, runtime))
    if resumed:
        trainer._start_or_resume()
        own, trainer.checkpoints.folder = trainer.checkpoints.folder, folder / "loaded"
        trainer._started = 0.0
        trainer._save(background=False)
        trainer.checkpoints.folder = own
        trainer.log.close()
    trainer.run()


def start(folder: Path, variants: dict, whole: bool) -> None:
    """Run every variant to its end, if asked, and once more to step 3."""
    for name, (level, settings) in variants.items():
        if whole:
            run(folder / "whole" / name, level, settings)
        run(folder / "stopped" / name, level, settings, "signal_at_step=2")


def go_on(folder: Path, variants: dict) -> None:
    for name, (level, settings) in variants.items():
        run(folder / name, level, settings, resumed=True)


def on_other_ranks(folder: Path, variants: dict) -> Path:
    """Two ranks stop after step 3; one, four, and two at another level go on; four stop and two go on."""

    def ranks(number: int, function, *arguments) -> None:
        run_function(function, *arguments, world_size=number, process_group=False, timeout=900)

    def copied(source: str, target: str) -> Path:
        return Path(shutil.copytree(folder / source / "stopped", folder / target))

    ranks(2, start, folder / "2", variants, True)
    ranks(4, start, folder / "4", variants, False)
    ranks(1, go_on, copied("2", "2_to_1"), variants)
    ranks(4, go_on, copied("2", "2_to_4"), variants)
    ranks(2, go_on, copied("4", "4_to_2"), variants)
    changed = {name: (level, variants[name][1]) for name, level in OTHER_LEVEL.items() if name in variants}
    if changed:
        ranks(2, go_on, copied("2", "level"), changed)
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
    """What was loaded is what was saved, to the bit: masters, optimizer states, frozen parts, buffers."""
    source = runs / ("4" if way == "4_to_2" else "2") / "stopped"
    saved = wholes(source / variant / "checkpoints" / "step_00000003")
    loaded = wholes(runs / way / variant / "loaded" / "step_00000003")
    assert saved.keys() == loaded.keys()
    kinds = {key.split("/")[1] for key in saved}
    assert {"weight", "buffer", "exp_avg", "exp_avg_sq"} <= kinds
    assert ("muon" in variant) == ("momentum_buffer" in kinds)
    assert saved["model/weight/frozen.weight"].numel() == 8 * 16
    for key, tensor in saved.items():
        assert tensor.dtype == loaded[key].dtype and torch.equal(tensor, loaded[key]), key


def assert_losses_go_on(runs: Path, way: str, variant: str) -> None:
    """The losses of all steps are those of two undisturbed ranks."""
    whole, resumed = figures(runs / "2" / "whole" / variant), figures(runs / way / variant)
    assert sorted(resumed) == list(range(1, STEPS + 1))
    tolerance = TOLERANCE["bf16" if "bf16" in variant else "fp32"]
    for step, expected in whole.items():
        losses = {key: value for key, value in expected.items() if key.startswith(("loss/", "lr"))}
        assert losses
        for key, value in losses.items():
            assert resumed[step][key] == pytest.approx(value, rel=tolerance), (step, key)
    done = json.loads((runs / way / variant / "done.json").read_text(encoding="utf-8"))
    assert done["world_size"] == int(way[-1]) if way != "level" else 2


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("way", ["2_to_1", "2_to_4", "4_to_2"])
def test_another_number_of_ranks_goes_on(runs, way, variant):
    assert_same_when_loaded(runs, way, variant)
    assert_losses_go_on(runs, way, variant)


@pytest.mark.parametrize("variant", OTHER_LEVEL)
def test_another_zero_level_goes_on(runs, variant):
    assert_same_when_loaded(runs, "level", variant)
    assert_losses_go_on(runs, "level", variant)


@pytest.mark.slow
@pytest.mark.parametrize("variant", SLOW_VARIANTS)
@pytest.mark.parametrize("way", ["2_to_1", "2_to_4", "4_to_2"])
def test_another_number_of_ranks_goes_on_in_other_settings(slow_runs, way, variant):
    assert_same_when_loaded(slow_runs, way, variant)
    assert_losses_go_on(slow_runs, way, variant)


def test_another_model_is_refused(runs, tmp_path):
    shutil.copytree(runs / "2" / "stopped" / "zero1" / "checkpoints", tmp_path / "checkpoints")
    words = toy_arguments(tmp_path, "zero1", "two_engines=true", "width=8")
    finished = run_module("pretrain.train", words, world_size=1)
    assert finished.returncodes == [2]
    assert re.search(r"error: .*frozen\.weight has shape \[16, 8\] there and \[8, 8\] in this run", finished.output)

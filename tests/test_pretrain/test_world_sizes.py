"""A run goes on with another number of ranks or another ZeRO level: same weights to the bit, same losses."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from pretrain.checkpoints.fragments import FragmentReader, read_index
from tests.support.distributed import run_function
from tests.test_pretrain.test_trainer import figures, toy_arguments

# Global batch 16 = micro-batch 4 x 4, 2 or 1 micro-steps on 1, 2 or 4 ranks. The toy has frozen parameters, a
# buffer that training changes, and a second engine at ZeRO-1.
MUON = ["optimizer.name=muon", "gradient_clipping=0"]
VARIANTS = {
    "zero1": ("zero1", ["two_engines=true"]),
    "zero2": ("zero2", ["two_engines=true"]),
    "zero3": ("zero3", ["two_engines=true"]),
    "zero1_muon": ("zero1", MUON),
    "zero2_muon": ("zero2", MUON),
    "zero3_muon": ("zero3", MUON),
    "zero1_muon_bf16": ("zero1", [*MUON, "precision=bf16"]),
    "zero2_bf16": ("zero2", ["precision=bf16"]),
    "zero3_bf16": ("zero3", ["precision=bf16"]),
    "zero3_muon_bf16": ("zero3", [*MUON, "precision=bf16"]),
    "offload": ("zero3_offload", []),
}
STEPS = 6
# Sums over ranks are taken in another order: fp32 losses agree to 2e-5, bf16 ones to bf16's own precision.
TOLERANCE = {"fp32": 2e-5, "bf16": 2e-2}


def run(folder: Path, variant: str, *more: str, resumed: bool = False) -> None:
    """Start the trainer; if it resumes, save what it has loaded at once beside the run; and train on."""
    from pretrain.config import job_classes, load_job_config
    from pretrain.runtime import start_runtime
    from pretrain.trainer import Trainer

    level, settings = VARIANTS[variant]
    config = load_job_config(toy_arguments(folder, level, *settings, *more))
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


def first_part(folder: Path, steps: int) -> None:
    for variant in VARIANTS:
        run(folder / "whole" / variant, variant, f"steps={STEPS}")
        run(folder / f"after_{steps}" / variant, variant, f"steps={STEPS}", f"signal_at_step={steps - 1}")


def second_part(folder: Path, changed: dict[str, str]) -> None:
    for variant in VARIANTS:
        run(folder / changed.get(variant, variant), variant, f"steps={STEPS}", resumed=True)


def copied(source: Path, target: Path) -> Path:
    """The run folders of `source`, for another number of ranks to go on with."""
    shutil.copytree(source, target)
    return target


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    """Two ranks stop after step 3; one, four, and two at other levels go on; four stop, two go on."""
    folder = tmp_path_factory.mktemp("runs")
    run_function(first_part, folder, 3, world_size=2, process_group=False)
    stopped = folder / "after_3"
    run_function(second_part, copied(stopped, folder / "1"), {}, world_size=1, process_group=False)
    run_function(second_part, copied(stopped, folder / "4"), {}, world_size=4, process_group=False)
    return folder


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


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("ranks", ["1", "4"])
def test_what_was_loaded_is_what_was_saved(runs, ranks, variant):
    saved = wholes(runs / "after_3" / variant / "checkpoints" / "step_00000003")
    loaded = wholes(runs / ranks / variant / "loaded" / "step_00000003")
    assert saved.keys() == loaded.keys()
    kinds = {key.split("/")[1] for key in saved}
    assert {"weight", "buffer", "exp_avg", "exp_avg_sq"} <= kinds and ("muon" in variant) == (
        "momentum_buffer" in kinds
    )
    assert saved["model/weight/frozen.weight"].numel() == 8 * 16
    for key, tensor in saved.items():
        assert tensor.dtype == loaded[key].dtype and torch.equal(tensor, loaded[key]), key


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("ranks", ["1", "4"])
def test_losses_go_on(runs, ranks, variant):
    whole, resumed = figures(runs / "whole" / variant), figures(runs / ranks / variant)
    assert sorted(resumed) == list(range(1, STEPS + 1))
    tolerance = TOLERANCE["bf16" if "bf16" in variant else "fp32"]
    for step, expected in whole.items():
        losses = {key: value for key, value in expected.items() if key.startswith(("loss/", "lr"))}
        assert losses
        for key, value in losses.items():
            assert resumed[step][key] == pytest.approx(value, rel=tolerance), (step, key)
    done = json.loads((runs / ranks / variant / "done.json").read_text(encoding="utf-8"))
    assert done["world_size"] == int(ranks)

"""Every benchmark runs, at sizes that measure nothing: one that is not started for weeks must not rot."""

import json
import sys
from importlib import import_module
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
WORDS = {
    "accelerator": "--size tiny --steps 1 --warm-up 1 --work WORK --output WORK/figures.json --cases matmul "
    "quantizer head encode pretokenize_torchvision draw mllm",
    "answers": "--questions 4 --batch 2 --max-new-tokens 4 --width 64 --layers 1 --words 300 --positions 4 "
    "--rounds 1",
    "checkpoint_metadata": "--ranks 2 --files 2 --checkpoints 2 --milliseconds 0",
    "checkpoint_saving": "--megabytes 1 --steps 3 --ranks 1",
    "decoding": "--images 2 --rounds 1",
    "generation": "--rows 2 --hidden 128 --layers 1 --depth 2 --codes 16 --iterations 1",
    "overlap": "--rounds 1 --ratios 1 --batch-size 2 --batches 3 --image-size 32 --decoding-seconds 0.01",
    "quantizer": "--images 1 --positions 8 --codes 64 --iterations 1 --contenders ours gemm",
    "streams": "--positions 4 --num-quantizers 2 --samples 40 --rounds 1 --buffer 8 --picture-side 32 "
    "--image-size 16 --seconds 0.01",
    "tokenizer_step": "--preset tiny --images 1 --steps 1 --threads 1",
    "train_step": "--documents 4 --context 64 --batch 2 --positions 4 --hidden 128 --layers 1 --rounds 1 "
    "--head-layers 1 --depth 2 --codes 16",
    "visual_heads": "--positions 8 --hidden 128 --layers 1 --depth 2 --codes 16 --chunk 4",
}


def test_every_benchmark_is_run_here():
    assert set(WORDS) == {path.stem for path in (ROOT / "benchmarks").glob("*.py")} - {"__init__"}


@pytest.mark.parametrize("name", WORDS)
def test_benchmark_runs(name, tmp_path, monkeypatch, capsys):
    words = WORDS[name].replace("WORK", str(tmp_path)).split()
    monkeypatch.setattr(sys, "argv", [name, *words])
    monkeypatch.chdir(tmp_path)
    assert not import_module(f"benchmarks.{name}").main()
    assert capsys.readouterr().out
    if name == "accelerator":
        figures = json.loads((tmp_path / "figures.json").read_text(encoding="utf-8"))
        assert figures["mllm"]["tokens_per_second"] > 0
        assert figures["encode"]["fp32_same_codes"] == 1
        assert figures["pretokenize_torchvision"]["whole_images_per_second"] > 0

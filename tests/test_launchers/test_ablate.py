"""The ablation: what its variants build, and what it says of their figures."""

import statistics

import torch

from dualtoken.visual_tokenizer.config import preset_config
from dualtoken.visual_tokenizer.model import DualTokenVisualTokenizer
from launchers.ablate import FIGURES, orderings, table_lines, variants
from pretrain.config import load_job_config


def row(name, **means):
    found = {"name": name, "meaning": name}
    for figure in FIGURES:
        values = means.get(figure.key, [1.0, 1.0])
        mean = sum(values) / len(values)
        spread = statistics.stdev(values) if len(values) > 1 else None
        found[figure.key] = {"mean": mean, "spread": spread, "values": values}
    return found


def test_variants_build_what_they_say():
    preset = preset_config("quickstart")
    built = {}
    for variant in variants(preset.vision.num_hidden_layers, preset.semantic_layer):
        words = ["recipe=quickstart_tokenizer", "run_dir=x", "model.backbone=y", *variant.words]
        config = load_job_config(words, world_size=2)
        with torch.device("meta"):
            model = DualTokenVisualTokenizer(preset_config(config.model.preset, **config.model.overrides))
        built[variant.name] = (model.config, config.losses, list(model.quantizers()))
    assert built["merged"][2] == ["merged"] and built["dual"][2] == ["pixel", "semantic"]
    layers = {name: found[0].reconstruction_layer for name, found in built.items()}
    assert layers["dual"] == layers["shallow"] == 1 and layers["half"] == 2 and layers["three_quarters"] == 3
    assert layers["deep"] == preset.semantic_layer
    trained = {name for name, (_, losses, _) in built.items() if losses.semantic_tokens > 0}
    assert trained == {"merged", "dual", "half", "three_quarters"}


def test_table_and_orderings():
    rows = {
        "dual": row("dual", psnr=[20.0, 20.2], quantized_r1=[0.5, 0.5]),
        "shallow": row("shallow", psnr=[19.0, 21.0]),
        "merged": row("merged", psnr=[15.0, 15.2], quantized_r1=[0.1, 0.2]),
        "deep": row("deep", psnr=[25.0, 25.1]),
        "half": row("half", psnr=[18.0]),
        "three_quarters": row("three_quarters", psnr=[17.0]),
    }
    rows["deep"]["quantized_r1"] = None
    lines = table_lines(list(rows.values()))
    assert lines[2].startswith("| dual | 20.10 ± 0.14 | 1.000 ± 0.000 |")
    assert "| 50.0 ± 0.0 |" in lines[2] and " - |" in lines[5]
    verdicts = orderings(rows)
    assert verdicts[0].endswith("appears (+0.1, within the spread)")
    assert verdicts[1].endswith("appears (+4.9, beyond the spread)")
    assert "does not appear" in verdicts[2] and "beyond" in verdicts[2]
    assert verdicts[3].startswith("(d) keeps meaning better than (a): appears")
    assert "one seed: no spread known" in verdicts[4]

"""The ablations: what their variants build, what is not repeated, and what is said of the figures."""

import json
import statistics
from dataclasses import replace

import pytest
import torch

from data_pipeline.sources.scenes.questions import KINDS
from dualtoken.unified_model.config import DualTokenConfig
from dualtoken.visual_tokenizer.config import preset_config
from dualtoken.visual_tokenizer.model import DualTokenVisualTokenizer
from eval.results import write_json
from eval.scenes.answered import YES_NO
from eval.scenes.correctness import ALL, PARTS
from launchers import ablate_tokenizer, ablate_unified, processes
from launchers.ablate import ablate, chance_rows, orderings
from launchers.ablate_tokenizer import variants
from launchers.ablate_unified import figures_of, unified_ablation
from launchers.errors import UserError
from launchers.variants import table_lines
from pretrain.config import load_job_config
from tests.support.tiny_run import make_tiny_run
from tests.support.unified_support import tiny_config


def row(name, figures, **means):
    found = {"name": name, "meaning": name}
    for figure in figures:
        values = means.get(figure.key, [1.0, 1.0])
        mean = sum(values) / len(values)
        spread = statistics.stdev(values) if len(values) > 1 else None
        found[figure.key] = {"mean": mean, "spread": spread, "values": values}
    return found


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A quickstart's folder; of the sample data nothing is read before a training is measured."""
    folder = make_tiny_run(tmp_path_factory.mktemp("quickstart"))
    write_json(folder / "sample_data" / "summary.json", {})
    return folder


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


def test_unified_variants_read_what_they_say(run, tmp_path):
    ablation = unified_ablation(run, steps=7)
    read = {}
    for variant in ablation.variants:
        words = [*ablation.settings(tmp_path, 5), *variant.words]
        config = load_job_config(words, world_size=1)
        assert (config.steps, config.seed, config.run_dir) == (7, 5, str(tmp_path))
        assert config.model.visual_tokenizer == str(run / "tokenizer" / "export")
        assert all(entry.path.startswith(str(run)) for entry in config.data.blend)
        fields = {name: value for name, value in config.model.heads.items() if name == "visual_input"}
        read[variant.name] = tiny_config(**fields).visual_input
    assert read == {"semantic": "semantic", "pixel": "pixel", "both": "both"}
    recipe = load_job_config(["recipe=quickstart_mllm", "run_dir=x"], world_size=1)
    assert unified_ablation(run).steps == recipe.steps
    tokenizer = DualTokenVisualTokenizer.from_pretrained(run / "tokenizer" / "export")
    config = load_job_config(["recipe=quickstart_mllm", "run_dir=x", "model.heads.visual_input=colour"], 1)
    with pytest.raises(
        ValueError, match="visual_input='colour'; expected one of 'both', 'pixel', 'semantic'"
    ):
        DualTokenConfig.for_visual_tokenizer(config.model.llm_config, tokenizer, **config.model.heads)


def test_table_and_orderings():
    figures, claims = ablate_tokenizer.FIGURES, ablate_tokenizer.ORDERINGS
    rows = {
        "dual": row("dual", figures, psnr=[20.0, 20.2], quantized_r1=[0.5, 0.5]),
        "shallow": row("shallow", figures, psnr=[19.0, 21.0]),
        "merged": row("merged", figures, psnr=[15.0, 15.2], quantized_r1=[0.1, 0.2]),
        "deep": row("deep", figures, psnr=[25.0, 25.1]),
        "half": row("half", figures, psnr=[18.0]),
        "three_quarters": row("three_quarters", figures, psnr=[17.0]),
    }
    rows["deep"]["quantized_r1"] = None
    lines = table_lines(list(rows.values()), figures)
    assert lines[2].startswith("| dual | 20.10 ± 0.14 | 1.000 ± 0.000 |")
    assert "| 50.0 ± 0.0 |" in lines[2] and " - |" in lines[5]
    verdicts = orderings(claims, rows)
    assert verdicts[0].endswith("appears (+0.1, within the spread)")
    assert verdicts[1].endswith("appears (+4.9, beyond the spread)")
    assert "does not appear" in verdicts[2] and "beyond" in verdicts[2]
    assert verdicts[3].startswith("(d) keeps meaning better than (a): appears")
    assert "one seed: no spread known" in verdicts[4]


def test_orderings_of_the_unified_model():
    figures = ablate_unified.FIGURES
    rows = {
        "semantic": row("semantic", figures, answers=[0.70, 0.72], drawn_all=[0.1, 0.1]),
        "pixel": row("pixel", figures, answers=[0.40, 0.42], drawn_all=[0.3, 0.5]),
        "both": row("both", figures, answers=[0.71, 0.72], drawn_all=[0.4, 0.42]),
    }
    assert orderings(ablate_unified.ORDERINGS, rows) == [
        "understanding: semantic above pixel: appears (+0.3, beyond the spread)",
        "understanding: both above semantic: appears (+0.005, within the spread)",
        "generation: both above semantic: appears (+0.31, beyond the spread)",
        "generation: both above pixel: appears (+0.01, within the spread)",
    ]


def scenes_json():
    """What the measure writes, each figure another one."""
    right, chance = (
        {part: (start + place) / 100 for place, part in enumerate((*PARTS, ALL))} for start in (10, 50)
    )
    kinds = {
        kind: {"accuracy": 0.5 + place / 10, "majority": place / 10, "chance": 0.9}
        for place, kind in enumerate((*KINDS, YES_NO))
    }
    captions = {
        language: {"shares": {ALL: share}, "chance": {ALL: share / 10}}
        for language, share in (("en", 0.8), ("de", 0.4))
    }
    held_out = {
        "answers": {"kinds": kinds},
        "captions": captions,
        "drawn": {"shares": right, "chance": chance},
    }
    return {"splits": {"seen": {}, "held_out": held_out}}


def test_figures_of_scenes_and_their_chances():
    found = figures_of(scenes_json())
    shown = {figure.key for figure in ablate_unified.FIGURES}
    assert found.keys() == shown | {figure.chance for figure in ablate_unified.FIGURES}
    assert [found[f"answer_{kind}"] for kind in (*KINDS, "yes_no")] == [0.5, 0.6, 0.7, 0.8, 0.9]
    assert found["answers"] == pytest.approx(0.7) and found["chance_answers"] == pytest.approx(0.2)
    assert found["captions"] == pytest.approx(0.6) and found["chance_captions"] == pytest.approx(0.06)
    assert (found["drawn_object"], found["drawn_colour"], found["drawn_position"]) == (0.10, 0.11, 0.13)
    assert (found["drawn_all"], found["chance_drawn_all"]) == (0.15, 0.55)


def finish(ablation, output, seeds):
    """Leave in `output` what trainings that are done leave; returns the folders."""
    folders = []
    for seed in range(seeds):
        for place, variant in enumerate(ablation.variants):
            folder = output / f"{variant.name}-seed{seed}"
            words = [*ablation.settings(folder, seed), *variant.words]
            found = {figure.key: (place + seed) / 10 for figure in ablation.figures}
            found |= {figure.chance: 0.05 for figure in ablation.figures if figure.chance}
            asked = {"words": words, "made_from": dict(ablation.made_from)}
            write_json(folder / "ablation.json", {**asked, **found})
            folders.append(folder)
    return folders


def test_what_is_done_is_not_repeated(run, tmp_path, monkeypatch):
    started = []
    monkeypatch.setattr(
        processes,
        "run",
        lambda command, ranks, notice: started.append(command) or processes.Finished(3, 0, 0),
    )
    ablation, said = unified_ablation(run, steps=7), []
    folders = finish(ablation, tmp_path, seeds=2)
    rows = ablate(ablation, tmp_path, 2, 1, said.append)
    assert not started
    assert [one["name"] for one in rows] == ["semantic", "pixel", "both", "chance"]
    assert rows[1]["answers"] == {
        "mean": pytest.approx(0.15),
        "spread": statistics.stdev([0.1, 0.2]),
        "values": [0.1, 0.2],
    }
    table = (tmp_path / "ablation.md").read_text(encoding="utf-8")
    assert "| pixel codes alone | 15.0 ± 7.1 |" in table and "| by chance" in table
    assert "7 steps, 2 seed(s)" in table and "- understanding: semantic above pixel: does not appear" in table
    written = json.loads((tmp_path / "ablation.json").read_text(encoding="utf-8"))
    assert written["rows"] == rows and len(written["orderings"]) == 4
    # One is missing: that one alone is trained, with the words it is known by afterwards.
    (folders[4] / "ablation.json").unlink()
    with pytest.raises(UserError, match="training in .*pixel-seed1 failed; see above, then start this again"):
        ablate(ablation, tmp_path, 2, 1, said.append)
    (command,) = started
    asked = json.loads((folders[4] / "asked.json").read_text(encoding="utf-8"))
    assert command[-len(asked["words"]) :] == asked["words"]
    assert "model.heads.visual_input=pixel" in command and f"run_dir={folders[4]}" in command


def test_runs_of_other_settings_are_not_taken_for_these(run, tmp_path, monkeypatch):
    monkeypatch.setattr(processes, "run", lambda command, ranks, notice: pytest.fail("trained"))
    ablation = unified_ablation(run, steps=7)
    finish(ablation, tmp_path, seeds=1)
    with pytest.raises(
        UserError, match="semantic-seed0 holds a run with steps=7, which is not .* another --out"
    ):
        ablate(unified_ablation(run, steps=8), tmp_path, 1, 1, print)
    retrained = replace(ablation, made_from={"codes of the visual tokenizer": "another"})
    with pytest.raises(UserError, match="holds a run with codes of the visual tokenizer "):
        ablate(retrained, tmp_path, 1, 1, print)
    # A training that was broken off is known by what it was started with.
    broken_off = tmp_path / "semantic-seed0"
    (broken_off / "ablation.json").rename(broken_off / "asked.json")
    with pytest.raises(UserError, match="semantic-seed0 holds a run with steps=7"):
        ablate(unified_ablation(run, steps=8), tmp_path, 1, 1, print)


def test_no_chances_no_row_of_them(run):
    ablation = unified_ablation(run)
    bare = replace(ablation, figures=[replace(figure, chance="") for figure in ablation.figures])
    assert chance_rows(bare, [{}]) == []


def test_what_is_missing_is_named(tmp_path):
    with pytest.raises(
        UserError, match="no sample data in .*: run `dualtoken quickstart` first or give --run"
    ):
        unified_ablation(tmp_path)
    write_json(tmp_path / "sample_data" / "summary.json", {})
    with pytest.raises(UserError, match="no visual tokenizer in "):
        unified_ablation(tmp_path)
    with pytest.raises(UserError, match="no SigLIP in "):
        ablate_tokenizer.tokenizer_ablation(tmp_path)

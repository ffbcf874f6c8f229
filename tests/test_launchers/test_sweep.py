"""`dualtoken sweep`: trainings of a tiny recipe, broken off and gone on with; values, failures, spikes."""

import dataclasses
import json
import subprocess
import time
from pathlib import Path

import psutil
import pytest
from PIL import Image

from data_pipeline.pretokenize.command import main as pretokenize
from eval.results import read_json, write_json
from launchers import processes
from launchers.errors import UserError
from launchers.loss_curves import LossCurves
from launchers.sweep import Sweep, folder_name, parse_sweep, ranks_for_all, split_values, sweep
from launchers.variants import UNDER_WAY
from pretrain.metrics import read_metrics
from tests.support.command import call
from tests.support.tiny_run import make_tiny_run
from tests.support.toy_words import TOY_WORDS


@pytest.fixture
def recipe(tmp_path):
    path = tmp_path / "toy.yaml"
    lines = [word.replace("=", ": ", 1) for word in TOY_WORDS if not word.startswith("wandb.")]
    path.write_text("\n".join([*lines, "wandb: {mode: disabled}"]), encoding="utf-8")
    return str(path)


def records(folder, split="train"):
    return [record for record in read_metrics(folder / "metrics.jsonl") if record["split"] == split]


def test_what_was_stopped_goes_on_and_all_is_compared(recipe, tmp_path, capsys, monkeypatch):
    started, run = [], processes.run

    def count(command, *arguments):
        started.append(command)
        return run(command, *arguments)

    monkeypatch.setattr(processes, "run", count)
    output = tmp_path / "sweep"
    # The second training gets SIGTERM in its third step; otherwise the two are the same.
    words = ["sweep", recipe, "signal_at_step=-1,2", "width=8", "--output", output, "--ranks", "1"]
    code, _, err = call(words, capsys)
    folders = [output / f"signal_at_step={value}-seed0" for value in (-1, 2)]
    assert code == 2 and err.endswith(f"error: the training in {folders[1]} was stopped; start this again\n")
    assert [len(records(folder)) for folder in folders] == [6, 3]
    before = records(folders[1])

    code, out, err = call(words, capsys)
    assert code == 0, err
    assert len(started) == 3 and f"run_dir={folders[1]}" in started[2]
    assert "[2/2] signal_at_step=2, seed 0" in out and "[1/2]" not in out
    undisturbed, gone_on = map(records, folders)
    assert gone_on[:3] == before  # times included
    losses = [[record["loss/model"] for record in run] for run in (undisturbed, gone_on)]
    assert losses[0] == losses[1] and len(losses[0]) == 6

    table = (output / "sweep.md").read_text(encoding="utf-8")
    assert table in out
    held_out = records(folders[0], "val")[-1]["loss/model"]
    assert f"| signal_at_step=2 | {held_out:.4f} | {losses[0][-1]:.4f} | 0 | " in table
    written = read_json(output / "sweep.json")
    assert written["settings"] == ["width=8"] and written["keys"] == ["signal_at_step"]
    assert [row["val/loss/model"]["values"] for row in written["rows"]] == [[held_out]] * 2
    assert [(run["folder"], run["finished"]) for run in written["runs"]] == [(f.name, True) for f in folders]
    with Image.open(output / "sweep.png") as picture:
        colours = {colour for _, colour in picture.convert("RGB").getcolors(1 << 24)}
    assert {(31, 119, 180), (255, 127, 14)} <= colours  # a line of each variant's


@pytest.fixture
def pretend(monkeypatch):
    """Trainings that leave what real ones leave, at once: what was started; name -> last step, exit code."""
    started, fails = [], {}

    def train(command, ranks, notice_session):
        words = dict(word.split("=", 1) for word in command if "=" in word)
        folder = Path(words["run_dir"])
        started.append(folder.name)
        last, code = next((how for part, how in fails.items() if part in folder.name), (20, 0))
        loss = float(words["optimizer.lr"]) + int(words["seed"])
        lines = []
        for step in range(1, last + 1):
            names = ("", "/mse", "/other")  # of what is plotted, one loss spiked twice
            spiked = dict(zip(names, (3, 2, 1))) if step > 7 and loss > 1 else {}
            spiked = {f"warnings/loss_spike{name}": count for name, count in spiked.items()}
            lines.append(
                {"step": step, "split": "train", "loss/total": loss + 20 - step, "loss/mse": 1} | spiked
            )
        lines.append(
            {"step": last, "split": "val", "loss/mse": 2 * loss, "nll_text/depth_1": 1, "seconds": 3}
        )
        folder.mkdir(parents=True, exist_ok=True)
        text = "\n".join(map(json.dumps, lines))
        (folder / "metrics.jsonl").write_text(text, encoding="utf-8")
        if not code:
            write_json(folder / "done.json", {"wall_seconds": 90})
        return processes.Finished(code, 1.0, 0)

    monkeypatch.setattr(processes, "run", train)
    return started, fails


def test_seeds_values_and_spikes(recipe, tmp_path, pretend):
    started, _ = pretend
    said = []
    rows = sweep(parse_sweep(recipe, ["optimizer.lr=0.1,0.3"]), tmp_path / "s", 2, 1, said.append)
    names = ["optimizer.lr=0.1", "optimizer.lr=0.3"]
    assert started == [f"{name}-seed{seed}" for seed in (0, 1) for name in names]
    assert [row["name"] for row in rows] == names
    assert rows[0]["val/loss/mse"]["values"] == pytest.approx([0.2, 2.2])
    # Training losses: of the last tenth of the steps, 19 and 20. The total alone, as there is one.
    assert rows[1]["train/loss/total"]["values"] == pytest.approx([0.8, 1.8])
    assert "train/loss/mse" not in rows[1] and "val/nll_text/depth_1" not in rows[1]
    table = (tmp_path / "s" / "sweep.md").read_text(encoding="utf-8")
    assert table.startswith(
        "| variant | loss/mse, held out | loss/total, training | loss spikes | minutes |\n"
    )
    assert "| optimizer.lr=0.3 | 1.6000 ± 1.4142 | 1.3000 ± 0.7071 | 1.5 ± 2.1 | 1.5 ± 0.0 |" in table
    assert "- optimizer.lr=0.3, seed 1: 3 loss spike(s), in the log lines of steps 8 (mse, other)\n" in table
    assert "optimizer.lr=0.3, seed 0:" not in table

    # A value more, in another order: what is done stays.
    started.clear()
    rows = sweep(parse_sweep(recipe, ["optimizer.lr=0.2,0.3,0.1"]), tmp_path / "s", 1, 1, said.append)
    assert started == ["optimizer.lr=0.2-seed0"]
    assert [row["name"][-3:] for row in rows] == ["0.2", "0.3", "0.1"]

    # Another sweep has no place there, nor has one of a recipe that was changed.
    for words in (["optimizer.lr=0.1,0.3", "width=8"], ["optimizer.lr=0.1,0.3", "width=8,9"]):
        with pytest.raises(UserError, match=r"holds another sweep, .*toy.yaml optimizer.lr=...: .* --output"):
            sweep(parse_sweep(recipe, words), tmp_path / "s", 1, 1, said.append)
    with open(recipe, "a", encoding="utf-8") as file:
        file.write("\nwidth: 8\n")
    with pytest.raises(
        UserError, match="optimizer.lr=0.1-seed0 holds a run with recipe sha256 .* not what is"
    ):
        sweep(parse_sweep(recipe, ["optimizer.lr=0.1,0.3"]), tmp_path / "s", 1, 1, said.append)
    assert len(started) == 1


def test_a_spike_is_marked_in_the_panel_of_its_loss(recipe, tmp_path, pretend, monkeypatch):
    """And no other: the axes as they are saved."""
    from matplotlib.figure import Figure

    drawn = {}

    def keep(figure, path, **_):
        for axes in figure.axes:
            drawn[axes.get_title()] = [
                line.get_xdata().tolist() for line in axes.lines if line.get_marker() == "v"
            ]

    monkeypatch.setattr(Figure, "savefig", keep)
    sweep(parse_sweep(recipe, ["optimizer.lr=0.1,3"]), tmp_path / "s", 1, 1, lambda line: None)
    assert drawn == {"loss/mse": [[8]], "loss/total": []}


def test_one_that_fails_is_left_out_and_tried_again(recipe, tmp_path, pretend):
    started, fails = pretend
    asked, output = parse_sweep(recipe, ["optimizer.lr=0.1,9,0.3", "steps=20"]), tmp_path / "s"
    fails["lr=9-"] = (5, 1)
    with pytest.raises(UserError, match="1 of 3 trainings failed: optimizer.lr=9-seed0; .* once more"):
        sweep(asked, output, 1, 1, lambda line: None)
    assert len(started) == 3
    table = (output / "sweep.md").read_text(encoding="utf-8")
    assert "| optimizer.lr=9 | - | - | - | - |" in table and "| optimizer.lr=0.3 | 0.6000 |" in table
    assert "- optimizer.lr=9, seed 0: failed, last logged at step 5; not in the table" in table
    assert [run["finished"] for run in read_json(output / "sweep.json")["runs"]] == [True, False, True]
    assert (output / "sweep.png").is_file()
    # A mistake would be met by all: it ends the sweep at once.
    fails["lr=9-"] = (5, 2)
    started.clear()
    with pytest.raises(UserError, match="the training in .*lr=9-seed0 failed; see above, then start this"):
        sweep(asked, output, 2, 1, lambda line: None)
    assert started == ["optimizer.lr=9-seed0"]
    fails.clear()
    sweep(asked, output, 1, 1, lambda line: None)
    assert started == ["optimizer.lr=9-seed0"] * 2
    table = (output / "sweep.md").read_text(encoding="utf-8")
    assert "| optimizer.lr=9 | 18.0000 |" in table and "failed" not in table


def test_a_tower_that_collapses_is_told_from_one_that_does_not(tmp_path, capsys):
    """For real: Adam steps of the whole weights' size, and of a hundred-thousandth of it."""
    folder = make_tiny_run(tmp_path / "run")
    shards = folder / "sample_data" / "images" / "train" / "drawings"
    source = ["--visual-tokenizer", folder / "tokenizer" / "export", "--inputs", shards, "--backend", "pil"]
    codes, siglip = folder / "features", folder / "siglip" / "export"
    assert pretokenize([*map(str, source), "--output", str(codes), "--features", "pixels"]) == 0
    decoder = (
        "{model_type: qwen2, hidden_size: 32, intermediate_size: 48, num_hidden_layers: 2, "
        "num_attention_heads: 2, num_key_value_heads: 2, vocab_size: 64}"
    )
    heads = "head_hidden_size: 24, head_num_layers: 1, head_num_attention_heads: 2"
    output = tmp_path / "sweep"
    words = [
        "sweep", "unitoken_stage1", "optimizer.lr_scales[vision_tower.*]=0.01,1000",
        f"model.visual_tokenizer={folder / 'tokenizer' / 'export'}", f"model.vision_tower={siglip}",
        f"model.text_tokenizer={siglip}", "model.llm=null", f"model.llm_config={decoder}",
        f"model.heads={{{heads}, visual_input: codes_and_features}}", "wandb.mode=disabled",
        f"data.blend.0.path={codes}", f"validation_data.blend.0.path={codes}", "data.context_length=64",
        "validation_data.context_length=64", "data.num_workers=0", "data.contexts_held=2",
        "global_batch_size=2", "steps=4", "validate_every=2", "log_every=1", "precision=fp32",
        "--output", output, "--ranks", "1",
    ]  # fmt: skip
    code, out, err = call(words, capsys)
    assert code == 0, err
    quiet, spoilt = read_json(output / "sweep.json")["rows"]
    assert quiet["tower_collapsed"]["mean"] == 0 and spoilt["tower_collapsed"]["mean"] == 1
    assert quiet["val/tower/rank_share"]["mean"] == pytest.approx(1, abs=0.05)
    assert quiet["val/tower/cosine"]["mean"] > 0.99
    assert spoilt["val/tower/rank_share"]["mean"] < 0.5 or spoilt["val/tower/cosine"]["mean"] < 0.5
    table = (output / "sweep.md").read_text(encoding="utf-8")
    assert "tower collapsed |" in table and table in out
    line = "- optimizer.lr_scales[vision_tower.*]={}, seed 0: the vision tower has collapsed, by the "
    assert line.format(1000) + "validations of steps 2, 4" in table and line.format(0.01) not in table
    assert [run["tower_collapsed"] for run in read_json(output / "sweep.json")["runs"]] == [[], [2, 4]]
    curves = LossCurves.read(next(output.glob("*1000*")))
    assert [step for step, _ in curves.val["tower/cosine"]] == [2, 4] == list(curves.collapsed)


def test_what_a_killed_sweep_left_is_ended_and_two_are_not_at_work(recipe, tmp_path, pretend):
    asked, output, said = parse_sweep(recipe, ["optimizer.lr=0.1,0.3"]), tmp_path / "s", []
    left = subprocess.Popen(["sleep", "600"], start_new_session=True)
    try:
        write_json(output / UNDER_WAY, {"session": left.pid, "started": time.time()})
        with processes.only_one(output, "sweep", "--out"):
            with pytest.raises(UserError, match="another sweep is at work in .*: wait for it or use --out"):
                sweep(asked, output, 1, 1, said.append)
            assert left.poll() is None
        sweep(asked, output, 1, 1, said.append)
        assert not psutil.pid_exists(left.pid)
    finally:
        left.kill()
    assert said[0] == "ended 1 processes that a killed run had left behind"
    assert not (output / UNDER_WAY).exists()


def test_spikes_are_counted_over_all_starts(tmp_path):
    # All, those of each loss; the second start begins with the fifth line.
    counts = [
        {},
        {"": 1, "/a": 1},
        {"": 1, "/a": 1},
        {"": 3, "/a": 2, "/b": 1},
        {},
        {"": 1, "/b": 1},
        {"": 2},
    ]
    lines = [
        {"step": step, "split": "train", "loss/a": None if step == 7 else 1.0}
        | {f"warnings/loss_spike{loss}": number for loss, number in of_line.items()}
        for step, of_line in enumerate(counts, 1)
    ]
    lines.append({"step": 7, "split": "val", "loss/a": None, "psnr_db": 20.0})
    (tmp_path / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
    found = LossCurves.read(tmp_path)
    spikes = [(2, 1, ("a",)), (4, 2, ("a", "b")), (6, 1, ("b",)), (7, 1, ())]
    assert [dataclasses.astuple(line) for line in found.spikes] == spikes and found.last_step == 7
    # The loss of the last step was not finite: no number stands for it.
    assert found.figures() == {"val/psnr_db": 20.0, "loss_spikes": 5.0}
    assert LossCurves.read(tmp_path / "nowhere").figures() == {"loss_spikes": 0.0}


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ("1e-3,3e-3", ["1e-3", "3e-3"]),
        ("[0.9,0.95],[0.9,0.99]", ["[0.9,0.95]", "[0.9,0.99]"]),
        ("[0.9,0.95]", ["[0.9,0.95]"]),
        ("{a: [1,2], b: 3},null", ["{a: [1,2], b: 3}", "null"]),
        ("'a,b',\"c,d\",it's,e", ["'a,b'", '"c,d"', "it's", "e"]),
        ("['a]',b],c", ["['a]',b]", "c"]),
        ("shard-{000..099}.tar,b", ["shard-{000..099}.tar", "b"]),
        ("", [""]),
        ("a,", ["a", ""]),
    ],
)
def test_commas_separate_outside_of_brackets_and_quotes(text, values):
    assert split_values(text) == values


def test_combinations_and_their_folders():
    asked = parse_sweep("r", ["a=1,2", "steps=9", "b=x/y,z"])
    assert asked == Sweep("r", ("steps=9",), {"a": ("1", "2"), "b": ("x/y", "z")})
    assert [one.words for one in asked.variants()] == [
        ("a=1", "b=x/y"), ("a=1", "b=z"), ("a=2", "b=x/y"), ("a=2", "b=z"),
    ]  # fmt: skip
    names = [one.name for one in asked.variants()]
    assert names[1] == "a=1,b=z" and names[0].startswith("a=1,b=x_y-") and len(set(names)) == 4
    assert folder_name(["b=x/y"]) != folder_name(["b=x:y"]) and len(folder_name(["a=" + "b" * 300])) < 100


def test_ranks_suit_every_batch(recipe, monkeypatch):
    monkeypatch.setattr(processes, "default_ranks", lambda: 8)

    def ranks(*words):
        asked = parse_sweep(recipe, words)
        return ranks_for_all(asked, asked.variants())

    assert ranks("width=8,16") == 4
    assert ranks("micro_batch_size=2,8") == 2
    assert ranks("global_batch_size=24,16") == 2  # 24 alone would split over 6, 16 over 4
    assert ranks("global_batch_size=12,16") == 1


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["optimizer.lrr=1,2"], "optimizer.lrr"),
        (["stepz=1,2"], "unknown key 'stepz' (did you mean 'steps'?)"),
        (["width=8,wide"], "width: "),
        (["width=8,9", "steps=0"], "steps=0: expected at least 1"),
        (
            ["steps=3"],
            "got steps=3: no key has several values to compare; expected such as optimizer.lr=1e-3,3e-3",
        ),
        (["width=8,"], "a value is empty"),
        (["width=8,8"], "the value 8 is there twice; --seeds repeats"),
        (["width=8,9", "width=10"], "width is given twice: put its values into one word, width=VALUE,VALUE"),
        (["seed=1,2"], "seed cannot be given here: --seeds gives how many"),
        (["width=8,9", "run_dir=x"], "run_dir cannot be given here: --output gives the folder"),
        (["width"], "expected key=value,value"),
    ],
)
def test_a_mistake_is_told_before_anything_is_trained(words, message, recipe, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(processes, "run", lambda *arguments: pytest.fail("trained"))
    code, _, err = call(["sweep", recipe, *words, "--out", tmp_path / "s", "--ranks", "1"], capsys)
    assert code == 2 and err.startswith("error: ") and err.count("\n") == 1
    assert message in err and not (tmp_path / "s").exists()

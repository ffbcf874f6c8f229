"""`dualtoken ablate --of inputs`: what inputs build and cost, real trainings in turn, what is refused."""

from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

from dualtoken.unified_model.model import DualTokenForCausalLM
from dualtoken.unified_model.vision_tower import name_in_siglip
from dualtoken.visual_tokenizer.backbone import load_backbone
from dualtoken.visual_tokenizer.config import preset_config
from dualtoken.visual_tokenizer.model import DualTokenVisualTokenizer
from eval.inputs import load_visual_tokenizer
from eval.results import read_json, write_json
from launchers.ablate_inputs import COSTS, require_same_documents, stage
from launchers.ablate_unified import UNDERSTANDING, figures_of
from launchers.bars import plot_bars
from launchers.errors import UserError
from launchers.input_codes import codes_folder, make_codes
from launchers.input_costs import positions_of_picture, seeing_costs
from launchers.input_scores import claims, headlines, scores
from launchers.inputs import IN_LAYER_WORDS, INPUTS, WITH_VQ, check, of_quickstart
from pretrain.config import load_job_config
from pretrain.metrics import read_metrics
from tests.support.command import call
from tests.support.distributed import run_module
from tests.support.forked_inputs import INPUTS as TRAINED
from tests.support.tiny_pope import write_pope
from tests.support.tiny_run import make_tiny_run
from tests.support.tiny_vq import vq_tokenizer
from tests.support.unified_support import POSITIONS, SEEN, seeing, tiny_config
from tests.test_launchers.test_ablate import scenes_json


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = make_tiny_run(tmp_path_factory.mktemp("quickstart"))
    write_json(folder / "sample_data" / "summary.json", {})
    config = preset_config("tiny", merged_codebook=True)
    merged = DualTokenVisualTokenizer.from_backbone(config, folder / "siglip" / "export")
    merged.save_pretrained(folder / "merged")
    return folder


@pytest.fixture(scope="module")
def asked(run):
    """All inputs on the quickstart's recipe, both tokenizers there."""
    return of_quickstart(run, tokenizers={"in-layer": run / "merged"})


@pytest.fixture(scope="module")
def with_codes(run, asked, tmp_path_factory):
    """A folder with codes of both tokenizers in the places of those that pretokenize makes."""
    output = tmp_path_factory.mktemp("output")
    for name in ("dual", "in-layer"):
        for split in (0, "held_out"):
            folder = codes_folder(output, name, split)
            folder.parent.mkdir(parents=True, exist_ok=True)
            folder.symlink_to(run / "codes" / "train")
    return output


def test_inputs_read_what_they_say_and_nothing_else_changes(run, asked, with_codes, tmp_path):
    ablation = stage(asked, 0, with_codes)
    assert ablation.recipe == "quickstart_inputs" and ablation.steps == 300
    built, rest = {}, []
    for variant in ablation.variants:
        job = load_job_config([*ablation.settings(tmp_path, 5), *variant.words], world_size=1)
        tower = "vision_tower.*" in job.frozen
        built[variant.name] = (
            job.model.heads["visual_input"], job.model.visual_tokenizer, job.model.vision_tower, tower,
            {entry.path for entry in job.data.blend if entry.weight},
        )  # fmt: skip
        job.frozen = [name for name in job.frozen if name != "vision_tower.*"]
        job.model = replace(job.model, heads={}, visual_tokenizer="", vision_tower=None)
        for entry in job.data.blend:
            entry.path = ""
        rest.append(job)
    assert all(job == rest[0] for job in rest) and rest[0].seed == 5
    dual, merged, siglip = (str(run / f) for f in ("tokenizer/export", "merged", "siglip/export"))
    codes, other = ({str(with_codes / "codes" / name / "0")} for name in ("dual", "in-layer"))
    assert built == {
        "semantic": ("semantic", dual, None, False, codes),
        "dual": ("both", dual, None, False, codes),
        "in-layer": ("semantic", merged, None, False, other),
        "continuous": ("features", dual, siglip, True, codes),
        "dual-encoder": ("pixel_and_features", dual, siglip, True, codes),
    }
    words = ["recipe=quickstart_tokenizer", "run_dir=x", "model.backbone=y", *IN_LAYER_WORDS]
    overrides = load_job_config(words, world_size=1).model.overrides
    assert list(DualTokenVisualTokenizer(preset_config("tiny", **overrides)).quantizers()) == ["merged"]


def test_a_later_recipe_goes_on_from_the_one_before(run, asked, with_codes, tmp_path):
    (with_codes / "codes" / "dual" / "1").symlink_to(run / "codes" / "train")
    two = replace(
        asked, recipes=["llava15_align", "llava15_finetune"], data=[run, run], inputs=["continuous"],
        settings=["model.llm=base", "optimizer.lr=1", f"model.text_tokenizer={run}"], steps=9,
    )  # fmt: skip
    first, second = (stage(two, place, with_codes) for place in (0, 1))
    folder = tmp_path / "continuous-seed2"
    job = load_job_config([*second.settings(folder, 2), *second.variants[0].words], world_size=1)
    before = str(with_codes / "llava15_align" / "continuous-seed2" / "export")
    assert (job.model.init_from, job.model.text_tokenizer, job.model.vision_tower) == (before, before, None)
    assert job.model.llm is None and (job.optimizer.lr, job.steps, job.seed) == (1, 9, 2)
    assert job.frozen[-1] == "vision_tower.*" and "llm.*" not in job.frozen
    job = load_job_config([*first.settings(folder, 2), *first.variants[0].words], world_size=1)
    assert job.model.llm == "base" and {"llm.*", "vision_tower.*"} <= set(job.frozen)
    assert first.measure(folder) == {}


def test_positions_of_a_picture():
    found = {
        name: positions_of_picture(tiny_config(**fields))
        for name, fields in (
            ("semantic", {"visual_input": "semantic"}),
            ("dual", {"visual_input": "both"}),
            ("continuous", seeing("features")),
            ("dual-encoder", seeing("pixel_and_features")),
        )
    }
    assert found == {
        "semantic": POSITIONS + 2, "dual": POSITIONS + 2, "continuous": SEEN + 2,
        "dual-encoder": POSITIONS + SEEN + 3,
    }  # fmt: skip


@pytest.mark.parametrize("kind", ["ours", "vq"])
@torch.no_grad()
def test_what_sees_is_all_that_codes_need(run, tmp_path, kind):
    """Counted is what codes are made of: they stay as they are whatever becomes of the rest."""
    folder = run / "tokenizer" / "export"
    if kind == "vq":
        folder = tmp_path / "vq"
        vq_tokenizer("emu3_vqgan").save_pretrained(folder)
    found = seeing_costs(folder, tiny_config(), None)
    tokenizer = load_visual_tokenizer(folder)
    images = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
    before = tokenizer.encode(images)
    needed = {tensor.data_ptr() for tensor in tokenizer.encoding_state().values()}
    kept = 0
    for tensor in tokenizer.state_dict().values():
        if tensor.data_ptr() in needed:
            kept += tensor.numel()
        elif tensor.is_floating_point():
            tensor.fill_(float("nan"))
    assert torch.equal(tokenizer.encode(images), before)
    assert found["tower_parameters"] == kept < sum(one.numel() for one in tokenizer.state_dict().values())
    assert found["tower_flops"] > 0
    assert seeing_costs(folder, tiny_config(**seeing("features")), None) == dict.fromkeys(found, 0.0)


@pytest.fixture(scope="module")
def compared(run, tmp_path_factory):
    """LLaVA-1.5's recipes, tiny, for two inputs, by real jobs; started twice."""
    output = tmp_path_factory.mktemp("compared")
    write_pope(output / "benchmarks" / "pope")
    arguments = [str(run), str(output), str(output / "benchmarks")]
    # Ten processes one after the other: on a busy machine they take their time.
    return output, run_module("tests.support.forked_inputs", arguments, 1, timeout=900).check()


def test_table_and_bars_of_real_trainings(run, compared):
    output, finished = compared
    rows = {row["name"]: row for row in read_json(output / "ablation.json")["rows"]}
    assert list(rows) == ["dual", "dual-encoder", "chance"]
    shown = {name: {one.key: rows[name][one.key]["mean"] for one in COSTS} for name in TRAINED}
    assert [shown[name]["positions"] for name in TRAINED] == [18, 35]
    # The same documents, each with one picture: they differ by its positions.
    assert shown["dual-encoder"]["tokens"] - shown["dual"]["tokens"] == 17
    for name in TRAINED:
        folder = output / f"{name}-seed0"
        model = DualTokenForCausalLM.from_pretrained(folder / "export")
        counted = {n: p.numel() for n, p in model.named_parameters() if not n.startswith("vision_tower.")}
        assert shown[name]["parameters"] == sum(counted.values()) > 0
        # By the trainer's own account of the same packs, tower included.
        steps = list(read_metrics(folder / "metrics.jsonl"))
        assert len(steps) == 4 and all(step["documents"] == 4 for step in steps)
        total = sum(step["tflops_per_rank"] * step["seconds_per_step"] * 1e12 for step in steps)
        towers = 0.0
        if name == "dual-encoder":
            towers = 16 * (shown[name]["tower_flops"] - shown["dual"]["tower_flops"])
        assert shown[name]["flops"] * 16 + towers == pytest.approx(total)
        assert shown[name]["documents_per_second"] > 0 < shown[name]["tokens_per_second"]
        results = read_json(folder / "evaluation" / "results.json")["tasks"]["pope"]
        assert rows[name]["pope"]["mean"] == results["value"] and results["count"] == 12
    table = (output / "ablation.md").read_text(encoding="utf-8")
    assert "| variant | POPE, % | positions a picture | tokens a document | parameters, M |" in table
    assert "- POPE: codes of both codebooks above codes and features, at half of the positions: " in table
    assert (output / "ablation.png").stat().st_size > 10_000
    assert finished.output.count(" by the visual tokenizer dual: ") == 2  # of each recipe's data, for both


def test_the_tower_stays_as_it_was_through_both_recipes(run, compared):
    output, _ = compared
    whole = load_backbone(run / "siglip" / "export").vision_model.state_dict()
    weights = load_file(output / "dual-encoder-seed0" / "export" / "model.safetensors")
    tower = {n.removeprefix("vision_tower."): w for n, w in weights.items() if n.startswith("vision_tower.")}
    assert tower and all((whole[name_in_siglip(name)] == weight).all() for name, weight in tower.items())
    first = load_file(output / "llava15_align" / "dual-encoder-seed0" / "export" / "model.safetensors")
    changed = {n for n, w in weights.items() if (w != first[n]).any()}
    assert any(n.startswith("llm.") for n in changed) and any(
        n.startswith("feature_adapter") for n in changed
    )


def test_inputs_of_other_documents_are_not_compared(asked, tmp_path):
    for place, one in enumerate(INPUTS):
        figures = {"documents_digest": float(place // 4)}
        write_json(tmp_path / f"{one.name}-seed0" / "ablation.json", figures)
    with pytest.raises(
        UserError, match=r"seed 0 did not learn from the same documents: set data.*encoder 1\)"
    ):
        require_same_documents(asked, "ablation", tmp_path, 1)


def test_columns_and_claims_follow_what_is_asked(asked):
    assert scores(asked) == list(UNDERSTANDING)
    assert [one.key for one in headlines(asked)] == ["answers", "captions"]
    assert len(claims(asked)) == 8
    mme = replace(asked, tasks=["pope", "mme"], inputs=["semantic", "dual"])
    assert [(one.key, one.title, one.chance) for one in scores(mme)] == [
        ("pope", "POPE, %", "chance_pope"), ("mme", "MME", "chance_mme"),
    ]  # fmt: skip
    assert [claim.claim for claim in claims(mme)] == [
        f"{task}: both codebooks above semantic codes alone" for task in ("POPE", "MME")
    ]
    found = scenes_json()
    del found["splits"]["held_out"]["drawn"]
    shown = {figure.key for figure in UNDERSTANDING}
    assert figures_of(found).keys() == shown | {figure.chance for figure in UNDERSTANDING}


def test_another_tokenizers_codes_take_the_place_of_pixel_codes(run, asked):
    vq = replace(
        asked, tokenizers={**asked.tokenizers, "vq": run / "merged"}, inputs=["dual", "dual-encoder"]
    )
    assert vq.chosen() == [INPUTS[1], WITH_VQ] and WITH_VQ.tokenizer == "vq"


def test_bars_without_a_figure(tmp_path):
    value = {"mean": 0.5, "spread": 0.1, "values": [0.4, 0.6]}
    rows = [
        {"meaning": name, "answers": found, "captions": None}
        for name, found in (("a", value), ("b", {**value, "spread": None}))
    ]
    chosen = [one for one in UNDERSTANDING if one.key in ("answers", "captions")]
    plot_bars(rows, chosen, tmp_path / "bars.png")
    assert (tmp_path / "bars.png").stat().st_size > 5_000


def test_what_is_missing_is_told_before_anything_is_made(run, asked, with_codes, tmp_path, capsys):
    with pytest.raises(UserError, match="unknown input colour; there are semantic, dual, in-layer, cont"):
        check(replace(asked, inputs=["colour"]))
    with pytest.raises(
        UserError, match="2 recipes and 1 folders of data; give --data, image-text shards, for"
    ):
        check(replace(asked, recipes=["llava15_align", "llava15_finetune"]))
    with pytest.raises(UserError, match=r"no visual tokenizer \(dual\) in .*nothing: run `dualtoken quickst"):
        check(replace(asked, tokenizers={"dual": tmp_path / "nothing"}))
    with pytest.raises(UserError, match="no sample data in None, which scenes are measured on: give --run"):
        check(replace(asked, run=None))
    with pytest.raises(UserError, match="one codebook on one layer, --in-layer-tokenizer: .*=true; or"):
        check(replace(asked, tokenizers={"dual": run / "merged"}, siglip=run / "merged"))
    assert replace(asked, tokenizers={"dual": run / "merged"}).trains_in_layer and not asked.trains_in_layer
    with pytest.raises(UserError, match="name the folder of the benchmarks' files: --benchmarks FOLDER"):
        check(replace(asked, tasks=["pope"], benchmarks=None))
    with pytest.raises(UserError, match="recipe quickstart_tokenizer is of the job tokenizer, expected mllm"):
        check(replace(asked, recipes=["quickstart_tokenizer"]))
    blend = "data.blend=[{path: a, view: caption}, {path: b, view: document}, {path: c, view: text}]"
    with pytest.raises(UserError, match=r"blends 2 data sets of codes \(.*\); expected one, in any number"):
        check(replace(asked, settings=[blend]))
    with pytest.raises(ValueError, match="the codes in|tokenizer"):  # those there are of the other tokenizer
        make_codes(replace(asked, inputs=["in-layer"]), with_codes, 1, print)
    code, _, err = call(["ablate", "--of", "unified", "--task", "pope", "--run", run], capsys)
    assert code == 2 and "--of unified has no use for tasks: these are for --of inputs" in err

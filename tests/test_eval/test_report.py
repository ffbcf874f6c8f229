"""The report: verdicts in words, charts, a page that is whole and self-contained, partial runs."""

import json
import math
import re
from html import unescape
from html.parser import HTMLParser

import pytest
from PIL import Image

from data_pipeline.sources.scenes.questions import BY_LETTER, IN_A_WORD
from eval.charts import Series, heatmap, line_chart, short, thin_out, ticks
from eval.comparisons import Baseline, Comparison, compare_all, compare_scenes, luck
from eval.report import (
    ASKED_SHOWN,
    CAPTIONED_SHOWN,
    DRAWN_SHOWN,
    asked_about,
    build_report,
    captioned,
    evenly,
    loss_curves,
    read_metrics,
    short_question,
)
from eval.scenes.correctness import ALL, PARTS
from launchers.quickstart import ChainRecord, StepRecord

CAPTIONS = {"en": "red <apple> & leaf", "de": "roter apfel", "es": "manzana roja"}


def codebook_rows():
    common = {"codebook_size": 8, "used": 6, "usage": 0.75, "entropy_bits": 2.5, "entropy_share": 0.8}
    common |= {"perplexity": 5.7, "kl_to_uniform_nats": 0.3, "per_image_entropy_bits": 2.0}
    return [
        {"codebook": name, "depth": depth, **common}
        for name in ("pixel", "semantic")
        for depth in (1, 2, None)
    ]


def scene_results(scenes=24):
    """Results of the measure of scenes: even ones are right, odd ones wrong in colour and position."""
    right = dict.fromkeys((*PARTS, ALL), True)
    rows = [
        {
            "key": f"k{number}",
            "language": ("en", "de", "es")[number % 3],
            "prompt": f"prompt {number}",
            "right": {
                **right,
                **({} if number % 2 == 0 else dict.fromkeys(("colour", "position", ALL), False)),
            },
            "found": f"found {number}",
            "picture": "p.png",
            "true_picture": "p.png",
        }
        for number in range(scenes)
    ]
    shares = {**dict.fromkeys(PARTS, 0.9), "colour": 0.7, ALL: 0.5}
    chance = {**dict.fromkeys(PARTS, 0.2), "background": 0.3, ALL: 0.1}
    questions = [
        {"scene": number, "kind": kind, "question": text, "answer": answer, "right": right}
        for number in range(scenes)
        for kind, text, answer, right in (
            ("colour", f"What color is <it> {number}?\nIn a word.", "Red", "red"),
            ("choice", f"What is {number}?\nA. car\nB. bell\nBy letter.", "", "B"),
        )
    ]
    kinds = {
        kind: {"questions": 200, "accuracy": 0.9, "chance": chance, "majority": 0.6}
        for kind, chance in {"what": 0.1, "colour": 0.2, "count": 0.25, "where": 0.2, "yes/no": 0.5}.items()
    }
    part = {
        "drawn": {
            "scenes": 144, "guidance_scale": 1.0, "shares": shares, "chance": chance,
            "by_combination": {
                kind: {**shares, "scenes": 48} for kind in ("colour", "number", "pair")
            },
            "by_language": {"en": {**shares, "scenes": 144}},
            "rows": rows,
        },
        "answers": {
            "kinds": kinds,
            "pope": {
                "random": {
                    "questions": 96, "accuracy": 0.9, "f1": 0.9, "yes": 0.5, "f1_of_always_yes": 2 / 3,
                },
            },
            "choice_by_likelihood": {"questions": 144, "accuracy": 0.8, "chance": 0.25},
            "rows": questions,
        },
        "captions": {
            language: {
                "scenes": 144, "shares": {**shares, "exact": 0.45}, "chance": chance, "unreadable": 0.05,
                "written": [f"{words} {number}" for number in range(scenes)],
                "right": [number % 2 == 0 for number in range(scenes)],
            }
            for language, words in CAPTIONS.items()
        },
    }  # fmt: skip
    every = dict.fromkeys((*PARTS, ALL), 1.0)
    kept = {**every, ALL: 0.75}
    return {
        "training_scenes": 2400,
        "detector": {split: {"true": every, "reconstructed": kept} for split in ("held_out", "seen")},
        "splits": {"held_out": part, "seen": part},
    }


def results():
    """Results of every measure, all of them better than their baselines."""
    retrieval = {
        language: {
            "quantized": {"text_to_image": 0.5, "image_to_text": 0.5, "chance": 0.1, "pictures": 50},
            "continuous": {"text_to_image": 0.8, "image_to_text": 0.4, "chance": 0.1, "pictures": 50},
        }
        for language in CAPTIONS
    }
    likelihood = {
        "documents": 10,
        "visual": [
            {"codebook": name, "depth": depth, "nll": 1.0, "without_prompt": 1.5, "unigram": 1.8}
            for name in ("pixel", "semantic")
            for depth in (1, 2)
        ],
        "captions": {
            "en": {"documents": 10, "tokens": 40, "with_image": 1.0, "image_removed": 2.0, "other_image": 3.0}
        },
    }
    return {
        "scenes": scene_results(),
        "reconstruction": {
            "image_size": 64,
            "pictures": 3,
            "tokenizer": {"psnr": 21.0, "ssim": 0.8},
            "tokenizer_seen": {"psnr": 22.0, "ssim": 0.8},
            "mean_colour": {"psnr": 10.0, "ssim": 0.4},
            "untrained": {"psnr": 5.0, "ssim": 0.1},
            "codebook_size": 8,
            "codebooks": {"held_out": codebook_rows(), "seen": codebook_rows()},
            "per_picture": [
                {"key": "k", "captions": CAPTIONS, "psnr": 20.0 + i, "ssim": 0.8, "picture": "p.png"}
                for i in range(3)
            ],
        },
        "retrieval": {"held_out": retrieval, "seen": retrieval},
        "likelihood": {
            "codebook_size": 8,
            "log_codebook_size": math.log(8),
            "splits": {"held_out": likelihood, "seen": likelihood},
        },
        "layers": {
            "matrix": [[1.0, 0.5], [0.5, 1.0]], "layers": [0, 1], "pictures": 3,
            "read": {"reconstruction_layer": 1, "semantic_layer": 1},
            "proposal": ["blocks of similar layers: 1, 2"],
        },
    }  # fmt: skip


PRECISION = {"siglip": "float32", "tokenizer": "float32", "mllm": "bfloat16"}


def write_run(folder, measured):
    (folder / "evaluation").mkdir(parents=True)
    Image.new("RGB", (8, 8), "red").save(folder / "evaluation" / "p.png")
    for name, content in measured.items():
        (folder / "evaluation" / f"{name}.json").write_text(json.dumps(content), encoding="utf-8")
    for job in ("siglip", "tokenizer", "mllm"):
        (folder / job).mkdir()
        lines = [{"step": s, "split": "train", "time": 1.0, "loss/total": 3.0 - s / 10} for s in (1, 2, 3)]
        lines += [
            {"step": s, "split": "val", "time": 1.0, "psnr_db": 20.0, "loss/total": None} for s in (2, 3)
        ]
        text = "".join(json.dumps(line) + "\n" for line in lines) + '{"step": 4, "spl'
        (folder / job / "metrics.jsonl").write_text(text, encoding="utf-8")
        (folder / job / "done.json").write_text(
            json.dumps({"job": job, "steps": 3, "wall_seconds": 1.0, "precision": PRECISION[job]}),
            encoding="utf-8",
        )
    machine = {"cores": 2, "gpus": [], "ranks": 2, "python": "3.11", "versions": {"torch": "2"}}
    step = StepRecord("siglip", "a model", "deepspeed a --b", 12.0, 2**30, 1, "now")
    ChainRecord(machine=machine, steps={"siglip": step}).save(folder / "chain.json")
    return folder


class Page(HTMLParser):
    """Collects tags, addresses and text of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.addresses: list[str] = []
        self.words = ""
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.addresses += [value for name, value in attrs if name in ("src", "href")]

    def handle_data(self, data):
        self.words += data


def test_page_is_whole_and_self_contained(tmp_path):
    run = write_run(tmp_path / "run", results())
    text = build_report(run).read_text(encoding="utf-8")
    page = Page(text)
    assert all(address.startswith(("data:image/png;base64,", "#")) for address in page.addresses)
    assert not {"script", "link", "iframe"} & set(page.tags)
    assert "url(" not in text and "@import" not in text
    assert "2 ranks, trained in float32 and bfloat16" in " ".join(page.words.split())
    assert "a model; in float32" in page.words
    assert re.findall(r"<h2[^>]*>([^<]+)</h2>", text) == [
        "Drawn scenes: combinations the model never saw",
        "Questions about scenes never seen",
        "Captions of scenes never seen",
        "Held-out reconstructions",
        "Figures beside their baselines",
        "Codebooks",
        "Likelihood per depth",
        "How alike the layers are",
        "Loss curves",
        "Time and memory",
    ]  # pictures first
    assert page.tags.count("svg") == 2 + 3 * 2  # depths, layers, and two charts for each job
    assert "red <apple> & leaf" in page.words  # escaped in the source, so text on the page
    assert "deepspeed a --b" in page.words
    assert "Every figure beats its baselines." in page.words
    targets = {address[1:] for address in page.addresses if address.startswith("#")}
    assert targets <= set(re.findall(r'id="([\w-]+)"', text))


def test_json_holds_the_figures(tmp_path):
    run = write_run(tmp_path / "run", results())
    build_report(run)
    data = json.loads((run / "report.json").read_text(encoding="utf-8"))
    assert data["missing"] == [] and data["not_beaten"] == []
    assert data["results"]["reconstruction"]["tokenizer"]["psnr"] == 21.0
    assert data["comparisons"]["reconstruction"][0]["verdict"] == "beats all its baselines"
    assert data["chain"]["steps"]["siglip"]["seconds"] == 12.0
    assert data["jobs"]["mllm"]["steps"] == 3


def test_a_lost_comparison_is_said_in_words(tmp_path):
    lost = json.loads(json.dumps(results()))  # without shared parts
    lost["likelihood"]["splits"]["held_out"]["captions"]["en"]["image_removed"] = 0.5
    lost["reconstruction"]["tokenizer"]["psnr"] = 9.0
    run = write_run(tmp_path / "run", lost)
    words = Page(build_report(run).read_text(encoding="utf-8")).words
    assert "2 of the comparisons below are lost" in words
    assert "Of the figures below, 2 comparisons with a baseline are lost: which." in words
    assert "PSNR of 3 held-out pictures: 9.00 dB does not beat the mean colour (10.00 dB)." in words
    assert (
        "Caption tokens (English), held-out: 1.000 nats does not beat the same without the picture" in words
    )
    assert "Every figure beats" not in words


def words_of(path):
    """The text of a page, words of different elements apart, however its lines are broken."""
    return " ".join(unescape(re.sub("<[^>]*>", " ", path.read_text(encoding="utf-8"))).split())


def test_scenes_are_shown_right_and_wrong(tmp_path):
    run = write_run(tmp_path / "run", results())
    path = build_report(run)
    text, words = path.read_text(encoding="utf-8"), words_of(path)
    assert "50.0 % of 144 scenes of combinations never seen are drawn right in every part; other" in words
    assert "other scenes' pictures 10.0 %, true pictures after reconstruction 75.0 %" in words
    assert "90.0 % of questions of yes or no about such scenes are answered right (guessing 50 %);" in words
    assert "what 90 %, colour 90 %, count 90 %, where 90 %" in words
    assert "50.0 % of captions of such scenes, in 3 languages, have every part right" in words
    # Drawn: the first ones as they come, each with what is wrong with it.
    assert "The first 18 of 144, not chosen." in words and text.count('alt="the true picture"') == DRAWN_SHOWN
    assert "prompt 0 all right prompt 1 (German) wrong: colour, position; drawn: found 1 prompt 2" in words
    assert "prompt 17" in words and "prompt 18" not in words
    assert "drawn, held-out combinations 90.0 % 70.0 % 90.0 % 90.0 % 90.0 % 50.0 %" in words
    assert "true pictures, held out 100.0 % 100.0 % 100.0 % 100.0 % 100.0 % 100.0 %" in words
    assert "Spanish, scenes trained on 90.0 % 70.0 % 90.0 % 90.0 % 90.0 % 50.0 % 45.0 %" in words
    assert "drawn, a held-out thing with a number (48)" in words
    # Questions and captions, of other scenes.
    assert text.count('alt="the scene asked about"') == ASKED_SHOWN
    assert text.count('alt="the scene to caption"') == CAPTIONED_SHOWN
    assert "What color is <it> 0? Red What is 0? A. car B. bell (nothing) (right: B)" in words
    assert '&lt;it&gt; 0? <b class="good">Red</b></div>' in text
    assert 'bell <b class="bad">(nothing)</b> <i>(right: B)</i>' in text
    assert "es manzana roja 9" in words and "manzana roja 18" not in words
    good, bad = (
        re.search(rf'<i>es</i> <b class="(\w+)">manzana roja {number}</b>', text)[1] for number in (10, 11)
    )
    assert (good, bad) == ("good", "bad")


def test_a_few_scenes_may_lack_a_kind_of_question(tmp_path):
    few = json.loads(json.dumps({"scenes": scene_results(scenes=4)}))
    for split in ("held_out", "seen"):
        few["scenes"]["splits"][split]["drawn"]["scenes"] = 4
    del few["scenes"]["splits"]["held_out"]["answers"]["kinds"]["where"]
    del few["scenes"]["splits"]["seen"]["answers"]["kinds"]["count"]
    path = build_report(write_run(tmp_path / "run", few))
    text, words = path.read_text(encoding="utf-8"), words_of(path)
    assert "what 90 %, colour 90 %, count 90 % " in words and "The first 4 of 4, not chosen." in words
    rows = re.findall(r"<tr><td>(?:held-out combinations|scenes trained on)</td>(.*)</tr>", text)
    assert [re.findall(r'"number">(.*?)</td>', row) for row in rows] == [
        ["90.0 %", "90.0 %", "90.0 %", "90.0 %", "80.0 %"],
        ["90.0 %", "90.0 %", "", "90.0 %", "80.0 %"],
    ]


def test_a_lost_comparison_of_scenes_is_said_in_words(tmp_path):
    lost = json.loads(json.dumps(results()))
    held_out = lost["scenes"]["splits"]["held_out"]
    held_out["drawn"]["shares"]["count"] = 0.2
    held_out["answers"]["kinds"]["colour"]["accuracy"] = 0.6
    held_out["answers"]["pope"]["random"]["f1"] = 0.6
    held_out["captions"]["de"]["shares"]["all"] = 0.12  # 17 of 144: luck gives as many in a quarter of cases
    run = write_run(tmp_path / "run", lost)
    page = words_of(build_report(run))
    expected = [
        "Scenes: Drawn, count, held-out combinations: 20.0 % does not beat other scenes' pictures (20.0 %).",
        "Scenes: Answers, colour, held-out combinations: 60.0 % does not beat the commonest answer (60.0 %).",
        "Scenes: F1 of yes, random absent things, held-out combinations: 60.0 % does not beat always yes "
        "(66.7 %).",
        "Scenes: Captions, all parts right (German), held-out combinations: 12.0 % does not beat other "
        "scenes' captions (10.0 %).",
    ]
    data = json.loads((run / "report.json").read_text(encoding="utf-8"))
    assert data["not_beaten"] == expected
    for line in expected:
        assert line in page
    assert "4 of the comparisons below are lost" in page


def test_every_figure_of_scenes_has_its_baselines():
    found = {row.measure: row for row in compare_scenes(scene_results())}
    for words in ("held-out combinations", "scenes trained on"):
        for part in (*PARTS, "everything at once"):
            row = found.pop(f"Drawn, {part}, {words}")
            assert (row.unit, row.trials) == ("share", 144)
            assert [(one.name, one.bound) for one in row.baselines] == [
                ("other scenes' pictures", False),
                ("true pictures after reconstruction", True),
            ]
        assert (row.value, *(one.value for one in row.baselines)) == (0.5, 0.1, 0.75)
        assert row.verdict() == "beats its baseline; keeps 67 % of true pictures after reconstruction"
        for kind, chance in {"what": 0.1, "colour": 0.2, "count": 0.25, "where": 0.2, "yes/no": 0.5}.items():
            row = found.pop(f"Answers, {kind}, {words}")
            assert (row.value, row.trials) == (0.9, 200)
            assert row.baselines == [Baseline("guessing", chance), Baseline("the commonest answer", 0.6)]
        row = found.pop(f"F1 of yes, random absent things, {words}")
        assert (row.value, row.trials, row.unit) == (0.9, None, "share")  # not of cases: luck is not reckoned
        assert row.baselines == [Baseline("always yes", 2 / 3)]
        row = found.pop(f"Options by likelihood, {words}")
        assert (row.value, row.trials, row.baselines) == (0.8, 144, [Baseline("guessing", 0.25)])
        for language in ("English", "German", "Spanish"):
            row = found.pop(f"Captions, all parts right ({language}), {words}")
            assert (row.value, row.trials) == (0.5, 144)
            assert row.baselines == [Baseline("other scenes' captions", 0.1)]
    assert not found


def test_the_table_of_tasks_has_whole_scenes():
    assert compare_scenes(scene_results())[0].measure == "Drawn, everything at once, held-out combinations"


def test_what_luck_gives_does_not_beat_guessing():
    few = scene_results()
    kind = few["splits"]["held_out"]["answers"]["kinds"]["yes/no"]
    kind |= {"questions": 20, "accuracy": 0.7, "majority": 0.5}  # luck gives 14 of 20 in 5.8 % of cases
    found = {row.measure: row for row in compare_scenes(few)}
    row = found["Answers, yes/no, held-out combinations"]
    assert row.verdict() == "does not beat guessing and the commonest answer"
    kind["accuracy"] = 0.75  # 15 of 20, in 2.1 %
    found = {row.measure: row for row in compare_scenes(few)}
    assert found["Answers, yes/no, held-out combinations"].verdict() == "beats all its baselines"


def test_scenes_asked_about_and_captioned():
    assert asked_about({}) == captioned({}) == []
    found = {"scenes": scene_results(scenes=11)}
    asked = asked_about(found)
    assert len(asked) == ASKED_SHOWN == 9
    for number, one in enumerate(asked):
        assert one["picture"] == "p.png"
        assert [row["scene"] for row in one["questions"]] == [number] * 2
    assert captioned(found) == [
        {
            "picture": "p.png",
            "written": {
                language: (f"{words} {number}", number % 2 == 0) for language, words in CAPTIONS.items()
            },
        }
        for number in (9, 10)
    ]
    few = {"scenes": scene_results(scenes=3)}
    assert len(asked_about(few)) == 3 and captioned(few) == []


def test_a_question_is_shown_without_the_form_of_its_answer():
    assert short_question(f"Where is the car?{IN_A_WORD}") == "Where is the car?"
    assert short_question(f"What is it?\nA. car\nB. bell{BY_LETTER}") == "What is it? A. car B. bell"


@pytest.mark.parametrize("present", [[], ["reconstruction"], ["likelihood", "layers"], ["scenes"]])
def test_partial_runs_say_what_is_missing(tmp_path, present):
    run = write_run(tmp_path / "run", {name: results()[name] for name in present})
    (run / "mllm" / "done.json").unlink()
    words = Page(build_report(run).read_text(encoding="utf-8")).words
    for name in set(results()) - set(present):
        assert f"{name}: not measured yet" in words
    assert "Unified model: training has not finished" in words


def test_an_empty_folder_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError, match="nothing to report in .*`dualtoken quickstart` makes one"):
        build_report(tmp_path)


@pytest.mark.parametrize("name", ["evaluation/scenes.json", "evaluation/results.json", "chain.json"])
def test_a_damaged_file_is_named(tmp_path, name):
    run = write_run(tmp_path / "run", results())
    (run / name).write_text('{"tasks": ', encoding="utf-8")  # as a full disk leaves it
    with pytest.raises(ValueError, match=f"{name} is no JSON .*; remove it"):
        build_report(run)


def test_verdicts():
    chance, teacher = Baseline("chance", 0.1), Baseline("the teacher", 0.8, bound=True)
    won = Comparison("R@1", 0.6, "share", [chance, teacher])
    assert won.verdict() == "beats its baseline; keeps 75 % of the teacher"
    assert won.failures() == []
    level = Comparison("R@1", 0.1, "share", [chance, teacher])
    assert level.failures() == ["R@1: 10.0 % does not beat chance (10.0 %)."]
    above = Comparison("R@1", 0.9, "share", [chance, teacher])
    assert above.verdict() == "beats its baseline; as good as the teacher or better"
    two = Comparison("R@1", 2 / 100, "share", [Baseline("chance", 0.01)], trials=100)
    assert two.verdict() == "does not beat chance"  # luck gives two hits in a quarter of all cases
    ten = Comparison("R@1", 10 / 100, "share", [Baseline("chance", 0.01)], trials=100)
    assert ten.verdict() == "beats its baseline"
    less = Comparison("NLL", 3.0, "nats", [Baseline("log K", 2.0)], higher_is_better=False)
    assert less.verdict() == "does not beat log K"


def test_luck():
    assert luck(0, 10, 0.3) == pytest.approx(1)
    assert luck(10, 10, 0.5) == pytest.approx(0.5**10)
    assert luck(1, 2, 0.5) == pytest.approx(0.75)


def test_every_measure_is_compared():
    groups = compare_all(results())
    assert list(groups) == ["scenes", "reconstruction", "retrieval", "likelihood"]
    assert not [line for rows in groups.values() for row in rows for line in row.failures()]
    depths = [row for row in groups["likelihood"] if row.measure.startswith("Codes")]
    assert len(depths) == 4 + 2  # every one held out, the first depths of seen pictures
    assert depths[0].baselines[0].value == pytest.approx(math.log(8))


def test_curves_leave_out_what_is_no_loss(tmp_path):
    run = write_run(tmp_path / "run", {})
    records = read_metrics(run / "siglip" / "metrics.jsonl")
    assert len(records) == 5  # the line a kill cut off is not one
    curves = loss_curves(records)
    assert [curve.name for curve in curves] == ["loss/total", "psnr_db"]
    assert (curves[0].first, curves[0].last) == (2.9, 2.7)


def test_depths_share_a_chart():
    records = [
        {"step": s, "split": "train", "nll_pixel/depth_1": 2.0, "nll_pixel/depth_2": 3.0, "accuracy/x": 1.0}
        for s in (1, 2)
    ]
    curves = loss_curves(records)
    assert [curve.name for curve in curves] == ["nll_pixel"]
    assert curves[0].svg.count("<polyline") == 2


def test_charts():
    assert ticks(0, 10) == [0, 5, 10]
    assert ticks(3, 3) == [3]
    assert thin_out([(i, 2 * i) for i in range(10)], 5) == [
        (0.5, 1),
        (2.5, 5),
        (4.5, 9),
        (6.5, 13),
        (8.5, 17),
    ]
    assert [short(value) for value in (0, 0.5, 12345, 0.00001)] == ["0", "0.5", "1e4", "1e-5"]
    svg = line_chart("a < b", [Series("s", [(0, 1), (1, float(2))], dots=True)], level=("log K", 3.0))
    assert 'aria-label="a &lt; b"' in svg and svg.count("<circle") == 2 and "log K" in svg
    assert line_chart("nothing", [Series("s", [])]) == ""
    flat = heatmap("m", [[1.0, 1.0], [1.0, 1.0]], ["0", "1"])
    assert flat.count("<rect") == 4


def test_evenly_spaced():
    assert evenly(list(range(10)), 5) == [0, 2, 4, 6, 8]
    assert evenly([1, 2], 5) == [1, 2]

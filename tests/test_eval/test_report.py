"""The report: verdicts in words, charts, a page that is whole and self-contained, partial runs."""

import json
import math
import re
from html.parser import HTMLParser

import pytest
from PIL import Image

from eval.charts import Series, heatmap, line_chart, short, thin_out, ticks
from eval.comparisons import Baseline, Comparison, compare_all, luck
from eval.report import build_report, evenly, loss_curves, read_metrics
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
    prompt = {"key": "k", "language": "de", "prompt": "roter apfel"}
    shown = {"true_picture": "p.png", "pictures": {"1.0": "p.png", "3.0": "p.png"}}
    generated = {
        "prompts": [{**prompt, **shown}, prompt],
        "recall": {
            scale: {"recall": 0.5, "chance": 0.1, "queries": 50, "candidates": 50} for scale in ("1.0", "3.0")
        },
    }
    written = [{"key": "k", "captions": CAPTIONS, "written": dict(CAPTIONS), "picture": "p.png"}]
    exact = {language: {"share": 0.25, "pictures": 10} for language in CAPTIONS}
    return {
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
        "generation": {
            "settings": {
                "temperature": 1.0, "top_k": 0, "top_p": 0.9, "seed": 0, "guidance_scales": [1.0, 3.0],
            },
            "pictures": {"held_out": generated, "seen": generated},
            "captions": {"held_out": written, "seen": written},
            "caption_exact": {"held_out": exact, "seen": exact},
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
    headings = "Held-out reconstructions", "Generated pictures", "Captions", "Figures beside their baselines"
    headings += "Codebooks", "Likelihood per depth", "Loss curves", "Time and memory"
    assert re.findall(r"<h2[^>]*>([^<]+)</h2>", text) == [
        *headings[:6],
        "How alike the layers are",
        *headings[6:],
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
    assert "PSNR of 3 held-out pictures: 9.00 dB does not beat the mean colour (10.00 dB)." in words
    assert (
        "Caption tokens (English), held-out: 1.000 nats does not beat the same without the picture" in words
    )
    assert "Every figure beats" not in words


@pytest.mark.parametrize("present", [[], ["reconstruction"], ["likelihood", "layers"], ["generation"]])
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
    assert list(groups) == ["reconstruction", "retrieval", "likelihood", "generation"]
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

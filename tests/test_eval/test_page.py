"""The page of an evaluation: one table, each task's figures and cases, self-contained."""

import html
import io
import json
import re

import pytest
from PIL import Image

from eval.cases import make_case
from eval.page import shown, verdict, write_page
from eval.report import build_report
from eval.results import Case, TaskResult
from tests.test_eval.test_report import Page, results, write_run


def task(**changed):
    made = {"task": "seed", "headline": "image accuracy", "value": 62.5, "unit": "%", "count": 48}
    return TaskResult(**{**made, "chance": 25.0, "trials": 48, **changed})


def evaluated(folder):
    """A `results.json` with a task of each sort, and the pictures of its cases."""
    folder.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 8), "red").save(folder / "worst.png")
    Image.new("RGB", (8, 8), "red").save(folder / "best.jpg")
    lines = ["question: What <is> this?\nA. egg\nB. bell", "answer: B", "truth: A"]
    tasks = [
        task(
            tables={
                "by type": [{"type": "Text & more", "accuracy": 50.0, "questions": 8, "none": None}],
                "many": [{"row": number} for number in range(30)],
            },
            figures={"image accuracy": 62.5, "by first letter": None},
            worst=[Case("worst.png", lines, 0.0)],
            best=[Case("best.jpg", ["question: q"], 1.0), Case(None, ["gone"], 1.0)],
            files=["seed/upload.jsonl"],
            notes=["2 questions have no answer"],
            settings={"template": "qwen", "sampling": {"top_p": 0.9}},
        ),
        task(task="mme", headline="perception", value=512.0, unit="", chance=500.0, trials=None),
        task(task="mmvet", headline="total", value=None, chance=None, trials=None),
        task(
            task="frechet",
            headline="FID",
            value=12.0,
            unit="",
            chance=None,
            trials=None,
            higher_is_better=False,
        ),
    ]
    stamp = {"date": "2026-01-02T03:04:05+0000", "versions": {"torch": "2.14"}, "model": {"path": "models/a"}}
    content = {"format_version": 1, "tasks": {one.task: {**one.as_json(), **stamp} for one in tasks}}
    content = json.loads(json.dumps(content))
    (folder / "results.json").write_text(json.dumps(content), encoding="utf-8")
    return content


def words_of(text):
    return " ".join(html.unescape(re.sub("<[^>]+>", " ", text)).split())


def test_the_page_has_every_task_and_is_self_contained(tmp_path):
    path = write_page(tmp_path, evaluated(tmp_path))
    assert path == tmp_path / "index.html"
    text = path.read_text(encoding="utf-8")
    page = Page(text)
    assert not {"script", "link", "iframe"} & set(page.tags)
    assert "url(" not in text and "@import" not in text
    assert all(re.match("data:image/(png|jpeg);base64,|#", address) for address in page.addresses)
    assert [address for address in page.addresses if address[0] == "#"] == [
        "#seed",
        "#mme",
        "#mmvet",
        "#frechet",
    ]
    assert re.findall(r'<h2 id="([^"]+)', text) == ["seed", "mme", "mmvet", "frechet"]
    words = words_of(text)
    assert "seed image accuracy 62.50 % 25.00 % above chance 48" in words
    assert "mme perception 512.00 500.00 better than chance; luck not reckoned 48" in words
    assert "mmvet total – – 48" in words
    assert "FID: 12.00 (lower is better), 48 items. Measured 2026-01-02 03:04." in words
    assert "question: What <is> this? A. egg B. bell answer: B truth: A score 0.00" in words
    assert "by type type accuracy questions none Text & more 50.00 8 –" in words
    assert "2 questions have no answer" in words and "seed/upload.jsonl" in words
    assert (
        "sampling, top_p 0.9" in words and "versions, torch 2.14" in words and "model, path models/a" in words
    )
    assert "many (30 rows)" in words  # folded, as the settings are
    assert page.tags.count("details") == 1 + 4


def encoded(image, kind="PNG", **options):
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def test_cases_look_as_models_see_them(tmp_path):
    """Transparency on white, turned by EXIF; one that cannot be decoded costs its picture and no more."""

    def case(picture):
        return make_case(picture, ["answer: a"], 0.5, tmp_path / "worst" / "00.png", tmp_path)

    made = case(encoded(Image.new("RGBA", (40, 20), (0, 0, 0, 0))))
    assert Image.open(tmp_path / made.picture).getpixel((0, 0)) == (255, 255, 255)
    turned = Image.Exif()
    turned[0x0112] = 6
    file = tmp_path / "turned.jpg"
    file.write_bytes(encoded(Image.new("RGB", (40, 20)), "JPEG", exif=turned))
    assert Image.open(tmp_path / case(file).picture).size == (20, 40)
    for broken in (b"hello", file.read_bytes()[:300], tmp_path / "gone.png"):
        made = case(broken)
        assert made.picture is None and made.lines[0] == "answer: a"
        assert made.lines[1].startswith("its picture cannot be shown: ")


def test_a_case_outside_the_folder_is_refused(tmp_path):
    content = evaluated(tmp_path)
    content["tasks"]["seed"]["worst"][0]["picture"] = "../secret.png"
    with pytest.raises(
        ValueError, match=r"a result names the picture '\.\./secret\.png'; measure the run again"
    ):
        write_page(tmp_path, content)
    content["tasks"]["seed"]["worst"][0]["picture"] = "results.json"
    with pytest.raises(ValueError, match=r"results\.json: not the name of a picture; expected \.png, \.jpg"):
        write_page(tmp_path, content)
    assert not (tmp_path / "index.html").exists()


@pytest.mark.parametrize(
    ("changed", "words", "won"),
    [
        ({"value": 50.0}, "above chance", True),
        ({"value": 31.25}, "not above chance: luck gives as much in 20 % of cases", False),
        ({"value": 100.0, "trials": 2}, "not above chance: luck gives as much in 6 % of cases", False),
        (
            {"value": 25.5, "trials": 200_000},
            "above chance",
            True,
        ),  # beyond the range of floats, if multiplied
        ({"value": 20.0, "trials": None}, "not better than chance", False),
        (
            {"value": 20.0, "trials": None, "higher_is_better": False},
            "better than chance; luck not reckoned",
            True,
        ),
        ({"value": None}, "", False),
        ({"chance": None}, "", False),
    ],
)
def test_verdicts(changed, words, won):
    assert verdict(task(**changed).as_json()) == (words, won)


def test_figures_are_shown_short():
    assert [shown(value) for value in (None, 3, 3.0, 62.528, 0.0, 0.00123, 1588.4, "text", True)] == [
        *("–", "3", "3.00", "62.53", "0.00", "0.00123", "1588.40", "text", "True")
    ]
    assert shown(20.125, "dB") == "20.12 dB"


def test_the_report_of_a_quickstart_has_the_benchmarks(tmp_path):
    run = write_run(tmp_path / "run", results())
    evaluated(run / "evaluation")
    text = build_report(run).read_text(encoding="utf-8")
    assert text.count('id="benchmarks"') == 1 and 'href="#benchmarks"' in text
    words = words_of(text)
    assert "the model learned to answer questions about scenes alone" in words
    assert "seed image accuracy 62.50 % 25.00 % above chance 48" in words
    data = json.loads((run / "report.json").read_text(encoding="utf-8"))
    assert list(data["benchmarks"]) == ["seed", "mme", "mmvet", "frechet"]


def test_measures_of_the_run_itself_are_no_benchmarks(tmp_path):
    run = write_run(tmp_path / "run", results())
    content = {"format_version": 1, "tasks": {"likelihood": task(task="likelihood").as_json()}}
    (run / "evaluation" / "results.json").write_text(json.dumps(content), encoding="utf-8")
    assert 'id="benchmarks"' not in build_report(run).read_text(encoding="utf-8")

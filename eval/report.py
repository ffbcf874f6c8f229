"""The report of a run: one self-contained page and its figures as JSON, from what lies in the run folder."""

import json
import re
import time
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

from eval.charts import Point, Series, heatmap, line_chart
from eval.comparisons import HEADINGS, compare_all, language_name
from eval.html import PictureFolder, template_environment, write_html
from eval.page import result_rows
from eval.results import RESULTS_FILE, read_json, write_json

MEASURES = ("scenes", "reconstruction", "retrieval", "likelihood", "layers")
JOBS = {"siglip": "SigLIP", "tokenizer": "Visual tokenizer", "mllm": "Unified model"}
OF_A_DEPTH = re.compile(r"(.+?)(?:/depth)?_(\d+)")  # nll_pixel/depth_1, codebook_pixel/usage_1
RECONSTRUCTIONS_SHOWN = 40
WORST_SHOWN = 8
DRAWN_SHOWN = 18
ASKED_SHOWN = 9  # scenes
CAPTIONED_SHOWN = 9
SCENE_PARTS = ("object", "colour", "count", "position", "background")


@dataclass(frozen=True)
class Curve:
    """A chart of one figure of a job over its steps."""

    name: str
    svg: str
    first: float
    last: float


def read_results(run: Path) -> dict[str, dict]:
    """The measures that have been taken, by name."""
    found = {name: read_json(run / "evaluation" / f"{name}.json") for name in MEASURES}
    return {name: content for name, content in found.items() if content is not None}


def read_metrics(path: Path) -> list[dict]:
    """The lines of a metrics.jsonl; a last line that a kill cut off is left out."""
    records = []
    if path.is_file():
        for line in path.read_text(encoding="utf-8").splitlines():
            try:
                records.append(json.loads(line))
            except json.JSONDecodeError:
                break
    return records


def loss_curves(records: list[dict]) -> list[Curve]:
    """Charts from the lines of a metrics.jsonl: losses, held-out figures, likelihoods with a line a depth."""
    points: dict[str, dict[str, list[Point]]] = defaultdict(lambda: defaultdict(list))
    for record in records:
        for key, value in record.items():
            if isinstance(value, int | float) and key not in {"step", "time", "seconds"}:
                points[key][record["split"]].append((record["step"], float(value)))
    curves = []
    depths: dict[str, list[list[Point]]] = defaultdict(list)
    for key, splits in points.items():
        trained, validated = splits.get("train", []), splits.get("val", [])
        if by_depth := OF_A_DEPTH.fullmatch(key):
            if key.startswith(("nll", "codebook")):
                depths[by_depth[1]].append(trained or validated)
        elif (key.startswith("loss") or validated) and max(len(trained), len(validated)) > 1:
            series = [Series("training", trained, "a"), Series("held-out", validated, "b", dots=True)]
            curves.append(_curve(key, series))
    for group, lines in depths.items():
        drawn = [
            Series(f"depth {number}", line, f"d{min(number, 4)}") for number, line in enumerate(lines, 1)
        ]
        curves.append(_curve(group, drawn))
    # Totals first, then in the order the job wrote them.
    return sorted(curves, key=lambda curve: curve.name not in {"loss", "loss/total"})


def _curve(name: str, series: list[Series]) -> Curve:
    drawn = next(line.points for line in series if line.points)
    return Curve(name, line_chart(f"{name} over steps", series), drawn[0][1], drawn[-1][1])


def depth_chart(visual: list[dict], log_k: float, codebook_size: int) -> str:
    """Negative log-likelihood over depth, a line for each codebook, log K dashed."""
    series = []
    for name, style in (("pixel", "a"), ("semantic", "b")):
        if points := [(row["depth"], row["nll"]) for row in visual if row["codebook"] == name]:
            series.append(Series(name, points, style, dots=True))
    depths = sorted({row["depth"] for row in visual})
    level = (f"log {codebook_size}", log_k)
    return line_chart("NLL per depth", series, 420, 210, level, depths)


def evenly(items: list, count: int) -> list:
    """`count` items spread evenly over a list, chosen by nothing but their place."""
    if len(items) <= count:
        return items
    return [items[index * len(items) // count] for index in range(count)]


def asked_about(results: dict[str, dict]) -> list[dict]:
    """The first held-out scenes with the questions asked about them, for people to look at."""
    if "scenes" not in results:
        return []
    held_out = results["scenes"]["splits"]["held_out"]
    pictures = held_out["drawn"]["rows"]
    return [
        {
            "picture": pictures[number]["true_picture"],
            "questions": [row for row in held_out["answers"]["rows"] if row["scene"] == number],
        }
        for number in range(min(ASKED_SHOWN, len(pictures)))
    ]


def short_question(question: str) -> str:
    """A question without the line that says in which form an answer is wanted, on one line."""
    return " ".join(question.splitlines()[:-1])


def captioned(results: dict[str, dict]) -> list[dict]:
    """Held-out scenes, those after the ones asked about, with the captions written for them by language."""
    if "scenes" not in results:
        return []
    held_out = results["scenes"]["splits"]["held_out"]
    pictures = held_out["drawn"]["rows"][ASKED_SHOWN : ASKED_SHOWN + CAPTIONED_SHOWN]
    return [
        {
            "picture": row["true_picture"],
            "written": {
                language: (found["written"][number], found["right"][number])
                for language, found in held_out["captions"].items()
            },
        }
        for number, row in enumerate(pictures, ASKED_SHOWN)
    ]


def missing_parts(run: Path, results: dict[str, dict]) -> list[str]:
    """Sentences on what the run folder does not hold yet."""
    missing = [
        f"{name}: not measured yet; `dualtoken evaluate {name} --run {run}` does."
        for name in MEASURES
        if name not in results
    ]
    for job, title in JOBS.items():
        if not (run / job / "done.json").is_file():
            missing.append(f"{title}: training has not finished in {run / job}.")
    return missing


def trained_in(run: Path) -> dict[str, str]:
    """Precision of each finished training job; measures and exports are fp32 in any case."""
    done = {job: read_json(run / job / "done.json") or {} for job in JOBS}
    return {job: record["precision"] for job, record in done.items() if "precision" in record}


def report_data(run: Path, results: dict[str, dict]) -> dict:
    """Everything the report states as a number, for report.json."""
    comparisons = compare_all(results)
    evaluated = (read_json(run / "evaluation" / RESULTS_FILE) or {"tasks": {}})["tasks"]
    lost = [
        f"{HEADINGS[name].partition(':')[0]}: {line}"
        for name, group in comparisons.items()
        for row in group
        for line in row.failures()
    ]
    return {
        "run": run.name,
        "written_at": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "comparisons": {name: [row.as_json() for row in group] for name, group in comparisons.items()},
        "not_beaten": lost,
        "missing": missing_parts(run, results),
        "results": results,
        "benchmarks": {name: found for name, found in evaluated.items() if name not in MEASURES},
        "jobs": {job: read_json(run / job / "done.json") for job in JOBS},
        "precisions": trained_in(run),
        "chain": read_json(run / "chain.json"),
        "sample_data": read_json(run / "sample_data" / "summary.json"),
    }


def render(run: Path, data: dict) -> str:
    """The page as HTML."""
    environment = template_environment()
    environment.filters["language"] = language_name
    environment.filters["asked_as"] = short_question
    environment.filters["minutes"] = lambda seconds: f"{seconds / 60:.1f} min"
    environment.filters["gib"] = lambda count: f"{count / 2**30:.1f} GiB"
    results = data["results"]
    likelihood, layers = results.get("likelihood"), results.get("layers")
    reconstructions = results.get("reconstruction", {}).get("per_picture", [])
    return environment.get_template("report.html.jinja").render(
        **data,
        comparison_rows=compare_all(results),
        headings=HEADINGS,
        benchmark_rows=result_rows(data["benchmarks"]),
        picture=PictureFolder(run / "evaluation"),
        curves={
            title: curves
            for job, title in JOBS.items()
            if (curves := loss_curves(read_metrics(run / job / "metrics.jsonl")))
        },
        depth_svg=likelihood
        and depth_chart(
            likelihood["splits"]["held_out"]["visual"],
            likelihood["log_codebook_size"],
            likelihood["codebook_size"],
        ),
        layers_svg=layers
        and heatmap("similarity of layers", layers["matrix"], [str(n) for n in layers["layers"]]),
        shown=evenly(reconstructions, RECONSTRUCTIONS_SHOWN),
        scene_parts=SCENE_PARTS,
        drawn_shown=DRAWN_SHOWN,
        asked=asked_about(results),
        captioned=captioned(results),
        worst=sorted(reconstructions, key=lambda row: row["psnr"])[:WORST_SHOWN],
    )


def build_report(run: Path) -> Path:
    """Write `report.html` and `report.json` into a run folder and return the page's path.

    What has not been measured yet is named on the page.

    Raises:
        FileNotFoundError: the folder holds nothing to report.
        ImportError: jinja2 is missing.
    """
    results = read_results(run)
    if not results and not any((run / job / "metrics.jsonl").is_file() for job in JOBS):
        raise FileNotFoundError(
            f"nothing to report in {run}: expected the folder of a quickstart, with evaluation/*.json or a "
            "job's metrics.jsonl; `dualtoken quickstart` makes one"
        )
    data = report_data(run, results)
    page = run / "report.html"
    write_html(page, render(run, data))
    write_json(run / "report.json", data)
    return page

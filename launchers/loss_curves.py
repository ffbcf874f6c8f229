"""What the metrics.jsonl of trainings, finished or not, say of losses and vision towers, and a plot of it."""

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from eval.results import read_json

SPIKE_COUNT = "warnings/loss_spike"  # events since the training was last started; below it those of each loss
PLOTTED = ("tower/rank_share", "tower/cosine")  # besides losses
COLLAPSED = "tower/collapsed"
LAST_PART = 0.1  # of the steps, over which a training loss is averaged
COLUMNS = 3
MOST_NAMED_COLOURS = 10

Points = list[tuple[int, float]]  # step and value


@dataclass(frozen=True)
class Spikes:
    """Loss spikes that have begun since the log line before."""

    step: int  # of the log line
    count: int
    losses: tuple[str, ...]  # which had them, without `loss/`


@dataclass(frozen=True)
class LossCurves:
    """The losses of one training over its steps, and how its vision tower fared."""

    train: Mapping[str, Points]
    val: Mapping[str, Points]
    last_held_out: Mapping[str, float]  # all figures of the last validation but details
    spikes: Sequence[Spikes]
    collapsed: Sequence[int]  # steps of validations that found the vision tower collapsed
    last_step: int  # that was logged; 0 if none was
    wall_seconds: float | None  # of all starts; None while it is not finished

    @property
    def spike_count(self) -> int:
        """Loss spikes of the whole training."""
        return sum(spikes.count for spikes in self.spikes)

    @classmethod
    def read(cls, folder: Path) -> "LossCurves":
        """Read the run folder of a training; empty where it never logged anything."""
        from pretrain.metrics import is_detail, read_metrics

        splits: dict[str, dict[str, Points]] = {"train": defaultdict(list), "val": defaultdict(list)}
        held_out: dict[str, float] = {}
        spikes: list[Spikes] = []
        collapsed: list[int] = []
        counted: dict[str, int] = {}
        last_step = 0
        for record in read_metrics(folder / "metrics.jsonl"):
            step, split = record["step"], record["split"]
            numbers = {key: value for key, value in record.items() if isinstance(value, int | float)}
            for key, value in numbers.items():
                if key.startswith("loss/") or key in PLOTTED:
                    splits[split][key].append((step, value))
            if split == "val":
                ours = {"step", "time", "seconds", COLLAPSED}
                held_out = {k: v for k, v in numbers.items() if k not in ours and not is_detail(k)}
                if numbers.get(COLLAPSED):
                    collapsed.append(step)
                continue
            last_step = step
            counts = {key: int(value) for key, value in numbers.items() if key.startswith(SPIKE_COUNT)}
            if counts.get(SPIKE_COUNT, 0) < counted.get(SPIKE_COUNT, 0):
                counted = {}  # a start begins to count anew
            new = {key: count - counted.get(key, 0) for key, count in counts.items()}
            if new.get(SPIKE_COUNT):
                losses = [
                    key.removeprefix(f"{SPIKE_COUNT}/") for key in new if new[key] and key != SPIKE_COUNT
                ]
                spikes.append(Spikes(step, new[SPIKE_COUNT], tuple(losses)))
            counted = counts
        done = read_json(folder / "done.json") or {}
        wall_seconds = done.get("wall_seconds")
        return cls(splits["train"], splits["val"], held_out, spikes, collapsed, last_step, wall_seconds)

    def figures(self) -> dict[str, float]:
        """Figures at the end of the training, those that have a finite value.

        `train/loss/*`, means over the log lines of the last tenth of the steps; `val/*`, of the last
        validation; `loss_spikes`, a count; `tower_collapsed`, 1 if a validation found a vision tower
        collapsed, where one was watched; `minutes`, of a finished training.
        """
        found = {f"val/{key}": value for key, value in self.last_held_out.items()}
        for key, points in self.train.items():
            late = [value for step, value in points if step > self.last_step * (1 - LAST_PART)]
            if late:
                found[f"train/{key}"] = sum(late) / len(late)
        found["loss_spikes"] = float(self.spike_count)
        if self.collapsed or self.val.keys() & set(PLOTTED):
            found["tower_collapsed"] = float(bool(self.collapsed))
        if self.wall_seconds is not None:
            found["minutes"] = self.wall_seconds / 60
        return {key: value for key, value in found.items() if math.isfinite(value)}


def plot_losses(runs: Mapping[str, tuple[str, LossCurves]], path: Path) -> None:
    """Draw the losses of trainings over their steps, a panel for each loss, and save the picture.

    Where a vision tower was watched, its share of the first rank and its cosine have panels too. A colour
    stands for a variant, its seeds are lines of the same one; training is drawn solid, held-out figures
    dashed with dots; a triangle marks a log line with new spikes of that loss, a square a validation that
    found the tower collapsed, a cross the end of a training that is not finished. What has positive values
    that span more than a factor of 30 has a logarithmic axis.

    Args:
        runs: name -> what the variant is called, and the losses.
        path: of the PNG.
    """
    import matplotlib as mpl
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    variants = list(dict.fromkeys(meaning for meaning, _ in runs.values()))
    colours: dict[str, Any] = {name: f"C{place}" for place, name in enumerate(variants)}
    if len(variants) > MOST_NAMED_COLOURS:
        shades = mpl.colormaps["viridis"]
        colours = {name: shades(place / (len(variants) - 1)) for place, name in enumerate(variants)}
    keys = {key for _, curves in runs.values() for key in (*curves.train, *curves.val)}
    panels = sorted(keys, key=lambda key: (key in PLOTTED, key != "loss/total", key))
    columns = min(COLUMNS, max(1, len(panels)))
    rows = math.ceil(max(1, len(panels)) / columns)
    figure = Figure(figsize=(4.6 * columns, 3.2 * rows + 0.22 * (len(variants) + 4)), layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False).flat
    for axes, key in zip(grid, panels, strict=False):
        for meaning, curves in runs.values():
            _draw(axes, key, curves, colours[meaning])
        values = [value for line in axes.lines for value in line.get_ydata()]
        if min(values) > 0 and max(values) > 30 * min(values):
            axes.set_yscale("log")
        axes.set(title=key, xlabel="step")
    for axes in list(figure.axes)[len(panels) :]:
        axes.set_axis_off()
    legend = [Line2D([], [], color=colours[name], label=name) for name in variants]
    legend += [
        Line2D([], [], color="grey", label="training"),
        Line2D([], [], color="grey", linestyle="--", marker=".", label="held out"),
        Line2D([], [], color="grey", linestyle="", marker="v", label="loss spike"),
        Line2D([], [], color="grey", linestyle="", marker="x", label="not finished"),
    ]
    if keys & set(PLOTTED):
        legend.append(Line2D([], [], color="grey", linestyle="", marker="s", label="tower collapsed"))
    figure.legend(handles=legend, loc="outside lower left", fontsize="small")
    figure.savefig(path, dpi=120)


def _draw(axes: Any, key: str, curves: LossCurves, colour: Any) -> None:
    trained, held_out = curves.train.get(key, []), curves.val.get(key, [])
    if trained:
        alone = "." if len(trained) == 1 else ""  # of one point there is no line
        axes.plot(*zip(*trained, strict=True), color=colour, linewidth=1, marker=alone)
        spiked = [line.step for line in curves.spikes if key.removeprefix("loss/") in line.losses]
        _mark(axes, trained, spiked, colour, "v")
        if curves.wall_seconds is None:
            axes.plot(*trained[-1], color=colour, linestyle="", marker="x", markersize=8)
    if held_out:
        axes.plot(*zip(*held_out, strict=True), color=colour, linestyle="--", marker=".", linewidth=1)
        if key in PLOTTED:
            _mark(axes, held_out, curves.collapsed, colour, "s")


def _mark(axes: Any, points: Points, steps: Sequence[int], colour: Any, marker: str) -> None:
    """Draw a marker at those of the points that are of these steps."""
    if marked := [point for point in points if point[0] in steps]:
        axes.plot(*zip(*marked, strict=True), color=colour, linestyle="", marker=marker)

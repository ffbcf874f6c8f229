"""What the metrics.jsonl of trainings, finished or not, say of their losses, and a plot to compare them."""

import math
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from eval.results import read_json

SPIKE_COUNT = "warnings/loss_spike"  # events since the training was last started
LAST_PART = 0.1  # of the steps, over which a training loss is averaged
COLUMNS = 3
MOST_NAMED_COLOURS = 10

Points = list[tuple[int, float]]  # step and value


@dataclass(frozen=True)
class LossCurves:
    """The losses of one training over its steps."""

    train: Mapping[str, Points]
    val: Mapping[str, Points]
    last_held_out: Mapping[str, float]  # all figures of the last validation but details
    spikes: tuple[
        tuple[int, int], ...
    ]  # step of a log line, and how many spikes have begun since the line before
    last_step: int  # that was logged; 0 if none was
    wall_seconds: float | None  # of all starts; None while it is not finished

    @property
    def spike_count(self) -> int:
        """Loss spikes of the whole training."""
        return sum(count for _, count in self.spikes)

    @classmethod
    def read(cls, folder: Path) -> "LossCurves":
        """Read the run folder of a training; empty where it never logged anything."""
        from pretrain.metrics import is_detail, read_metrics

        splits: dict[str, dict[str, Points]] = {"train": defaultdict(list), "val": defaultdict(list)}
        held_out: dict[str, float] = {}
        spikes, counted, last_step = [], 0, 0
        for record in read_metrics(folder / "metrics.jsonl"):
            step, split = record["step"], record["split"]
            numbers = {key: value for key, value in record.items() if isinstance(value, int | float)}
            for key, value in numbers.items():
                if key.startswith("loss/"):
                    splits[split][key].append((step, value))
            if split == "val":
                ours = {"step", "time", "seconds"}
                held_out = {k: v for k, v in numbers.items() if k not in ours and not is_detail(k)}
                continue
            last_step = step
            count = int(numbers.get(SPIKE_COUNT, 0))
            # A start begins to count anew.
            if more := count - counted if count >= counted else count:
                spikes.append((step, more))
            counted = count
        done = read_json(folder / "done.json") or {}
        return cls(
            splits["train"], splits["val"], held_out, tuple(spikes), last_step, done.get("wall_seconds")
        )

    def figures(self) -> dict[str, float]:
        """Figures at the end of the training, those that have a finite value.

        `train/loss/*`, means over the log lines of the last tenth of the steps; `val/*`, of the last
        validation; `loss_spikes`, a count; `minutes`, of a finished training.
        """
        found = {f"val/{key}": value for key, value in self.last_held_out.items()}
        for key, points in self.train.items():
            late = [value for step, value in points if step > self.last_step * (1 - LAST_PART)]
            if late:
                found[f"train/{key}"] = sum(late) / len(late)
        found["loss_spikes"] = float(self.spike_count)
        if self.wall_seconds is not None:
            found["minutes"] = self.wall_seconds / 60
        return {key: value for key, value in found.items() if math.isfinite(value)}


def plot_losses(runs: Mapping[str, tuple[str, LossCurves]], path: Path) -> None:
    """Draw the losses of trainings over their steps, a panel for each loss, and save the picture.

    A colour stands for a variant, its seeds are lines of the same one; training is drawn solid, held-out
    figures dashed with dots; a triangle marks a log line with new loss spikes (in every panel: the log does
    not say of which loss), a cross the end of a training that is not finished. A loss whose
    positive values span more than a factor of 30 has a logarithmic axis.

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
    panels = sorted(keys, key=lambda key: (key != "loss/total", key))
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
    figure.legend(handles=legend, loc="outside lower left", fontsize="small")
    figure.savefig(path, dpi=120)


def _draw(axes: Any, key: str, curves: LossCurves, colour: Any) -> None:
    trained, held_out = curves.train.get(key, []), curves.val.get(key, [])
    if trained:
        axes.plot(*zip(*trained, strict=True), color=colour, linewidth=1)
        at = dict(trained)
        marked = [(step, at[step]) for step, _ in curves.spikes if step in at]
        if marked:
            axes.plot(*zip(*marked, strict=True), color=colour, linestyle="", marker="v")
        if curves.wall_seconds is None:
            axes.plot(*trained[-1], color=colour, linestyle="", marker="x", markersize=8)
    if held_out:
        axes.plot(*zip(*held_out, strict=True), color=colour, linestyle="--", marker=".", linewidth=1)

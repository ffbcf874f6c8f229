"""A plan as tables of at most 100 columns, and as JSON."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

from rich.console import Console
from rich.table import Table

from launchers.plan import RESERVE, Level, Plan

WIDTH = 100


def show_plan(plan: Plan, console: Console | None = None) -> None:
    """Print all tables of a plan."""
    console = console or Console(width=WIDTH, highlight=False)
    console.print(
        f"[bold]{plan.recipe}[/] on {plan.ranks} x {plan.gpu}, {plan.precision}, "
        f"{plan.micro_steps} micro-step(s) a step, at an MFU of {plan.mfu:.0%}; nothing of this is measured"
    )
    for line in plan.assumed:
        console.print(f"  assumed: {line}")
    for table in (_parts(plan), _memory(plan), _communication(plan), _time(plan)):
        console.print()
        console.print(table)
    for line in plan.notes:
        console.print(f"  {line}")


def write_json(plan: Plan, path: Path) -> None:
    """Write a plan as JSON: bytes, FLOPs and seconds, under the names of `Plan`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(dataclasses.asdict(plan), indent=1) + "\n", encoding="utf-8")


def _table(title: str, first: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold", box=None, pad_edge=False)
    table.add_column(first)
    for column in columns:
        table.add_column(column, justify="right", no_wrap=True)
    return table


def _parts(plan: Plan) -> Table:
    table = _table(
        "Parameters, and TFLOP of a step over all GPUs", "part", "parameters", "trained", "forward", "backward"
    )
    rows = [
        (p.name, p.parameters.total, p.parameters.trained, p.flops.forward, p.flops.backward)
        for p in plan.parts
    ]
    for name, total, trained, forward, backward in rows:
        table.add_row(
            name, _count(total), _count(trained), f"{forward / 1e12:,.4g}", f"{backward / 1e12:,.4g}"
        )
    sums = [sum(row[i] for row in rows) for i in range(1, 5)]
    table.add_row(
        "[bold]all[/]",
        *[_count(n) for n in sums[:2]],
        *[f"{n / 1e12:,.4g}" for n in sums[2:]],
    )
    if plan.recomputed:
        table.add_row("once more, for checkpointing", "", "", "", f"{plan.recomputed / 1e12:,.4g}")
    return table


def _memory(plan: Plan) -> Table:
    other = "" if plan.checkpointing is None else f"; last: {'un' if plan.checkpointing else ''}checkpointed"
    table = _table(
        f"GB that a GPU of {plan.gpu_memory / 1e9:.0f} GB holds{other}",
        "ZeRO", "weights", "gradients", "masters", "optimizer", "buffers", "fixed", "activ.", "logits", "total", "",
    )  # fmt: skip
    if plan.checkpointing is not None:
        table.add_column("uncheckp." if plan.checkpointing else "checkp.", justify="right")
    for level in plan.levels:
        held = [_gb(getattr(level.held, f.name)) for f in dataclasses.fields(level.held)]
        row = [_name(level), *held, _gb(level.total), _verdict(level.fits)]
        if level.total_other is not None:
            row.append(f"{_gb(level.total_other)} {_verdict(bool(level.fits_other))}")
        table.add_row(*row)
    table.caption = f"fits: with {RESERVE / 1e9:.0f} GB to spare; activations are an estimate; * the recipe's"
    table.caption_justify = "left"
    return table


def _communication(plan: Plan) -> Table:
    table = _table(
        "GB that a GPU sends in a step, and how long that takes at the links' full rate",
        "ZeRO", "weights", "gradients", "together", "seconds", "of a step",
    )  # fmt: skip
    for level in plan.levels:
        table.add_row(
            _name(level), _gb(level.sent.gather), _gb(level.sent.reduce), _gb(level.sent.total),
            f"{level.seconds:.3g}", f"{level.seconds / plan.seconds_per_step:.0%}",
        )  # fmt: skip
    table.caption = "above 100 %, or where it is not hidden behind the computation, the MFU is out of reach"
    table.caption_justify = "left"
    return table


def _time(plan: Plan) -> Table:
    table = _table("Time and data", "", "")
    table.columns[1].justify = "left"
    table.columns[1].no_wrap = False
    again = f", {plan.recomputed / 1e15:.3g} PFLOP more for checkpointing" if plan.recomputed else ""
    table.add_row("a step", f"{plan.seconds_per_step:.3g} s for {plan.flops / 1e15:.3g} PFLOP{again}")
    table.add_row("samples of a step", f"{plan.samples_per_step:,.0f} {plan.sample}s")
    if plan.tokens_per_second:
        table.add_row(
            "tokens/s",
            f"{plan.tokens_per_second:,.0f}, visual positions among them; "
            f"{plan.tokens_per_second / plan.ranks:,.0f} a GPU",
        )
    table.add_row("images/s", f"{plan.images_per_second:,.1f}; {plan.images_per_second / plan.ranks:,.1f} a GPU")
    table.add_row(
        "the run",
        f"{plan.steps:,} steps, {plan.steps * plan.samples_per_step:,.0f} {plan.sample}s: "
        f"{_duration(plan.hours)}, {plan.gpu_hours:,.3g} GPU-hours",
    )
    table.add_row("a checkpoint", f"{_gb(plan.checkpoint)} GB; the export {_gb(plan.export)} GB")
    if plan.code_bytes:
        table.add_row(
            "codes",
            f"{plan.code_bytes:,} bytes a picture, {plan.shard_bytes:,} in a shard: "
            f"{plan.shard_bytes / 1e3:,.1f} GB a million",
        )
    if plan.codes_per_second:
        table.add_row("reading them", f"{plan.codes_per_second / 1e6:,.2f} MB/s a node")
    if plan.encode_seconds:
        table.add_row(
            "pretokenize",
            f"{1 / plan.encode_seconds:,.0f} images/s a GPU, in fp32 as codes are; a million takes "
            f"{plan.encode_seconds * 1e6 / 3600:,.2g} GPU-hours",
        )
    return table


def _name(level: Level) -> str:
    return f"{level.level}{'*' if level.is_recipes else ''}"


def _verdict(fits: bool) -> str:
    return "[green]fits[/]" if fits else "[red]no[/]"


def _count(number: float) -> str:
    return f"{number:,.0f}"


def _gb(number: float) -> str:
    return f"{number / 1e9:,.1f}" if number >= 1e9 else f"{number / 1e9:.2g}" if number else "-"


def _duration(hours: float) -> str:
    if hours >= 48:
        return f"{hours / 24:,.1f} days"
    return f"{hours:,.1f} hours" if hours >= 1 else f"{hours * 60:,.1f} minutes"

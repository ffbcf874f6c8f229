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
        f"[bold]{plan.recipe}[/] on {plan.ranks} x {plan.gpu}, {plan.precision}, {plan.micro_steps} "
        f"micro-step(s) a step, MFU {plan.mfu:.0%}. Nothing of this is measured."
    )
    for line in plan.assumed:
        console.print(f"Assumed: {line}")
    for table, notes in (_parts(plan), _memory(plan), _communication(plan), _time(plan)):
        console.print(f"\n[bold]{table.title}[/]")
        table.title = None  # rich would wrap it at the table's width
        console.print(table)
        for line in notes:
            console.print(f"[dim]{line}[/]")


def write_json(plan: Plan, path: Path) -> None:
    """Write a plan as JSON: bytes, FLOPs and seconds, under the names of `Plan`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(dataclasses.asdict(plan), indent=1) + "\n", encoding="utf-8")


def _table(title: str, first: str, *columns: str) -> Table:
    table = Table(title=title, box=None, pad_edge=False)
    table.add_column(first, no_wrap=True)
    for column in columns:
        table.add_column(column, justify="right", no_wrap=True)
    return table


def _parts(plan: Plan) -> tuple[Table, list[str]]:
    unit, size = _unit(plan.flops)
    table = _table(
        f"Parameters, and {unit}FLOP of a step over all GPUs",
        "part", "parameters", "trained", "forward", "backward",
    )  # fmt: skip
    rows = [
        (part.name, part.parameters.total, part.parameters.trained, part.flops.forward, part.flops.backward)
        for part in plan.parts
    ]
    for name, *numbers in [*rows, ("[bold]all[/]", *(sum(row[i] for row in rows) for i in range(1, 5)))]:
        counts, flops = numbers[:2], numbers[2:]
        table.add_row(
            name,
            *(f"{n:,.0f}" if n else "-" for n in counts),
            *(f"{n / size:,.2f}" if n else "-" for n in flops),
        )
    if plan.recomputed:
        table.add_row("once more, for checkpointing", "", "", "", f"{plan.recomputed / size:,.2f}")
    return table, []


def _memory(plan: Plan) -> tuple[Table, list[str]]:
    unit, size = _unit(max(level.total for level in plan.levels))
    columns = ["weights", "grads", "masters", "optim.", "buffers", "fixed", "activ.", "logits"]
    this, other = ("checkp.", "without") if plan.checkpointing else ("total", "checkp.")
    table = _table(f"{unit}B that a GPU of {_si(plan.gpu_memory, 'B')} holds", "ZeRO", *columns, this)
    if plan.checkpointing is not None:
        table.add_column(other, justify="right", no_wrap=True)
    for level in plan.levels:
        held = [getattr(level.held, f.name) for f in dataclasses.fields(level.held) if f.name != "host"]
        row = [_name(level), *(_number(n / size) for n in held), _verdict(level.total / size, level.fits)]
        if level.total_other is not None:
            row.append(_verdict(level.total_other / size, bool(level.fits_other)))
        table.add_row(*row)
    notes = [
        f"fits: {_si(RESERVE, 'B')} stay free. Activations are an estimate, {this} as the recipe says; "
        "* the recipe's level."
        if plan.checkpointing is not None
        else f"fits: {_si(RESERVE, 'B')} stay free. Activations are an estimate; * the recipe's level."
    ]
    notes += [
        f"ZeRO-{level.level}: {_si(level.held.host, 'B')} a rank are offloaded to the machine's memory."
        for level in plan.levels
        if level.held.host
    ]
    return table, notes


def _communication(plan: Plan) -> tuple[Table, list[str]]:
    unit, size = _unit(max(level.sent.total for level in plan.levels))
    table = _table(
        f"{unit}B that a GPU sends in a step, and the time at {_si(plan.link, 'B/s')}",
        "ZeRO", "weights", "gradients", "together", "time", "of a step",
    )  # fmt: skip
    for level in plan.levels:
        sent = (level.sent.gather, level.sent.reduce, level.sent.total)
        share = f"{level.seconds / plan.seconds_per_step:.0%}"
        table.add_row(_name(level), *(_number(n / size) for n in sent), _si(level.seconds, "s"), share)
    return table, [
        "What is not hidden behind the computation comes on top; near 100 % the MFU is out of reach."
    ]


def _time(plan: Plan) -> tuple[Table, list[str]]:
    table = Table(title="Time and data", box=None, pad_edge=False, show_header=False)
    again = f", {_si(plan.recomputed, 'FLOP')} more for checkpointing" if plan.recomputed else ""
    seen = plan.steps * plan.samples_per_step
    rows = [
        ("a step", f"{_si(plan.seconds_per_step, 's')} for {_si(plan.flops, 'FLOP')}{again}"),
        ("samples of a step", f"{plan.samples_per_step:,.0f} {plan.sample}s"),
        ("images/s", f"{plan.images_per_second:,.1f}; {plan.images_per_second / plan.ranks:,.1f} a GPU"),
        (
            "the run",
            f"{plan.steps:,} steps, {seen:,.0f} {plan.sample}s: {_duration(plan.hours)}, "
            f"{plan.gpu_hours:,.1f} GPU-hours",
        ),
        ("a checkpoint", f"{_si(plan.checkpoint, 'B')}; the export {_si(plan.export, 'B')}"),
    ]
    if plan.tokens_per_second:
        each = plan.tokens_per_second / plan.ranks
        rows.insert(
            2, ("tokens/s", f"{plan.tokens_per_second:,.0f}, {each:,.0f} a GPU, with visual positions")
        )
    if plan.code_bytes:
        million = _si(plan.shard_bytes * 1e6, "B")
        rows.append(
            (
                "codes",
                f"{plan.code_bytes:,} bytes a picture, {plan.shard_bytes:,} in a shard, {million} a million",
            )
        )
        hours = plan.encode_seconds * 1e6 / 3600
        rows.append(
            (
                "pretokenize",
                f"{1 / plan.encode_seconds:,.0f} images/s a GPU, in fp32 as codes are: {hours:,.1f} "
                "GPU-hours a million",
            )
        )
    if plan.codes_per_second:
        rows.append(("reading codes", f"{_si(plan.codes_per_second, 'B/s')} a node"))
    for row in rows:
        table.add_row(*row)
    return table, []


def _name(level: Level) -> str:
    return f"{level.level}{'*' if level.is_recipes else ''}"


def _verdict(number: float, fits: bool) -> str:
    return f"{number:,.1f} [green]fits[/]" if fits else f"{number:,.1f}   [red]no[/]"


def _number(number: float) -> str:
    return f"{number:,.1f}" if number >= 10 else f"{number:.2f}" if number >= 0.005 else "-"


def _unit(largest: float) -> tuple[str, float]:
    """Prefix and size of the unit in which the largest number of a table reads well."""
    prefixes = (("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3))
    return next(((name, size) for name, size in prefixes if largest >= size), ("", 1.0))


def _si(number: float, unit: str) -> str:
    """A number with its unit, three digits: 12.5 PFLOP, 494 ms."""
    prefixes = (
        (1e15, "P"),
        (1e12, "T"),
        (1e9, "G"),
        (1e6, "M"),
        (1e3, "k"),
        (1, ""),
        (1e-3, "m"),
        (1e-6, "u"),
    )
    if unit == "s" and number >= 1:
        return f"{number:,.3g} s"
    size, prefix = next((pair for pair in prefixes if number >= pair[0]), (1e-9, "n"))
    return f"{number / size:,.3g} {prefix}{unit}"


def _duration(hours: float) -> str:
    if hours >= 48:
        return f"{hours / 24:,.1f} days"
    return f"{hours:,.1f} hours" if hours >= 1 else f"{hours * 60:,.1f} minutes"

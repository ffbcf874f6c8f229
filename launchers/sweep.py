"""`dualtoken sweep`: a recipe trained once for each value of its keys; a table and a plot of the losses."""

import hashlib
import itertools
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from eval.results import read_json, write_json
from launchers.errors import UserError
from launchers.loss_curves import LossCurves, plot_losses
from launchers.variants import Figure, Run, Trainings, Variant, rows_of, train_all, write_table

KIND = "sweep"
OWN = {"run_dir": "--output gives the folder", "seed": "--seeds gives how many", "recipe": "it comes first"}
LONGEST_NAME = 80  # of a folder, in characters
SPIKES, COLLAPSED = "loss_spikes", "tower_collapsed"
HELD_OUT, TRAINING = "held out", "training"


@dataclass(frozen=True)
class Sweep:
    """What is asked for: the settings that all trainings share, and the keys with several values."""

    recipe: str
    shared: tuple[str, ...]  # words key=value
    values: Mapping[str, tuple[str, ...]]  # key -> its values as written, two or more

    def variants(self) -> list[Variant]:
        """All combinations of the values; the first key changes last."""
        found = []
        for chosen in itertools.product(*self.values.values()):
            words = tuple(f"{key}={value}" for key, value in zip(self.values, chosen, strict=True))
            found.append(Variant(folder_name(words), ", ".join(words), words))
        return found

    def about(self) -> dict[str, Any]:
        """What tells this sweep from another one; values may be added to it."""
        return {"recipe": self.recipe, "settings": list(self.shared), "keys": list(self.values)}


def parse_sweep(recipe: str, words: Sequence[str]) -> Sweep:
    """Read `key=a,b,c` words: commas outside of brackets and quotes separate values.

    A key with one value is a setting that all trainings share.

    Raises:
        UserError: no key has several values; a key or a value is given twice, a value is empty, or the key
            is the sweep's own.
    """
    shared: list[str] = []
    values: dict[str, tuple[str, ...]] = {}
    seen: set[str] = set()
    for word in words:
        key, equals, text = word.partition("=")
        if not equals or not key or key.startswith("-"):
            raise UserError(
                f"got the argument {word!r}: expected key=value,value, such as optimizer.lr=1e-3,3e-3"
            )
        if key in OWN:
            raise UserError(f"{word}: {key} cannot be given here: {OWN[key]}")
        if key in seen:
            raise UserError(f"{key} is given twice: put its values into one word, {key}=VALUE,VALUE")
        seen.add(key)
        found = split_values(text)
        if len(found) == 1:
            shared.append(word)
            continue
        if "" in found:
            raise UserError(f"{word}: a value is empty; for an empty text write {key}='',VALUE in quotes")
        if twice := [value for place, value in enumerate(found) if value in found[:place]]:
            raise UserError(f"{word}: the value {twice[0]} is there twice; --seeds repeats trainings")
        values[key] = tuple(found)
    if not values:
        raise UserError(
            f"got {' '.join(words) or 'no settings'}: no key has several values to compare; expected such as "
            "optimizer.lr=1e-3,3e-3 (one training alone: dualtoken train)"
        )
    return Sweep(recipe, tuple(shared), values)


def split_values(text: str) -> list[str]:
    """Split at commas outside of brackets and of quotes; a quote counts where a value or an item begins."""
    values, depth, quote = [""], 0, ""
    begins = True
    for letter in text:
        if quote:
            quote = "" if letter == quote else quote
        elif letter in "'\"" and begins:
            quote = letter
        elif letter == "," and depth <= 0:
            values.append("")
            begins = True
            continue
        else:
            depth += (letter in "[{(") - (letter in "]})")
        begins = not quote and letter in "[{,: "
        values[-1] += letter
    return values


def folder_name(words: Sequence[str]) -> str:
    """A name for the folders of these settings: themselves, where a file system takes them."""
    text = ",".join(words)
    name = re.sub(r"[^\w.=,+-]", "_", text, flags=re.ASCII)[:LONGEST_NAME]
    return name if name == text else f"{name}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"


def sweep(
    asked: Sweep, output: Path, seeds: int, ranks: int | None, say: Callable[[str], None]
) -> list[dict[str, Any]]:
    """Train every combination of values with every seed; write the table and the plot.

    A run that is done is not repeated, one that was broken off goes on from its checkpoint; values and seeds
    may be added. One that fails, as by a rate that is too high, is left out of the table; its losses are in
    the plot. Writes `sweep.md`, `sweep.json` and `sweep.png` in `output`.

    Args:
        asked: the recipe and its values.
        output: folder for the runs and the results.
        seeds: trainings of each combination, with the recipe's own seed and those after it.
        ranks: processes of a training; None for as many as there are GPUs, or two on the CPU, as far as all
            batches split.
        say: called with each line for the user.

    Returns:
        the rows of the table, with mean and spread (standard deviation over seeds) of every figure.

    Raises:
        ConfigError: a setting is wrong; nothing has been trained.
        UserError: trainings failed or were stopped, or `output` holds another sweep.
    """
    variants = asked.variants()
    ranks = ranks or ranks_for_all(asked, variants)
    first_seed = _check_settings(asked, variants, ranks)
    _claim(output, asked)

    def settings(folder: Path, seed: int) -> list[str]:
        return [f"recipe={asked.recipe}", f"run_dir={folder}", f"seed={first_seed + seed}", *asked.shared]

    trainings = Trainings(
        kind=KIND,
        variants=variants,
        settings=settings,
        measure=lambda folder: LossCurves.read(folder).figures(),
        made_from={"recipe": _fingerprint(asked.recipe)},
        keeps_going=True,
    )
    runs = train_all(trainings, output, seeds, ranks, say)
    return _write_results(asked, variants, runs, output, seeds, say)


def ranks_for_all(asked: Sweep, variants: Sequence[Variant]) -> int:
    """The most ranks of this machine that the batches of all variants split over."""
    from launchers.processes import default_ranks
    from pretrain.config import fitting_ranks

    ranks, before = default_ranks(), 0
    while ranks != before:
        before = ranks
        for variant in variants:
            ranks = fitting_ranks([f"recipe={asked.recipe}", *asked.shared, *variant.words], ranks)
    return ranks


def _check_settings(asked: Sweep, variants: Sequence[Variant], ranks: int) -> int:
    """Tell a mistake before anything is trained; returns the recipe's own seed."""
    from pretrain.config import load_job_config

    for variant in variants:
        words = [f"recipe={asked.recipe}", "run_dir=.", *asked.shared, *variant.words]
        config = load_job_config(words, world_size=ranks)
    return config.seed


def _claim(output: Path, asked: Sweep) -> None:
    """Note whose folder it is.

    Raises:
        UserError: another sweep's.
    """
    path = output / "asked.json"
    before = read_json(path)
    if before is None:
        write_json(path, asked.about())
    elif before != asked.about():
        there = " ".join([*before.get("settings", []), *(f"{key}=..." for key in before.get("keys", []))])
        raise UserError(
            f"{output} holds another sweep, {before.get('recipe')} {there}: choose another --output, or "
            "remove that folder (values and seeds may be added to a sweep, its other settings stay)"
        )


def _fingerprint(recipe: str) -> str:
    """Of the settings that a recipe and those it extends have now."""
    from omegaconf import OmegaConf

    from pretrain.config import find_recipe, load_recipe

    text = OmegaConf.to_yaml(load_recipe(find_recipe(recipe)), sort_keys=True)
    return f"sha256 {hashlib.sha256(text.encode()).hexdigest()[:16]}"


def _write_results(
    asked: Sweep,
    variants: Sequence[Variant],
    runs: Sequence[Run],
    output: Path,
    seeds: int,
    say: Callable[[str], None],
) -> list[dict[str, Any]]:
    curves = {run.folder: LossCurves.read(run.folder) for run in runs}
    figures = columns([run.figures for run in runs if run.figures is not None], seeds)
    rows = rows_of([_without_missing(variant, runs, figures) for variant in variants], runs, figures)
    content = {**asked.about(), "seeds": seeds, "rows": rows, "runs": []}
    notes = [
        f"{len(variants)} variants, {seeds} seed(s)" + ("; spread: standard deviation." if seeds > 1 else ".")
    ]
    for run in runs:
        found, name = curves[run.folder], f"{run.variant.meaning}, seed {run.seed}"
        content["runs"].append(
            {
                "variant": run.variant.name,
                "seed": run.seed,
                "folder": run.folder.name,
                "words": list(run.variant.words),
                "finished": run.figures is not None,
                "last_step": found.last_step,
                "loss_spikes": [asdict(spikes) for spikes in found.spikes],
                "tower_collapsed": list(found.collapsed),
            }
        )
        if found.spikes:
            steps = ", ".join(
                " ".join([str(line.step), *([f"({', '.join(line.losses)})"] if line.losses else [])])
                for line in found.spikes
            )
            notes.append(f"{name}: {found.spike_count} loss spike(s), in the log lines of steps {steps}")
        if found.collapsed:
            steps = ", ".join(map(str, found.collapsed))
            notes.append(f"{name}: the vision tower has collapsed, by the validations of steps {steps}")
        if run.figures is None:
            notes.append(f"{name}: failed, last logged at step {found.last_step}; not in the table")
    write_table(KIND, output, figures, content, notes, say)
    plot = output / f"{KIND}.png"
    plot_losses({run.folder.name: (run.variant.meaning, curves[run.folder]) for run in runs}, plot)
    say(f"written: {plot}")
    if failed := [run.folder.name for run in runs if run.figures is None]:
        raise UserError(
            f"{len(failed)} of {len(runs)} trainings failed: {', '.join(failed)}; see above. Started "
            "again, the same command tries them once more"
        )
    return rows


def columns(runs: Sequence[Mapping[str, float]], seeds: int) -> list[Figure]:
    """Columns of the table for what was measured: held-out figures, training losses, spikes, collapse, time.

    Of the training losses the total alone, where there is one.
    """
    keys = list(dict.fromkeys(key for figures in runs for key in figures))
    held_out = [key for key in keys if key.startswith("val/")]
    trained = [key for key in keys if key.startswith("train/")]
    if "train/loss/total" in trained:
        trained = ["train/loss/total"]
    shown = [Figure(key, f"{key.removeprefix('val/')}, {HELD_OUT}", 1.0, 4) for key in held_out]
    shown += [Figure(key, f"{key.removeprefix('train/')}, {TRAINING}", 1.0, 4) for key in trained]
    shown.append(Figure(SPIKES, "loss spikes", 1.0, 1 if seeds > 1 else 0))
    if COLLAPSED in keys:
        shown.append(Figure(COLLAPSED, "tower collapsed", 1.0, 1 if seeds > 1 else 0))
    return [*shown, Figure("minutes", "minutes", 1.0, 1)]


def _without_missing(variant: Variant, runs: Sequence[Run], figures: Sequence[Figure]) -> Variant:
    """The variant without figures that it has no value of, such as a loss that it switches off."""
    done = [run.figures for run in runs if run.variant == variant and run.figures is not None]
    missing = [figure.key for figure in figures if any(figure.key not in found for found in done)]
    return replace(variant, left_out=tuple(missing))

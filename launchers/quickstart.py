"""The quickstart chain: from sample data to the report, each step a command of its own, resumable."""

import json
import os
import platform
import shlex
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path

from launchers import processes
from launchers.errors import UserError

RECIPES = ("quickstart_siglip", "quickstart_tokenizer", "quickstart_mllm")
RECIPES_ROOT = Path("runs/quickstart")  # where the quickstart recipes look for what they read
VERSIONS_OF = ("torch", "deepspeed", "transformers", "megatron-energon", "nvidia-dali-cuda130")


@dataclass(frozen=True)
class Step:
    """One command of the chain."""

    name: str
    makes: str  # what it makes, for a reader
    command: tuple[str, ...]
    done: Path  # exists when, and only when, the step is complete
    needs: tuple[str, ...] = ()  # steps whose results it reads
    ranks: int = 1


@dataclass
class StepRecord:
    """What chain.json says about a step; seconds and peak are over all attempts at it."""

    name: str
    makes: str
    command: str
    seconds: float = 0.0
    peak_memory_bytes: int = 0
    attempts: int = 0
    finished_at: str | None = None


@dataclass
class ChainRecord:
    """The whole of chain.json."""

    machine: dict = field(default_factory=dict)
    seed: int = 0
    steps: dict[str, StepRecord] = field(default_factory=dict)
    # The session that the command under way runs in, to find what a killed chain left behind.
    session: int | None = None
    session_started: float | None = None

    @classmethod
    def load(cls, path: Path) -> "ChainRecord":
        """Read chain.json; an empty record if there is none yet."""
        if not path.is_file():
            return cls()
        content = json.loads(path.read_text(encoding="utf-8"))
        steps = {name: StepRecord(**step) for name, step in content.pop("steps").items()}
        for total in ("seconds", "peak_memory_bytes"):
            content.pop(total)
        return cls(steps=steps, **content)

    def save(self, path: Path) -> None:
        """Write chain.json, totals included, so that a reader never sees half of it."""
        content = asdict(self)
        content["seconds"] = sum(step.seconds for step in self.steps.values())
        content["peak_memory_bytes"] = max((s.peak_memory_bytes for s in self.steps.values()), default=0)
        temporary = path.with_suffix(".json.tmp")
        temporary.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        temporary.rename(path)


def pretokenize_arguments(inputs: Sequence[str | Path], visual_tokenizer: Path, output: Path) -> list[str]:
    """Arguments of `data_pipeline.pretokenize`."""
    return [
        *("--inputs", *map(str, inputs)),
        *("--visual-tokenizer", str(visual_tokenizer)),
        *("--output", str(output)),
    ]


def scenes_to_learn(root: Path) -> Path:
    """The image-text shards that the quickstart's unified model learns from."""
    return root / "sample_data" / "images" / "train" / "scenes"


def relocated_settings(recipe: str, root: Path) -> list[str]:
    """Words that point the paths in a recipe, written for `runs/quickstart`, below another folder."""
    from omegaconf import OmegaConf

    from pretrain.config import find_recipe, load_recipe

    if root == RECIPES_ROOT:
        return []
    words: list[str] = []

    def walk(value: object, key: str) -> None:
        if isinstance(value, dict):
            for name, part in value.items():
                walk(part, f"{key}.{name}" if key else name)
        elif isinstance(value, list):
            for index, part in enumerate(value):
                walk(part, f"{key}.{index}")
        elif isinstance(value, str) and value.startswith(f"{RECIPES_ROOT}/") and key != "run_dir":
            words.append(f"{key}={root / Path(value).relative_to(RECIPES_ROOT)}")

    walk(OmegaConf.to_container(load_recipe(find_recipe(recipe))), "")
    return words


def quickstart_steps(root: Path, ranks: int, seed: int = 0) -> list[Step]:
    """The chain in order, everything below the folder `root`; a seed that is not 0 stands in the commands."""
    data, codes, results = root / "sample_data", root / "codes", root / "evaluation"
    siglip, tokenizer, mllm = root / "siglip", root / "tokenizer", root / "mllm"

    def train(job: str, run_dir: Path) -> tuple[str, ...]:
        recipe = f"quickstart_{job}"
        arguments = [f"recipe={recipe}", f"run_dir={run_dir}", *relocated_settings(recipe, root)]
        if seed:
            arguments.append(f"seed={seed}")
        return tuple(processes.deepspeed_command("pretrain.train", arguments, ranks))

    def pretokenize(split: str, shards: Path) -> tuple[str, ...]:
        arguments = pretokenize_arguments([shards], tokenizer / "export", codes / split)
        return tuple(processes.deepspeed_command("data_pipeline.pretokenize", arguments, ranks))

    return [
        Step(
            "sample-data",
            "drawings with names and scenes with captions and questions, as shards; a tenth held out",
            ("dualtoken", "sample-data", str(data), *(("--seed", str(seed)) if seed else ())),
            data / "summary.json",
        ),
        Step(
            "siglip",
            "a small SigLIP, trained from scratch to match pictures and names",
            train("siglip", siglip),
            siglip / "done.json",
            ("sample-data",),
            ranks,
        ),
        Step(
            "tokenizer",
            "the visual tokenizer: a pixel and a semantic codebook (stage 1)",
            train("tokenizer", tokenizer),
            tokenizer / "done.json",
            ("sample-data", "siglip"),
            ranks,
        ),
        Step(
            "pretokenize-train",
            "the scenes to train on as codes",
            pretokenize("train", scenes_to_learn(root)),
            codes / "train" / "dataset.json",
            ("sample-data", "tokenizer"),
            ranks,
        ),
        Step(
            "pretokenize-val",
            "the scenes of held-out combinations as codes",
            pretokenize("val", data / "images" / "val" / "scenes"),
            codes / "val" / "dataset.json",
            ("sample-data", "tokenizer"),
            ranks,
        ),
        Step(
            "mllm",
            "the unified model: captions, pictures and text (stage 2, ZeRO-3)",
            train("mllm", mllm),
            mllm / "done.json",
            ("sample-data", "pretokenize-train", "pretokenize-val"),
            ranks,
        ),
        Step(
            "evaluate",
            "scenes drawn, asked about, captioned; reconstruction, retrieval, likelihood, small benchmarks",
            ("dualtoken", "evaluate", "--run", str(root)),
            results / "done.json",
            ("siglip", "mllm"),
        ),
        Step(
            "report",
            "the report",
            ("dualtoken", "report", "--run", str(root)),
            root / "report.json",
            ("evaluate",),
        ),
    ]


def why_not_done(step: Step, steps: dict[str, Step]) -> str | None:
    """Why a step has to run, None if its result is there and newer than everything it was made from."""
    if not step.done.is_file():
        return "not there yet"
    made = step.done.stat().st_mtime
    for name in step.needs:
        source = steps[name].done
        if not source.is_file() or source.stat().st_mtime > made:
            return f"made before {name}"
    return None


def run_chain(root: Path, ranks: int, say: Callable[[str], None], seed: int = 0) -> ChainRecord:
    """Run every step that is not done yet; a broken-off training resumes from its checkpoint.

    Args:
        root: folder of the whole chain; `chain.json` in it keeps times and memory.
        ranks: how many ranks the jobs run on.
        say: called with each line for the user.
        seed: of what is held out, of the data and of the trainings.

    Raises:
        UserError: a step failed, another chain is at work in `root`, or one of another seed was.
        KeyboardInterrupt: a signal arrived; the step under way has ended in order.
    """
    root.mkdir(parents=True, exist_ok=True)
    with processes.only_one(root, "quickstart", "--run"):
        path = root / "chain.json"
        record = ChainRecord.load(path)
        if record.steps and record.seed != seed:
            raise UserError(
                f"{root} is a quickstart with seed {record.seed}, not {seed}: "
                f"go on with --seed {record.seed}, or give another folder with --run"
            )
        record.seed = seed
        _end_leftovers(record, say)
        record.machine = _machine(ranks)
        steps = quickstart_steps(root, ranks, seed)
        by_name = {step.name: step for step in steps}
        ran = False
        for number, step in enumerate(steps, 1):
            head = f"[{number}/{len(steps)}] {step.name}"
            reason = why_not_done(step, by_name)
            if reason is None:
                seconds = record.steps[step.name].seconds if step.name in record.steps else 0.0
                say(f"{head}: done before ({seconds:.0f} s), {step.done}")
                continue
            if step.done.is_file():
                _make_way(step, root, reason)
            say(f"{head}: {step.makes}\n$ {shlex.join(step.command)}")
            _run_step(step, record, path)
            say(f"{head}: done in {record.steps[step.name].seconds:.0f} s")
            ran = True
        total = sum(step.seconds for step in record.steps.values())
        peak = max((step.peak_memory_bytes for step in record.steps.values()), default=0)
        say(
            f"{'All steps done' if ran else 'Nothing left to do'}: {total / 60:.1f} minutes in all, "
            f"at most {peak / 2**30:.1f} GiB of memory. Open {root / 'report.html'}"
        )
        return record


def _run_step(step: Step, record: ChainRecord, path: Path) -> None:
    entry = record.steps.setdefault(step.name, StepRecord(step.name, step.makes, ""))
    entry.makes, entry.command = step.makes, shlex.join(step.command)
    entry.attempts += 1
    started = time.time()

    def notice_session(session: int) -> None:
        record.session, record.session_started = session, started
        record.save(path)

    try:
        finished = processes.run(step.command, step.ranks, notice_session)
        entry.seconds += finished.seconds
        entry.peak_memory_bytes = max(entry.peak_memory_bytes, finished.peak_memory_bytes)
    except KeyboardInterrupt:
        entry.seconds += time.time() - started
        raise
    finally:
        record.session = record.session_started = None
        record.save(path)
    # The launcher can answer 0 for a rank that was killed: the result decides.
    if finished.returncode != 0 or not step.done.is_file():
        raise UserError(
            f"step {step.name} ended with exit code {finished.returncode} without making {step.done}; "
            "mend what it says above and start the same command again: it goes on from there"
        )
    entry.finished_at = time.strftime("%Y-%m-%dT%H:%M:%S%z")
    record.save(path)


def _make_way(step: Step, root: Path, reason: str) -> None:
    """Move an outdated result aside: a finished training job would not run again over it."""
    target = step.done.parent
    if target in (root, root / "evaluation"):
        return  # a file, overwritten in place
    aside = target.with_name(f"{target.name}.outdated-{time.strftime('%Y%m%d-%H%M%S')}")
    target.rename(aside)
    sys.stderr.write(f"{target} was {reason}: moved to {aside}, made again\n")


def _end_leftovers(record: ChainRecord, say: Callable[[str], None]) -> None:
    """End what a killed chain left running: two jobs in one run folder would spoil it."""
    if record.session is None or record.session_started is None:
        return
    count = processes.end_session(record.session, record.session_started - 1)
    if count:
        say(f"ended {count} processes that a killed run had left behind")
    record.session = record.session_started = None


def _machine(ranks: int) -> dict:
    import torch

    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "cores": processes.available_cores(),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "gpus": gpus,
        "ranks": ranks,
        "python": platform.python_version(),
        "versions": {name: version(name) for name in VERSIONS_OF},
    }

"""`python -m eval.understanding`: ask a model one benchmark, on as many ranks as it is started on.

Under `deepspeed --module eval.understanding`, `torchrun -m`, `srun`, Slurm arrays, or alone. Started again it
asks what is missing, and with nothing missing it only scores.
"""

import argparse
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from data_pipeline.pretokenize.command import place_among_workers
from eval.understanding.answers import read_answers
from eval.understanding.benchmark import Benchmark, Question
from eval.understanding.registry import BENCHMARKS


def _parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m eval.understanding", description="Ask a model the questions of a benchmark."
    )
    parser.add_argument("--benchmark", required=True, choices=sorted(BENCHMARKS))
    parser.add_argument("--data", required=True, type=Path, help="folder of the benchmark's files")
    parser.add_argument(
        "--model", required=True, help="folder of a unified model, or what transformers loads: folder or name"
    )
    parser.add_argument("--visual-tokenizer", type=Path, help="folder; a unified model needs it")
    parser.add_argument(
        "--output",
        required=True,
        type=Path,
        help="folder, the same for all ranks; a folder in it for the benchmark",
    )
    parser.add_argument("--batch-size", type=int, default=16, help="questions asked at a time")
    parser.add_argument("--by", default="text", choices=("text", "likelihood"), help="what is an answer")
    parser.add_argument(
        "--template", help="of a unified model's prompts: qwen, vicuna or none; as `dualtoken chat` chooses"
    )
    parser.add_argument("--precision", default="fp32", choices=("fp32", "bf16"))
    parser.add_argument("--max-new-tokens", type=int, help="of an answer; the benchmark's by default")
    parser.add_argument("--local_rank", "--local-rank", type=int, default=0, help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def place_among_ranks(environment: Mapping[str, str], local_rank: int = 0) -> tuple[int, int, int]:
    """Return rank, number of ranks and rank on this machine.

    Slurm's batch script has a SLURM_PROCID but is no task of `srun`: alone it is to ask all questions.
    """
    of_a_step = "SLURM_STEP_NUM_TASKS" in environment
    known = {name: value for name, value in environment.items() if of_a_step or name != "SLURM_PROCID"}
    return place_among_workers(known, local_rank)


def _run_command(options: argparse.Namespace) -> None:
    rank, world_size, local_rank = place_among_ranks(os.environ, options.local_rank)
    prefix = f"{options.benchmark}: " if world_size == 1 else f"{options.benchmark}, rank {rank}: "

    def say(line: str) -> None:
        sys.stdout.write(f"{prefix}{line}\n")
        sys.stdout.flush()

    benchmark = BENCHMARKS[options.benchmark]
    questions = benchmark.read(options.data)  # a mistake is told before anything is loaded

    import torch

    from eval.understanding.answering import answer_questions
    from eval.understanding.models import load_answerer

    if torch.cuda.is_available():
        # Slurm may show each task no device but its own.
        torch.cuda.set_device(0 if torch.cuda.device_count() == 1 else local_rank)
    answerer = load_answerer(options.model, options.visual_tokenizer, options.template, options.precision)
    path = answer_questions(
        benchmark,
        questions,
        answerer,
        options.output / benchmark.name,
        rank=rank,
        world_size=world_size,
        batch_size=options.batch_size,
        by=options.by,
        max_new_tokens=options.max_new_tokens,
        progress=say,
    )
    if path is None:
        say("done; the last rank to end writes all answers")
        return
    say(f"{len(questions)} answers in {path}")
    _score(benchmark, questions, path, say)


def _score(
    benchmark: Benchmark, questions: Sequence[Question], path: Path, say: Callable[[str], None]
) -> None:
    """Say what the official scoring gives, and write the files for the benchmark's server."""
    answers = read_answers(path, benchmark, questions)
    scores = benchmark.score(questions, answers)
    if scores.value is not None:
        say(f"{benchmark.headline} {scores.value:.2f} {benchmark.unit}".rstrip())
    for name, value in scores.figures.items():
        say(f"  {name}: {'unknown' if value is None else f'{value:.2f}'}")
    for note in scores.notes:
        say(f"note: {note}")
    if benchmark.submit is not None:
        for file in benchmark.submit(questions, answers, path.parent):
            say(f"for the benchmark's server: {file}")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; a user's mistake is one line on standard error and exit code 2."""
    try:
        _run_command(_parse_arguments(arguments))
    except (ValueError, OSError, ImportError) as error:
        sys.stderr.write(f"error: {' '.join(str(error).split())}\n")
        return 2
    return 0

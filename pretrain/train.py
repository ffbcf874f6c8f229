"""Entry point of every training job: `deepspeed --module pretrain.train recipe=NAME run_dir=... key=value`.

Runs alone (one rank), under `deepspeed`, `torchrun`, `srun` or `mpirun`. Mistakes of the user are one line on
stderr and exit code 2; set DUALTOKEN_TRACEBACK=1 to see where they arise.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from typing import NoReturn

from pretrain.config import JOBS, ConfigError, available_recipes, job_classes, load_job_config
from pretrain.ranks import name_ranks
from pretrain.stop_signal import StopSignal

HELP = """usage: python -m pretrain.train recipe=NAME run_dir=FOLDER [key=value ...]

Starts or resumes a training job. A recipe is a name below or the path of a YAML file; every key of it can be
overridden, nested ones with dots (optimizer.lr=1e-4). Several ranks: start it with
`deepspeed --num_gpus N --module pretrain.train ...` or `torchrun --nproc_per_node N -m pretrain.train ...`.

recipes: {recipes}
jobs:    {jobs}
"""


def main(argv: list[str] | None = None) -> None:
    """Run the job that `argv` describes; does not return when it succeeds."""
    argv = sys.argv[1:] if argv is None else argv
    if {"-h", "--help"} & set(argv):
        sys.stdout.write(HELP.format(recipes=", ".join(available_recipes()), jobs=", ".join(JOBS)))
        return
    # Before torch is imported: ranks of one machine share its cores, unless Slurm has dealt them out.
    local_ranks = int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or 1)
    cores = len(os.sched_getaffinity(0))
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, cores // local_ranks)))
    # transformers warns of its own default configs and draws bars that a log file does not need.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    try:
        # A job that is asked to stop while it starts stops after its first step: only then is it queued again
        # (launchers/slurm). SIGTERM still ends a rank that waits for others which failed to start.
        stop = StopSignal().listen(signal.SIGUSR1)
        name_ranks(os.environ)
        config = load_job_config(argv)
        import torch

        if not torch.cuda.is_available():
            os.environ.setdefault("DS_ACCELERATOR", "cpu")  # DeepSpeed would find that out with a warning
        from pretrain.checkpoints.finding import CheckpointError
        from pretrain.lost_ranks import end_by
        from pretrain.trainer import Trainer, TrainingError, finished_before

        if (line := finished_before(config)) is not None:
            if os.environ.get("RANK", "0") == "0":
                sys.stdout.write(line + "\n")
            return
        from pretrain.runtime import leave, start_runtime

        runtime = start_runtime(config)
        _, task_class = job_classes(config.job)
        trainer = Trainer(config, runtime, task_class(config, runtime), stop)
    except (ValueError, OSError, ImportError) as error:
        # What a task's constructor raises about its inputs, a missing file or package for example.
        _fail(error, code=2)
    except Exception as error:
        from pretrain.lost_ranks import end_by

        end_by(error, int(os.environ.get("RANK", "0")), 0, [])
    try:
        trainer.run()
    except ConfigError as error:
        _fail(error, code=2)
    except (TrainingError, CheckpointError) as error:
        _fail(error, code=1)
    except KeyboardInterrupt:
        os._exit(130)
    except Exception as error:
        end_by(error, runtime.rank, runtime.step, trainer.health.peers)
    leave(runtime)


def _fail(error: Exception, code: int) -> NoReturn:
    if os.environ.get("DUALTOKEN_TRACEBACK"):
        raise error
    if os.environ.get("RANK", "0") != "0":
        # The main rank usually meets the same error and its line is enough; the launcher then ends this one.
        time.sleep(5)
    line = " ".join(str(error).split())
    sys.stderr.write(f"error: {line}\n")
    sys.stderr.flush()
    os._exit(code)  # the other ranks may be waiting in a collective: no orderly shutdown is possible


if __name__ == "__main__":
    main()

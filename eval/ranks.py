"""Which part of an evaluation a process does, as the launcher that started it says."""

from collections.abc import Mapping

from data_pipeline.pretokenize.command import place_among_workers


def place_among_ranks(environment: Mapping[str, str], local_rank: int = 0) -> tuple[int, int, int]:
    """Return rank, number of ranks and rank on this machine.

    Slurm's batch script has a SLURM_PROCID but is no task of `srun`: alone it is to do everything.
    """
    of_a_step = "SLURM_STEP_NUM_TASKS" in environment
    known = {name: value for name, value in environment.items() if of_a_step or name != "SLURM_PROCID"}
    return place_among_workers(known, local_rank)

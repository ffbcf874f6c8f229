"""Ranks of a job that `srun` or `mpirun` starts, named as `deepspeed` and `torchrun` name them."""

from __future__ import annotations

from collections.abc import MutableMapping

from pretrain.config import ConfigError

# What each starter calls the number of processes, a process's rank, and its rank on its machine. Open MPI and
# Hydra (MPICH, Intel MPI) come first: inside an allocation they start their own helpers with srun. Slurm's
# batch script is no task of srun, though it has a SLURM_PROCID: only a step has SLURM_STEP_NUM_TASKS.
STARTERS = (
    ("OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_LOCAL_RANK"),
    ("PMI_SIZE", "PMI_RANK", "MPI_LOCALRANKID"),
    ("SLURM_STEP_NUM_TASKS", "SLURM_PROCID", "SLURM_LOCALID"),
)


def name_ranks(environment: MutableMapping[str, str]) -> None:
    """Set RANK, WORLD_SIZE and LOCAL_RANK where `srun` or `mpirun` started several processes.

    What `deepspeed` or `torchrun` has set stays. A process that sees one GPU only, as Slurm may arrange, has
    local rank 0: the number of a device of its own.

    Raises:
        ConfigError: the processes are not told where to meet.
    """
    if "RANK" in environment:
        return
    for names in STARTERS:
        if all(name in environment for name in names) and int(environment[names[0]]) > 1:
            break
    else:
        return
    missing = [name for name in ("MASTER_ADDR", "MASTER_PORT") if name not in environment]
    if missing:
        raise ConfigError(
            f"{names[0]}={environment[names[0]]}, but {' and '.join(missing)} not set: expected the name of "
            "the first machine and a free port of it, where the processes meet; export them"
        )
    world_size, rank, local_rank = (environment[name] for name in names)
    sees_one_gpu = environment.get("CUDA_VISIBLE_DEVICES", ",").count(",") == 0
    environment.update(WORLD_SIZE=world_size, RANK=rank, LOCAL_RANK="0" if sees_one_gpu else local_rank)

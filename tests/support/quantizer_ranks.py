"""What the quantizer tests run on each rank; light to import, because every rank does."""

import torch
import torch.distributed as dist

from dualtoken.visual_tokenizer.quantizer import MultiCodebookVQ, ResidualVQ

CODES, WIDTH, DEPTH = 16, 6, 3
STEPS, MICRO_BATCHES = 3, 4


def latents(*shape, seed=0):
    """Normal latents `[*shape, WIDTH]`."""
    return torch.randn(*shape, WIDTH, generator=torch.Generator().manual_seed(seed))


def train(kind):
    """Train on this rank's share of every global batch of four micro-batches.

    Returns the state, the statistics of each update and the number of collectives.
    """
    world, rank = (dist.get_world_size(), dist.get_rank()) if dist.is_initialized() else (1, 0)
    torch.manual_seed(0)
    build = {"rvq": ResidualVQ, "mcq": MultiCodebookVQ}[kind]
    quantizer = build(CODES, WIDTH, DEPTH, restart_threshold=0.5).train()
    collectives, all_reduce, stats = [], dist.all_reduce, []
    dist.all_reduce = lambda *args, **kwargs: collectives.append(1) or all_reduce(*args, **kwargs)
    for step in range(STEPS):
        for micro in range(MICRO_BATCHES // world):
            slot = micro * world + rank
            quantizer.set_candidate_slot(slot, MICRO_BATCHES)
            quantizer(latents(30, seed=100 * step + slot))
        stats.append(quantizer.update())
    dist.all_reduce = all_reduce
    return quantizer.state_dict(), stats, len(collectives)


def train_both_and_fill_one_slot_twice():
    """Return what `train` returns for each quantizer, and the error of a candidate slot filled twice."""
    results = {kind: train(kind) for kind in ("rvq", "mcq")}
    quantizer = ResidualVQ(CODES, WIDTH, DEPTH).train()
    quantizer.set_candidate_slot(0, 2)
    quantizer(latents(8))
    try:
        quantizer.update()
    except RuntimeError as error:
        return results, str(error)
    return results, "no error"

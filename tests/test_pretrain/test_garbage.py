"""Garbage is collected at the same steps on every rank, and nowhere between."""

import gc
from pathlib import Path

import pytest

from pretrain.garbage import garbage_collected_every
from tests.support.distributed import run_function
from tests.test_pretrain.test_trainer import toy_arguments


class Circle:
    """Holds itself, so that only a collection frees it."""

    def __init__(self, freed: list[str]) -> None:
        self.own, self.freed = self, freed

    def __del__(self) -> None:
        self.freed.append("freed")


def make_garbage(freed: list[str]) -> None:
    for _ in range(2000):  # more than Python waits for
        Circle(freed)


def test_garbage_stays_until_a_step_is_due() -> None:
    freed: list[str] = []
    before = gc.get_freeze_count()
    with garbage_collected_every(3) as collect:
        assert gc.get_freeze_count() > before
        make_garbage(freed)
        for step in (1, 2):
            collect(step)
            assert not freed
        collect(3)
        assert len(freed) == 2000
        collect(4)
    assert gc.isenabled() and gc.get_freeze_count() == 0


def test_an_error_leaves_it_to_python_again() -> None:
    with pytest.raises(KeyError), garbage_collected_every(3):
        raise KeyError
    assert gc.isenabled() and gc.get_freeze_count() == 0


def test_zero_leaves_it_to_python() -> None:
    freed: list[str] = []
    with garbage_collected_every(0) as collect:
        make_garbage(freed)
        assert freed
        collect(50)
        assert gc.isenabled()


def steps_of_collections(folder: str) -> list[int]:
    """Run the loop in this process; at how many steps done each collection came."""
    from pretrain.config import job_classes, load_job_config
    from pretrain.runtime import start_runtime
    from pretrain.trainer import Trainer

    config = load_job_config(toy_arguments(Path(folder), "zero3", "steps=5", "garbage_every=2"))
    runtime = start_runtime(config)
    trainer = Trainer(config, runtime, job_classes(config.job)[1](config, runtime))
    steps: list[int] = []

    def note(phase: str, _: dict[str, int]) -> None:
        if phase == "start" and not gc.isenabled():
            steps.append(runtime.step)

    gc.callbacks.append(note)
    try:
        assert trainer.run()
    finally:
        gc.callbacks.remove(note)
    assert gc.isenabled()
    return steps


def test_both_ranks_collect_at_the_same_steps(tmp_path: Path) -> None:
    first, second = run_function(steps_of_collections, str(tmp_path), process_group=False)
    assert first == second == [2, 4]

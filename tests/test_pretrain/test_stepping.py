"""A step that is not finite somewhere: nothing moves anywhere, and the report says what, where and why."""

import json
from pathlib import Path

import pytest
import torch

from tests.support.distributed import run_function
from tests.test_pretrain.test_trainer import figures, toy_arguments, train

LAYERS = ["first.weight", "first.bias", "norm.weight", "norm.bias", "last.weight", "last.bias"]
ENGINES = ["two_engines=true"]
MUON = ["optimizer.name=muon", "gradient_clipping=0"]
CASES = {  # the settings, and what is not finite; optimizers of DeepSpeed differ by level, precision, offload
    "zero1": (ENGINES, ["loss", "gradient", "figure"]),
    "zero2": (ENGINES, ["gradient"]),
    "zero3": (ENGINES, ["loss", "gradient", "figure"]),
    "zero1/bf16": ([*ENGINES, "precision=bf16"], ["gradient", "figure"]),
    "zero3/bf16": ([*ENGINES, "precision=bf16"], ["figure"]),
    "zero3_offload": (ENGINES, ["figure"]),
    "zero2/muon": (MUON, ["gradient"]),
    "zero3/muon": (MUON, ["gradient"]),
}
STEPS = [(case, nan_in) for case, (_, kinds) in CASES.items() for nan_in in kinds]


def state_of(task):
    """Parameters as the model uses them and as they are kept in fp32, and the optimizers' states, copied.

    Without what ZeRO-3 fills partitions up with: DeepSpeed leaves that memory as it found it, NaN at times.
    """
    from pretrain.checkpoints.pieces import own_pieces

    state = {}
    for name, engine in task.engines.items():
        for key, parameter in engine.module.named_parameters():
            state[f"{name}/parameters/{key}"] = parameter.detach().clone()
        state |= {f"{name}/{piece.key}": piece.tensor.clone() for piece in own_pieces(engine)}
    return state


def broken_step(arguments: list[str]):
    """Two sound steps, one broken on the last rank and two sound ones: states around, and what was raised."""
    from pretrain.config import job_classes, load_job_config
    from pretrain.runtime import start_runtime
    from pretrain.stepping import NotFiniteError

    config = load_job_config(arguments)
    runtime = start_runtime(config)
    task = job_classes(config.job)[1](config, runtime)
    batches, states, raised = iter(task.train_loader), [], None
    for step in range(5):
        runtime.step = step
        states.append(state_of(task))
        micro_batches = [next(batches) for _ in range(runtime.micro_steps)]
        try:
            task.train_step(micro_batches)
        except NotFiniteError as error:
            assert step == 2
            raised = (error.losses, error.parameters, error.micro_batches, error.moved)
    before, after, last = states[2], states[3], state_of(task)
    kinds = {key.split("/")[1] for key in before}
    assert {"parameters", "weight", "exp_avg", "exp_avg_sq"} <= kinds, kinds
    changed = [key for key, value in before.items() if not torch.equal(value, after[key])]
    moved_later = sum(not torch.equal(value, last[key]) for key, value in after.items())
    finite = all(value.isfinite().all() for value in last.values() if value.is_floating_point())
    skipped = [engine.skipped_steps for engine in task.engines.values()]
    return {"raised": raised, "changed": changed, "moved": moved_later, "finite": finite, "skipped": skipped}


def all_steps(folder: Path):
    found = {}
    for case, nan_in in STEPS:
        words = [*CASES[case][0], "nan_at_step=2", f"nan_in={nan_in}"]
        found[case, nan_in] = broken_step(toy_arguments(folder / case, case.partition("/")[0], *words))
    skip = ["nan_at_step=2", "nan_in=gradient", "on_nonfinite=skip", *ENGINES]
    found["skipped"] = train(toy_arguments(folder / "skipped", "zero1", *skip))
    stop = ["nan_at_step=2", "nan_in=gradient", *ENGINES]
    found["stopped"] = train(toy_arguments(folder / "stopped", "zero3", *stop))
    return found


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    folder = tmp_path_factory.mktemp("steps")
    return folder, run_function(all_steps, folder, process_group=False)


@pytest.mark.parametrize("case, nan_in", STEPS)
def test_a_broken_step_moves_nothing_on_any_rank(found, case, nan_in):
    for rank in found[1]:
        step = rank[case, nan_in]
        assert step["changed"] == []
        assert step["moved"] > 0 and step["finite"]  # it goes on afterwards
        assert set(step["skipped"]) == {1}


@pytest.mark.parametrize("case, nan_in", STEPS)
def test_what_broke_is_known_on_the_rank_where_it_did(found, case, nan_in):
    sound, broken = [rank[case, nan_in]["raised"] for rank in found[1]]
    engines = ["model"] if "muon" in case else ["model", "second"]
    prefix = "second: " if len(engines) > 1 else ""
    losses = [f"loss/{name}" for name in engines]
    assert sound == ([], [], [], [])
    if nan_in == "gradient":
        assert broken == ([], [prefix + layer for layer in LAYERS], [1], [])
    elif nan_in == "figure":
        assert broken == (losses, [], [], [])
    else:
        assert broken[0] == losses and len(broken[1]) == 2 * len(LAYERS) and broken[2] == [1]


def test_a_stop_names_gradients_rank_and_samples(found):
    folder, (message, of_rank_1) = found[0], [rank["stopped"] for rank in found[1]]
    assert message == of_rank_1
    assert message == (
        "step 3: the gradient of second: first.weight, second: first.bias, second: norm.weight, 3 more is "
        "not finite on rank 1, samples sample44, sample45, sample46, sample47; no parameter was changed; 1 "
        "such step(s) in a row with on_nonfinite=error. Lower optimizer.lr, or look at these samples"
    )
    assert not (folder / "stopped" / "skipped.jsonl").exists()


def test_a_skipped_step_is_written_down(found):
    folder = found[0] / "skipped"
    assert [rank["skipped"] for rank in found[1]] == ["finished"] * 2
    (line,) = (folder / "skipped.jsonl").read_text(encoding="utf-8").splitlines()
    rank = {"rank": 1, "losses": [], "parameters": [f"second: {layer}" for layer in LAYERS]}
    rank |= {"keys": [f"sample{number}" for number in range(44, 48)], "shards": []}
    assert json.loads(line) == {"step": 3, "ranks": [rank]}
    assert [figures(folder)[step].get("skipped_steps") for step in (2, 3, 6)] == [None, 1, 1]

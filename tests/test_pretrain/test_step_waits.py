"""What a training step asks of a GPU: where the host waits for it, what NCCL carries, where tensors are made.

Steps run on the CPU under DeepSpeed on two ranks; operations that would make the host wait are counted at the
function of the project that asked. Each allowed one has its reason here and stands in docs/performance.md.
"""

import ast
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch.distributed as dist

from tests.support.distributed import ROOT, run_function
from tests.support.pretend_cuda import PACKAGES, CountWaits
from tests.support.toy_words import TOY_WORDS
from tests.test_pretrain import test_contrastive
from tests.test_pretrain.test_jobs import codes, folder, mllm_words, tokenizer_run, tokenizer_words  # noqa: F401
from tests.test_pretrain.test_trainer import figures

# Function -> how often it may wait in a step of the test's sizes, and why it has to.
ALLOWED = {
    "NearestCodeSearch.__call__": (8, "which rows fp32 cannot; each depth needs those before"),
    "EMACodebooks._offer_candidates": (8, "on the CPU only: candidates are drawn there"),
    "EMACodebooks.update": (2, "a codebook's figures and its unused codes, once a step"),
    "PackContents.of_batch": (16, "on the CPU only: what a pack holds, before it goes to the device"),
    "DualTokenForCausalLM.checked_codes": (2, "all counts of a pack, and that its codes exist"),
    "DualTokenForCausalLM.forward": (2, "transformers looks whether positions restart"),
    "loop_over_documents": (4, "on the CPU only: CUDA has one kernel for a pack"),
    "take_step": (99, "DeepSpeed: overflow, norms, skipped steps"),
    "Averages.reduce": (1, "a step's figures, and whether all of it is finite"),
    "Runtime.smallest": (1, "how many pairs every rank has, in the contrastive phase"),
}


def step_of(arguments: list[str]) -> tuple[dict[str, int], set[str]]:
    """Waits of a job's third step by place, and the types of what its collectives carry."""
    from pretrain.config import job_classes, load_job_config
    from pretrain.runtime import start_runtime

    config = load_job_config(arguments)
    runtime = start_runtime(config)
    task = job_classes(config.job)[1](config, runtime)
    batches, sent = iter(task.train_loader), set()
    own = dist.all_reduce

    def all_reduce(tensor, *args, **kwargs):
        sent.add(str(tensor.dtype))
        return own(tensor, *args, **kwargs)

    for step in range(3):
        micro_batches = [next(batches) for _ in range(runtime.micro_steps)]
        counter = CountWaits()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(dist, "all_reduce", all_reduce)
            if step < 2:
                task.train_step(micro_batches)
            else:
                with counter:
                    task.train_step(micro_batches)
        runtime.step += 1
    return {place.partition(":")[2]: count for place, count in counter.waits.items()}, sent


def steps_and_loop(runs: list[list[str]], toy: Path):
    """Of each job `step_of`, and `loop_between_two_logs`, in the same processes."""
    return [step_of(words) for words in runs], loop_between_two_logs(toy)


@pytest.fixture(scope="module")
def of_ranks(folder, codes):  # noqa: F811
    tokenizer = [*tokenizer_words(folder, "waits", 2), "losses.gan_start_step=0", "losses.contrastive=0.1"]
    images = [f"data.path={folder / 'images'}", f"text_tokenizer={folder / 'siglip'}"]
    contrastive = [*test_contrastive.words(folder, "waits"), *images, "validation_data=null"]
    runs = [tokenizer, mllm_words(folder, "waits", 2), contrastive]
    runs = [[*words, "precision=bf16"] for words in runs]
    return run_function(steps_and_loop, runs, folder / "toy", process_group=False)


@pytest.fixture(scope="module")
def found(of_ranks):
    """By job: waits by place, the most of any rank, and the types of what all collectives carry."""
    jobs = {}
    by_job = zip(*(of_jobs for of_jobs, _ in of_ranks), strict=True)
    for name, ranks in zip(("tokenizer", "mllm", "contrastive"), by_job, strict=True):
        most = Counter()
        for waits, _ in ranks:
            most |= Counter(waits)
        jobs[name] = dict(most), set().union(*(sent for _, sent in ranks))
    return jobs


@pytest.mark.parametrize("job", ["tokenizer", "mllm", "contrastive"])
def test_a_step_waits_only_where_it_may(found, job):
    waits = found[job][0]
    too_many = {place: n for place, n in waits.items() if n > ALLOWED.get(place, (0,))[0]}
    assert not too_many, f"waits for the device that are not on the list: {too_many}"


def test_the_list_of_waits_is_true(found):
    """A place that no longer waits leaves the list."""
    seen = {place for waits, _ in found.values() for place in waits}
    assert seen == set(ALLOWED)
    text = (ROOT / "docs" / "performance.md").read_text(encoding="utf-8")
    assert [name for name in ALLOWED if f"`{name}`" not in text] == []


def test_collectives_carry_what_nccl_takes(found):
    for _, sent in found.values():
        assert sent and sent <= {f"torch.{name}" for name in ("float32", "float64", "int64", "uint8")}


def loop_between_two_logs(run: Path) -> tuple[dict[str, int], list[int]]:
    """Waits of the whole loop from step 4 to step 5 by place, with no log line between; sizes it reduces."""
    from pretrain.config import job_classes, load_job_config
    from pretrain.runtime import start_runtime
    from pretrain.trainer import Trainer

    config = load_job_config([*TOY_WORDS, f"run_dir={run}", "log_every=3", "two_engines=true"])
    runtime = start_runtime(config)
    task = job_classes(config.job)[1](config, runtime)
    counter, train_step, own, sizes = CountWaits(), task.train_step, dist.all_reduce, []

    def all_reduce(tensor, *args, **kwargs):
        if sys._getframe(1).f_code.co_filename.startswith(PACKAGES):
            sizes.append(tensor.numel())
        return own(tensor, *args, **kwargs)

    def counted_step(micro_batches):
        if runtime.step == 3:  # step 4: the third has been logged
            counter.__enter__()
            patch.setattr(dist, "all_reduce", all_reduce)
        if runtime.step == 4:
            counter.__exit__(None, None, None)
            patch.undo()
        return train_step(micro_batches)

    task.train_step = counted_step
    patch = pytest.MonkeyPatch()
    assert Trainer(config, runtime, task).run() and sorted(figures(run)) == [3, 6]
    return {place.partition(":")[2]: count for place, count in counter.waits.items()}, sizes


def test_the_loop_itself_waits_for_nothing_between_two_log_lines(of_ranks):
    """Its flags travel with the figures, which the finite check needs before the optimizers move."""
    for _, (waits, sizes) in of_ranks:
        assert waits.pop("take_step") > 0  # DeepSpeed
        assert waits == {"Averages.reduce": 1} and len(sizes) == 1


# Functions that make a tensor out of nothing, on the CPU unless they are told where.
FACTORIES = set("zeros ones empty full arange tensor rand randn randint randperm eye".split())
# Functions that make tensors on the CPU on purpose. Modules' own, made in `__init__`, move with them.
ON_THE_CPU = {
    "laid out there, moved as a whole": {"pack_documents", "build", "append", "state_from_released"},
    "drawn there, for all devices to get the same": {
        *("_offer_candidates", "_restart", "row_noise", "stream", "augment", "drop_patches"),
    },
    "figures of features that were gathered there": {"recall_at_1", "layer_similarity"},
    "sent on in one copy that nobody waits for": {"on_device"},
}


def made_without_device(path: Path):
    """Function and line of each call like `torch.zeros(...)` that says nothing of a device."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    owner = {}
    for function in ast.walk(tree):
        if isinstance(function, ast.FunctionDef):
            owner |= {node: function.name for node in ast.walk(function)}  # the innermost comes last
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            is_factory = ast.unparse(node.func.value) == "torch" and node.func.attr in FACTORIES
            if is_factory and "device" not in {keyword.arg for keyword in node.keywords}:
                yield owner.get(node, "<module>"), node.lineno


def test_no_step_makes_a_tensor_without_saying_where():
    allowed = set().union(*ON_THE_CPU.values()) | {"__init__"}
    paths = [path for name in ("dualtoken", "pretrain") for path in sorted((ROOT / name).rglob("*.py"))]
    made = {path: list(made_without_device(path)) for path in paths}
    wrong = [
        f"{path.relative_to(ROOT)}:{line} in {function}"
        for path, calls in made.items()
        for function, line in calls
        if function not in allowed
    ]
    assert not wrong, f"tensors that would be made on the CPU; give them device=: {wrong}"
    unused = allowed - {function for calls in made.values() for function, _ in calls}
    assert not unused

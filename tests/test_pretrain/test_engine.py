"""DeepSpeed settings from JSON and recipe, schedules, and what engines do on two ranks."""

import json
from pathlib import Path

import pytest
import torch
from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
from torch import nn

from pretrain.budget import ParameterCount, state_bytes
from pretrain.config import ConfigError, JobConfig, OptimizerConfig
from pretrain.engine import deepspeed_settings
from pretrain.optim import (
    LearningRateSchedule,
    build_optimizer,
    freeze_parameters,
    learning_rate_factor,
    parameter_groups,
)
from pretrain.runtime import Runtime, choose_precision
from tests.support.distributed import run_function


def job(deepspeed: str = "zero1.json", precision: str = "auto", batch: int = 8, **changes) -> JobConfig:
    settings = {"steps": 10, "micro_batch_size": 2, "gradient_clipping": 0.5, **changes}
    return JobConfig(
        "toy", "unused", global_batch_size=batch, deepspeed=deepspeed, precision=precision, **settings
    )


def runtime(dtype: torch.dtype = torch.float32) -> Runtime:
    return Runtime(0, 0, 2, torch.device("cpu"), dtype, 0, 2, Path("unused"))


def write(folder: Path, **settings) -> str:
    path = folder / "deepspeed.json"
    path.write_text(json.dumps({"zero_optimization": {"stage": 1}, **settings}), encoding="utf-8")
    return str(path)


@pytest.mark.parametrize(
    "name", ["zero1.json", "zero2.json", "zero3.json", "zero3_offload.json", "zero3_hpz.json"]
)
def test_recipe_fills_the_json(name):
    settings = deepspeed_settings(job(name), runtime(torch.bfloat16))
    assert settings["train_batch_size"] == 8
    assert settings["train_micro_batch_size_per_gpu"] == 2
    assert settings["gradient_accumulation_steps"] == 2
    assert settings["gradient_clipping"] == 0.5
    assert settings["bf16"]["enabled"] is True
    assert settings["zero_optimization"]["stage"] == int(name[4])
    assert deepspeed_settings(job(name), runtime())["bf16"]["enabled"] is False
    zero = DeepSpeedZeroConfig(**settings["zero_optimization"])  # refuses what it does not know
    assert zero.zero_hpz_partition_size == (8 if name == "zero3_hpz.json" else 1)
    assert not (zero.zero_quantized_weights or zero.zero_quantized_gradients)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"gradient_clipping": 1.0}, 'sets gradient_clipping=1.0 and the recipe sets 0.5: write "auto"'),
        ({"train_batch_size": 8}, "sets train_batch_size=8 and the recipe sets 8"),
        ({"optimizer": {"type": "Adam"}}, 'sets "optimizer", which the recipe owns'),
        ({"fp16": {"enabled": True}}, "enables fp16; expected bf16 or fp32"),
        ({"bf16": {"enabled": True}}, "sets bf16.enabled=True, but this run is in torch.float32"),
        ({"aio": {"block_size": "auto"}}, '"auto" is not filled for aio.block_size'),
        ({"zero_optimization": {"stage": 0}}, "expected zero_optimization.stage 1, 2 or 3"),
    ],
)
def test_conflicts_between_json_and_recipe(tmp_path, settings, message):
    with pytest.raises(ConfigError) as caught:
        deepspeed_settings(job(write(tmp_path, **settings)), runtime())
    assert message in str(caught.value) and "deepspeed.json" in str(caught.value)


def test_ranks_that_are_no_whole_nodes_are_refused():
    here = runtime()
    for here.world_size in (1, 4, 8, 16):
        deepspeed_settings(job("zero3_hpz.json"), here)
    here.world_size = 12
    with pytest.raises(ConfigError, match="hpz_partition_size=8 on 12 ranks: expected a multiple of it"):
        deepspeed_settings(job("zero3_hpz.json"), here)


def test_missing_and_broken_json(tmp_path):
    with pytest.raises(ConfigError, match="deepspeed=zero4: there is no such file; ds_configs has zero1"):
        deepspeed_settings(job("zero4"), runtime())
    (tmp_path / "broken.json").write_text("{", encoding="utf-8")
    with pytest.raises(ConfigError, match="is not valid JSON"):
        deepspeed_settings(job(str(tmp_path / "broken.json")), runtime())


def test_precision(tmp_path, monkeypatch):
    cpu = torch.device("cpu")
    monkeypatch.delenv("DUALTOKEN_NATIVE_BF16", raising=False)
    assert choose_precision(job(precision="bf16"), cpu) == torch.bfloat16
    native = {"avx512_bf16": True}
    for features, expected in [
        (native, torch.bfloat16),
        ({**native, "amx_bf16": True}, torch.float32),
        ({"avx2": True}, torch.float32),
    ]:
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda features=features: features)
        assert choose_precision(job(), cpu) == expected
    for has_it, expected in [(True, torch.bfloat16), (False, torch.float32)]:
        # Emulation, as on GPUs before Ampere, does not count.
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation, own=has_it: own)
        assert choose_precision(job(), torch.device("cuda")) == expected
    for answer, expected in (("1", torch.bfloat16), ("0", torch.float32)):
        monkeypatch.setenv("DUALTOKEN_NATIVE_BF16", answer)
        assert choose_precision(job(), cpu) == expected
    monkeypatch.setenv("DUALTOKEN_NATIVE_BF16", "yes")
    with pytest.raises(ConfigError, match="DUALTOKEN_NATIVE_BF16=yes: expected 0, 1, or not set"):
        choose_precision(job(), cpu)
    assert choose_precision(job(precision="fp32"), cpu) == torch.float32  # it answers auto alone
    monkeypatch.delenv("DUALTOKEN_NATIVE_BF16")
    in_json = write(tmp_path, bf16={"enabled": True})
    assert choose_precision(job(in_json), cpu) == torch.bfloat16
    with pytest.raises(ConfigError, match=r"sets bf16.enabled=True and the recipe precision=fp32"):
        choose_precision(job(in_json, precision="fp32"), cpu)


def test_parameter_groups():
    model = nn.Sequential(nn.Linear(3, 2), nn.LayerNorm(2), nn.Linear(2, 1))
    freeze_parameters(model, ["2.*"])
    with pytest.raises(ConfigError, match="'3.*' matches no parameter"):
        freeze_parameters(model, ["3.*"])
    groups = parameter_groups(model, OptimizerConfig(weight_decay=0.1))
    assert [group["weight_decay"] for group in groups] == [0.1, 0.0]
    assert [len(group["params"]) for group in groups] == [1, 3]
    scaled = parameter_groups(model, OptimizerConfig(weight_decay=0.1, lr_scales={"0.*": 0.5, "*": 2.0}))
    # Matrix and bias of the first layer, then the norm.
    settings = [(group["lr_scale"], group["weight_decay"]) for group in scaled]
    assert settings == [(0.5, 0.1), (0.5, 0.0), (2.0, 0.0)]
    assert [len(group["params"]) for group in scaled] == [1, 1, 2]
    of_frozen = parameter_groups(model, OptimizerConfig(lr_scales={"2.*": 0.5}))  # a recipe's, frozen since
    assert {group["lr_scale"] for group in of_frozen} == {1.0}
    with pytest.raises(ConfigError, match=r"no parameter's name fits 3\.\*"):
        parameter_groups(model, OptimizerConfig(lr_scales={"3.*": 1.0}))
    model.requires_grad_(False)
    with pytest.raises(ConfigError, match="Sequential has no trainable parameter"):
        parameter_groups(model, OptimizerConfig())


def test_muon_takes_matrices_and_kernels():
    model = nn.ModuleDict({"up": nn.Linear(3, 2), "kernel": nn.Conv2d(3, 2, 3), "lm_head": nn.Linear(2, 5)})
    config = OptimizerConfig(name="muon", lr=0.1, muon_lr=0.5, weight_decay=0.2, warmup_steps=2)
    optimizer = build_optimizer(model, config)
    taken = {
        name: group["use_muon"]
        for group in optimizer.param_groups
        for name, parameter in model.named_parameters()
        if any(parameter is other for other in group["params"])
    }
    assert {name for name, use_muon in taken.items() if use_muon} == {"up.weight", "kernel.weight"}
    assert len(taken) == 6
    LearningRateSchedule(optimizer, config, 10)
    rates = {group["use_muon"]: group["lr"] for group in optimizer.param_groups}
    assert rates == {True: 0.25, False: 0.05}
    with pytest.raises(ConfigError, match="gradient_clipping=1.0 with optimizer.name=muon"):
        job(optimizer=config, gradient_clipping=1.0)
    with pytest.raises(ConfigError, match="muon_momentum 1.0"):
        OptimizerConfig(name="muon", muon_momentum=1.0)


def test_learning_rate():
    config = OptimizerConfig(warmup_steps=4, min_lr_ratio=0.1)
    factors = [learning_rate_factor(step, config, 24) for step in range(25)]
    assert factors[:5] == [0.25, 0.5, 0.75, 1.0, 1.0]
    assert factors[14] == pytest.approx(0.55)
    assert factors[24] == pytest.approx(0.1)
    assert all(a >= b for a, b in zip(factors[4:], factors[5:], strict=False))
    by_share = OptimizerConfig(warmup_ratio=1 / 6, min_lr_ratio=0.1)
    assert [learning_rate_factor(step, by_share, 24) for step in range(25)] == factors
    constant = OptimizerConfig(schedule="constant", warmup_steps=2)
    assert [learning_rate_factor(step, constant, 5) for step in range(4)] == [0.5, 1.0, 1.0, 1.0]


def test_changed_settings_win_over_saved_ones():
    model = nn.Linear(2, 2)
    old = build_optimizer(model, OptimizerConfig(lr=1.0, weight_decay=0.5))
    schedule = LearningRateSchedule(old, OptimizerConfig(lr=1.0, weight_decay=0.5), 10)
    for _ in range(5):
        schedule.step()
    config = OptimizerConfig(lr=0.1, betas=[0.5, 0.6], weight_decay=0.2, lr_scales={"bias": 0.5})
    new = build_optimizer(model, config)
    resumed = LearningRateSchedule(new, config, 10)
    resumed.load_state_dict(schedule.state_dict())
    new.load_state_dict(old.state_dict())
    assert new.param_groups[0]["lr"] == pytest.approx(0.5)
    resumed.apply()
    assert resumed.get_lr() == pytest.approx([0.05, 0.025])
    assert [group["betas"] for group in new.param_groups] == [(0.5, 0.6)] * 2
    assert [group["weight_decay"] for group in new.param_groups] == [0.2, 0.0]


class Painter(nn.Module):
    """Matrices, kernels of both sizes, and matrices in a stack, as the two models have them."""

    def __init__(self) -> None:
        super().__init__()
        self.project = nn.Linear(12, 48)
        self.kernel = nn.Conv2d(3, 8, 3, padding=1)
        self.point_kernel = nn.Conv2d(8, 16, 1)
        self.stack = nn.Parameter(0.1 * torch.randn(2, 16, 16))
        self.lm_head = nn.Linear(16, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = self.kernel(torch.tanh(self.project(x)).view(-1, 3, 4, 4))
        hidden = torch.tanh(self.point_kernel(hidden)).mean(dim=(2, 3))
        for matrix in self.stack:
            hidden = hidden + torch.tanh(hidden @ matrix.T)
        return self.lm_head(hidden)


MUON = OptimizerConfig(name="muon", muon_lr=0.05, lr=1e-2, warmup_steps=3, weight_decay=0.1)
MUON_STEPS = 6


def painter_batch(step: int) -> tuple[torch.Tensor, torch.Tensor]:
    x = torch.randn(8, 12, generator=torch.Generator().manual_seed(step))
    return x, x.square().sum(1, keepdim=True).sin()


def orthogonalized(gradient: torch.Tensor) -> torch.Tensor:
    """Five steps of the quintic Newton-Schulz iteration, as Jordan's text has them."""
    x = gradient / gradient.norm()
    for _ in range(5):
        a = x @ x.T
        x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
    return x


def plain_muon() -> list[float]:
    """Losses of Muon and AdamW written out, without DeepSpeed, on the whole batch."""
    torch.manual_seed(0)
    model = Painter()
    matrices = {
        name: p for name, p in model.named_parameters() if p.ndim > 1 and not name.startswith("lm_head")
    }
    momenta = {name: torch.zeros_like(p) for name, p in matrices.items()}
    rest = [p for name, p in model.named_parameters() if name not in matrices]
    decayed = [model.lm_head.weight]
    adamw = torch.optim.AdamW(
        [
            {"params": decayed, "weight_decay": 0.1},
            {"params": [p for p in rest if p.ndim == 1], "weight_decay": 0.0},
        ],
        betas=tuple(MUON.betas),
    )
    losses = []
    for step in range(MUON_STEPS):
        factor = learning_rate_factor(step, MUON, 30)
        for group in adamw.param_groups:
            group["lr"] = MUON.lr * factor
        x, y = painter_batch(step)
        loss = (model(x) - y).square().mean()
        model.zero_grad()
        loss.backward()
        adamw.step()
        with torch.no_grad():
            for name, p in matrices.items():
                momenta[name].lerp_(p.grad, 0.05)
                update = p.grad.lerp(momenta[name], 0.95)
                parts = update if name == "stack" else update.flatten(1)[None]
                rows, columns = parts.shape[1:]
                parts = torch.stack([orthogonalized(part) for part in parts]) * max(1, rows / columns) ** 0.5
                p.mul_(1 - MUON.muon_lr * factor * 0.1).sub_(MUON.muon_lr * factor * parts.view(p.shape))
        losses.append(loss.item())
    return losses


def muon_losses(here, deepspeed_file: str) -> list[float]:
    """Losses of the same training in an engine, each rank with its half of the batch."""
    from pretrain.engine import build_engine
    from pretrain.metrics import Averages
    from pretrain.stepping import backward, take_step

    torch.manual_seed(0)
    config = job(deepspeed_file, optimizer=MUON, gradient_clipping=0.0, steps=30, micro_batch_size=4)
    engine = build_engine(Painter(), config, here)
    losses = []
    for step in range(MUON_STEPS):
        x, y = (part.chunk(2)[here.rank] for part in painter_batch(step))
        loss = (engine(x.to(here.dtype)).float() - y).square().mean()
        backward(engine, loss)
        take_step({"model": engine}, Averages(here.device))
        losses.append(loss.item())
    return losses


def hpz_losses(folder: Path) -> dict:
    """The same training under ZeRO-3, and with parameters held in groups of two ranks besides."""
    from transformers import AutoModelForCausalLM, Qwen2Config

    from pretrain.engine import build_engine, sharded_construction
    from pretrain.metrics import Averages
    from pretrain.runtime import start_runtime
    from pretrain.stepping import backward, take_step

    here = start_runtime(job(precision="fp32"))
    found = {}
    for ranks in (1, 2):
        zero = {"stage": 3, "stage3_param_persistence_threshold": 0, "zero_hpz_partition_size": ranks}
        own = folder / f"{here.rank}_{ranks}"
        own.mkdir()
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(3, 8), nn.GELU(), nn.Linear(8, 5))
        config = job(write(own, zero_optimization=zero, zero_allow_untested_optimizer=True))
        engine = build_engine(model, config, here)
        generator = torch.Generator().manual_seed(here.rank)
        losses = []
        for _ in range(4):
            loss = engine(torch.randn(2, 3, generator=generator)).square().mean()
            backward(engine, loss)
            held = [p.ds_secondary_tensor for p in model.parameters()]
            take_step({"model": engine}, Averages(here.device))
            losses.append(loss.item())
        found[ranks] = losses, [None if second is None else second.numel() for second in held]
    small = Qwen2Config(hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1)
    with sharded_construction(config, here):  # a base model, and what is built around it
        models = [AutoModelForCausalLM.from_config(small) for _ in range(2)]
    groups = {p.ds_zero_param_process_group for model in models for p in model.parameters()}
    found["groups"] = groups == {next(model.parameters()).ds_zero_param_process_group}
    return found


def test_a_second_partition_within_nodes_changes_no_loss(tmp_path):
    for found in run_function(hpz_losses, tmp_path, world_size=4, process_group=False):
        (losses, no_second), (same_losses, second) = found[1], found[2]
        assert no_second == [None] * 4
        assert second == [12, 4, 20, 4]  # halves a rank, not quarters, of parameters filled up to fours
        assert same_losses == losses and losses[-1] != losses[0]
        assert found["groups"]
        plans = [state_bytes(3, 4, ParameterCount(80, 80), 4, {"zero_hpz_partition_size": n}) for n in (1, 2)]
        assert plans[1].parameters - plans[0].parameters == 4 * sum(second)


def engines_on_two_ranks(folder: Path) -> dict:
    """Everything that needs two processes, in one pair of them."""
    from deepspeed.accelerator import get_accelerator
    from transformers import AutoModelForCausalLM, Qwen2Config

    from pretrain.engine import build_engine, sharded_construction
    from pretrain.export import full_state_dict
    from pretrain.metrics import Averages
    from pretrain.runtime import start_runtime

    found: dict = {}
    here = start_runtime(job())
    rank = here.rank
    found["any_rank"] = [here.any_rank(rank == 1), here.any_rank(False)]

    averages = Averages(here.device)
    averages.add("loss", 6.0 * rank, 1 + 2 * rank)
    averages.add("loss", torch.tensor(1.0), torch.tensor(1))
    averages.add("never", 0.0, 0)
    found["averages"] = averages.reduce()
    averages.add(f"only_rank_{rank}", 1.0)
    try:
        averages.reduce()
    except RuntimeError as error:
        found["different_names"] = str(error)

    small = {"stage": 3, "stage3_param_persistence_threshold": 0}
    sharded = job(write(folder / str(rank), zero_optimization=small))
    llm_config = Qwen2Config(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2
    )
    with sharded_construction(sharded, here):
        llm = AutoModelForCausalLM.from_config(llm_config)
    weight = llm.model.layers[0].mlp.up_proj.weight
    found["sharded_shape"] = (tuple(weight.shape), tuple(weight.ds_shape))
    state = full_state_dict(build_engine(llm, sharded, here))
    found["sharded_state"] = {name: value.numpy() for name, value in state.items()}
    with sharded_construction(job(), here):
        found["whole_shape"] = tuple(nn.Linear(2, 3).weight.shape)

    for dtype in (torch.float32, torch.bfloat16):
        here.dtype = dtype
        for level in ("zero1.json", "zero2.json", sharded.deepspeed):
            torch.manual_seed(0)
            model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 4))
            model[0].requires_grad_(False)
            reference = {name: value.clone() for name, value in model.state_dict().items()}
            state = full_state_dict(build_engine(model, job(level), here))
            if rank == 0:
                for name, value in reference.items():
                    # Trained ones from their fp32 masters (made from bf16 values), frozen ones as they are.
                    value = value.to(dtype) if value.is_floating_point() and "running" not in name else value
                    assert torch.equal(state[name], value.to(state[name].dtype)), (level, dtype, name)
                assert state["2.weight"].dtype == torch.float32
                assert state.keys() == reference.keys()
            else:
                assert state == {}

    here.dtype = torch.float32
    here.micro_steps = 1
    in_fp32 = {"data_types": {"grad_accum_dtype": "fp32"}, "communication_data_type": "fp32"}
    sharded_muon = write(folder / str(rank), zero_optimization=small | {"reduce_scatter": "auto"}, **in_fp32)
    levels = ("zero1.json", "zero2.json", sharded_muon)
    # A processor that multiplies in fp16 must not make a run in fp32 another one. First, since DeepSpeed asks
    # while it compiles.
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(get_accelerator(), "is_fp16_supported", lambda: True)
        found["muon"] = {"fp16 processor": muon_losses(here, "zero2.json")}
    torch.compiler.reset()
    found["muon"] |= {level: muon_losses(here, level) for level in levels}
    here.dtype = torch.bfloat16
    found["muon_bf16"] = {level: muon_losses(here, level) for level in levels[1:]}
    try:
        muon_losses(here, "zero1.json")
    except ConfigError as error:
        found["muon_bf16_zero1"] = str(error)
    here.dtype = torch.float32
    try:
        wrong = write(folder / str(rank), zero_optimization={"stage": 1, "bucket": 3})
        build_engine(nn.Linear(2, 2), job(wrong), here)
    except ConfigError as error:
        found["unknown_zero_key"] = str(error)
    return found


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory) -> list[dict]:
    folder = tmp_path_factory.mktemp("engines")
    for rank in range(2):
        (folder / str(rank)).mkdir()
    return run_function(engines_on_two_ranks, folder, process_group=False)


def test_averages_over_ranks(two_ranks):
    for found in two_ranks:
        assert found["any_rank"] == [True, False]
        # Rank 0 adds 0 / 1 and 1 / 1, rank 1 adds 6 / 3 and 1 / 1.
        assert found["averages"]["loss"] == pytest.approx(8 / 6)
        assert found["averages"]["never"] != found["averages"]["never"]
        assert "ranks report different figures" in found["different_names"]


def test_sharded_construction_keeps_initialisation(two_ranks):
    for found in two_ranks:
        assert found["sharded_shape"] == ((0,), (48, 32))
        assert found["whole_shape"] == (3, 2)
    state = two_ranks[0]["sharded_state"]
    assert two_ranks[1]["sharded_state"] == {}
    weight = state["model.layers.0.mlp.up_proj.weight"]
    assert weight.shape == (48, 32)
    assert 0.015 < weight.std() < 0.025  # transformers' 0.02, not torch's 0.1
    assert (state["model.norm.weight"] == 1).all()


def test_muon_equals_the_formula_under_every_zero_level(two_ranks):
    expected = plain_muon()
    assert expected[-1] != pytest.approx(expected[0], rel=0.05)  # it moves
    for losses in zip(*(found["muon"].values() for found in two_ranks), strict=True):
        over_ranks = [sum(step) / 2 for step in zip(*losses, strict=True)]
        assert over_ranks == pytest.approx(expected, rel=2e-4)


def test_muon_in_fp32_does_not_ask_the_processor(two_ranks):
    for found in two_ranks:
        assert found["muon"]["fp16 processor"] == found["muon"]["zero2.json"]


def test_muon_in_bf16_is_close_to_the_formula(two_ranks):
    expected = plain_muon()
    for losses in zip(*(found["muon_bf16"].values() for found in two_ranks), strict=True):
        over_ranks = [sum(step) / 2 for step in zip(*losses, strict=True)]
        assert over_ranks == pytest.approx(expected, rel=0.03)
    message = two_ranks[0]["muon_bf16_zero1"]
    assert "stack has 3 dimensions; take zero2.json or zero3.json" in message and "\n" not in message


def test_unknown_key_in_the_json(two_ranks):
    message = two_ranks[0]["unknown_zero_key"]
    assert "deepspeed.json" in message and "bucket" in message and "\n" not in message

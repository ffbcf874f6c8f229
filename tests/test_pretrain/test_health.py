"""Runs that go wrong, as real processes: a rank dies, raises or hangs, a data worker stops; who says so."""

import json
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from launchers.processes import deepspeed_command, environment, free_port
from pretrain.config import ConfigError, HealthConfig, load_job_config
from pretrain.heartbeat import Heartbeat, in_words, read_heartbeat, state_of
from pretrain.lost_ranks import Peer
from pretrain.spikes import LOGS_UNTIL_DEAD, Warnings
from pretrain.watchdog import Watchdog
from tests.support.command import call
from tests.support.distributed import ROOT, Ranks
from tests.test_pretrain.test_contrastive import write_pictures
from tests.test_pretrain.test_trainer import TOY

SLOW = ["steps=10000", "sleep_per_step=0.05", "resume=never"]


def words(folder: Path, *more: str) -> list[str]:
    return [*TOY, *SLOW, f"run_dir={folder}", *more]


def until(condition, what: str, seconds: float = 120.0) -> float:
    """Wait until something holds; how long it took."""
    began = time.monotonic()
    while not condition():
        assert time.monotonic() - began < seconds, what
        time.sleep(0.05)
    return time.monotonic() - began


def has_step(folder: Path, step: int):
    path = folder / "metrics.jsonl"
    return lambda: path.exists() and f'"step": {step},' in path.read_text(encoding="utf-8")


def all_ended(ranks: Ranks):
    return lambda: all(process.poll() is not None for process in ranks.processes)


def test_a_rank_that_is_killed_ends_the_others(tmp_path, capsys):
    with Ranks("pretrain.train", words(tmp_path)) as ranks:
        until(has_step(tmp_path, 3), "no third step")
        assert state_of(read_heartbeat(tmp_path), time.time()) == "running"
        victim = ranks.processes[1]
        victim.send_signal(signal.SIGKILL)
        seconds = until(all_ended(ranks), "rank 0 goes on waiting", 30)
        assert [process.returncode for process in ranks.processes] == [1, -signal.SIGKILL]
        output = ranks.output_of(0)
    assert seconds < 15
    line = (
        f"lost rank 1 (process {victim.pid}), which has ended; see the first traceback above, if it left one"
    )
    assert line in output and output.count("error: ") == 1 and "Traceback" not in output
    code, status, _ = call(["status", tmp_path], capsys)
    assert code == 1 and status.startswith("failed at step ")


def test_a_rank_that_raises_shows_its_traceback_and_ends_the_job(tmp_path):
    command = deepspeed_command("pretrain.train", words(tmp_path, "raise_at_step=3"), 2)
    command = [
        sys.executable,
        "-m",
        "deepspeed.launcher.runner",
        "--master_port",
        str(free_port()),
        *command[1:],
    ]
    began = time.monotonic()
    done = subprocess.run(
        command, cwd=ROOT, env=environment(2), capture_output=True, text=True, timeout=120, encoding="utf-8"
    )
    ended = time.time()
    assert done.returncode == 1
    assert ended - read_heartbeat(tmp_path).time < 15 and time.monotonic() - began < 120
    # The cause stands first, in full, and what the other rank has to say is one line.
    cause, lost = (
        done.stderr.index("rank 1: after step 3:\nTraceback"),
        done.stderr.index("error: rank 0: after step 3"),
    )
    assert cause < lost
    assert "KeyError: 'nobody expects this'" in done.stderr[cause:lost]
    assert done.stderr.count("Traceback (most recent call last)") == 1
    assert "lost rank 1" in done.stderr[lost:]


def test_a_rank_that_hangs_is_given_up(tmp_path):
    limits = ["health.collective_timeout_seconds=4", "health.data_limit_seconds=3"]
    with Ranks("pretrain.train", words(tmp_path, "hang_at_step=5", *limits)) as ranks:
        until(has_step(tmp_path, 5), "no fifth step")
        time.sleep(1)
        # Nothing is heard while it hangs; the processes are there.
        beat = read_heartbeat(tmp_path)
        assert state_of(beat, time.time()) == "running" and state_of(beat, beat.time + 601) == "silent"
        assert re.match(
            r"silent: training at step \d/10000, .*last sign 12 min ago", in_words(beat, beat.time + 700)
        )
        seconds = until(all_ended(ranks), "the ranks go on waiting", 60)
        assert [process.returncode for process in ranks.processes] == [1, 1]
        first, second = ranks.output_of(0), ranks.output_of(1)
    assert 2 < seconds < 20
    assert "warning: rank 0 has been in step 6 for 2 s; at " in first and "stepping.py" in first
    assert "error: rank 0: after step 5: another rank did not come to a collective in time" in first
    # The one that hangs says where.
    assert "warning: rank 1 has been in step 6 for 2 s; at " in second and "toy_task.py" in second
    assert "error: rank 1: step 6 took longer than the other ranks wait" in second


def test_a_data_worker_that_stops_is_told_and_one_that_dies_ends_the_job(tmp_path):
    write_pictures(tmp_path / "pictures", 33)
    more = [f"data_path={tmp_path / 'pictures'}", "health.data_warning_seconds=1"]
    with Ranks("pretrain.train", words(tmp_path / "run", *more), world_size=1) as ranks:
        until(has_step(tmp_path / "run", 3), "no third step")
        (worker,) = psutil.Process(ranks.processes[0].pid).children()
        worker.suspend()
        stopped = f"data workers: pid {worker.pid} stopped, "
        until(lambda: stopped in ranks.output_of(0), "nothing is said of a worker that stopped", 20)
        line = next(line for line in ranks.output_of(0).splitlines() if stopped in line)
        assert (
            line.startswith("warning: rank 0 has been waiting for micro-batch ")
            and ", after sample 00" in line
        )
        worker.kill()
        until(all_ended(ranks), "nothing is said of a worker that died", 20)
        output = ranks.output_of(0)
        assert ranks.processes[0].returncode == 1
    error = output.splitlines()[-1]
    assert error.startswith("error: rank 0, after step ")
    # Either torch's signal handler or its look at the processes comes first.
    assert re.search(
        rf"DataLoader worker \(pid(\(s\))? {worker.pid}\) (is killed by|exited unexpectedly)", error
    )
    assert "the last sample was 00" in error and "Traceback" not in output
    assert read_heartbeat(tmp_path / "run").phase == "failed"


def test_a_signal_to_all_processes_of_a_job_ends_no_reader_before_the_checkpoint(tmp_path):
    """As torchrun, DeepSpeed's launcher and on_hosts.sh pass it on."""
    write_pictures(tmp_path / "pictures", 33)
    more = [f"data_path={tmp_path / 'pictures'}", "resume=auto"]
    with Ranks("pretrain.train", words(tmp_path / "run", *more), world_size=1) as ranks:
        until(has_step(tmp_path / "run", 3), "no third step")
        trainer = psutil.Process(ranks.processes[0].pid)
        (reader,) = trainer.children()
        reader.terminate()
        trainer.terminate()
        until(all_ended(ranks), "the trainer goes on", 60)
        output = ranks.output_of(0)
        assert ranks.processes[0].returncode == 0, output
        assert "stopped by SIGTERM" in output and (tmp_path / "run" / "checkpoints" / "latest").exists()
    # Where the first process of a container waits for nobody, what has ended stays a zombie.
    until(Peer(0, socket.gethostname(), reader.pid).is_gone, "the reader goes on", 20)


def test_the_watchdog_ends_what_waits_too_long(capfd):
    ended = []
    watchdog = Watchdog(3, end=lambda: ended.append(time.monotonic()))
    began = time.monotonic()
    with watchdog.watch("waiting for data", 0.3, 1.6, "no data within a limit", data=True):
        until(lambda: ended, "not ended", 10)
    assert ended[0] - began == pytest.approx(1.6, abs=0.6)
    warnings = capfd.readouterr().err.splitlines()
    # Growing intervals: after 0.3, 0.6, 1.2 seconds.
    assert len(warnings) == 4 and all("this rank reads its data by itself" in line for line in warnings)
    assert all(line.startswith("warning: rank 3 has been waiting for data for ") for line in warnings[:3])
    assert warnings[3].startswith("error: rank 3: no data within a limit (2 s); ")


def heartbeat(**changes) -> Heartbeat:
    known = {
        "phase": "training",
        "phase_began": 10.0,
        "time": 100.0,
        "started": 10.0,
        "step": 30,
        "first_step": 0,
    }
    known |= {"steps": 90, "loss": 0.5, "host": "elsewhere", "pid": 1}
    return Heartbeat(**{**known, **changes})


def test_status_in_words():
    line = "running: training at step 30/90, loss 0.5, last sign 2 s ago by process 1 on elsewhere"
    assert in_words(heartbeat(), 102.0) == f"{line}, about 3 min left"
    saving = in_words(heartbeat(phase="saving", phase_began=90.0, loss=None), 1000.0)
    assert (
        saving.startswith("running: saving at step 30/90, last sign 15 min ago")
        and "saving for 15 min" in saving
    )
    # Ten steps of 3 s are less than a minute; of 30 s more.
    assert state_of(heartbeat(), 159.0) == "running" and state_of(heartbeat(), 161.0) == "silent"
    assert state_of(heartbeat(started=-800.0), 390.0) == "running"
    assert state_of(heartbeat(phase="stopped"), 1e9) == "stopped"
    from socket import gethostname

    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    assert in_words(heartbeat(host=gethostname(), pid=gone.pid), 101.0).startswith(
        "dead: training at step 30/90"
    )


def test_status_of_a_folder_without_a_run(tmp_path, capsys):
    code, _, error = call(["status", tmp_path], capsys)
    assert code == 2 and error == (
        f"error: {tmp_path} has no heartbeat.json: expected a run_dir in which a training was started\n"
    )
    (tmp_path / "heartbeat.json").write_text("[1]", encoding="utf-8")
    assert call(["status", tmp_path], capsys)[2].startswith(
        f"error: {tmp_path / 'heartbeat.json'} is no heartbeat"
    )


def falling(step: int) -> float:
    """A loss that falls and trembles by some percent."""
    return 5 / (1 + step / 20) * (1 + 0.05 * ((step * 7919) % 13 / 6 - 1))


def test_spikes_are_told_once_each():
    warnings = Warnings(HealthConfig())
    lines = []
    for step in range(1, 301):
        loss = 8.0 if step in (150, 151, 250) else float("nan") if step == 200 else falling(step)
        norm = 90.0 if step == 220 else falling(step) * (1 + step % 3 / 5)
        lines += warnings.of_step(step, {"loss/total": loss, "loss/part": 0.0})
        if step % 4 == 0:
            lines += warnings.of_log(step, {"gradient_norm/model": norm})
    assert [line.split(",")[0] for line in lines] == [
        "warning: step 150: loss/total 8",
        "warning: step 220: gradient_norm/model 90",
        "warning: step 250: loss/total 8",
    ]
    assert "deviations above 0.8367" in lines[0] and lines[0].endswith("the median of the last 100")
    spikes = {"warnings/loss_spike": 2, "warnings/loss_spike/total": 2}
    assert warnings.figures() == {**spikes, "warnings/gradient_spike": 1}


def test_spikes_are_counted_by_loss():
    warnings = Warnings(HealthConfig())
    for step in range(1, 301):
        of_text = 8.0 if step in (150, 250) else falling(step)
        warnings.of_step(step, {"loss/text": of_text, "loss/pixel": 9.0 if step == 250 else falling(step)})
    counts = {"": 3, "/text": 2, "/pixel": 1}
    assert warnings.figures() == {f"warnings/loss_spike{loss}": count for loss, count in counts.items()}


def test_a_loss_that_sets_in_is_no_spike():
    warnings = Warnings(HealthConfig())
    before = [warnings.of_step(step, {"loss/total": falling(step)}) for step in range(1, 100)]
    after = [warnings.of_step(step, {"loss/total": 9.0, "loss/gan": 8.0}) for step in range(100, 200)]
    assert not any(before + after)
    assert not warnings.figures()


def test_a_dead_codebook_is_told_by_depth_after_some_logs():
    warnings = Warnings(HealthConfig(dead_codebook_usage=0.01))
    usages = [0.3] * 3 + [0.001] * LOGS_UNTIL_DEAD + [0.0] * 3 + [0.3] + [0.001] * (LOGS_UNTIL_DEAD - 1)
    lines = [
        warnings.of_log(step, {"codebook_pixel/usage_1": 0.2, "codebook_pixel/usage_2": usage})
        for step, usage in enumerate(usages)
    ]
    assert [bool(line) for line in lines] == [step == 2 + LOGS_UNTIL_DEAD for step in range(len(usages))]
    (line,) = lines[2 + LOGS_UNTIL_DEAD]
    assert (
        line == "warning: step 7: pixel codebook, depth 2: 0.10% of the codes in use, under 1.00% for 5 logs"
    )
    assert warnings.figures() == {"warnings/dead_codebook": 1}


def test_a_collapsed_tower_is_told_once():
    warnings = Warnings(HealthConfig(tower_rank=0.4))
    figures = {"tower/effective_rank": 3.0, "tower/rank_share": 0.3, "tower/cosine": 0.9}
    lines = [
        warnings.of_validation(step, {**figures, "tower/collapsed": collapsed})
        for step, collapsed in enumerate([0, 1, 1, 0, 1])
    ]
    assert [len(told) for told in lines] == [0, 1, 0, 0, 1] and not warnings.of_validation(
        5, {"loss/text": 1}
    )
    assert lines[1] == [
        "warning: step 1: the vision tower has collapsed: effective rank 3, 30.0% of the start's, mean "
        "cosine to the start's features 0.9; expected 40% and 0.5 or more; lower its rate "
        "(optimizer.lr_scales)"
    ]
    assert warnings.figures() == {"warnings/tower_collapse": 2}


def test_warnings_that_are_turned_off():
    warnings = Warnings(HealthConfig(spike=0, dead_codebook_usage=0))
    for step in range(100):
        assert not warnings.of_step(step, {"loss/total": 1e9 if step == 90 else falling(step)})
        assert not warnings.of_log(
            step, {"codebook_pixel/usage_1": 0.0, "gradient_norm": 1e9 if step == 90 else 1.0}
        )


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("spike=-1", "health.spike=-1.0: expected 0 or more"),
        ("startup_timeout_seconds=0", "startup_timeout_seconds=0.0: expected more than 0 seconds"),
        (
            "data_limit_seconds=900",
            "health.data_limit_seconds=900.0: expected less than collective_timeout_seconds",
        ),
    ],
)
def test_limits_that_make_no_sense(setting, message):
    with pytest.raises(ConfigError, match=message):
        load_job_config([*TOY, "run_dir=unused", f"health.{setting}"], world_size=1)


def test_the_heartbeat_is_whole_whenever_it_is_read(tmp_path):
    """Rewritten thousands of times, it never is half a file."""
    from pretrain import heartbeat as module

    writer = module.HeartbeatWriter(tmp_path, 10)
    writer.phase("training", 1)
    read = 0
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "SECONDS_BETWEEN_BEATS", 0.0)
        for step in range(500):
            writer.step(step, 0.25)
            read += json.loads((tmp_path / "heartbeat.json").read_text(encoding="utf-8"))["step"] == step
    assert read == 500 and not list(tmp_path.glob("*.tmp"))

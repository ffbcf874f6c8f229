"""Compares inputs by real jobs, forked: loading torch and DeepSpeed takes each longer than its work.

`python -m tests.support.forked_inputs RUN OUTPUT BENCHMARKS` trains LLaVA-1.5 in its two recipes, tiny, for
two inputs, then starts the same once more.
"""

import json
import os
import sys
from pathlib import Path

import deepspeed  # noqa: F401  # once, in front of the forks

from data_pipeline.pretokenize.command import main as pretokenize
from launchers import cli, processes
from launchers.ablate_inputs import compare_inputs
from launchers.inputs import of_quickstart
from pretrain.mllm_task import MllmTask  # noqa: F401  # likewise
from pretrain.train import main as train
from tests.support.seeing_run import DECODER

INPUTS = ("dual", "dual-encoder")
SETTINGS = (
    "model.llm=null",
    f"model.llm_config={json.dumps(DECODER)}",
    "data.documents_per_pack=2",
    "data.num_workers=0",
    "global_batch_size=2",
    "log_every=1",
    "precision=fp32",
)


def dualtoken(words):
    sys.argv[1:] = words
    cli.main()


MAINS = {"pretrain.train": train, "data_pipeline.pretokenize": pretokenize}


def forked(command, ranks=1, notice=None):
    main, words = (dualtoken, command[1:]) if command[0] == "dualtoken" else (MAINS[command[2]], command[3:])
    sys.stdout.flush()
    process = os.fork()
    if process == 0:
        try:
            code = main(list(words)) or 0
        except SystemExit as end:
            code = int(end.code or 0)
        sys.stdout.flush()
        os._exit(code)
    code = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
    return processes.Finished(code, 0.0, 0)


def compare(run, output, benchmarks):
    drawings = run / "sample_data" / "images" / "train" / "drawings"
    asked = of_quickstart(
        run,
        recipes=["llava15_align", "llava15_finetune"],
        data=[drawings, drawings],
        inputs=INPUTS,
        tasks=["pope"],
        benchmarks=benchmarks,
        settings=[*SETTINGS, f"model.text_tokenizer={run / 'siglip' / 'export'}"],
        pretokenize=["--backend", "pil"],
        steps=4,
    )
    return compare_inputs(asked, output, seeds=1, ranks=1, say=print)


def refuse(command, *arguments):
    raise AssertionError(f"done before, and started again: {command}")


if __name__ == "__main__":
    folders = [Path(word) for word in sys.argv[1:]]
    processes.run = forked
    rows = compare(*folders)
    processes.run = refuse
    assert compare(*folders) == rows

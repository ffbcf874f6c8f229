"""Asks a little benchmark by real processes: one that is killed, then two that go on where it stood.

`python -m tests.support.killed_answers FOLDER WORDS...` with the words of `dualtoken`. The
processes are forked, since loading transformers takes each of them longer than all answers.
"""

import os
import signal
import sys
import time
from pathlib import Path

from eval.understanding.unified import UnifiedAnswerer
from launchers.cli import main

own_answer = UnifiedAnswerer.answer


def slowly(*arguments):
    time.sleep(0.3)
    return own_answer(*arguments)


def start(words, rank, world_size):
    """A process that runs the command as this rank; returns its id."""
    process = os.fork()
    if process == 0:
        os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(world_size), "LOCAL_RANK": str(rank)}
        sys.argv[1:] = words
        try:
            main()
        except SystemExit as end:
            sys.stdout.flush()
            os._exit(int(end.code or 0))
    return process


def kill_and_go_on(folder, words):
    part = folder / "answers" / "part-00000.jsonl"
    UnifiedAnswerer.answer = slowly
    process = start([*words, "--batch-size", "1"], 0, 1)
    while not part.exists() or part.read_bytes().count(b"\n") < 2:
        assert os.waitpid(process, os.WNOHANG) == (0, 0), "ended before it could be killed"
        time.sleep(0.01)
    os.kill(process, signal.SIGKILL)
    assert os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) == -signal.SIGKILL
    (folder / "before.jsonl").write_bytes(part.read_bytes())
    with open(part, "ab") as file:
        file.write(b'{"key": "torn')
    UnifiedAnswerer.answer = own_answer
    processes = [start([*words, "--batch-size", "3"], rank, 2) for rank in range(2)]
    return [os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) for process in processes]


if __name__ == "__main__":
    sys.exit(any(kill_and_go_on(Path(sys.argv[1]), sys.argv[2:])))

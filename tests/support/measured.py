"""Figures of a run that no two runs share: times, rates and memory."""

_NAMES = ("time", "seconds", "data_wait", "mfu", "tflops_per_rank")
_KINDS = ("seconds/", "memory/")


def is_measured(name: str) -> bool:
    """Whether a figure of metrics.jsonl depends on the machine and the moment."""
    return name in _NAMES or name.startswith(_KINDS) or name.endswith(("_per_second", "seconds_per_step"))

"""Settings of a run of the toy task, without importing it."""

TOY_WORDS = [
    "job=tests.support.toy_task:ToyJobConfig:ToyTask",
    "steps=6",
    "global_batch_size=16",
    "micro_batch_size=4",
    "log_every=1",
    "wandb.mode=disabled",
    "precision=fp32",  # figures are compared exactly
]

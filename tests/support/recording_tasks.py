"""Both jobs, noting which samples each rank took at which step."""

import json

from pretrain.mllm_task import MllmJobConfig, MllmTask
from pretrain.tokenizer_task import TokenizerJobConfig, TokenizerTask

TOKENIZER = "tests.support.recording_tasks:TokenizerJobConfig:RecordingTokenizerTask"
MLLM = "tests.support.recording_tasks:MllmJobConfig:RecordingMllmTask"
__all__ = ["MllmJobConfig", "TokenizerJobConfig"]


class Recording:
    def train_step(self, micro_batches):
        keys = [key for batch in micro_batches for key in batch.keys]
        line = json.dumps({"step": self.runtime.step, "ranks": self.runtime.world_size, "keys": keys})
        with open(self.runtime.run_dir / f"keys.{self.runtime.rank}.jsonl", "a", encoding="utf-8") as file:
            file.write(line + "\n")
        return super().train_step(micro_batches)


class RecordingTokenizerTask(Recording, TokenizerTask):
    pass


class RecordingMllmTask(Recording, MllmTask):
    pass

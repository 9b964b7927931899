"One of several processes: trains each run folder in turn; `FROM>TO` copies FROM's second checkpoint into TO first and resumes there"
import os
import shutil
import sys
from pathlib import Path

from finetune_nb import launch


def everybody():
    import torch
    if torch.distributed.is_initialized(): torch.distributed.barrier()


for asked in sys.argv[1:]:
    source, _, folder = asked.rpartition(">")
    if source:
        if os.environ["RANK"] == "0": shutil.copytree(Path(source) / "checkpoints" / "checkpoint-2", Path(folder) / "checkpoints" / "checkpoint-2")
        everybody()
    launch.work(folder)
    everybody()

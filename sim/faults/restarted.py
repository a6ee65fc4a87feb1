"""A worker of torchrun's: torch's DDP whose forward sleeps, with checkpoints, and a rank that is killed once.

Run by its path, so that a restart imports torch and nothing else. Arguments: RestartedRun as JSON.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn

WIDTH = 64


def main(folder: Path, seconds: float, steps: int, last: int, killed: list[int], every: int) -> None:
    """Takes the steps that no checkpoint has; rank 0 notes when each was done, a killed one its end.

    seconds: that a step sleeps; last: the step in whose middle `killed` die, of the first attempt; every:
    steps between checkpoints.
    """
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank, checkpoint = dist.get_rank(), folder / "checkpoint.pt"
    model = nn.parallel.DistributedDataParallel(nn.Linear(WIDTH, WIDTH))
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    begin = 0
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        begin = state["step"]
    is_first = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0"
    for step in range(begin, steps):
        if is_first and step == last and rank in killed:
            time.sleep(seconds / 2)
            (folder / f"end-{rank}").write_text(repr(time.monotonic()))
            os.kill(os.getpid(), signal.SIGKILL)
        optimizer.zero_grad()
        out = model(torch.ones(4, WIDTH))
        time.sleep(seconds)
        out.square().mean().backward()
        optimizer.step()
        if rank == 0:
            with (folder / "steps").open("a") as file:
                file.write(f"{step} {time.monotonic()!r}\n")
            if (step + 1) % every == 0:
                state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step + 1}
                torch.save(state, folder / "new.pt")
                (folder / "new.pt").replace(checkpoint)
    dist.destroy_process_group()


if __name__ == "__main__":
    given = json.loads(sys.argv[1])
    main(Path(given.pop("folder")), **given)

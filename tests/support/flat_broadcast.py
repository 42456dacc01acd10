"""How fast NCCL is here: one flat broadcast from GPU 0 to others, timed beside what is compared with it.

python flat_broadcast.py BYTES RECEIVERS ROUNDS     prints {"seconds": [...]} of rank 0's clock
"""

from __future__ import annotations

import json
import os
import sys
import time
from datetime import timedelta

import torch
import torch.distributed as dist
import torch.multiprocessing as mp


def measure(rank: int, world: int, port: int, size: int, rounds: int) -> None:
    """One rank; every round starts together and ends when all GPUs have the bytes."""
    os.environ.setdefault("NCCL_CUMEM_ENABLE", "0")
    torch.cuda.set_device(rank)
    dist.init_process_group(
        "nccl",
        init_method=f"tcp://127.0.0.1:{port}",
        rank=rank,
        world_size=world,
        timeout=timedelta(seconds=60),
    )
    flat = torch.randint(0, 255, (size,), dtype=torch.uint8, device="cuda")
    seconds: list[float] = []
    for _ in range(rounds + 2):
        dist.barrier()
        torch.cuda.synchronize()
        begun = time.perf_counter()
        dist.broadcast(flat, src=0)
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - begun)
    if rank == 0:
        print(json.dumps({"seconds": seconds[2:]}), flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    size, receivers, rounds, port = (int(word) for word in sys.argv[1:5])
    mp.spawn(measure, args=(receivers + 1, port, size, rounds), nprocs=receivers + 1)

"""What a decay rule costs per step of sharded parameters, beside the same step without decay.

    python -m benchmarks.distributed [--processes 1 2 3] [--rounds N] [--out FILE]

ResNet-50's parameters as DTensors on gloo processes of one thread each; the rule acts on the 54 weights with
two or more dimensions. SGD(foreach, momentum) alone and with the rule take turns, one step each in every
round, all ranks starting together. The ratio is the median over rounds of the slowest rank's wall time; the
CPU ratio is that of the process's own CPU time, which a busy machine disturbs less and which does not count
waiting.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from benchmarks.shapes import resnet50
from benchmarks.timing import machine
from torch import Tensor, nn
from torch.optim import SGD

import normwise as nw

CASES: list[tuple[str, int, int | None, nw.Rule, str]] = [
    ("Shard(0), L2, flow", 0, 0, nw.L2(1e-2), "flow"),
    ("Shard(0), AWS per row, flow", 0, 0, nw.AdaptiveWeightShrink(1e-2), "flow"),
    ("Shard(0), AWS per row, explicit", 0, 0, nw.AdaptiveWeightShrink(1e-2), "explicit"),
    ("Shard(0), AWS per row, coupled", 0, 0, nw.AdaptiveWeightShrink(1e-2), "coupled"),
    ("Shard(0), AWS whole tensors, flow", 0, None, nw.AdaptiveWeightShrink(1e-2), "flow"),
    ("Shard(1), AWS per row, flow", 1, 0, nw.AdaptiveWeightShrink(1e-2), "flow"),
]


def main() -> None:
    """Run all cases on each number of processes and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--out", type=Path, help="a JSON file to write")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    results: dict[str, Any] = {"machine": machine(), "rounds": arguments.rounds}
    for size in arguments.processes:
        results[f"{size} processes"] = together(size, arguments.rounds)
        for title, numbers in results[f"{size} processes"].items():
            print(f"{size} process(es)  {title:36}", "  ".join(f"{k} {v}" for k, v in numbers.items()))
    if arguments.out:
        arguments.out.write_text(json.dumps(results, indent=2) + "\n")


def together(size: int, rounds: int) -> dict[str, Any]:
    """Run all cases on so many processes, and return the numbers of the first."""
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as directory:
        mine, theirs = context.Pipe(duplex=False)
        meeting = str(Path(directory) / "rendezvous")
        processes = [
            context.Process(target=one_rank, args=(rank, size, meeting, rounds, theirs))
            for rank in range(size)
        ]
        for process in processes:
            process.start()
        theirs.close()
        numbers: dict[str, Any] = mine.recv()
        for process in processes:
            process.join()
    return numbers


def one_rank(rank: int, size: int, meeting: str, rounds: int, connection: Any) -> None:
    """Time all cases as one of several ranks; the first sends the numbers."""
    import torch.distributed as dist

    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{meeting}", rank=rank, world_size=size)
    numbers = {case[0]: measured(*case[1:], rounds) for case in CASES}
    if rank == 0:
        connection.send(numbers)
    dist.barrier()
    dist.destroy_process_group()


def measured(sharded: int, dim: int | None, rule: nw.Rule, mode: str, rounds: int) -> dict[str, Any]:
    """Return the ratios of a step with the rule to one without, and how often ranks speak to each other."""
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor
    from torch.distributed.tensor.debug import CommDebugMode

    mesh = init_device_mesh("cpu", (dist.get_world_size(),))

    def made(value: Tensor) -> Tensor:
        return distribute_tensor(value, mesh, [Shard(min(sharded, value.ndim - 1))], src_data_rank=None)

    params = [nn.Parameter(made(torch.randn(shape) * 0.05)) for shape in resnet50()]
    for param in params:
        param.grad = made(torch.randn(param.shape) * 1e-3)
    plain, decayed = (SGD(params, lr=1e-3, momentum=0.9, foreach=True) for _ in range(2))
    nw.Decay(decayed, rule, [param for param in params if param.ndim > 1], dim=dim, mode=mode)
    with CommDebugMode() as communication:
        decayed.step()
    walls, cpus, base = [], [], []
    for turn in range(rounds + 1):
        wall, cpu = timed(plain)
        wall_decayed, cpu_decayed = timed(decayed)
        if turn:  # the first turn allocates the optimizers' state
            slowest = torch.tensor([wall, wall_decayed])
            dist.all_reduce(slowest, dist.ReduceOp.MAX)
            walls.append(float(slowest[1] / slowest[0]))
            cpus.append(cpu_decayed / cpu)
            base.append(float(slowest[0]))
    return {
        "milliseconds without": round(1e3 * statistics.median(base), 2),
        "ratio": round(statistics.median(walls), 2),
        "CPU ratio": round(statistics.median(cpus), 2),
        "collectives": communication.get_total_counts(),
    }


def timed(optimizer: SGD) -> tuple[float, float]:
    """Return the wall and CPU time of one step, all ranks starting together."""
    import torch.distributed as dist

    dist.barrier()
    wall, cpu = time.perf_counter(), time.process_time()
    optimizer.step()
    return time.perf_counter() - wall, time.process_time() - cpu


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main()

"""Train a small transformer with fully_shard (FSDP2), with a plan, decay, checkpoints and resuming.

The plan says which weights are scale-invariant; it is made before sharding. The decay is attached after
sharding, with nothing to tune. It is part of the checkpoint, which any number of processes can continue.

On one machine (CPU or GPUs), twice: the second run continues from the checkpoint of the first::

    torchrun --standalone --nproc-per-node 2 examples/fsdp.py --checkpoint run1 --stop-after 20
    torchrun --standalone --nproc-per-node 3 examples/fsdp.py --checkpoint run1

On several nodes, on each of them (here 4 nodes of 8 GPUs; ``node0`` is any one of them; the checkpoint
directory is one that all nodes share)::

    torchrun --nnodes 4 --nproc-per-node 8 --max-restarts 3 --rdzv-id run1 --rdzv-backend c10d \
        --rdzv-endpoint node0:29500 examples/fsdp.py --checkpoint /shared/run1

With SLURM, in a script for ``sbatch``::

    #SBATCH --nodes 4 --ntasks-per-node 1 --gpus-per-node 8 --requeue
    head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
    srun torchrun --nnodes 4 --nproc-per-node 8 --rdzv-id "$SLURM_JOB_ID" --rdzv-backend c10d \
        --rdzv-endpoint "$head:29500" examples/fsdp.py --checkpoint /shared/run1

A rank that is killed ends the job with torchrun's message; the same line starts it again where the last
checkpoint was written (with ``--max-restarts`` or ``--requeue`` by itself).
"""

from __future__ import annotations

import argparse
import os
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import normwise as nw

VOCABULARY, LENGTH = 31, 24


class Attention(nn.Module):
    """Causal self-attention with normalised queries and keys, so that their weights are scale-invariant."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.query, self.key, self.value, self.out = (nn.Linear(width, width, bias=False) for _ in range(4))
        self.query_norm, self.key_norm = nn.LayerNorm(width // heads), nn.LayerNorm(width // heads)

    def forward(self, x: Tensor) -> Tensor:
        """Map (batch, length, width) to the same shape."""
        query, key, value = (
            layer(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for layer in (self.query, self.key, self.value)
        )
        mixed = F.scaled_dot_product_attention(
            self.query_norm(query), self.key_norm(key), value, is_causal=True
        )
        mapped: Tensor = self.out(mixed.transpose(1, 2).flatten(2))
        return mapped


class Block(nn.Module):
    """A pre-norm transformer block."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.attention_norm, self.attention = nn.LayerNorm(width), Attention(width, heads)
        self.mlp_norm = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        """Map (batch, length, width) to the same shape."""
        x = x + self.attention(self.attention_norm(x))
        mapped: Tensor = x + self.mlp(self.mlp_norm(x))
        return mapped


class Transformer(nn.Module):
    """A language model."""

    def __init__(self, width: int = 32, heads: int = 4, layers: int = 2) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, width)
        self.positions = nn.Embedding(LENGTH, width)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(layers))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, VOCABULARY, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        """Map tokens (batch, length) to logits (batch, length, vocabulary)."""
        x = self.embedding(tokens) + self.positions.weight[: tokens.shape[1]]
        for block in self.blocks:
            x = block(x)
        logits: Tensor = self.head(self.norm(x))
        return logits


def batch_of(step: int, rank: int, size: int = 8) -> Tensor:
    """Return sequences, each of which counts upwards by a random stride."""
    generator = torch.Generator().manual_seed(1_000_003 * step + rank)
    start = torch.randint(VOCABULARY, (size, 1), generator=generator)
    stride = torch.randint(1, 5, (size, 1), generator=generator)
    return (start + stride * torch.arange(LENGTH)) % VOCABULARY


def main() -> None:
    parser = argparse.ArgumentParser(description="A small transformer under fully_shard, with decay.")
    parser.add_argument("--checkpoint", type=Path, required=True, help="directory; continued if it exists")
    parser.add_argument("--steps", type=int, default=60, help="of the whole training")
    parser.add_argument("--stop-after", type=int, help="end this run early, after so many steps in all")
    parser.add_argument("--save-every", type=int, default=10)
    options = parser.parse_args()

    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if device == "cuda" else "gloo", timeout=timedelta(seconds=120))
    rank = dist.get_rank()
    announce = print if rank == 0 else None

    torch.manual_seed(0)  # the same network on all ranks
    model = Transformer()
    plan = nw.plan(model, [batch_of(0, 0)], progress=False)  # before sharding, as it runs the network
    mesh = init_device_mesh(device, (dist.get_world_size(),))
    for block in model.blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)

    plan = plan.apply_to(model)  # the same names, now sharded
    optimizer = torch.optim.AdamW(plan.param_groups(weight_decay=0.1), lr=1e-2)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, options.steps)
    decay = plan.attach(optimizer, scheduler=schedule, total_steps=options.steps)

    done = 0
    if (options.checkpoint / "latest").exists():
        done = int((options.checkpoint / "latest").read_text())
        of_model, of_optimizer = get_state_dict(model, optimizer)
        state = {"model": of_model, "optimizer": of_optimizer, "schedule": schedule, "decay": decay}
        load(state, checkpoint_id=options.checkpoint / f"step{done}")
        set_state_dict(model, optimizer, model_state_dict=of_model, optim_state_dict=of_optimizer)
        if announce:
            announce(f"continued from step {done} on {dist.get_world_size()} processes")

    for step in range(done, min(options.steps, options.stop_after or options.steps)):
        tokens = batch_of(step, rank).to(device)
        optimizer.zero_grad()
        loss = F.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()  # and the decay with it
        schedule.step()
        if (step + 1) % options.save_every == 0:
            of_model, of_optimizer = get_state_dict(model, optimizer)
            state = {"model": of_model, "optimizer": of_optimizer, "schedule": schedule, "decay": decay}
            save(state, checkpoint_id=options.checkpoint / f"step{step + 1}")
            if announce:  # only now, so that a checkpoint that was cut short is never continued
                (options.checkpoint / "newest").write_text(str(step + 1))
                (options.checkpoint / "newest").replace(options.checkpoint / "latest")
                announce(f"step {step + 1}: loss {loss.item():.4f}, saved")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()

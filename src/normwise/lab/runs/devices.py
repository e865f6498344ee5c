"""Where and how a training runs: the device, several processes, memory. Lightning Fabric carries it out."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

__all__ = [
    "DEFAULT",
    "DEVICES",
    "Execution",
    "MissingExtraError",
    "available_memory",
    "device_named",
    "fabric_for",
    "is_out_of_memory",
]

DEVICES = ("auto", "cpu", "cuda", "cuda:N", "mps")


@dataclass(frozen=True)
class Execution:
    """How a training is carried out.

    Attributes:
        device: One of :data:`DEVICES`.
        channels_last: Whether images and weights of convolutions have their channels last in memory.
        compiled: Whether the network goes through ``torch.compile``.
        workers: Number of processes that decode pictures of a folder.
        checkpoint_seconds: Seconds between checkpoints.
        checkpoint_steps: Steps between checkpoints; 0: only seconds count.
    """

    device: str = "auto"
    channels_last: bool = True
    compiled: bool = False
    workers: int = 0
    checkpoint_seconds: float = 300.0
    checkpoint_steps: int = 0

    def as_dict(self, device: torch.device, world: int) -> dict[str, Any]:
        """Return what the last digits of results depend on."""
        return {
            "device": device.type,
            "channels_last": self.channels_last,
            "compiled": self.compiled,
            "processes": world,
        }


DEFAULT = Execution()


class MissingExtraError(ImportError, ValueError):
    """A package is not installed. The message is one line that names the extra."""


def device_named(name: str) -> torch.device:
    """Return the device of this name, if this machine has it.

    Raises:
        ValueError: It is not known or not here; the message names those that are.

    Example:
        >>> device_named("cpu")
        device(type='cpu')
    """
    here = ["cpu"]
    here += [f"cuda:{k}" for k in range(torch.cuda.device_count())] if torch.cuda.is_available() else []
    here += ["mps"] if torch.backends.mps.is_available() else []
    if name == "auto":
        return torch.device(here[-1] if here[-1] == "mps" else here[min(1, len(here) - 1)])
    wanted = "cuda:0" if name == "cuda" else name
    if wanted not in here:
        raise ValueError(
            f"--device {name} is not possible: torch {torch.__version__} finds {', '.join(here)} here"
        )
    return torch.device(wanted)


def fabric_for(device: torch.device, name: str, precision: str) -> Any:
    """Return the Lightning Fabric for a device; under torchrun for all of its processes.

    Args:
        device: The device.
        name: As the user gave it: under torchrun each process chooses its own CUDA device.
        precision: "float32" or "bf16".

    Raises:
        MissingExtraError: Lightning is not installed.
        ValueError: A single CUDA device was named under torchrun.
    """
    try:
        from lightning.fabric import Fabric
    except ImportError:
        raise MissingExtraError(
            "training needs the extra 'scale': pip install normwise[scale]", name="lightning"
        ) from None
    world = int(os.environ.get("WORLD_SIZE", "1"))
    settings: dict[str, Any] = {"precision": "bf16-mixed" if precision == "bf16" else "32-true"}
    if world == 1:
        devices: Any = [device.index] if device.type == "cuda" else 1
        return Fabric(accelerator=device.type, devices=devices, **settings)
    if ":" in name:
        raise ValueError(f"--device {name} is not possible under torchrun: give --device cuda")
    local = int(os.environ.get("LOCAL_WORLD_SIZE", str(world)))
    return Fabric(
        accelerator=device.type, devices=local, num_nodes=world // local, strategy="ddp", **settings
    )


def available_memory(device: torch.device) -> float:
    """Return the bytes that are free on a device now; infinity where that cannot be known.

    Example:
        >>> available_memory(torch.device("cpu")) > 0
        True
    """
    if device.type == "cuda":
        return float(torch.cuda.mem_get_info(device)[0])
    if device.type == "mps":
        return float(torch.mps.recommended_max_memory() - torch.mps.current_allocated_memory())
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    except OSError:
        return float("inf")
    return float(next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvail")), "inf"))


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an error says that a device has no memory left.

    Example:
        >>> is_out_of_memory(RuntimeError("DefaultCPUAllocator: can't allocate memory"))
        True
    """
    words = ("out of memory", "can't allocate memory", "not enough memory")
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or (
        isinstance(error, RuntimeError) and any(word in str(error) for word in words)
    )

"""Text that one rank makes for all."""

from __future__ import annotations

from collections.abc import Callable

import torch

__all__ = ["made_on_rank_0"]


def made_on_rank_0(make: Callable[[], str]) -> str:
    """Return what ``make`` returns on rank 0, on every rank; an error is raised on every rank."""
    import torch.distributed as dist

    if not (dist.is_available() and dist.is_initialized()):
        return make()
    found: list[str | None] = [None, None]
    problem: Exception | None = None
    if dist.get_rank() == 0:
        try:
            found[0] = make()
        except Exception as error:  # the other ranks wait for it
            problem, found[1] = error, str(error)
    device = torch.device("cuda", torch.cuda.current_device()) if dist.get_backend() == "nccl" else None
    dist.broadcast_object_list(found, src=0, device=device)
    if found[0] is None:
        raise problem if problem is not None else RuntimeError(f"on rank 0: {found[1]}")
    return found[0]

"""Distributed checkpoints: saved on two ranks, continued on one, two and three."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from tests.distributed.comparison import assert_same_on_all_ranks, whole
from tests.distributed.models import BATCHES, network, train, units_of
from tests.distributed.world import World, needs_fully_shard
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.checkpoint.state_dict_loader import load as load_checkpoint
from torch.distributed.checkpoint.state_dict_saver import save as save_checkpoint
from torch.distributed.fsdp import fully_shard
from torch.optim import SGD, AdamW, Optimizer

import normwise as nw

CASES = {
    "for a budget": (nw.AdaptiveWeightShrink(0.5), torch.float32, {"clock": "lr^2/max_lr"}),
    "between applications": (nw.AdaptiveWeightShrink(0.5), torch.float32, {"every": 3}),
    "sphere": (nw.Sphere(), torch.float32, {}),
    "scheduled": (nw.L2(lambda step: 0.5 / (1 + step)), torch.float32, {"mode": "explicit"}),
    "coupled": (nw.EpsilonShiftedL2(0.5, 0.3), torch.float32, {"mode": "coupled", "measure": "rms"}),
    "compensated": (nw.AdaptiveWeightShrink(0.02), torch.bfloat16, {"compensated": True}),
}
Job = tuple[nn.Module, Optimizer, nw.Decay]


def job(case: str) -> Job:
    rule, dtype, settings = CASES[case]
    model: nn.Module = network().to(dtype)
    fully_shard(model)
    optimizer = (
        AdamW(model.parameters(), lr=0.05, weight_decay=0.0)
        if case == "sphere"
        else SGD(model.parameters(), lr=0.05, momentum=0.9)
    )
    units = [unit for unit in units_of(model) if unit.dim == 0 or case != "compensated"]
    return model, optimizer, nw.Decay(optimizer, rule, units, **settings)  # type: ignore[arg-type]


def advance(made: Job, first: int, last: int) -> None:
    model, optimizer, _ = made
    for step in range(first, last):
        for group in optimizer.param_groups:
            group["lr"] = 0.05 * (1 - step / 10)
        train(model, optimizer, [BATCHES[step].to(next(model.parameters()).dtype)])


def weights(made: Job) -> list[Tensor]:
    actual = [whole(param) for param in made[0].parameters()]
    assert_same_on_all_ranks(actual, "weights")
    return actual


def save(case: str, path: Path) -> list[Tensor]:
    """Save after four steps, and return what an uninterrupted run has after eight."""
    made = job(case)
    advance(made, 0, 4)
    save_checkpoint(state_of(made), checkpoint_id=path)
    advance(made, 4, 8)
    return weights(made)


def state_of(made: Job) -> dict[str, Any]:
    model, optimizer, decay = made
    of_model, of_optimizer = get_state_dict(model, optimizer)
    return {"model": of_model, "optimizer": of_optimizer, "decay": decay}


def resume(case: str, path: Path) -> list[Tensor]:
    made = job(case)
    advance(made, 7, 8)  # so that a state that is not loaded shows
    state = state_of(made)
    load_checkpoint(state, checkpoint_id=path)
    set_state_dict(*made[:2], model_state_dict=state["model"], optim_state_dict=state["optimizer"])
    advance(made, 4, 8)
    return weights(made)


@needs_fully_shard
@pytest.mark.parametrize("case", CASES)
@pytest.mark.one_in(2)
def test_resumed_equals_uninterrupted(case: str, worlds: dict[int, World], tmp_path: Path) -> None:
    (expected, _) = worlds[2].run(save, case, tmp_path)
    for size in (2, 1, 3):
        for actual in worlds[size].run(resume, case, tmp_path):
            for tensor, other in zip(actual, expected, strict=True):
                if size == 2:
                    assert torch.equal(tensor, other)
                else:  # the mean of gradients over other numbers of ranks rounds otherwise
                    tolerance = 1e-5 if tensor.dtype == torch.float32 else 0.02
                    torch.testing.assert_close(tensor, other, rtol=tolerance, atol=tolerance)


def compensated_state(path: Path) -> tuple[list[Tensor], list[Tensor]]:
    made = job("compensated")
    advance(made, 0, 4)
    saved = made[2].state_dict()
    other = job("compensated")
    save_checkpoint({"decay": made[2]}, checkpoint_id=path)
    load_checkpoint({"decay": other[2]}, checkpoint_id=path)
    assert other[2].steps == 4
    pending = [
        [whole(one) for unit in state["pending"] for one in unit] for state in (saved, other[2].state_dict())
    ]
    return pending[0], pending[1]


def load_alone(path: Path) -> list[Tensor]:
    made = job("compensated")
    load_checkpoint({"decay": made[2]}, checkpoint_id=path)
    return [whole(one) for unit in made[2].state_dict()["pending"] for one in unit]


@needs_fully_shard
def test_state_of_each_unit_is_resharded_bit_for_bit(worlds: dict[int, World], tmp_path: Path) -> None:
    (saved, loaded), _ = worlds[2].run(compensated_state, tmp_path)
    assert any(bool((one != 1).any()) for one in saved)
    for tensor, other in zip(saved, loaded, strict=True):
        assert torch.equal(tensor, other)
    for size in (1, 3):
        for actual in worlds[size].run(load_alone, tmp_path):
            assert all(torch.equal(tensor, other) for tensor, other in zip(saved, actual, strict=True))


def made_state() -> tuple[bool, int, int]:
    model, optimizer, decay = job("sphere")
    with torch.no_grad():
        for param in model.parameters():
            param.mul_(2)  # off the sphere
    before = [whole(param) for param in model.parameters()]
    get_state_dict(model, optimizer)
    stays = all(torch.equal(w, whole(p)) for w, p in zip(before, model.parameters(), strict=True))
    model, optimizer, other = job("scheduled")
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    for param in model.parameters():  # on the other ranks they are zero, by chance
        param.grad = torch.full_like(param, float(dist.get_rank() == 0))
    optimizer.step(None)
    return stays, decay.steps, other.steps


@needs_fully_shard
def test_a_step_that_only_makes_the_state_decays_nothing(world: World) -> None:
    assert world.run(made_state) == [(True, 0, 1)] * world.size

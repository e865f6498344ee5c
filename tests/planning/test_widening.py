"""A plan of a narrow copy, carried over: the same as a plan of the wide model."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import normwise as nw
from normwise.invariance import widened_part


class Block(nn.Module):
    """Attention with grouped heads, packed as q k v, before a stream norm; with or without a QK-norm."""

    def __init__(self, size: int, heads: int, groups: int, *, norm: bool = False, tied: bool = False) -> None:
        super().__init__()
        self.heads, self.groups, self.size, self.norm = heads, groups, size, norm
        width = heads * size
        self.emb = nn.Embedding(11, width)
        self.qkv = nn.Linear(width, width + 2 * groups * size, bias=False)
        self.o, self.n = nn.Linear(width, width, bias=False), nn.LayerNorm(width)
        self.head = nn.Linear(width, 11, bias=False)
        if tied:
            self.head.weight = self.emb.weight

    def forward(self, ids: Tensor) -> Tensor:
        x = self.emb(ids)
        counts = [self.heads, self.groups, self.groups]
        packed = self.qkv(x).split([count * self.size for count in counts], -1)
        q, k, v = (
            t.unflatten(-1, (count, self.size)).transpose(1, 2)
            for t, count in zip(packed, counts, strict=True)
        )
        if self.norm:
            q, k = F.rms_norm(q, (self.size,)), F.rms_norm(k, (self.size,))
        k, v = (t.repeat_interleave(self.heads // self.groups, 1) for t in (k, v))
        y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        out: Tensor = self.head(self.n(x + self.o(y)))
        return out


def found(net: nn.Module) -> nw.Plan:
    return nw.plan(net, [torch.randint(0, 11, (6, 7)) for _ in range(2)])


@pytest.mark.parametrize("norm", [False, True])
def test_a_plan_of_a_narrow_copy_is_that_of_the_model(norm: bool) -> None:
    torch.manual_seed(0)
    narrow, wide = Block(4, 4, 2, norm=norm), Block(6, 8, 4, norm=norm)
    carried, own = found(narrow).apply_to(wide, widened=True), found(wide)
    measured = [replace(t, smallest_rms=0.0) for t in own.treatments]  # depends on the values
    assert [replace(t, smallest_rms=0.0) for t in carried.treatments] == measured
    assert carried.symmetries == own.symmetries
    assert [u.describe() for u in carried.units] == [u.describe() for u in own.units]
    assert all(a.params[0] is b.params[0] for a, b in zip(carried.units, own.units, strict=True))
    assert bool(own.units) == norm


def test_images_and_whole_tensors() -> None:
    def net(width: int) -> nn.Sequential:
        last = nn.Linear(2 * width, 5, bias=False)
        return nn.Sequential(
            nn.Conv2d(3, width, 3),
            nn.BatchNorm2d(width),
            nn.AdaptiveAvgPool2d((2, 1)),
            nn.Flatten(),
            last,
            nn.LayerNorm(5),
        )

    torch.manual_seed(0)
    plan = nw.plan(net(4), [torch.randn(8, 3, 6, 6)])
    wide = net(64)
    assert (
        plan.apply_to(wide, widened=True).units[0].describe()
        == nw.Unit(wide.get_parameter("0.weight"), dim=0).describe()
    )
    with pytest.raises(ValueError, match=r"has shape \(4, 3, 3, 3\) in the plan and \(64, 3, 3, 3\)"):
        plan.apply_to(wide)


def test_other_shares_of_the_parts_are_refused() -> None:
    torch.manual_seed(0)
    plan = found(Block(4, 4, 4))
    with pytest.raises(
        ValueError, match=r"'qkv\.weight' is divided into parts, and grows from \(48, 16\) to"
    ):
        plan.apply_to(Block(4, 8, 2), widened=True)


def test_what_does_not_carry_over_is_refused() -> None:
    torch.manual_seed(0)
    plan = found(Block(4, 4, 2))
    with pytest.raises(ValueError, match=r"only dimensions of two and more may grow; make a narrow copy"):
        plan.apply_to(Block(2, 4, 2), widened=True)
    with pytest.raises(ValueError, match=r"'emb\.weight' is shared with nothing in the plan and with head"):
        plan.apply_to(Block(8, 4, 2, tied=True), widened=True)
    deeper = Block(8, 4, 2)
    deeper.head = nn.Sequential(deeper.head)  # type: ignore[assignment]
    with pytest.raises(ValueError, match=r"'head\.weight' is not in the model"):
        plan.apply_to(deeper, widened=True)
    other = Block(8, 4, 2)
    other.n = nn.Linear(32, 32)  # type: ignore[assignment]
    with pytest.raises(ValueError, match=r"'n\.weight' has 1 dimensions in the plan and 2 in the model"):
        plan.apply_to(other, widened=True)
    frozen = Block(8, 4, 2)
    frozen.o.requires_grad_(False)
    with pytest.raises(ValueError, match=r"'o\.weight' is not frozen in the plan, unlike in the model"):
        plan.apply_to(frozen, widened=True)
    with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module"):
        plan.apply_to("model", widened=True)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"'qkv\.weight' is divided into parts, and grows from \(48, 24\)"):
        found(Block(4, 6, 3)).apply_to(Block(4, 7, 7), widened=True)
    with pytest.raises(ValueError, match=r"the part 'w\[0:2\]' of 4 units is no whole number of 5 units"):
        widened_part("w[0:2]", (4,), (5,))

from __future__ import annotations

import torch
import torch.nn.functional as F

from normwise.lab.data.augmentation import PADDING, CropsAndFlips


def test_crops_and_flips_are_those_of_a_slow_loop() -> None:
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (50, 3, 7, 9), dtype=torch.uint8, generator=generator)
    drawn = CropsAndFlips.draw(80, generator)
    chosen = torch.randperm(80, generator=generator)[:50]
    found = drawn.of(images, chosen)
    assert found.dtype == torch.uint8
    assert found.is_contiguous(memory_format=torch.channels_last)
    padded = F.pad(images, (4, 4, 4, 4))
    for k, entry in enumerate(chosen.tolist()):
        row, column = int(drawn.rows[entry]), int(drawn.columns[entry])
        crop = padded[k, :, row : row + 7, column : column + 9]
        assert torch.equal(found[k], crop.flip(-1) if drawn.flips[entry] else crop)


def test_draws_cover_all_places_evenly() -> None:
    drawn = CropsAndFlips.draw(9000, torch.Generator().manual_seed(1))
    for places in (drawn.rows, drawn.columns):
        counts = places.bincount()
        assert len(counts) == 2 * PADDING + 1
        assert (counts - 1000).abs().max() < 150
    assert abs(drawn.flips.float().mean().item() - 0.5) < 0.03
    again = CropsAndFlips.draw(9000, torch.Generator().manual_seed(1))
    assert torch.equal(again.rows, drawn.rows)
    assert torch.equal(again.flips, drawn.flips)

"""Batches that evaluation can be checked on by hand, and a finished run to evaluate on them."""

from __future__ import annotations

import torch

from freeadv_fast.config.run import TrainConfig
from freeadv_fast.data.loader import Batch
from freeadv_fast.models.zoo import build_model
from freeadv_fast.runs.log import save_config


class FixedLoader:
    """Given batches of random images, as one rank would see them."""

    def __init__(self, sizes, *, first_index=0, num_classes=5, image_size=8):
        generator = torch.Generator().manual_seed(first_index)
        self.classes = [f"class {i}" for i in range(num_classes)]
        self.num_images, self.num_batches = sum(sizes), len(sizes)
        shape = (image_size, image_size, 3)
        self.batches = []
        for size in sizes:
            images = torch.randint(0, 256, (size, *shape), generator=generator).to(torch.uint8)
            labels = torch.randint(num_classes, (size,), generator=generator)
            indices = torch.arange(first_index, first_index + size)
            self.batches.append(Batch(images, labels, size, indices))
            first_index += size

    def epoch(self, epoch, start=0):
        yield from self.batches[start:]


def fixed_val_loader(config, world, num_images, view=None):
    """Stands for `data.build.build_val_loader`: a set of nine images."""
    return FixedLoader([num_images or 9], num_classes=6, image_size=config.image_size)


def finished_run(folder):
    """Makes a folder as a finished run of a small network leaves it.

    Args:
        folder: To be made.

    Returns:
        The folder.
    """
    (folder / "checkpoints").mkdir(parents=True)
    config = TrainConfig(
        arch="resnet18", image_size=32, normalization="per-image", eval_attacks=("pgd-2",)
    )
    save_config(config, folder / "config.yaml")
    (folder / "result.json").write_text("kept")
    torch.manual_seed(0)
    model = build_model("resnet18", 6, image_size=32, per_image_standardize=True)
    state = {"model": model.state_dict(), "classes": [f"class {i}" for i in range(6)]}
    torch.save(state, folder / "checkpoints" / "last.pt")
    return folder

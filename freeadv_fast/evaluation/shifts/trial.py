"""A finished run's network on one set of clean images, some of its classes or all."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from freeadv_fast.config.run import TrainConfig
from freeadv_fast.data.folder import FolderLoader
from freeadv_fast.data.loader import Loader
from freeadv_fast.distributed.world import World
from freeadv_fast.evaluation.evaluate import Evaluation, evaluate
from freeadv_fast.evaluation.images import open_folder
from freeadv_fast.runs.saved import SavedRun


class SelectedLogits(nn.Module):
    """A network of which some outputs are kept, in a given order.

    Attributes:
        columns: (k,) int64 buffer: output j is the network's output columns[j].
    """

    columns: Tensor

    def __init__(self, network: nn.Module, columns: Sequence[int]) -> None:
        """Keeps `columns` of `network`, which is shared, not copied."""
        super().__init__()
        self.network = network
        self.register_buffer("columns", torch.tensor(columns))

    def forward(self, images: Tensor) -> Tensor:
        """What the network takes to (N, k) logits."""
        logits: Tensor = self.network(images)[:, self.columns]
        return logits


@dataclasses.dataclass(frozen=True)
class Trial:
    """A run's network and how much of each set it sees.

    Attributes:
        run: The run.
        world: The ranks.
        num_images: Images of a set, or of a corruption and severity; None for all.
    """

    run: SavedRun
    world: World
    num_images: int | None

    def folder_loader(self, flag: str, folder: Path, config: TrainConfig) -> FolderLoader:
        """Opens a folder on every rank.

        Raises:
            UserError: on every rank, where one cannot read it or holds other images.
        """
        return open_folder(flag, folder, config, self.world, self.num_images)

    def measure(self, loader: Loader, label: str, *, is_restricted: bool = False) -> Evaluation:
        """Accuracy on clean images whose classes are some of the network's, in any order.

        Args:
            loader: This rank's share of the images.
            label: Text before the progress bar.
            is_restricted: Only the logits of the loader's classes compete.
        """
        column = {name: index for index, name in enumerate(self.run.classes)}
        own = [column[name] for name in loader.classes]
        others = [] if is_restricted else sorted(set(column.values()) - set(own))
        model = self.run.model.to(self.world.device)
        model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        config = self.run.config
        return evaluate(
            SelectedLogits(model, own + others),
            loader,
            (),
            config.evaluation_threat,
            world=self.world,
            mean=config.pixel_mean,
            std=config.pixel_std,
            label=label,
        )

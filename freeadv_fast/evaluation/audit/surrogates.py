"""Other networks of the same data, whose points an audited network should hardly mind.

To train one for the purpose would take as long as a run. But a run rarely stands alone: the same
folder holds a natural network beside it, or a sweep's other cells, and its own folder the
best weights beside the last. What is found is named in the audit.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn

from freeadv_fast.config.file import load_config
from freeadv_fast.errors import UserError
from freeadv_fast.evaluation.tables import one_line
from freeadv_fast.runs.log import RunFolder
from freeadv_fast.runs.saved import AVERAGE, SavedRun, load_run

# Folders of runs that are looked at: a sweep has hundreds, and one is enough.
MOST_NEIGHBOURS = 100


def find_surrogates(run: SavedRun) -> dict[str, nn.Module]:
    """The run's own other weights, and one run of the same data in the folder beside it.

    Args:
        run: The audited run.

    Returns:
        Name to the network, of pixels in [0, 1] and in eval mode; empty where nothing was found.
    """
    return dict([*_other_weights(run), *_neighbours(run)])


def _other_weights(run: SavedRun) -> Iterator[tuple[str, nn.Module]]:
    """The first of the run's best, averaged and last weights that are not the audited ones."""
    for name in ("best", AVERAGE, "last"):
        other = _loaded(run, run.folder, name)
        if other is not None:
            yield other.weights, other.network
            return


def _neighbours(run: SavedRun) -> Iterator[tuple[str, nn.Module]]:
    """The first run beside this one that saw the same classes at the same size.

    Robust networks come first: points crafted on them travel farther.
    """
    root = run.folder.root.resolve()
    folders = [path for path in sorted(root.parent.iterdir()) if path != root and path.is_dir()]
    candidates = []
    for folder in map(RunFolder, folders[:MOST_NEIGHBOURS]):
        try:
            config = load_config(folder.config)
        except UserError:  # not a run
            continue
        if (config.data, config.image_size) == (run.config.data, run.config.image_size):
            candidates.append((config.method == "natural", folder.root.name, folder))
    for _, name, folder in sorted(candidates, key=lambda candidate: candidate[:2]):
        other = _loaded(run, folder, "last")
        if other is not None:
            yield one_line(name), other.network
            return


def _loaded(run: SavedRun, folder: RunFolder, checkpoint: str) -> SavedRun | None:
    """Another network of the run's classes; None where it cannot be read, or is the same one."""
    try:
        other = load_run(folder.root, checkpoint)
    except UserError:
        return None
    is_other = other.classes == run.classes and not _has_same_weights(run.model, other.model)
    return other if is_other else None


def _has_same_weights(first: nn.Module, second: nn.Module) -> bool:
    """Whether two networks are one, as a copied run and its original are."""
    own, other = first.state_dict(), second.state_dict()
    return own.keys() == other.keys() and all(
        torch.equal(own[name].cpu(), other[name].cpu()) for name in own
    )

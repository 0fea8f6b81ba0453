"""Run by torchrun: each rank has its own copies of the data under one path, and evaluates on them.

    evaluation_worker.py FOLDER

FOLDER holds ``rank0``, ``rank1``, each with the data ``same`` and ``other``; what a rank was told
of each work on them is left there.
"""

import contextlib
import json
import os
import sys
from pathlib import Path

import timm
import torch
from torch import nn

from freeadv_fast import training
from freeadv_fast.config.run import TrainConfig
from freeadv_fast.distributed.world import join_world, leave_world
from freeadv_fast.errors import UserError
from freeadv_fast.evaluation import subject
from freeadv_fast.evaluation.images import open_folder

SIZES = {"image_size": 16, "batch_size": 8, "workers": 0}


def evaluated(data):
    """The number of images that a network was evaluated on."""
    network = nn.Sequential(nn.Flatten(), nn.Linear(3 * 16 * 16, 3))
    options = {"eps": "4/255", "attacks": "pgd-1", "num_images": 10, "image_size": 16}
    return subject.evaluate(network, data=data, **options).num_clean_images


def loaded(data):
    """The images of a list that a file's network was evaluated on; of other data ranks differ."""
    torch.manual_seed(int(os.environ["RANK"]) if data == "other" else 0)
    network = timm.create_model("test_resnet", num_classes=3)
    torch.save(network.state_dict(), "weights.pt")
    options = {"arch": "timm/test_resnet", "eps": "4/255", "attacks": "pgd-1", "image_size": 16}
    Path("ids.txt").write_text("class0/0.jpg\nclass1/0.jpg\nclass2/0.jpg\n")
    options |= {"image_list": "ids.txt"}
    return subject.evaluate("weights.pt", data="same", **options).num_images


def dry(data):
    """The last line of a dry run."""
    config = TrainConfig(data=data, arch="test_resnet", m=2, **SIZES)
    return training.dry_run(config)[-1]


def opened(data):
    """The number of images in the folder of a shifted set."""
    return open_folder(
        "--imagenet-r", Path(data, "val"), TrainConfig(**SIZES), world, None
    ).num_images


def told(work, data):
    """What came of some work: its value or its error."""
    try:
        return work(data)
    except UserError as error:
        return str(error)


if __name__ == "__main__":
    folder = Path(sys.argv[1]).resolve()
    os.chdir(folder / f"rank{os.environ['RANK']}")
    world = join_world()
    for module in (subject, training):  # all of them in one world: joining takes seconds
        module.joined_world = lambda: contextlib.nullcontext(world)
    works = {work.__name__: work for work in (evaluated, dry, opened, loaded)}
    results = {
        f"{name} {data}": told(work, data)
        for data in ("other", "same")
        for name, work in works.items()
    }
    leave_world()
    (folder / f"told{os.environ['RANK']}.json").write_text(json.dumps(results))

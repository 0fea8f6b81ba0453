"""Run by torchrun: each rank opens its own copies of the data, under one path.

    own_copies_worker.py FOLDER: opens every case there, and writes what this rank was told
    own_copies_worker.py FOLDER FLAGS: trains

FOLDER holds ``rank0``, ``rank1``, from where paths are read.
"""

import json
import os
import sys
from pathlib import Path

from freeadv_fast.cli import run_training
from freeadv_fast.config.phases import Phases
from freeadv_fast.config.run import TrainConfig
from freeadv_fast.data.agreement import open_together
from freeadv_fast.distributed.world import join_world, leave_world
from freeadv_fast.errors import UserError


def config_of(case):
    """Reads a case; where it holds a smaller copy, in two phases."""
    common = {"image_size": 16, "batch_size": 8, "workers": 0, "max_bad_fraction": 0.1}
    if not Path(case, "small").exists():
        return TrainConfig(data=f"{case}/data", **common)
    phases = Phases.parse("0-2:16:8,2-4:16:8")
    folders = (f"{case}/small", f"{case}/data")
    return TrainConfig(
        data=f"{case}/data", phases=phases, phase_data=folders, epochs=4, m=1, **common
    )


def open_all():
    """What came of each case: the error, or nothing."""
    world, told = join_world(), {}
    for case in sorted(os.listdir()):
        try:
            open_together(config_of(case), world)
            told[case] = None
        except UserError as error:
            told[case] = str(error)
    leave_world()
    return told


if __name__ == "__main__":
    folder = Path(sys.argv[1]).resolve()
    os.chdir(folder / f"rank{os.environ['RANK']}")
    if sys.argv[2:]:
        sys.exit(run_training("free", "imagenet", sys.argv[2:]))
    (folder / f"told{os.environ['RANK']}.json").write_text(json.dumps(open_all()))

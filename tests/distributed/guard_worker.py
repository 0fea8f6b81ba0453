"""One rank of a guarded run whose weights are ruined; writes what it ended with.

Usage: torchrun ... guard_worker.py IMAGES FOLDER
"""

import sys
from pathlib import Path

import torch

from freeadv_fast import training
from freeadv_fast.config.run import TrainConfig
from freeadv_fast.config.schedule import Schedule
from freeadv_fast.config.threat import Perturbation
from freeadv_fast.methods.free import Free

RUINED_UPDATE = 28


def main(images, folder):
    """Ruins the weights once, at the full learning rate; the run is restored and goes on."""
    torch.set_num_threads(1)
    config = TrainConfig(
        method="free", m=2, data=images, workers=1, arch="test_resnet", image_size=16,
        batch_size=7, epochs=6, eps=Perturbation.parse("8/255"), holdout_images=30, lr=0.05,
        schedule=Schedule.parse("constant"), guard_every=2, guard_images=29,
        on_collapse="restore", output_dir=str(Path(folder) / "run"),
    )  # fmt: skip
    real = Free.train_minibatch

    def train_minibatch(self, *batch):
        passes, learner = real(self, *batch), self.learner
        if learner.updates == RUINED_UPDATE and learner.lr_at(0) == config.lr:
            *_, weight, bias = learner.module.parameters()
            with torch.no_grad():
                weight.neg_()
                bias.neg_()
        return passes

    def conclude(run):
        state = {
            "parameters": dict(run.model.named_parameters()),
            "history": run.guard.history.state_dict(),
            "delta": run.method.delta,
            "place": (run.progress.epoch, run.progress.minibatch, run.learner.updates),
        }
        torch.save(state, Path(folder) / f"rank{run.world.rank}.pt")

    Free.train_minibatch, training.conclude = train_minibatch, conclude
    training.train(config)


if __name__ == "__main__":
    main(*sys.argv[1:])

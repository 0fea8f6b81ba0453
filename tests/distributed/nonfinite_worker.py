"""One rank of a run with compressed gradients, of which one is infinite once, on rank 1 alone.

Usage: torchrun ... nonfinite_worker.py CODEC PRECISION FOLDER
"""

import sys
from pathlib import Path

import torch

from freeadv_fast import training
from freeadv_fast.cli import run_training
from freeadv_fast.step.learner import Learner

# Late enough for fp16's scale, which falls from 2^16 to 2^11 or 2^12 until nothing overflows.
SPOILT_UPDATE, NUM_UPDATES = 7, 9
FLAGS = [
    "--method", "dat", "--optimizer", "lalr", "--attack-steps", "1", "--accumulate", "2",
    "--arch", "timm/test_efficientnet", "--batch-size", "10", "--workers", "0",
    "--max-passes", str(NUM_UPDATES * 2 * 40), "--holdout-images", "20", "--guard-every", "0",
    "--log-every", "1", "--checkpoint-every", "3600",
]  # fmt: skip


def weights_of(network):
    return torch.cat([parameter.detach().flatten() for parameter in network.parameters()])


def main(codec, precision, folder):
    """Trains, and writes the weights before and after each update."""
    weights, scales = [], []
    real_prepare = training.prepare
    real_update, real_apply = Learner.update, Learner.apply_gradients

    def prepare(config, world, own_model=None):
        run = real_prepare(config, world, own_model)

        def spoil(gradient):
            is_spoilt = world.rank == 1 and run.learner.updates == SPOILT_UPDATE
            return torch.full_like(gradient, torch.inf) if is_spoilt else gradient

        next(run.model.parameters()).register_hook(spoil)
        return run

    def update(self, *step):
        weights.append(weights_of(self.module))
        real_update(self, *step)

    def apply_gradients(self):
        scales.append(self.scaler.get_scale())
        real_apply(self)

    def conclude(run):
        weights.append(weights_of(run.model))
        state = {
            "weights": weights, "scales": scales,
            "optimizer": run.learner.optimizer.state_dict()["state"],
        }  # fmt: skip
        torch.save(state, Path(folder) / f"rank{run.world.rank}.pt")

    training.prepare, training.conclude = prepare, conclude
    Learner.update, Learner.apply_gradients = update, apply_gradients
    flags = ["--compress", codec, "--precision", precision, "--output-dir", f"{folder}/run"]
    return run_training("dat", "cifar", [*FLAGS, *flags])


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))

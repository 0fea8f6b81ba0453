"""One rank of a run that decides where images are decoded; writes what it decided.

Usage: torchrun ... decoding_worker.py IMAGES FOLDER
"""

import sys
from pathlib import Path

import numpy as np
import torch

from freeadv_fast.config.run import TrainConfig
from freeadv_fast.data.folder import FolderLoader, build_decoder
from freeadv_fast.data.index import index_images
from freeadv_fast.data.stream import Stream
from freeadv_fast.distributed.world import joined_world
from freeadv_fast.session.decoding import WATCHED, Decoding


class Span:
    """So long a minibatch takes."""

    seconds = 1.0

    def end(self):
        """Nothing to do."""


def main(images, folder):
    """Rank 1 trains a million times as fast as rank 0, which decodes a million times as fast."""
    config = TrainConfig(data=images, image_size=16, batch_size=4, workers=1)
    index = index_images(f"{images}/train", 0, print)
    with joined_world() as world:
        first, later = (build_decoder("dali", index, config, world.device) for _ in "ab")
        stream = Stream(np.arange(len(index.files)), 4, world.rank, world.size, seed=0)
        loader = FolderLoader(index, stream, first, config, world.device, later=later)
        timed = loader.decoding_rate
        loader.decoding_rate = lambda epoch: timed(epoch) * (1 if world.rank else 1e6)
        Span.seconds = 4e-6 if world.rank else 4.0
        decoding = Decoding([loader], world, 1, begin=Span)
        for number, batch in enumerate(loader.epoch(0), start=1):
            with decoding.watching(0, batch, is_steady=True):
                pass
            decoding.decide(0, 0, number)
        state = {"choices": decoding.state_dict(), "moves_at": loader.moves_at, "seen": number}
    torch.save(state, Path(folder) / f"decoding{world.rank}.pt")


assert WATCHED < 114 // 8  # minibatches of these images over two ranks

if __name__ == "__main__":
    main(*sys.argv[1:])

"""Distributed adversarial training on ImageNet or any ImageFolder (Zhang et al. 2022).

torchrun --nproc-per-node 4 launch/imagenet_dat.py --accumulate 6 --compress bucket --data /imagenet
"""

import sys

from freeadv_fast.cli import run_training

if __name__ == "__main__":
    sys.exit(run_training("dat", "imagenet"))

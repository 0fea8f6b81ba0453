"""Natural training on ImageNet or any ImageFolder: the twin to compare free training with.

torchrun --nproc-per-node 4 launch/imagenet_natural.py --data /imagenet
"""

import sys

from freeadv_fast.cli import run_training

if __name__ == "__main__":
    sys.exit(run_training("natural", "imagenet"))

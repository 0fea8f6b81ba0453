"""Fast AdvProp on ImageNet or any ImageFolder (Mei et al. 2022, Algorithm 1).

torchrun --nproc-per-node 4 launch/imagenet_fast_advprop.py --data /imagenet
"""

import sys

from freeadv_fast.cli import run_training

if __name__ == "__main__":
    sys.exit(run_training("fast-advprop", "imagenet"))

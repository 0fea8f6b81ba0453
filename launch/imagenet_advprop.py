"""AdvProp on ImageNet or any ImageFolder (Xie et al. 2020): PGD-K attacks, auxiliary batch norm.

torchrun --nproc-per-node 4 launch/imagenet_advprop.py --attack-steps 5 --data /imagenet
"""

import sys

from freeadv_fast.cli import run_training

if __name__ == "__main__":
    sys.exit(run_training("advprop", "imagenet"))

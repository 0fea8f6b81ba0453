"""PGD training on ImageNet or any ImageFolder (Madry et al. 2018): K attack steps an update.

torchrun --nproc-per-node 4 launch/imagenet_pgd.py --attack-steps 2 --data /imagenet
"""

import sys

from freeadv_fast.cli import run_training

if __name__ == "__main__":
    sys.exit(run_training("pgd", "imagenet"))

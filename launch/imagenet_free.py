"""Free adversarial training on ImageNet or any ImageFolder (Shafahi et al. 2019, Algorithm 1).

torchrun --nproc-per-node 4 launch/imagenet_free.py --m 4 --data /imagenet
"""

import sys

from freeadv_fast.cli import run_training

if __name__ == "__main__":
    sys.exit(run_training("free", "imagenet"))

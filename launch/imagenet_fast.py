"""FGSM-RS on ImageNet or any ImageFolder, in three phases: "Fast is better than free" (Wong 2020).

torchrun --nproc-per-node 4 launch/imagenet_fast.py --data /imagenet

Faster with smaller copies (python -m freeadv_fast.data.resize): --phase-data /160,/352,/imagenet
"""

import sys

from freeadv_fast.cli import run_training

if __name__ == "__main__":
    sys.exit(run_training("fgsm-rs", "imagenet"))

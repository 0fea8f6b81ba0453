"""Free or natural training on CIFAR-10 or CIFAR-100, as in tables 1 and 2 of the paper.

python launch/cifar.py --method free --m 8 --data cifar10:/data/cifar10
"""

import sys

from freeadv_fast.cli import run_training

if __name__ == "__main__":
    sys.exit(run_training("free", "cifar"))

"""Any method on CIFAR-10, or on whatever --data names: --method free, fgsm-rs, gradalign, pgd, ...

python launch/cifar.py --method free --m 8 --data cifar10:/data/cifar10
"""

import sys

from freeadv_fast.cli import run_training

if __name__ == "__main__":
    sys.exit(run_training("free", "cifar"))

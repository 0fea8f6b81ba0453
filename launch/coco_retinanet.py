"""RetinaNet on COCO, or any data in its format, by Fast AdvProp (Mei et al. 2022, table 7).

torchrun --nproc-per-node 2 launch/coco_retinanet.py --init-from resnet50.pth --data coco:/coco

Each rank needs two attacked images: with more than two ranks add --batch-size 10 --aux-bn-group 2,
which are per rank. The global batch grows with them, and so should --lr: 0.02 on four, 0.04 on
eight.

Other methods: --method natural, free, fgsm-rs, pgd. Without --data: embedded synthetic shapes.
"""

import sys

from freeadv_fast.cli import run_training

if __name__ == "__main__":
    sys.exit(run_training("fast-advprop", "coco"))

"""RetinaNet on COCO, or any data in its format, by Fast AdvProp (Mei et al. 2022, table 7).

torchrun --nproc-per-node 2 launch/coco_retinanet.py --init-from resnet50.pth --data coco:/coco

Other methods: --method natural, free, fgsm-rs, pgd. Without --data: embedded synthetic shapes.
"""

import sys

from freeadv_fast.cli import run_training

if __name__ == "__main__":
    sys.exit(run_training("fast-advprop", "coco"))

"""Methods x radii x seeds on one dataset, resumable: one table, one plot.

python launch/sweep.py --methods natural,free --eps 2/255,8/255 --seeds 0,1 --data cifar10:/data

Every other flag, such as --epochs or --arch, goes to each cell; --resume continues.
"""

import sys

from freeadv_fast.sweep import run_sweep

if __name__ == "__main__":
    sys.exit(run_sweep(sys.argv[1:]))

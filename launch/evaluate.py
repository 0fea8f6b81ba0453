"""Evaluates a run again, under other attacks, at another eps; or anybody's network.

python launch/evaluate.py runs/x --attacks pgd-50,cw-50 --eps 4/255 --step 1/255
python launch/evaluate.py weights.pt --arch resnet50 --data /imagenet --eps 4/255
"""

import sys

from freeadv_fast.cli import run_tool
from freeadv_fast.cli.evaluate import EvaluateFlags, run_evaluation

if __name__ == "__main__":
    sys.exit(run_tool(EvaluateFlags, run_evaluation))

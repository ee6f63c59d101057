"""One list of runs, rendered for each kind of cluster, and rehearsed on this machine.

python -m launch render --target=jobset --runs=runs.py --out=rendered --image=IMAGE
python -m launch rehearse --processes=2 --devices=4 -- --config=configs/mnist.py --workdir=DIR
"""

from launch.runs import LaunchError, Run, load_runs
from launch.targets import TARGETS, render

__all__ = ["TARGETS", "LaunchError", "Run", "load_runs", "render"]

"""`scripts/train.py`, planning from few of the ways to treat a block: a tenth of the work."""

from scripts.train import main
from wrappers import _knobs

_knobs.PLAN_MENU_RUNS = 16

if __name__ == "__main__":
    main()

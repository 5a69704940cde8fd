"""python -m dataset.toy: see dataset/toy/data_set.py."""

import sys

from dataset.toy.data_set import main
from util.run import run_main

if __name__ == "__main__":
    sys.exit(run_main(main))

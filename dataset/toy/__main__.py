"""python -m dataset.toy: see dataset/toy/data_set.py."""

import sys
from pathlib import Path

sys.path.insert(1, str(Path(__file__).resolve().parents[2]))  # for `python dataset/toy`

from dataset.toy.data_set import main
from util.run import run_main

if __name__ == "__main__":
    sys.exit(run_main(main))

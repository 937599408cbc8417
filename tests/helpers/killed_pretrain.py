"""tools/pretrain.py whose rank RANK is killed before its INDEX-th change to FOLDER: RANK INDEX FOLDER FLAG..."""

import os
import runpy
import sys
from pathlib import Path

from tests.helpers.file_operations import kill_at, kill_self
from tests.helpers.repository import ROOT

if __name__ == "__main__":
    rank, index, folder = int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3])
    kill_at(folder, index if int(os.environ["RANK"]) == rank else -1, kill_self)
    tool = str(ROOT / "tools" / "pretrain.py")
    sys.argv = [tool, *sys.argv[4:]]
    runpy.run_path(tool, run_name="__main__")

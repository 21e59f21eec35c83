"""Runs on a nearly full file system of their own. A program that may mount (``unshare -rm``).

    python small_disk.py FOLDER 'ARGUMENTS OF train.py AS JSON, WITH --output-dir BELOW FOLDER' KILOBYTES …

For each number of free kilobytes: a run, then space is freed and the same command runs again. Prints JSON.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import torch
from killable import Killable

SIZE = 4 * 2**20


def fill(folder, free):
    """Leave ``free`` bytes."""
    disk = os.statvfs(folder)
    with open(folder / "filler", "wb") as file:
        file.write(bytes(max(disk.f_bavail * disk.f_frsize - free, 0)))


def state(out):
    """File names, and epochs of the checkpoints, all of which must be readable."""
    files = sorted(str(path.relative_to(out)) for path in out.rglob("*") if path.is_file())
    checkpoints = sorted(out.glob("prompt_learner/model*"))
    return {"files": files, "epochs": [torch.load(path, weights_only=True)["epoch"] for path in checkpoints]}


def main():
    folder, argv, sizes = Path(sys.argv[1]), json.loads(sys.argv[2]), [int(word) * 1024 for word in sys.argv[3:]]
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={SIZE}", "none", str(folder)], check=True)
    out, log, outcomes = Path(argv[argv.index("--output-dir") + 1]), folder.parent / "log", []
    for free in sizes:
        fill(folder, free)
        status, _ = Killable(argv, log).end()
        full = {"status": status, "errors": Path(f"{log}.err").read_text(), **state(out)}
        os.unlink(folder / "filler")
        status, report = Killable(argv, log).end()
        last = torch.load(out / "prompt_learner" / "model.pth.tar-5", weights_only=True)["state_dict"]
        parameters = {key: value.tolist() for key, value in last.items()}
        again = {"status": status, "predictions": report.get("predictions"), "parameters": parameters}
        outcomes.append((full, again))
        shutil.rmtree(out)
    print(json.dumps(outcomes))


if __name__ == "__main__":
    main()

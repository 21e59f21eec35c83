"""Runs on a file system of their own that is nearly full. A program: it needs to be allowed to mount (``unshare -rm``).

    python small_disk.py FOLDER 'ARGUMENTS OF train.py AS JSON, WITH --output-dir BELOW FOLDER' KILOBYTES …

For each number of free kilobytes it makes a run; then there is room again, and the same command is given once more.
What happened goes to the standard output as JSON.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import torch
from victims import Victims

SIZE = 4 * 2**20


def fill(folder, free):
    """Leave ``free`` bytes, by a file."""
    disk = os.statvfs(folder)
    with open(folder / "filler", "wb") as file:
        file.write(bytes(max(disk.f_bavail * disk.f_frsize - free, 0)))


def state(out):
    """Files that are left, and which checkpoints can be read."""
    files = sorted(
        str(path.relative_to(out)) for path in out.rglob("*") if path.is_file() and "events" not in path.name
    )
    checkpoints = sorted(out.glob("prompt_learner/model*"))
    return {"files": files, "read": [torch.load(path, weights_only=True)["epoch"] for path in checkpoints]}


def main():
    folder, argv, sizes = Path(sys.argv[1]), json.loads(sys.argv[2]), [int(word) * 1024 for word in sys.argv[3:]]
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={SIZE}", "none", str(folder)], check=True)
    out, log = Path(argv[argv.index("--output-dir") + 1]), folder.parent / "log"
    victims, found = Victims(), []
    for free in sizes:
        fill(folder, free)
        status, _ = victims.run(argv, log)
        full = {"status": status, "errors": Path(f"{log}.err").read_text(), **state(out)}
        os.unlink(folder / "filler")
        status, said = victims.run(argv, log)
        found.append((full, {"status": status, "predictions": said.get("predictions"), **state(out)}))
        last = torch.load(out / "prompt_learner" / "model.pth.tar-5", weights_only=True)["state_dict"]
        found[-1][1]["parameters"] = {key: value.tolist() for key, value in last.items()}
        shutil.rmtree(out)
    victims.close()
    print(json.dumps(found))


if __name__ == "__main__":
    main()

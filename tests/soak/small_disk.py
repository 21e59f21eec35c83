"""Runs on a nearly full file system of their own. A program that may mount (``unshare -rm``).

    python small_disk.py FOLDER 'ARGUMENTS OF train.py AS JSON, WITH --output-dir BELOW FOLDER' KILOBYTES …

For each number of free kilobytes: a run, then space is freed and the same command runs again. What each leaves is
copied to folders next to FOLDER, ``<kilobytes>-full`` and ``<kilobytes>-again``.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

from killable import Killable

SIZE = 4 * 2**20


def main():
    folder, argv, out = Path(sys.argv[1]), json.loads(sys.argv[2]), Path(sys.argv[1]) / "run"
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={SIZE}", "none", str(folder)], check=True)
    for free in map(int, sys.argv[3:]):
        disk = os.statvfs(folder)
        (folder / "filler").write_bytes(bytes(disk.f_bavail * disk.f_frsize - free * 1024))
        for name in ("full", "again"):
            copy = folder.parent / f"{free}-{name}"
            status, report = Killable(argv, f"{copy}.log").end()
            shutil.copytree(out, copy)
            Path(f"{copy}.json").write_text(json.dumps([status, report]))
            (folder / "filler").unlink(missing_ok=True)
        shutil.rmtree(out)


if __name__ == "__main__":
    main()

"""Fetches the parts of a data set into a hidden staging folder and moves them into place once they are whole.

curl goes on with an interrupted file; without it torchvision's ``download_url`` starts that file again. What is on
Google Drive is gdown's, which goes on too. (gdown would take any URL, but stores unpacked what a server labels
``Content-Encoding: x-gzip``, as Oxford's seems to do, which fits no checksum; huggingface_hub 2 goes on with no file.)
"""

from __future__ import annotations

import errno
import gzip
import hashlib
import lzma
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
import zlib
from collections.abc import Callable
from typing import Any

from filelock import FileLock, Timeout
from torchvision.datasets.utils import download_url
from tqdm import tqdm

from dataset_sources import Download, Source
from datasets.imagenet import read_classnames
from datasets.splits import read_json, read_split
from trainers.prompting.errors import UserError
from trainers.prompting.results import write_text

STAGING = ".prepare"
ARCHIVES = (".tar", ".tar.gz", ".tgz", ".zip")
NO_RANGES = 33  # curl's exit status where the server cannot go on with a file
IMAGENET_CLASSES = 1000
DAMAGED = (tarfile.TarError, zipfile.BadZipFile, gzip.BadGzipFile, lzma.LZMAError, zlib.error, EOFError)


# ------------------------------------------------------------------------------------------------- what is there


def is_there(folder: str, part: str) -> bool:
    """Whether a part is in a folder: a file, or a folder that is not empty."""
    path = os.path.join(folder, part)
    if os.path.isdir(path):
        with os.scandir(path) as found:
            return any(found)
    return os.path.isfile(path)


def missing_parts(source: Source, root: str) -> list[str]:
    """What a data set lacks. Annotations are not needed beside the split that was made of them."""
    folder = os.path.join(root, source.folder)
    needed = [*source.images, *((source.names,) if source.names else ())]
    if not source.names:
        needed += source.raw
    elif not is_there(folder, source.names):
        needed += [part for part in source.raw if source.download_of(part)]  # then they come along, as in CoOp's layout
    return [part for part in source.parts if part in needed and not is_there(folder, part)]


# ------------------------------------------------------------------------------------------------- one data set


def fetch(source: Source, root: str) -> None:
    """Get what a data set lacks. Its folder is made when all of it is there; what is in the folder already stays.

    Raises:
        UserError: something cannot be had; what was fetched until then is kept, and the next call goes on.
    """
    if not hasattr(tarfile, "data_filter"):
        raise UserError("this Python unpacks archives without care; use 3.9.17, 3.10.12, 3.11.4, 3.12 or newer")
    folder = os.path.join(root, source.folder)
    if os.path.islink(folder) and not os.path.isdir(folder):
        raise UserError(f"{folder}: a link to a folder that is not there; make the folder or remove the link")
    beside, name = os.path.split(os.path.realpath(folder))  # a link's target has the room that the data root lacks
    staging = os.path.join(beside, STAGING, name)
    os.makedirs(staging, exist_ok=True)
    try:
        with FileLock(os.path.join(beside, STAGING, f"{name}.lock"), timeout=0):
            tree = os.path.join(staging, "tree")
            os.makedirs(tree, exist_ok=True)
            for download in source.downloads:
                wanted = [p for p in missing_parts(source, root) if p in download.parts and not is_there(tree, p)]
                if wanted:
                    _fetch_parts(download, source, root, staging, wanted)
            _place(tree, folder)
            shutil.rmtree(staging)
    except Timeout as error:
        raise UserError(f"{staging}: another run is fetching this data set; wait for it") from error
    with_others = [entry for entry in os.listdir(os.path.join(beside, STAGING)) if not entry.endswith(".lock")]
    if not with_others:
        shutil.rmtree(os.path.join(beside, STAGING), ignore_errors=True)


def _fetch_parts(download: Download, source: Source, root: str, staging: str, wanted: list[str]) -> None:
    """Get a file, or the archive that holds the parts that are wanted, into ``staging/tree``."""
    tree = os.path.join(staging, "tree")
    unpacked = os.path.join(staging, "unpacked", download.file)
    if not download.file.endswith(ARCHIVES):
        path = _get_file(download, source, root, os.path.join(staging, "downloads"))
        os.rename(path, os.path.join(tree, download.file))
        return
    if not os.path.isdir(unpacked):  # it gets this name when it is whole
        path = _get_file(download, source, root, os.path.join(staging, "downloads"))
        _unpack_to(path, unpacked, download.inner)
        os.remove(path)
    theirs = {ours: name for name, ours in download.renamed.items()}
    base = _find(unpacked, [theirs.get(part, part) for part in wanted], download)
    here = {name: download.renamed.get(name, name) for name in os.listdir(base)}
    for name, ours in sorted(here.items(), key=lambda item: (item[1] in download.parts, item)):  # the parts last: they
        target = os.path.join(tree, ours)  # say that nothing is left to be done
        if not name.startswith((".", "__MACOSX")) and not os.path.exists(target):
            os.rename(os.path.join(base, name), target)
    shutil.rmtree(unpacked)


def _find(folder: str, parts: list[str], download: Download) -> str:
    """The first folder, from the top, that has all parts. Raises UserError."""
    for path, below, _ in os.walk(folder):
        below.sort()
        if all(is_there(path, part) for part in parts):
            return path
    found = ", ".join(sorted(os.listdir(folder))[:5])
    shutil.rmtree(folder)
    raise UserError(
        f"{download.page}: no {' and '.join(parts)} in it, but {found}; it is not what it was, see DATASETS.md"
    )


def _place(tree: str, folder: str) -> None:
    """Move what is whole to where it belongs; the folder as one where it is not there yet."""
    if not os.path.exists(folder):
        return _move(tree, folder)
    for name in sorted(os.listdir(tree)):
        target = os.path.join(folder, name)
        if os.path.isdir(target) and not os.path.islink(target) and not os.listdir(target):
            os.rmdir(target)  # an empty folder, made for what comes now
        if not os.path.lexists(target):
            _move(os.path.join(tree, name), target)
        elif not is_there(folder, name):
            raise UserError(f"{target}: empty, and it is a link, which is not touched; remove it and call again")


def _move(source: str, target: str) -> None:
    """Rename; across file systems copy, and rename then."""
    try:
        os.rename(source, target)
    except OSError as error:
        if error.errno != errno.EXDEV:
            raise
        head, tail = os.path.split(target)
        half = os.path.join(head, f".{tail}-half")
        shutil.rmtree(half, ignore_errors=True)
        copy = shutil.copytree if os.path.isdir(source) else shutil.copy2
        copy(source, half)
        os.rename(half, target)


# ------------------------------------------------------------------------------------------------- downloads


def _get_file(download: Download, source: Source, root: str, folder: str) -> str:
    """A file that is whole, as far as its checksum or its content can tell: its path in ``folder``.

    One that lies there under its name, from an earlier call or put there by hand, is taken.
    """
    os.makedirs(folder, exist_ok=True)
    path, origin = os.path.join(folder, download.file), download.page
    if download.copy and os.path.isfile(os.path.join(root, download.copy)):
        origin = os.path.join(root, download.copy)
        shutil.copyfile(origin, path)
    elif not os.path.isfile(path):
        print(f"{download.file}{f', {download.size},' if download.size else ''} from {origin}", flush=True)
        if download.drive:
            _from_drive_or_open_clip(download, source, root, path)
        else:
            _from_url(download, path)
    try:
        _verify(download, path, source)
    except (UserError, ValueError, AttributeError) as error:
        os.remove(path)
        raise UserError(f"{download.file} from {origin}: {one_line(error)}; it was deleted") from error
    return path


def _from_url(download: Download, path: str) -> None:
    half = f"{path}.part"
    if shutil.which("curl"):
        words = ["curl", "--fail", "--location", "--retry", "3", "--continue-at", "-", "--output", half, download.url]
        words[1:1] = ["--progress-bar"] if sys.stderr.isatty() else ["--silent", "--show-error"]
        status = subprocess.run(words).returncode
        if status == NO_RANGES:
            os.remove(half)
            status = subprocess.run(words).returncode
        if status:
            raise UserError(
                f"{download.url}: curl failed (status {status}); what is there of it is kept, call again to go on"
            )
    else:
        if os.path.exists(half):
            os.remove(half)  # torchvision would take it for the whole
        try:
            download_url(download.url, os.path.dirname(half), os.path.basename(half))
        except (OSError, RuntimeError) as error:
            raise UserError(
                f"{download.url}: not to be had ({one_line(error)}); call again, with curl installed it would go on"
            ) from error
    os.rename(half, path)


def _from_drive_or_open_clip(download: Download, source: Source, root: str, path: str) -> None:
    try:
        _from_drive(download, path, os.path.join(root, source.folder))
    except UserError as error:
        if not _write_classnames(download, root, path):
            raise
        print(
            f"{error}\nUntil then there are open_clip's class names, which may differ from CoOp's in a few places; to "
            f"get CoOp's, delete {os.path.join(root, source.folder, download.file)} and call again"
        )


def _from_drive(download: Download, path: str, folder: str) -> None:
    by_hand = f"or get {download.page} with a browser, into {os.path.dirname(path)}/ as {download.file}, and call again"
    if not download.file.endswith(ARCHIVES):
        by_hand = f"or put {download.page} into {folder}/ as {download.file} with a browser"
    try:
        import gdown
    except ImportError as error:
        raise UserError(f"{download.file} is on Google Drive: pip install gdown, {by_hand}") from error
    try:
        done = gdown.download(id=download.drive, output=path, quiet=not sys.stderr.isatty(), resume=True)
    except Exception as error:  # noqa: BLE001 (requests', gdown's own, which are no OSErrors, and others)
        raise UserError(
            f"{download.file}: Google Drive does not give it ({one_line(error)}); try again, {by_hand}"
        ) from error
    if not done or not os.path.isfile(path):  # older versions of gdown print why
        raise UserError(f"{download.file}: Google Drive does not give it; try again, {by_hand}")


def one_line(error: BaseException) -> str:
    """What an error says, in at most 200 characters."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 200 else f"{text[:199]}…"


# ------------------------------------------------------------------------------------------------- checks


def _verify(download: Download, path: str, source: Source) -> None:
    """Raises UserError, ValueError or AttributeError where a file is not what it should be."""
    if download.checksum:
        kind, _, wanted = download.checksum.partition(":")
        digest = hashlib.new(kind)
        with open(path, "rb") as file:
            for block in iter(lambda: file.read(1 << 20), b""):
                digest.update(block)
        if digest.hexdigest() != wanted:
            raise ValueError(
                f"its {kind} is {digest.hexdigest()}, and {wanted} is published: damaged on the way (call again) or "
                "replaced by its owner (DATASETS.md)"
            )
    check = CONTENTS.get("split" if download.file.startswith("split_") else download.file)
    if check:
        check(path, source)


def _check_split(path: str, source: Source) -> None:
    found = {part: len(entries) for part, entries in read_split(path).items()}
    if found != source.counts:
        raise ValueError(f"{found} images, CoOp's split has {source.counts}")


def _check_flower_names(path: str, source: Source) -> None:
    names = read_json(path)
    if not {str(label) for label in range(1, source.classes + 1)} <= names.keys():
        raise ValueError(f"no names of {source.classes} classes")


def _check_classnames(path: str, source: Source) -> None:
    names = read_classnames(path)
    if len(names) != IMAGENET_CLASSES or not all(re.fullmatch(r"n\d{8}", wnid) and n for wnid, n in names.items()):
        raise ValueError(f"no class names of {IMAGENET_CLASSES} folders n01440764 …")


CONTENTS: dict[str, Callable[[str, Source], None]] = {
    "split": _check_split,
    "cat_to_name.json": _check_flower_names,
    "classnames.txt": _check_classnames,
}


def _write_classnames(download: Download, root: str, path: str) -> bool:
    """ImageNet's class names from open_clip, which has them in the order of the sorted folders. False: not possible."""
    train = os.path.join(root, "imagenet", "images", "train")
    if download.file != "classnames.txt" or download.copy or not os.path.isdir(train):
        return False
    from open_clip import IMAGENET_CLASSNAMES

    folders = sorted(name for name in os.listdir(train) if re.fullmatch(r"n\d{8}", name))
    if len(folders) != IMAGENET_CLASSES:
        return False
    write_text(path, "".join(f"{wnid} {name}\n" for wnid, name in zip(folders, IMAGENET_CLASSNAMES)))
    return True


# ------------------------------------------------------------------------------------------------- archives


def _unpack_to(path: str, folder: str, inner: str) -> None:
    """Unpack an archive, and the one inside it, into a folder that is there when all is. A damaged one is deleted."""
    half = f"{folder}.part"
    shutil.rmtree(half, ignore_errors=True)
    try:
        unpack(path, half)
        if inner:
            nested = [os.path.join(found, inner) for found, _, names in os.walk(half) if inner in names]
            if not nested:
                raise UserError(f"{path}: no {inner} in it; it was deleted, call again")
            unpack(nested[0], f"{half}.inner")
            shutil.rmtree(half)
            os.rename(f"{half}.inner", half)
    except UserError:
        os.remove(path)
        raise
    os.rename(half, folder)


def _without_links(member: tarfile.TarInfo, folder: str) -> tarfile.TarInfo:
    """tarfile's ``data`` filter, and no symbolic links at all: they have led it astray (CVE-2025-4517)."""
    if member.issym():
        raise tarfile.TarError(f"{member.name} is a symbolic link")
    return tarfile.data_filter(member, folder)


def unpack(path: str, folder: str) -> None:
    """Unpack a zip or tar archive, whatever it is compressed with, into a new folder, which nothing can leave.

    Raises:
        UserError: it is damaged, or wants to write outside of the folder.
    """
    os.makedirs(folder)
    bar: dict[str, Any] = {"desc": f"unpacking {os.path.basename(path)}", "disable": not sys.stderr.isatty()}
    try:
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                for info in tqdm(archive.infolist(), unit=" files", **bar):
                    name = info.filename.replace("\\", "/")
                    if name.startswith("/") or ".." in name.split("/") or re.match("[A-Za-z]:", name):
                        raise zipfile.BadZipFile(f"{info.filename} leads out of it")
                    archive.extract(info, folder)
        else:
            size = os.path.getsize(path)
            with (
                open(path, "rb") as raw,
                tqdm.wrapattr(raw, "read", total=size, **bar) as file,
                tarfile.open(fileobj=file) as archive,
            ):
                archive.extractall(folder, filter=_without_links)
                while archive.fileobj.read(1 << 20):
                    pass  # to the end, where gzip has its checksum
    except DAMAGED as error:
        raise UserError(f"{path}: cannot be unpacked ({one_line(error)}); it was deleted, call again") from error

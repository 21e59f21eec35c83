"""Download the missing parts of a data set into a hidden staging folder and move them into place once complete."""

from __future__ import annotations

import gzip
import lzma
import os
import re
import shutil
import sys
import tarfile
import zipfile
import zlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Optional

import pooch
import yaml
from filelock import FileLock, Timeout

from datasets.imagenet import read_classnames
from datasets.splits import read_json, read_split
from trainers.prompting.errors import UserError
from trainers.prompting.results import write_text

STAGING = ".prepare"
ARCHIVES = (".tar", ".tar.gz", ".tgz", ".zip")
IMAGENET_CLASSES = 1000
DAMAGED = (tarfile.TarError, zipfile.BadZipFile, gzip.BadGzipFile, lzma.LZMAError, zlib.error, EOFError)


@dataclass(frozen=True)
class Download:
    """A file to download; the fields are explained in ``sources.yaml``."""

    file: str
    url: str = ""
    drive: str = ""
    parts: tuple[str, ...] = ()
    hash: Optional[str] = None
    size: str = ""
    inner: str = ""
    renamed: dict[str, str] = field(default_factory=dict)
    copy: str = ""

    @property
    def page(self) -> str:
        """Address for a browser."""
        return self.url or f"https://drive.google.com/file/d/{self.drive}/view"


@dataclass(frozen=True)
class Source:
    """A data set; the fields are explained in ``sources.yaml``."""

    folder: str
    classes: int
    counts: dict[str, int]
    images: tuple[str, ...] = ()
    names: str = ""
    raw: tuple[str, ...] = ()
    downloads: tuple[Download, ...] = ()
    manual: str = ""

    @property
    def parts(self) -> tuple[str, ...]:
        return (*self.images, *self.raw, *filter(None, [self.names]))

    def download_of(self, part: str) -> Optional[Download]:
        """Return the download that brings a part, if any."""
        return next((download for download in self.downloads if part in download.parts), None)

    def missing(self, root: str) -> list[str]:
        """Return the parts that a data root lacks. Annotations are not needed next to CoOp's split."""
        folder = os.path.join(root, self.folder)
        needed = {*self.images, self.names}
        if not self.names:
            needed |= set(self.raw)
        elif not exists(folder, self.names):
            needed |= {part for part in self.raw if self.download_of(part)}
        return [part for part in self.parts if part in needed and not exists(folder, part)]


def _load_sources() -> dict[str, Source]:
    sources = {}
    for name, facts in yaml.safe_load(Path(__file__).with_name("sources.yaml").read_text(encoding="utf-8")).items():
        files = facts.pop("downloads", {}).items()
        downloads = tuple(Download(file, **{"parts": (file,), **values}) for file, values in files)
        sources[name] = Source(downloads=downloads, **facts)
    return sources


SOURCES = _load_sources()


def exists(folder: str, part: str) -> bool:
    """Return whether a file, or a folder that is not empty, exists."""
    path = os.path.join(folder, part)
    return bool(os.listdir(path)) if os.path.isdir(path) else os.path.isfile(path)


def fetch(source: Source, root: str) -> None:
    """Get the missing parts of a data set. Its folder appears when complete; what exists is not touched.

    Raises:
        UserError: something cannot be downloaded; complete files stay in the staging folder for the next call.
    """
    if not hasattr(tarfile, "data_filter"):
        raise UserError("this Python cannot unpack archives safely; use 3.9.17, 3.10.12, 3.11.4, 3.12 or newer")
    folder = os.path.join(root, source.folder)
    if os.path.islink(folder) and not os.path.isdir(folder):
        raise UserError(f"{folder}: the target of this link does not exist; create it or remove the link")
    parent, name = os.path.split(os.path.realpath(folder))  # next to a link's target, on the disk that has the space
    staging = os.path.join(parent, STAGING, name)
    tree, downloads = os.path.join(staging, "tree"), os.path.join(staging, "downloads")
    os.makedirs(staging, exist_ok=True)
    try:
        with FileLock(f"{staging}.lock", timeout=0):
            for path in (tree, downloads):
                os.makedirs(path, exist_ok=True)
            for download in source.downloads:
                missing = [p for p in source.missing(root) if p in download.parts and not exists(tree, p)]
                if missing:
                    _fetch_parts(download, source, root, staging, missing)
            _place(tree, folder)
            shutil.rmtree(staging)
    except Timeout as error:
        raise UserError(f"{staging}: another process is downloading this data set; wait for it") from error
    if all(entry.endswith(".lock") for entry in os.listdir(os.path.dirname(staging))):
        shutil.rmtree(os.path.dirname(staging), ignore_errors=True)


def _fetch_parts(download: Download, source: Source, root: str, staging: str, missing: list[str]) -> None:
    """Download a file and move it, or what its archive holds, into ``staging/tree``."""
    tree = os.path.join(staging, "tree")
    path = _download(download, source, root, os.path.join(staging, "downloads"))
    if not path.endswith(ARCHIVES):
        os.rename(path, os.path.join(tree, download.file))
        return
    unpacked = os.path.join(staging, "unpacked")
    shutil.rmtree(unpacked, ignore_errors=True)
    try:
        unpack(path, unpacked)
        if download.inner:
            unpack(
                os.path.join(_folder_with(unpacked, [download.inner], download), download.inner), f"{unpacked}/inner"
            )
            unpacked = f"{unpacked}/inner"
        theirs = {ours: name for name, ours in download.renamed.items()}
        base = _folder_with(unpacked, [theirs.get(part, part) for part in missing], download)
    except UserError:
        os.remove(path)
        raise
    ours = {
        name: download.renamed.get(name, name) for name in os.listdir(base) if not name.startswith((".", "__MACOSX"))
    }
    for name in sorted(ours, key=lambda name: ours[name] in download.parts):  # parts last: they mark completion
        if not os.path.exists(os.path.join(tree, ours[name])):
            os.rename(os.path.join(base, name), os.path.join(tree, ours[name]))
    shutil.rmtree(os.path.join(staging, "unpacked"))
    os.remove(path)


def _folder_with(folder: str, parts: list[str], download: Download) -> str:
    """Return the first folder, from the top, that has all parts. Raises UserError."""
    for path, below, _ in os.walk(folder):
        below.sort()
        if all(exists(path, part) for part in parts):
            return path
    found = ", ".join(sorted(os.listdir(folder))[:5])
    raise UserError(
        f"{download.page}: no {' and '.join(parts)} in it, but {found}; its layout has changed (docs/data.md)"
    )


def _place(tree: str, folder: str) -> None:
    """Move what is complete into place; the folder as a whole where it does not exist yet."""
    if not os.path.exists(folder):
        return os.rename(tree, folder)
    for name in sorted(os.listdir(tree)):
        target = os.path.join(folder, name)
        if os.path.isdir(target) and not os.path.islink(target) and not os.listdir(target):
            os.rmdir(target)
        if not os.path.lexists(target):
            os.rename(os.path.join(tree, name), target)
        elif not exists(folder, name):
            raise UserError(f"{target}: a link to something empty or missing; remove it and call again")


# ------------------------------------------------------------------------------------------------- downloads


def _download(download: Download, source: Source, root: str, folder: str) -> str:
    """Return the path of a verified file in ``folder``; one that a person put there is used."""
    for name in os.listdir(folder):
        if name.startswith("tmp"):  # a killed process left pooch's temporary file
            os.remove(os.path.join(folder, name))
    path, origin = os.path.join(folder, download.file), download.page
    if download.copy and os.path.isfile(os.path.join(root, download.copy)):
        origin = os.path.join(root, download.copy)
        shutil.copyfile(origin, path)
    elif download.url or not os.path.isfile(path):
        print(f"{download.file}{f', {download.size},' if download.size else ''} from {origin}", flush=True)
        (_from_url if download.url else _from_drive)(download, source, root, path)
    try:
        _check_content(download.file, path, source)
    except (UserError, ValueError, AttributeError) as error:
        os.remove(path)
        raise UserError(f"{download.file} from {origin}: {one_line(error)}; it was deleted") from error
    return path


def _from_url(download: Download, source: Source, root: str, path: str) -> None:
    """Download with pooch, which checks the hash. Archives that Oxford labels as encoded must not be decoded."""
    pooch.get_logger().setLevel("WARNING")
    downloader = pooch.HTTPDownloader(
        progressbar=sys.stderr.isatty(),
        headers={"Accept-Encoding": "identity"},
        hooks={"response": lambda response, **_: response.raw.headers.pop("Content-Encoding", None) and None},
    )
    folder, name = os.path.split(path)
    try:
        pooch.retrieve(download.url, download.hash, fname=name, path=folder, downloader=downloader)
    except (OSError, ValueError) as error:  # requests' errors are OSErrors
        raise UserError(f"{download.url}: download failed ({one_line(error)}); call again") from error


def _from_drive(download: Download, source: Source, root: str, path: str) -> None:
    """Download with gdown, which resumes. ImageNet's class names can be had from open_clip instead."""
    folder = os.path.join(root, source.folder)
    target = f"{os.path.dirname(path)}/" if download.file.endswith(ARCHIVES) else f"{folder}/"
    by_hand = f"or get {download.page} with a browser, put it into {target} as {download.file} and call again"
    try:
        import gdown

        done = gdown.download(id=download.drive, output=path, quiet=not sys.stderr.isatty(), resume=True)
        failure = "" if done and os.path.isfile(path) else "Google Drive refuses it; try again"
    except ImportError:
        failure = "it is on Google Drive: pip install gdown"
    except Exception as error:  # noqa: BLE001 (gdown's errors are not OSErrors)
        failure = f"Google Drive refuses it ({one_line(error)}); try again"
    if failure and not _write_classnames(download, root, path):
        raise UserError(f"{download.file}: {failure}, {by_hand}")
    if failure:
        print(
            f"{download.file}: {failure}. Until then open_clip's class names are used, of which a few may differ from "
            f"CoOp's; to get CoOp's, delete {os.path.join(folder, download.file)} and call again"
        )


def _write_classnames(download: Download, root: str, path: str) -> bool:
    """Write open_clip's names of ImageNet's classes, which are in the order of the folders; False where impossible."""
    train = os.path.join(root, "imagenet", "images", "train")
    if download.file != "classnames.txt" or download.copy or not os.path.isdir(train):
        return False
    from open_clip import IMAGENET_CLASSNAMES

    folders = sorted(name for name in os.listdir(train) if re.fullmatch(r"n\d{8}", name))
    if len(folders) == IMAGENET_CLASSES:
        write_text(path, "".join(f"{wnid} {name}\n" for wnid, name in zip(folders, IMAGENET_CLASSNAMES)))
    return len(folders) == IMAGENET_CLASSES


def one_line(error: BaseException) -> str:
    """Return what an error says, in at most 300 characters."""
    return (" ".join(str(error).split()) or type(error).__name__)[:300]


def _check_content(name: str, path: str, source: Source) -> None:
    """Check files that have no published checksum. Raises UserError, ValueError or AttributeError."""
    if name.startswith("split_"):
        found = {part: len(entries) for part, entries in read_split(path).items()}
        if found != source.counts:
            raise ValueError(f"{found} images, but CoOp's split has {source.counts}")
    elif name == "cat_to_name.json":
        if not {str(label) for label in range(1, source.classes + 1)} <= read_json(path).keys():
            raise ValueError(f"it does not name {source.classes} classes")
    elif name == "classnames.txt":
        names = read_classnames(path)
        if len(names) != IMAGENET_CLASSES or not all(re.fullmatch(r"n\d{8}", wnid) and n for wnid, n in names.items()):
            raise ValueError(f"it does not name {IMAGENET_CLASSES} folders n01440764 …")


# ------------------------------------------------------------------------------------------------- archives


def _refuse_links(member: tarfile.TarInfo, folder: str) -> tarfile.TarInfo:
    """Python's ``data`` filter, without symbolic links, which have misled it (CVE-2025-4517)."""
    if member.issym():
        raise tarfile.TarError(f"{member.name} is a symbolic link")
    return tarfile.data_filter(member, folder)


def unpack(path: str, folder: str) -> None:
    """Unpack a zip or tar archive into a new folder. pooch's Untar is unsafe before Python 3.12.

    Raises:
        UserError: it is damaged or has members outside the folder.
    """
    os.makedirs(folder)
    print(f"unpacking {os.path.basename(path)}", flush=True)
    try:
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                for info in archive.infolist():
                    name = info.filename.replace("\\", "/")
                    if name.startswith("/") or ".." in name.split("/") or re.match("[A-Za-z]:", name):
                        raise zipfile.BadZipFile(f"{info.filename} is outside the archive")
                archive.extractall(folder)
        else:
            with tarfile.open(path) as archive:
                archive.extractall(folder, filter=_refuse_links)
                while archive.fileobj.read(1 << 20):
                    pass  # to the end, where gzip has its checksum
    except DAMAGED as error:
        raise UserError(f"{path}: cannot be unpacked ({one_line(error)}); it was deleted, call again") from error

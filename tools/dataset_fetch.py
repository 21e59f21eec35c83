"""Download the missing parts of a data set into a hidden staging folder and move each into place once complete."""

from __future__ import annotations

import os
import re
import shutil
import sys
import tarfile
import zipfile
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Optional

import pooch
import yaml
from filelock import FileLock, Timeout

from datasets.imagenet import CLASSNAMES, read_classnames
from datasets.splits import read_split
from trainers.prompting.errors import UserError

ARCHIVES = (".tar", ".tar.gz", ".tgz", ".zip")
IMAGENET_CLASSES = 1000


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

    @property
    def page(self) -> str:
        return self.url or f"https://drive.google.com/file/d/{self.drive}/view"


@dataclass(frozen=True)
class Source:
    """A data set; the fields are explained in ``sources.yaml``."""

    folder: str
    classes: int
    counts: dict[str, int]
    images: tuple[str, ...] = ()  # files or folders that must exist
    names: str = ""  # CoOp's split or the file of class names, which must exist too
    downloads: tuple[Download, ...] = ()
    manual: str = ""

    @property
    def parts(self) -> tuple[str, ...]:
        return (*self.images, self.names) if self.names else tuple(self.images)

    def download_of(self, part: str) -> Optional[Download]:
        return next((download for download in self.downloads if part in download.parts), None)

    def missing(self, root: str) -> list[str]:
        return [part for part in self.parts if not exists(os.path.join(root, self.folder), part)]


SOURCES = {}
for _name, _facts in yaml.safe_load(Path(__file__).with_name("sources.yaml").read_text(encoding="utf-8")).items():
    _files = [Download(file, **{"parts": (file,), **facts}) for file, facts in _facts.pop("downloads").items()]
    _found = {
        "folder": _name,
        "images": tuple(part for download in _files for part in download.parts if part != download.file),
        "names": next((download.file for download in _files if download.parts == (download.file,)), ""),
    }
    SOURCES[_name] = Source(**{**_found, **_facts}, downloads=tuple(_files))


def exists(folder: str, part: str) -> bool:
    """Return whether a file, or a folder that is not empty, exists."""
    path = os.path.join(folder, part)
    return bool(os.listdir(path)) if os.path.isdir(path) else os.path.isfile(path)


def fetch(source: Source, root: str) -> None:
    """Get the missing parts of a data set; what exists is not touched. Raises UserError where a download fails."""
    if not hasattr(tarfile, "data_filter"):
        raise UserError("this Python cannot unpack archives safely; use 3.9.17, 3.10.12, 3.11.4, 3.12 or newer")
    folder = os.path.realpath(os.path.join(root, source.folder))  # a link's target, on the disk that has the space
    staging = os.path.join(os.path.dirname(folder), ".prepare", source.folder)
    os.makedirs(staging, exist_ok=True)
    try:
        with FileLock(os.path.join(staging, ".lock"), timeout=0):
            for download in source.downloads:
                if missing := [part for part in source.missing(root) if part in download.parts]:
                    os.makedirs(folder, exist_ok=True)
                    path = os.path.join(staging, download.file)
                    _download(download, source, root, path)
                    _move_parts(download, path, folder, missing)
            shutil.rmtree(staging)
    except Timeout as error:
        raise UserError(f"{staging}: another process is downloading this data set; wait for it") from error
    with suppress(OSError):  # other data sets are being downloaded
        os.rmdir(os.path.dirname(staging))


def copied(download: Download, root: str) -> str:
    """Return the path of ImageNet's class names where they can be copied, or nothing."""
    path = os.path.join(root, "imagenet", CLASSNAMES)
    return path if download.file == CLASSNAMES and os.path.isfile(path) else ""


def _download(download: Download, source: Source, root: str, path: str) -> None:
    """Make a verified file; one that a person put there is used."""
    origin = copied(download, root) or download.page
    try:
        if origin != download.page:
            shutil.copyfile(origin, path)
        else:
            print(f"{download.file}{f', {download.size},' if download.size else ''} from {origin}", flush=True)
            pooch.get_logger().setLevel("WARNING")
            folder, name = os.path.split(path)
            pooch.retrieve(origin, download.hash, name, folder, downloader=_transfer)
    except Exception as error:  # noqa: BLE001 (those of requests, pooch and gdown)
        hint = "call again" if download.url else f"try again with gdown installed, or get it with a browser as {path}"
        raise UserError(f"{origin}: download failed ({one_line(error)}); {hint}") from error
    try:
        _check_content(download.file, path, source)
    except (UserError, ValueError) as error:
        os.remove(path)
        raise UserError(f"{download.file} from {origin}: {one_line(error)}; it was deleted") from error


def _transfer(url: str, output: str, _: Any) -> None:
    """Download with gdown or pooch. Archives that Oxford labels as encoded must not be decoded."""
    if url.startswith("https://drive.google.com/"):
        import gdown

        return gdown.download(id=url.split("/")[-2], output=str(output), quiet=not sys.stderr.isatty())
    keep = {"response": lambda response, **_: response.raw.headers.pop("Content-Encoding", None) and None}
    headers = {"Accept-Encoding": "identity"}
    pooch.HTTPDownloader(progressbar=sys.stderr.isatty(), headers=headers, hooks=keep)(url, output, None)


def _check_content(name: str, path: str, source: Source) -> None:
    """Check files that have no published checksum. Raises UserError or ValueError."""
    good = True
    if name.startswith("split_"):
        good = {part: len(entries) for part, entries in read_split(path).items()} == source.counts
    elif name == CLASSNAMES:
        names = read_classnames(path).items()
        good = len(names) == IMAGENET_CLASSES and all(re.fullmatch(r"n\d{8}", key) and name for key, name in names)
    if not good:
        raise ValueError("its classes or images are not as many as CoOp's")


def _move_parts(download: Download, path: str, folder: str, missing: list[str]) -> None:
    """Move a file, or the missing parts that an archive holds, into the data set's folder."""
    if not path.endswith(ARCHIVES):
        return os.rename(path, os.path.join(folder, download.file))
    unpacked = os.path.join(os.path.dirname(path), "unpacked")
    shutil.rmtree(unpacked, ignore_errors=True)
    try:
        unpack(path, base := unpacked)
        if download.inner:
            archive = os.path.join(_folder_with(unpacked, [download.inner], download), download.inner)
            unpack(archive, base := f"{unpacked}/inner")
        theirs = {part: download.renamed.get(part, part) for part in missing}
        base = _folder_with(base, list(theirs.values()), download)
    except UserError:
        os.remove(path)
        raise
    for part in missing:
        os.rename(os.path.join(base, theirs[part]), os.path.join(folder, part))
    shutil.rmtree(unpacked)
    os.remove(path)


def _folder_with(folder: str, parts: list[str], download: Download) -> str:
    """Return the first folder, from the top, that has all parts. Raises UserError."""
    for path, _, _ in os.walk(folder):
        if all(exists(path, part) for part in parts):
            return path
    content = ", ".join(sorted(os.listdir(folder))[:5])
    raise UserError(f"{download.page}: no {' and '.join(parts)}, but {content}; its layout has changed (docs/data.md)")


def unpack(path: str, folder: str) -> None:
    """Unpack a zip or tar archive into a new folder; UserError for damage, links and members outside the folder."""

    def refuse_links(member: tarfile.TarInfo, folder: str) -> tarfile.TarInfo:
        if member.issym():  # they have misled Python's filter (CVE-2025-4517)
            raise tarfile.TarError(f"{member.name} is a symbolic link")
        return tarfile.data_filter(member, folder)

    os.makedirs(folder)
    print(f"unpacking {os.path.basename(path)}", flush=True)
    try:
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                for name in archive.namelist():
                    if re.match(r"[/\\]|[A-Za-z]:", name) or ".." in re.split(r"[/\\]", name):
                        raise zipfile.BadZipFile(f"{name} is outside the archive")
                    archive.extract(name, folder)
        else:  # not pooch's Untar, which is unsafe before Python 3.12
            with tarfile.open(path) as archive:
                archive.extractall(folder, filter=refuse_links)
                while archive.fileobj.read(1 << 20):
                    pass  # to the end, where gzip has its checksum
    except Exception as error:
        if isinstance(error, OSError) and error.errno:  # such as a full disk
            raise
        raise UserError(f"{path}: cannot be unpacked ({one_line(error)}); it was deleted, call again") from error


def one_line(error: BaseException) -> str:
    """Return what an error says, in at most 300 characters."""
    return (" ".join(str(error).split()) or type(error).__name__)[:300]

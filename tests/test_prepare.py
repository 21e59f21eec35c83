"""tools/prepare.py: downloads from a server of this process, in the layouts of the real archives, and --check."""

import contextlib
import dataclasses
import hashlib
import http.server
import io
import json
import os
import re
import shutil
import sys
import tarfile
import threading
import types
import zipfile
from pathlib import Path

import pytest
import trees
from PIL import Image
from test_datasets import build, found

import dataset_check
import dataset_fetch
import dataset_sources
import prepare

SOURCES = dict(dataset_sources.SOURCES)  # the real ones
CURL = shutil.which("curl")


# ------------------------------------------------------------------------------------------------- a little internet


class Handler(http.server.BaseHTTPRequestHandler):
    """Serves ``server.files`` with ranges; of those in ``server.broken`` only as many bytes, then it hangs up."""

    def do_HEAD(self):
        self.do_GET(head=True)

    def do_GET(self, head=False):
        name = self.path.rpartition("/")[2]
        if name not in self.server.files:
            return self.send_error(404)
        content = self.server.files[name]
        start = int(re.match(r"bytes=(\d+)-", self.headers.get("Range", "bytes=0-"))[1])
        if start and not self.server.ranges:
            start = 0
        self.send_response(206 if start else 200)
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        self.send_header("Content-Length", str(len(content) - start))
        if name.endswith("gz"):
            self.send_header("Content-Encoding", "x-gzip")  # as Apache does; it must not be unpacked
        self.end_headers()
        if not head:
            self.server.log.append((name, start))
            self.wfile.write(content[start : self.server.broken.pop(name, None)])

    def log_message(self, *args):
        pass


class Internet:
    """An HTTP server, a stand-in for gdown, and sources that point at both."""

    def __init__(self, monkeypatch):
        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.files, self.server.broken, self.server.log, self.server.ranges = {}, {}, [], True
        self.drive, self.asked, self.fail = {}, [], set()  # content by id; ids asked for; ids that break
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        self.monkeypatch = monkeypatch
        threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True).start()
        monkeypatch.setitem(sys.modules, "gdown", types.SimpleNamespace(download=self.gdown))
        monkeypatch.setattr(dataset_fetch, "IMAGENET_CLASSES", len(trees.WNIDS))

    def gdown(self, id, output, quiet, resume):  # noqa: A002 (gdown's)
        assert resume
        self.asked.append(id)
        half = Path(f"{output}abcdefgh.part")
        done = half.stat().st_size if half.exists() else 0
        content = self.drive[id]
        with half.open("ab") as file:
            file.write(content[done : len(content) // 2 if id in self.fail else None])
        if id in self.fail:
            raise ConnectionError("Too many users have\n\tviewed this file")
        half.rename(output)
        return output

    def offer(self, config, tree, contents):
        """Point a data set's source at files: ``{name of the download: its bytes}``."""
        source = SOURCES[config]
        downloads = []
        for download in source.downloads:
            content = contents.get(download.file)
            if content is None:
                continue
            if download.drive:
                self.drive[download.drive] = content
            else:
                self.server.files[download.file] = content
                algorithm = download.checksum.partition(":")[0]
                checksum = f"{algorithm}:{hashlib.new(algorithm, content).hexdigest()}" if algorithm else ""
                download = dataclasses.replace(download, url=f"{self.url}/{download.file}", checksum=checksum)
            downloads.append(download)
        counts = {part: len(rows) for part, rows in tree.split.items() if part in source.counts}
        fake = dataclasses.replace(source, downloads=tuple(downloads), classes=len(tree.classnames), counts=counts)
        self.monkeypatch.setitem(dataset_sources.SOURCES, config, fake)
        return fake


@pytest.fixture
def internet(monkeypatch):
    internet = Internet(monkeypatch)
    yield internet
    internet.server.shutdown()
    internet.server.server_close()


@pytest.fixture(params=["curl", "torchvision"])
def client(request, monkeypatch):
    """Either of the two that fetch from plain URLs."""
    if request.param == "curl" and not CURL:
        pytest.skip("no curl")
    monkeypatch.setattr(dataset_fetch.shutil, "which", lambda name: CURL if request.param == "curl" else None)
    return request.param


def tar(folder, names, under="", mode="w:gz"):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode=mode) as archive:
        for name in names:
            archive.add(folder / name, f"{under}{name}")
    return buffer.getvalue()


def zipped(folder, names, under="", extra=()):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for path in sorted(path for name in names for path in [folder / name, *(folder / name).rglob("*")]):
            archive.write(path, f"{under}{path.relative_to(folder)}")
        for name, content in extra:
            archive.writestr(name, content)
    return buffer.getvalue()


def archives(make, root):
    """A miniature of a data set, and its downloads with the layouts of the real ones."""
    tree = make(root)
    folder = root / tree.folder
    cls, cfg = dataset_check.dataset_class(tree.config, str(root))
    tree.split = cls.survey(cfg)[1]  # what CoOp's file stands for
    split = json.dumps(tree.split).encode()
    names = (root / tree.folder / "classnames.txt").read_bytes() if "classnames.txt" in tree.raw else b""
    own = {
        "caltech101": lambda: {
            "caltech-101.zip": zipped(
                folder,
                (),
                extra=(
                    ("caltech-101/101_ObjectCategories.tar.gz", tar(folder, ["101_ObjectCategories"])),
                    ("caltech-101/Annotations.tar", b"outlines"),
                    ("__MACOSX/._caltech-101", b""),
                ),
            )
        },
        "oxford_pets": lambda: {f"{name}.tar.gz": tar(folder, [name]) for name in ("images", "annotations")},
        "oxford_flowers": lambda: {
            "102flowers.tgz": tar(folder, ["jpg"]),
            **{name: (folder / name).read_bytes() for name in ("imagelabels.mat", "cat_to_name.json")},
        },
        "food101": lambda: {"food-101.tar.gz": tar(root, ["food-101"])},
        "fgvc_aircraft": lambda: {
            "fgvc-aircraft-2013b.tar.gz": tar(folder, os.listdir(folder), "fgvc-aircraft-2013b/data/")
        },
        "sun397": lambda: {"SUN397.tar.gz": tar(folder, ["SUN397"]), "Partitions.zip": zipped(folder, tree.raw)},
        "dtd": lambda: {"dtd-r1.0.1.tar.gz": tar(root, ["dtd"])},
        "eurosat": lambda: {"EuroSAT.zip": zipped(folder, ["2750"])},
        "ucf101": lambda: {"UCF-101-midframes.zip": zipped(folder, ["UCF-101-midframes"])},
        "stanford_cars": dict,
        "imagenet": dict,
        # of this name and not compressed, as it is on the Hub
        "imagenetv2": lambda: {"imagenetv2-matched-frequency.tar.gz": tar(folder, [tree.images], mode="w")},
        "imagenet_sketch": lambda: {
            "ImageNet-Sketch.zip": zipped(shutil.copytree(folder / "images", root / "x" / "sketch").parent, ["sketch"])
        },
        "imagenet_a": lambda: {"imagenet-a.tar": tar(folder, ["imagenet-a"], mode="w")},
        "imagenet_r": lambda: {"imagenet-r.tar": tar(folder, ["imagenet-r"], mode="w")},
    }[tree.config]()
    return tree, {tree.split_file: split, "classnames.txt": names, **own}


def run(*words):
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        status = prepare.main([str(word) for word in words])
    return status, out.getvalue(), err.getvalue()


def snapshot(folder):
    """Content and time of everything in a folder."""
    return {
        str(path.relative_to(folder)): (path.read_bytes() if path.is_file() else None, path.stat().st_mtime_ns)
        for path in sorted(Path(folder).rglob("*"))
    }


def snapshot_names(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


BY_HAND = (trees.stanford_cars, trees.imagenet)
FETCHED = [make for make in trees.ALL if make not in BY_HAND]


def name_of(make):
    return make.__name__


# ------------------------------------------------------------------------------------------------- facts


@pytest.mark.parametrize("make", trees.ALL, ids=name_of)
def test_sources_name_what_the_data_sets_read(make, tmp_path):
    """Folders, split files and annotations are those that datasets/ asks for."""
    tree = make(tmp_path)
    source = SOURCES[tree.config]
    assert source.folder == tree.folder
    assert all(part.startswith(tree.images) for part in source.images)
    assert set(source.parts) >= {name.split("/")[0] for name in tree.raw if not name.startswith("ucf")}
    cls, _ = dataset_check.dataset_class(tree.config, str(tmp_path))
    assert cls.dataset_dir == source.folder and (source.names or "") == getattr(cls, "split_file", source.names)
    assert all((tmp_path / tree.folder / part).exists() for part in (*source.images, *source.raw))


def test_urls_and_checksums_are_torchvision_s():
    """What torchvision fetches too is fetched from where it does, with its checksum."""
    import inspect

    import torchvision.datasets as tv

    classes = {"caltech101": tv.Caltech101, "oxford_pets": tv.OxfordIIITPet, "oxford_flowers": tv.Flowers102}
    classes.update(food101=tv.Food101, fgvc_aircraft=tv.FGVCAircraft, sun397=tv.SUN397, dtd=tv.DTD, eurosat=tv.EuroSAT)
    checked = 0
    for name, cls in classes.items():
        text = inspect.getsource(cls)
        for download in SOURCES[name].downloads:
            if download.checksum.startswith("md5:"):
                assert download.checksum[4:] in text, download
                assert download.url in text or download.file in text and "{" not in download.url, download
                checked += 1
    assert checked == 9


def test_counts_add_up():
    """Against what is known of the raw data sets."""
    totals = {"oxford_pets": 7349, "oxford_flowers": 8189, "food101": 101_000, "fgvc_aircraft": 10_000, "dtd": 47 * 120}
    totals.update(caltech101=8242, stanford_cars=16_185, sun397=397 * 100, eurosat=27_000, ucf101=13_320)
    for name, total in totals.items():
        assert sum(SOURCES[name].counts.values()) == total, name
    configs = {path.stem for path in dataset_check.CONFIGS.iterdir()}
    assert configs == {*SOURCES, *prepare.DRAWN, prepare.OWN} and len(SOURCES) == 15


def test_drive_ids_are_all_different():
    ids = [d.drive for source in SOURCES.values() for d in source.downloads if d.drive and d.file != "classnames.txt"]
    assert len(ids) == len(set(ids)) == 11 and all(re.fullmatch(r"[\w-]{33}", drive) for drive in ids)


# ------------------------------------------------------------------------------------------------- fetching


@pytest.mark.parametrize("make", FETCHED, ids=name_of)
def test_a_data_set_is_fetched_laid_out_and_read(make, internet, client, tmp_path):
    tree, contents = archives(make, tmp_path / "there")
    internet.offer(tree.config, tree, contents)
    root = tmp_path / "data"
    root.mkdir()
    status, out, err = run(tree.config, "--root", root)
    assert status == 0 and f"{tree.config}: complete" in out, (out, err)
    assert "[ ] " in out and "[x]" not in out  # the checklist is of before
    assert sorted(os.listdir(root)) == [tree.folder]  # nothing is left of the staging
    if tree.split_file in contents and SOURCES[tree.config].names == tree.split_file:
        (tmp_path / "there" / tree.folder / tree.split_file).write_bytes(contents[tree.split_file])
    expected = build(tmp_path / "there", tree.name, 2)
    data = build(root, tree.name, 2)
    for part in ("train_x", "val", "test"):
        rows = found(getattr(data, part), root, tree)
        assert rows == found(getattr(expected, part), tmp_path / "there", tree)
        assert rows or part == "val"
    shutil.rmtree(root / tree.folder / "split_fewshot", ignore_errors=True)
    before = snapshot(root)
    status, out, err = run(tree.config, "--root", root)
    assert status == 0 and "[ ]" not in out and not err
    assert snapshot(root) == before


@pytest.mark.skipif(not CURL, reason="no curl")
def test_an_interrupted_download_goes_on(internet, tmp_path):
    tree, contents = archives(trees.oxford_pets, tmp_path / "there")
    internet.offer("oxford_pets", tree, contents)
    internet.server.broken["images.tar.gz"] = 100
    root = tmp_path / "data"
    root.mkdir()
    status, out, err = run("oxford_pets", "--root", root)
    assert status == 1 and "images.tar.gz: curl failed" in err and err.startswith("error: oxford_pets: ")
    assert err.count("\n") == 1 and not (root / "oxford_pets").exists()  # whole or not there
    status, out, err = run("oxford_pets", "--root", root)
    assert status == 0, err
    assert internet.server.log == [("annotations.tar.gz", 0), ("images.tar.gz", 0), ("images.tar.gz", 100)]
    assert len(internet.asked) == 1  # the split was there already
    assert sorted(os.listdir(root)) == ["oxford_pets"]


@pytest.mark.skipif(not CURL, reason="no curl")
def test_a_server_that_cannot_go_on_starts_again(internet, tmp_path):
    tree, contents = archives(trees.dtd, tmp_path / "there")
    internet.offer("dtd", tree, contents)
    internet.server.broken["dtd-r1.0.1.tar.gz"] = 100
    internet.server.ranges = False
    (tmp_path / "data").mkdir()
    assert run("dtd", "--root", tmp_path / "data")[0] == 1
    status, _, err = run("dtd", "--root", tmp_path / "data")
    assert status == 0, err


def test_half_a_file_is_not_taken_for_the_whole(internet, client, tmp_path):
    """What a killed call left; there is no checksum that would tell."""
    tree, contents = archives(trees.fgvc_aircraft, tmp_path / "there")
    internet.offer("fgvc_aircraft", tree, contents)
    downloads = tmp_path / "data/.prepare/fgvc_aircraft/downloads"
    downloads.mkdir(parents=True)
    (downloads / "fgvc-aircraft-2013b.tar.gz.part").write_bytes(contents["fgvc-aircraft-2013b.tar.gz"][:200])
    status, _, err = run("fgvc_aircraft", "--root", tmp_path / "data")
    assert status == 0, err
    assert internet.server.log[-1] == ("fgvc-aircraft-2013b.tar.gz", 200 if client == "curl" else 0)


def test_a_server_without_the_file(internet, client, tmp_path):
    tree, contents = archives(trees.fgvc_aircraft, tmp_path / "there")
    internet.offer("fgvc_aircraft", tree, contents)
    internet.server.files.clear()
    (tmp_path / "data").mkdir()
    status, _, err = run("fgvc_aircraft", "--root", tmp_path / "data")
    assert status == 1 and f"{internet.url}/fgvc-aircraft-2013b.tar.gz: " in err and err.count("\n") == 1


def test_google_drive_breaks_and_goes_on(internet, tmp_path):
    tree, contents = archives(trees.ucf101, tmp_path / "there")
    source = internet.offer("ucf101", tree, contents)
    video = source.download_of("UCF-101-midframes").drive
    internet.fail.add(video)
    (tmp_path / "data").mkdir()
    status, _, err = run("ucf101", "--root", tmp_path / "data")
    assert status == 1 and err.count("\n") == 1
    assert "Too many users have viewed this file" in err and f"https://drive.google.com/file/d/{video}/view" in err
    internet.fail.clear()
    assert run("ucf101", "--root", tmp_path / "data")[0] == 0
    assert internet.asked.count(video) == 2 and len(internet.asked) == 3  # not the split again
    build(tmp_path / "data", tree.name)


def test_a_file_got_by_hand_is_taken(internet, tmp_path):
    """A browser's download: the split into the data set's folder, an archive into the staging folder."""
    tree, contents = archives(trees.ucf101, tmp_path / "there")
    source = internet.offer("ucf101", tree, contents)
    internet.fail.update(download.drive for download in source.downloads)
    root = tmp_path / "data"
    root.mkdir()
    err = run("ucf101", "--root", root)[2]
    assert f"into {root}/ucf101/ as split_zhou_UCF101.json" in err
    (root / "ucf101").mkdir()
    (root / "ucf101/split_zhou_UCF101.json").write_bytes(contents["split_zhou_UCF101.json"])
    err = run("ucf101", "--root", root)[2]
    into = re.search(r"into (\S+)/ as UCF-101-midframes.zip", err)[1]
    (Path(into) / "UCF-101-midframes.zip").write_bytes(contents["UCF-101-midframes.zip"])
    status, _, err = run("ucf101", "--root", root)
    assert status == 0, err
    build(root, tree.name)


def test_without_gdown_there_is_one_line(internet, monkeypatch, tmp_path):
    tree, contents = archives(trees.eurosat, tmp_path / "there")
    internet.offer("eurosat", tree, contents)
    monkeypatch.setitem(sys.modules, "gdown", None)
    (tmp_path / "data").mkdir()
    status, _, err = run("eurosat", "--root", tmp_path / "data")
    assert status == 1 and "pip install gdown" in err and err.count("\n") == 1
    assert internet.server.log == []  # said before anything large is fetched


def test_a_damaged_file_is_deleted_and_fetched_again(internet, tmp_path, client):
    tree, contents = archives(trees.oxford_pets, tmp_path / "there")
    internet.offer("oxford_pets", tree, contents)
    good = internet.server.files["images.tar.gz"]
    internet.server.files["images.tar.gz"] = good[:-9] + bytes([good[-9] ^ 1]) + good[-8:]
    (tmp_path / "data").mkdir()
    status, _, err = run("oxford_pets", "--root", tmp_path / "data")
    assert status == 1 and "images.tar.gz" in err and "its md5 is" in err and "it was deleted" in err
    assert not list((tmp_path / "data").rglob("images.tar.gz*")) and not (tmp_path / "data/oxford_pets").exists()
    internet.server.files["images.tar.gz"] = good
    assert run("oxford_pets", "--root", tmp_path / "data")[0] == 0


@pytest.mark.parametrize("where", ["middle", "checksum", "cut"])
def test_an_archive_without_a_published_checksum_has_its_own(where, internet, tmp_path):
    """gzip's, which tells of damage that tar does not see."""
    tree, contents = archives(trees.fgvc_aircraft, tmp_path / "there")
    good = contents["fgvc-aircraft-2013b.tar.gz"]
    at = {"middle": len(good) // 2, "checksum": len(good) - 8, "cut": 0}[where]
    contents["fgvc-aircraft-2013b.tar.gz"] = good[:-30] if where == "cut" else good[:at] + b"\x55" + good[at + 1 :]
    internet.offer("fgvc_aircraft", tree, contents)
    (tmp_path / "data").mkdir()
    status, _, err = run("fgvc_aircraft", "--root", tmp_path / "data")
    assert status == 1 and "fgvc-aircraft-2013b.tar.gz: cannot be unpacked" in err and err.count("\n") == 1
    assert not (tmp_path / "data/fgvc_aircraft").exists() and not list((tmp_path / "data").rglob("*.tar.gz"))


@pytest.mark.parametrize(
    "content", [b"<html>quota exceeded</html>", b"[]", b'{"train": [], "val": [], "test": []}', b"{}"], ids=str
)
def test_what_google_drive_gives_instead_of_a_split_is_refused(content, internet, tmp_path):
    tree, contents = archives(trees.eurosat, tmp_path / "there")
    internet.offer("eurosat", tree, {**contents, tree.split_file: content})
    (tmp_path / "data").mkdir()
    status, _, err = run("eurosat", "--root", tmp_path / "data")
    assert status == 1 and "split_zhou_EuroSAT.json from https://drive.google.com" in err and "deleted" in err
    assert not list((tmp_path / "data").rglob("*.json"))


@pytest.mark.parametrize("content", [b"<html></html>", b"[]", b'{"1": "rose"}'], ids=str)
def test_flower_names_are_looked_at(content, internet, tmp_path):
    tree, contents = archives(trees.oxford_flowers, tmp_path / "there")
    internet.offer("oxford_flowers", tree, {**contents, "cat_to_name.json": content})
    (tmp_path / "data").mkdir()
    status, _, err = run("oxford_flowers", "--root", tmp_path / "data")
    assert status == 1 and "cat_to_name.json from" in err


def test_an_archive_that_is_not_what_it_was(internet, tmp_path):
    tree, contents = archives(trees.dtd, tmp_path / "there")
    trees.image(tmp_path / "there/pictures/banded/1.jpg")
    contents["dtd-r1.0.1.tar.gz"] = tar(tmp_path / "there", ["pictures"])
    internet.offer("dtd", tree, contents)
    (tmp_path / "data").mkdir()
    status, _, err = run("dtd", "--root", tmp_path / "data")
    assert status == 1 and "no images in it, but pictures" in err


# ------------------------------------------------------------------------------------------------- nothing is touched


def test_what_is_there_stays(internet, tmp_path):
    """A folder with the user's own split, annotations and more: only the images come to it."""
    tree, contents = archives(trees.oxford_pets, tmp_path / "there")
    internet.offer("oxford_pets", tree, contents)
    folder = tmp_path / "data/oxford_pets"
    (folder / "annotations").mkdir(parents=True)
    (folder / "annotations/mine.txt").write_text("mine")
    (folder / "split_zhou_OxfordPets.json").write_text("mine")
    (folder / "images").mkdir()  # made for what is to come
    before = snapshot(folder)
    status, out, err = run("oxford_pets", "--root", tmp_path / "data")
    assert status == 0, err
    after = snapshot(folder)
    del before["images"]
    assert {name: after[name] for name in before} == before
    assert len(list((folder / "images").iterdir())) == 42 and internet.asked == []
    assert [name for name, _ in internet.server.log] == ["images.tar.gz"]
    assert sorted(os.listdir(tmp_path / "data")) == ["oxford_pets"]


def test_annotations_are_not_fetched_beside_a_split(internet, tmp_path):
    tree, contents = archives(trees.sun397, tmp_path / "there")
    internet.offer("sun397", tree, contents)
    folder = tmp_path / "there/sun397"
    (folder / tree.split_file).write_bytes(contents[tree.split_file])
    for name in tree.raw:
        (folder / name).unlink()
    status, out, _ = run("sun397", "--root", tmp_path / "there")
    assert status == 0 and out.count("[-]") == 3 and out.count("[x]") == 2
    assert internet.server.log == []


@pytest.mark.parametrize("other_disk", [False, True])
def test_a_linked_folder_is_filled(other_disk, internet, monkeypatch, tmp_path):
    """CoOp suggests links; the staging folder is beside what the link points to, where there is room."""
    tree, contents = archives(trees.dtd, tmp_path / "there")
    internet.offer("dtd", tree, contents)
    (tmp_path / "big/dtd").mkdir(parents=True)
    (tmp_path / "data").mkdir()
    (tmp_path / "data/dtd").symlink_to(tmp_path / "big/dtd")
    if other_disk:  # a mount point
        rename = os.rename

        def refuse(source, target):
            if os.path.dirname(target) == str(tmp_path / "data/dtd") and "half" not in str(source):
                raise OSError(18, "Invalid cross-device link")
            rename(source, target)

        monkeypatch.setattr(dataset_fetch.os, "rename", refuse)
    internet.server.broken["dtd-r1.0.1.tar.gz"] = 100
    assert run("dtd", "--root", tmp_path / "data")[0] == 1
    assert (tmp_path / "big/.prepare/dtd").is_dir() and os.listdir(tmp_path / "data") == ["dtd"]
    status, _, err = run("dtd", "--root", tmp_path / "data")
    assert status == 0, err
    assert (tmp_path / "data/dtd").is_symlink() and os.listdir(tmp_path / "data") == ["dtd"]
    assert sorted(os.listdir(tmp_path / "big/dtd")) == ["images", "split_zhou_DescribableTextures.json"]
    assert os.listdir(tmp_path / "big") == ["dtd"]
    build(tmp_path / "data", tree.name)


def test_links_that_lead_nowhere(internet, tmp_path):
    tree, contents = archives(trees.dtd, tmp_path / "there")
    internet.offer("dtd", tree, contents)
    (tmp_path / "data").mkdir()
    (tmp_path / "data/dtd").symlink_to(tmp_path / "none")
    status, _, err = run("dtd", "--root", tmp_path / "data")
    assert status == 1 and "a link to a folder that is not there" in err
    (tmp_path / "none").mkdir()
    (tmp_path / "empty").mkdir()
    (tmp_path / "none/images").symlink_to(tmp_path / "empty")
    status, _, err = run("dtd", "--root", tmp_path / "data")
    assert status == 1 and "it is a link, which is not touched" in err
    (tmp_path / "none/images").unlink()
    assert run("dtd", "--root", tmp_path / "data")[0] == 0
    assert len(internet.server.log) == 1


def test_two_runs_at_the_same_time(internet, tmp_path):
    from filelock import FileLock

    tree, contents = archives(trees.dtd, tmp_path / "there")
    internet.offer("dtd", tree, contents)
    (tmp_path / "data/.prepare").mkdir(parents=True)
    with FileLock(tmp_path / "data/.prepare/dtd.lock"):
        status, _, err = run("dtd", "--root", tmp_path / "data")
    assert status == 1 and "another run is fetching" in err
    assert run("dtd", "--root", tmp_path / "data")[0] == 0


@pytest.mark.parametrize("moment", range(12))
def test_stopped_at_any_rename_the_next_call_finishes(moment, internet, monkeypatch, tmp_path):
    tree, contents = archives(trees.fgvc_aircraft, tmp_path / "there")
    folder = tmp_path / "there/fgvc_aircraft"
    for name in ("README.txt", "z.txt"):
        (folder / name).write_text("comes along")
    contents["fgvc-aircraft-2013b.tar.gz"] = tar(folder, os.listdir(folder), "fgvc-aircraft-2013b/data/")
    internet.offer("fgvc_aircraft", tree, contents)
    calls, rename = [], os.rename

    def stop(source, target):
        calls.append(source)
        if len(calls) == moment + 1:
            raise KeyboardInterrupt
        rename(source, target)

    (tmp_path / "data").mkdir()
    with monkeypatch.context() as patch:
        patch.setattr(dataset_fetch.os, "rename", stop)
        status, _, err = run("fgvc_aircraft", "--root", tmp_path / "data")
    stopped = len(calls) > moment
    assert status == (1 if stopped else 0) and ("interrupted" in err) == stopped
    assert (tmp_path / "data/fgvc_aircraft").exists() == (not stopped)  # whole or not there
    assert run("fgvc_aircraft", "--root", tmp_path / "data")[0] == 0
    assert snapshot_names(tmp_path / "data/fgvc_aircraft") == snapshot_names(folder)
    assert os.listdir(tmp_path / "data") == ["fgvc_aircraft"]
    if moment == 11:
        assert not stopped  # all of them were tried


# ------------------------------------------------------------------------------------------------- archives


def evil_tar(name, **attributes):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
        info = tarfile.TarInfo(name)
        for key, value in attributes.items():
            setattr(info, key, value)
        info.size = 4 if info.isreg() else 0
        archive.addfile(info, io.BytesIO(b"evil"))
        if "linkname" in attributes:  # then something through the link
            info = tarfile.TarInfo(f"{name}/owned.txt")
            info.size = 4
            archive.addfile(info, io.BytesIO(b"evil"))
    return buffer.getvalue()


EVIL = {
    "tar ..": evil_tar("../owned.txt"),
    "tar images/..": evil_tar("images/../../owned.txt"),
    "tar link": evil_tar("images", type=tarfile.SYMTYPE, linkname="../.."),
    "tar absolute link": evil_tar("images", type=tarfile.SYMTYPE, linkname="/tmp"),
    "tar hard link": evil_tar("images", type=tarfile.LNKTYPE, linkname="../../secret"),
    "tar device": evil_tar("images/null", type=tarfile.CHRTYPE),
    "zip ..": zipped(Path(), (), extra=[("../owned.txt", b"evil")]),
    "zip images/..": zipped(Path(), (), extra=[("images/../../owned.txt", b"evil")]),
    "zip absolute": zipped(Path(), (), extra=[("/tmp/owned.txt", b"evil")]),
    "zip backslashes": zipped(Path(), (), extra=[("..\\owned.txt", b"evil")]),
    "zip drive": zipped(Path(), (), extra=[("C:/owned.txt", b"evil")]),
}


@pytest.mark.parametrize("kind", EVIL)
def test_a_malicious_archive_writes_nothing_outside(kind, internet, tmp_path):
    tree, contents = archives(trees.dtd, tmp_path / "there")
    internet.offer("dtd", tree, {**contents, "dtd-r1.0.1.tar.gz": EVIL[kind]})
    root = tmp_path / "data"
    root.mkdir()
    before = snapshot_names(tmp_path / "there")
    status, _, err = run("dtd", "--root", root)
    assert status == 1 and "cannot be unpacked" in err and err.count("\n") == 1
    assert not list(tmp_path.rglob("owned*")) and not (root / "dtd").exists()
    assert snapshot_names(tmp_path / "there") == before and not Path("/tmp/owned.txt").exists()


def test_an_absolute_path_in_a_tar_stays_inside(tmp_path):
    (tmp_path / "a.tar.gz").write_bytes(evil_tar(f"{tmp_path}/owned.txt"))
    dataset_fetch.unpack(str(tmp_path / "a.tar.gz"), str(tmp_path / "out"))
    assert not (tmp_path / "owned.txt").exists() and list((tmp_path / "out").rglob("owned.txt"))


def test_a_python_that_unpacks_without_care_is_refused(internet, monkeypatch, tmp_path):
    tree, contents = archives(trees.dtd, tmp_path / "there")
    internet.offer("dtd", tree, contents)
    (tmp_path / "data").mkdir()
    monkeypatch.delattr(tarfile, "data_filter")
    status, _, err = run("dtd", "--root", tmp_path / "data")
    assert status == 1 and "this Python" in err and internet.server.log == []


# ------------------------------------------------------------------------------------------------- class names


def test_class_names_of_the_variants_are_copied(internet, tmp_path):
    tree, contents = archives(trees.imagenet_a, tmp_path / "there")
    internet.offer("imagenet_a", tree, contents)
    trees.imagenet(tmp_path / "data")
    status, out, err = run("imagenet_a", "--root", tmp_path / "data")
    assert status == 0, err
    assert "copied from imagenet/classnames.txt" in out and internet.asked == []
    copy = (tmp_path / "data/imagenet-adversarial/classnames.txt").read_bytes()
    assert copy == (tmp_path / "data/imagenet/classnames.txt").read_bytes()


def test_class_names_of_imagenet(internet, monkeypatch, tmp_path):
    """From Google Drive; where that fails open_clip's, which is said; never without its thousand folders."""
    import open_clip

    tree, contents = archives(trees.imagenet, tmp_path / "there")
    internet.offer("imagenet", tree, contents)
    monkeypatch.setattr(open_clip, "IMAGENET_CLASSNAMES", ["a", "b", "c", "d"])
    path = tmp_path / "there/imagenet/classnames.txt"
    path.unlink()
    status, out, err = run("imagenet", "--root", tmp_path / "there")
    assert status == 0 and path.read_bytes() == contents["classnames.txt"], err
    path.unlink()
    internet.fail.add(dataset_sources.CLASSNAMES)
    status, out, err = run("imagenet", "--root", tmp_path / "there")
    assert status == 0 and "open_clip's class names, which may differ from CoOp's" in out and str(path) in out
    assert path.read_text().splitlines() == [f"{wnid} {name}" for wnid, name in zip(trees.WNIDS, "abcd")]
    path.unlink()
    shutil.rmtree(next((tmp_path / "there/imagenet/images/train").iterdir()))
    status, _, err = run("imagenet", "--root", tmp_path / "there")
    assert status == 1 and not path.exists() and "Google Drive does not give it" in err


def test_open_clip_has_a_thousand_names():
    from open_clip import IMAGENET_CLASSNAMES

    assert len(IMAGENET_CLASSNAMES) == dataset_fetch.IMAGENET_CLASSES == 1000
    assert list(IMAGENET_CLASSNAMES[:4]) == list(trees.WNIDS.values())


# ------------------------------------------------------------------------------------------------- what is said


def test_the_checklist(internet, tmp_path):
    (tmp_path / "oxford_pets/images").mkdir(parents=True)
    trees.image(tmp_path / "oxford_pets/images/Abyssinian_1.jpg")
    before = snapshot(tmp_path)
    status, out, err = run("oxford_pets", "--root", tmp_path, "--dry-run")
    assert (status, err) == (0, "")
    assert out.splitlines() == [
        f"oxford_pets: {tmp_path}/oxford_pets",
        "  [x] images                      images",
        "  [ ] annotations                 annotations  annotations.tar.gz, 19 MB, www.robots.ox.ac.uk",
        "  [ ] split_zhou_OxfordPets.json  split        Google Drive",
    ]
    assert snapshot(tmp_path) == before and internet.asked == internet.server.log == []


def test_all_of_them_on_an_empty_root(internet, tmp_path):
    status, out, err = run("all", "--root", tmp_path, "--dry-run")
    assert (status, err) == (0, "") and os.listdir(tmp_path) == []
    assert [line.split(":")[0] for line in out.splitlines() if f": {tmp_path}" in line] == list(SOURCES)
    assert "0 of 15 complete; missing something: imagenet, caltech101, " in out
    for config, source in SOURCES.items():
        for part in source.parts:
            assert re.search(rf"\[.\] {re.escape(part)} ", out), (config, part)


@pytest.mark.parametrize("make", BY_HAND, ids=name_of)
def test_what_has_to_be_got_by_hand(make, internet, tmp_path):
    """The steps are printed and nothing is fetched until that is done; then the rest is."""
    tree, contents = archives(make, tmp_path / "there")
    internet.offer(tree.config, tree, contents)
    (tmp_path / "data").mkdir()
    status, out, err = run(tree.config, "--root", tmp_path / "data")
    assert status == 1 and "1. " in out and f"{tmp_path}/data/{tree.folder}/" in out and "{folder}" not in out
    assert os.listdir(tmp_path / "data") == [] and internet.asked == []
    names = SOURCES[tree.config].names
    for name in ["classnames.txt"] if names == "classnames.txt" else ["devkit", "cars_test_annos_withlabels.mat"]:
        path = tmp_path / "there" / tree.folder / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    status, out, err = run(tree.config, "--root", tmp_path / "there")
    assert status == 0 and len(internet.asked) == 1, err
    build(tmp_path / "there", tree.name)


def test_shapes_are_drawn_and_a_folder_is_the_users(monkeypatch, tmp_path):
    drawn = []
    monkeypatch.setattr(prepare, "draw_dataset", lambda *args: drawn.append(args) or os.makedirs(args[0]))
    status, out, _ = run("shapes", "--root", tmp_path, "--dry-run")
    assert status == 0 and drawn == [] and "[ ] drawn by this program" in out
    status, out, _ = run("shapes", "folder", "--root", tmp_path)
    assert status == 0 and drawn == [(str(tmp_path / "shapes"), "scene", "split_zhou_Shapes.json")]
    assert "[x]" in out and "images of your own" in out


@pytest.mark.parametrize("words", [["pets"], [], ["dtd", "--check", "--dry-run"], ["dtd", "--workers", "0"]])
def test_mistakes_of_the_user(words, tmp_path, capsys):
    with pytest.raises(SystemExit) as caught:
        prepare.main([*words, "--root", str(tmp_path)])
    assert caught.value.code == 2
    assert prepare.main(["dtd", "--root", str(tmp_path / "none")]) == 2
    assert f"error: {tmp_path / 'none'}: no such folder" in capsys.readouterr().err


def test_one_data_set_that_fails_does_not_stop_the_others(internet, tmp_path):
    for make in (trees.ucf101, trees.eurosat):
        tree, contents = archives(make, tmp_path / "there")
        internet.offer(tree.config, tree, contents)
    del internet.drive[SOURCES["ucf101"].downloads[0].drive]
    (tmp_path / "data").mkdir()
    status, out, err = run("ucf101", "eurosat", "--root", tmp_path / "data")
    assert status == 1 and "error: ucf101" in err and "eurosat: complete" in out
    assert "1 of 2 complete; missing something: ucf101" in out


# ------------------------------------------------------------------------------------------------- --check


def photo():
    buffer = io.BytesIO()
    Image.effect_noise((64, 64), 100).save(buffer, "JPEG")
    return buffer.getvalue()


PHOTO = photo()


@pytest.fixture
def whole(monkeypatch, tmp_path):
    """``whole(make)``: a miniature that is as large as published."""

    def build_tree(make):
        tree = make(tmp_path)
        tree.before = snapshot(tmp_path)
        cls, cfg = dataset_check.dataset_class(tree.config, str(tmp_path))
        tree.split = cls.survey(cfg)[1]
        counts = {part: len(tree.split[part]) for part in SOURCES[tree.config].counts}
        fake = dataclasses.replace(SOURCES[tree.config], classes=len(tree.classnames), counts=counts)
        monkeypatch.setitem(dataset_sources.SOURCES, tree.config, fake)
        return tree

    return build_tree


@pytest.mark.parametrize("make", trees.ALL, ids=name_of)
def test_check_finds_every_bad_image(make, whole, tmp_path):
    tree = whole(make)
    status, out, err = run(tree.config, "--root", tmp_path, "--check", "--workers", 3)
    assert (status, err) == (0, ""), out
    paths = sorted({entry.path for entries in tree.split.values() for entry in entries})
    images = tmp_path / tree.folder / tree.images
    assert f"{len(paths):,} images" in out and out.count("\n") == 1 and out.endswith("classes  whole\n")
    assert snapshot(tmp_path) == tree.before  # nothing is written, no split, no listing

    if make in trees.FOLDERS:  # without a split file what there is comes from listing folders
        (tmp_path / tree.folder / tree.split_file).write_text(json.dumps(tree.split))
    gone, empty, cut, text, noise = (images / path for path in paths[:5])
    empty.write_bytes(b"")
    cut.write_bytes(PHOTO[: len(PHOTO) // 2])
    text.write_text("<html>404</html>")
    noise.write_bytes(trees.JPEG[:200] + bytes(100))
    expected = {empty: "empty file", cut: "truncated", text: "no image", noise: "cannot load this image"}
    if tree.raw != ["classnames.txt"]:
        gone.unlink()
        expected[gone] = "missing"
    status, out, err = run(tree.config, "--root", tmp_path, "--check")
    assert status == 1 and not err
    lines = dict(line.split(": ", 1) for line in out.splitlines()[:-1])
    assert set(lines) == {str(path) for path in expected}
    assert all(reason in lines[str(path)] for path, reason in expected.items()), lines
    assert out.splitlines()[-1].endswith(f"{len(expected)} problems")


def test_check_counts(whole, tmp_path, monkeypatch):
    tree = whole(trees.imagenet_r)
    (tmp_path / tree.folder / tree.images / "n01440764/0.jpg").unlink()
    status, out, _ = run("imagenet_r", "--root", tmp_path, "--check")
    assert status == 1 and "imagenet_r: 8 test images, 9 are published" in out
    source = dataclasses.replace(dataset_sources.SOURCES["imagenet_r"], classes=200, counts={"test": 8})
    monkeypatch.setitem(dataset_sources.SOURCES, "imagenet_r", source)
    status, out, _ = run("imagenet_r", "--root", tmp_path, "--check")
    assert status == 1 and "imagenet_r: 3 classes, 200 are published" in out


def test_check_of_what_is_not_there_or_damaged(whole, tmp_path):
    tree = whole(trees.oxford_pets)
    (tmp_path / tree.folder / tree.split_file).write_text("{")
    status, out, err = run("oxford_pets", "dtd", "--root", tmp_path, "--check")
    assert (status, err) == (1, "")
    assert f"{tree.split_file}: not a split file" in out and f"{tmp_path}/dtd: no such folder" in out
    assert len(out.splitlines()) == 4


def test_check_refuses_a_decompression_bomb(whole, tmp_path, monkeypatch):
    tree = whole(trees.eurosat)
    path = tmp_path / tree.folder / tree.images / "Forest/Forest_01.jpg"
    Image.new("RGB", (50, 50)).save(path)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1200)  # refused from twice as many
    status, out, _ = run("eurosat", "--root", tmp_path, "--check")
    assert status == 1 and f"{path}: more than 2,400 pixels" in out


def test_check_of_a_root_that_cannot_be_written(whole, tmp_path):
    for make in (trees.oxford_pets, trees.imagenet):
        whole(make)
    folders = [tmp_path, *(path for path in tmp_path.rglob("*") if path.is_dir())]
    for folder in folders:
        folder.chmod(0o555)
    try:
        status, out, err = run("oxford_pets", "imagenet", "--root", tmp_path, "--check")
    finally:
        for folder in folders:
            folder.chmod(0o755)
    assert (status, err) == (0, ""), out


def test_check_of_the_users_folder(tmp_path):
    for name in ("cat", "dog"):
        for i in range(4):
            trees.image(tmp_path / name / f"{i}.jpg")
    status, out, _ = run("folder", "--root", tmp_path, "--check")
    assert status == 0 and "8 images" in out and "2 classes" in out
    (tmp_path / "cat/2.jpg").write_bytes(trees.JPEG[:-50])
    status, out, _ = run("folder", "--root", tmp_path, "--check")
    assert status == 1 and f"{tmp_path}/cat/2.jpg: " in out


def test_check_of_shapes(monkeypatch, tmp_path):
    monkeypatch.setattr(prepare, "COUNTS", {"train": 1, "val": 1, "test": 1})
    monkeypatch.setattr("datasets.shapes.COUNTS", {"train": 1, "val": 1, "test": 1})
    assert run("shapes", "--root", tmp_path)[0] == 0
    status, out, _ = run("shapes", "--root", tmp_path, "--check")
    assert status == 0 and "96 images" in out and "32 classes" in out


def test_check_of_the_real_caltech101(real_data):
    status, out, err = run("caltech101", "--root", real_data, "--check", "--workers", 2)
    assert (status, err) == (0, "")
    assert out == "caltech101      8,242 images    100 classes  whole\n"

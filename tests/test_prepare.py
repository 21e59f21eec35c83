"""tools/prepare.py: downloads from a local server, in the layouts of the real archives, and --check."""

import contextlib
import dataclasses
import hashlib
import http.server
import io
import json
import os
import re
import sys
import tarfile
import threading
import types
import zipfile
from pathlib import Path

import pytest
import trees
from PIL import Image
from test_datasets import build, found, name_of

import dataset_fetch
import prepare

SOURCES = dict(dataset_fetch.SOURCES)  # the real ones


class Handler(http.server.BaseHTTPRequestHandler):
    """Serves ``server.files``; of those in ``server.broken`` only as many bytes, then it hangs up."""

    def do_GET(self):
        name = self.path.rpartition("/")[2]
        self.server.log.append(name)
        if name not in self.server.files:
            return self.send_error(404)
        self.send_response(200)
        self.send_header("Content-Length", str(len(self.server.files[name])))
        if name.endswith("gz"):
            self.send_header("Content-Encoding", "x-gzip")  # as Apache does; it must not be unpacked
        self.end_headers()
        self.wfile.write(self.server.files[name][: self.server.broken.pop(name, None)])

    def log_message(self, *args):
        pass


class Internet:
    """An HTTP server, a stand-in for gdown, and sources that point at both."""

    def __init__(self, monkeypatch):
        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.files, self.server.broken, self.server.log = {}, {}, []
        self.drive, self.asked, self.fail = {}, [], set()  # content by id; ids requested; ids that break
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        self.monkeypatch = monkeypatch
        threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True).start()
        monkeypatch.setitem(sys.modules, "gdown", types.SimpleNamespace(download=self.gdown))
        monkeypatch.setattr(dataset_fetch, "IMAGENET_CLASSES", len(trees.WNIDS))

    def gdown(self, id, output, quiet):  # noqa: A002 (gdown's)
        self.asked.append(id)
        if id in self.fail:
            raise ConnectionError("Too many users have\n\tviewed this file")
        Path(output).write_bytes(self.drive[id])

    def offer(self, tree, contents):
        """Point a data set's source at files: ``{name of the download: its bytes}``."""
        downloads = []
        for download in SOURCES[tree.config].downloads:
            content = contents.get(download.file)
            if content is not None and download.drive:
                self.drive[download.drive] = content
            elif content is not None:
                self.server.files[download.file] = content
                algorithm = (download.hash or "").partition(":")[0]
                value = f"{algorithm}:{hashlib.new(algorithm, content).hexdigest()}" if algorithm else None
                download = dataclasses.replace(download, url=f"{self.url}/{download.file}", hash=value)
            downloads.append(download)
        publish(self.monkeypatch, tree, downloads=tuple(downloads))


def survey(tree, root):
    cls, cfg = prepare.dataset_class(tree.config, str(root))
    return cls.survey(cfg)[1]


def publish(monkeypatch, tree, **changed):
    """Let the size of a miniature be the published one."""
    counts = {part: len(tree.split[part]) for part in SOURCES[tree.config].counts}
    fake = dataclasses.replace(SOURCES[tree.config], classes=len(tree.classnames), counts=counts, **changed)
    monkeypatch.setitem(dataset_fetch.SOURCES, tree.config, fake)


@pytest.fixture
def internet(monkeypatch):
    internet = Internet(monkeypatch)
    yield internet
    internet.server.shutdown()
    internet.server.server_close()


@pytest.fixture
def served(internet, tmp_path):
    """``served(make, **changed)``: a miniature in tmp_path/there, offered; and the empty root tmp_path/data."""
    (tmp_path / "data").mkdir()

    def offer(make, **changed):
        tree, contents = archives(make, tmp_path / "there")
        internet.offer(tree, contents | {k.replace("__", "."): v for k, v in changed.items()})
        return tree, contents

    return offer


def tar(members, mode="w:gz"):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode=mode) as archive:
        for name, path in members.items():
            archive.add(path, name)
    return buffer.getvalue()


def zipped(members):
    """Of names and paths of files and folders, or contents."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, content in members.items():
            if isinstance(content, bytes):
                archive.writestr(name, content)
                continue
            for path in sorted({content, *content.rglob("*")}):
                archive.write(path, os.path.normpath(name / path.relative_to(content)))
    return buffer.getvalue()


UNDER = {"dtd-r1.0.1.tar.gz": "dtd/", "food-101.tar.gz": "food-101/"}
UNDER["fgvc-aircraft-2013b.tar.gz"] = "fgvc-aircraft-2013b/data/"
NOT_COMPRESSED = ("imagenetv2-matched-frequency.tar.gz", "imagenet-a.tar", "imagenet-r.tar")  # the first on the Hub


def archives(make, root):
    """A miniature of a data set, and its downloads in the layouts of the real ones."""
    tree = make(root)
    folder = root / tree.folder
    tree.split = survey(tree, root)  # takes the place of CoOp's file
    contents = {tree.split_file: json.dumps(tree.split).encode()}
    for download in SOURCES[tree.config].downloads:
        name, theirs = download.file, download.renamed
        members = {UNDER.get(name, "") + theirs.get(part, part): folder / part for part in download.parts}
        if name == "caltech-101.zip":
            inner = {"caltech-101/101_ObjectCategories.tar.gz": tar(members), "__MACOSX/._caltech-101": b""}
            contents[name] = zipped(inner)
        elif name.endswith(".zip"):
            contents[name] = zipped(members)
        elif name.endswith(dataset_fetch.ARCHIVES):
            contents[name] = tar(members, "w" if name in NOT_COMPRESSED else "w:gz")
        elif name != tree.split_file:
            contents[name] = (folder / name).read_bytes()
    return tree, contents


def run(*words):
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        status = prepare.main([str(word) for word in words])
    return status, out.getvalue(), err.getvalue()


def fails(*words):
    """The one line on stderr of a call with exit status 1."""
    status, _, err = run(*words)
    assert status == 1 and err.count("\n") == 1, err
    return err


def snapshot(folder):
    """Content and time of everything in a folder."""
    return {
        str(path.relative_to(folder)): (path.read_bytes() if path.is_file() else None, path.stat().st_mtime_ns)
        for path in sorted(Path(folder).rglob("*"))
    }


BY_HAND = (trees.stanford_cars, trees.imagenet)
FETCHED = [make for make in trees.ALL if make not in BY_HAND]


@pytest.mark.parametrize("make", trees.ALL, ids=name_of)
def test_sources_name_what_the_data_sets_read(make, tmp_path):
    tree = make(tmp_path)
    source = SOURCES[tree.config]
    assert source.folder == tree.folder
    assert tree.trainval or tree.classes or set(source.parts) >= set(tree.raw)
    cls, _ = prepare.dataset_class(tree.config, str(tmp_path))
    assert (source.names or "") == getattr(cls, "split_file", source.names)
    assert all((tmp_path / tree.folder / part).exists() for part in source.images)


def test_urls_and_checksums_match_torchvision():
    import inspect

    import torchvision.datasets as tv

    classes = {"caltech101": tv.Caltech101, "oxford_pets": tv.OxfordIIITPet, "oxford_flowers": tv.Flowers102}
    classes.update(food101=tv.Food101, sun397=tv.SUN397, dtd=tv.DTD, eurosat=tv.EuroSAT)
    for name, cls in classes.items():
        text = inspect.getsource(cls)
        hashed = [d for d in SOURCES[name].downloads if (d.hash or "").startswith("md5:")]
        assert hashed and all(d.hash[4:] in text and (d.url in text or d.file in text) for d in hashed), name


@pytest.mark.parametrize("make", FETCHED, ids=name_of)
def test_a_data_set_is_downloaded_laid_out_and_read(make, served, tmp_path):
    tree, contents = served(make)
    root = tmp_path / "data"
    status, out, err = run(tree.config, "--root", root)
    assert status == 0 and f"{tree.config}: complete" in out, (out, err)
    assert os.listdir(root) == [tree.folder]  # nothing is left of the staging
    if SOURCES[tree.config].names == tree.split_file:
        (tmp_path / "there" / tree.folder / tree.split_file).write_bytes(contents[tree.split_file])
    expected, data = build(tmp_path / "there", tree.name, 2), build(root, tree.name, 2)
    for part in ("train_x", "val", "test"):
        rows = found(getattr(data, part), root, tree)
        assert rows == found(getattr(expected, part), tmp_path / "there", tree)
        assert rows or part == "val"
    before = snapshot(root)
    status, out, err = run(tree.config, "--root", root)
    assert status == 0 and "[ ]" not in out and not err and snapshot(root) == before


def test_an_interrupted_download_starts_again(served, internet, tmp_path):
    served(trees.oxford_pets)
    internet.server.broken["images.tar.gz"] = 100
    assert "images.tar.gz: download failed" in fails("oxford_pets", "--root", tmp_path / "data")
    assert not (tmp_path / "data/oxford_pets/images").exists()
    assert os.listdir(tmp_path / "data/.prepare/oxford_pets") == [".lock"]
    (tmp_path / "data/.prepare/oxford_pets/unpacked").mkdir()  # left by a killed process
    assert run("oxford_pets", "--root", tmp_path / "data")[0] == 0
    assert internet.server.log == ["images.tar.gz", "images.tar.gz"] and len(internet.asked) == 1
    assert os.listdir(tmp_path / "data") == ["oxford_pets"]


def test_google_drive_refuses_and_a_file_got_by_hand_is_used(served, internet, monkeypatch, tmp_path):
    tree, contents = served(trees.ucf101)
    internet.fail.update(download.drive for download in SOURCES["ucf101"].downloads)
    for name in ("split_zhou_UCF101.json", "UCF-101-midframes.zip"):
        err = fails("ucf101", "--root", tmp_path / "data")
        assert "Too many users have viewed this file" in err and "https://drive.google.com/file/d/" in err
        path = Path(re.search(r"with a browser as (.+)", err)[1])
        assert path.name == name
        path.write_bytes(contents[name])
    assert run("ucf101", "--root", tmp_path / "data")[0] == 0
    build(tmp_path / "data", tree.name)
    served(trees.eurosat)
    monkeypatch.setitem(sys.modules, "gdown", None)
    assert "with gdown installed" in fails("eurosat", "--root", tmp_path / "data")
    assert internet.server.log == []  # reported before anything large is downloaded


@pytest.mark.parametrize("make, file", [(trees.oxford_pets, "images.tar.gz"), (trees.fgvc_aircraft, None)])
def test_a_damaged_or_missing_file_is_not_used(make, file, served, internet, tmp_path):
    """Of an archive without a published checksum gzip's own is verified."""
    tree, _ = served(make)
    file = file or "fgvc-aircraft-2013b.tar.gz"
    good = internet.server.files.pop(file)
    assert f"{internet.url}/{file}: download failed" in fails(tree.config, "--root", tmp_path / "data")
    for bad in (good[:-8] + bytes([good[-8] ^ 1]) + good[-7:], good[:-30], b"<html>not found</html>"):
        internet.server.files[file] = bad
        err = fails(tree.config, "--root", tmp_path / "data")
        assert ("does not match the known hash" if file == "images.tar.gz" else "cannot be unpacked") in err
        assert not list((tmp_path / "data").rglob("*.tar.gz*"))
        assert not (tmp_path / "data" / tree.folder / "images").exists()
    internet.server.files[file] = good
    assert run(tree.config, "--root", tmp_path / "data")[0] == 0


@pytest.mark.parametrize(
    "make, file, contents",
    [
        (trees.eurosat, "split_zhou_EuroSAT.json", (b"<html>", b"[]", b'{"train": [], "val": [], "test": []}', b"{}")),
        (trees.imagenet_a, "classnames.txt", (b"<html>", b"n01440764 tench")),
    ],
    ids=name_of,
)
def test_files_without_a_checksum_are_parsed_and_counted(make, file, contents, served, internet, tmp_path):
    tree, _ = served(make)
    source = dataset_fetch.SOURCES[tree.config]
    for content in contents:
        internet.drive[source.download_of(file).drive] = content
        err = fails(tree.config, "--root", tmp_path / "data")
        assert f"{file} from https://drive.google.com" in err and "deleted" in err
        assert not list((tmp_path / "data").rglob(file))


def test_an_archive_in_another_layout_is_refused(served, tmp_path):
    trees.image(tmp_path / "there/pictures/banded/1.jpg")
    served(trees.dtd, **{"dtd-r1.0.1.tar.gz": tar({"pictures": tmp_path / "there/pictures"})})
    assert "no images, but pictures" in fails("dtd", "--root", tmp_path / "data")


def test_existing_files_are_not_touched(served, internet, tmp_path):
    served(trees.oxford_pets)
    folder = tmp_path / "data/oxford_pets"
    (folder / "annotations").mkdir(parents=True)
    (folder / "annotations/mine.txt").write_text("mine")
    (folder / "split_zhou_OxfordPets.json").write_text("mine")
    (folder / "images").mkdir()  # empty: to be filled
    before = snapshot(folder)
    assert run("oxford_pets", "--root", tmp_path / "data")[0] == 0
    after = snapshot(folder)
    del before["images"]
    assert {name: after[name] for name in before} == before
    assert len(list((folder / "images").iterdir())) == 42
    assert internet.asked == [] and internet.server.log == ["images.tar.gz"]


def test_a_linked_folder_is_filled(served, tmp_path):
    """The staging folder is next to what the link points to, where the space is."""
    tree, _ = served(trees.dtd)
    (tmp_path / "data/dtd").symlink_to(tmp_path / "big/dtd")  # which does not exist yet
    assert run("dtd", "--root", tmp_path / "data")[0] == 0
    assert (tmp_path / "data/dtd").is_symlink() and os.listdir(tmp_path / "big") == ["dtd"]
    build(tmp_path / "data", tree.name)


def test_every_config_of_a_data_set_is_known():
    assert {path.stem for path in prepare.CONFIGS.iterdir()} == {*SOURCES, *prepare.DRAWN, prepare.OWN}


def test_two_processes_at_once(served, tmp_path):
    from filelock import FileLock

    served(trees.dtd)
    (tmp_path / "data/.prepare/dtd").mkdir(parents=True)
    with FileLock(tmp_path / "data/.prepare/dtd/.lock"):
        assert "another process is downloading" in fails("dtd", "--root", tmp_path / "data")
    assert run("dtd", "--root", tmp_path / "data")[0] == 0


@pytest.mark.parametrize("kind", ["zip", "tar"])
def test_a_malicious_archive_writes_nothing_outside(kind, served, tmp_path):
    """tests/test_untrusted.py has more of them."""
    (tmp_path / "link").symlink_to("../..")
    evil = zipped({"images/../../owned.txt": b"evil"}) if kind == "zip" else tar({"images": tmp_path / "link"})
    served(trees.dtd, **{"dtd-r1.0.1.tar.gz": evil})
    before = snapshot(tmp_path / "there")
    assert "cannot be unpacked" in fails("dtd", "--root", tmp_path / "data")
    assert not list(tmp_path.rglob("owned*")) and not (tmp_path / "data/dtd/images").exists()
    assert snapshot(tmp_path / "there") == before


def test_an_unsafe_python_is_refused(served, internet, monkeypatch, tmp_path):
    served(trees.dtd)
    monkeypatch.delattr(tarfile, "data_filter")
    assert "this Python" in fails("dtd", "--root", tmp_path / "data") and internet.server.log == []


def test_class_names_of_the_variants_are_copied(served, internet, tmp_path):
    served(trees.imagenet_a)
    trees.imagenet(tmp_path / "data")
    status, out, err = run("imagenet_a", "--root", tmp_path / "data")
    assert status == 0 and "imagenet/classnames.txt" in out and internet.asked == [], err
    copy = (tmp_path / "data/imagenet-adversarial/classnames.txt").read_bytes()
    assert copy == (tmp_path / "data/imagenet/classnames.txt").read_bytes()


def test_the_checklist(internet, tmp_path):
    trees.image(tmp_path / "oxford_pets/images/Abyssinian_1.jpg")
    before = snapshot(tmp_path)
    status, out, err = run("oxford_pets", "--root", tmp_path, "--dry-run")
    assert (status, err) == (0, "")
    assert out.splitlines() == [
        f"oxford_pets: {tmp_path}/oxford_pets",
        "  [x] images",
        "  [ ] split_zhou_OxfordPets.json  Google Drive",
    ]
    status, out, _ = run("all", "--root", tmp_path, "--dry-run")
    assert status == 0 and "0 of 15 complete; incomplete: imagenet, caltech101, " in out
    for source in SOURCES.values():
        assert all(re.search(rf"\[.\] {re.escape(part)}\b", out) for part in source.parts), source
    assert snapshot(tmp_path) == before and internet.asked == internet.server.log == []


@pytest.mark.parametrize("make", BY_HAND, ids=name_of)
def test_manual_steps_are_printed_until_done(make, served, internet, tmp_path):
    tree, _ = served(make)
    status, out, _ = run(tree.config, "--root", tmp_path / "data")
    assert status == 1 and "1. " in out and f"{tmp_path}/data/{tree.folder}/" in out and "{folder}" not in out
    assert os.listdir(tmp_path / "data") == [] and internet.asked == []
    for name in ("classnames.txt", "cars_test_annos_withlabels.mat"):
        (tmp_path / "there" / tree.folder / name).unlink(missing_ok=True)
    assert run(tree.config, "--root", tmp_path / "there")[0] == 0 and len(internet.asked) == 1
    build(tmp_path / "there", tree.name)


@pytest.mark.parametrize("words", [["pets"], [], ["dtd", "--check", "--dry-run"], ["dtd", "--workers", "0"]])
def test_user_mistakes_end_with_status_2(words, tmp_path, capsys):
    with pytest.raises(SystemExit) as caught:
        prepare.main([*words, "--root", str(tmp_path)])
    assert caught.value.code == 2
    assert prepare.main(["dtd", "--root", str(tmp_path / "none")]) == 2
    assert f"error: {tmp_path / 'none'}: no such folder" in capsys.readouterr().err


def test_a_failing_data_set_does_not_stop_the_others(served, internet, tmp_path):
    served(trees.ucf101)
    served(trees.eurosat)
    internet.fail.add(SOURCES["ucf101"].downloads[0].drive)
    status, out, err = run("ucf101", "eurosat", "folder", "--root", tmp_path / "data")
    assert status == 1 and "error: ucf101" in err and "eurosat: complete" in out
    assert "2 of 3 complete; incomplete: ucf101" in out


@pytest.fixture
def complete(monkeypatch, tmp_path):
    """``complete(make)``: a miniature whose size is the published one."""

    def build_tree(make):
        tree = make(tmp_path)
        tree.split = survey(tree, tmp_path)
        publish(monkeypatch, tree)
        return tree

    return build_tree


@pytest.mark.parametrize("make", trees.ALL, ids=name_of)
def test_check_finds_every_bad_image(make, complete, tmp_path):
    tree = complete(make)
    before = snapshot(tmp_path)
    status, out, err = run(tree.config, "--root", tmp_path, "--check", "--workers", 3)
    assert (status, err) == (0, ""), out
    paths = sorted({entry.path for entries in tree.split.values() for entry in entries})
    assert f"{len(paths):,} images" in out and out.count("\n") == 1 and out.endswith("classes  complete\n")
    assert snapshot(tmp_path) == before  # nothing is written

    if make in trees.FOLDERS:  # without a split file the images are those that exist
        (tmp_path / tree.folder / tree.split_file).write_text(json.dumps(tree.split))
    gone, empty, cut, text = (tmp_path / tree.folder / tree.images / path for path in paths[:4])
    empty.write_bytes(b"")
    buffer = io.BytesIO()
    Image.effect_noise((64, 64), 100).save(buffer, "JPEG")
    cut.write_bytes(buffer.getvalue()[: len(buffer.getvalue()) // 2])
    text.write_text("<html>404</html>")
    expected = {empty: "not an image", cut: "truncated", text: "not an image"}
    if tree.raw != ["classnames.txt"]:
        gone.unlink()
        expected[gone] = "no image file"
    status, out, err = run(tree.config, "--root", tmp_path, "--check")
    lines = out.splitlines()
    assert status == 1 and not err and lines[-1].endswith(f"{len(expected)} problems")
    assert len(lines) == len(expected) + 1
    for path, reason in expected.items():
        assert [reason in line for line in lines if str(path) in line] == [True]


def test_check_compares_counts(complete, tmp_path, monkeypatch):
    tree = complete(trees.imagenet_r)
    (tmp_path / tree.folder / tree.images / "n01440764/0.jpg").unlink()
    status, out, _ = run("imagenet_r", "--root", tmp_path, "--check")
    assert status == 1 and "imagenet_r: 8 test images, but 9 are published" in out
    source = dataclasses.replace(dataset_fetch.SOURCES["imagenet_r"], classes=200, counts={"test": 8})
    monkeypatch.setitem(dataset_fetch.SOURCES, "imagenet_r", source)
    status, out, _ = run("imagenet_r", "--root", tmp_path, "--check")
    assert status == 1 and "imagenet_r: 3 classes, but 200 are published" in out


def test_check_of_a_missing_or_damaged_data_set(complete, tmp_path):
    tree = complete(trees.oxford_pets)
    (tmp_path / tree.folder / tree.split_file).write_text("{")
    status, out, err = run("oxford_pets", "dtd", "--root", tmp_path, "--check")
    assert (status, err) == (1, "") and len(out.splitlines()) == 4
    assert f"{tree.split_file}: not a split file" in out and f"{tmp_path}/dtd: no such folder" in out


def test_check_of_drawings_and_of_the_user_s_folder(monkeypatch, tmp_path):
    monkeypatch.setattr("datasets.shapes.COUNTS", {"train": 1, "val": 1, "test": 1})
    status, out, _ = run("shapes", "--root", tmp_path, "--dry-run")
    assert status == 0 and "[ ] drawn by this program" in out
    assert run("shapes", "--root", tmp_path)[0] == 0
    status, out, _ = run("shapes", "--root", tmp_path, "--check")
    assert status == 0 and "96 images" in out and "32 classes" in out
    for name in ("cat/1", "cat/2", "dog/1", "dog/2"):
        trees.image(tmp_path / f"photos/{name}.jpg")
    assert run("folder", "--root", tmp_path / "photos", "--check")[0] == 0
    (tmp_path / "photos/cat/2.jpg").write_bytes(trees.JPEG[:-50])
    status, out, _ = run("folder", "--root", tmp_path / "photos", "--check")
    assert status == 1 and f"{tmp_path}/photos/cat/2.jpg: " in out

"""Files from elsewhere (weights, checkpoints, pickles, JSON, YAML, archives, images) execute and write nothing."""

import ast
import io
import json
import os
import pickle
import pickletools
import re
import shutil
import struct
import sys
import tarfile
import warnings
import zipfile
import zlib
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT
from PIL import Image, PngImagePlugin
from tiny import NAMES, SIZE, arguments, clip_state_dict

import dataset_fetch
import train
from datasets.fewshot import PickledDatum, read_pickled
from datasets.splits import read_split
from trainers.prompting import images as reading
from trainers.prompting.backbone import load_clip
from trainers.prompting.checkpoints import read_checkpoint
from trainers.prompting.data import decoded_size, read_image
from trainers.prompting.errors import UserError
from trainers.prompting.inert import load_inert, load_plain, load_script, load_weights

pytestmark = pytest.mark.filterwarnings("ignore:Detected pickle protocol")

# ------------------------------------------------------------------------------------------------- what code may say

BANNED = {
    **dict.fromkeys(["torch.jit.load", "os.system", "os.popen", "eval", "exec", "__import__", "marshal.loads"], ""),
    **dict.fromkeys(["pickle.load", "pickle.loads", "pickle.Unpickler", "yaml.unsafe_load", "yaml.full_load"], ""),
    **dict.fromkeys(["joblib.load", "shelve.open", "merge_from_file", "read_pickle", "load_pretrained_weights"], ""),
}


def findings(source):
    """Calls in a Python file that execute what they are given or unpickle it: [(line, text), …]."""
    found = []
    tree = ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef):
            unpickler = any(ast.unparse(base).endswith("Unpickler") for base in node.bases)
            if unpickler and not any(getattr(item, "name", "") == "find_class" for item in node.body):
                found.append((node.lineno, f"{node.name} finds every class"))
        elif isinstance(node, ast.ImportFrom) and node.module in ("torch", "torch.jit", "pickle", "yaml", "os"):
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            found += [(node.lineno, name) for name in names & (BANNED.keys() | {"torch.load", "yaml.load"})]
        elif isinstance(node, ast.Call):
            name, text = ast.unparse(node.func), ast.unparse(node)
            words = {word.arg: ast.unparse(word.value) for word in node.keywords}
            bad = (
                name in BANNED
                or name.split(".")[-1] in BANNED
                and "." in name
                and name.split(".")[-1]
                not in (
                    "eval",  # of a module
                    "exec",
                )
            )
            bad |= name == "torch.load" and words.get("weights_only") != "True"
            bad |= name == "yaml.load" and words.get("Loader") not in ("yaml.SafeLoader", "loader")
            bad |= name in ("np.load", "numpy.load") and words.get("allow_pickle", "False") != "False"
            bad |= name.endswith(".extractall") and "filter" not in words
            bad |= words.get("shell", "False") != "False" or "pickle_module" in words
            found += [(node.lineno, text)] if bad else []
    return found


@pytest.mark.parametrize(
    "line",
    [
        "torch.load(path)",
        "torch.load(path, weights_only=False)",
        "torch.load(path, weights_only=flag)",
        "torch.load(path, pickle_module=mine, weights_only=True)",
        "torch.jit.load(path)",
        "from torch import load",
        "from pickle import loads as innocent",
        "pickle.load(file)",
        "pickle.Unpickler(file).load()",
        "class Mine(pickle.Unpickler):\n    pass",
        "yaml.load(text)",
        "yaml.load(text, Loader=yaml.UnsafeLoader)",
        "eval(text)",
        "exec(text)",
        "os.system(text)",
        "subprocess.run(text, shell=True)",
        "np.load(path, allow_pickle=True)",
        "archive.extractall(folder)",
        "cfg.merge_from_file(path)",
    ],
)
def test_the_search_finds(line):
    assert findings(line)


def test_the_search_knows_what_is_harmless():
    allowed = "model.eval()\ntorch.load(p, weights_only=True)\nyaml.safe_load(t)\nclass U(pickle.Unpickler):\n    "
    assert not findings(allowed + "def find_class(self, module, name): ...")


def test_no_code_of_ours_executes_a_file():
    paths = [ROOT / "train.py"]
    paths += [p for name in ("trainers", "datasets", "fallback", "tools") for p in sorted((ROOT / name).rglob("*.py"))]
    assert len(paths) > 80
    found = {str(path.relative_to(ROOT)): findings(path.read_text(encoding="utf-8")) for path in paths}
    assert {name: calls for name, calls in found.items() if calls} == {}


# ------------------------------------------------------------------------------------------------- payloads


class Call:
    """Calls what it likes when it is unpickled."""

    def __init__(self, *call):
        self.call = call

    def __reduce__(self):
        return self.call


class State:
    """A harmless class whose state does it (``__setstate__``)."""

    def __init__(self, path):
        self.path = path

    def __setstate__(self, state):
        open(state["path"], "w").close()


def payloads(marker):
    """Raw pickles each of which makes the file ``marker`` where it is loaded with care for nothing."""
    command = f"touch {marker}"
    text = str(marker).encode()
    return {
        "reduce": pickle.dumps(Call(os.system, (command,)), 2),
        "reduce 4": pickle.dumps(Call(os.system, (command,)), 4),
        "eval": pickle.dumps(Call(eval, (f"open({str(marker)!r}, 'w')",))),
        "global": b"cos\nsystem\n(S'" + command.encode() + b"'\ntR.",
        "inst": b"(S'" + command.encode() + b"'\nios\nsystem\n.",
        "obj": b"(cos\nsystem\nS'" + command.encode() + b"'\no.",
        "newobj": b"\x80\x02cbuiltins\nopen\nX" + struct.pack("<I", len(text)) + text + b"X\x01\x00\x00\x00w\x86R.",
        "setstate": pickle.dumps(State(str(marker))),
        "nested": pickle.dumps(Call(pickle.loads, (pickle.dumps(Call(os.system, (command,))),))),
        "a folder": pickle.dumps(Call(os.makedirs, (str(marker),))),
    }


KINDS = list(payloads(Path("x")))


def zipped(path, pickled, storages=(), **records):
    """A file of torch with any pickle in it."""
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", pickled)
        archive.writestr("archive/version", b"3\n")
        for key, content in storages:
            archive.writestr(f"archive/data/{key}", content)
        for name, content in records.items():
            archive.writestr(f"archive/{name}", content)


def legacy(path, pickled):
    head = [pickle.dumps(part, 2) for part in (0x1950A86A20F9469CFC6C, 1001, {"little_endian": True})]
    path.write_bytes(b"".join(head) + pickled + pickle.dumps([], 2))


def within(payload, key="state_dict"):
    """A pickled checkpoint {"state_dict": …, "epoch": 1, "extra": payload}, the payload in its raw bytes."""
    body = payload[2:] if payload[:1] == b"\x80" else payload
    if body[:1] == b"\x95":  # a frame
        body = body[9:]
    head = b"\x80\x04}(X\x05\x00\x00\x00epochK\x01X" + struct.pack("<I", len(key)) + key.encode()
    return head + body[:-1] + b"u."


@pytest.mark.parametrize("kind", KINDS)
def test_the_payloads_do_work(kind, tmp_path):
    """Else the tests below would show nothing."""
    marker = tmp_path / "marker"
    pickle.loads(payloads(marker)[kind])
    assert marker.exists()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("write", [zipped, legacy])
def test_a_checkpoint_executes_nothing(kind, write, tmp_path):
    marker, path = tmp_path / "marker", tmp_path / "model.pth.tar-1"
    payload = payloads(marker)[kind]
    readers = (read_checkpoint, load_inert, load_plain, load_script, load_clip)
    for pickled in (payload, within(payload), within(payload, "epoch"), within(payload, "extra")):
        write(path, pickled)
        for reader in readers:
            with pytest.raises(Exception) as caught:  # noqa: B017 (torch's, pickle's and zip's own)
                reader(str(path))
            if reader in (read_checkpoint, load_clip):
                assert caught.type is UserError and str(path) in str(caught.value)
            assert not marker.exists()
        with pytest.raises(UserError, match=str(path)):
            load_weights(torch.nn.Linear(2, 2), str(path))
        assert not marker.exists()


def test_a_run_executes_nothing(data_root, rn_file, tmp_path, capsys):
    """Through the command line: as weights, as a model, as weights to start from, as a checkpoint to go on from."""
    marker, path = tmp_path / "marker", tmp_path / "model" / "prompt_learner" / "model.pth.tar-1"
    path.parent.mkdir(parents=True)
    zipped(path, within(payloads(marker)["reduce"]))
    (path.parent / "checkpoint").write_text(f"{path.name}\n")
    out = tmp_path / "out"
    evaluate = ["--eval-only", "--model-dir", tmp_path / "model", "--load-epoch", "1"]
    for argv in (
        arguments("CoOp", data_root, path, out),
        arguments("CoOp", data_root, rn_file, out, flags=evaluate),
        arguments("CoOp", data_root, rn_file, out, flags=["--resume", tmp_path / "model"]),
        arguments("CoOp", data_root, rn_file, out, "MODEL.INIT_WEIGHTS", path),
    ):
        assert train.main(argv) == 2
        assert str(path.parent) in capsys.readouterr().err
        assert not marker.exists()


@pytest.mark.parametrize("config", [7, "a: [", "[" * 50_000, "OPTIM: !!python/object/apply:os.getcwd []", "words"])
def test_a_config_in_a_checkpoint_that_is_none(config, tmp_path):
    path = tmp_path / "model.pth.tar-1"
    torch.save({"state_dict": {"ctx": torch.zeros(2)}, "epoch": 1, "config": config}, path)
    with pytest.raises(UserError, match="not a checkpoint that can be read"):
        read_checkpoint(str(path))


def test_files_of_other_kinds_are_refused(tmp_path):
    """An archive within an archive, NumPy's, a tar: none is taken for a checkpoint, none executes anything."""
    marker = tmp_path / "marker"
    inner, path = tmp_path / "inner.pt", tmp_path / "outer.pt"
    zipped(inner, payloads(marker)["reduce"])
    files = [inner.read_bytes()]
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data/0", inner.read_bytes())
    files.append(path.read_bytes())
    np.savez(tmp_path / "x.npz", a=np.array([Call(os.system, (f"touch {marker}",))], dtype=object))
    files.append((tmp_path / "x.npz").read_bytes())
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        info = tarfile.TarInfo("storages")
        info.size = inner.stat().st_size
        archive.addfile(info, io.BytesIO(inner.read_bytes()))
    files += [buffer.getvalue(), b"", b"\x80", b"PK\x03\x04", pickle.dumps(Call(os.system, (f"touch {marker}",)))]
    for name in ("x.pt", "x.npz", "x.safetensors"):
        for content in files:
            (tmp_path / name).write_bytes(content)
            with pytest.raises(UserError, match=name):
                load_clip(str(tmp_path / name))
            with pytest.raises(UserError, match=name):
                read_checkpoint(str(tmp_path / name))
            assert not marker.exists()


# ------------------------------------------------------------------------------------------------- TorchScript


class Program(torch.nn.Module):
    """Writes a file when it is loaded: TorchScript runs ``__setstate__``."""

    def __init__(self, path: str):
        super().__init__()
        self.path = path
        self.weight = torch.nn.Parameter(torch.ones(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.weight

    @torch.jit.export
    def __getstate__(self) -> tuple[str, torch.Tensor, bool]:
        return self.path, self.weight, self.training

    @torch.jit.export
    def __setstate__(self, state: tuple[str, torch.Tensor, bool]) -> None:
        self.path = state[0]
        self.weight = state[1]
        self.training = state[2]
        torch.save(state[1], state[0])


@pytest.mark.filterwarnings("ignore:.*torch.jit.*", "ignore:.*TorchScript.*")
def test_a_program_is_not_run_for_its_weights(tmp_path):
    marker, path = tmp_path / "marker", str(tmp_path / "program.pt")
    torch.jit.script(Program(str(marker))).save(path)
    assert not marker.exists()
    torch.jit.load(path)
    assert marker.exists()  # so that is what loading it means elsewhere
    marker.unlink()
    for reader in (load_clip, read_checkpoint):
        with pytest.raises(UserError, match=path):
            reader(path)
    for reader in (load_plain, load_inert):
        with pytest.raises(ValueError, match="TorchScript"):
            reader(path)
    assert not marker.exists()


@pytest.mark.filterwarnings("ignore:.*torch.jit.*", "ignore:.*TorchScript.*")
@pytest.mark.parametrize("arch", ["vit", "rn"])
def test_weights_of_a_program_are_those_that_torch_reads(arch, tmp_path):
    """Traced and in half precision, as OpenAI's archives are."""
    model = pytest.importorskip("open_clip.model").build_model_from_openai_state_dict(clip_state_dict(arch))
    example = torch.zeros(1, 3, SIZE, SIZE), torch.ones(1, 77, dtype=torch.long)
    path = str(tmp_path / "clip.pt")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.trace(model.float().eval(), example, check_trace=False).half().save(path)
        expected = torch.jit.load(path).state_dict()
    found = load_script(path)
    assert found.keys() == expected.keys() and len(found) > 60
    for name, value in expected.items():
        assert found[name].dtype == value.dtype and torch.equal(found[name], value)


# ------------------------------------------------------------------------------------------------- tensors of a lie


def description(key="0", numel=4, offset=0, size=(4,), stride=(1,), kind="FloatStorage"):
    """A pickled checkpoint with one tensor as torch would describe it, right or wrong, with an object that
    ``weights_only=True`` refuses."""

    class Pickler(pickle.Pickler):
        def persistent_id(self, thing):
            return thing.pid if isinstance(thing, Store) else None

    class Store:
        pid = ("storage", getattr(torch, kind, torch.FloatStorage), key, "cpu", numel)

    class Tensor:
        def __reduce__(self):
            return torch._utils._rebuild_tensor_v2, (Store(), offset, size, stride, False, OrderedDict())

    buffer = io.BytesIO()
    Pickler(buffer, 2).dump({"state_dict": {"ctx": Tensor()}, "epoch": 1, "scheduler": Call(print, ())})
    return buffer.getvalue()


FLOATS = struct.pack("<4f", 1, 2, 3, 4)


def test_a_tensor_as_described(tmp_path):
    path = tmp_path / "x.pt"
    zipped(path, description(), [("0", FLOATS)], byteorder=b"little")
    assert read_checkpoint(str(path))["state_dict"]["ctx"].tolist() == [1, 2, 3, 4]
    zipped(path, description(offset=1, size=(2,), stride=(2,)), [("0", FLOATS)])
    assert read_checkpoint(str(path))["state_dict"]["ctx"].tolist() == [2, 4]
    zipped(path, description(size=(), stride=(), offset=3), [("0", FLOATS)])
    assert read_checkpoint(str(path))["state_dict"]["ctx"].item() == 4
    zipped(path, description(numel=0, size=(0, 3), stride=(3, 1)), [("0", b"")])
    assert read_checkpoint(str(path))["state_dict"]["ctx"].shape == (0, 3)


@pytest.mark.parametrize(
    "lie",
    [
        {"offset": 1},
        {"size": (5,)},
        {"size": (2, 3), "stride": (1, 1), "offset": 1},
        {"size": (10**12,), "stride": (0,)},
        {"size": (2**62, 4), "stride": (0, 1)},
        {"offset": -1},
        {"size": (-4,)},
        {"stride": (-1,)},
        {"size": (4, 1)},
        {"size": [4]},
        {"size": (2.0,)},
        {"size": (True,)},
        {"size": "4"},
        {"numel": 5},
        {"numel": 2**62},
        {"numel": -4},
        {"numel": "4"},
        {"key": "../data.pkl"},
        {"key": 0},
        {"key": "1"},
        {"kind": "ComplexFloatStorage"},
    ],
)
def test_a_tensor_that_lies_is_refused(lie, tmp_path):
    path = tmp_path / "x.pt"
    zipped(path, description(**lie), [("0", FLOATS)])
    with pytest.raises((ValueError, KeyError), match="not known|holds of it|cut short|data/|no state dict"):
        load_inert(str(path))
    with pytest.raises(UserError, match="not a checkpoint that can be read"):
        read_checkpoint(str(path))


def test_a_file_cannot_make_much_of_a_little(tmp_path):
    """Compressed records, the same bytes under many names, a table of four thousand millions."""
    path = tmp_path / "x.pt"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", description())
        archive.writestr("archive/data/0", FLOATS)
    with pytest.raises(ValueError, match="compresses nothing"):
        load_inert(str(path))
    zipped(path, description(), [("0", FLOATS)], byteorder=b"big")
    with pytest.raises(ValueError, match="order of bytes"):
        load_inert(str(path))
    memo = b"\x80\x02Nr" + struct.pack("<I", 2**32 - 2) + b"."
    assert [code.name for code, _, _ in pickletools.genops(memo)][2] == "LONG_BINPUT"
    zipped(path, memo)
    with pytest.raises(ValueError, match="more memory"):
        load_inert(str(path))
    shared = io.BytesIO()  # one storage, a thousand tensors
    big = torch.zeros(1000)
    torch.save({"state_dict": {f"w{i}": big for i in range(1000)}, "epoch": 1, "scheduler": Call(print, ())}, shared)
    path.write_bytes(shared.getvalue())
    with pytest.raises(ValueError, match="larger than what the file holds"):
        load_inert(str(path))


def test_modules_in_a_circle(tmp_path):
    """A program whose module holds itself, and one whose modules multiply."""
    path = tmp_path / "x.pt"
    name = b"c__torch__.m\nM\n)\x81"
    zipped(path, b"\x80\x02" + name + b"q\x00}X\x01\x00\x00\x00ah\x00sb.", constants=b"")
    with pytest.raises(RecursionError):
        load_script(str(path))
    with pytest.raises(UserError, match=str(path)):
        load_clip(str(path))
    storage = b"(X\x07\x00\x00\x00storagectorch\nFloatStorage\nX\x01\x00\x00\x000X\x03\x00\x00\x00cpuK\x00tQ"
    tower = b"ctorch._utils\n_rebuild_tensor_v2\n(" + storage + b"K\x00K\x00\x85K\x01\x85tR"  # no numbers in it
    for i in range(17):  # 2^17 of it
        again = bytes([i])
        tower = name + b"}(X\x01\x00\x00\x00a" + tower + b"q" + again + b"X\x01\x00\x00\x00bh" + again + b"ub"
    zipped(path, b"\x80\x02" + tower + b".", [("0", b"")], constants=b"")
    with pytest.raises(ValueError, match="more tensors than in any model"):
        load_script(str(path))


# ------------------------------------------------------------------------------------------------- few-shot pickles


def datum(impath="a.jpg"):
    return (
        b"cdassl.data.datasets.base_dataset\nDatum\n)\x81}(X\x07\x00\x00\x00_impathX"
        + struct.pack("<I", len(impath))
        + impath.encode()
        + b"X\x06\x00\x00\x00_labelK\x00X\x0a\x00\x00\x00_classnameX\x03\x00\x00\x00cupub"
    )


@pytest.mark.parametrize("kind", KINDS)
def test_a_few_shot_pickle_executes_nothing(kind, tmp_path):
    marker, path = tmp_path / "marker", tmp_path / "shot_1-seed_1.pkl"
    path.write_bytes(b"\x80\x02}X\x05\x00\x00\x00train](" + datum() + b"es.")
    assert read_pickled(str(path)) == {"train": [("a.jpg", 0, "cup")]}
    payload = payloads(marker)[kind]
    for content in (payload, within(payload, "train")):
        path.write_bytes(content)
        with pytest.raises(UserError, match=str(path)):
            read_pickled(str(path))
        assert not marker.exists()


def test_a_pickle_cannot_change_how_the_next_one_is_read(tmp_path):
    """It can set attributes of a class that it names; that class is its own."""
    path = tmp_path / "shot_1-seed_1.pkl"
    path.write_bytes(
        b"\x80\x02cdassl.data.datasets.base_dataset\nDatum\nN}X\x07\x00\x00\x00_impathX\x04\x00\x00\x00evils\x86b."
    )
    with pytest.raises(UserError):
        read_pickled(str(path))
    assert PickledDatum._impath == ""


# ------------------------------------------------------------------------------------------------- JSON, YAML


@pytest.mark.parametrize(
    "content",
    [
        "[" * 200_000,
        '{"train": ' + "[" * 100_000 + "]" * 100_000 + ', "val": [], "test": []}',
        '{"train": [["a.jpg", 1e999, "cup"]], "val": [], "test": []}',
        '{"train": [["a.jpg", NaN, "cup"]], "val": [], "test": []}',
        '{"train": [["a.jpg", 0, "\\ud800"]], "val": [], "test": []}',
        '{"train": [["a\\u0000.jpg", 0, "cup"]], "val": [], "test": []}',
        '{"train": [["../a.jpg", 0, "cup"]], "val": [], "test": []}',
        '{"train": [["/etc/passwd", 0, "cup"]], "val": [], "test": []}',
        '{"train": [["a.jpg", ' + "9" * 10_000 + ', "cup"]], "val": [], "test": [1]}',
        '{"train": {"a": 1}, "val": [], "test": []}',
        "null",
        "\xff",
        "",
    ],
    ids=range(13),
)
def test_json_that_is_no_split(content, tmp_path):
    path = tmp_path / "split_zhou_Caltech101.json"
    path.write_text(content, encoding="latin-1")
    with pytest.raises(UserError, match="not a split file") as caught:
        read_split(str(path))
    assert str(path) in str(caught.value) and len(str(caught.value)) < 500


def test_a_few_shot_sample_that_is_nonsense_is_drawn_again(data_root, rn_file, tmp_path):
    kept = data_root / "caltech-101" / "split_fewshot" / "shot_4-seed_7.json"
    kept.parent.mkdir(exist_ok=True)
    for content in ("[" * 100_000, '{"source": 1}', '{"train": [["../../x.jpg", 0, "cup"]]}'):
        kept.write_text(content)
        argv = arguments("ZeroshotCLIP", data_root, rn_file, tmp_path / "out", flags=["--eval-only"], seed=7)
        assert train.main(argv) == 0
        assert json.loads(kept.read_text()).keys() == {"source", "train", "val"}


def test_a_config_executes_nothing(data_root, rn_file, tmp_path, capsys):
    """YAML's objects, and the Python files that yacs would import as configs."""
    marker = tmp_path / "marker"
    texts = {
        "a.yaml": f"OPTIM: !!python/object/apply:os.system ['touch {marker}']\n",
        "b.yaml": f"OPTIM: !!python/object/new:os.system ['touch {marker}']\n",
        "c.yaml": f"OPTIM: {{NAME: !!python/name:os.system }}\nINPUT: !!python/module:os\nSEED: 'touch {marker}'\n",
        "d.py": f"import os\nos.system('touch {marker}')\ncfg = {{'OPTIM': {{'LR': 1.0}}}}\n",
        "e.yaml": f"OPTIM: {{LR: \"__import__('os').system('touch {marker}')\"}}\n",
    }
    for name, text in texts.items():
        (tmp_path / name).write_text(text)
        argv = arguments("CoOp", data_root, rn_file, tmp_path / "out")
        argv[argv.index("--config-file") + 1] = str(tmp_path / name)
        assert train.main(argv) == 2
        assert str(tmp_path / name) in capsys.readouterr().err
        assert not marker.exists()


# ------------------------------------------------------------------------------------------------- archives


def tar(path, *members):
    """A tar of (name, type, link) members; files hold ``evil``."""
    with tarfile.open(path, "w") as archive:
        for name, kind, link in members:
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, link
            info.size = 4 if kind == tarfile.REGTYPE else 0
            archive.addfile(info, io.BytesIO(b"evil"))


FILE, LINK, HARD, FOLDER = tarfile.REGTYPE, tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.DIRTYPE
CHAIN = "d" * 200  # a path too long to be resolved was taken for one that stays inside (CVE-2025-4517)
ESCAPES = {
    "..": [("../owned", FILE, "")],
    "deep ..": [("a/b/../../../owned", FILE, "")],
    "link to a folder": [("a", LINK, ".."), ("a/owned", FILE, "")],
    "link to a file": [("a", LINK, "../secret"), ("a", FILE, "")],
    "absolute link": [("a", LINK, "/tmp"), ("a/owned", FILE, "")],
    "link inside": [("a", LINK, "b"), ("b", FILE, "")],
    "long links": [
        (CHAIN, FOLDER, ""),
        *[(f"{'l/' * i}l", LINK, CHAIN) for i in range(3)],
        ("x", LINK, "l/l/../../.."),
    ],
    "hard link": [("a", HARD, "../secret"), ("a", FILE, "")],
    "absolute hard link": [("a", HARD, "/etc/passwd")],
    "device": [("a", tarfile.CHRTYPE, "")],
    "block device": [("a", tarfile.BLKTYPE, "")],
    "pipe": [("a", tarfile.FIFOTYPE, "")],
}


@pytest.mark.skipif(not hasattr(tarfile, "data_filter"), reason="then nothing is unpacked at all")
@pytest.mark.parametrize("kind", ESCAPES)
def test_a_tar_writes_nothing_outside(kind, tmp_path):
    (tmp_path / "secret").write_text("mine")
    tar(tmp_path / "x.tar", *ESCAPES[kind])
    with pytest.raises(UserError, match="cannot be unpacked"):
        dataset_fetch.unpack(str(tmp_path / "x.tar"), str(tmp_path / "out"))
    assert (tmp_path / "secret").read_text() == "mine"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "secret", "x.tar"]
    assert not Path("/tmp/owned").exists() and not any(p.is_symlink() for p in (tmp_path / "out").rglob("*"))


@pytest.mark.parametrize(
    "name", ["../owned", "a/../../owned", "/tmp/owned", "..\\owned", "C:\\owned", "a/../../../owned"]
)
def test_a_zip_writes_nothing_outside(name, tmp_path):
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as archive:
        archive.writestr(name, "evil")
    with pytest.raises(UserError, match="cannot be unpacked"):
        dataset_fetch.unpack(str(tmp_path / "x.zip"), str(tmp_path / "out"))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "x.zip"] and not Path("/tmp/owned").exists()


def test_a_link_in_a_zip_is_a_file(tmp_path):
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as archive:
        info = zipfile.ZipInfo("a")
        info.external_attr = 0o120777 << 16
        archive.writestr(info, "../secret")
    dataset_fetch.unpack(str(tmp_path / "x.zip"), str(tmp_path / "out"))
    assert not (tmp_path / "out" / "a").is_symlink() and (tmp_path / "out" / "a").read_text() == "../secret"


# ------------------------------------------------------------------------------------------------- images


def chunk(kind, content):
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def png(width, height, *chunks):
    """The beginning of a PNG; its pixels are never reached."""
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0))
    return (
        b"\x89PNG\r\n\x1a\n" + head + b"".join(chunks) + chunk(b"IDAT", zlib.compress(b"\0" * 64)) + chunk(b"IEND", b"")
    )


BOMB = zlib.compress(b"x" * 70_000_000)
BOMBS = {
    "pixels.png": png(50_000, 50_000),
    "wide.png": png(2**31 - 1, 1),
    "limit.png": png(reading.MAX_PIXELS + 1, 1),
    "text.png": png(8, 8, chunk(b"zTXt", b"a\0\0" + BOMB)),
    "texts.png": png(8, 8, *[chunk(b"zTXt", b"a\0\0" + zlib.compress(b"x" * 1_000_000))] * 80),
    "unicode.png": png(8, 8, chunk(b"iTXt", b"a\0\1\0\0\0" + BOMB)),
    "profile.png": png(8, 8, chunk(b"iCCP", b"a\0\0" + BOMB)),
    "pixels.ppm": b"P6 100000 100000 255\n" + b"\0" * 100,
    "pixels.bmp": b"BM" + struct.pack("<IHHIIiiHHIIiiII", 100, 0, 0, 54, 40, 60_000, 60_000, 1, 24, 0, 0, 0, 0, 0, 0),
    "pixels.gif": b"GIF89a" + struct.pack("<HHBBB", 65_535, 65_535, 0, 0, 0) + b"\x3b",
}


@pytest.mark.parametrize("name", BOMBS)
def test_an_image_bomb_is_refused_by_name(name, tmp_path):
    path = tmp_path / name
    path.write_bytes(BOMBS[name])
    assert len(BOMBS[name]) < 200_000
    for read in (read_image, lambda path: decoded_size([path], 1e12)):
        with pytest.raises(OSError) as caught:
            read(str(path))
            read_image(str(path))  # the size alone may be right
        assert (
            str(caught.value).startswith(f"cannot decode image {path}: ") and len(str(caught.value).splitlines()) == 1
        )


def test_a_wide_photograph_is_read_without_a_word(tmp_path, recwarn):
    """20,000 pixels wide, and larger than where Pillow begins to warn."""
    assert Image.MAX_IMAGE_PIXELS * 2 == reading.MAX_PIXELS
    warnings.filterwarnings(
        "ignore", category=Image.DecompressionBombWarning
    )  # as importing images.py does; pytest undoes it
    Image.new("L", (20_000, 5_000), 128).save(tmp_path / "wide.png")
    assert read_image(str(tmp_path / "wide.png")).size == (20_000, 5_000)
    assert decoded_size([str(tmp_path / "wide.png")], 1e12) == 3 * 20_000 * 5_000
    assert not recwarn.list


def test_no_other_program_reads_an_image(tmp_path):
    """PostScript would be handed to Ghostscript, whatever the file is called."""
    (tmp_path / "x.jpg").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n")
    with Image.open(tmp_path / "x.jpg") as image:
        assert image.format == "EPS"
    with pytest.raises(OSError, match="x.jpg: not an image of a known format"):
        read_image(str(tmp_path / "x.jpg"))


@pytest.mark.parametrize("workers", [0, 1])
def test_a_bomb_in_a_data_set_is_named(workers, data_root, rn_file, tmp_path, capsys):
    tree = shutil.copytree(data_root, tmp_path / "data")
    victim = tree / "caltech-101" / "101_ObjectCategories" / NAMES[0] / "image_0009.jpg"
    victim.write_bytes(BOMBS["pixels.png"])
    opts = ("DATALOADER.NUM_WORKERS", workers)
    argv = arguments("ZeroshotCLIP", tree, rn_file, tmp_path / "out", *opts, flags=["--eval-only"])
    assert train.main(argv) == 2
    (line,) = [x for x in capsys.readouterr().err.splitlines() if x.startswith("error: ")]
    assert str(victim) in line


def test_limits_of_pillow_are_in_force():
    assert PngImagePlugin.MAX_TEXT_CHUNK <= 2**20 and PngImagePlugin.MAX_TEXT_MEMORY <= 2**26
    assert "EPS" not in reading.FORMATS and sys.modules["trainers.prompting.data"] is reading


# ------------------------------------------------------------------------------------------------- SECURITY.md


def test_every_test_that_is_named_is_there():
    text = (ROOT / "SECURITY.md").read_text(encoding="utf-8")
    named = re.findall(r"`(test_\w+\.py)::(test_\w+)`", text)
    assert len(named) > 40 and text.count(".py::") == len(named)
    for file, name in named:
        functions = ast.parse((ROOT / "tests" / file).read_text(encoding="utf-8")).body
        assert name in {getattr(function, "name", "") for function in functions}, f"{file}::{name}"
    for row in re.findall(r"^\| (?!promise).*", text, re.MULTILINE):
        assert "test_" in row, row  # no promise without a test


def test_the_limits_it_names_are_those_of_the_code():
    text = " ".join((ROOT / "SECURITY.md").read_text(encoding="utf-8").split())
    assert f"{reading.MAX_PIXELS:,} pixels" in text
    assert all(name in text.upper() for name in reading.FORMATS)

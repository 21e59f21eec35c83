"""Files from elsewhere (weights, checkpoints, JSON, YAML, images) are data: nothing in them is executed."""

import ast
import hashlib
import os
import pickle
import re
import struct
import tarfile
import warnings
import zipfile
import zlib
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT
from helpers import Runs, one_line
from PIL import Image, PngImagePlugin
from tiny import SIZE, arguments, clip_state_dict

import train
from datasets.splits import read_split
from trainers.prompting.backbone import OPENAI_MODELS, load_clip
from trainers.prompting.checkpoint import read_checkpoint
from trainers.prompting.data import FORMATS, MAX_PIXELS, decoded_size, read_image
from trainers.prompting.errors import UserError
from trainers.prompting.text_encoder import encode_texts
from trainers.prompting.weights import load_init_weights, load_tensors

pytestmark = pytest.mark.filterwarnings("ignore:.*pickle protocol", "ignore:.*torch.jit", "ignore:.*TorchScript")

BANNED = {"torch.jit.load", "os.system", "os.popen", "eval", "exec", "__import__", "marshal.loads", "pickle.load"}
BANNED |= {"pickle.loads", "pickle.Unpickler", "yaml.unsafe_load", "yaml.full_load", "joblib.load", "shelve.open"}
BANNED_METHODS = {"merge_from_file", "read_pickle", "load_pretrained_weights"}  # on any object
CHECKED = {"torch.load", "yaml.load"}  # allowed with certain arguments, and only under these names


def dangerous_calls(source):
    """Lines and texts of the calls in a Python file that unpickle or execute their input."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ClassDef):
            unpickler = any(ast.unparse(base).endswith("Unpickler") for base in node.bases)
            if unpickler and not any(getattr(item, "name", "") == "find_class" for item in node.body):
                found.append((node.lineno, f"{node.name} finds every class"))
        elif isinstance(node, ast.ImportFrom):
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            found += [(node.lineno, name) for name in names & (BANNED | CHECKED)]
        elif isinstance(node, ast.Call):
            name, words = ast.unparse(node.func), {word.arg: ast.unparse(word.value) for word in node.keywords}
            bad = (
                name in BANNED
                or name.split(".")[-1] in BANNED_METHODS
                or (name == "torch.load" and words.get("weights_only") != "True")
                or (name == "yaml.load" and words.get("Loader") not in ("yaml.SafeLoader", "loader"))
                or (name in ("np.load", "numpy.load") and words.get("allow_pickle", "False") != "False")
                or (name.endswith(".extractall") and "filter" not in words)
                or words.get("shell", "False") != "False"
                or "pickle_module" in words
            )
            found += [(node.lineno, ast.unparse(node))] if bad else []
    return found


DANGEROUS = """torch.load(path); torch.load(path, weights_only=flag); torch.jit.load(path); from torch import load
torch.load(path, pickle_module=mine, weights_only=True); from pickle import loads as innocent; eval(text)
pickle.Unpickler(file).load(); class Mine(pickle.Unpickler): pass; yaml.load(text, Loader=yaml.UnsafeLoader)
subprocess.run(text, shell=True); np.load(path, allow_pickle=True); archive.extractall(folder)
cfg.merge_from_file(path)"""


def test_search_finds_dangerous_calls():
    for line in re.split("; |\n", DANGEROUS):
        assert dangerous_calls(line), line
    harmless = "model.eval()\ntorch.load(p, weights_only=True)\nyaml.safe_load(t)\nclass U(pickle.Unpickler):\n    "
    assert not dangerous_calls(harmless + "def find_class(self, module, name): ...")


def test_no_code_of_ours_executes_a_file():
    """``torch.jit.load`` occurs once, behind the checksum of a published archive."""
    folders = [folder for folder in ("trainers", "datasets", "fallback", "tools", "toy") if (ROOT / folder).is_dir()]
    paths = [ROOT / "train.py", *(path for folder in folders for path in sorted((ROOT / folder).rglob("*.py")))]
    found = {}
    for path in paths:
        name, source = path.relative_to(ROOT).as_posix(), path.read_text(encoding="utf-8")
        found[name] = dangerous_calls(source)
        if name == "trainers/prompting/backbone.py":
            (node,) = [n for n in ast.parse(source).body if getattr(n, "name", "") == "_open_published_archive"]
            ((line, call),) = found[name]
            assert node.lineno <= line <= node.end_lineno and call.startswith("torch.jit.load(")
            found[name] = []
    assert {name: calls for name, calls in found.items() if calls} == {} and len(paths) > 60


class Call:
    """Calls a function when it is unpickled."""

    def __init__(self, *call):
        self.call = call

    def __reduce__(self):
        return self.call


def payloads(marker):
    """Raw pickles, each of which makes the file ``marker`` when it is unpickled."""
    command = f"touch {marker}"
    shell, text = command.encode(), str(marker).encode()
    return {
        "reduce": pickle.dumps(Call(os.system, (command,)), 2),
        "reduce 4": pickle.dumps(Call(os.system, (command,)), 4),
        "eval": pickle.dumps(Call(eval, (f"open({str(marker)!r}, 'w')",))),
        "global": b"cos\nsystem\n(S'" + shell + b"'\ntR.",
        "inst": b"(S'" + shell + b"'\nios\nsystem\n.",
        "obj": b"(cos\nsystem\nS'" + shell + b"'\no.",
        "newobj": b"\x80\x02cbuiltins\nopen\nX" + struct.pack("<I", len(text)) + text + b"X\x01\x00\x00\x00w\x86R.",
        "nested": pickle.dumps(Call(pickle.loads, (pickle.dumps(Call(os.system, (command,))),))),
    }


def zipped(path, pickled):
    """A torch file with any pickle in it."""
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", pickled)
        archive.writestr("archive/version", b"3\n")


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


@pytest.mark.parametrize("kind", payloads(Path("x")))
@pytest.mark.parametrize("write", [zipped, legacy])
def test_checkpoint_executes_nothing(kind, write, tmp_path):
    marker, path = tmp_path / "marker", tmp_path / "model.pth.tar-1"
    payload = payloads(marker)[kind]
    pickle.loads(payload)
    assert marker.exists()  # elsewhere it works
    marker.unlink()
    for pickled in (payload, within(payload), within(payload, "epoch"), within(payload, "extra")):
        write(path, pickled)
        for reader in (read_checkpoint, load_clip, lambda path: load_init_weights(torch.nn.Linear(2, 2), path)):
            assert str(path) in one_line(lambda r=reader: r(str(path)))
            assert not marker.exists()
        with suppress(Exception):  # an object may be read as an inert placeholder
            load_tensors(str(path))
        assert not marker.exists()


def test_run_executes_nothing(data_root, rn_file, tmp_path, capsys):
    """As weights, as a model, as weights to start from, as a checkpoint to resume from."""
    marker, path = tmp_path / "marker", tmp_path / "model" / "prompt_learner" / "model.pth.tar-1"
    path.parent.mkdir(parents=True)
    zipped(path, within(payloads(marker)["reduce"]))
    (path.parent / "checkpoint").write_text(f"{path.name}\n")
    run = Runs(data_root, rn_file, tmp_path, "CoOp")
    for backbone, opts, flags in (
        (path, (), ()),
        (rn_file, (), [*run.evaluation("model"), "--load-epoch", "1"]),
        (rn_file, (), ["--resume", tmp_path / "model"]),
        (rn_file, ("MODEL.INIT_WEIGHTS", path), ()),
    ):
        run.backbone = backbone
        run(*opts, flags=flags, out="out", status=2)
        assert str(path.parent) in capsys.readouterr().err
        assert not marker.exists()


def test_other_archives_are_refused(tmp_path):
    """An archive within an archive, NumPy's, a tar: none is taken for a checkpoint, none executes anything."""
    marker, inner, outer = tmp_path / "marker", tmp_path / "inner", tmp_path / "outer"
    zipped(inner, payloads(marker)["reduce"])
    with zipfile.ZipFile(outer, "w") as archive:
        archive.write(inner, "archive/data/0")
    with tarfile.open(tmp_path / "tar", "w") as archive:
        archive.add(inner, "storages")
    np.savez(tmp_path / "x.npz", a=np.array([Call(os.system, (f"touch {marker}",))], dtype=object))
    files = [path.read_bytes() for path in (inner, outer, tmp_path / "tar", tmp_path / "x.npz")]
    for content in (*files, b"", b"PK\x03\x04", payloads(marker)["reduce"]):
        for name in ("x.pt", "x.npz", "x.safetensors"):
            (tmp_path / name).write_bytes(content)
            for reader in (load_clip, read_checkpoint):
                assert name in one_line(lambda r=reader, n=name: r(str(tmp_path / n)))
            assert not marker.exists()


class Program(torch.nn.Module):
    """Writes a file when it is loaded; TorchScript runs ``__setstate__``."""

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


def test_program_is_not_run_for_its_weights(tmp_path):
    marker, path = tmp_path / "marker", str(tmp_path / "program.pt")
    torch.jit.script(Program(str(marker))).save(path)
    assert not marker.exists()
    torch.jit.load(path)
    assert marker.exists()  # loading it means running it
    marker.unlink()
    assert "checksum is none of OpenAI's" in one_line(lambda: load_clip(path))
    assert path in one_line(lambda: read_checkpoint(path))
    with pytest.raises(ValueError, match="TorchScript"):
        load_tensors(path)
    assert not marker.exists()


@pytest.mark.parametrize("arch", ["vit", "rn"])
def test_published_archive_is_read(arch, tmp_path, monkeypatch):
    """Traced, in half precision and with sizes among the buffers, as OpenAI's archives are."""
    state = clip_state_dict(arch)
    model = pytest.importorskip("open_clip.model").build_model_from_openai_state_dict(dict(state)).float().eval()
    model.load_state_dict(state)
    model.register_buffer("input_resolution", torch.tensor(SIZE))
    path, example = tmp_path / "clip.pt", (torch.zeros(1, 3, SIZE, SIZE), torch.ones(1, 77, dtype=torch.long))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.trace(model, example, check_trace=False).half().save(str(path))
    assert "checksum is none of OpenAI's" in one_line(lambda: load_clip(str(path)))
    monkeypatch.setitem(OPENAI_MODELS, "RN50", ("RN50", hashlib.sha256(path.read_bytes()).hexdigest()))
    torch.save({key: value.half() for key, value in state.items()}, tmp_path / "plain.pt")
    archive, plain = load_clip(str(path)), load_clip(str(tmp_path / "plain.pt"))
    image = torch.randn(2, 3, SIZE, SIZE)
    assert torch.equal(archive.encode_image(image), plain.encode_image(image))
    assert torch.equal(encode_texts(archive, ["cup"]), encode_texts(plain, ["cup"]))


ROWS = ('1e999, "c"', 'NaN, "c"', '0, "\\ud800"', '"0"', '0, "c"], ["../b", 0, "c"', '0, "c"], ["/b", 0, "c"')
SPLITS = [f'{{"train": [["a.jpg", {row}]], "val": [], "test": []}}' for row in ROWS]


@pytest.mark.parametrize("content", [*SPLITS, "[" * 200_000, '{"train": {"a": 1}, "val": [], "test": []}', "\xff", ""])
def test_invalid_split_is_refused(content, tmp_path):
    path = tmp_path / "split_zhou_Caltech101.json"
    path.write_text(content, encoding="latin-1")
    with pytest.raises(UserError, match="not a split file") as caught:
        read_split(str(path))
    assert str(path) in str(caught.value) and len(str(caught.value)) < 500


def test_config_executes_nothing(data_root, rn_file, tmp_path, capsys):
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
    "limit.png": png(MAX_PIXELS + 1, 1),
    "text.png": png(8, 8, chunk(b"zTXt", b"a\0\0" + BOMB)),
    "texts.png": png(8, 8, *[chunk(b"zTXt", b"a\0\0" + zlib.compress(b"x" * 1_000_000))] * 80),
    "unicode.png": png(8, 8, chunk(b"iTXt", b"a\0\1\0\0\0" + BOMB)),
    "profile.png": png(8, 8, chunk(b"iCCP", b"a\0\0" + BOMB)),
    "pixels.ppm": b"P6 100000 100000 255\n" + b"\0" * 100,
    "pixels.gif": b"GIF89a" + struct.pack("<HHBBB", 65_535, 65_535, 0, 0, 0) + b"\x3b",
}


@pytest.mark.parametrize("name", BOMBS)
def test_image_bomb_is_refused_by_name(name, tmp_path):
    path = tmp_path / name
    path.write_bytes(BOMBS[name])
    assert len(BOMBS[name]) < 200_000
    for read in (read_image, lambda path: decoded_size([path], 1e12)):
        with pytest.raises(OSError) as caught:
            read(str(path))
            read_image(str(path))  # the size alone may be right
        (line,) = str(caught.value).splitlines()
        assert line.startswith(f"cannot decode image {path}: ")


def test_large_photograph_is_read_without_a_warning(tmp_path, recwarn):
    """20,000 pixels wide, and larger than where Pillow begins to warn."""
    assert Image.MAX_IMAGE_PIXELS * 2 == MAX_PIXELS
    # as importing data.py does; pytest resets it
    warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)
    Image.new("L", (20_000, 5_000), 128).save(tmp_path / "wide.png")
    assert decoded_size([str(tmp_path / "wide.png")], 1e12) == 3 * 20_000 * 5_000
    assert read_image(str(tmp_path / "wide.png")).size == (20_000, 5_000)
    assert not recwarn.list


def test_no_other_program_reads_an_image(tmp_path):
    """PostScript would be handed to Ghostscript, whatever the file is called."""
    (tmp_path / "x.jpg").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n")
    with Image.open(tmp_path / "x.jpg") as image:
        assert image.format == "EPS" and "EPS" not in FORMATS
    with pytest.raises(OSError, match="x.jpg: not an image of a known format"):
        read_image(str(tmp_path / "x.jpg"))
    assert PngImagePlugin.MAX_TEXT_CHUNK <= 2**20 and PngImagePlugin.MAX_TEXT_MEMORY <= 2**26

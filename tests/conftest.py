"""Paths and fixtures that all tests share."""

import os
import signal
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tools")]

import torch  # noqa: E402
from hypothesis import settings  # noqa: E402
from tiny import ARCHITECTURES, caltech_tree, clip_state_dict  # noqa: E402

import fallback  # noqa: E402, F401 (before any test imports dassl)

# The same few examples every time: a suite that is fast and never fails by chance.
settings.register_profile("fixed", derandomize=True, max_examples=40, deadline=None, database=None)
settings.load_profile("fixed")

GOLDEN = Path(os.environ.get("LOGO_REFERENCE", ROOT.parent / "shared" / "golden"))
REAL_DATA = ROOT.parent / "shared" / "data"


def pytest_configure(config):
    import dassl

    # A shell starts what runs in the background with Ctrl-C ignored, and processes that the tests start inherit that.
    signal.signal(signal.SIGINT, signal.default_int_handler)

    if Path(dassl.__file__).is_relative_to(ROOT):  # the fallback: its warnings are ours
        config.addinivalue_line("filterwarnings", "error:::dassl")
    else:  # Dassl.pytorch's logger closes the standard output it stood in for, here pytest's, when it is collected
        from dassl.utils.logger import Logger

        Logger.__del__ = lambda self: None


def pytest_report_header(config):
    import dassl

    return f"dassl: {dassl.__file__} (version {getattr(dassl, '__version__', '?')})"


@pytest.fixture(autouse=True)
def keep_stdout(monkeypatch):
    """``setup_logger`` puts a logger in place of sys.stdout; a test must not leave it there."""
    monkeypatch.setattr(sys, "stdout", sys.stdout)


@pytest.fixture(scope="session")
def golden():
    """Folder of the reference values (LOGO_REFERENCE, default ../shared/golden)."""
    if not GOLDEN.is_dir():
        pytest.skip(f"no reference values at {GOLDEN} (set LOGO_REFERENCE)")
    return GOLDEN


@pytest.fixture(scope="session")
def real_data():
    """Folder with the real Caltech101 and a small real backbone."""
    if not (REAL_DATA / "caltech-101").is_dir():
        pytest.skip(f"no real Caltech101 at {REAL_DATA}")
    return REAL_DATA


@pytest.fixture(scope="session", params=ARCHITECTURES)
def clip_file(request, tmp_path_factory):
    """Path of a small random CLIP in OpenAI's layout, as a ViT and as a ResNet."""
    path = tmp_path_factory.mktemp("clip") / f"{request.param}.pt"
    torch.save(clip_state_dict(request.param), path)
    return str(path)


@pytest.fixture(scope="session")
def rn_file(tmp_path_factory):
    """Path of the small random ResNet CLIP (it has BatchNorm)."""
    path = tmp_path_factory.mktemp("clip") / "rn.pt"
    torch.save(clip_state_dict("rn"), path)
    return str(path)


@pytest.fixture(scope="session")
def data_root(tmp_path_factory):
    """A data root with a miniature Caltech101: 8 classes in CoOp's layout."""
    root = tmp_path_factory.mktemp("data")
    caltech_tree(root)
    return root

"""Checkpoints as the original CoOp and CoCoOp write them: read, evaluated, and nothing in them is executed."""

import json
import pickle
import sys
from collections import OrderedDict
from io import BytesIO

import numpy as np
import pytest
import torch
from tiny import arguments

import train
from trainers.prompting.checkpoints import read_checkpoint
from trainers.prompting.errors import UserError
from trainers.prompting.inert import Placeholder, Unpickler, load_inert

FORMATS = pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
UNPICKLED = []


class WarmupScheduler:
    """Like Dassl's: no torch class, with a torch schedule inside, which holds the optimiser."""

    def __init__(self, successor):
        self.successor, self.warmup_epoch, self.last_epoch = successor, 1, 49

    def state_dict(self):
        return dict(vars(self), itself=self)

    def __setstate__(self, state):
        UNPICKLED.append("the scheduler")
        vars(self).update(state)


class Payload:
    def __init__(self, *call):
        self.call = call

    def __reduce__(self):
        return self.call


def publish(path, state_dict, zipped, **more):
    """Write what Dassl's ``save_checkpoint`` writes of a model trained for 50 epochs."""
    parameters = [torch.nn.Parameter(value.clone().float()) for value in state_dict.values()]
    optimizer = torch.optim.SGD(parameters, lr=0.002, momentum=0.9)
    sum(p.sum() for p in parameters).backward()
    optimizer.step()
    schedule = WarmupScheduler(torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 50.0))
    state = {
        "state_dict": OrderedDict(state_dict),
        "epoch": 50,
        "optimizer": optimizer.state_dict(),
        "scheduler": schedule.state_dict(),
        "val_result": np.float64(71.5),
        **more,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(state, path, _use_new_zipfile_serialization=zipped)


@FORMATS
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_tensors_are_read_and_the_rest_is_left_alone(tmp_path, zipped, dtype):
    path = tmp_path / "model.pth.tar-50"
    state = {"ctx": torch.randn(4, 64).to(dtype), "token_prefix": torch.randn(9, 1, 64).to(dtype)}
    state["a view"] = torch.arange(12, dtype=dtype).view(3, 4).t()[1:]
    state["a parameter"] = torch.nn.Parameter(torch.randn(2, 3))
    publish(path, state, zipped)
    with pytest.raises(pickle.UnpicklingError):
        torch.load(path, weights_only=True)
    found = read_checkpoint(str(path))
    assert found.keys() == {"state_dict", "epoch"} and found["epoch"] == 50
    assert found["state_dict"].keys() == state.keys()
    for name, value in state.items():
        assert torch.equal(found["state_dict"][name], value) and found["state_dict"][name].dtype == value.dtype
    assert not UNPICKLED


@FORMATS
@pytest.mark.parametrize("trainer", ["CoOp", "CoCoOp"])
def test_a_published_model_is_evaluated(trainer, zipped, data_root, rn_file, tmp_path):
    def run(out, *flags):
        assert train.main(arguments(trainer, data_root, rn_file, tmp_path / out, flags=flags)) == 0
        sys.stdout.flush()
        return json.loads((tmp_path / out / "results.json").read_text())

    ours = run("ours")
    state = torch.load(tmp_path / "ours" / "prompt_learner" / "model.pth.tar-2", weights_only=True)["state_dict"]
    buffers = {"token_prefix": torch.zeros(1000, 1, 64), "token_suffix": torch.zeros(1000, 72, 64)}
    publish(tmp_path / "published" / "prompt_learner" / "model.pth.tar-50", {**state, **buffers}, zipped)
    theirs = run("theirs", "--eval-only", "--model-dir", tmp_path / "published", "--load-epoch", "50")
    assert theirs["metrics"] == ours["metrics"] and theirs["run"]["epochs"] == 50
    assert not UNPICKLED


@FORMATS
@pytest.mark.parametrize("where", ["scheduler", "state_dict", "epoch", "extra"])
def test_nothing_is_executed(tmp_path, zipped, where):
    """Whatever a pickle calls, and wherever: it is read without it, or refused."""
    path, touched = tmp_path / "model.pth.tar-50", tmp_path / "touched"
    code = f"open({str(touched)!r}, 'w')"
    for call in ((eval, (code,)), (exec, (code,)), (open, (str(touched), "w")), (torch.save, ({}, str(touched)))):
        payload = Payload(*call)
        pickle.loads(pickle.dumps(payload))
        assert touched.exists()  # it does work elsewhere
        touched.unlink()
        state = {"ctx": torch.zeros(2, 3)}
        if where == "state_dict":
            publish(path, state, zipped)
            torch.save({"state_dict": {**state, "x": payload}, "epoch": 1}, path, _use_new_zipfile_serialization=zipped)
        else:
            publish(path, state, zipped, **{where: payload})
        if where in ("state_dict", "epoch"):
            with pytest.raises(UserError, match=str(path)):
                read_checkpoint(str(path))
        else:
            assert torch.equal(read_checkpoint(str(path))["state_dict"]["ctx"], state["ctx"])
        assert not touched.exists()


def test_placeholders_are_inert():
    thing = Placeholder(1, key=2)
    thing.__setstate__({"append": eval})
    thing["a"] = 1
    thing.append(1), thing.extend([1]), thing.add(1)
    assert vars(thing) == {}


def test_functions_of_torch_cannot_be_changed_by_a_pickle():
    """A pickle can set attributes of what it names, here ``__defaults__`` of the function that rebuilds tensors."""
    stream = b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\nN}X\x0c\x00\x00\x00__defaults__(K\x07ts\x86b."
    before = torch._utils._rebuild_tensor_v2.__defaults__
    changed = Unpickler(BytesIO(stream)).load()
    assert changed.__defaults__ == (7,)  # of what it was given instead
    assert torch._utils._rebuild_tensor_v2.__defaults__ == before


@pytest.mark.filterwarnings("ignore:.*torch.jit.*:FutureWarning", "ignore:.*torch.jit.*:DeprecationWarning")
def test_what_is_no_checkpoint_is_refused_in_one_line(tmp_path):
    path = tmp_path / "model.pth.tar-50"
    torch.jit.script(torch.nn.Linear(2, 2)).save(str(path))
    with pytest.raises(ValueError, match="TorchScript"):
        load_inert(str(path))
    contents = [{"epoch": 1}, {"state_dict": {"ctx": 1}, "epoch": 1}, [1], WarmupScheduler(1)]
    for content in [*contents, None]:
        if content is None:
            path.write_bytes(b"rubbish")
        else:
            torch.save({**content, "more": WarmupScheduler(1)} if isinstance(content, dict) else content, path)
        with pytest.raises(UserError, match="not a checkpoint that can be read"):
            read_checkpoint(str(path))
    assert not UNPICKLED

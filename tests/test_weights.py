"""weights.py: checkpoints as the original CoOp and CoCoOp write them are read, and nothing in them is executed."""

import pickle
from collections import OrderedDict

import numpy as np
import pytest
import torch
from helpers import Runs, one_line

from trainers.prompting.checkpoint import read_checkpoint
from trainers.prompting.weights import Placeholder, load_init_weights, load_tensors

UNPICKLED = []
needs_placeholders = pytest.mark.skipif(
    not hasattr(torch.serialization, "get_unsafe_globals_in_checkpoint"), reason="torch before 2.6 refuses them"
)


class WarmupScheduler:
    """Like Dassl's: no torch class, with a torch schedule inside, which holds the optimizer."""

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


def publish(path, state_dict, **more):
    """Write what Dassl's ``save_checkpoint`` writes of a model trained for 50 epochs."""
    parameters = [torch.nn.Parameter(value.clone().float()) for value in state_dict.values()]
    optimizer = torch.optim.SGD(parameters, lr=0.002, momentum=0.9)
    sum(p.sum() for p in parameters).backward()
    optimizer.step()
    schedule = WarmupScheduler(torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 50.0))
    content = {
        "state_dict": OrderedDict(state_dict),
        "epoch": 50,
        "optimizer": optimizer.state_dict(),
        "scheduler": schedule.state_dict(),
        "val_result": np.float64(71.5),
        **more,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(content, path)


@needs_placeholders
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_tensors_are_read_and_objects_are_not_restored(tmp_path, dtype):
    path = tmp_path / "model.pth.tar-50"
    state = {"ctx": torch.randn(4, 64).to(dtype), "token_prefix": torch.randn(9, 1, 64).to(dtype)}
    state["a view"] = torch.arange(12, dtype=dtype).view(3, 4).t()[1:]
    state["a parameter"] = torch.nn.Parameter(torch.randn(2, 3))
    publish(path, state, extra=Payload(open, (str(tmp_path / "touched"), "w")))
    with pytest.raises(pickle.UnpicklingError):
        torch.load(path, weights_only=True)
    found = read_checkpoint(str(path))
    assert found.keys() == {"state_dict", "epoch"} and found["epoch"] == 50
    assert found["state_dict"].keys() == state.keys()
    for name, value in state.items():
        assert torch.equal(found["state_dict"][name], value) and found["state_dict"][name].dtype == value.dtype
    scheduler = load_tensors(str(path))["scheduler"]["itself"]
    assert isinstance(scheduler, Placeholder) and vars(scheduler) == {}
    assert not UNPICKLED and not (tmp_path / "touched").exists()


@needs_placeholders
@pytest.mark.parametrize("trainer", ["CoOp", "CoCoOp"])
def test_published_model_is_evaluated(trainer, data_root, rn_file, tmp_path):
    run = Runs(data_root, rn_file, tmp_path, trainer)
    ours = run(out="ours").evaluation
    buffers = {"token_prefix": torch.zeros(1000, 1, 64), "token_suffix": torch.zeros(1000, 72, 64)}
    publish(tmp_path / "published" / "prompt_learner" / "model.pth.tar-50", {**run.states("ours")[2], **buffers})
    theirs = run(flags=[*run.evaluation("published"), "--load-epoch", "50"], out="theirs").evaluation
    assert theirs.metrics == ours.metrics and theirs.predictions == ours.predictions
    assert not UNPICKLED


@pytest.mark.filterwarnings("ignore:.*torch.jit.*", "ignore:.*TorchScript.*")
def test_other_files_are_no_checkpoints(tmp_path):
    path = tmp_path / "model.pth.tar-50"
    torch.jit.script(torch.nn.Linear(2, 2)).save(str(path))
    with pytest.raises(ValueError, match="TorchScript"):
        load_tensors(str(path))
    contents = [{"epoch": 1}, {"state_dict": {"ctx": 1}, "epoch": 1}, [1], WarmupScheduler(1)]
    for content in (*contents, {"state_dict": {"ctx": torch.zeros(2)}, "epoch": "1"}):
        torch.save(content, path)
        assert "not a checkpoint that can be read" in one_line(lambda: read_checkpoint(str(path)))
    path.write_bytes(b"rubbish")
    assert "not a checkpoint that can be read" in one_line(lambda: read_checkpoint(str(path)))
    assert not UNPICKLED


def test_initial_weights_are_loaded_where_they_fit(tmp_path, capsys):
    module, path = torch.nn.Linear(3, 2), str(tmp_path / "weights.pt")
    bias = module.bias.detach().clone()
    torch.save({"state_dict": {"module.weight": torch.ones(2, 3), "bias": torch.zeros(5), "x": torch.ones(1)}}, path)
    load_init_weights(module, path)
    assert torch.equal(module.weight, torch.ones(2, 3)) and torch.equal(module.bias, bias)
    assert "['bias', 'x']" in capsys.readouterr().out
    torch.save({"x": torch.ones(1)}, path)
    assert "nothing in it fits, it holds x" in one_line(lambda: load_init_weights(module, path))

"""What of a run's lines a terminal shows."""

import io

from trainers.prompting.console import LINES, BriefConsole


def shown(epochs, batches, every):
    stream = io.StringIO()
    console = BriefConsole(stream)
    print("before", file=console)
    for epoch in range(1, epochs + 1):
        for batch in range(every, batches + 1, every):
            print(f"epoch [{epoch}/{epochs}] batch [{batch}/{batches}] time 0.1 loss 1.0", file=console)
        print(f"epoch [{epoch}/{epochs}] took 1.0 s, 5 % of it waiting for images", file=console)
        print(f"Checkpoint saved to run/prompt_learner/model.pth.tar-{epoch}", file=console)
        if epoch == 2:
            print("WARNING: training collapses", file=console)
    print("after", file=console)
    return stream.getvalue().splitlines()


def test_few_lines_of_long_training():
    lines = shown(epochs=200, batches=25, every=5)
    training = [line for line in lines if line.startswith("epoch")]
    assert LINES <= len(training) <= LINES + 1 and training[-1].startswith("epoch [200/200] batch [25/25]")
    others = [line for line in lines if line not in training]
    assert others == [
        "before",
        "WARNING: training collapses",
        "Checkpoint saved to run/prompt_learner/model.pth.tar-200",
        "after",
    ]


def test_short_training_is_shown_as_it_is():
    lines = shown(epochs=3, batches=2, every=1)
    assert [line[:24] for line in lines[1:4]] == [
        "epoch [1/3] batch [1/2] ",
        "epoch [1/3] batch [2/2] ",
        "epoch [2/3] batch [1/2] ",
    ]
    assert len([line for line in lines if " batch " in line]) == 6

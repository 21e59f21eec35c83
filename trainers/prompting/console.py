"""A terminal that shows part of the lines of training; ``log.txt`` holds all of them."""

from __future__ import annotations

import re
from typing import TextIO

LINES = 10  # of training that are shown
EPOCH = re.compile(r"epoch \[(\d+)/(\d+)\](?: batch \[(\d+)/(\d+)\])?")
CHECKPOINT = re.compile(r"Checkpoint saved to .*\.tar-(\d+)$")


class BriefConsole:
    """Passes text on to a stream, but of Dassl's lines on batches only some, evenly spread over training.

    Lines on the duration of an epoch and on checkpoints before the last epoch are left out.
    """

    def __init__(self, stream: TextIO) -> None:
        self.stream, self._shown, self._epochs, self._left_out = stream, -1, "", False

    def __getattr__(self, name: str):
        return getattr(self.__dict__["stream"], name)

    def write(self, text: str) -> int:
        if text == "\n" and self._left_out:  # print() writes it after the line
            self._left_out = False
            return 1
        self._left_out = self._superfluous(text)
        return len(text) if self._left_out else self.stream.write(text)

    def _superfluous(self, text: str) -> bool:
        if match := CHECKPOINT.match(text):
            return match[1] != self._epochs
        if (match := EPOCH.match(text)) is None:
            return False
        epoch, self._epochs, batch, batches = match.groups()
        if batch is None:
            return " took " in text
        done = int(LINES * (int(epoch) - 1 + int(batch) / int(batches)) / int(self._epochs))
        if done == self._shown:
            return True
        self._shown = done
        return False

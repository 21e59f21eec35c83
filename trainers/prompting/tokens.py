"""One interface to the tokenizers of all CLIPs: either package's ``SimpleTokenizer``, and those of Hugging Face."""

from __future__ import annotations

from typing import Any

LONGEST = 512  # tokens of a text; more than any CLIP takes


class Tokenizer:
    """Token ids of texts. A full prompt is ``head``, the text, ``eot``, padding up to the context length, ``tail``.

    Attributes:
        head: ids in front of every text, [SOS]; empty for SigLIP.
        eot: id behind every text, [EOT]; CLIPA has padding there.
        pad: id of the padding; in SigLIP that of [EOT].
        tail: ids at the very end; empty but for CLIPS.
        word: id of an ordinary token.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self.context_length: int = getattr(tokenizer, "context_length", None) or LONGEST
        if hasattr(tokenizer, "encoder"):  # the packages spell its special tokens differently; they are the last two
            n = len(tokenizer.encoder)
            self.head, self.eot, self.pad, self.tail = [n - 2], n - 1, 0, []
        else:
            empty, word = self.padded("", LONGEST), self.padded("a", LONGEST)
            first = next(i for i, pair in enumerate(zip(empty, word)) if pair[0] != pair[1])
            self.head, self.eot, self.pad = empty[:first], empty[first], empty[first + 1]
            self.tail = [] if empty[-1] == self.pad else empty[-1:]
        self.word: int = self.encode("a")[0]

    def encode(self, text: str) -> list[int]:
        """Ids of a text, without special tokens."""
        if hasattr(self._tokenizer, "encoder"):
            return self._tokenizer.encode(text)
        ids = self.padded(text, LONGEST)[len(self.head) : LONGEST - len(self.tail)]
        while ids and ids[-1] == self.pad:
            ids.pop()
        return ids[:-1] if ids and ids[-1] == self.eot else ids

    def encode_after_words(self, text: str) -> list[int]:
        """Ids of a text that continues a sentence: SentencePiece joins a word with the space before it."""
        if hasattr(self._tokenizer, "encoder"):
            return self._tokenizer.encode(text)
        return self.encode(f"a {text}")[len(self.encode("a")) :]

    def padded(self, text: str, length: int) -> list[int]:
        """Ids of a full prompt as the package makes it."""
        if callable(self._tokenizer):
            return self._tokenizer([text], context_length=length)[0].tolist()
        ids = [*self.head, *self.encode(text), self.eot]
        return ids + [self.pad] * (length - len(ids))

    def placeholder(self, eot: int, length: int) -> list[int]:
        """Ids of a full prompt of ordinary tokens with [EOT] at a position: all that pooling and masks depend on."""
        words = [self.word] * (eot - len(self.head))
        padding = [self.pad] * (length - eot - 1 - len(self.tail))
        return [*self.head, *words, self.eot, *padding, *self.tail]

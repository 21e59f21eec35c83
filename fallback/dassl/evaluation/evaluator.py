"""Measuring a model on a split."""

from __future__ import annotations

import os.path as osp
from collections import OrderedDict
from typing import Any

import numpy as np
import torch

from ..utils import atomic_write, mkdir_if_missing
from .build import EVALUATOR_REGISTRY

__all__ = ["Classification", "EvaluatorBase"]


class EvaluatorBase:
    """What an evaluator offers: ``reset()``, then ``process()`` for each batch, then ``evaluate()``."""

    def __init__(self, cfg: Any) -> None:
        self.cfg = cfg

    def reset(self) -> None:
        """Forget all batches."""
        raise NotImplementedError

    def process(self, mo: Any, gt: Any) -> None:
        """Take in the model's output ``mo`` and the ground truth ``gt`` of a batch."""
        raise NotImplementedError

    def evaluate(self) -> OrderedDict:
        """Print and return the results; the first one is what the trainer compares models by."""
        raise NotImplementedError


@EVALUATOR_REGISTRY.register()
class Classification(EvaluatorBase):
    """Accuracy, error rate and macro-averaged F1 of a classifier, in percent.

    Args:
        lab2cname: class name of each label, needed for TEST.PER_CLASS_RESULT (else a ValueError).
    """

    def __init__(self, cfg: Any, lab2cname: dict[int, str] | None = None, **kwargs: Any) -> None:
        super().__init__(cfg)
        if cfg.TEST.PER_CLASS_RESULT and lab2cname is None:
            raise ValueError("TEST.PER_CLASS_RESULT needs lab2cname, the class name of each label")
        self._lab2cname = lab2cname
        self.reset()

    def reset(self) -> None:
        """Forget all batches."""
        self._correct = 0
        self._total = 0
        self._y_true: list[int] = []
        self._y_pred: list[int] = []

    def process(self, mo: torch.Tensor, gt: torch.Tensor) -> None:
        """Take in scores ``mo`` (batch, classes) and labels ``gt`` (batch,)."""
        pred = mo.max(1)[1]
        self._correct += int((pred == gt).sum())
        self._total += len(gt)
        self._y_true += gt.tolist()
        self._y_pred += pred.tolist()

    def evaluate(self) -> OrderedDict:
        """Print and return "accuracy", "error_rate" and "macro_f1" (over the classes that occur in the labels).

        TEST.PER_CLASS_RESULT adds "perclass_accuracy", the mean over classes; TEST.COMPUTE_CMAT writes the confusion
        matrix to OUTPUT_DIR/cmat.pt: a tensor, row = label, column = prediction (all classes that occur, in order),
        each row divided by its sum.
        """
        classes, codes = np.unique(self._y_true + self._y_pred, return_inverse=True)
        true, pred = codes.reshape(2, -1)  # both as positions in classes
        counts = np.zeros((len(classes), len(classes)), dtype=np.int64)
        np.add.at(counts, (true, pred), 1)

        accuracy = 100.0 * self._correct / self._total
        results = OrderedDict(
            accuracy=accuracy,
            error_rate=100.0 - accuracy,
            macro_f1=self._macro_f1(counts),
        )
        print("=> result")
        print(f"* total: {self._total:,}")
        print(f"* correct: {self._correct:,}")
        print(f"* accuracy: {results['accuracy']:.1f}%")
        print(f"* error: {results['error_rate']:.1f}%")
        print(f"* macro_f1: {results['macro_f1']:.1f}%")

        if self.cfg.TEST.PER_CLASS_RESULT:
            results["perclass_accuracy"] = self._per_class(classes, counts)
        if self.cfg.TEST.COMPUTE_CMAT:
            self._save_confusion(counts)
        return results

    @staticmethod
    def _macro_f1(counts: np.ndarray) -> float:
        labelled = counts.sum(axis=1)
        predicted = counts.sum(axis=0)
        occurs = labelled > 0
        f1 = 2.0 * counts.diagonal()[occurs] / (labelled + predicted)[occurs]
        return float(100.0 * f1.mean())

    def _per_class(self, classes: np.ndarray, counts: np.ndarray) -> float:
        print("=> per-class result")
        accuracies = []
        for label, total, correct in zip(classes.tolist(), counts.sum(axis=1).tolist(), counts.diagonal().tolist()):
            if total == 0:  # predicted, but never a label
                continue
            accuracies.append(100.0 * correct / total)
            columns = [f"* class: {label} ({self._lab2cname[label]})", f"total: {total:,}", f"correct: {correct:,}"]
            print("\t".join([*columns, f"acc: {accuracies[-1]:.1f}%"]))
        mean = float(np.mean(accuracies))
        print(f"* average: {mean:.1f}%")
        return mean

    def _save_confusion(self, counts: np.ndarray) -> None:
        totals = counts.sum(axis=1, keepdims=True)
        shares = counts / np.maximum(totals, 1)  # rows of classes that are only predicted stay 0
        path = osp.join(self.cfg.OUTPUT_DIR, "cmat.pt")
        mkdir_if_missing(self.cfg.OUTPUT_DIR)
        with atomic_write(path) as stream:
            torch.save(torch.from_numpy(shares), stream)
        print(f"Confusion matrix is saved to {path}")

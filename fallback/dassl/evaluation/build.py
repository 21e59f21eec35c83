"""Evaluators and their registry."""

import os.path as osp
from collections import OrderedDict

import numpy as np
import torch

from ..utils import Registry, mkdir_if_missing

EVALUATOR_REGISTRY = Registry("EVALUATOR")


def build_evaluator(cfg, **kwargs):
    return EVALUATOR_REGISTRY.build(cfg.TEST.EVALUATOR, cfg, **kwargs)


@EVALUATOR_REGISTRY.register()
class Classification:
    """Accuracy, error rate and macro-averaged F1, in percent; ``lab2cname`` is needed for TEST.PER_CLASS_RESULT."""

    def __init__(self, cfg, lab2cname=None, **kwargs) -> None:
        if cfg.TEST.PER_CLASS_RESULT and lab2cname is None:
            raise ValueError("TEST.PER_CLASS_RESULT needs lab2cname, the class name of each label")
        self.cfg, self._lab2cname = cfg, lab2cname
        self.reset()

    def reset(self) -> None:
        self._y_true, self._y_pred = [], []

    def process(self, mo: torch.Tensor, gt: torch.Tensor) -> None:
        """Add the scores (B, C) and labels (B,) of a batch."""
        self._y_true += gt.tolist()
        self._y_pred += mo.max(1)[1].tolist()

    def evaluate(self) -> OrderedDict:
        """Print and return the results; macro averages are over the classes among the labels."""
        classes, codes = np.unique(self._y_true + self._y_pred, return_inverse=True)
        counts = np.zeros((len(classes), len(classes)), dtype=np.int64)
        np.add.at(counts, tuple(codes.reshape(2, -1)), 1)
        occurs = counts.sum(axis=1) > 0  # among the labels
        hits, labelled, predicted = counts.diagonal()[occurs], counts.sum(axis=1)[occurs], counts.sum(axis=0)[occurs]
        total, correct = int(labelled.sum()), int(hits.sum())
        accuracy, f1 = 100.0 * correct / total, 2.0 * hits / (labelled + predicted)
        results = OrderedDict(accuracy=accuracy, error_rate=100.0 - accuracy, macro_f1=float(100.0 * f1.mean()))
        print(f"=> result\n* total: {total:,}\n* correct: {correct:,}\n* accuracy: {accuracy:.1f}%")
        print(f"* error: {results['error_rate']:.1f}%\n* macro_f1: {results['macro_f1']:.1f}%")
        if self.cfg.TEST.PER_CLASS_RESULT:
            print("=> per-class result")
            shares = 100.0 * hits / labelled
            for c, n, hit, share in zip(classes[occurs].tolist(), labelled, hits, shares):
                print(f"* class: {c} ({self._lab2cname[c]})\ttotal: {n:,}\tcorrect: {hit:,}\tacc: {share:.1f}%")
            results["perclass_accuracy"] = float(shares.mean())
            print(f"* average: {shares.mean():.1f}%")
        if self.cfg.TEST.COMPUTE_CMAT:  # of all classes that occur: rows are labels and sum to 1
            path = osp.join(self.cfg.OUTPUT_DIR, "cmat.pt")
            mkdir_if_missing(self.cfg.OUTPUT_DIR)
            torch.save(torch.from_numpy(counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)), path)
            print(f"Confusion matrix is saved to {path}")
        return results

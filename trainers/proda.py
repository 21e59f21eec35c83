"""ProDA: Prompt Distribution Learning (Lu et al., CVPR 2022, arXiv 2205.03340).

All classes share a collection of K contexts P_k. Their text features w_1(P_k) … w_C(P_k) are taken for samples of a
Gaussian over classifiers, with mean mu and covariance Sigma. Training minimises an upper bound of the expected
cross-entropy under this Gaussian; the mean classifier predicts. Symbols: image feature z of unit length, label y,
temperature tau.

Section 3, on learning the prompt distribution:
    E_w[-log p(y|x; w)] <= -log( exp(z.mu_y / tau) / sum_i exp(z.mu_i / tau + z' A_iy z / (2 tau²)) ) = L_upper,
    A_iy = Sigma_ii + Sigma_yy - Sigma_iy - Sigma_yi, so z' A_iy z is the variance of z.(w_i - w_y).
    This is Jensen's inequality for the logarithm, with E[exp(v)] = exp(E[v] + Var[v] / 2) for a normal v.
Section 3, on diversity: the class name is at the front, in the middle or at the end, depending on the prompt, and
    lambda L_so is added, where L_so is the mean |cos| of the features of two contexts without a class name.
Every step encodes a random mini-batch of the collection and estimates mu and Sigma from it.

The paper came without code, and its full text was not available for this file, which therefore cites no equation
numbers: it rests on summaries of the paper, a derivation of L_upper, and facts from copies of a later implementation.
Details that could not be checked are config keys. Where that code differs from the defaults: half of the prompts have
the class name at the end (``POSITIONS``), sums for Sigma are divided by n + 1 (``CORRECTION`` -1), the dimensions of a
feature are independent (``COVARIANCE``); and it passes through a shuffled collection, where this file draws every
mini-batch anew. As there, L_so is that of the whole collection, and mu is not scaled to unit length.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn as nn
import torch.nn.functional as F
from dassl.engine import TRAINER_REGISTRY
from yacs.config import CfgNode

from .prompting.backbone import Backbone
from .prompting.config import CONTEXT, PREC, Key, at_least, one_of, unmet, within
from .prompting.image_batch import ImageBatch
from .prompting.method import Method, Step
from .prompting.prompts import PromptLearner
from .prompting.text_encoder import TextEncoder
from .prompting.trainer import PromptTrainer

# Position of the class name in the prompts of the collection, in turn.
POSITIONS = {"equal": ("end", "middle", "front"), "half_end": ("end", "middle", "end", "front"), "end": ("end",)}

KEYS = {
    "N_CTX": CONTEXT["N_CTX"],  # M, number of context vectors
    "PREC": PREC,
    "N_PROMPT": Key(32, at_least(1)),  # K, size of the collection
    "N_BATCH": Key(4, at_least(1)),  # prompts of the collection that are encoded in a step
    "LAMBDA": Key(0.1, at_least(0)),  # weight of the semantic orthogonality loss
    "POSITIONS": Key("equal", one_of(POSITIONS)),
    "COVARIANCE": Key("full", one_of(("full", "diagonal"))),  # diagonal: that of each dimension of a feature
    "CORRECTION": Key(0, within(-1, 1)),  # sums over n prompts are divided by n - CORRECTION to get the covariance
}


class PromptCollection(nn.Module):
    """K contexts of M vectors, drawn from N(0, 0.02²): ``ctx`` (K, M, D). Nothing belongs to a class."""

    def __init__(self, n_prompt: int, n_ctx: int, backbone: Backbone) -> None:
        super().__init__()
        ctx = torch.empty(n_prompt, n_ctx, backbone.text_width, dtype=backbone.dtype)
        self.ctx = nn.Parameter(nn.init.normal_(ctx, std=0.02))


class CustomCLIP(Method):
    """CLIP with a distribution of text prompts."""

    config_name, keys = "PRODA", KEYS

    def __init__(self, cfg: CfgNode, classnames: Sequence[str], backbone: Backbone) -> None:
        super().__init__(cfg, classnames, backbone)
        options = self.options
        self.learned = PromptCollection(options.N_PROMPT, options.N_CTX, backbone)
        self.positions = POSITIONS[options.POSITIONS]
        # Class names with their full stop and [EOT], and how a context goes around them; their own contexts are unused.
        words = backbone, classnames, options.N_CTX, "", False
        self.frames = nn.ModuleDict({position: PromptLearner(*words, position) for position in self.positions})
        self.frames["nameless"] = PromptLearner(backbone, [""], options.N_CTX)
        self.frames.requires_grad_(False)
        self.text_encoder = TextEncoder(backbone, cfg.TRAIN.TEXT_CHUNK)

    @classmethod
    def config_errors(cls, cfg: CfgNode) -> list[str]:
        options = cfg.TRAINER.PRODA
        batch = options.N_BATCH <= options.N_PROMPT, "must be at most N_PROMPT, the size of the collection"
        divisor = options.N_BATCH > options.CORRECTION, "needs an N_BATCH of at least 2"
        conditions = [("N_BATCH", *batch), ("CORRECTION", *divisor)]
        return super().config_errors(cfg) or unmet("TRAINER.PRODA.", options, conditions)

    def classifiers(self, prompts: Sequence[int]) -> torch.Tensor:
        """w_c(P_k) of some prompts of the collection, by their numbers: (n, C, E), of unit length."""
        return torch.stack([self.classifier(k) for k in prompts])

    def classifier(self, k: int) -> torch.Tensor:
        """(C, E) text features of all classes with one context."""
        frame, ctx = self.frames[self.positions[k % len(self.positions)]], self.learned.ctx[k]
        if frame.order is None:  # names come last: what is in front of them is encoded once
            return self.text_encoder(*before_names(frame, ctx))
        return self.text_encoder(*frame.assemble(ctx.expand(frame.n_cls, -1, -1)))

    def nameless(self) -> torch.Tensor:
        """g(P_k) without a class name, of the whole collection: (K, E), of unit length."""
        return self.text_encoder(*before_names(self.frames["nameless"], self.learned.ctx)).squeeze(1)

    def text_features(self) -> torch.Tensor:
        """mu of the whole collection: (C, E), shorter than unit length."""
        return self.classifiers(range(self.options.N_PROMPT)).mean(dim=0)

    def loss(self, images: ImageBatch, label: torch.Tensor) -> Step:
        """L_upper + lambda L_so."""
        options, z = self.options, images.features()
        prompts = torch.randperm(options.N_PROMPT)[: options.N_BATCH]
        w = self.classifiers(prompts.tolist())
        logits = self.backbone.logits(z, w)  # (n, B, C)
        if options.COVARIANCE == "full":
            variance = margin_variance(logits, label)
        else:
            variance = diagonal_variance(z, w, label) * self.backbone.logit_scale.exp() ** 2
        upper = upper_bound(logits.mean(dim=0), variance / (len(w) - options.CORRECTION), label)
        losses = {"upper_bound": upper, "orthogonality": options.LAMBDA * semantic_orthogonality(self.nameless())}
        return Step(losses, logits.mean(dim=0))


def before_names(frame: PromptLearner, ctx: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Arguments of :class:`TextEncoder` for contexts (M, D) or (K, M, D) before the names of a frame."""
    return frame.token_suffix, frame.eot - 1 - frame.n_ctx, frame.prefix(ctx)


def upper_bound(mean: torch.Tensor, variance: torch.Tensor, label: torch.Tensor) -> torch.Tensor:
    """L_upper of mean logits z.mu_i / tau and variances z' A_iy z / tau², (B, C) each; those of the labels are 0."""
    return F.cross_entropy(mean + variance / 2, label)


def margin_variance(logits: torch.Tensor, label: torch.Tensor) -> torch.Tensor:
    """Squared deviations of z.(w_i - w_y) / tau, summed over n prompts: (n, B, C) logits, (B,) -> (B, C)."""
    margins = logits - logits.gather(-1, label.expand(len(logits), -1).unsqueeze(-1))
    return (margins - margins.mean(dim=0)).square().sum(dim=0)


def diagonal_variance(z: torch.Tensor, w: torch.Tensor, label: torch.Tensor) -> torch.Tensor:
    """The same times tau², as if the dimensions of w were independent: (B, E), (n, C, E), (B,) -> (B, C)."""
    dtype = torch.promote_types(z.dtype, torch.float32)
    with torch.autocast(z.device.type, enabled=False):  # products of small numbers
        z2, w = z.to(dtype).square(), w.to(dtype)
        centred = w - w.mean(dim=0)
        own = centred[:, label]  # (n, B, E)
        both = ((z2 * own) @ centred.mT).sum(dim=0)
        return z2 @ centred.square().sum(dim=0).mT + (z2 * own.square().sum(dim=0)).sum(-1, keepdim=True) - 2 * both


def semantic_orthogonality(features: torch.Tensor) -> torch.Tensor:
    """L_so: the mean |cos| of two of K features of unit length (K, E), in float32 at least; 0 for one feature."""
    features = features.to(torch.promote_types(features.dtype, torch.float32))
    n = len(features)
    with torch.autocast(features.device.type, enabled=False):
        return (features @ features.mT).abs().triu(1).sum() / max(1, n * (n - 1) // 2)


extend_cfg = CustomCLIP.extend_cfg


@TRAINER_REGISTRY.register()
class ProDA(PromptTrainer):
    """Prompt distribution learning."""

    method_class = CustomCLIP

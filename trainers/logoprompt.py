"""LoGoPrompt: Synthetic Text Images Can Be Good Visual Prompts for Vision-Language Models.

Shi & Yang, ICCV 2023, arXiv 2309.01155. This file follows the paper; section and equation numbers are the paper's.
Symbols: image x, label y, C classes, frozen image encoder f and text encoder g, visual prompt V_c of class c,
class-conditional image x_c.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any, Optional

import torch
import torch.nn.functional as F
from dassl.engine import TRAINER_REGISTRY
from yacs.config import CfgNode

from .prompting.backbone import Backbone
from .prompting.cache_adapter import CacheAdapter
from .prompting.config import CONTEXT, Key, Rule, at_least, one_of, unmet, user_error_messages, within
from .prompting.data import normalisation
from .prompting.image_batch import ImageBatch
from .prompting.method import Comparison, Method, Stage, Step, TrainingData
from .prompting.paste import LOCATIONS, places_of
from .prompting.prompts import PromptLearner, TwoStagePromptLearner
from .prompting.render import MAX_CONTRAST, VisualPrompts, blocks_of, check_font
from .prompting.selection import LOSSES, hard_negatives, log_probabilities, min_max_loss, select, top_classes
from .prompting.text_encoder import TextEncoder
from .prompting.trainer import PromptTrainer

Scores = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]  # of image features and text features
SHARE = Rule("must be larger than 0 and at most 1, the whole image", lambda value: 0 < value <= 1)

# Below cfg.TRAINER.LOGOPROMPT. docs/choices.md explains what the paper leaves open.
KEYS = {
    **CONTEXT,  # N_CTX, CTX_INIT, PREC as in CoOp
    "TEXT_PROMPT": Key("two_stage", one_of(("two_stage", "generic"))),  # 3.2.3; generic: CoOp's shared context
    "STAGE1_EPOCHS": Key(-1, at_least(-1)),  # of OPTIM.MAX_EPOCH; -1: half of them
    "STAGE2_LR": Key(0.0, at_least(0)),  # 0: OPTIM.LR
    "MLP_REDUCTION": Key(16, at_least(1)),  # E / bottleneck of the MLP of stage 1
    "VISUAL_PROMPT": Key("selection", one_of(("selection", "paired", "text_augmentation", "none"))),  # Table 4a
    "SELECT_AT_TEST": Key(True),  # 3.2.2; False: the original image alone decides at test time
    "TUNE_VISUAL": Key(False),  # 3.2.3: optimise the pixels of the visual prompts too
    "VISUAL_LR": Key(1.0, at_least(0)),  # their learning rate, for colours in [0, 1]
    "K": Key(5, at_least(1)),  # hard negatives, and candidates at test time
    "LOSS": Key("infonce", one_of(LOSSES)),  # paper: Eq. 3 as printed; infonce: the positive in the denominator too
    "BLOCK_HEIGHT": Key(1 / 7, SHARE),  # h / H
    "BLOCK_WIDTH": Key(1.0, SHARE),  # w / W
    "LOCATION": Key("random", one_of(LOCATIONS)),  # Table 4d
    "VIEWS": Key(0, at_least(0)),  # 0: augment at every step, as in the paper; R: cache R views of every image
    "FONT": Key(""),  # path of a .ttf/.otf file; empty: Pillow's own font
    "MIN_CONTRAST": Key(4.5, within(1, MAX_CONTRAST)),  # of text and background (WCAG)
    "VISUAL_SEED": Key(0),  # of colours, and of places at test time; independent of SEED
    "ADAPTER": Key(False),  # Table 2: a cache of training features, its keys learned in a last stage
    "ADAPTER_EPOCHS": Key(
        -1, Rule("must be at least 1, or -1 for a fifth", lambda n: n == -1 or n >= 1)
    ),  # of OPTIM.MAX_EPOCH; -1: a fifth of them
    "ADAPTER_LR": Key(0.1, at_least(0)),
    "ADAPTER_ALPHA": Key(1.0, at_least(0)),  # weight of the cache
    "ADAPTER_BETA": Key(5.5, at_least(0)),  # sharpness of the cache
    "ADAPTER_SEARCH": Key(False),  # choose both on validation images instead
}


class CustomCLIP(Method):
    """CLIP with learned text prompts p_c and a rendered visual prompt V_c for every class."""

    config_name, keys = "LOGOPROMPT", KEYS
    scaled_precisions = ("amp", "fp16")  # gradients of pixels and of the MLP are small
    stage_keys = tuple(
        f"TRAINER.LOGOPROMPT.{key}" for key in ("TEXT_PROMPT", "STAGE1_EPOCHS", "ADAPTER", "ADAPTER_EPOCHS")
    )

    def __init__(self, cfg: CfgNode, classnames: Sequence[str], backbone: Backbone) -> None:
        super().__init__(cfg, classnames, backbone)
        options = self.options
        # 3.1, 3.2.3: text prompts p_c = [u_1 … u_M, e_c], with a context of the class's own or a shared one
        words = backbone, classnames, options.N_CTX, options.CTX_INIT
        if options.TEXT_PROMPT == "two_stage":
            self.learned = TwoStagePromptLearner(*words, options.MLP_REDUCTION)
        else:
            self.learned = PromptLearner(*words)
            self.learned.ctx.data = self.learned.ctx.data.to(torch.promote_types(backbone.dtype, torch.float32))
        self.text_encoder = TextEncoder(backbone, cfg.TRAIN.TEXT_CHUNK)
        # 3.2.1: visual prompts V_c; tunable ones (3.2.3) start as the rendered ones
        blocks = blocks_of(options, classnames, backbone.input_resolution)
        self.block = tuple(blocks.shape[-2:])
        mean, std = normalisation(cfg)
        for name, value in {"mean": mean, "std": std, "rendered": (blocks - mean) / std}.items():
            self.register_buffer(name, value, persistent=False)
        if options.TUNE_VISUAL:
            self.learned.visual_prompts = VisualPrompts(blocks)
        if options.ADAPTER:  # Table 2
            shape = backbone.n_features, len(classnames)
            self.learned.adapter = CacheAdapter(*shape, options.ADAPTER_ALPHA, options.ADAPTER_BETA)

    # ------------------------------------------------------------------------------- 3.1 CLIP and text prompts
    def text_features(self) -> torch.Tensor:
        """g(p_c): (C, E), of unit length (Eq. 2)."""
        return self.text_encoder(*self.learned.encoder_inputs())

    def logits(self, image_features: torch.Tensor, text_features: torch.Tensor) -> torch.Tensor:
        """cos(f(x), g(p_c)) / tau, and the adapter's once it is filled: (…, E), (C, E) -> (…, C)."""
        logits = self.backbone.logits(image_features, text_features)
        return logits if self.adapter is None else logits + self.adapter(image_features)

    def log_p(self, image_features: torch.Tensor, text_features: torch.Tensor) -> torch.Tensor:
        """log p(c|x), the softmax of the logits over all C classes: (…, E), (C, E) -> (…, C)."""
        return log_probabilities(self.logits(image_features, text_features))

    # ------------------------------------------------------------------------------- 3.2.1 visual prompts
    @property
    def visual_prompts(self) -> torch.Tensor:
        """V_c: (C, 3, h, w), normalised like the images."""
        if not self.options.TUNE_VISUAL:
            return self.rendered
        blocks = (self.learned.visual_prompts() - self.mean) / self.std
        return blocks if self.adapter is None else blocks.detach()

    def places(self, images: ImageBatch) -> torch.Tensor:
        """(B, 2) top and left of the block in each image."""
        uniform = images.uniform(self.options.VISUAL_SEED)
        return places_of(uniform, self.backbone.input_resolution, self.block, self.options.LOCATION)

    def conditional(
        self, images: ImageBatch, classes: torch.Tensor, text_features: torch.Tensor, of: Scores
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Scores (:meth:`logits` or :meth:`log_p`) of (B, N) classes c on x_c, whose block is replaced by V_c.

        Returns them, (B, N), and the places of the blocks, (B, 2).
        """
        places = self.places(images)
        features = images.pasted(self.visual_prompts, classes, places, store=not self.options.TUNE_VISUAL)
        return of(features, text_features).gather(2, classes.unsqueeze(2)).squeeze(2), places

    # ------------------------------------------------------------------------------- 3.2.2 training
    def loss(self, images: ImageBatch, label: torch.Tensor) -> Step:
        """Min-max contrastive learning (Eq. 3); the other rows of Table 4a use cross-entropy."""
        options = self.options
        image_features = images.features()
        with nullcontext() if self.adapter is None else torch.no_grad():
            text_features = self.text_features()
        log_p = self.log_p(image_features, text_features)
        if options.VISUAL_PROMPT in ("none", "text_augmentation"):
            return Step({"loss": -log_p.gather(1, label.unsqueeze(1)).mean()}, log_p)

        # The group of an image: real {(x, y), (x_y, y)}, negative {(x, c_k), (x_{c_k}, c_k)}, k = 1 … K.
        classes = torch.cat([label.unsqueeze(1), hard_negatives(log_p.detach(), label, options.K)], dim=1)
        if options.VISUAL_PROMPT == "paired":  # every class's text with its own class-conditional image
            pairs, _ = self.conditional(images, classes, text_features, self.logits)
            return Step({"loss": F.cross_entropy(pairs, torch.zeros_like(label))}, log_p)
        original = log_p.gather(1, classes)  # log p(y|x), log p(c_k|x)
        conditional, _ = self.conditional(images, classes, text_features, self.log_p)
        losses = min_max_loss(original[:, 0], conditional[:, 0], original[:, 1:], conditional[:, 1:], options.LOSS)
        log = {"conditional_minimum": 100 * (conditional[:, 0] < original[:, 0]).float().mean()}
        return Step({"loss": losses.mean()}, log_p, log)

    @classmethod
    def drawn_images(cls, cfg: CfgNode, classnames: Sequence[str]) -> torch.Tensor:
        """Text augmentation (4.4): the class name, over a whole image, is one more training image of a class."""
        if cfg.TRAINER.LOGOPROMPT.VISUAL_PROMPT != "text_augmentation":
            return super().drawn_images(cfg, classnames)
        options = CfgNode({**cfg.TRAINER.LOGOPROMPT, "BLOCK_HEIGHT": 1.0, "BLOCK_WIDTH": 1.0})
        return blocks_of(options, classnames, cfg.INPUT.SIZE[0])

    # ------------------------------------------------------------------------------- 3.2.2 selection
    def compare(self, images: ImageBatch, text_features: torch.Tensor) -> Comparison:
        """Visual prompt selection: argmax_k max(p(c_k|x), p(c_k|x_{c_k})) over the top-K classes of x.

        With paired texts and images (4.4) the argmax of cos(f(x_{c_k}), g(p_{c_k})) / tau.
        """
        log_p = self.log_p(images.features(), text_features)
        paired = self.options.VISUAL_PROMPT == "paired"
        if not paired and not (self.options.VISUAL_PROMPT == "selection" and self.options.SELECT_AT_TEST):
            return Comparison(log_p, log_p, log_p)
        candidates = top_classes(log_p, self.options.K)
        of = self.logits if paired else self.log_p
        conditional, places = self.conditional(images, candidates, text_features, of)
        if paired:
            conditional = log_probabilities(conditional)
            scores = torch.full_like(log_p, float("-inf")).scatter(1, candidates, conditional)
        else:
            scores = select(log_p, candidates, conditional)
        return Comparison(scores, scores, log_p, candidates, conditional, places, among_candidates=paired)

    def score(self, images: ImageBatch, text_features: torch.Tensor) -> torch.Tensor:
        """(B, C) log max(p(c|x), p(c|x_c)); -inf for classes that were not among the top K."""
        return self.compare(images, text_features).scores

    # ------------------------------------------------------------------------------- 3.2.3 tunable prompts
    def stages(self) -> list[Stage]:
        """Stage 1 trains the MLP, stage 2 the generated contexts; the adapter's keys learn last, alone."""
        options, optim, last = self.options, self.cfg.OPTIM, adapter_epochs(self.cfg)
        first = text = optim.MAX_EPOCH - last
        if options.TEXT_PROMPT == "two_stage":
            first = options.STAGE1_EPOCHS if options.STAGE1_EPOCHS >= 0 else (text + 1) // 2
        stages = [Stage(first, optim.LR, self.begin_stage_1)]
        if options.TEXT_PROMPT == "two_stage":
            stages.append(Stage(text - first, options.STAGE2_LR or optim.LR, lambda _: self.learned.begin_stage_2()))
        if options.ADAPTER:
            end = {"end": self.search_adapter} if options.ADAPTER_SEARCH else {}
            stages.append(Stage(last, optim.LR, lambda data: self.learned.adapter.fill(*data.train_features()), **end))
        return stages

    def begin_stage_1(self, data: TrainingData) -> None:
        """Discard the results of later stages, where training starts from loaded weights."""
        if self.adapter is not None:
            self.adapter.empty()
        if self.options.TEXT_PROMPT == "two_stage":
            self.learned.begin_stage_1()

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Pixels and keys have their own learning rate; weight decay would only darken blocks and shorten keys."""
        rates = {}
        if self.options.TUNE_VISUAL:
            rates[self.learned.visual_prompts.pixels] = self.options.VISUAL_LR
        if self.options.ADAPTER:
            rates[self.learned.adapter.keys] = self.options.ADAPTER_LR
        return [{"params": [parameter], "lr": rate, "weight_decay": 0} for parameter, rate in rates.items()]

    def after_step(self) -> None:
        if self.options.TUNE_VISUAL:
            self.learned.visual_prompts.project()

    # ------------------------------------------------------------------------------- Table 2: adapter
    @property
    def adapter(self) -> Optional[CacheAdapter]:
        """The cache, once it is filled; from then on only its keys are trained."""
        return self.learned.adapter if self.options.ADAPTER and self.learned.adapter.filled else None

    @torch.no_grad()
    def search_adapter(self, data: TrainingData) -> None:
        """Choose alpha and beta on validation images, never on test images."""
        features, label = data.val_features()
        features = F.normalize(features, dim=-1)
        self.learned.adapter.search(features, self.backbone.logits(features, self.text_features()), label)

    # ------------------------------------------------------------------------------- configuration
    @classmethod
    def views(cls, cfg: CfgNode) -> int:
        return cfg.TRAINER.LOGOPROMPT.VIEWS

    @classmethod
    def validation(cls, cfg: CfgNode) -> Optional[tuple[str, str]]:
        setting = "TRAINER.LOGOPROMPT.ADAPTER_SEARCH True", "set ADAPTER_ALPHA and ADAPTER_BETA"
        return setting if cfg.TRAINER.LOGOPROMPT.ADAPTER_SEARCH else None

    @classmethod
    def config_errors(cls, cfg: CfgNode) -> list[str]:
        options, total = cfg.TRAINER.LOGOPROMPT, cfg.OPTIM.MAX_EPOCH
        last = adapter_epochs(cfg)
        fixed, generic, text = not options.TUNE_VISUAL, options.TEXT_PROMPT == "generic", max(0, total - last)
        use, pasted = options.VISUAL_PROMPT, options.VISUAL_PROMPT in ("selection", "paired")
        conditions = (
            ("ADAPTER_EPOCHS", last <= max(total, 0), f"must be at most OPTIM.MAX_EPOCH ({total})"),
            ("STAGE1_EPOCHS", generic or text >= options.STAGE1_EPOCHS, f"must be at most {text}, less the adapter's"),
            ("ADAPTER_SEARCH", options.ADAPTER or not options.ADAPTER_SEARCH, "requires ADAPTER True"),
            ("TUNE_VISUAL", fixed or pasted, "requires VISUAL_PROMPT selection or paired: others paste no blocks"),
            ("SELECT_AT_TEST", options.SELECT_AT_TEST or use == "selection", "requires VISUAL_PROMPT selection"),
            ("VIEWS", fixed or not options.VIEWS, "requires TUNE_VISUAL False: tuned blocks change at every step"),
        )
        errors = [*super().config_errors(cfg), *user_error_messages(lambda: check_font(options.FONT))]
        return errors + unmet("TRAINER.LOGOPROMPT.", options, conditions)


def adapter_epochs(cfg: CfgNode) -> int:
    """Epochs of the adapter's stage."""
    options = cfg.TRAINER.LOGOPROMPT
    if not options.ADAPTER:
        return 0
    return options.ADAPTER_EPOCHS if options.ADAPTER_EPOCHS > 0 else max(1, cfg.OPTIM.MAX_EPOCH // 5)


extend_cfg = CustomCLIP.extend_cfg  # in a CoOp code base: one line in the extend_cfg of its train.py


@TRAINER_REGISTRY.register()
class LoGoPrompt(PromptTrainer):
    """Text prompts learned by the min-max loss over class-conditional images; prediction by selection."""

    method_class = CustomCLIP

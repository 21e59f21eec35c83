"""Learnable text prompts: p_c = [u_1 … u_M, e_c] (CoOp, Eq. 2; class-specific prompts, section 3.2.3)."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import Any, Optional

import torch
import torch.nn as nn
from torch import Tensor

from .backbone import Backbone
from .errors import UserError
from .names import clean_name
from .templates import DEFAULT_TEMPLATE
from .text_encoder import embed_tokens, encode_texts, encode_tokens

POSITIONS = ("end", "middle", "front")


class PromptLearner(nn.Module):
    """Learnable context vectors u_1 … u_M around class names (Eq. 2).

    Args:
        n_ctx: M, number of context vectors; ``ctx_init`` overrides it with the number of its tokens.
        ctx_init: words that the context starts from ("a photo of a"); empty: drawn from N(0, 0.02²).
        csc: class-specific contexts, M vectors per class.
        class_token_position: of the class name: ``end``, ``middle`` (after M // 2 vectors) or ``front``.

    ``ctx`` is the only parameter and the only entry of the state dict: (M, D), or (C, M, D) when class-specific; then
    row c belongs to a class name, and a class that was not trained has none.
    """

    per_class: tuple[str, ...] = ()
    serves_unseen_classes = True

    def __init__(
        self,
        backbone: Backbone,
        classnames: Sequence[str],
        n_ctx: int = 16,
        ctx_init: str = "",
        csc: bool = False,
        class_token_position: str = "end",
    ) -> None:
        super().__init__()
        if class_token_position not in POSITIONS:
            raise UserError(f"CLASS_TOKEN_POSITION {class_token_position}: choose one of {', '.join(POSITIONS)}")
        if n_ctx < 1:
            raise UserError(f"N_CTX {n_ctx}: at least one context vector is needed")
        words: Optional[Tensor] = None
        self.n_sos = n_sos = len(backbone.tokenizer.head)
        if ctx_init:
            tokens = encode_tokens(backbone, [clean_name(ctx_init)])
            n_ctx = len(tokens[0]) - 1  # [EOT]
            if n_ctx < 1:
                raise UserError(f'CTX_INIT "{ctx_init}": it has no words; leave it empty for a random context')
            words = embed_tokens(backbone, tokens)[0][0, n_sos : n_sos + n_ctx]
        names = [clean_name(name) for name in classnames]
        suffixes = encode_tokens(backbone, [f"{name}." for name in names], reserved=n_ctx)
        embeddings, last = embed_tokens(backbone, suffixes)
        self.n_cls, self.n_ctx = len(names), n_ctx
        # Everything but the context follows from the class names, so checkpoints do not hold it.
        self.register_buffer("token_prefix", embeddings[:, :n_sos], persistent=False)  # [SOS]
        self.register_buffer("token_suffix", embeddings[:, n_sos:], persistent=False)  # name, full stop, [EOT]
        self.eot = last + n_ctx
        # (C, L) order in which to read [SOS, context, suffix] so that the name ends up at its position; None: as it is
        self.register_buffer("order", None, persistent=False)
        if class_token_position != "end":
            positions = list(range(n_sos, n_ctx + embeddings.shape[1]))
            before = n_ctx // 2 if class_token_position == "middle" else 0
            ends = [n_ctx + len(backbone.tokenizer.encode_after_words(name)) for name in names]
            context = positions[:before], positions[before:n_ctx]
            rows = [[*range(n_sos), *context[0], *positions[n_ctx:end], *context[1], *positions[end:]] for end in ends]
            self.order = torch.tensor(rows, device=embeddings.device)

        if csc:
            self.per_class, self.serves_unseen_classes = ("ctx",), False
        width = embeddings.shape[2]
        ctx = torch.empty((self.n_cls, n_ctx, width) if csc else (n_ctx, width), dtype=backbone.dtype)
        self.ctx = nn.Parameter(nn.init.normal_(ctx, std=0.02) if words is None else ctx.copy_(words.expand_as(ctx)))

    def forward(self) -> tuple[Tensor, Tensor]:
        """(C, L, D) prompts for :class:`TextEncoder` and the (C,) positions of their [EOT]."""
        return self.assemble(self.ctx.expand(self.n_cls, -1, -1))

    def encoder_inputs(self) -> tuple[Tensor, ...]:
        """Arguments of :class:`TextEncoder` that encode all classes at the lowest cost.

        Where all classes share the tokens before their names: (C, S, D) names with full stop and [EOT], (C,) positions
        of [EOT] in them, (1 + M, D) prefix. Otherwise the result of :meth:`forward`.
        """
        if self.ctx.dim() == 3 or self.order is not None:
            return self()
        return self.token_suffix, self.eot - self.n_sos - self.n_ctx, self.prefix(self.ctx)

    def prefix(self, ctx: Tensor) -> Tensor:
        """Contexts (…, M, D) -> [SOS, u_1 … u_M], (…, 1 + M, D)."""
        sos = self.token_prefix[0].expand(*ctx.shape[:-2], -1, -1)
        return torch.cat([sos, ctx.to(sos.dtype)], dim=-2)

    def assemble(self, ctx: Tensor) -> tuple[Tensor, Tensor]:
        """Combine contexts (C, M, D) with [SOS], names and [EOT]; returns the same as :meth:`forward`."""
        prompts = torch.cat([self.token_prefix, ctx.to(self.token_prefix.dtype), self.token_suffix], dim=1)
        if self.order is not None:
            prompts = prompts.gather(1, self.order.unsqueeze(-1).expand_as(prompts))
        return prompts, self.eot


def meta_net(n_in: int, n_out: int, reduction: int = 16) -> nn.Sequential:
    """CoCoOp's Meta-Net: Linear-ReLU-Linear with n_in / reduction hidden units, under CoCoOp's names."""
    n_hidden = max(1, n_in // reduction)
    linear1, linear2 = nn.Linear(n_in, n_hidden), nn.Linear(n_hidden, n_out)
    return nn.Sequential(OrderedDict(linear1=linear1, relu=nn.ReLU(inplace=True), linear2=linear2))


class TwoStagePromptLearner(PromptLearner):
    """Class-specific contexts in two stages (section 3.2.3).

    Stage 1: a light MLP maps the text feature of a class's hand-made prompt to the M context vectors of that class.
    Stage 2: the generated contexts of the training classes become free parameters; others use the context of stage 1.

    The state dict holds ``meta_net`` (the MLP, of E / reduction hidden units), ``ctx`` (C, M, D) and ``trained`` (C,),
    which marks the classes that have a context of stage 2. The rows of the last two belong to class names: when a
    checkpoint meets other classes, classes of the same name take its rows.

    At initialisation the MLP generates the initial context for every class. Parameters are float32 whatever the
    encoder's precision: the gradients of an output that does not yet depend on its input would vanish in half.
    """

    per_class = ("ctx", "trained")

    def __init__(
        self, backbone: Backbone, classnames: Sequence[str], n_ctx: int = 16, ctx_init: str = "", reduction: int = 16
    ) -> None:
        super().__init__(backbone, classnames, n_ctx, ctx_init)
        dtype = torch.promote_types(self.ctx.dtype, torch.float32)
        initial = self.ctx.detach().to(dtype)  # (M, D)
        hand_made = encode_texts(backbone, [DEFAULT_TEMPLATE.format(clean_name(name)) for name in classnames])
        self.register_buffer("hand_made", hand_made, persistent=False)  # (C, E)
        self.meta_net = meta_net(hand_made.shape[1], initial.numel(), reduction)
        nn.init.zeros_(self.meta_net.linear2.weight)
        with torch.no_grad():
            self.meta_net.linear2.bias.copy_(initial.flatten())
        self.meta_net.to(device=initial.device, dtype=dtype)
        self.ctx = nn.Parameter(initial.expand(self.n_cls, -1, -1).clone())
        self.register_buffer("trained", torch.zeros(self.n_cls, dtype=torch.bool, device=initial.device))
        self.n_trained = 0  # cached to avoid a device sync in every step
        self.register_load_state_dict_post_hook(TwoStagePromptLearner._count)

    def _count(self, _: Any = None) -> None:
        self.n_trained = int(self.trained.sum())

    def generate(self) -> Tensor:
        """Stage 1: (C, M, D) contexts of all classes."""
        return self.meta_net(self.hand_made.to(self.ctx.dtype)).view_as(self.ctx)

    def begin_stage_1(self) -> None:
        """Discard all contexts of stage 2, also loaded ones."""
        self.trained.fill_(False)
        self._count()

    @torch.no_grad()
    def begin_stage_2(self) -> None:
        """Turn the generated contexts of all classes into parameters."""
        self.ctx.copy_(self.generate())
        self.trained.fill_(True)
        self._count()

    def forward(self) -> tuple[Tensor, Tensor]:
        if self.n_trained == self.n_cls:  # stage 2: the MLP stays as it is
            return self.assemble(self.ctx)
        if self.n_trained == 0:
            return self.assemble(self.generate())
        return self.assemble(torch.where(self.trained[:, None, None], self.ctx, self.generate()))

"""Prompts and text features: p_c = [u_1 … u_M, e_c], g(p_c).

CLIP's text encoder is causal and its feature is read at the end-of-text token, so nothing behind that token can matter:
prompts are cut to the longest one of the list instead of being padded to 77 tokens. Exact, gradients too.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Optional

import torch
import torch.nn as nn
import torch.nn.functional as F

from .backbone import Backbone
from .errors import UserError
from .names import clean_name

POSITIONS = ("end", "middle", "front")
HAND_MADE = "a photo of a {}."  # the prompt that class-specific contexts are generated from


def encode_tokens(backbone: Backbone, texts: Sequence[str], reserved: int = 0) -> list[list[int]]:
    """Token ids of each text followed by [EOT]; [SOS] is left out.

    Args:
        reserved: further positions that a prompt needs besides these (context vectors).

    Raises:
        UserError: a prompt does not fit into the text encoder's context length.
    """
    tokens = [[*backbone.tokenizer.encode(text), backbone.eot_token] for text in texts]
    room = backbone.context_length - 1 - reserved
    for text, ids in zip(texts, tokens):
        if len(ids) > room:
            raise UserError(
                f'the prompt for "{text[:60]}" needs {len(ids) + 1 + reserved} tokens, {backbone.name} takes '
                f"{backbone.context_length}: shorten the class name or the context (N_CTX, CTX_INIT)"
            )
    return tokens


def embed_tokens(backbone: Backbone, tokens: Sequence[Sequence[int]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids of unequal length -> (N, L, D) embeddings with [SOS] in front, and (N,) position of each last token.

    L is the length of the longest sequence; shorter ones are filled up with token 0, as CLIP does.
    """
    last = torch.tensor([len(ids) for ids in tokens])
    ids = torch.zeros(len(tokens), int(last.max()) + 1, dtype=torch.long)
    for row, sequence in zip(ids, tokens):
        row[: len(sequence) + 1] = torch.tensor([backbone.sot_token, *sequence])
    device = backbone.token_embedding.weight.device
    with torch.no_grad():
        embeddings = backbone.token_embedding(ids.to(device)).to(backbone.dtype)
    return embeddings, last.to(device)


class TextEncoder(nn.Module):
    """g: prompt embeddings -> text features. Holds no weights of its own."""

    def __init__(self, backbone: Backbone) -> None:
        super().__init__()
        self.backbone = backbone

    def forward(self, prompts: torch.Tensor, eot: torch.Tensor) -> torch.Tensor:
        """Encode prompts up to their end-of-text tokens.

        Args:
            prompts: (C, L, D) embeddings beginning with [SOS], L at most the context length; what stands behind a
                prompt's [EOT] has no influence.
            eot: (C,) position of [EOT] in each prompt.

        Returns:
            (C, E) text features of unit length.
        """
        clip = self.backbone
        prompts = prompts[:, : int(eot.max()) + 1]
        x = prompts + clip.positional_embedding[: prompts.shape[1]].to(prompts.dtype)
        for block in clip.blocks:
            x = self._block(block, x)
        x = clip.ln_final(x[torch.arange(len(x), device=x.device), eot])
        return F.normalize(x.to(clip.dtype) @ clip.text_projection, dim=-1)

    def _block(self, block: nn.Module, x: torch.Tensor) -> torch.Tensor:
        """One residual attention block under the causal mask, with the weights of either package's block."""
        n, length, width = x.shape
        heads = self.backbone.n_head
        qkv = F.linear(block.ln_1(x), block.attn.in_proj_weight, block.attn.in_proj_bias)
        q, k, v = qkv.view(n, length, 3, heads, width // heads).permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).reshape(n, length, width)
        x = x + _scaled(block, "ls_1", block.attn.out_proj(attended))
        return x + _scaled(block, "ls_2", block.mlp(block.ln_2(x)))


def _scaled(block: nn.Module, name: str, x: torch.Tensor) -> torch.Tensor:
    """open_clip's LayerScale, the identity for CLIP itself; OpenAI's block has none."""
    return getattr(block, name)(x) if hasattr(block, name) else x


@torch.no_grad()
def encode_texts(backbone: Backbone, texts: Sequence[str]) -> torch.Tensor:
    """Hand-made prompts -> (N, E) text features of unit length (zero-shot CLIP)."""
    embeddings, eot = embed_tokens(backbone, encode_tokens(backbone, texts))
    return TextEncoder(backbone)(embeddings, eot)


class PromptLearner(nn.Module):
    """Learnable context vectors u_1 … u_M around the class names (CoOp, Eq. 2 of LoGoPrompt).

    Args:
        backbone: where the embeddings come from.
        classnames: C class names; underscores are spaces.
        n_ctx: M, number of context vectors; with ``ctx_init`` the number of its tokens counts instead.
        ctx_init: words the context starts from ("a photo of a"); empty: drawn from N(0, 0.02²).
        csc: class-specific contexts, one set of M vectors per class.
        class_token_position: where the name stands: ``end``, ``middle`` (after M // 2 vectors) or ``front``.

    ``ctx`` is the only parameter and the only entry of the state dict: (M, D), or (C, M, D) when class-specific.

    Raises:
        UserError: a prompt is longer than the context length, or an unknown position.
    """

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
        dtype, width = backbone.dtype, backbone.token_embedding.weight.shape[1]
        words: Optional[torch.Tensor] = None
        if ctx_init:
            tokens = encode_tokens(backbone, [clean_name(ctx_init)])
            n_ctx = len(tokens[0]) - 1
            if n_ctx < 1:
                raise UserError(f'CTX_INIT "{ctx_init}": no words in it; leave it empty for a random context')
            words = embed_tokens(backbone, tokens)[0][0, 1 : 1 + n_ctx]

        names = [clean_name(name) for name in classnames]
        suffixes = encode_tokens(backbone, [f"{name}." for name in names], reserved=n_ctx)
        embeddings, last = embed_tokens(backbone, suffixes)
        self.n_cls, self.n_ctx = len(names), n_ctx
        # Everything but the context is looked up from the class names at hand, so it stays out of checkpoints.
        self.register_buffer("token_prefix", embeddings[:, :1], persistent=False)  # [SOS]
        self.register_buffer("token_suffix", embeddings[:, 1:], persistent=False)  # name, full stop, [EOT]
        self.register_buffer("eot", last + n_ctx, persistent=False)
        name_lens = [len(backbone.tokenizer.encode(name)) for name in names]
        order = _prompt_order(name_lens, n_ctx, embeddings.shape[1] - 1, class_token_position)
        self.register_buffer("order", None if order is None else order.to(embeddings.device), persistent=False)

        shape = (self.n_cls, n_ctx, width) if csc else (n_ctx, width)
        ctx = torch.empty(shape, dtype=dtype)
        if words is None:
            nn.init.normal_(ctx, std=0.02)
        else:
            ctx.copy_(words.expand(shape))
        self.ctx = nn.Parameter(ctx)

    def forward(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns (C, L, D) prompts for :class:`TextEncoder` and the (C,) positions of their [EOT]."""
        return self.around(self.ctx.expand(self.n_cls, -1, -1))  # a generic context is the same for every class

    def around(self, ctx: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Put [SOS], names and [EOT] around contexts (C, M, D); returns what :meth:`forward` does."""
        prompts = torch.cat([self.token_prefix, ctx.to(self.token_prefix.dtype), self.token_suffix], dim=1)
        if self.order is not None:
            prompts = prompts.gather(1, self.order.unsqueeze(-1).expand_as(prompts))
        return prompts, self.eot


class TwoStagePromptLearner(PromptLearner):
    """Class-specific contexts in two stages (section 3.1, "class-specific text prompts").

    Stage 1: a light MLP turns the text feature of a class's hand-made prompt into the M context vectors of that class.
    Stage 2: what it generates for the classes of the training run becomes parameters of their own. Classes that were
    not trained keep the context of stage 1, so the prompts serve any list of classes.

    Parameters are ``meta_net`` (the MLP), which stage 1 trains, and ``ctx`` (C, M, D), which stage 2 trains. The buffer
    ``trained`` (C,) says which classes have a context of stage 2; all three make up the state dict. ``ctx`` and
    ``trained`` belong to class names: with other classes at hand a checkpoint's are handed to those of the same name.

    Parameters are kept in float32 whatever the encoder's precision: the MLP starts with an output that does not depend
    on its input, and gradients so small would vanish in half precision.

    Args:
        backbone, classnames, n_ctx, ctx_init: as for :class:`PromptLearner`. The MLP's output at initialisation is the
            initial context, the same for all classes.
        reduction: the MLP has E / reduction hidden units.
    """

    per_class = ("ctx", "trained")

    def __init__(
        self, backbone: Backbone, classnames: Sequence[str], n_ctx: int = 16, ctx_init: str = "", reduction: int = 16
    ) -> None:
        super().__init__(backbone, classnames, n_ctx, ctx_init)
        dtype = torch.promote_types(self.ctx.dtype, torch.float32)
        initial = self.ctx.detach().to(dtype)  # (M, D)
        hand_made = encode_texts(backbone, [HAND_MADE.format(clean_name(name)) for name in classnames])
        self.register_buffer("hand_made", hand_made, persistent=False)  # (C, E)
        n_in = hand_made.shape[1]
        self.meta_net = nn.Sequential()
        n_hidden = max(1, n_in // reduction)
        self.meta_net.add_module("linear1", nn.Linear(n_in, n_hidden))
        self.meta_net.add_module("relu", nn.ReLU(inplace=True))
        self.meta_net.add_module("linear2", nn.Linear(n_hidden, initial.numel()))
        nn.init.zeros_(self.meta_net.linear2.weight)
        with torch.no_grad():
            self.meta_net.linear2.bias.copy_(initial.flatten())
        self.meta_net.to(device=initial.device, dtype=dtype)
        self.ctx = nn.Parameter(initial.expand(self.n_cls, -1, -1).clone())
        self.register_buffer("trained", torch.zeros(self.n_cls, dtype=torch.bool, device=initial.device))

    def generate(self) -> torch.Tensor:
        """Stage 1: (C, M, D) contexts of all classes."""
        return self.meta_net(self.hand_made.to(self.ctx.dtype)).view_as(self.ctx)

    def begin_stage_1(self) -> None:
        """No class has a context of its own, whatever was loaded."""
        self.trained.fill_(False)

    @torch.no_grad()
    def begin_stage_2(self) -> None:
        """Make parameters of what the MLP generates for the classes at hand."""
        self.ctx.copy_(self.generate())
        self.trained.fill_(True)

    def forward(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns (C, L, D) prompts for :class:`TextEncoder` and the (C,) positions of their [EOT]."""
        if self.trained.all():  # stage 2: the MLP is left as it is
            return self.around(self.ctx)
        if not self.trained.any():
            return self.around(self.generate())
        return self.around(torch.where(self.trained[:, None, None], self.ctx, self.generate()))


def _prompt_order(name_lens: list[int], n_ctx: int, n_suffix: int, position: str) -> Optional[torch.Tensor]:
    """(C, L) positions to read [SOS, context, suffix] in so that the name comes to stand at ``position``."""
    if position == "end":
        return None
    before = n_ctx // 2 if position == "middle" else 0
    context = list(range(1, 1 + n_ctx))
    suffix = list(range(1 + n_ctx, 1 + n_ctx + n_suffix))
    rows = [[0, *context[:before], *suffix[:n], *context[before:], *suffix[n:]] for n in name_lens]
    return torch.tensor(rows)

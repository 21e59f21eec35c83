"""Prompts and text features: p_c = [u_1 … u_M, e_c], g(p_c).

CLIP's text encoder is causal and its feature is read at the end-of-text token. So nothing behind that token can matter:
prompts are cut there instead of being padded to 77 tokens. And what all prompts begin with, [SOS] and a context that
classes share, is the same for all of them in every layer: it is encoded once. Both exact, gradients too.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, Optional

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from .backbone import Backbone
from .errors import UserError
from .names import clean_name

POSITIONS = ("end", "middle", "front")
HAND_MADE = "a photo of a {}."  # the prompt that class-specific contexts are generated from
WORTH_A_PASS = 64  # tokens of padding from which on prompts of different lengths are encoded one after the other


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
    """g: prompt embeddings -> text features. Holds no weights of its own.

    Args:
        chunk: classes that are encoded at a time. Activations are then kept for one chunk and computed again in the
            backward pass: memory hardly grows with C, a pass takes half as long again or more. 0: all classes at once.
    """

    def __init__(self, backbone: Backbone, chunk: int = 0) -> None:
        super().__init__()
        self.backbone, self.chunk = backbone, chunk

    def forward(self, prompts: torch.Tensor, eot: torch.Tensor, prefix: Optional[torch.Tensor] = None) -> torch.Tensor:
        """Encode prompts up to their end-of-text tokens.

        Args:
            prompts: (C, L, D) embeddings beginning with [SOS], L at most the context length; what stands behind a
                prompt's [EOT] has no influence. With a prefix: what follows it.
            eot: (C,) position of [EOT] in each of ``prompts``, best on the CPU.
            prefix: (P, D) or (B, P, D) embeddings beginning with [SOS] that every prompt begins with; B of them make B
                prompts of every class (CoCoOp: one prefix an image). Each is encoded once, whatever C is.

        Returns:
            (C, E) text features of unit length, (B, C, E) for B prefixes.
        """
        before = None if prefix is None else self._keys_and_values(prefix if prefix.dim() == 3 else prefix.unsqueeze(0))
        last = eot.tolist()
        passes = [part for members in _alike(last) for part in _split(members, self.chunk)]
        encode = self._encode
        if self.chunk and len(passes) > 1 and torch.is_grad_enabled():
            encode = partial(checkpoint, self._encode, use_reentrant=False)
        features = []
        for members in passes:
            length = last[members[0]] + 1  # the longest one's
            features.append(encode(prompts, members, length, [last[i] for i in members], before))
        order = torch.tensor([i for members in passes for i in members], device=prompts.device).argsort()
        found = torch.cat(features, dim=-2).index_select(-2, order)
        return found.squeeze(0) if prefix is not None and prefix.dim() == 2 else found

    def _encode(
        self, prompts: torch.Tensor, members: list[int], length: int, last: list[int], before: Optional[list[Any]]
    ) -> torch.Tensor:
        """The prompts ``members``, cut to ``length``, behind a prefix's keys and values in every layer, if any."""
        clip = self.backbone
        start = 0 if before is None else before[0][0].shape[-2]
        x = prompts[members, :length] + clip.positional_embedding[start : start + length].to(prompts.dtype)
        if before is not None:
            x = x.expand(len(before[0][0]), -1, -1, -1)
        for i, block in enumerate(clip.blocks):
            x, _, _ = self._block(block, x, None if before is None else before[i])
        x = clip.ln_final(x[..., torch.arange(len(members)), last, :])
        return F.normalize(x.to(clip.dtype) @ clip.text_projection, dim=-1)

    def _keys_and_values(self, prefix: torch.Tensor) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """(B, P, D) embeddings -> for every layer the keys and values, (B, heads, P, d) each."""
        clip, found = self.backbone, []
        x = prefix + clip.positional_embedding[: prefix.shape[-2]].to(prefix.dtype)
        for block in clip.blocks:
            x, k, v = self._block(block, x)
            found.append((k, v))
        return found

    def _block(
        self, block: nn.Module, x: torch.Tensor, before: Optional[tuple[torch.Tensor, torch.Tensor]] = None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """One residual attention block under the causal mask, with the weights of either package's block.

        Args:
            x: (C, L, D), or (B, C, L, D) where ``before`` holds keys and values of B prefixes, (B, heads, P, d) each.

        Returns:
            ``x`` after the block, and this layer's keys and values, (…, heads, L, d) or (B, heads, C, L, d).
        """
        heads = self.backbone.n_head
        qkv = F.linear(block.ln_1(x), block.attn.in_proj_weight, block.attn.in_proj_bias)
        q, k, v = (t.unflatten(-1, (heads, -1)).movedim(-2, 1) for t in qkv.chunk(3, dim=-1))  # heads behind the first
        if before is None:
            attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        else:
            attended = _attend(q, k, v, *before)
        x = x + _scaled(block, "ls_1", block.attn.out_proj(attended.movedim(1, -2).flatten(-2)))
        return x + _scaled(block, "ls_2", block.mlp(block.ln_2(x))), k, v


def _attend(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, k_before: torch.Tensor, v_before: torch.Tensor
) -> torch.Tensor:
    """Causal attention to a shared prefix and to what follows it, under one softmax.

    The prefix's keys and values meet the queries of all classes in one matrix product; they are not repeated.

    Args:
        q, k, v: (B, heads, C, S, d) of what follows the prefix.
        k_before, v_before: (B, heads, P, d) of the prefix.

    Returns:
        (B, heads, C, S, d).
    """
    n, length, p = q.shape[2], q.shape[3], k_before.shape[2]
    q = (q * q.shape[-1] ** -0.5).contiguous()
    to_prefix = (q.flatten(2, 3) @ k_before.transpose(-1, -2)).unflatten(2, (n, length))  # (B, heads, C, S, P)
    later = torch.full((length, length), -torch.inf, dtype=q.dtype, device=q.device).triu(1)
    to_own = q @ k.transpose(-1, -2) + later  # (B, heads, C, S, S)
    scores = torch.cat([to_prefix, to_own], dim=-1)
    weights = scores.softmax(dim=-1, dtype=torch.promote_types(scores.dtype, torch.float32)).to(v.dtype)
    to_prefix, to_own = weights.split([p, length], dim=-1)
    return (to_prefix.flatten(2, 3) @ v_before).unflatten(2, (n, length)) + to_own @ v


def _alike(lengths: list[int]) -> list[list[int]]:
    """Numbers of the prompts to encode together, the longest first: a few long names must not pad all others.

    A pass over the layers has its price too, so up to ``WORTH_A_PASS`` tokens of padding are put up with in each.
    """
    passes: list[list[int]] = []
    padding = 0
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        shorter = lengths[passes[-1][0]] - lengths[i] if passes else 0
        if not passes or (shorter and padding + shorter > WORTH_A_PASS):
            passes.append([])
            padding = shorter = 0
        passes[-1].append(i)
        padding += shorter
    return passes


def _split(members: list[int], chunk: int) -> list[list[int]]:
    """``chunk`` numbers at a time; 0: all of them."""
    return [members[i : i + chunk] for i in range(0, len(members), chunk)] if chunk else [members]


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
        self.eot = last.cpu() + n_ctx  # stays on the CPU: asking the device for it would wait for all that it is doing
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

    def parts(self) -> tuple[torch.Tensor, ...]:
        """What :class:`TextEncoder` takes to encode all classes at the least cost.

        Returns:
            Where all classes share what stands before their names: (C, S, D) names with full stop and [EOT], (C,)
            positions of [EOT] in them, (1 + M, D) prefix. Else what :meth:`forward` returns.
        """
        if self.ctx.dim() == 3 or self.order is not None:
            return self()
        return self.token_suffix, self.eot - 1 - self.n_ctx, self.prefix(self.ctx)

    def prefix(self, ctx: torch.Tensor) -> torch.Tensor:
        """Contexts (…, M, D) -> [SOS, u_1 … u_M], (…, 1 + M, D)."""
        sos = self.token_prefix[0].expand(*ctx.shape[:-2], -1, -1)
        return torch.cat([sos, ctx.to(sos.dtype)], dim=-2)

    def around(self, ctx: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Put [SOS], names and [EOT] around contexts (C, M, D); returns what :meth:`forward` does."""
        prompts = torch.cat([self.token_prefix, ctx.to(self.token_prefix.dtype), self.token_suffix], dim=1)
        if self.order is not None:
            prompts = prompts.gather(1, self.order.unsqueeze(-1).expand_as(prompts))
        return prompts, self.eot


def meta_net(n_in: int, n_out: int, reduction: int = 16) -> nn.Sequential:
    """CoCoOp's Meta-Net, Linear-ReLU-Linear with n_in / reduction hidden units and CoCoOp's names."""
    n_hidden = max(1, n_in // reduction)
    net = nn.Sequential()
    net.add_module("linear1", nn.Linear(n_in, n_hidden))
    net.add_module("relu", nn.ReLU(inplace=True))
    net.add_module("linear2", nn.Linear(n_hidden, n_out))
    return net


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
        self.meta_net = meta_net(n_in, initial.numel(), reduction)
        nn.init.zeros_(self.meta_net.linear2.weight)
        with torch.no_grad():
            self.meta_net.linear2.bias.copy_(initial.flatten())
        self.meta_net.to(device=initial.device, dtype=dtype)
        self.ctx = nn.Parameter(initial.expand(self.n_cls, -1, -1).clone())
        self.register_buffer("trained", torch.zeros(self.n_cls, dtype=torch.bool, device=initial.device))
        self.n_trained = 0  # kept beside it, so that a step does not wait for the device to count
        self.register_load_state_dict_post_hook(TwoStagePromptLearner._count)

    def _count(self, _: Any = None) -> None:
        self.n_trained = int(self.trained.sum())

    def generate(self) -> torch.Tensor:
        """Stage 1: (C, M, D) contexts of all classes."""
        return self.meta_net(self.hand_made.to(self.ctx.dtype)).view_as(self.ctx)

    def begin_stage_1(self) -> None:
        """No class has a context of its own, whatever was loaded."""
        self.trained.fill_(False)
        self._count()

    @torch.no_grad()
    def begin_stage_2(self) -> None:
        """Make parameters of what the MLP generates for the classes at hand."""
        self.ctx.copy_(self.generate())
        self.trained.fill_(True)
        self._count()

    def forward(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns (C, L, D) prompts for :class:`TextEncoder` and the (C,) positions of their [EOT]."""
        if self.n_trained == self.n_cls:  # stage 2: the MLP is left as it is
            return self.around(self.ctx)
        if self.n_trained == 0:
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

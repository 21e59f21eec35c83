"""CLIP's text encoder g, run on prompt embeddings.

OpenAI's encoder is causal and its feature is read at the end-of-text token, so nothing behind that token matters:
prompts end there instead of being padded to 77 tokens. The beginning that all prompts share, [SOS] and a context, is
the same for all of them in every layer and is encoded once. Both are exact, gradients included.

Other text towers (SigLIP, CLIPA, CoCa, …) get full prompts with their padding and run as they are.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, Optional

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.checkpoint import checkpoint

from .clip_model import Backbone
from .errors import UserError

UNSCALED = nn.Identity()  # open_clip's blocks have a LayerScale, the identity for CLIP itself; OpenAI's have none
MAX_PADDING_TOKENS = 64  # in a pass over the layers; beyond that prompts of other lengths get a pass of their own


def encode_tokens(backbone: Backbone, texts: Sequence[str], reserved: int = 0) -> list[list[int]]:
    """Token ids of each text followed by [EOT], without [SOS]; with ``reserved``, of texts that continue a sentence.

    Raises UserError where a prompt with ``reserved`` further positions exceeds the context length.
    """
    tokenizer = backbone.tokenizer
    encode = tokenizer.encode_after_words if reserved else tokenizer.encode
    tokens = [[*encode(text), tokenizer.eot] for text in texts]
    for text, ids in zip(texts, tokens):
        needed = len(tokenizer.head) + reserved + len(ids) + len(tokenizer.tail)
        allowed = backbone.context_length
        if needed > allowed:
            fault = f'the prompt for "{text[:60]}" needs {needed} tokens, {backbone.name} takes {allowed}'
            raise UserError(f"{fault}: shorten the class name or the context (N_CTX, CTX_INIT)")
    return tokens


def embed_tokens(backbone: Backbone, tokens: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
    """Token ids of unequal length -> (N, L, D) embeddings with [SOS] in front, and (N,) positions of the last tokens.

    Shorter sequences are padded with token 0, as in CLIP.
    """
    head, device = backbone.tokenizer.head, backbone.token_embedding.weight.device
    ids = pad_sequence([torch.tensor([*head, *sequence]) for sequence in tokens], batch_first=True)
    with torch.no_grad():
        embeddings = backbone.token_embedding(ids.to(device)).to(backbone.dtype)
    # positions on the CPU, to avoid a device sync
    return embeddings, torch.tensor([len(head) + len(sequence) - 1 for sequence in tokens])


class TextEncoder(nn.Module):
    """g: prompt embeddings -> text features. It has no weights of its own.

    Args:
        chunk: classes encoded at a time. Activations are then held for one chunk and recomputed in the backward pass:
            memory hardly grows with C, but a pass takes at least half as long again. 0: all classes at once.
        unit_length: whether features are scaled to unit length.
    """

    def __init__(self, backbone: Backbone, chunk: int = 0, unit_length: bool = True) -> None:
        super().__init__()
        self.backbone, self.chunk, self.unit_length = backbone, chunk, unit_length

    def forward(self, prompts: Tensor, eot: Tensor, prefix: Optional[Tensor] = None) -> Tensor:
        """Encode prompts up to their end-of-text tokens.

        Args:
            prompts: (C, L, D) embeddings beginning with [SOS], L at most the context length; embeddings behind [EOT]
                have no influence. With a prefix: the embeddings that follow it. Tokenizers without [SOS] have none.
            eot: (C,) position of [EOT] in each of ``prompts``, preferably on the CPU.
            prefix: (P, D) or (B, P, D) embeddings beginning with [SOS] that every prompt starts with; B of them make B
                prompts of every class (CoCoOp: one prefix per image). Each is encoded once, whatever C is, if the
                encoder is causal.

        Returns (C, E) text features, (B, C, E) for B prefixes, of unit length unless ``unit_length`` is False.
        """
        before: Any = prefix if prefix is None or prefix.dim() == 3 else prefix.unsqueeze(0)
        last, size = eot.tolist(), self.chunk or len(eot)
        buckets, encode = [list(range(len(last)))], self._encode_as_it_is
        if self.backbone.causal_text:
            before = before if before is None else self._keys_and_values(before)
            buckets, encode = length_buckets(last), self._encode
        passes = [bucket[i : i + size] for bucket in buckets for i in range(0, len(bucket), size)]
        if self.chunk and len(passes) > 1 and torch.is_grad_enabled():
            encode = partial(checkpoint, encode, use_reentrant=False)
        features = [encode(prompts, members, [last[i] for i in members], before) for members in passes]
        order = torch.tensor([i for members in passes for i in members], device=prompts.device).argsort()
        found = torch.cat(features, dim=-2).index_select(-2, order)
        return found.squeeze(0) if prefix is not None and prefix.dim() == 2 else found

    def _encode(self, prompts: Tensor, members: list[int], last: list[int], before: Optional[list[Any]]) -> Tensor:
        """Encode the prompts ``members``, longest first, after a prefix given by its keys and values, if any."""
        clip, length = self.backbone, last[0] + 1
        start = 0 if before is None else before[0][0].shape[-2]
        x = prompts[members, :length] + clip.positional_embedding[start : start + length].to(prompts.dtype)
        if before is not None:
            x = x.expand(len(before[0][0]), -1, -1, -1)
        for block, keys_and_values in zip(clip.blocks, before or [None] * len(clip.blocks)):
            x, _, _ = self._block(block, x, keys_and_values)
        x = clip.ln_final(x[..., torch.arange(len(members)), last, :])
        features = x.to(clip.dtype) @ clip.text_projection
        return F.normalize(features, dim=-1) if self.unit_length else features

    def _encode_as_it_is(
        self, prompts: Tensor, members: list[int], last: list[int], prefix: Optional[Tensor]
    ) -> Tensor:
        """Encode the prompts ``members`` after prefixes (B, P, D), if any, by the text tower's own code.

        The tower gets ids that pooling and masks depend on; its token embedding returns the prompts instead of theirs.
        """
        clip, x, start = self.backbone, prompts[members], 0
        if prefix is not None:
            shape, start = (len(prefix), len(members), -1, -1), prefix.shape[1]
            x = torch.cat([prefix.unsqueeze(1).expand(shape), x.expand(shape)], dim=2)
        length, device = clip.context_length, x.device
        ids = torch.tensor([clip.tokenizer.placeholder(start + n, length) for n in last], device=device)
        behind = torch.arange(length, device=device) > start + torch.tensor(last, device=device).unsqueeze(1)
        x = F.pad(x, (0, 0, 0, length - x.shape[-2]))
        x = torch.where(behind.unsqueeze(-1), clip.token_embedding(ids).to(x.dtype), x)
        embeddings, ids = x.flatten(0, -3), ids.expand(*x.shape[:-1]).flatten(0, -2)
        hook = clip.token_embedding.register_forward_hook(
            lambda module, args, output: embeddings[:, : output.shape[1]].to(output.dtype)  # CoCa may drop the last id
        )
        try:
            features = clip.text.encode_text(ids, normalize=False).unflatten(0, x.shape[:-2])
            return F.normalize(features, dim=-1) if self.unit_length else features
        finally:
            hook.remove()

    def _keys_and_values(self, prefix: Tensor) -> list[tuple[Tensor, Tensor]]:
        """(B, P, D) embeddings -> keys and values of every layer, (B, heads, P, d) each."""
        clip, found = self.backbone, []
        x = prefix + clip.positional_embedding[: prefix.shape[-2]].to(prefix.dtype)
        for block in clip.blocks:
            x, k, v = self._block(block, x)
            found.append((k, v))
        return found

    def _block(
        self, block: nn.Module, x: Tensor, before: Optional[tuple[Tensor, Tensor]] = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """One residual attention block under the causal mask, on the weights of either package's block.

        ``x`` is (C, L, D), or (B, C, L, D) with keys and values of B prefixes before it, (B, heads, P, d) each. Returns
        it after the block, with this layer's keys and values, (…, heads, L, d) or (B, heads, C, L, d).
        """
        qkv = F.linear(block.ln_1(x), block.attn.in_proj_weight, block.attn.in_proj_bias)
        heads = (self.backbone.n_head, -1)  # moved behind the first dimension
        q, k, v = (t.unflatten(-1, heads).movedim(-2, 1) for t in qkv.chunk(3, dim=-1))
        if before is None:
            attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        else:
            attended = _attend(q, k, v, *before)
        x = x + getattr(block, "ls_1", UNSCALED)(block.attn.out_proj(attended.movedim(1, -2).flatten(-2)))
        return x + getattr(block, "ls_2", UNSCALED)(block.mlp(block.ln_2(x))), k, v


def _attend(q: Tensor, k: Tensor, v: Tensor, k_before: Tensor, v_before: Tensor) -> Tensor:
    """Causal attention to a shared prefix, (B, heads, P, d), and to the tokens after it, (B, heads, C, S, d).

    One matrix product meets the prefix with the queries of all classes; its keys and values are not repeated.
    """
    n, length = q.shape[2:4]
    q = (q * q.shape[-1] ** -0.5).contiguous()
    to_prefix = (q.flatten(2, 3) @ k_before.transpose(-1, -2)).unflatten(2, (n, length))  # (B, heads, C, S, P)
    later = torch.full((length, length), -torch.inf, dtype=q.dtype, device=q.device).triu(1)
    to_own = q @ k.transpose(-1, -2) + later  # (B, heads, C, S, S)
    scores = torch.cat([to_prefix, to_own], dim=-1)
    weights = scores.softmax(dim=-1, dtype=torch.promote_types(scores.dtype, torch.float32)).to(v.dtype)
    to_prefix, to_own = weights.split([k_before.shape[2], length], dim=-1)
    return (to_prefix.flatten(2, 3) @ v_before).unflatten(2, (n, length)) + to_own @ v


def length_buckets(lengths: list[int]) -> list[list[int]]:
    """Indices of the prompts to encode together, longest first, so that a few long names do not pad all others.

    A pass over the layers has a cost too, so each bucket accepts up to ``MAX_PADDING_TOKENS`` tokens of padding.
    """
    buckets: list[list[int]] = []
    padding = 0
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        shorter = lengths[buckets[-1][0]] - lengths[i] if buckets else 0
        if buckets and (not shorter or padding + shorter <= MAX_PADDING_TOKENS):
            buckets[-1].append(i)
            padding += shorter
        else:
            buckets.append([i])
            padding = 0
    return buckets


@torch.no_grad()
def encode_texts(backbone: Backbone, texts: Sequence[str]) -> Tensor:
    """Hand-made prompts -> (N, E) text features of unit length (zero-shot CLIP, Eq. 1)."""
    embeddings, eot = embed_tokens(backbone, encode_tokens(backbone, texts))
    return TextEncoder(backbone)(embeddings, eot)

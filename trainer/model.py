"""GPT, from GPT-2 as published to what trains fastest today, by the switches of `ModelConfig`.

Shape suffixes: b batch, t time, d model width, h heads, k width of a head, f feed-forward width, n = b·t, v vocabulary.
Weights are float32 throughout; each module casts them to the type of its input, so the type that `GPT.compute_dtype`
gives the residual stream is the type of the arithmetic, and no autocast state is involved.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Iterator, Sequence
from typing import cast

import torch
import torch.nn.functional as F  # noqa: N812  the name everyone knows it by
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from trainer import flops
from trainer.config import ModelConfig
from trainer.loss import linear_cross_entropy, softcap_


class KeyValues:
    """The keys and values that one block has computed so far, each (b, h, t, k)."""

    def __init__(self) -> None:
        self.keys: Tensor | None = None
        self.values: Tensor | None = None

    @property
    def length(self) -> int:
        """Positions held."""
        return 0 if self.keys is None else self.keys.shape[2]

    def extend(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Append along time; everything held so far is returned."""
        if self.keys is not None and self.values is not None:
            keys, values = torch.cat((self.keys, keys), dim=2), torch.cat((self.values, values), dim=2)
        self.keys, self.values = keys, values
        return keys, values


class Linear(nn.Linear):
    """A linear map with float32 weights that computes in the type of its input."""

    def forward(self, x: Tensor) -> Tensor:
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return F.linear(x, self.weight.to(x.dtype), bias)


class Embedding(nn.Embedding):
    """An embedding that is filled later: drawing random weights on the meta device would load torch's compiler for it, a second."""

    def reset_parameters(self) -> None:
        """Left as it is."""


class Norm(nn.Module):
    """LayerNorm (weight and bias) or RMSNorm (weight), computed in float32."""

    def __init__(self, width: int, kind: str) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.bias = nn.Parameter(torch.zeros(width)) if kind == "layer" else None

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        if self.bias is None:
            return F.rms_norm(wide, self.weight.shape, self.weight.float(), 1e-5).to(x.dtype)
        return F.layer_norm(wide, self.weight.shape, self.weight.float(), self.bias.float(), 1e-5).to(x.dtype)


def rotary_angles(model: ModelConfig, start: int, length: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Cosines and sines (t, r/2) in float32 for positions start … start+length−1, r rotated dimensions per head
    (Su et al., RoFormer, 2021; dimension i turns with dimension i + r/2)."""
    rotated = int(model.emb_dim // model.n_heads * model.rotary_fraction)
    frequencies = model.rope_theta ** -(
        torch.arange(0, rotated, 2, device=device, dtype=torch.float32) / rotated
    )
    angles = torch.arange(start, start + length, device=device, dtype=torch.float32)[:, None] * frequencies
    return angles.cos(), angles.sin()


def rotate(x_bhtk: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the first 2·cos.shape[-1] dimensions of each head by the angles of its position."""
    half = cos.shape[-1]
    wide = x_bhtk.float()
    first, second, rest = wide[..., :half], wide[..., half : 2 * half], wide[..., 2 * half :]
    turned = torch.cat((first * cos - second * sin, second * cos + first * sin, rest), dim=-1)
    return turned.to(x_bhtk.dtype)


class Attention(nn.Module):
    """Causal self-attention; queries and keys optionally normalised per head, rotated, and shared among groups of heads."""

    def __init__(self, model: ModelConfig) -> None:
        super().__init__()
        width, biases = model.emb_dim, model.norm == "layer"
        self.n_heads, self.n_kv_heads = model.n_heads, model.n_kv_heads or model.n_heads
        self.head_dim = width // model.n_heads
        self.drop_rate, self.qk_norm = model.drop_rate, model.qk_norm
        self.query = Linear(width, width, bias=model.qkv_bias)
        self.key = Linear(width, flops.kv_width(model), bias=model.qkv_bias)
        self.value = Linear(width, flops.kv_width(model), bias=model.qkv_bias)
        self.output = Linear(width, width, bias=biases)

    def _project(self, x_btd: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        # One product instead of three. The weights are cast at use anyway, so joining them costs nothing more.
        maps = (self.query, self.key, self.value)
        weight = torch.cat([part.weight.to(x_btd.dtype) for part in maps])
        bias = (
            torch.cat([part.bias.to(x_btd.dtype) for part in maps]) if self.query.bias is not None else None
        )
        joined = F.linear(x_btd, weight, bias)
        b, t, _ = x_btd.shape
        sizes = [part.out_features for part in maps]
        q, k, v = (
            part.view(b, t, -1, self.head_dim).transpose(1, 2) for part in torch.split(joined, sizes, dim=-1)
        )
        return q, k, v

    def forward(self, x_btd: Tensor, rope: tuple[Tensor, Tensor] | None, past: KeyValues | None) -> Tensor:
        b, t, d = x_btd.shape
        q, k, v = self._project(x_btd)
        if self.qk_norm:
            q, k = F.rms_norm(q, (self.head_dim,), eps=1e-6), F.rms_norm(k, (self.head_dim,), eps=1e-6)
        if rope is not None:
            q, k = rotate(q, *rope), rotate(k, *rope)
        if past is not None:
            k, v = past.extend(k, v)
        y = F.scaled_dot_product_attention(
            q,
            k,
            v,
            dropout_p=self.drop_rate if self.training else 0.0,
            is_causal=q.shape[2] == k.shape[2],  # otherwise one query looks back on all keys
            enable_gqa=self.n_kv_heads != self.n_heads,
        )
        return cast(Tensor, self.output(y.transpose(1, 2).reshape(b, t, d)))


class FeedForward(nn.Module):
    """Two linear maps around tanh-GELU or squared ReLU, or three around a SiLU gate."""

    def __init__(self, model: ModelConfig) -> None:
        super().__init__()
        hidden, biases = flops.feed_forward_width(model), model.norm == "layer"
        self.activation = model.activation
        self.up = Linear(model.emb_dim, hidden, bias=biases)
        self.gate = Linear(model.emb_dim, hidden, bias=biases) if model.activation == "swiglu" else None
        self.down = Linear(hidden, model.emb_dim, bias=biases)

    def forward(self, x: Tensor) -> Tensor:
        up = self.up(x)
        if self.gate is not None:
            return cast(Tensor, self.down(F.silu(self.gate(x)) * up))
        inner = F.gelu(up, approximate="tanh") if self.activation == "gelu" else F.relu(up).square()
        return cast(Tensor, self.down(inner))


class Block(nn.Module):
    """Pre-norm attention and feed-forward, each added to the residual stream."""

    def __init__(self, model: ModelConfig) -> None:
        super().__init__()
        self.drop_rate = model.drop_rate
        self.attention_norm = Norm(model.emb_dim, model.norm)
        self.attention = Attention(model)
        self.feed_forward_norm = Norm(model.emb_dim, model.norm)
        self.feed_forward = FeedForward(model)

    def forward(
        self, x_btd: Tensor, rope: tuple[Tensor, Tensor] | None, past: KeyValues | None = None
    ) -> Tensor:
        attended = self.attention(self.attention_norm(x_btd), rope, past)
        x_btd = x_btd + F.dropout(attended, self.drop_rate, self.training)
        fed = self.feed_forward(self.feed_forward_norm(x_btd))
        return x_btd + F.dropout(fed, self.drop_rate, self.training)


class GPT(nn.Module):
    """The whole model. Build it on the meta device and fill it with `fill`; every rank then holds the same weights."""

    def __init__(
        self, model: ModelConfig, *, compute_dtype: torch.dtype = torch.float32, recompute: bool = False
    ) -> None:
        super().__init__()
        self.config, self.compute_dtype, self.recompute = model, compute_dtype, recompute
        rows = flops.padded_vocab(model.vocab_size)
        self.token_embedding = Embedding(rows, model.emb_dim)
        self.position_embedding = (
            Embedding(model.context_length, model.emb_dim) if model.position == "learned" else None
        )
        self.blocks = nn.ModuleList(Block(model) for _ in range(model.n_layers))
        self.final_norm = Norm(model.emb_dim, model.norm)
        self.head = nn.Linear(model.emb_dim, rows, bias=False)
        if model.tie_weights:
            self.head.weight = self.token_embedding.weight

    def allocate(self, device: str | torch.device) -> GPT:
        """Give a model built on the meta device memory, with nothing in it yet."""

        def empty(tensor: Tensor) -> Tensor:
            # As to_empty does it; but empty_like of a plain parameter would load torch's compiler too.
            if type(tensor) is nn.Parameter:
                return torch.empty(tensor.shape, dtype=tensor.dtype, device=device)
            return torch.empty_like(tensor, device=device)  # a part of one, sharded over processes

        self._apply(empty)  # type: ignore[no-untyped-call]
        if self.config.tie_weights:  # which this has just untied
            self.head.weight = self.token_embedding.weight
        return self

    def hidden(self, tokens_bt: Tensor, cache: Sequence[KeyValues] | None = None) -> Tensor:
        """The residual stream after the final norm, (b, t, d). A cache, one entry a block, is read and extended."""
        start = cache[0].length if cache else 0
        length, device = tokens_bt.shape[1], tokens_bt.device
        x_btd = self.token_embedding(tokens_bt)
        if self.position_embedding is not None:
            x_btd = x_btd + self.position_embedding(torch.arange(start, start + length, device=device))
        rope = rotary_angles(self.config, start, length, device) if self.config.position == "rope" else None
        x_btd = F.dropout(x_btd.to(self.compute_dtype), self.config.drop_rate, self.training)
        for index, block in enumerate(self.blocks):
            if self.recompute and self.training:
                x_btd = checkpoint(block, x_btd, rope, use_reentrant=False)
            else:
                x_btd = block(x_btd, rope, cache[index] if cache else None)
        return cast(Tensor, self.final_norm(x_btd))

    def forward(self, tokens_bt: Tensor, targets_bt: Tensor, denominator: float) -> Tensor:
        """Sum of the cross-entropies of `targets_bt` (−1: not counted), divided by `denominator`; a scalar."""
        hidden_nd = self.hidden(tokens_bt).flatten(0, 1)
        return linear_cross_entropy(
            hidden_nd,
            self.head.weight,
            targets_bt.reshape(-1),
            vocab_size=self.config.vocab_size,
            softcap=self.config.logit_softcap,
            denominator=denominator,
        )

    def logits(self, tokens_bt: Tensor, cache: Sequence[KeyValues] | None = None) -> Tensor:
        """Logits over the real vocabulary in float32, (b, t, v)."""
        x_btd = self.hidden(tokens_bt, cache)
        weight = self.head.weight[: self.config.vocab_size].to(x_btd.dtype)
        return softcap_(F.linear(x_btd, weight).float(), self.config.logit_softcap)

    def compile_blocks(self) -> None:
        """Compile each block where it is. As one graph the gradients would all come at the end of backward, and DDP
        would overlap nothing; all blocks share the code that the first one compiles."""
        # The reducer would split each block's graph at its bucket size.
        torch._dynamo.config.optimize_ddp = False  # noqa: SLF001  documented switch in a private module
        for block in [*self.blocks, self.final_norm]:
            block.compile(dynamic=False)


def plain_name(name: str) -> str:
    """A parameter's name without what wrappers put in front of it or between."""
    return name.removeprefix("module.").replace("_orig_mod.", "").replace("_checkpoint_wrapped_module.", "")


def padded(name: str, tensor: Tensor, model: ModelConfig) -> Tensor:
    """`tensor` as the model holds it: embedding and head get zero rows up to the padded vocabulary."""
    if name not in VOCAB_NAMES:
        return tensor
    missing = flops.padded_vocab(model.vocab_size) - tensor.shape[0]
    return F.pad(tensor, (0, 0, 0, missing)) if missing > 0 else tensor


def unpadded(name: str, tensor: Tensor, model: ModelConfig) -> Tensor:
    """`tensor` as a checkpoint holds it. The padding rows are zero, stay zero and never reach the loss."""
    return tensor[: model.vocab_size] if name in VOCAB_NAMES else tensor


VOCAB_NAMES = frozenset({"token_embedding.weight", "head.weight"})


def initial_weights(model: ModelConfig, seed: int) -> Iterator[tuple[str, Tensor]]:
    """Every parameter's name and its first value, unpadded. Each has a generator of its own, seeded by `seed` and the
    name, so a weight depends on neither order, device nor process."""
    with torch.device("meta"):
        shapes = GPT(model)
    for name, parameter in shapes.named_parameters():
        shape = unpadded(name, parameter, model).shape
        generator = torch.Generator().manual_seed(zlib.crc32(f"{seed} {name}".encode()))
        yield name, _initial(name, shape, model, generator)


def _initial(name: str, shape: torch.Size, model: ModelConfig, generator: torch.Generator) -> Tensor:
    if "norm" in name:
        return torch.full(shape, 1.0 if name.endswith("weight") else 0.0)
    if model.init == "torch":
        return _torch_default(name, shape, model, generator)
    if name.endswith("bias"):
        return torch.zeros(shape)
    residual = name.endswith(("attention.output.weight", "feed_forward.down.weight"))
    if residual and model.init == "zero_proj":
        return torch.zeros(shape)
    # GPT-2 (Radford et al., 2019, 2.3): 0.02, and residual projections divided by the root of the number of branches.
    scale = 0.02 / math.sqrt(2 * model.n_layers) if residual else 0.02
    return torch.randn(shape, generator=generator) * scale


def _torch_default(name: str, shape: torch.Size, model: ModelConfig, generator: torch.Generator) -> Tensor:
    """What nn.Embedding (N(0, 1)) and nn.Linear (uniform within 1/√fan_in) do when nobody sets anything."""
    if "embedding" in name:
        return torch.randn(shape, generator=generator)
    down_bias = name.endswith("feed_forward.down.bias")
    fan_in = shape[-1] if len(shape) == 2 else flops.feed_forward_width(model) if down_bias else model.emb_dim
    return (torch.rand(shape, generator=generator) * 2 - 1) / math.sqrt(fan_in)


@torch.no_grad()
def fill(
    module: GPT, weights: Iterator[tuple[str, Tensor]], place: Callable[[Tensor, Tensor], None] | None = None
) -> None:
    """Copy named, unpadded tensors into the model's parameters. Raises KeyError for a name missing on either side,
    ValueError for a shape that differs; `place(parameter, value)` replaces the plain copy."""
    missing = dict(module.named_parameters())
    for name, value in weights:
        parameter = missing.pop(name)
        full = padded(name, value, module.config)
        if full.shape != parameter.shape:
            raise ValueError(
                f"{name} has shape {tuple(value.shape)}, the model wants {tuple(parameter.shape)}"
            )
        if place is None:
            parameter.copy_(full)
        else:
            place(parameter, full)
    if missing:
        raise KeyError(next(iter(missing)))

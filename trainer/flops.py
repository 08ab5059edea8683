"""How large a model is, what a token costs, and what it needs in memory: pure arithmetic on the configuration.

The FLOPs of a token (forward and backward) are 6 · matmul parameters + 12 · layers · width · context: each weight of a
matrix product costs two operations forward and four backward, and the second term is attention's two products over the
whole context (Chowdhery et al., PaLM, 2022, appendix B; the causal half is counted in full, as everyone does). The
embedding look-up is no product, the head is one, tied or not. The vocabulary counts unpadded.
"""

from __future__ import annotations

from typing import TypeGuard

from trainer.config import ModelConfig, TrainConfig, divisors

FORMULA = "6 * matmul parameters + 12 * layers * width * context"
PAD = 128
ENOUGH_TOKENS = {"cuda": 131_072, "cpu": 16_384}
"""Tokens of a microbatch beyond which nothing gets faster."""
USABLE = 0.92
"""Share of a GPU's memory that a prediction may fill."""


def padded_vocab(vocab_size: int) -> int:
    """The rows of embedding and head in memory: `vocab_size` rounded up to a multiple of 128, which GEMMs like."""
    return -(-vocab_size // PAD) * PAD


def feed_forward_width(model: ModelConfig) -> int:
    """Hidden width of the feed-forward layer: 4 · width; for swiglu 8/3 of it, rounded up to 256, for equal cost."""
    if model.ffn_dim is not None:
        return model.ffn_dim
    if model.activation == "swiglu":
        return -(-8 * model.emb_dim // 3 // 256) * 256
    return 4 * model.emb_dim


def kv_width(model: ModelConfig) -> int:
    """Width of the keys, and of the values, over all their heads."""
    return model.emb_dim // model.n_heads * (model.n_kv_heads or model.n_heads)


def _block_matrices(model: ModelConfig) -> int:
    width = model.emb_dim
    attention = 2 * width * width + 2 * width * kv_width(model)
    branches = 3 if model.activation == "swiglu" else 2
    return attention + branches * width * feed_forward_width(model)


def _norm(model: ModelConfig) -> int:
    return model.emb_dim * (2 if model.norm == "layer" else 1)


def _block_biases(model: ModelConfig) -> int:
    biases = model.emb_dim + 2 * kv_width(model) if model.qkv_bias else 0
    if model.norm == "layer":  # models with RMSNorm have no biases in their projections
        up = 2 if model.activation == "swiglu" else 1
        biases += 2 * model.emb_dim + up * feed_forward_width(model)
    return biases


def parameters(model: ModelConfig) -> int:
    """Weights of the model as a checkpoint holds them."""
    embeddings = model.vocab_size * model.emb_dim
    if model.position == "learned":
        embeddings += model.context_length * model.emb_dim
    head = 0 if model.tie_weights else model.vocab_size * model.emb_dim
    block = _block_matrices(model) + _block_biases(model) + 2 * _norm(model)
    return embeddings + head + model.n_layers * block + _norm(model)


def matmul_parameters(model: ModelConfig) -> int:
    """Weights that take part in a matrix product for each token: the blocks' matrices and the head."""
    return model.n_layers * _block_matrices(model) + model.vocab_size * model.emb_dim


def flops_per_token(model: ModelConfig) -> int:
    """FLOPs of training on one token, by FORMULA."""
    return 6 * matmul_parameters(model) + 12 * model.n_layers * model.emb_dim * model.context_length


def state_bytes(model: ModelConfig, train: TrainConfig, processes: int) -> int:
    """Bytes of weights, gradients and optimizer state on one process: four bytes each of weight, gradient and two moments
    (Muon keeps one for the blocks' matrices), divided among the processes where they are sharded."""
    blocks = model.n_layers * _block_matrices(model)
    moments = 2 * parameters(model) - (blocks if train.optimizer == "muon" else 0)
    total = 4 * (2 * parameters(model) + moments)
    if train.sharding == "fsdp":
        return total // processes
    if processes > 1:  # the reducer's buckets hold the gradients; one further bucket travels
        total += 64 << 20
    return total


def _kept(model: ModelConfig) -> int:
    """Elements that a compiled block keeps of each token for backward, as autograd's saved tensors show: its input, the output of
    attention, the stream between its halves, both norms' outputs, queries, keys, values, and the feed-forward's input to and output of
    its non-linearity; rotated or normalised queries and keys beside the projected ones; RMSNorm one more stream."""
    width = model.emb_dim
    branches = 3 if model.activation == "swiglu" else 2
    kept = 5 * width + (width + 2 * kv_width(model)) + branches * feed_forward_width(model)
    if model.position == "rope" or model.qk_norm:
        kept += width + kv_width(model)
    return kept + (width if model.norm == "rms" else 0)


def activation_bytes(model: ModelConfig, train: TrainConfig, microbatch_size: int) -> int:
    """Bytes that one microbatch holds at its peak beside the state, with compiled blocks and fused attention.

    All blocks' activations, their weights in the compute type and the head's gradient are there at once when either the loss
    has its logits, or the last block's backward its gradients.
    """
    item = 2 if train.precision == "bf16" else 4
    tokens, width = microbatch_size * model.context_length, model.emb_dim
    block = width if train.activation_checkpointing else _kept(model)
    kept = tokens * (model.n_layers * block + 3 * width) * item
    if train.precision == "bf16" and train.sharding == "ddp":
        kept += model.n_layers * _block_matrices(model) * item
    head = padded_vocab(model.vocab_size) * width
    logits = min(tokens, head_chunk(train.device)) * padded_vocab(model.vocab_size) * item
    if capped(model.logit_softcap):
        logits *= 2  # one kernel sums and writes, through a second chunk
    backward = 2 * feed_forward_width(model) + 2 * width
    if train.activation_checkpointing:
        backward += _kept(model)
    return kept + 4 * head + max(logits + 2 * head * item, tokens * backward * item)


def capped(softcap: float | None) -> TypeGuard[float]:
    """Whether logits are bounded so low that exp(logit − cap) loses none of them (at ±20 it is at least 4e-18): then the loss need
    not look for the largest."""
    return softcap is not None and softcap <= 20


def head_chunk(device: str) -> int:
    """Tokens whose logits exist at the same time."""
    return 8192 if device == "cuda" else 1024


def memory_gib(model: ModelConfig, train: TrainConfig, microbatch_size: int, processes: int = 1) -> float:
    """Predicted peak memory of one process, GiB: on a GPU with the CUDA context, 0.8 of it on an H200; on a CPU with torch itself."""
    fixed = 1.0 * 2**30 if train.device == "cuda" else 0.5 * 2**30
    total = state_bytes(model, train, processes) + activation_bytes(model, train, microbatch_size) + fixed
    return float(total) / 2**30


def microbatch_sizes(model: ModelConfig, train: TrainConfig, processes: int) -> list[int]:
    """Microbatch sizes that divide a process's share of the global batch, largest first, none longer than useful."""
    limit = max(1, ENOUGH_TOKENS[train.device] // model.context_length)
    return [size for size in reversed(divisors(train.global_batch_size // processes)) if size <= limit]


def largest_microbatch(
    model: ModelConfig, train: TrainConfig, processes: int, memory_gib_here: float | None
) -> int | None:
    """The largest of them that is predicted to fit into `memory_gib_here` (None: no limit); None where not even one sequence would."""
    for size in microbatch_sizes(model, train, processes):
        if memory_gib_here is None or memory_gib(model, train, size, processes) <= USABLE * memory_gib_here:
            return size
    return None

"""Examples as padded batches. Right padding: attention is causal, so nothing before it sees it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from trainer.after.examples import Answered, Labelled, Preferred


def shifted(
    prompt: Sequence[int], response: Sequence[int], *, mask_prompt: bool
) -> tuple[list[int], list[int]]:
    """Inputs and targets of a prompt with its response; −1 where the target is a part of a masked prompt."""
    whole = [*prompt, *response]
    hidden = len(prompt) - 1 if mask_prompt else 0
    return whole[:-1], [-1] * hidden + whole[1 + hidden :]


def padded_rows(rows: Sequence[tuple[Sequence[int], Sequence[int]]]) -> tuple[Tensor, Tensor]:
    """(tokens, targets), both (b, t) int64, t the longest row; padding is token 0 with target −1."""
    width = max(1, *(len(tokens) for tokens, _ in rows)) if rows else 1
    tokens_bt = torch.zeros(len(rows), width, dtype=torch.int64)
    targets_bt = torch.full((len(rows), width), -1, dtype=torch.int64)
    for index, (tokens, targets) in enumerate(rows):
        tokens_bt[index, : len(tokens)] = torch.tensor(tokens, dtype=torch.int64)
        targets_bt[index, : len(targets)] = torch.tensor(targets, dtype=torch.int64)
    return tokens_bt, targets_bt


def answered(rows: Sequence[Answered | None], *, mask_prompt: bool) -> tuple[Tensor, ...]:
    """(tokens, targets)."""
    return padded_rows(
        [
            ([0], [-1]) if row is None else shifted(row.prompt, row.response, mask_prompt=mask_prompt)
            for row in rows
        ]
    )


def labelled(rows: Sequence[Labelled | None]) -> tuple[Tensor, ...]:
    """(tokens (b, t), position of each last token (b), labels (b), −1 for what only fills up)."""
    tokens_bt, _ = padded_rows([([0] if row is None else row.tokens, []) for row in rows])
    last_b = torch.tensor([0 if row is None else len(row.tokens) - 1 for row in rows])
    return tokens_bt, last_b, torch.tensor([-1 if row is None else row.label for row in rows])


def preferred(rows: Sequence[Preferred | None]) -> tuple[Tensor, Tensor]:
    """(tokens, targets), two rows a pair: the chosen response, then the rejected one."""
    nothing: tuple[list[int], list[int]] = ([0], [-1])
    pairs = [
        (nothing, nothing)
        if row is None
        else (
            shifted(row.prompt, row.chosen, mask_prompt=True),
            shifted(row.prompt, row.rejected, mask_prompt=True),
        )
        for row in rows
    ]
    return padded_rows([one for pair in pairs for one in pair])

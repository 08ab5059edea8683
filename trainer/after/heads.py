"""What is trained on top of a GPT: the next token of a response, a class, or a preference.

Each module's forward returns one number per column (the loss first), a sum over the counted examples or tokens divided by
`denominator`, so that sums over microbatches and processes are means over the whole batch.
"""

from __future__ import annotations

from typing import cast

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from trainer.loss import softcap_
from trainer.model import GPT


class Completion(nn.Module):
    """The cross-entropy of the next token where a target is given."""

    columns = ("loss",)

    def __init__(self, gpt: GPT) -> None:
        super().__init__()
        self.gpt = gpt

    def forward(self, tokens_bt: Tensor, targets_bt: Tensor, denominator: float) -> Tensor:
        return cast(Tensor, self.gpt(tokens_bt, targets_bt, denominator)).reshape(1)


class Classifier(nn.Module):
    """A linear head on the last token's hidden state, in place of the language model's."""

    columns = ("loss", "accuracy")

    def __init__(self, gpt: GPT, classes: int, seed: int) -> None:
        super().__init__()
        self.gpt = gpt
        if not gpt.config.tie_weights:
            del gpt.head  # it has nothing to do, and would only be carried along
        self.classifier = nn.Linear(gpt.config.emb_dim, classes)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            self.classifier.weight.copy_(
                torch.randn(self.classifier.weight.shape, generator=generator) * 0.02
            )
            self.classifier.bias.zero_()

    def scores(self, tokens_bt: Tensor, last_b: Tensor) -> Tensor:
        """One logit a class, (b, c) in float32; `last_b` is the position of each text's last token."""
        hidden_btd = self.gpt.hidden(tokens_bt)
        hidden_bd = hidden_btd[torch.arange(len(last_b), device=last_b.device), last_b]
        return F.linear(hidden_bd.float(), self.classifier.weight, self.classifier.bias)

    def forward(self, tokens_bt: Tensor, last_b: Tensor, labels_b: Tensor, denominator: float) -> Tensor:
        """Labels of −1 do not count."""
        scores_bc = self.scores(tokens_bt, last_b)
        loss = F.cross_entropy(scores_bc, labels_b, ignore_index=-1, reduction="sum")
        right = (scores_bc.argmax(1) == labels_b).sum()
        return torch.stack((loss, right.to(loss.dtype))) / denominator


class Preference(nn.Module):
    """Direct preference optimisation (Rafailov et al., 2023, equation 7): −log σ(β·(Δchosen − Δrejected)), Δ being how
    much likelier a response is now than under the reference."""

    columns = ("loss", "accuracy", "margin")

    def __init__(self, gpt: GPT, beta: float) -> None:
        super().__init__()
        self.gpt, self.beta = gpt, beta

    def forward(
        self,
        tokens_bt: Tensor,
        targets_bt: Tensor,
        reference_b: Tensor,
        counted_p: Tensor,
        denominator: float,
    ) -> Tensor:
        """Rows 2p and 2p+1 are the chosen and the rejected response of pair p; `reference_b` their log-probabilities
        under the reference; `counted_p` is 0 for a pair that only fills up the batch."""
        gains_p2 = (response_log_probs(self.gpt, tokens_bt, targets_bt) - reference_b).view(-1, 2)
        margin_p = self.beta * (gains_p2[:, 0] - gains_p2[:, 1])
        parts = torch.stack((-F.logsigmoid(margin_p), (margin_p > 0).to(margin_p.dtype), margin_p))
        return (parts * counted_p).sum(1) / denominator


def response_log_probs(gpt: GPT, tokens_bt: Tensor, targets_bt: Tensor) -> Tensor:
    """The log-probability of each row's targets (−1: none), summed, (b,) in float32. Logits exist at the targets only."""
    counted_bt = targets_bt >= 0
    hidden_nd = gpt.hidden(tokens_bt)[counted_bt]
    weight_vd = gpt.head.weight[: gpt.config.vocab_size].to(hidden_nd.dtype)
    logits_nv = softcap_(F.linear(hidden_nd, weight_vd).float(), gpt.config.logit_softcap)
    picked_n = logits_nv.log_softmax(1).gather(1, targets_bt[counted_bt][:, None])[:, 0]
    spread_bt = torch.zeros(targets_bt.shape, device=picked_n.device).masked_scatter(counted_bt, picked_n)
    return spread_bt.sum(1)

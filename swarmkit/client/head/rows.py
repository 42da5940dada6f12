"""Rows of logits of which a server told the largest: what is known of them, and how processors may use them.

The client has the weights of its output layer, and computes the logits of the tokens that came by itself. So
a server says only *which* tokens are the likeliest, how large the next one is at most, and the log-sum-exp of
all. Tokens that are not known stand as NaN in a row, which no processor ever sees.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import LogitsProcessorList, TopPLogitsWarper

from swarmkit.client.head.demand import LogitsDemand
from swarmkit.models.head.output_layer import TopLogits


@dataclass(frozen=True)
class PartialRows:
    """Some rows of logits, known in part.

    Attributes:
        hidden: `[rows, hidden]`, the input of the output layer.
        tokens: `[rows, top]`, int64: the likeliest.
        values: `[rows, top]`: their logits, as this machine computes them.
        named: `[named]`, int64: other tokens whose logits are known in all rows.
        named_values: `[rows, named]`.
        told: what the server said.
        slack: `[rows]`: by how much two machines' logits may differ.
    """

    hidden: Tensor
    tokens: Tensor
    values: Tensor
    named: Tensor
    named_values: Tensor
    told: TopLogits
    slack: Tensor

    def padded(self, vocabulary: int) -> Tensor:
        """The rows `[rows, vocabulary]`, with NaN for what is not known."""
        rows = self.hidden.new_full((len(self.hidden), vocabulary), math.nan)
        rows[:, self.named.to(rows.device)] = self.named_values
        return rows.scatter_(1, self.tokens.to(rows.device), self.values)

    def place_of(self, scores: Tensor) -> int | None:
        """Which of the rows `scores` `[n, vocabulary]` begins with; None if it is none of them."""
        many = len(scores)
        for first in range(len(self.tokens) - many + 1):
            tokens, values = (part[first : first + many] for part in (self.tokens, self.values))
            found = scores.gather(1, tokens.to(scores.device))
            if torch.equal(found.cpu(), values.to(scores.dtype).cpu()):
                return first
        return None

    def excess(self) -> float:
        """How far what the server told is from what this machine computed, as a multiple of the slack."""
        apart = (self.told.values.double() - self.values.cpu().double()).abs().amax(dim=1)
        return float((apart / self.slack.double()).max())

    def is_contradicted_by(self, complete: Tensor, temperature: float) -> bool:
        """Whether complete rows `[rows, vocabulary]` show that the server left out a likely token, or told a
        wrong log-sum-exp.
        """
        logits = complete.cpu().double()
        total = torch.logsumexp(logits / temperature, dim=-1)
        slack = 2 * self.slack.double()
        wrong_total = (total - self.told.log_sum_exp.double()).abs() > slack / temperature + 1e-4
        others = logits.scatter(1, self.tokens, -math.inf)
        hidden_ones = others.amax(dim=1) > self.told.values[:, -1].double() + slack
        return bool((wrong_total | hidden_ones).any())

    def processed(
        self,
        demand: LogitsDemand,
        processors: LogitsProcessorList,
        text: Tensor,
        scores: Tensor,
        first: int,
        complete: Callable[[Tensor], Tensor],
    ) -> Tensor:
        """What the processors make of complete rows, from what is known of them where that suffices.

        Args:
            demand: of these processors.
            text: `[n, tokens]`, to which a token is to be added.
            scores: `[n, vocabulary]`, float32, with NaN for what is not known.
            first: which of these rows `scores` begins with.
            complete: computes all logits `[n, vocabulary]` for hidden states `[n, hidden]`.
        """
        edited = self._edited(demand, text, scores, first)
        if edited is None:
            edited, left = complete(self.hidden[first : first + len(scores)]).to(scores), processors
        else:
            left = LogitsProcessorList(processors[len(demand.editors) :])
        processed: Tensor = left(text, edited)  # type: ignore[arg-type]
        return processed

    def _edited(self, demand: LogitsDemand, text: Tensor, scores: Tensor, first: int) -> Tensor | None:
        """The rows as editors leave them, with something harmless for what is not known; None if the other
        processors would see through it.
        """
        unknown = scores.isnan()
        edited = demand.edit(text, scores.masked_fill(unknown, -math.inf))
        for row in range(len(scores)):
            index = first + row
            slack = float(self.slack[index])
            bound = float(self.told.values[index, -1]) + 2 * slack
            known = edited[row][~unknown[row]].double()
            largest = float(known.max())
            if largest == -math.inf:
                return None
            tail = self._tail(index, demand.temperature, largest)
            if not demand.suffices(known, bound, tail, slack):
                return None
            if isinstance(demand.filter, TopPLogitsWarper) and tail > 0:
                # All that is not known, taken together, has its true weight; alike for all of these tokens,
                # which is at most the bound.
                each = largest + demand.temperature * math.log(tail / int(unknown[row].sum()))
                edited[row].masked_fill_(unknown[row], min(each, bound))
        return edited

    def _tail(self, index: int, temperature: float, largest: float) -> float:
        """The sum of exp((logit - largest) / temperature) over the tokens of a row that are not known."""
        told = self.told.values[index].double() / temperature
        named = ~torch.isin(self.named, self.tokens[index])
        others = self.named_values[index].cpu().double()[named] / temperature
        base = float(told[0])
        weight = math.exp(min(float(self.told.log_sum_exp[index]) - base, 700.0))
        weight -= float((told - base).exp().sum()) + float((others - base).exp().sum())
        return max(weight, 0.0) * math.exp(min(base - largest / temperature, 700.0))


def partial_rows(layer: nn.Linear, hidden: Tensor, told: TopLogits, named: Tensor) -> PartialRows:
    """Compute the logits of the tokens that a server told, and of `named` ones, on this machine.

    Args:
        layer: the client's output layer.
        hidden: `[rows, hidden]`, on its device and in its dtype.
        named: `[named]`, int64.
    """
    assert told.tokens is not None
    weight, bias = layer.weight, layer.bias
    tokens = told.tokens.to(hidden.device)
    chosen = weight[tokens]  # [rows, top, hidden]
    values = torch.einsum("rth,rh->rt", chosen, hidden)
    of_named = named.to(hidden.device)
    named_values = nn.functional.linear(hidden, weight[of_named], None if bias is None else bias[of_named])
    if bias is not None:
        values = values + bias[tokens]
    # Rounding of sums of products in float32, and of a product in a shorter dtype, some times over.
    reach = hidden.float().norm(dim=1) * chosen.float().norm(dim=2).amax(dim=1)
    slack = torch.finfo(torch.float32).eps * math.sqrt(hidden.shape[1]) * reach
    if hidden.dtype != torch.float32:
        size = values.float().abs().amax(dim=1)
        slack += torch.finfo(hidden.dtype).eps * (2 * size + 4 * reach / math.sqrt(hidden.shape[1]))
    slack = slack.clamp_min(1e-6).cpu()
    return PartialRows(hidden, told.tokens, values, named, named_values, told, slack)

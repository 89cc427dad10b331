"""A small transformer whose full gradient can be had at every step: a tiny BERT in float64 on a made-up dataset.

Parties and cut are those of every run (`ZerothOrderClient`, `FirstOrderServer`, `split_model`). The task: do more
tokens of the first half of the vocabulary stand in the row than of the second? Some labels are wrong.
"""

from collections.abc import Callable

import numpy as np
import torch
from transformers import BertConfig, BertForSequenceClassification

from hosl.core.directions import Distribution
from hosl.core.targets import Batch, ClassTargets
from hosl.parties.clients.zeroth_order import ZerothOrderClient
from hosl.parties.engine.loss import row_losses
from hosl.parties.servers.basic import FirstOrderServer
from hosl.split import split_model
from research.convergence_rate.chain import stream
from research.convergence_rate.config import BertProblem


class CutBert:
    """The model at one cut and seed, as `study` measures it."""

    def __init__(
        self,
        problem: BertProblem,
        cut: int,
        seed: int,
        learning_rate: Callable[[int], float],
        distribution: Distribution,
    ) -> None:
        """The dataset is the same for every cut and seed; the weights are drawn by the seed."""
        self._problem, self._seed = problem, seed
        self._model = _model(problem, seed)
        self._data = made_up_rows(problem)
        client_half, server_half = split_model(self._model, cut)  # shares the tensors of the whole
        self._of_client = list(client_half.parameters())
        self._of_server = list(server_half.parameters())
        self.client_size = sum(p.numel() for p in self._of_client)
        eta = learning_rate(self.client_size)
        self.client = ZerothOrderClient(client_half, distribution=distribution)
        self.server = FirstOrderServer(server_half, learning_rate=lambda step: eta)

    def batch(self, step: int) -> Batch:
        """The mini-batch of a step: the same for every cell of a seed."""
        drawn = stream(2 + self._seed, step).integers(0, self._problem.rows, self._problem.batch_rows)
        targets = self._data.targets
        assert isinstance(targets, ClassTargets)
        return Batch(self._data.input_ids[drawn], ClassTargets(targets.mask[drawn], targets.labels[drawn]))

    def squares(self) -> tuple[float, float]:
        """|df/dtheta_c|^2 and |df/dtheta_s|^2 over all rows, by autograd through the whole."""
        found = torch.autograd.grad(self._full_loss(), [*self._of_client, *self._of_server])
        squares = [float((g * g).sum()) for g in found]
        return sum(squares[: len(self._of_client)]), sum(squares[len(self._of_client) :])

    def loss(self) -> float:
        """The mean loss over all rows, in nats."""
        with torch.no_grad():
            return float(self._full_loss())

    def _full_loss(self) -> torch.Tensor:
        ids, mask = torch.from_numpy(self._data.input_ids), torch.from_numpy(self._data.targets.mask)
        logits = self._model(input_ids=ids, attention_mask=mask.to(torch.int64)).logits
        return row_losses(logits, self._data.targets).mean()


def made_up_rows(problem: BertProblem) -> Batch:
    """The whole dataset."""
    generator = stream(0, 0)
    ids = generator.integers(0, problem.vocabulary, (problem.rows, problem.tokens))
    labels = ((ids < problem.vocabulary // 2).sum(1) * 2 > problem.tokens).astype(np.int64)
    labels ^= generator.random(problem.rows) < problem.flipped
    return Batch(ids, ClassTargets(np.ones(ids.shape, np.int8), labels))


def _model(problem: BertProblem, seed: int) -> BertForSequenceClassification:
    config = BertConfig(
        vocab_size=problem.vocabulary, hidden_size=problem.width, num_hidden_layers=problem.blocks,
        num_attention_heads=2, intermediate_size=2 * problem.width, max_position_embeddings=problem.tokens,
        type_vocab_size=1,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):  # transformers draws weights from torch's global state
        model = BertForSequenceClassification(config).double().eval()
    generator = stream(1, seed)  # and these take their place
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.dim() > 1:
                p.copy_(torch.from_numpy(generator.standard_normal(tuple(p.shape)) * problem.weight_sd))
            else:
                p.fill_(1.0 if name.endswith("LayerNorm.weight") else 0.0)
    return model

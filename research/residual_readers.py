"""Do layers that read the residual stream pay? Residual feedback of all weights of a block, against that of writers.

    HOSL_DATA=... python research/residual_readers.py                     # cosines with true gradients, one batch
    HOSL_DATA=... python research/residual_readers.py --train 0.03        # SST-2 at cut 28 with readers, one rate
    HOSL_DATA=... python research/residual_readers.py --train 0.03 --nodes 4   # hosl-node's queries added to writers

Readers are query, key, value, gate and up. Their gradients are one block's backward pass from g, the gradient at the
cut, taken to be that at the block's output; g goes to the block below unchanged. Model, task, steps and rates' meaning
as in examples/studies/smollm2-sst2.yaml, seed 0.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import torch
import yaml

from hosl.config import Config, parse_config
from hosl.core.targets import Batch
from hosl.methods import torch_parties
from hosl.methods.schedule import batch_of_step
from hosl.parties.clients.node import NodeClient
from hosl.parties.clients.recomputing import RecomputingClient
from hosl.parties.clients.residual import ResidualClient
from hosl.split import ClientHalf
from hosl.split.adapters import set_trainable
from hosl.training.local_session import new_session
from hosl.training.train import start

STUDY = Path(__file__).parents[1] / "examples/studies/smollm2-sst2.yaml"


class ReadersClient(RecomputingClient):
    """A residual-feedback client of every weight of its last blocks: each block's own backward pass from the same g."""

    def __init__(self, half: ClientHalf, *, blocks: int, **options: Any) -> None:
        set_trainable(half, "blocks")
        for index, block in enumerate(half.model.get_submodule(half.blocks_name)):
            if index < half.cut - blocks:
                block.requires_grad_(False)
        super().__init__(half, **options)

    forward_keeping_inputs = RecomputingClient.forward_for_backward

    def descend_by_feedback(self, gradient: torch.Tensor, learning_rate: float) -> None:
        """W -= learning_rate dF/dW^T g for every weight of every trained block, g being dL/dh at the cut."""
        for found in self._gradients(gradient):
            for p, of_p in found.items():
                with torch.no_grad():
                    p.sub_(of_p, alpha=learning_rate)

    def feedback_gradients(self, batch: Batch, gradient: torch.Tensor) -> dict[str, torch.Tensor]:
        """By trained weight, what `descend_by_feedback` takes for its gradient."""
        self.forward_keeping_inputs(batch)
        names = {p: name for name, p in self.trained.items()}
        return {names[p]: of_p for found in self._gradients(gradient) for p, of_p in found.items()}

    def _gradients(self, gradient: torch.Tensor) -> Any:
        parts, self._parts = self._parts, []
        for index in reversed(range(self._lowest, len(self._blocks))):
            weights = [p for p in self._blocks[index].parameters() if p.requires_grad]
            sums = {p: torch.zeros_like(p) for p in weights}
            for part in parts:
                call = part.calls.pop()
                with torch.enable_grad():
                    out = call.hidden(self._blocks[index](*call.args, **call.kwargs))
                    own = torch.autograd.grad(out, weights, gradient[part.rows])
                for p, of_p in zip(weights, own, strict=True):
                    sums[p] += of_p
            yield sums


def settings(rate: float, out: str, **changes: Any) -> Config:
    """One run of the study's base with hosl-residual at this rate."""
    base = yaml.safe_load(STUDY.read_text(encoding="utf-8"))["base"]
    return parse_config(
        base | {"method": "hosl-residual", "client": {"learning_rate": rate}, "output_dir": out, "seed": 0,
                "save_model": False} | changes,
        where="residual_readers",
    )  # fmt: skip


def cosines() -> None:
    """Print, by depth below the cut, the cosine of each layer's feedback with its true gradient."""
    config = settings(0.0, "runs/none", residual={"blocks": 14})
    session = new_session(config)
    client = ReadersClient(session.client.half, blocks=14)
    batch = batch_of_step(session.config, session.task, 1)
    server: Any = session.server_to_call(in_round=False)
    reply = server.step(client.forward(batch), batch.targets, step=1, want_gradient=True)
    found = client.feedback_gradients(batch, reply.gradient)
    names = [name for name in client.trained if name.endswith("_proj.weight")]
    ids, mask = torch.from_numpy(batch.input_ids), torch.from_numpy(batch.targets.mask).to(torch.int64)
    with torch.enable_grad():
        h = client.half(ids, mask)
        true = torch.autograd.grad(h, [client.trained[name] for name in names], reply.gradient)
    kinds = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    rows: dict[int, dict[str, float]] = {}
    for name, exact in zip(names, true, strict=True):
        a, b = exact.double().flatten(), found[name].double().flatten()
        depth = config.model.cut - int(next(part for part in name.split(".") if part.isdigit()))
        rows.setdefault(depth, {})[name.split(".")[-2]] = float(a @ b / (a.norm() * b.norm()))
    print("below the cut  " + "  ".join(f"{kind:>9}" for kind in kinds))
    for depth in sorted(rows):
        print(f"{depth:13}  " + "  ".join(f"{rows[depth][kind]:9.2f}" for kind in kinds))


class NodesToo(ResidualClient):
    """Residual feedback of writers; besides, the queries of the last block by node perturbation (hosl-node's)."""

    def __init__(
        self, half: ClientHalf, *, blocks: int, directions: int, micro_batch_size: int | None
    ) -> None:
        nodes = NodeClient(half, blocks=1, micro_batch_size=micro_batch_size)
        super().__init__(half, blocks=blocks, kept="blocks", micro_batch_size=micro_batch_size)
        self.trained |= nodes.trained
        self._nodes, self._directions, self._steps = nodes, directions, 0

    def forward_keeping_inputs(self, batch: Batch) -> torch.Tensor:
        """As `ResidualClient` does; the batch stays for the nodes' own pass."""
        self._batch = batch
        return super().forward_keeping_inputs(batch)

    def descend_by_feedback(self, gradient: torch.Tensor, learning_rate: float) -> None:
        """The queries move by node perturbation, then the writers by feedback."""
        clean = self._nodes.forward_keeping_inputs(self._batch)
        self._steps += 1
        seeds = [self._steps * self._directions + q for q in range(self._directions)]
        slopes = list(self._nodes.node_slopes(clean, seeds, 1e-3, gradient))
        self._nodes.descend_nodes(seeds, slopes, learning_rate)
        super().descend_by_feedback(gradient, learning_rate)


def train(rate: float, nodes: int, out: str) -> None:
    """One run with readers, or with nodes, in place of hosl-residual's client; prints its summary."""

    def client(config: Config, half: ClientHalf) -> Any:
        if nodes:
            return NodesToo(half, blocks=14, directions=nodes, micro_batch_size=None)
        return ReadersClient(half, blocks=14)

    torch_parties._CLIENTS["hosl-residual"] = client
    print(json.dumps(start(settings(rate, out)), default=str))


def main() -> None:
    """Print the cosines, or train."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--train", type=float, metavar="RATE")
    parser.add_argument("--nodes", type=int, default=0, metavar="Q")
    parser.add_argument("-o", "--output-dir", default="runs/residual-readers")
    asked = parser.parse_args()
    if asked.train:
        train(asked.train, asked.nodes, asked.output_dir)
    else:
        cosines()


if __name__ == "__main__":
    main()

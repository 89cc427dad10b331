"""An exported client half run by ONNX Runtime, as plainly as can be: the oracle's other side in tests of the export."""

from contextlib import contextmanager
from pathlib import Path

import jaxtyping
import numpy as np
import onnxruntime
import safetensors.numpy
import torch

from hosl.split import load_half, split_folder
from hosl.split.reading.runtime_json import (
    D_HIDDEN,
    FOLDER,
    GRADIENT,
    HIDDEN,
    HIDDEN_OUT,
    INT8_FILE,
    LORA_SCALE,
    ROWS_OF_IDS,
    TABLE,
    read_runtime_json,
)
from tests.conftest import build


@contextmanager
def unverified():
    """Context manager: annotations are not verified, since sizes are symbols while a graph is traced, and no int."""
    jaxtyping.config.update("jaxtyping_disable", True)
    try:
        yield
    finally:
        jaxtyping.config.update("jaxtyping_disable", False)


def exported(name, cut, spec, folder):
    """The client half of a tiny model, split with graphs in `folder`, and its folder."""
    whole = build(name)
    whole.save_pretrained(folder / "model")
    head = "classification" if "Classification" in type(whole).__name__ else "causal"
    with unverified():
        split_folder(str(folder / "model"), cut, folder / "halves", head=head, graphs=spec)
    client = folder / "halves" / "client"
    return load_half(client), client


class GraphRunner:
    """The graphs of a folder on weights by their names in the half."""

    def __init__(self, folder: Path, weights, lora_scale=1.0):
        self.facts = read_runtime_json(folder)
        self.weights, self._scale = dict(weights), np.asarray(lora_scale, np.float32)
        if self.facts.dtype == "int8":
            self.int8 = safetensors.numpy.load_file(folder / FOLDER / INT8_FILE)
        self._folder, self._sessions = folder / FOLDER, {}

    def forward(self, ids, mask, variant="block"):
        """h [rows, seq, width]; what the blocks were given is kept for `backward`."""
        ids, mask, front = ids.numpy(), mask.numpy(), self.facts.prelude
        distinct, rows = np.unique(ids, return_inverse=True)
        feed = {"input_ids": ids, "attention_mask": mask, ROWS_OF_IDS: rows.reshape(ids.shape)}
        feed[TABLE] = self.weights[front.table][distinct]
        assert set(front.inputs) <= set(feed)
        feed = {name: feed[name] for name in front.inputs}
        feed |= {name: self.weights[parameter] for name, parameter in front.weights.items()}
        self._given = self._run(front.file, feed)
        h, self._inputs = self._given[HIDDEN], []
        for block in self.facts.blocks:
            self._inputs.append(h)
            h = self._block(block, variant, h)[HIDDEN_OUT]
        return h

    def backward(self, gradient, variant):
        """The gradients that the graphs of a variant give, by name in the half; and dL/d hidden below block 0."""
        found = {}
        for block, h in zip(reversed(self.facts.blocks), reversed(self._inputs), strict=True):
            outputs = self._block(block, variant, h, **{GRADIENT: gradient})
            assert next(iter(outputs)) == D_HIDDEN
            gradient = outputs.pop(D_HIDDEN)
            assert tuple(outputs) == tuple(f"d.{n}" for n in self.facts.kinds[block.kind][variant].gradients)
            found |= {f"{block.prefix}.{name[2:]}": value for name, value in outputs.items()}
        return found, gradient

    def _block(self, block, variant, h, **more):
        graph = self.facts.kinds[block.kind][variant]
        stored = self.weights | (self.int8 if "int8" in variant else {})
        feed = {name: stored[f"{block.prefix}.{name}"] for name in graph.weights}
        feed |= {name: self._given[output] for name, output in block.extras.items()}
        feed |= {LORA_SCALE: self._scale} if "lora" in variant else {}
        return self._run(graph.file, feed | {HIDDEN: h} | more)

    def _run(self, file, feed):
        if file not in self._sessions:
            options = onnxruntime.SessionOptions()
            options.intra_op_num_threads = 1
            path = str(self._folder / file)
            self._sessions[file] = onnxruntime.InferenceSession(
                path, options, providers=["CPUExecutionProvider"]
            )
        session = self._sessions[file]
        assert {i.name for i in session.get_inputs()} == set(feed)
        outputs = [output.name for output in session.get_outputs()]
        return dict(zip(outputs, session.run(outputs, feed), strict=True))


def arrays(half):
    """The parameters of a half as float32 arrays, by the names that adapters have without peft's own."""
    named = {
        name.replace(".default", "").replace(".base_layer", ""): p for name, p in half.named_parameters()
    }
    return {name: p.detach().float().numpy() for name, p in named.items()}


def batch(rows, seq, side):
    """Ids and mask [rows, seq], with that side padded in all rows but the first."""
    ids = torch.randint(3, 97, (rows, seq), generator=torch.Generator().manual_seed(rows))
    mask = torch.ones_like(ids)
    for row in range(1, rows):
        padding = 4 * row % seq
        mask[row, :padding] = 0
        if side == "right":
            mask[row] = mask[row].flip(0)
    ids[mask == 0] = 1
    return ids, mask


def gradient_like(h):
    """A gradient of the shape of h."""
    return torch.randn(h.shape, generator=torch.Generator().manual_seed(1), dtype=h.dtype)


def largest(tensors):
    """The largest magnitude in arrays or tensors by name."""
    return max(float(abs(np.asarray(t)).max()) for t in tensors.values())


def farthest(found, expected):
    """The largest difference of arrays by name, against the largest magnitude of those expected."""
    return largest({n: found[n] - np.asarray(t) for n, t in expected.items()}) / largest(expected)


def autograd(half, ids, mask, g, named):
    """h, and the gradients of <h, g> for parameters by name, detached."""
    h = half(ids, mask)
    if not named:
        return h.detach(), {}
    gradients = torch.autograd.grad((h * g.to(h.dtype)).sum(), list(named.values()), allow_unused=True)
    return h.detach(), {n: d for n, d in zip(named, gradients, strict=True) if d is not None}


def in_blocks(half):
    """The parameters of the blocks, by name; all require a gradient from now on."""
    named = {name: p for name, p in half.named_parameters() if name.startswith(f"{half.blocks_name}.")}
    for p in named.values():
        p.requires_grad_(True)
    return named

"""`hosl serve` whose disk is full from the second checkpoint on: python full_server.py serve ..."""

import sys

import safetensors.torch

from hosl.cli import main

save_file, saved = safetensors.torch.save_file, []


def full(tensors, file, **more):
    if "server" in str(file):
        saved.append(file)
    if len(saved) > 2:  # weights and optimiser of the first one fit
        raise OSError(28, "No space left on device")
    return save_file(tensors, file, **more)


safetensors.torch.save_file = full
sys.exit(main(sys.argv[1:]))

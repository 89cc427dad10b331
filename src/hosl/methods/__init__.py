"""From a config to training: the round of a step (`step`), the parties (`torch_parties`), rates and batches."""

"""What a config's method stands for: the round of a step (`step`), its parties (`torch_parties`), rates and batches."""

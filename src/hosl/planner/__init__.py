"""The plan before a run: memory, cuts and costs. `plan` is the table; `dry_run` counts the work that it rests on."""

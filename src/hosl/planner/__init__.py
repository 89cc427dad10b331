"""Before running: does it fit, where to cut, what will it cost. `plan` is the table, `dry_run` what it rests on."""

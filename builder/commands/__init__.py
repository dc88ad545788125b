"""The commands of `python -m builder`, a file each.

Every one of them has `HELP`, what `--help` says in a line; `arguments`, which adds its own to a
parser, with defaults from the environment; and `run`, which does it and returns an exit status.
"""

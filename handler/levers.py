"""What a cold start does to be short: each lever by name, so that it can be measured and dropped.

`LEVERS_OFF=gc,kvplan` starts without those two, and `make bench-coldstart LEVERS=1` prints what
each gives on a machine. A lever that gives nothing with a newer vLLM is dropped with its line here:
the name leads to the code.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Lever:
    """One lever: `why` it gains time, and where it shows.

    `shows_in` is how a start has to be made to see it: `warm`, with a `dropped` page cache, with
    `empty` caches, or with the model `compiled` (ENFORCE_EAGER=false).
    """

    name: str
    why: str
    shows_in: str = "warm"


_ALL = (
    Lever("gc", "garbage collection frees nothing during the start and walks a growing heap each time"),
    Lever("inprocess", "a spawned engine core imports vLLM once more; a thread or a fork has it already"),
    Lever("kvplan", "a CPU touches each page of the KV cache at the start: no larger than needed"),
    Lever("kvlazy", "the KV cache is touched as tokens come, not filled with zeros that are there already"),
    Lever("overlap", "a core in a thread loads the weights while vLLM reads the tokenizer"),
    Lever("structure", "transformers reads its 1,500 files to learn what is in them; it is kept"),
    Lever("inductor", "vLLM imports torch's compiler to change a list in it; an eager model never uses it"),
    Lever("generated", "dataclasses write 5,000 functions for Python to compile; they are kept compiled"),
    Lever("pack", "Python looks for, checks and opens 5,000 modules one by one; one file has them all"),
    Lever("sources", "torch goes through all modules for the line of each operator; its frame says it"),
    Lever("distributions", "transformers reads which files each package has; it is kept"),
    Lever("kernels", "vLLM looks for Triton kernels in every module; only its own have any"),
    Lever(
        "readahead",
        "imports read thousands of files one by one; a list asks the disk for all at once",
        "dropped",
    ),
    Lever("weights", "the weights are read while Python imports, which leaves the disk idle", "dropped"),
    Lever("modelinfo", "vLLM inspects the model in a process that imports vLLM; a CPU needs none", "empty"),
    Lever("aot", "on a CPU vLLM throws its compiled model away at each start and compiles again", "compiled"),
)
LEVERS: Mapping[str, Lever] = {lever.name: lever for lever in _ALL}
"""Every lever that can be switched off, the one that gives most first."""


def pulled(name: str, environ: Mapping[str, str]) -> bool:
    """Whether the lever `name` is on: it is, unless `LEVERS_OFF` in `environ` names it."""
    return name not in environ.get("LEVERS_OFF", "").replace(" ", "").split(",")

"""`bench`: from scripted cold starts to the tables, the ratios and the line of JSON."""

from __future__ import annotations

import argparse
import io
import json
import mmap
import struct
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bench import coldstart, coldstart_gpu, memory, shape
from bench import coldstart_figures as figures
from bench.schedule import STOP_S, Outlook, Turn, first_turns, turns
from bench.start import VARIANTS, Case, NotStarted, Start, Variant, command, content
from handler.errors import NoResources
from handler.levers import Lever

MIB = 1 << 20
ALL = list(VARIANTS.values())
PEER, EAGER, WORKER, FORK = ALL


def made(first_s: float, peak_mib: int = 1000, text: str = "the sea", **more: Any) -> Start:
    """A start that took `first_s` seconds."""
    return Start(first_s, first_s / 2, peak_mib * MIB, peak_mib * MIB // 2, text, **more)


def reported(*walls_s: float, rate: float) -> dict[str, Any]:
    """A worker's report with the phases `one`, `two`, ... one after the other."""
    names = ("one", "two", "three")
    begins_s = [sum(walls_s[:index]) for index in range(len(walls_s))]
    return {
        "total_s": sum(walls_s),
        "facts": {"engine_mode": "thread", "kv_cache_bytes": 64 * MIB, "weights_gb_per_s": rate},
        "phases": [
            {"name": name, "begin_s": begin_s, "end_s": begin_s + wall_s, "cpu_s": wall_s, "major_faults": 7}
            for name, begin_s, wall_s in zip(names, begins_s, walls_s, strict=False)
        ],
    }


WARM: Mapping[str, list[Start]] = {
    "vllm": [made(30.0, 2000), made(32.0, 2100), made(40.0, 2200)],
    "vllm-eager": [made(24.0, 1500)],
    "worker": [
        made(4.0, 990, report=reported(1.0, 3.0, rate=2.0)),
        made(5.0, 1000, report=reported(1.5, 3.5, rate=3.0)),
        made(8.0, 1050, report=reported(4.0, 4.0, rate=9.0)),
    ],
    "fork": [made(0.64, 1200)],
}


def test_ratios_are_of_medians() -> None:
    """Ours by vLLM's in the mode that each goal is for; what was not measured is no number."""
    dropped = {"vllm": [made(50.0)], "worker": [made(10.0)]}
    assert figures.ratios({"warm": WARM, "dropped": dropped}) == {
        "ratio_default": pytest.approx(5 / 32, abs=1e-4),
        "ratio_eager": pytest.approx(5 / 24, abs=1e-4),
        "ratio_cold_cache": 0.2,
        "ratio_fork": 0.02,
        "memory_ratio": pytest.approx(1000 / 2100, abs=1e-3),
    }
    assert set(figures.ratios({"empty": WARM}).values()) == {None}


def test_table() -> None:
    """Each variant with its median and spread, and its ratio to both peers."""
    assert figures.table({**WARM, "vllm-eager": []}).splitlines() == [
        "                       first token       min - max  n  of vLLM of eager     CPU      peak       PSS",
        "  vLLM's own server        32.00 s   30.00 - 40.00  3    1.000           16.0 s 2,100 MiB 1,050 MiB",
        "  the same, eager     did not start",
        "  worker                    5.00 s     4.00 - 8.00  3    0.156            2.5 s 1,000 MiB   500 MiB",
        "  worker, warm parent       0.64 s     0.64 - 0.64  1    0.020            0.3 s 1,200 MiB   600 MiB",
    ]


def test_phases_are_medians_over_the_starts() -> None:
    """Each phase by itself, in the order of the report; what has no report has no table."""
    assert figures.phase_table(WARM["worker"]).splitlines() == [
        "                           wall       min - max      CPU  faults",
        "  one                    1.50 s     1.00 - 4.00   1.50 s       7",
        "  two                    3.50 s     3.00 - 4.00   3.50 s       7",
    ]
    assert figures.phase_table(WARM["vllm"]) == ""


def test_a_rate_is_the_median_of_all_starts() -> None:
    """The rest of the facts is the same in each, so the last one's is shown."""
    assert figures.facts(WARM["worker"]) == {
        "engine_mode": "thread",
        "kv_cache_bytes": 64 * MIB,
        "weights_gb_per_s": 3.0,
    }


@pytest.mark.parametrize(
    ("texts", "lines"),
    [
        ({"vllm": "a", "vllm-eager": "a", "worker": "a"}, []),
        ({"vllm-eager": "a", "worker": "b"}, ["  not all said the same: ['a', 'b']"]),
        (
            {"vllm": "b", "worker": "a"},
            ["  the compiled model, which rounds otherwise, said ['b']; the eager one ['a']"],
        ),
    ],
)
def test_what_was_said_is_compared(texts: Mapping[str, str], lines: list[str]) -> None:
    """Eager variants say the same or it is told; of the compiled one it is told apart."""
    assert list(figures.differing({name: [made(1.0, text=text)] for name, text in texts.items()})) == lines


def test_verdicts() -> None:
    """A goal that is just reached is met, a larger ratio misses it, and what was not measured is neither."""
    ratios = dict.fromkeys(figures.GOALS) | {"ratio_default": 0.16, "memory_ratio": 0.501}
    assert list(figures.verdicts(ratios)) == [
        "ratio_default 0.160, goal <= 0.16: met",
        "ratio_eager, goal <= 0.22: not measured",
        "ratio_cold_cache, goal <= 0.25: not measured",
        "ratio_fork, goal <= 0.02: not measured",
        "memory_ratio 0.501, goal <= 0.5: missed",
    ]


def test_others_at_work_are_told() -> None:
    """One start during which others took much of a core is enough."""
    busy = {"warm": {"worker": [made(1.0), made(1.0, other_cores=0.456)]}}
    assert list(figures.disturbed({"warm": WARM})) == []
    assert list(figures.disturbed(busy)) == [
        "not a quiet machine: others took up to 0.46 cores during a start; measure again"
    ]


def test_json_holds_every_start() -> None:
    """Times as they were, the rest as medians; a variant that never started is not there."""
    found = figures.as_json({"warm": {"vllm": [], "worker": WARM["worker"]}})
    assert json.loads(json.dumps(found)) == {
        "warm": {
            "worker": {
                "first_s": [4.0, 5.0, 8.0],
                "first_median_s": 5.0,
                "cpu_s": 2.5,
                "peak_mib": 1000,
                "pss_mib": 500,
                "texts": ["the sea"],
                "phases": figures.phases(WARM["worker"]),
                "facts": figures.facts(WARM["worker"]),
            }
        }
    }


def test_what_a_lever_gives() -> None:
    """How much longer a start takes without it, by the medians of the same run."""
    found = {"": [made(5.0), made(5.2), made(4.8)], "gc": [made(8.0)], "kvplan": [made(4.9)], "aot": []}
    assert figures.lever_table(found).splitlines() == [
        "                       first token        min - max   n  the lever gives",
        "  all levers                5.00 s      4.80 - 5.20   3",
        "  without gc                8.00 s      8.00 - 8.00   1          +3.00 s",
        "  without kvplan            4.90 s      4.90 - 4.90   1          -0.10 s",
        "  without aot         did not start",
    ]
    assert figures.lever_json(found) == {
        "all": {"gives_s": None, "first_s": [5.0, 5.2, 4.8]},
        "gc": {"gives_s": 3.0, "first_s": [8.0]},
        "kvplan": {"gives_s": -0.1, "first_s": [4.9]},
    }


def test_each_next_round_goes_the_other_way() -> None:
    """So that what drifts on the machine falls on all alike."""
    order = [(turn.round, turn.variant.name) for turn in turns("warm", ALL, 2)]
    names = list(VARIANTS)
    assert order == [(1, name) for name in names] + [(2, name) for name in reversed(names)]


def test_a_fork_is_measured_warm_only() -> None:
    """What a mode takes away the parent has paid for; and its first start is the parent's."""
    assert FORK not in [turn.variant for turn in turns("empty", ALL, 3)]
    assert [turn.variant for turn in first_turns(ALL)] == [PEER, EAGER, WORKER]


def test_the_outlook_learns() -> None:
    """What was measured replaces what is usual, for this variant in this mode."""
    outlook, turn = Outlook(), Turn("warm", 1, WORKER)
    usual_s = outlook.left_s([turn])
    assert usual_s > STOP_S
    for took_s in (20.0, 21.0, 90.0):
        outlook.note(turn, took_s)
    assert outlook.left_s([turn, replace(turn, round=2)]) == 42.0
    assert outlook.left_s([replace(turn, mode="dropped")]) > usual_s


def test_both_get_the_same_flags() -> None:
    """Ours as settings; the size of the KV cache goes to vLLM's server alone, since ours plans it."""
    case = Case("/model", ["--max-model-len", "8"], {}, kv_cache_bytes=64)
    words, settings = command(EAGER, case, 80)
    assert words[words.index("vllm.entrypoints.openai.api_server") + 1 :] == [
        *("--model", "/model", "--host", "127.0.0.1", "--port", "80", "--disable-uvicorn-access-log"),
        *("--kv-cache-memory-bytes", "64", "--served-model-name", "bench", "--max-model-len", "8"),
        "--enforce-eager",
    ]
    assert settings == {}
    words, settings = command(replace(WORKER, settings={"LEVERS_OFF": "gc"}), case, 80)
    assert words[-2:] == ["-m", "handler"]
    assert settings == {
        "MODEL_NAME": "/model",
        "SERVED_MODEL_NAME": "bench",
        "MAX_MODEL_LEN": "8",
        "HOST": "127.0.0.1",
        "PORT": "80",
        "PLATFORM": "http",
        "LEVERS_OFF": "gc",
    }


@pytest.mark.parametrize(
    ("line", "text"),
    [
        (b'data: {"choices":[{"delta":{"content":"the sea"}}]}\n', "the sea"),
        (b'data: {"choices":[{"delta":{"role":"assistant","content":""}}]}\n', ""),
        (b'data: {"choices":[{"delta":{}}]}\n', ""),
        (b'data: {"choices":[],"usage":{}}\n', ""),
        (b"data: [DONE]\n", ""),
        (b": keep-alive\n", ""),
        (b"\n", ""),
    ],
)
def test_only_text_stops_the_clock(line: bytes, text: str) -> None:
    """A role, a usage, an end and a comment are no first token."""
    assert content(line) == text


def test_memory_counts_files_once() -> None:
    """Two processes that share a library hold it once, and each what is its own."""
    statms = ["9000 500 300 1 0 2 0", "9000 450 320 1 0 2 0"]  # pages: whole, resident, shared, ...
    assert memory.resident_bytes(statms) == (200 + 130 + 320) * mmap.PAGESIZE
    assert memory.resident_bytes([]) == 0


def test_the_peak_is_the_most_that_was_seen() -> None:
    """The last look counts too, so that what is quicker than a look is seen at least once."""
    with memory.Memory(4711, look={4711: 42}.__getitem__) as watched:
        pass
    assert watched.peak_bytes == 42


def test_a_shell_does_not_change_a_start() -> None:
    """What one of the servers alone would read, and what makes a start cold, is taken away."""
    shell = {
        "PATH": "/bin",
        "PORT": "1",
        "LEVERS_OFF": "gc",
        "PYTHONDONTWRITEBYTECODE": "1",
        "OMP_NUM_THREADS": "1",
    }
    assert coldstart.environment(shell) == {
        "PATH": "/bin",
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "VLLM_LOGGING_LEVEL": "WARNING",
        "VLLM_NO_USAGE_STATS": "1",
    }


def test_levers_are_measured_where_they_show() -> None:
    """Together with what shows in the same way, beside a worker with all of them."""
    scripted = [Lever("a", ""), Lever("b", "", "dropped"), Lever("c", ""), Lever("d", "", "compiled")]
    groups = coldstart.lever_groups({lever.name: lever for lever in scripted})
    assert {
        shown: (mode, [(variant.name, variant.settings) for variant in variants])
        for shown, (mode, variants) in groups.items()
    } == {
        "warm": ("warm", [("", {}), ("a", {"LEVERS_OFF": "a"}), ("c", {"LEVERS_OFF": "c"})]),
        "dropped": ("dropped", [("", {}), ("b", {"LEVERS_OFF": "b"})]),
        "compiled": (
            "warm",
            [("", {"ENFORCE_EAGER": "false"}), ("d", {"ENFORCE_EAGER": "false", "LEVERS_OFF": "d"})],
        ),
    }


class Script:
    """Makes starts without a process: what is asked for is written down, and `broken` never starts."""

    def __init__(self, broken: str = "") -> None:
        self.seen: list[tuple[str, Mapping[str, str], int | None]] = []
        self._broken = broken

    def __call__(
        self, variant: Variant, case: Case, environ: Mapping[str, str], log: Path, linger_s: float
    ) -> Start:
        """One start."""
        self.seen.append((variant.name, environ, case.kv_cache_bytes))
        if variant.name == self._broken:
            raise NotStarted("it ended with 1")
        seconds = {"vllm": 32.0, "vllm-eager": 24.0, "worker": 5.0}.get(variant.name, 6.0)
        return made(seconds, report=reported(1.0, rate=1.0) if variant.kind == "worker" else None)


def compared(script: Script, failures: list[str], place: Path, **options: Any) -> dict[str, Any]:
    """What comes out of starts as `script` makes them, of everything but the fork."""
    given = {"variants": ["vllm", "vllm-eager", "worker"], "modes": ["warm"], "rounds": 2, **options}
    with coldstart.Run("a model", Case("/model", [], {}), failures, script, place) as run:
        return coldstart.compare(run, argparse.Namespace(**given))


def test_the_peer_gets_the_kv_cache_that_ours_plans(tmp_path: Path) -> None:
    """The worker starts first; only then is the size known that all others are given."""
    script, failures = Script(), list[str]()
    result = compared(script, failures, tmp_path)
    assert [name for name, _, _ in script.seen] == [
        *("worker", "vllm", "vllm-eager"),
        *("vllm", "vllm-eager", "worker"),
        *("worker", "vllm-eager", "vllm"),
    ]
    assert [size for _, _, size in script.seen] == [None, *[64 * MIB] * 8]
    assert result["ratios"]["ratio_default"] == pytest.approx(5 / 32, abs=1e-4)
    assert failures == []
    assert list(tmp_path.iterdir()) == []


def test_what_does_not_start_is_left_out(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """A peer that can't start (without a compiler, say) costs its row and the exit code, not the rest."""
    script, failures = Script(broken="vllm"), list[str]()
    result = compared(script, failures, tmp_path)
    assert failures == ["vllm, warm: it ended with 1"]
    assert [name for name, _, _ in script.seen].count("vllm") == 1
    assert result["ratios"]["ratio_default"] is None
    assert result["ratios"]["ratio_eager"] == pytest.approx(5 / 24, abs=1e-4)
    assert "did not start: it ended with 1" in capsys.readouterr().err


def test_empty_caches_are_new_for_each_start(tmp_path: Path) -> None:
    """Warm ones are the same folder for all, so that the first start of each fills them."""
    script = Script()
    compared(script, [], tmp_path, variants=["worker"], modes=["warm", "empty"])
    first, *warm, one, other = [environ["VLLM_CACHE_ROOT"] for _, environ, _ in script.seen]
    assert set(warm) == {first}
    assert len({first, one, other}) == 3


def test_no_pyc_is_read_or_written(tmp_path: Path) -> None:
    """Python looks in a folder that is empty, and leaves it so."""
    script = Script()
    compared(script, [], tmp_path, variants=["worker"], modes=["nopyc"], rounds=1)
    _, environ, _ = script.seen[-1]
    assert environ["PYTHONDONTWRITEBYTECODE"] == "1"
    assert not Path(environ["PYTHONPYCACHEPREFIX"]).exists()


TINY = shape.SHAPES["tiny"]


def written(folder: Path) -> dict[str, Any]:
    """The index of the model in the tiny shape, made in `folder`."""
    shape.write(TINY, coldstart.TINY, folder, lambda *_: None)
    index: dict[str, Any] = json.loads((folder / "model.safetensors.index.json").read_text())
    return index


def tensor(folder: Path, index: Mapping[str, Any], name: str) -> np.ndarray[Any, Any]:
    """One tensor from its file, as the format says it lies there."""
    raw = (folder / index["weight_map"][name]).read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    entry = json.loads(raw[8 : 8 + length])[name]
    begin, end = (8 + length + at for at in entry["data_offsets"])
    bits = np.frombuffer(raw[begin:end], np.uint16).astype(np.uint32) << 16
    return bits.view(np.float32).reshape(entry["shape"])


def test_weights_have_their_shape(tmp_path: Path) -> None:
    """In files of a limited size, each tensor whole, and no byte more or less."""
    index = written(tmp_path)
    files = sorted(tmp_path.glob("*.safetensors"))
    assert len(files) > 1
    assert {file.name for file in files} == set(index["weight_map"].values())
    assert {name: tensor(tmp_path, index, name).shape for name in index["weight_map"]} == TINY.tensors()
    assert index["metadata"]["total_size"] == TINY.weights_bytes
    assert TINY.weights_bytes < sum(file.stat().st_size for file in files) < TINY.weights_bytes + 16_000


def test_the_model_says_words(tmp_path: Path) -> None:
    """Only tokens with text have weights at the end, so that a client of noise sees text."""
    index = written(tmp_path)
    words = shape.speakable(coldstart.TINY)
    head = tensor(tmp_path, index, shape.HEAD)
    assert np.flatnonzero(head.any(axis=1)).tolist() == words
    assert len(words) > 500
    assert (tensor(tmp_path, index, "model.norm.weight") == 1).all()
    embeddings = tensor(tmp_path, index, "model.embed_tokens.weight")
    assert embeddings.std() == pytest.approx(0.02, rel=0.02)
    assert len(np.unique(embeddings, axis=0)) == len(embeddings)


def test_weights_are_made_once(tmp_path: Path) -> None:
    """A whole model stays; one that was cut off is made again."""
    written(tmp_path)
    made_at = {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    written(tmp_path)
    assert {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()} == made_at
    (tmp_path / "config.json").unlink()
    written(tmp_path)
    assert (tmp_path / "config.json").is_file()


def test_a_full_disk_is_known_before_anything_is_written(tmp_path: Path) -> None:
    """The message says how much is needed where."""
    huge = replace(shape.SHAPES["8b"], vocabulary=10**12)
    with pytest.raises(NoResources, match=r"has room for .* GB, and the weights of Llama-3.1-8B need \d+"):
        shape.write(huge, coldstart.TINY, tmp_path, lambda *_: None)
    assert list(tmp_path.iterdir()) == []


def test_8b_is_8b() -> None:
    """The parameters of the real model."""
    assert shape.SHAPES["8b"].weights_bytes == 2 * 8_030_261_248


@pytest.mark.parametrize(
    ("told", "said"),
    [
        ("NVIDIA H200, 143771\nNVIDIA H200, 143771\n", "NVIDIA H200"),
        ("", "unknown"),
    ],
)
def test_a_gpu_is_named(told: str, said: str) -> None:
    """The first one; where the tool is missing vLLM will know."""
    assert coldstart_gpu.check_gpu(told, shape.SHAPES["8b"]) == said


def test_a_gpu_that_is_too_small_is_told_so() -> None:
    """Before sixteen gigabytes are written."""
    with pytest.raises(NoResources, match=r"^Tesla T4 has 16\.1 GB, and Llama-3.1-8B needs 20\.4 GB$"):
        coldstart_gpu.check_gpu("Tesla T4, 15360\n", shape.SHAPES["8b"])


def test_the_rate_to_the_device_is_that_of_warm_starts() -> None:
    """With a warm page cache it is the device that sets it; what was not measured has none."""
    measured = {"modes": figures.as_json({"warm": WARM})}
    assert coldstart_gpu.host_to_device(measured) == 3.0
    assert coldstart_gpu.host_to_device({"modes": {"empty": {}}}) is None


def test_progress_without_a_terminal_is_ten_lines() -> None:
    """A log is not filled with bars."""
    stream = io.StringIO()
    progress = coldstart_gpu.Progress("weights", stream)
    for done in range(0, 1001, 5):
        progress(done, 1000)
    lines = stream.getvalue().splitlines()
    assert len(lines) == 11
    assert lines[-1] == "weights: 100 % of 1 kB"

"""Which GPUs there are, how many a worker wants, and who has which."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest

from gateway.upstreams.devices import Devices, per_worker


def machine(folder: Path, gpus: int) -> Path:
    """The /dev of a machine with so many."""
    for name in ("nvidiactl", "nvidia-uvm", "null", *(f"nvidia{number}" for number in range(gpus))):
        (folder / name).touch()
    return folder


@pytest.mark.parametrize(
    ("visible", "ids"),
    [
        (None, ("0", "1", "2", "3")),
        ("2, 0", ("2", "0")),
        ("GPU-8932f937-d72c,GPU-5a1b", ("GPU-8932f937-d72c", "GPU-5a1b")),
        ("", ()),
        ("-1", ()),
        ("1,-1,2", ("1",)),
        ("1,9,2", ("1",)),
        ("1,1", ("1",)),
    ],
)
def test_what_is_seen_of_the_machines(tmp_path: Path, visible: str | None, ids: tuple[str, ...]) -> None:
    """As CUDA reads `CUDA_VISIBLE_DEVICES`: it ends at the first that is not there, or comes twice."""
    environ = {} if visible is None else {"CUDA_VISIBLE_DEVICES": visible}
    devices = Devices.of_machine(environ, machine(tmp_path, 4))
    assert devices.take(len(ids), "all") == ids
    assert devices.total == len(ids)


def test_a_machine_without_any_has_none(tmp_path: Path) -> None:
    """Whatever its environment says."""
    assert Devices.of_machine({}, machine(tmp_path, 0)).total == 0
    assert Devices.of_machine({"CUDA_VISIBLE_DEVICES": "0,1"}, tmp_path).total == 0


def test_a_device_is_with_one_at_a_time() -> None:
    """Whoever can't have as many as it wants has none, is told when some are free, and others hear of it."""
    devices = Devices("0123")
    told: list[str] = []
    for who in "ab":
        devices.join(who, partial(told.append, who))
    assert [devices.take(2, "a"), devices.take(1, "b")] == [("0", "1"), ("2",)]
    assert told == []
    assert [devices.take(2, "b"), devices.take(2, "b")] == [None, None]
    assert told == ["a"]
    assert (devices.wanted_beside("a"), devices.wanted_beside("b")) == (True, False)
    devices.give_back(("0", "1"))
    assert told == ["a", "b"]
    assert devices.take(2, "b") == ("0", "1")
    assert not devices.wanted_beside("a")
    devices.give_back(("2",))
    assert told == ["a", "b"]


@pytest.mark.parametrize("ends", ["forgo", "leave"])
def test_whoever_waits_no_more_is_not_told(ends: str) -> None:
    """Nor do others hear that it does."""
    devices = Devices("0")
    told: list[str] = []
    devices.join("b", partial(told.append, "b"))
    taken = devices.take(1, "a")
    assert devices.take(1, "b") is None
    getattr(devices, ends)("b")
    assert not devices.wanted_beside("a")
    devices.give_back(taken or ())
    assert told == []


@pytest.mark.parametrize(
    ("environ", "number"),
    [
        ({}, 1),
        ({"TENSOR_PARALLEL_SIZE": "2"}, 2),
        ({"TENSOR_PARALLEL_SIZE": "2", "PIPELINE_PARALLEL_SIZE": " 3 "}, 6),
        ({"DATA_PARALLEL_SIZE": "4"}, 4),
        ({"VLLM_EXTRA_ARGS": "--tensor-parallel-size 4 --max-model-len=99"}, 4),
        ({"VLLM_EXTRA_ARGS": "--tensor_parallel_size=4 -pp 2"}, 8),
        ({"VLLM_EXTRA_ARGS": "-tp 4", "TENSOR_PARALLEL_SIZE": "2"}, 2),
        ({"VLLM_EXTRA_ARGS": "'"}, 1),
        ({"TENSOR_PARALLEL_SIZE": "many"}, 1),
        ({"TENSOR_PARALLEL_SIZE": "0"}, 1),
        ({"VLLM_CONFIG_FILE": "/nonexistent.yaml"}, 1),
    ],
)
def test_how_many_a_worker_wants(environ: dict[str, str], number: int) -> None:
    """The product of what vLLM's flags say; what can't be read is for the worker to say."""
    assert per_worker(environ) == number


def test_a_config_file_is_the_weakest(tmp_path: Path) -> None:
    """As with the flags themselves."""
    file = tmp_path / "vllm.yaml"
    file.write_text("max-model-len: 99\ntensor-parallel-size: 2\npipeline_parallel_size: 2 # two\n")
    environ = {"VLLM_CONFIG_FILE": str(file)}
    assert per_worker(environ) == 4
    assert per_worker({**environ, "VLLM_EXTRA_ARGS": "-tp 1"}) == 2

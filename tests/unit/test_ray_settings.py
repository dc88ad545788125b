"""What Ray Serve is told of a deployment, from settings that the gateway knows by the same names."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from handler.errors import BadSettings
from handler.platforms.ray_settings import BUSY, LOOK_BACK_S, SLOTS, RaySettings

FILE = Path(__file__).parents[2] / "deploy/ray/serve.yaml"


def told(gpus: bool | None = None, /, **environ: str) -> dict[str, object]:
    """The options of the deployment, on a cluster with `gpus` or not."""
    return RaySettings.from_environ(environ, gpus=bool(gpus)).deployment()


def test_replicas_come_and_go_as_the_settings_say() -> None:
    """From none to MAX_WORKERS, back after IDLE_TIMEOUT_S, the last one too."""
    scaling = told(MIN_WORKERS="0", MAX_WORKERS="3", IDLE_TIMEOUT_S="90")["autoscaling_config"]
    assert isinstance(scaling, dict)
    assert (scaling["min_replicas"], scaling["initial_replicas"], scaling["max_replicas"]) == (0, 1, 3)
    assert scaling["downscale_delay_s"] == scaling["downscale_to_zero_delay_s"] == 90
    assert scaling["look_back_period_s"] == LOOK_BACK_S > 10  # Ray's own interval of measuring


@pytest.mark.parametrize(("start", "low", "first"), [("now", 0, 1), ("first_request", 0, 0), ("now", 2, 2)])
def test_the_first_replicas_start_when_it_is_wanted(start: str, low: int, first: int) -> None:
    """START=now has one there before anybody asks."""
    scaling = told(START=start, MIN_WORKERS=str(low), MAX_WORKERS="4")["autoscaling_config"]
    assert isinstance(scaling, dict)
    assert scaling["initial_replicas"] == first


@pytest.mark.parametrize(
    ("environ", "slots"),
    [
        ({}, SLOTS),
        ({"MAX_NUM_SEQS": "32"}, 32),
        ({"MAX_NUM_SEQS": "32", "MAX_CONCURRENCY": "8"}, 8),
        ({"MAX_CONCURRENCY": "1"}, 1),
    ],
)
def test_a_replica_is_given_what_its_engine_can_hold(environ: dict[str, str], slots: int) -> None:
    """And another one is started before that is used up."""
    options = told(**environ)
    scaling = options["autoscaling_config"]
    assert isinstance(scaling, dict)
    assert options["max_ongoing_requests"] == slots
    assert scaling["target_ongoing_requests"] == max(1, BUSY * slots)


def test_a_replica_has_the_gpus_of_its_engine() -> None:
    """Where there are any: on a cluster of CPUs it asks for none."""
    parallel = {"TENSOR_PARALLEL_SIZE": "4", "PIPELINE_PARALLEL_SIZE": "2"}
    assert told(True, **parallel)["ray_actor_options"] == {"num_cpus": 1, "num_gpus": 8}
    assert told(False, **parallel)["ray_actor_options"] == {"num_cpus": 1, "num_gpus": 0}


def test_what_is_full_says_when_to_come_again() -> None:
    """Ray's own 503 says nothing."""
    options = told(QUEUE_LIMIT="7")
    assert options["max_queued_requests"] == 7
    assert options["backpressure_config"] == {"status_code": 503, "retry_after_s": 5.0}


def test_what_runs_has_the_drains_time() -> None:
    """Ray kills a replica after that."""
    wait_s = told(DRAIN_TIMEOUT_S="40")["graceful_shutdown_timeout_s"]
    assert isinstance(wait_s, float)
    assert wait_s > 40


def test_every_fault_is_told() -> None:
    """With its name, what was given and what is allowed."""
    with pytest.raises(BadSettings) as wrong:
        RaySettings.from_environ({"MAX_WORKERS": "0", "IDLE_TIMEOUT_S": "soon"}, gpus=False)
    assert len(wrong.value.faults) == 2
    with pytest.raises(BadSettings, match="MIN_WORKERS=3 is more than MAX_WORKERS=2"):
        RaySettings.from_environ({"MIN_WORKERS": "3", "MAX_WORKERS": "2"}, gpus=False)


def test_the_file_for_serve_deploy_holds_settings() -> None:
    """What stands under `args` is read as an environment is."""
    args = dict(re.findall(r"^ {6}([A-Z_]+): \"?([^\s\"]+)", FILE.read_text(), re.MULTILINE))
    settings = RaySettings.from_environ(args, gpus=True)
    assert (settings.min_workers, settings.max_workers, settings.idle_timeout_s) == (0, 4, 300)

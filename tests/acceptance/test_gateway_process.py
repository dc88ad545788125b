"""`python -m gateway` as a process, with a scripted worker where the engine would be."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import sys
from pathlib import Path

import aiohttp
import openai
import pytest

from tests.gateway_process import (
    CHAT,
    RUNPODS_SDK,
    Program,
    chunk,
    command,
    completion,
    gateway,
    main_with,
    started,
)
from tests.scripted_app import Crash, Pause, Script, stream
from tests.scripted_worker import READY, Worker
from tests.servers import KEY


def private(worker: Worker) -> Path:
    """The private folder of the gateway that has started `worker`."""
    return Path(worker.env["NOTIFY_SOCKET"]).parent


async def ask(program: Program, model: str = "org/model") -> str | None:
    """The text of one chat completion."""
    async with program.client() as client:
        done = await client.chat.completions.create(model=model, messages=[{"role": "user", "content": "hi"}])
        return done.choices[0].message.content


async def test_ready_line_and_snippet_say_all_a_client_needs(tmp_path: Path) -> None:
    """One line with URL, model, key and seconds, then a program that works when pasted."""
    async with gateway(tmp_path, (READY, {CHAT: completion("Hello!")}), environ={"API_KEY": ""}) as program:
        await program.director.worker()
        line = await program.line(r"^ready in 1\.5 s  (\S+)  model org/model  key (ft-\S{43})$")
        snippet = [(await program.line("")).group(0) and program.out[-1]]
        while not snippet[-1].startswith("print"):
            await program.line("")
            snippet.append(program.out[-1])
        assert line.group(2) in "".join(snippet)
        pasted = await asyncio.create_subprocess_exec(
            sys.executable, "-c", "".join(snippet), stdout=asyncio.subprocess.PIPE
        )
        out, _ = await pasted.communicate()
        assert (out, pasted.returncode) == (b"Hello!\n", 0)
        assert await program.end(signal.SIGTERM) == 0
        assert line.group(2) not in await program.errors()


async def test_given_key_is_never_printed(tmp_path: Path) -> None:
    """The snippet reads it from the environment; the worker does not have it."""
    async with gateway(
        tmp_path, (READY, {CHAT: completion("Hello!")}), environ={"API_KEY": "very-secret"}
    ) as program:
        worker = await program.director.worker()
        await program.line(r"^ready in .*  key \$API_KEY$")
        await program.line(r'os\.environ\["API_KEY"\]')
        assert await program.end(signal.SIGTERM) == 0
        assert program.process.stdout is not None
        said = "".join(program.out) + (await program.process.stdout.read()).decode() + await program.errors()
        assert "very-secret" not in said
        assert "very-secret" not in str(worker.env)


async def test_first_request_starts_the_worker(tmp_path: Path) -> None:
    """`START=first_request`: the line says so, and the first client waits and is answered."""
    environ = {"START": "first_request"}
    async with gateway(tmp_path, (READY, {CHAT: completion("Hello!")}), environ=environ) as program:
        await program.address()
        assert program.out[0].startswith("the worker starts with the first request  http://127.0.0.1:")
        assert await ask(program) == "Hello!"
        assert await program.end(signal.SIGTERM) == 0


async def test_what_no_worker_would_take_starts_none(tmp_path: Path) -> None:
    """Another model's name and a body that is no JSON are refused at once; adapters may have other names."""
    environ = {"START": "first_request"}
    async with gateway(tmp_path, environ=environ) as program:
        await program.address()
        async with program.client() as client:
            with pytest.raises(openai.NotFoundError) as unknown:
                await client.completions.create(model="other", prompt="hi", stream=True)
            with pytest.raises(openai.BadRequestError) as broken:
                await client.post("/completions", cast_to=object, content=b"{")
        assert (unknown.value.code, unknown.value.param) == ("model_not_found", "model")
        assert (broken.value.code, broken.value.param) == ("invalid_request", None)
        assert await program.end(signal.SIGTERM) == 0
    environ = {"START": "first_request", "LORA_MODULES": "other=/adapters/other"}
    async with gateway(tmp_path, (READY, {CHAT: completion("Hello!")}), environ=environ) as program:
        await program.address()
        assert await ask(program, model="other") == "Hello!"
        assert await program.end(signal.SIGTERM) == 0


async def test_sigterm_lets_a_stream_finish(tmp_path: Path) -> None:
    """Stop taking, finish what runs, exit 0, leave no worker and no file."""
    script = stream(chunk("a"), Pause("generating"), chunk("b"))
    async with gateway(tmp_path, (READY, {CHAT: script})) as program:
        worker = await started(program)
        async with program.client() as client:
            reply = await client.chat.completions.create(
                model="org/model", messages=[{"role": "user", "content": "hi"}], stream=True
            )
            texts = [(await anext(reply)).choices[0].delta.content]
            program.process.send_signal(signal.SIGTERM)
            await worker.saw("stopping")
            worker.open("generating")
            texts += [part.choices[0].delta.content async for part in reply]
        assert texts == ["a", "b"]
        assert await program.end() == 0
        await worker.saw("gone")
        assert not private(worker).exists()


async def test_drain_has_a_deadline(tmp_path: Path) -> None:
    """What does not finish in time ends with an error frame and without `[DONE]`; still exit 0."""
    script = stream(chunk("a"), Pause("for ever"))
    async with (
        gateway(tmp_path, (READY, {CHAT: script}), environ={"DRAIN_TIMEOUT_S": "0"}) as program,
        aiohttp.ClientSession(headers={"authorization": f"Bearer {KEY}"}) as session,
    ):
        worker = await started(program)
        async with session.post(f"{program.base_url}/chat/completions", json={"stream": True}) as reply:
            await reply.content.readany()
            program.process.send_signal(signal.SIGTERM)
            rest = (await reply.content.read()).decode()
        assert json.loads(rest.removeprefix("data: "))["error"]["code"] == "upstream_failed"
        assert await program.end() == 0
        await worker.saw("gone")


async def test_ctrl_c_leaves_no_process(tmp_path: Path) -> None:
    """SIGINT to the foreground group: the gateway ends, and the worker with it."""
    async with gateway(tmp_path, (READY, {})) as program:
        worker = await started(program)
        os.killpg(program.process.pid, signal.SIGINT)
        assert await program.end() == 0
        await worker.saw("gone")


async def test_second_ctrl_c_ends_at_once(tmp_path: Path) -> None:
    """Nobody has to wait for a stream that does not end."""
    async with gateway(tmp_path, (READY, {CHAT: stream(chunk("a"), Pause("for ever"))})) as program:
        worker = await started(program)
        async with program.client() as client:
            reply = await client.chat.completions.create(
                model="org/model", messages=[{"role": "user", "content": "hi"}], stream=True
            )
            await anext(reply)
            program.process.send_signal(signal.SIGINT)
            await worker.saw("stopping")
            assert await program.end(signal.SIGINT) == 130
        assert "Ctrl-C again ends what still runs" in await program.errors()
        await worker.saw("gone")
        assert not private(worker).exists()


async def test_ctrl_c_while_starting_leaves_no_process(tmp_path: Path) -> None:
    """Nor does a worker that has not got far."""
    async with gateway(tmp_path, ([("pause", "loading")], {})) as program:
        worker = await program.director.worker()
        await worker.saw("paused", "loading")
        assert await program.end(signal.SIGINT) == 0
        await worker.saw("gone")


@pytest.mark.parametrize("worker", ["scripted_worker", "scripted_zygote"])
async def test_killed_gateway_leaves_no_worker(tmp_path: Path, worker: str) -> None:
    """The lifeline ends with the gateway, however it ended: that of a forked worker too."""
    worker_program = main_with(f"tests.{worker}")
    environ = {"WARM_PARENT": "on" if worker == "scripted_zygote" else "off"}
    async with gateway(tmp_path, (READY, {}), environ=environ, program=worker_program) as program:
        left = await started(program)
        assert await program.end(signal.SIGKILL) == -signal.SIGKILL
        await left.saw("gone")


@pytest.mark.parametrize("worker", ["scripted_worker", "scripted_zygote"])
async def test_next_gateway_removes_what_a_killed_one_has_left(tmp_path: Path, worker: str) -> None:
    """Its folder, and a worker that could not hear its lifeline, started or forked; not of one that lives."""
    program = main_with(f"tests.{worker}")
    environ = {"WARM_PARENT": "on" if worker == "scripted_zygote" else "off"}
    one, two, three = (tmp_path / name for name in ("one", "two", "three"))
    for folder in (one, two, three):
        folder.mkdir()
    async with gateway(one, (READY, {}), environ=environ, program=program) as first:
        stopped = await started(first)
        os.kill(stopped.pid, signal.SIGSTOP)
        assert await first.end(signal.SIGKILL) == -signal.SIGKILL
        assert private(stopped).exists()
        environ |= {"TMPDIR": str(one)}
        async with gateway(
            two, (READY, {CHAT: completion("still here")}), environ=environ, program=program
        ) as second:
            alive = await started(second)
            await stopped.saw("gone")
            assert not private(stopped).exists()
            environ |= {"START": "first_request"}
            async with gateway(three, environ=environ, program=program) as third:
                await third.address()
                assert await third.end(signal.SIGTERM) == 0
            assert private(alive).exists()
            assert await ask(second) == "still here"
            assert await second.end(signal.SIGTERM) == 0
        assert not private(alive).exists()


async def test_killed_worker_in_mid_stream_is_an_error_frame_and_then_a_new_worker(tmp_path: Path) -> None:
    """The last frame is the error, no `[DONE]` follows, and the next request is served."""
    plays = [(READY, {CHAT: stream(chunk("a"), Pause("for ever"))}), (READY, {CHAT: completion("again")})]
    async with (
        gateway(tmp_path, *plays) as program,
        aiohttp.ClientSession(headers={"authorization": f"Bearer {KEY}"}) as session,
    ):
        first = await started(program)
        async with session.post(f"{program.base_url}/chat/completions", json={"stream": True}) as reply:
            assert (reply.status, await reply.content.readany()) == (200, f"data: {chunk('a')}\n\n".encode())
            first.kill()
            last = (await reply.content.read()).decode()
        fault = json.loads(last.removeprefix("data: ").removesuffix("\n\n"))["error"]
        assert fault == {
            "message": "The worker went away while it answered.",
            "type": "server_error",
            "param": None,
            "code": "upstream_failed",
        }
        assert await ask(program) == "again"
        assert (await program.director.worker()).pid != first.pid
        assert await program.end(signal.SIGTERM) == 0


@pytest.mark.parametrize("streamed", [False, True])
async def test_killed_worker_before_the_first_byte_is_not_noticed(tmp_path: Path, streamed: bool) -> None:
    """The client, which does not retry, gets its answer from the next worker."""
    second = stream(chunk("again")) if streamed else completion("again")
    plays = [(READY, {CHAT: Script((Crash(),))}), (READY, {CHAT: second})]
    async with gateway(tmp_path, *plays) as program:
        await started(program)
        async with program.client() as client:
            if streamed:
                reply = await client.chat.completions.create(
                    model="org/model", messages=[{"role": "user", "content": "hi"}], stream=True
                )
                assert [part.choices[0].delta.content async for part in reply] == ["again"]
            else:
                assert await ask(program) == "again"
        assert await program.end(signal.SIGTERM) == 0


async def test_failed_start_answers_with_the_reason_and_stays_up(tmp_path: Path) -> None:
    """A worker that can't start on request is a 503 that says why; `/health` says so too."""
    environ = {"START": "first_request"}
    async with gateway(tmp_path, ([("exit", "66")], {}), environ=environ) as program:
        await program.address()
        with pytest.raises(openai.InternalServerError) as refused:
            await ask(program)
        assert (refused.value.status_code, refused.value.code) == (503, "worker_start_failed")
        assert "the model was not found" in refused.value.message
        assert 1 <= int(refused.value.response.headers["retry-after"]) <= 120
        async with (
            aiohttp.ClientSession(headers={"x-api-key": KEY}) as session,
            session.get(program.base_url.split("/v2")[0] + "/health") as reply,
        ):
            health = await reply.json()
        assert (reply.status, health["endpoints"][0]["workers"]) == (200, {"failed": 1})
        assert await program.end(signal.SIGTERM) == 0


@pytest.mark.parametrize("code", [65, 66, 78])
async def test_worker_that_can_never_start_ends_what_was_just_started(tmp_path: Path, code: int) -> None:
    """`make serve` with a model that does not exist says so and ends, with the worker's exit code."""
    async with gateway(
        tmp_path, ([("say_why", "it is not there", str(code)), ("exit", str(code))], {})
    ) as program:
        assert await program.end() == code
        assert "it is not there" in await program.errors()


async def test_start_is_told_in_plain_lines_where_there_is_no_terminal(tmp_path: Path) -> None:
    """Logs hold the phases, one a line."""
    async with gateway(tmp_path, (READY, {}), environ={"LOG_LEVEL": "info"}) as program:
        await started(program)
        assert await program.end(signal.SIGTERM) == 0
        assert "INFO gateway: worker starting phase='loading weights'\n" in await program.errors()


async def test_a_data_folder_that_others_may_write_is_refused(tmp_path: Path) -> None:
    """Nothing is made in it: whoever can write there could have put a database of his own."""
    data = tmp_path / "data"
    data.mkdir()
    data.chmod(0o777)
    code, _, errors = await command(env={"DATA_DIR": str(data), "MODEL_NAME": "m", "PORT": "0"})
    assert code == 78
    assert f"DATA_DIR={data} may be written by everybody (mode 0777)" in errors
    assert not [*data.iterdir()]


async def test_bad_settings_exit_78_naming_every_fault() -> None:
    """All faults at once, before anything is started."""
    code, _, errors = await command(env={"PORT": "many", "QUEUE_LIMIT": "-1", "START": "later"})
    assert code == 78
    for name in ("PORT", "QUEUE_LIMIT", "START"):
        assert f"{name}=" in errors


async def test_taken_port_is_one_clear_line() -> None:
    """Found before a worker is started."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        code, _, errors = await command(env={"PORT": str(port), "MODEL_NAME": "m"})
    assert (code, errors) == (
        75,
        f"firsttoken: port {port} of 127.0.0.1 is already in use; choose another with PORT\n",
    )


@pytest.mark.parametrize(
    ("arguments", "upstream"),
    [(["serve", "--upstream", "runpod"], "local"), (["serve"], "runpod"), ([], "runpod")],
)
async def test_same_url_through_jobs(tmp_path: Path, arguments: list[str], upstream: str) -> None:
    """The option wins over `UPSTREAM`; a client sees no difference, and a stream finishes on SIGTERM."""
    scripts = {CHAT: [completion("Hello!"), stream(chunk("a"), Pause("generating"), chunk("b"))]}
    environ = {"UPSTREAM": upstream}
    async with gateway(
        tmp_path, ((), scripts), environ=environ, program=RUNPODS_SDK, arguments=arguments
    ) as program:
        worker = await started(program)
        assert "RUNPOD_WEBHOOK_GET_JOB" in worker.env
        assert await ask(program) == "Hello!"
        async with program.client() as client:
            reply = await client.chat.completions.create(
                model="org/model", messages=[{"role": "user", "content": "hi"}], stream=True
            )
            texts = [(await anext(reply)).choices[0].delta.content]
            program.process.send_signal(signal.SIGTERM)
            worker.open("generating")
            texts += [part.choices[0].delta.content async for part in reply]
        assert texts == ["a", "b"]
        assert await program.end() == 0
        await worker.saw("gone")
        assert worker.env["RUNPOD_AI_API_KEY"] not in "".join(program.out) + await program.errors()
        assert not private(worker).exists()


async def test_option_wins_over_the_setting(tmp_path: Path) -> None:
    """Also the other way round."""
    arguments = ["serve", "--upstream", "local"]
    environ = {"UPSTREAM": "runpod"}
    async with gateway(tmp_path, (READY, {}), environ=environ, arguments=arguments) as program:
        assert "UDS" in (await started(program)).env
        assert await program.end(signal.SIGTERM) == 0

"""Bakes into a store that speaks S3 and out of it: real boto3, moto's server, processes that are killed."""

from __future__ import annotations

import os
import stat
from hashlib import sha256
from pathlib import Path

import pytest

from builder.store import MTIME_S
from handler.manifest import File, Manifest
from tests.bake_folder import THREE_PARTS_BYTES, files, read, sealed
from tests.object_store import Relay
from tests.place import Place
from tests.until import until


@pytest.fixture
def bake(tmp_path: Path) -> Path:
    """A sealed bake."""
    return sealed(tmp_path / "bake", files())


@pytest.fixture
def large(tmp_path: Path) -> Path:
    """A sealed bake whose weights go in three parts."""
    return sealed(tmp_path / "large", files(THREE_PARTS_BYTES))


@pytest.fixture
def pushed(place: Place, bake: Path) -> Place:
    """The prefix with the bake in it."""
    place.done("push", bake, place.url)
    return place


def test_push_and_pull_make_the_same_folder(pushed: Place, bake: Path, tmp_path: Path) -> None:
    """Byte for byte, with a bake's modes and times, and nothing beside it."""
    umask = os.umask(0o077)
    try:
        assert pushed.done("pull", pushed.url, tmp_path / "out").out == f"{tmp_path}/out\n"
    finally:
        os.umask(umask)
    assert read(tmp_path / "out") == read(bake)
    paths = list((tmp_path / "out").rglob("*"))
    stats = {(path.is_dir(), stat.S_IMODE(path.stat().st_mode), path.stat().st_mtime) for path in paths}
    assert stats == {(True, 0o755, MTIME_S), (False, 0o644, MTIME_S)}
    assert stat.S_IMODE((tmp_path / "out").stat().st_mode) == 0o755


def test_what_happens_is_said(place: Place, bake: Path, tmp_path: Path) -> None:
    """How much goes each way, and that there was nothing to do the second time."""
    push, pull = ("push", bake, place.url), ("pull", place.url, tmp_path / "out")
    assert [place.done(*words).err for words in (push, push, pull, pull)] == [
        f"push: {place.url} has this bake: 4 files were uploaded, 1 kB, and 0 were there\n",
        f"push: {place.url} has this bake; nothing changed\n",
        f"pull: downloading {place.url}: 4 files, 1 kB; 0 are here\npull: {place.url} is in {tmp_path}/out\n",
        f"pull: {tmp_path}/out has this bake; nothing changed\n",
    ]


def test_nothing_is_sent_twice(pushed: Place, bake: Path, tmp_path: Path) -> None:
    """The second push uploads nothing, the second pull takes the manifest alone."""
    assert sorted(pushed.answered("PUT")) == sorted([*files(), "manifest.json"])
    pushed.done("push", bake, pushed.url)
    assert len(pushed.answered("PUT")) == 5
    pushed.done("pull", pushed.url, tmp_path / "out")
    before = pushed.answered("GET")
    pushed.done("pull", pushed.url, tmp_path / "out")
    assert pushed.answered("GET") == [*before, "manifest.json"]


def test_the_manifest_is_uploaded_last(pushed: Place) -> None:
    """Where it is, the bake is whole."""
    assert pushed.answered("PUT")[-1] == "manifest.json"


def test_killed_push_goes_on(place: Place, large: Path) -> None:
    """All parts are on their way at once; those that had arrived are not sent again."""
    with (
        Relay(place.store, b"partNumber=3") as relay,
        place.killed("push", large, place.url, through=relay),
    ):
        until(lambda: relay.stalled and len(place.parts()) == 2)
    assert "manifest.json" not in place.objects()
    place.done("push", large, place.url)
    assert sorted(place.parts()) == ["1", "2", "3"]
    assert place.objects() == read(large)


def test_parts_go_up_at_the_same_time(place: Place, large: Path) -> None:
    """None waits for another."""
    with (
        Relay(place.store, b"partNumber=") as relay,
        place.killed("push", large, place.url, through=relay),
    ):
        until(lambda: len(relay.stalled) == 3)


def test_killed_pull_goes_on(place: Place, large: Path, tmp_path: Path) -> None:
    """What had arrived is not downloaded again, and until it is whole there is no manifest."""
    place.done("push", large, place.url)
    out = tmp_path / "out"
    notes = out / ".pull/files/.pieces/done/model%2Fmodel.safetensors"
    with (
        Relay(place.store, b"Range: bytes=33554432-") as relay,
        place.killed("pull", place.url, out, through=relay),
    ):
        until(lambda: relay.stalled and notes.is_file() and len(notes.read_text().splitlines()) == 3)
    assert not (out / "manifest.json").exists()
    before = place.answered("GET").count("model/model.safetensors")
    place.done("pull", place.url, out)
    assert place.answered("GET").count("model/model.safetensors") == before + 1
    assert read(out) == read(large)


def test_flipped_byte_is_found_and_named(pushed: Place, tmp_path: Path) -> None:
    """After one more download; the folder gets no manifest, so that nobody takes it for a bake."""
    body = bytearray(files()["model/model.safetensors"])
    body[500] ^= 1
    pushed.put("model/model.safetensors", bytes(body))
    failed = pushed.command("pull", pushed.url, tmp_path / "out")
    right, wrong = (sha256(one).hexdigest() for one in (files()["model/model.safetensors"], body))
    difference = f"model/model.safetensors: sha256: expected {right}, found {wrong}"
    assert failed.status == 65
    assert failed.err.splitlines()[1:] == [
        f"pull: {difference}; downloading it again",
        f"pull: what arrived is not what was sent: {difference}",
    ]
    assert pushed.answered("GET").count("model/model.safetensors") == 2
    assert not (tmp_path / "out/manifest.json").exists()


def test_object_of_another_size_and_missing_one_are_named(pushed: Place, tmp_path: Path) -> None:
    """Both at once, and before anything is downloaded."""
    pushed.put("model/model.safetensors", b"short")
    pushed.s3.delete_object(Bucket=pushed.bucket, Key="deep/prefix/model/config.json")
    failed = pushed.command("pull", pushed.url, tmp_path / "out")
    assert failed.status == 65
    assert failed.err == (
        f"pull: {pushed.url} is not what was sealed: "
        "model/config.json: missing: expected 2 bytes, found no such object; "
        "model/model.safetensors: size: expected 1000 bytes, found 5 bytes\n"
    )


def test_push_mends_what_is_wrong(pushed: Place, bake: Path) -> None:
    """An object that somebody else wrote is uploaded again, though it has the size."""
    pushed.put("model/model.safetensors", bytes(1000))
    pushed.done("push", bake, pushed.url)
    assert pushed.objects() == read(bake)


def test_changed_file_is_not_pushed(place: Place, bake: Path) -> None:
    """Nothing of a bake that is not what was sealed is."""
    (bake / "model/config.json").write_bytes(b"[]")
    (bake / "model/model.safetensors").write_bytes(b"short")
    (bake / "cache/vllm/empty").unlink()
    failed = place.command("push", bake, place.url)
    right, wrong = sha256(b"{}").hexdigest(), sha256(b"[]").hexdigest()
    assert failed.status == 65
    assert failed.err == (
        f"push: {bake} is not what was sealed: "
        "cache/vllm/empty: missing: expected 0 bytes, found no such file; "
        f"model/config.json: sha256: expected {right}, found {wrong}; "
        "model/model.safetensors: size: expected 1000 bytes, found 5 bytes\n"
    )
    assert place.objects() == {}


def test_another_bake_is_replaced_on_demand_only(pushed: Place, bake: Path, tmp_path: Path) -> None:
    """What the new one does not name is left there, and said."""
    held = {"model/config.json": b"{}", "model/model.safetensors": b"other weights"}
    other = sealed(tmp_path / "other", held, model="org/other")
    refused = pushed.command("push", other, pushed.url)
    assert refused.status == 64
    assert refused.err == (
        f"push: {pushed.url} has another bake, of org/name; with --replace, that of org/other "
        "takes its place\n"
    )
    assert pushed.objects() == read(bake)
    assert pushed.done("push", other, pushed.url, "--replace").err.splitlines() == [
        f"push: {pushed.url} has this bake: 1 files were uploaded, 13 bytes, and 1 were there",
        "push: not of this bake, and left there: cache/vllm/deep/kernel.so, cache/vllm/empty",
    ]
    assert pushed.objects() == {**read(bake), **read(other)}


def test_replaced_bake_has_no_manifest_meanwhile(pushed: Place, tmp_path: Path) -> None:
    """Neither bake is whole while one takes the place of the other."""
    other = sealed(tmp_path / "other", files(THREE_PARTS_BYTES))
    with (
        Relay(pushed.store, b"partNumber=1") as relay,
        pushed.killed("push", other, pushed.url, "--replace", through=relay),
    ):
        until(lambda: relay.stalled)
        assert "manifest.json" not in pushed.objects()


def test_pull_replaces_another_bake(pushed: Place, bake: Path, tmp_path: Path) -> None:
    """Nothing of it is left; what both have is not downloaded."""
    out = sealed(tmp_path / "out", {**files(), "model/config.json": b"old", "model/gone.json": b"old"})
    (out / ".bake.json").write_text("what the builder remembers of the other")
    pushed.done("pull", pushed.url, out)
    assert read(out) == read(bake)
    assert pushed.answered("GET") == ["manifest.json", "model/config.json"]


def test_pull_mends_what_is_damaged(pushed: Place, bake: Path, tmp_path: Path) -> None:
    """A small file that changed is seen although the manifest is the same."""
    out = tmp_path / "out"
    pushed.done("pull", pushed.url, out)
    (out / "model/config.json").write_bytes(b"[]")
    pushed.done("pull", pushed.url, out)
    assert read(out) == read(bake)


def test_foreign_model_is_not_replaced(pushed: Place, tmp_path: Path) -> None:
    """A pull into the wrong folder must not cost anybody a model."""
    (tmp_path / "out/model").mkdir(parents=True)
    failed = pushed.command("pull", pushed.url, tmp_path / "out")
    assert (failed.status, failed.err) == (
        64,
        f"pull: {tmp_path}/out/model is there and no pull made it; name another folder\n",
    )


def test_manifest_can_not_name_a_file_outside(place: Place, tmp_path: Path) -> None:
    """Whoever may write to the bucket may not write anywhere else."""
    name = "model/../../escaped"
    place.put("manifest.json", Manifest({"name": "x"}, {name: File(1, sha256(b"x").hexdigest())}).dump())
    place.put(name, b"x")
    failed = place.command("pull", place.url, tmp_path / "deep/out")
    assert failed.status == 65
    assert failed.err.endswith("'model/../../escaped' is no file in its folder\n")
    assert not list(tmp_path.rglob("escaped"))


def test_upload_that_was_begun_for_something_else_is_not_believed(place: Place, large: Path) -> None:
    """What it says of its digest is another's: the file is uploaded again."""
    place.s3.create_multipart_upload(
        Bucket=place.bucket,
        Key="deep/prefix/model/model.safetensors",
        ChecksumAlgorithm="SHA256",
        Metadata={"firsttoken-sha256": sha256(b"other").hexdigest()},
    )
    place.done("push", large, place.url)
    head = place.s3.head_object(Bucket=place.bucket, Key="deep/prefix/model/model.safetensors")
    assert head["Metadata"] == {
        "firsttoken-sha256": sha256((large / "model/model.safetensors").read_bytes()).hexdigest()
    }


@pytest.mark.parametrize(
    ("words", "status", "message"),
    [
        (("push", "{bake}", "http://bucket"), 64, "'http://bucket' is not s3://bucket/prefix"),
        (("push", "{folder}", "{url}"), 64, "{folder} is no sealed bake: it has no manifest.json"),
        (("push", "{bake}", "s3://no-such-bucket/x"), 69, "s3://no-such-bucket/x: there is no such bucket "),
        (
            ("pull", "s3://no-such-bucket", "{folder}/out"),
            69,
            "s3://no-such-bucket: there is no such bucket ",
        ),
        (("pull", "{url}", "{folder}/out"), 66, "{url} has no manifest.json: nothing was pushed there, or "),
    ],
)
def test_what_is_wrong_is_said(
    place: Place, bake: Path, tmp_path: Path, words: tuple[str, ...], status: int, message: str
) -> None:
    """In a sentence, with the status of its kind, and without a traceback."""
    names = {"bake": bake, "url": place.url, "folder": tmp_path}
    failed = place.command(*(word.format(**names) for word in words))
    assert (failed.status, len(failed.err.splitlines())) == (status, 1)
    assert failed.err.startswith(f"{words[0]}: {message.format(**names)}")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"AWS_ACCESS_KEY_ID": None, "AWS_SECRET_ACCESS_KEY": None}, "no credentials were found; set AWS_"),
        ({"AWS_PROFILE": "nobody"}, "The config profile (nobody) could not be found"),
        ({"AWS_ENDPOINT_URL": "http://user:hidden@127.0.0.1:9"}, "http://127.0.0.1:9 can't be reached"),
    ],
)
def test_store_that_does_not_let_us_in_is_named(
    place: Place,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    change: dict[str, str | None],
    message: str,
) -> None:
    """At once, and without a password that the URL may have."""
    for name, value in {"HOME": str(tmp_path), **change}.items():
        monkeypatch.delenv(name) if value is None else monkeypatch.setenv(name, value)
    failed = place.command("pull", place.url, tmp_path / "out")
    assert (failed.status, len(failed.err.splitlines())) == (69, 1)
    assert failed.err.startswith(f"pull: {place.url}: {message}")


def test_denied_access_is_said(place: Place, bake: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The store knows who asks, and does not let them."""
    iam = place.store.client("iam")
    iam.create_user(UserName="nobody")
    key = iam.create_access_key(UserName="nobody")["AccessKey"]
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", key["AccessKeyId"])
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", key["SecretAccessKey"])
    with place.store.guarded():
        failed = place.command("push", bake, place.url)
    assert failed.status == 69
    assert failed.err == f"push: {place.url}: access is denied (Access Denied)\n"


def test_pulled_bake_is_what_was_baked(place: Place, tiny_model: Path, tmp_path: Path) -> None:
    """The other commands find nothing that is not as they left it."""
    place.done("bake", tiny_model, "--no-warm", "--out", tmp_path / "bake")
    place.done("push", tmp_path / "bake", place.url)
    place.done("pull", place.url, tmp_path / "out")
    assert place.done("verify", tmp_path / "out").out == ""
    assert place.done("seal", tmp_path / "out").err == "seal: nothing has changed\n"


def test_a_link_is_pulled_anew(pushed: Place, tmp_path: Path) -> None:
    """What it leads to has the same bytes, and is not in the bake."""
    out = tmp_path / "out"
    pushed.done("pull", pushed.url, out)
    elsewhere = (out / "model/config.json").replace(tmp_path / "config.json")
    (out / "model/config.json").symlink_to(elsewhere)
    pushed.done("pull", pushed.url, out)
    assert not (out / "model/config.json").is_symlink()
    pushed.done("verify", out)

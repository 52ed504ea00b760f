"""Jobs whose output folder is a bucket: a real S3 protocol on loopback, by a server that is not ours."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pyarrow.dataset as ds
import pytest
from pyarrow import fs

from runner.config import OutputConfig
from runner.errors import OutputError
from runner.job import run
from runner.journal import Journal
from runner.ledger import Ledger
from runner.object_storage import ObjectStorage
from runner.sink import Sink
from runner.storage import TEMPORARY_FOLDER, join, local_folder, open_storage
from runner.verify import verify
from tests.fake_engine import FakeEngine
from tests.runner.output.cases import CHUNK_ROWS, FINGERPRINT, SCHEMA, chunk, table
from tests.small_job import make_plan, write_rows

pytest.importorskip("obstore")
server = pytest.importorskip("moto.server")
KEYS = {"AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "secret-value", "AWS_REGION": "us-east-1"}


@pytest.fixture(scope="module")
def endpoint() -> Iterator[str]:
    running = server.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    running.start()
    host, port = running.get_host_and_port()
    yield f"http://{host}:{port}"
    running.stop()


@pytest.fixture
def bucket(endpoint: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, request: pytest.FixtureRequest) -> str:
    """The URL of an empty bucket."""
    for name, value in {**KEYS, "AWS_ENDPOINT_URL": endpoint, "AWS_ALLOW_HTTP": "true"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.chdir(tmp_path)  # logs go to outputs/ beside
    name = f"bucket-{abs(hash(request.node.name)):x}"
    files(endpoint).create_dir(name)
    return f"s3://{name}"


def files(endpoint: str) -> fs.S3FileSystem:
    """Another reader and writer than the runner's."""
    host = endpoint.removeprefix("http://")
    return fs.S3FileSystem(
        access_key="key", secret_key="secret-value", endpoint_override=host, scheme="http", region="us-east-1",
        allow_bucket_creation=True, connect_timeout=60, request_timeout=60,
    )  # fmt: skip


def test_a_job_writes_to_a_bucket(bucket: str, endpoint: str, tmp_path: Path) -> None:
    write_rows(tmp_path / "rows", [None if i % 40 == 7 else f"row {i}" for i in range(250)])
    local = run(make_plan(tmp_path, name="local"), FakeEngine())
    summary = run(make_plan(tmp_path, output={"folder": f"{bucket}/jobs"}), FakeEngine())
    assert (summary.finished, summary.num_rows, summary.folder) == (True, 250, f"{bucket}/jobs/job")
    path = f"{bucket.removeprefix('s3://')}/jobs/job"
    store = files(endpoint)
    found = ds.dataset(f"{path}/parts", filesystem=store, format="parquet").to_table()
    assert found.equals(ds.dataset(f"{local.folder}/parts", format="parquet").to_table())
    assert verify(summary.folder, None).exit_code == 0
    left = {
        item.path.removeprefix(f"{path}/").split("/")[0]
        for item in store.get_file_info(fs.FileSelector(path, recursive=True))
    }
    assert left == {"_SUCCESS", "config.yaml", "fingerprint.json", "ledger", "manifest.jsonl", "parts", "plan.json"}
    assert (tmp_path / "outputs" / "job" / "run.log").is_file()
    again = FakeEngine()
    assert run(make_plan(tmp_path, output={"folder": f"{bucket}/jobs"}), again).finished
    assert again.num_requests == 0
    for item in store.get_file_info(fs.FileSelector(path, recursive=True)):
        if item.type == fs.FileType.File:
            assert b"secret-value" not in store.open_input_stream(item.path).read()


def test_create_is_exclusive(bucket: str) -> None:
    """Of twenty writers at once one wins, and each of them knows which."""
    storages = [ObjectStorage(f"{bucket}/x") for _ in range(20)]
    barrier = threading.Barrier(len(storages))

    def attempt(number: int) -> bool:
        barrier.wait()
        return storages[number].create("entry", str(number).encode())

    with ThreadPoolExecutor(len(storages)) as pool:
        won = list(pool.map(attempt, range(len(storages))))
    assert sum(won) == 1
    assert storages[0].read("entry") == str(won.index(True)).encode()


def test_an_answer_that_was_lost_does_no_harm(bucket: str) -> None:
    """The put was carried out, the answer did not come, the call is made again: it is ours all the same."""
    storage = ObjectStorage(bucket)
    assert storage.create("entry", b"mine")
    assert storage.create("entry", b"mine")
    assert not storage.create("entry", b"another's")


def test_operations_are_those_of_a_folder(bucket: str) -> None:
    storage = open_storage(f"{bucket}/job")
    assert (storage.read("a"), storage.size("a"), storage.list("parts")) == (None, None, [])
    storage.write("staging/x", b"12345")
    assert storage.publish("staging/x", "parts/y") and not storage.publish("staging/x", "parts/y")
    assert (storage.list("parts"), storage.list("staging"), storage.size("parts/y")) == (["y"], [], 5)
    assert storage.open("parts/y").read() == b"12345"
    storage.replace("parts/y", b"1")
    storage.remove("parts/y")
    storage.remove("parts/y")
    assert storage.list("parts") == []


def test_a_late_attempt_changes_nothing(bucket: str) -> None:
    folder = f"{bucket}/job"
    first, second = Ledger.open(folder, FINGERPRINT), Ledger.open(folder, FINGERPRINT)
    sink = Sink(folder, SCHEMA, OutputConfig(), {})
    early, late = sink.write(chunk(0), table(0), 1), sink.write(chunk(0), table(0), 1)
    assert first.commit(early)
    assert not second.commit(late)
    assert second.storage.list(TEMPORARY_FOLDER) == []
    assert first.finish(1, {})
    assert verify(folder, None).num_rows == CHUNK_ROWS


def test_a_journal_comes_back(bucket: str) -> None:
    folder = f"{bucket}/job"
    journal = Journal.open(folder, SCHEMA, "w")
    for begin in (0, 5):
        journal.append(0, table(0).slice(begin, 5))
        journal.sync()
    assert len(journal._storage.list("journal")) == 2
    later = Journal.open(folder, SCHEMA, "w")
    assert later.recover()[0].equals(table(0).combine_chunks())
    journal.close()
    journal.drop(0)
    assert later._storage.list("journal") == []


def test_a_store_that_overwrites_is_refused(bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    storage = ObjectStorage(bucket)
    put = storage._store.put
    monkeypatch.setattr(
        storage, "_store", type("Careless", (), {"put": lambda self, path, data, **_: put(path, data), "delete": put})()
    )
    monkeypatch.setattr(storage, "_remove", lambda path: None)
    with pytest.raises(OutputError, match="overwrites where it is asked not to"):
        storage.create("entry", b"x")


def test_a_bucket_that_is_not_there(bucket: str) -> None:
    with pytest.raises(OutputError, match=r"s3://absent/job/.*; expected a bucket that can be read"):
        Ledger.open("s3://absent/job", FINGERPRINT)


@pytest.mark.parametrize("url", ["s3://key:secret@bucket/x", "s3://bucket/x?token=secret"])
def test_credentials_in_the_url_are_refused_and_not_shown(url: str) -> None:
    with pytest.raises(OutputError, match="expected them in the environment") as error:
        open_storage(url)
    assert "secret" not in str(error.value)


def test_other_urls_are_refused() -> None:
    with pytest.raises(OutputError, match=r"a ftp:// URL; expected .* begins with s3://, gs://, az://"):
        open_storage("ftp://host/x")


def test_names() -> None:
    assert join("s3://bucket/a/", "job") == "s3://bucket/a/job"
    assert join("outputs", "job") == str(Path("outputs/job"))
    assert local_folder("s3://bucket/a/job") == Path("outputs/job")
    assert local_folder("x/job") == Path("x/job")

"""Shards by address: the same as local ones, after servers that fail for a while, over a real HTTP server."""

import json
import logging
import threading
from collections import Counter
from collections.abc import Iterator
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import fsspec
import pytest

from data_pipeline.errors import DatasetError
from data_pipeline.images.decoding import build_image_decoder
from data_pipeline.pretokenize.command import dry_run, pretokenize
from data_pipeline.pretokenize.shard_tokenizer import Settings
from data_pipeline.shards.image_text_shards import without_tokens
from data_pipeline.shards.remote_files import read_remote, with_retries
from data_pipeline.streams import BlendEntry, ImageStreamConfig, image_loader
from tests.test_data_pipeline.pretokenize.test_pretokenize import (
    SIZE,
    StandInTokenizer,
    contents,
    write_inputs,
)
from tests.test_data_pipeline.streams.test_document_streams import (
    FINGERPRINT,
    SAMPLES,
    config,
    loader,
    pair,
    same,
    write_code_shards,
)
from tests.test_data_pipeline.streams.test_streams import write_image_shards


class Server(ThreadingHTTPServer):
    """Serves a folder; answers 503, or breaks off after half of the answer, as often as it is told."""

    def __init__(self, root: Path) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.root = root
        self.ranges = self.lengths = True
        self.unavailable: Counter[str] = Counter()
        self.broken: Counter[str] = Counter()
        self.address = f"http://127.0.0.1:{self.server_port}"


class Handler(BaseHTTPRequestHandler):
    server: Server

    def log_message(self, *arguments: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self.answer(body=False)

    def do_GET(self) -> None:
        self.answer(body=True)

    def answer(self, body: bool) -> None:
        name = self.path.lstrip("/")
        path = self.server.root / name
        if self.server.unavailable[name] > 0:
            self.server.unavailable[name] -= 1
            return self.send_error(503)
        if not path.is_file():
            return self.send_error(404)
        if not self.server.lengths:
            self.protocol_version, self.close_connection = "HTTP/1.1", True
        data, wanted = path.read_bytes(), self.headers.get("Range", "")
        if self.server.ranges and wanted:
            first, last = wanted.removeprefix("bytes=").split("-")
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {wanted[6:]}/{len(data)}")
            data = data[int(first) : int(last) + 1]
        else:
            self.send_response(200)
        if self.server.ranges:
            self.send_header("Accept-Ranges", "bytes")
        if self.server.lengths:
            self.send_header("Content-Length", str(len(data)))
        else:
            self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        broken = body and self.server.broken[name] > 0
        if broken:
            self.server.broken[name] -= 1
            data = data[: len(data) // 2]
        if body and self.server.lengths:
            self.wfile.write(data)
        elif body:
            self.wfile.write(b"%x\r\n%b\r\n" % (len(data), data) + (b"" if broken else b"0\r\n\r\n"))


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setattr("data_pipeline.shards.remote_files.RETRY_SECONDS", (0, 0, 0))
    root = tmp_path / "served"
    root.mkdir()
    with Server(root) as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        yield running
        running.shutdown()


def run(inputs: list[str], output: Path, **settings: object):
    decoder = build_image_decoder(SIZE, "pil")
    return pretokenize(inputs, StandInTokenizer(), decoder, output, Settings(batch_size=5, **settings))


def without_addresses(folder: Path) -> dict[str, bytes]:
    """Everything in a data set but where it was made from."""
    found = contents(folder)
    manifest = json.loads(found.pop("dataset.json"))
    for name, entry in manifest["shards"].items():
        assert entry.pop("source").endswith(f"/{name}")
    return {**found, "dataset.json": json.dumps(manifest).encode()}


def addresses(base: str) -> list[str]:
    return [f"{base}/in-{{000..003}}.tar"]


@pytest.mark.parametrize(("ranges", "lengths"), [(True, True), (False, True), (False, False)])
def test_pretokenize_from_a_server_that_fails_at_times(
    tmp_path: Path, server: Server, ranges: bool, lengths: bool
) -> None:
    write_inputs(server.root)
    run([str(server.root)], tmp_path / "local")
    server.ranges, server.lengths = ranges, lengths
    server.unavailable.update({"in-000.tar": 2, "in-001.tar": 3})
    server.broken.update({"in-001.tar": 1, "in-002.tar": 3})
    run(addresses(server.address), tmp_path / "remote")
    assert not +server.unavailable and not +server.broken
    assert without_addresses(tmp_path / "remote") == without_addresses(tmp_path / "local")


@pytest.mark.parametrize("kind", ["file", "memory"])
def test_pretokenize_from_other_addresses(tmp_path: Path, kind: str) -> None:
    write_inputs(tmp_path / "in")
    run([str(tmp_path / "in")], tmp_path / "local")
    base = f"file://{tmp_path / 'in'}"
    if kind == "memory":
        base = "memory://inputs"
        for path in (tmp_path / "in").iterdir():
            fsspec.filesystem("memory").pipe(f"/inputs/{path.name}", path.read_bytes())
    run(addresses(base), tmp_path / "remote")
    assert without_addresses(tmp_path / "remote") == without_addresses(tmp_path / "local")


def test_a_shard_that_stays_away_stops_the_job_or_is_reported(tmp_path: Path, server: Server) -> None:
    expected = write_inputs(server.root)
    server.unavailable["in-002.tar"] = 1000
    with pytest.raises(DatasetError, match=r"http://127.*/in-002\.tar: cannot be read: .*in-002\.tar"):
        run(addresses(server.address), tmp_path / "out")
    assert server.unavailable["in-002.tar"] < 1000 - 4  # it was tried again
    (server.root / "in-003.tar").unlink()
    server.unavailable.clear()
    with pytest.raises(DatasetError, match=r"/in-003\.tar: cannot be read"):
        run(addresses(server.address), tmp_path / "out")
    manifest = run(addresses(server.address), tmp_path / "skipped", on_bad_shard="skip")
    lines = [json.loads(line) for line in (tmp_path / "skipped" / "rejected.jsonl").open(encoding="utf-8")]
    assert lines[-1]["shard"] == "in-003.tar" and lines[-1]["key"] is None
    assert lines[-1]["reason"].startswith("the shard cannot be read: ")
    good = [key for key, reason in list(expected.items())[:36] if not reason]
    assert (manifest.samples_out, manifest.samples_in) == (len(good), 37)
    with pytest.raises(DatasetError, match="Protocol not known: nosuch"):
        run(["nosuch://host/a.tar"], tmp_path / "other")
    with pytest.raises(ValueError, match="on_bad_shard is 'go', expected 'stop' or 'skip'"):
        Settings(on_bad_shard="go")


def test_a_shard_that_stays_away_is_reported_without_its_token(tmp_path: Path, server: Server) -> None:
    write_inputs(server.root)
    address = f"{server.address}/gone.tar"
    run([f"{address}?token=secret", f"{server.address}/in-000.tar"], tmp_path / "out", on_bad_shard="skip")
    text = (tmp_path / "out" / "rejected.jsonl").read_text(encoding="utf-8")
    assert f"the shard cannot be read: {address} 404" in text and "secret" not in text
    with pytest.raises(DatasetError, match=f"^{address}: cannot be read: {address} 404") as stopped:
        run([f"{address}?token=secret"], tmp_path / "other")
    assert "secret" not in str(stopped.value)
    reason = f"503, message='No', url='{address}?a=b&token=secret' and s3://me:secret@host/b: 'no'"
    assert without_tokens(reason) == f"503, message='No', url='{address}' and s3://host/b: 'no'"
    assert without_tokens("zip://a::s3://me:secret@host/b: no") == "zip://a::s3://host/b: no"


def test_dry_run_looks_into_few_remote_shards(tmp_path: Path, server: Server) -> None:
    write_inputs(server.root)
    lines: list[str] = []
    decoder = build_image_decoder(SIZE, "pil")
    what = (addresses(server.address), StandInTokenizer(), decoder, tmp_path / "out", Settings(batch_size=5))
    dry_run(*what, report=lines.append)
    assert "input: 4 shards, " in lines[0]
    assert "48 samples with 48 images (counted in 2 shards, extrapolated by bytes)" in lines[0]
    assert not (tmp_path / "out").exists()


@pytest.fixture
def codes(server: Server) -> Path:
    return write_code_shards(server.root / "codes", [pair(index) for index in range(SAMPLES)])


def remote_address(kind: str, server: Server, folder: Path) -> str:
    if kind == "memory":
        memory = fsspec.filesystem("memory")
        for path in folder.rglob("*"):
            if path.is_file():
                memory.pipe(f"/codes/{path.relative_to(folder)}", path.read_bytes())
    addresses = {
        "http": f"{server.address}/codes",
        "file": f"file://{folder}",
        "memory": "memory://codes",
        "msc": "msc://served-folder/codes",
    }
    return addresses[kind]


@pytest.mark.parametrize("kind", ["http", "file", "memory", "msc"])
def test_streams_from_an_address(
    server: Server, codes: Path, kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    provider = {"type": "file", "options": {"base_path": str(codes.parent)}}
    (tmp_path / "msc.json").write_text(
        json.dumps({"profiles": {"served-folder": {"storage_provider": provider}}}), encoding="utf-8"
    )
    monkeypatch.setenv("MSC_CONFIG", str(tmp_path / "msc.json"))
    if kind == "http":
        server.unavailable.update({"codes/dataset.json": 2, "codes/.nv-meta/.info.json": 1})
        server.unavailable.update({"codes/shard-000000.tar": 2, "codes/shard-000001.tar.idx": 1})
    address = remote_address(kind, server, codes)
    for num_workers in (0, 2) if kind == "http" else (0,):
        streams = [
            loader(config(BlendEntry(path, "generate"), num_workers=num_workers))
            for path in (str(codes), address)
        ]
        local, remote = streams
        assert local.samples == remote.samples == SAMPLES
        assert all(same(next(local), next(remote)) for _ in range(12))
        state = remote.save_state()
        expected = [next(remote) for _ in range(5)]
        remote.restore_states([state])
        assert all(same(batch, next(remote)) for batch in expected)
        for stream in streams:
            stream.close()
    assert not +server.unavailable


def test_a_shard_of_a_stream_that_stays_away(
    server: Server, codes: Path, caplog: pytest.LogCaptureFixture
) -> None:
    entry = BlendEntry(f"{server.address}/codes", "caption")
    server.unavailable["codes/shard-000001.tar"] = 10**6
    with pytest.raises(
        DatasetError, match=r"http://.*/codes/shard-000001\.tar: sample \d+ cannot be read"
    ) as stop:
        list(loader(config(entry), split="val"))
    assert "\n" not in str(stop.value)
    with caplog.at_level(logging.WARNING):
        batches = list(loader(config(entry, on_bad_sample="skip"), split="val"))
    keys = [key for batch in batches for key in batch.keys]
    assert sorted(keys) == [f"k{index:04d}" for index in range(0, SAMPLES, 2)]
    assert "skipped: http://" in caplog.text and "another try in" in caplog.text


def test_bad_remote_data_sets_are_refused_in_one_line(
    server: Server, codes: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    address = f"{server.address}/codes"
    make = partial(loader, config(BlendEntry(address, "caption")))
    for name, message in (
        (".nv-meta/.info.json", r"\.info\.json: .*; expected a data set prepared for Energon at http://"),
        ("dataset.json", r"http://.*/dataset\.json: missing; .* is not a finished dual-code data set"),
    ):
        (codes / name).rename(server.root / "away")
        with pytest.raises(DatasetError, match=message) as caught:
            make()
        assert "\n" not in str(caught.value)
        (server.root / "away").rename(codes / name)
    content = json.loads((codes / "dataset.json").read_text(encoding="utf-8"))
    (codes / "dataset.json").write_text(json.dumps({**content, "fingerprint": "0" * 64}), encoding="utf-8")
    with pytest.raises(DatasetError, match=f"made by the visual tokenizer 0000.*expects {FINGERPRINT[:12]}"):
        make()
    server.ranges = False
    monkeypatch.setattr("data_pipeline.shards.remote_files.BLOCK", 4096)
    (codes / "dataset.json").write_text(json.dumps(content), encoding="utf-8")
    with pytest.raises(DatasetError, match=r"shard-00000\d\.tar: sample \d+ cannot be read: .*range"):
        next(make())


def test_pictures_from_an_address(server: Server) -> None:
    folder = write_image_shards(server.root / "images")
    streams = [
        image_loader(ImageStreamConfig(path=path, shuffle_buffer_size=8, slice_length=5), 3)
        for path in (str(folder), f"{server.address}/images")
    ]
    for _ in range(10):
        local, remote = map(next, streams)
        assert (local.keys, local.image_bytes, local.captions) == (
            remote.keys,
            remote.image_bytes,
            remote.captions,
        )


def test_missing_files_are_not_asked_for_again(server: Server, caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(FileNotFoundError, match=f"{server.address}/nothing"):
        read_remote(f"{server.address}/nothing")
    assert "another try" not in caplog.text


def test_a_server_that_cannot_be_reached_is_told_in_one_line_with_the_reason(
    server: Server, tmp_path: Path
) -> None:
    with Server(tmp_path) as closed:
        address = closed.address
    with pytest.raises(DatasetError, match=f"^{address}/.*info.json: .*Connect.*failed") as caught:
        image_loader(ImageStreamConfig(path=address), 1)
    assert "\n" not in str(caught.value)
    with pytest.raises(DatasetError, match=f"^{address}/a.tar: cannot be read: .*Connect.*failed"):
        run([f"{address}/a.tar"], tmp_path / "out")
    (server.root / "a.tar").write_bytes(b"")
    server.unavailable["a.tar"] = 1000
    with pytest.raises(DatasetError, match=r"/a\.tar: cannot be read: .*503.*Service Unavailable"):
        run([f"{server.address}/a.tar"], tmp_path / "other")


@pytest.mark.parametrize(
    ("status", "kind", "told"), [(404, FileNotFoundError, "bucket/key"), (403, OSError, "Forbidden")]
)
def test_what_s3_says_is_final(
    caplog: pytest.LogCaptureFixture, status: int, kind: type[OSError], told: str
) -> None:
    """s3fs makes a missing file of botocore's error, which has the server's answer in a dictionary."""

    class ClientError(Exception):
        response = {"ResponseMetadata": {"HTTPStatusCode": status}}

    def read() -> None:
        raise FileNotFoundError("bucket/key") from ClientError("Forbidden")

    with pytest.raises(OSError, match=told) as caught:
        with_retries(read)
    assert type(caught.value) is kind and "another try" not in caplog.text

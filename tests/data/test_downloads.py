"""The cache of large files, against a server on this machine."""

import hashlib
import http.server
import threading

import pytest

from diffoc.data.downloads import RemoteFile, cache_folder, fetch, find

CONTENT = bytes(range(256)) * 4000


class Server(http.server.BaseHTTPRequestHandler):
    """Serves CONTENT, ranges included, and notes from where it was asked for."""

    starts: list[int]

    def do_GET(self):
        asked = self.headers.get("Range", "bytes=0-")
        start = int(asked.removeprefix("bytes=").split("-")[0])
        self.starts.append(start)
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(CONTENT) - start))
        if start:
            end = len(CONTENT)
            self.send_header("Content-Range", f"bytes {start}-{end - 1}/{end}")
        self.end_headers()
        self.wfile.write(CONTENT[start:])

    def log_message(self, *args):
        pass


@pytest.fixture
def server():
    handler = type("Handler", (Server,), {"starts": []})
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as running:
        thread = threading.Thread(target=running.serve_forever)
        thread.start()
        running.starts = handler.starts
        yield running
        running.shutdown()
        thread.join()


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("DIFFOC_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def remote(server, **changes):
    url = f"http://127.0.0.1:{server.server_address[1]}/weights.bin"
    known = hashlib.sha256(CONTENT).hexdigest()
    values = {"name": "weights.bin", "url": url, "bytes": len(CONTENT), "sha256": known}
    return RemoteFile(**{**values, **changes})


def test_a_file_is_downloaded_once(server, cache):
    path = fetch(remote(server))
    assert path == cache / "weights.bin"
    assert path.read_bytes() == CONTENT
    fetch(remote(server))
    assert len(server.starts) == 1


def test_an_interrupted_download_goes_on_where_it_stopped(server, cache):
    # gdown names an unfinished file after the finished one, with eight letters and .part.
    cache.mkdir()
    (cache / "weights.bin").unlink(missing_ok=True)
    (cache / "weights.bin0a1b2c3d.part").write_bytes(CONTENT[:70_000])
    assert fetch(remote(server)).read_bytes() == CONTENT
    assert 70_000 in server.starts


def test_a_download_onto_a_full_disk_goes_on_once_there_is_space(server, cache, full_disk):
    # The last one fits in the buffers of who writes, and not onto the disk.
    for size in (0, 70_000, len(CONTENT) - 1):
        with (
            full_disk(size),
            pytest.raises(OSError, match=r"weights\.bin could not be written.*too large"),
        ):
            fetch(remote(server))
        assert not (cache / "weights.bin").exists()
    assert fetch(remote(server)).read_bytes() == CONTENT
    assert max(server.starts) > 0
    assert [path.name for path in cache.iterdir()] == ["weights.bin"]


def test_another_file_is_refused_and_kept(server, cache):
    with pytest.raises(ValueError, match=r"weights\.bin.*sha256"):
        fetch(remote(server, sha256="0" * 64))
    assert (cache / "weights.bin").exists()


def test_offline_the_message_says_what_to_do(cache):
    file = RemoteFile("weights.bin", "http://127.0.0.1:9/weights.bin", 374_000_000)
    with pytest.raises(FileNotFoundError) as caught:
        fetch(file)
    for part in ("weights.bin", file.url, "374 MB", str(cache), "DIFFOC_CACHE"):
        assert part in str(caught.value)


def test_a_file_put_there_by_hand_needs_no_network(cache):
    cache.mkdir()
    (cache / "weights.bin").write_bytes(b"by hand")
    file = RemoteFile("weights.bin", "http://127.0.0.1:9/weights.bin", 7)
    assert fetch(file).read_bytes() == b"by hand"


def test_find_looks_into_all_folders_and_never_downloads(server, cache, tmp_path):
    file = remote(server, sha256=hashlib.sha256(CONTENT).hexdigest()[:8])
    with pytest.raises(FileNotFoundError) as caught:
        find(file, tmp_path)
    for part in ("weights.bin", file.url, "1 MB", str(cache), str(tmp_path), "DIFFOC_CACHE"):
        assert part in str(caught.value)
    assert server.starts == []
    (tmp_path / "weights.bin").write_bytes(CONTENT)
    assert find(file, tmp_path) == tmp_path / "weights.bin"
    cache.mkdir()
    (cache / "weights.bin").write_bytes(CONTENT + b"!")
    with pytest.raises(ValueError, match="sha256"):
        find(file, tmp_path)


def test_the_default_is_the_platform_s_cache_folder(monkeypatch):
    monkeypatch.delenv("DIFFOC_CACHE")
    assert cache_folder().name == "diffoc"
    assert cache_folder().is_absolute()

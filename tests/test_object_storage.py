"""Shards on an object store: read by range through every kind of disturbance, uploaded, cached, trained from."""

import json
import urllib.request

import pytest

from ddp_asr.data import object_storage, storage
from ddp_asr.data.index import read_index
from ddp_asr.errors import UserError
from ddp_asr.shard import main as shard
from tests import tiny_speech
from tests import tiny_training as tiny
from tests.object_server import BUCKET, Disturbing, environment, seaweedfs

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with seaweedfs(tmp_path_factory.mktemp("seaweedfs")) as server:
        yield server


@pytest.fixture
def proxy(server, monkeypatch):
    """A proxy before the server, which this process and those that it starts find."""
    with Disturbing(server.s3) as proxy:
        for name, value in environment(proxy.address).items():
            monkeypatch.setenv(name, value)
        object_storage._folder.cache_clear()
        yield proxy
        object_storage._folder.cache_clear()


def put(proxy, name, content):
    request = urllib.request.Request(f"http://{proxy.address}/{BUCKET}/{name}", content, method="PUT")
    urllib.request.urlopen(request).close()
    return f"s3://{BUCKET}/{name}"


@pytest.fixture(scope="module")
def corpus(server, tiny_corpus):
    """The tiny corpus on disk, and its shards in the bucket."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in environment(server.s3).items():
            patch.setenv(name, value)
        object_storage._folder.cache_clear()
        for shards in (tiny_corpus.train, tiny_corpus.test):
            object_storage.upload(shards, f"s3://{BUCKET}/tiny/{shards.name}", lambda name: None)
    return tiny_corpus


# ---- ranges --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["", "slow", "error", "busy", "reset", "truncated"])
def test_what_is_read_is_right_however_the_answers_are_disturbed(proxy, how):
    content = bytes(range(256)) * 40
    url = put(proxy, f"content-{how}", content)
    proxy.disturb, store = how, object_storage.ObjectStore()
    assert store.size(url) == len(content)
    for offset, size in [(0, 10_240), (3, 4), (9_000, 1_240), (100, 0), (5, 5_000), (10_239, 1)]:
        assert store.read(url, offset, size) == content[offset : offset + size]
    assert proxy.disturbed >= (1 if how else 0)


def test_what_cannot_succeed_is_not_tried_again(proxy):
    url, store = put(proxy, "ten", b"0123456789"), object_storage.ObjectStore()
    for offset in (5, 50):
        with pytest.raises(OSError, match=f"^{url} ends at byte 10, before byte {offset + 7}$"):
            store.read(url, offset, 7)
    asked = len(proxy.asked)
    with pytest.raises(FileNotFoundError, match=f"no such object: '{url}x'"):
        store.read(f"{url}x", 0, 1)
    proxy.disturb = "forbidden"
    with pytest.raises(UserError, match=rf"^{url} may not be read or written: .*403.*; check the URL, and the env"):
        store.size(url)
    assert len(proxy.asked) == asked + 2


def test_a_service_that_stays_away_ends_the_wait_with_a_sentence(proxy, monkeypatch, capfd):
    monkeypatch.setattr(object_storage, "PATIENCE_S", 0.5)
    monkeypatch.setattr(object_storage, "SAY_AFTER_S", 0.0)
    url = put(proxy, "away", b"x")
    proxy.disturb = "silent"
    with pytest.raises(storage.Unreachable, match=rf"^{url} could not be reached for \d s \(.*\): check the network"):
        object_storage.ObjectStore().read(url, 0, 1)
    assert len(proxy.asked) > 2 and capfd.readouterr().err.count("tried again for up to") == 1


def test_a_bad_url_is_a_sentence():
    for url in ("s3:///x", "http://", "az://account", "gs://"):
        with pytest.raises(UserError, match=f"^{url[:2]}.*check the URL"):
            storage.open_store(url).size(url)


# ---- upload --------------------------------------------------------------------------------------------------------


def test_sharding_uploads_what_is_equal_to_a_local_directory(proxy, corpus, tmp_path, capsys):
    source = tiny_speech.librispeech(tmp_path / "source")
    local = tiny_speech.shard(source, tmp_path / "local", "--shard-mb", "0.04")
    url = f"s3://{BUCKET}/uploaded"
    command = [str(source), "--out", url + "/", "--shard-mb", "0.04", "--cache", str(tmp_path / "cache")]
    assert shard(command) == 0
    assert f"{url}: uploaded; the copy in {tmp_path}/cache/shards-s3-" in capsys.readouterr().out
    there, here = read_index([url]), read_index([local])
    assert there.fingerprint() == here.fingerprint() and there.checksums == here.checksums
    for remote, file in zip(there.shards, here.shards, strict=True):
        size = storage.open_store(file).size(file)
        assert storage.open_store(remote).read(remote, 0, size) == storage.open_store(file).read(file, 0, size)
    asked = len(proxy.asked)
    assert shard(command) == 0
    assert {method for method, _ in proxy.asked[asked:]} == {"HEAD", "GET"}  # all is there
    with pytest.raises(UserError, match=f"^{url} holds other shards; name another --out"):
        object_storage.upload(corpus.test, url, lambda name: None)


def test_an_interrupted_upload_goes_on(proxy, tmp_path):
    shards = tiny_speech.shard(tiny_speech.librispeech(tmp_path / "source"), tmp_path / "shards", "--shard-mb", "0.04")
    url, sent = f"s3://{BUCKET}/interrupted", []

    def stop(name):
        sent.append(name)
        if len(sent) == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        object_storage.upload(shards, url, stop)
    with pytest.raises(UserError, match=r"no dataset.json in it, so its shards are not finished"):
        read_index([url])
    asked = len(proxy.asked)
    object_storage.upload(shards, url, sent.append)
    put_again = [path for method, path in proxy.asked[asked:] if method == "PUT"]
    assert not [path for path in put_again if path.endswith(tuple(sent[:2]))] and len(put_again) > 2
    assert len(read_index([url])) == len(read_index([shards]))
    assert not [path for path in put_again if path.endswith(object_storage.UPLOAD_LIST)]


def test_web_servers_are_read_and_not_written(server, corpus, capsys):
    url = f"{server.http}/tiny/train"
    assert read_index([url]).fingerprint() == read_index([corpus.train]).fingerprint()
    with pytest.raises(SystemExit):
        shard(["source", "--out", url])
    assert f"--out is {url}; shards can be uploaded to s3://, gs://, az://" in capsys.readouterr().err


# ---- the cache -----------------------------------------------------------------------------------------------------


def test_the_cache_keeps_to_its_limit_beside_the_copies_of_others(proxy, tmp_path):
    shards = tiny_speech.shard(tiny_speech.librispeech(tmp_path / "source"), tmp_path / "shards", "--shard-mb", "0.04")
    url, cache = f"s3://{BUCKET}/cached", tmp_path / "cache"
    object_storage.upload(shards, url, lambda name: None)
    remote = read_index([url])
    sizes = [storage.open_store(name).size(name) for name in remote.shards]
    assert len(sizes) > 2
    cached = storage.cache_shards(remote, cache, sum(sizes[:2]) + 1)
    assert cached.shards[2:] == remote.shards[2:] and all(name.startswith(str(cache)) for name in cached.shards[:2])
    (cache / "0123456789abcdef-shard-000000.tar").write_bytes(bytes(sizes[1]))  # of another corpus
    again = storage.cache_shards(remote, cache, sum(sizes[:2]) + 1)
    assert again.shards == (cached.shards[0], *remote.shards[1:])
    reader, local = storage.Shards(cached.shards), read_index([shards])
    for row in range(len(local)):
        place = int(local.shard[row]), int(local.offset[row]), int(local.bytes[row])
        assert reader.read(*place) == storage.Shards(local.shards).read(*place)


# ---- training ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def from_disk(corpus, tmp_path_factory):
    runs = tmp_path_factory.mktemp("runs")
    tiny.train(corpus.arguments(runs), 2)
    return runs / "run"


def from_store(corpus, runs, *more):
    data = [f"--data.{name}=s3://{BUCKET}/tiny/{name}" for name in ("train", "test")]
    return corpus.arguments(runs, "run", "--data.threads=2", *data, *more)


@pytest.mark.parametrize("how", ["", "slow", "error", "reset", "truncated", "cache"])
def test_a_training_from_the_store_is_that_from_disk(proxy, corpus, from_disk, tmp_path, how):
    cache = [f"--data.cache_dir={tmp_path / 'cache'}"] if how == "cache" else []
    proxy.disturb = how if how != "cache" else "reset"
    tiny.train(from_store(corpus, tmp_path, *cache), 2, **environment(proxy.address))
    assert (proxy.disturbed > 0) == bool(how)
    tiny.assert_same_run(tmp_path / "run", from_disk)


def test_a_store_that_is_away_for_a_while_changes_nothing(proxy, corpus, from_disk, tmp_path):
    ranks = tiny.start(from_store(corpus, tmp_path), 2, **environment(proxy.address))
    tiny.wait_until(lambda: any("shard-" in path and method == "GET" for method, path in proxy.asked), "a read")
    proxy.disturb = "silent"
    tiny.wait_until(lambda: proxy.disturbed > 8, "repeated requests")
    proxy.disturb = ""
    ranks.succeed()
    tiny.assert_same_run(tmp_path / "run", from_disk)


def never_patient():
    object_storage.PATIENCE_S = 1.0


@pytest.mark.parametrize("how", ["silent", "forbidden"])
def test_a_store_that_stays_away_ends_all_ranks_with_one_sentence(proxy, corpus, tmp_path, how):
    ranks = tiny.start(from_store(corpus, tmp_path), 2, [never_patient], **environment(proxy.address))
    tiny.wait_until(lambda: any("shard-" in path and method == "GET" for method, path in proxy.asked), "a read")
    proxy.disturb = how
    assert all(ranks.wait())
    expected = "could not be reached" if how == "silent" else "may not be read or written"
    assert expected in ranks.output and "Traceback" not in ranks.output
    status = json.loads((tmp_path / "run" / "status.json").read_text())
    assert status["state"] == "failed" and status["retry"] == (how == "silent")

import json
import shutil
import socket
import subprocess
import time

import httpx
import numpy as np
import pytest
from tests.unit.coordinator.registry_kit import FakeRegistry
from tests.unit.coordinator.test_model_repository import commit, read, weights

from liberatai_coordinator.repository import care, signing, tensor_file, tensors, trust
from liberatai_coordinator.repository.descriptors import MANIFEST, WEIGHT_RAW, Manifest, describe, encode
from liberatai_coordinator.repository.names import parse_place
from liberatai_coordinator.repository.remote import credentials, registry, transfer
from liberatai_coordinator.repository.remote.registry import Registry
from liberatai_coordinator.repository.store import Store
from liberatai_core.errors import (
    ConfigError,
    DigestError,
    LiberataiError,
    RegistryError,
    SignatureError,
    StateError,
)
from liberatai_core.structure import Structure, Tensor

PLACE = parse_place("localhost:5000/lab/digits:v1")


def at(fake, login=None):
    return Registry(
        PLACE.host, PLACE.name, transport=fake.transport(), login=lambda *_: login, pause=lambda _s: None
    )


@pytest.fixture
def two(tmp_path):
    first, second = Store(tmp_path / "first"), Store(tmp_path / "second")
    trust.trust(second.folder, "first", signing.public_key(trust.own_key(first.folder)), ("digits",))
    return first, second


def pushed(store, fake, loaded, **options):
    with at(fake) as there:
        return transfer.push(store, loaded.digest, PLACE, there, **options)


def fetched(store, fake, **options):
    with at(fake) as there:
        return transfer.fetch(store, PLACE, there, **options)


def test_a_commit_its_parents_and_signatures_travel_and_come_back_bit_for_bit(two):
    first, second = two
    fake = FakeRegistry()
    one = commit(first, weights(1))
    values = weights(1)
    values[3] = 7
    last = commit(first, values, one, message="b")
    assert pushed(first, fake, last).commits == 2
    assert pushed(first, fake, last).commits == 0

    found = fetched(second, fake)
    assert (found.loaded.digest, found.commits, found.name) == (last.digest, 2, "digits:v1")
    assert np.array_equal(read(second, found.loaded), values)
    assert [entry.digest for entry in second.log([last.digest])] == [last.digest, one.digest]
    assert care.verify(second, last.digest) == []
    assert fetched(second, fake).commits == 0


def test_what_an_unknown_key_signed_is_refused_before_its_files_come(two):
    first, second = two
    fake = FakeRegistry()
    made = commit(first, weights(1))
    pushed(first, fake, made)
    trust.distrust(second.folder, signing.public_key(trust.own_key(first.folder)))
    with pytest.raises(SignatureError, match="models trust"):
        fetched(second, fake)
    assert not second.layout.has(first.layers(made.commit.variants[0])[0].digest)
    assert second.names() == []
    trust.trust(second.folder, "first", signing.public_key(trust.own_key(first.folder)), ("digits",))
    assert fetched(second, fake).loaded.digest == made.digest


def test_a_tag_that_went_back_or_was_exchanged_is_refused(two):
    first, second = two
    fake = FakeRegistry()
    one = commit(first, weights(1))
    last = commit(first, weights(2), one, message="b")
    pushed(first, fake, last)
    fetched(second, fake)
    fake.manifests["v1"] = fake.manifests[one.digest]
    with pytest.raises(StateError, match="went back"):
        fetched(second, fake)
    assert second.find("digits:v1") == last.digest
    assert fetched(second, fake, force=True).loaded.digest == one.digest
    trust.trust(second.folder, "first", signing.public_key(trust.own_key(first.folder)), ("*",))
    other = commit(first, weights(3), model="other")
    fake.manifests.pop("v1")
    pushed(first, fake, other)
    with pytest.raises(StateError, match="exchanged"):
        fetched(second, fake)


def test_who_pushed_meanwhile_is_not_overwritten(two):
    first, second = two
    fake = FakeRegistry()
    base = commit(first, weights(1))
    pushed(first, fake, base)
    fetched(second, fake)
    theirs = commit(second, weights(2), second.read(base.digest), message="theirs", branch="v1")
    trust.trust(first.folder, "second", signing.public_key(trust.own_key(second.folder)), ("digits",))
    pushed(second, fake, theirs)
    mine = commit(first, weights(3), base, message="mine")
    with pytest.raises(StateError, match="not here"):
        pushed(first, fake, mine)
    found = fetched(first, fake)
    with pytest.raises(StateError, match="does not come from"):
        pushed(first, fake, mine)
    both = commit(first, weights(4), mine, found.loaded, message="both")
    assert pushed(first, fake, both).commits == 2
    assert fetched(second, fake).loaded.digest == both.digest
    assert second.find("digits:v1") == both.digest


@pytest.mark.parametrize("damaged", ["index", "record", "layer", "signature"])
def test_what_is_not_what_it_says_is_refused(two, damaged):
    first, second = two
    fake = FakeRegistry()
    made = commit(first, weights(1))
    pushed(first, fake, made)
    manifest = first.referrers.of(made.digest).manifests[0].digest
    fake.damage.add(
        {
            "index": made.manifests[1].digest,
            "record": made.manifests[0].digest,
            "layer": first.layers(made.commit.variants[0])[0].digest,
            "signature": manifest,
        }[damaged]
    )
    with pytest.raises(DigestError):
        fetched(second, fake)
    assert second.names() == []
    fake.damage.clear()
    assert fetched(second, fake).name == "digits:v1"
    assert care.verify(second, made.digest) == []


def test_uploads_and_downloads_go_on_after_cuts(two, monkeypatch):
    first, second = two
    monkeypatch.setattr(registry, "PIECE_BYTES", 1000)
    monkeypatch.setattr(registry, "READ_BYTES", 300)
    fake = FakeRegistry(cuts=10)
    values = weights(1)
    made = commit(first, values)
    with at(fake) as there:
        transfer.push(first, made.digest, PLACE, there)
        whole = sum(map(len, fake.blobs.values())) + sum(len(one) for one, _ in set(fake.manifests.values()))
        assert there.sent_bytes < whole + 10 * 1000 + 5000
    fake.cuts = 10
    assert np.array_equal(read(second, fetched(second, fake).loaded), values)
    fake.cuts, fake.ranges = 3, False
    third = Store(second.folder.parent / "third")
    trust.trust(third.folder, "first", signing.public_key(trust.own_key(first.folder)), ("digits",))
    assert np.array_equal(read(third, fetched(third, fake).loaded), values)


def test_a_killed_push_goes_on_where_the_registry_stands(two, monkeypatch):
    first, _ = two
    monkeypatch.setattr(registry, "PIECE_BYTES", 1000)
    fake = FakeRegistry()
    made = commit(first, weights(1))
    layer = first.layers(made.commit.variants[0])[0]

    def die(what, done, _whole):
        if "safetensors" in what and done >= 5000:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pushed(first, fake, made, progress=die)
    before = fake.received
    pushed(first, fake, made)
    assert fake.received - before < layer.size - 4000
    assert layer.digest in fake.blobs


def test_a_registry_that_refuses_pieces_gets_blobs_whole(two):
    first, second = two
    fake = FakeRegistry(pieces=False)
    values = weights(1)
    pushed(first, fake, commit(first, values))
    assert np.array_equal(read(second, fetched(second, fake).loaded), values)


def test_a_token_is_asked_for_with_the_login_and_only_at_the_registrys_own_door(two):
    first, _ = two
    fake = FakeRegistry(login="user:secret")
    made = commit(first, weights(1))
    for login in (None, ("user", "wrong")):
        with at(fake, login) as there, pytest.raises(RegistryError):
            transfer.push(first, made.digest, PLACE, there)
    with at(fake, ("user", "secret")) as there:
        transfer.push(first, made.digest, PLACE, there)
    assert PLACE.tag in fake.manifests
    asked = []

    def answer(request):
        asked.append(str(request.url))
        return httpx.Response(
            401, headers={"WWW-Authenticate": 'Bearer realm="http://elsewhere.example.org/token"'}
        )

    transport = httpx.MockTransport(answer)
    with (
        Registry("r.example.org", "a", transport=transport, login=lambda *_: ("u", "p")) as there,
        pytest.raises(RegistryError, match="will not ask"),
    ):
        there.manifest("v1")
    assert all("elsewhere" not in url for url in asked)


def test_a_model_of_somebody_else_is_imported_once(two):
    _, store = two
    fake = FakeRegistry()
    shape = Structure("tensors", {}, (Tensor("w", (3, 2)),))
    content = tensor_file.encode(shape, np.arange(6, dtype=np.float32), {})
    config = b'{"descriptor":{},"config":{},"modelfs":{"type":"layers","diffIds":[]}}'
    layer = describe(content, WEIGHT_RAW, {"org.cncf.model.filepath": "model.safetensors"})
    manifest = encode(
        Manifest(schema_version=2, config=describe(config, "application/json"), layers=(layer,))
    )
    fake.blobs = {layer.digest: content, describe(config, "x").digest: config}
    fake.manifests["v1"] = (manifest, MANIFEST)
    found = fetched(store, fake, model="theirs")
    assert (found.name, found.imported) == ("theirs:v1", True)
    variant = found.loaded.commit.variants[0]
    assert tensors.read(store, variant).tolist() == [0, 1, 2, 3, 4, 5]
    assert found.loaded.commit.origin.startswith("localhost:5000/lab/digits@sha256:")
    assert fetched(store, fake, model="theirs").commits == 0
    hostile = b"\x80\x04pickle"
    bad = describe(hostile, WEIGHT_RAW, {"org.cncf.model.filepath": "model.bin"})
    fake.blobs[bad.digest] = hostile
    fake.manifests["v1"] = (
        encode(Manifest(schema_version=2, config=describe(config, "application/json"), layers=(bad,))),
        MANIFEST,
    )
    with pytest.raises(LiberataiError) as refused:
        fetched(store, fake, model="theirs")
    assert refused.value.code == "E_UNSAFE"


def test_logins_are_found_where_docker_and_podman_put_them(tmp_path, monkeypatch):
    for name in ("DOCKER_CONFIG", "REGISTRY_AUTH_FILE", "XDG_RUNTIME_DIR", "LIBERATAI_REGISTRY_PASSWORD"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert credentials.login_for("r.example.org", "a/b") is None
    podman = tmp_path / "run" / "containers" / "auth.json"
    podman.parent.mkdir(parents=True)
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path / "run"))
    podman.write_text(
        json.dumps({"auths": {"r.example.org": {"auth": "dTpw"}, "r.example.org/a": {"auth": "YTpi"}}})
    )
    assert credentials.login_for("r.example.org", "x") == ("u", "p")
    assert credentials.login_for("r.example.org", "a/b") == ("a", "b")
    helper = tmp_path / "bin" / "docker-credential-test"
    helper.parent.mkdir()
    helper.write_text('#!/bin/sh\nread host\necho "{\\"Username\\":\\"$host\\",\\"Secret\\":\\"s\\"}"\n')
    helper.chmod(0o755)
    monkeypatch.setenv("PATH", f"{helper.parent}:/usr/bin:/bin")
    docker = tmp_path / ".docker" / "config.json"
    docker.parent.mkdir()
    docker.write_text(json.dumps({"credHelpers": {"h.example.org": "test", "n.example.org": "none"}}))
    assert credentials.login_for("h.example.org", "x") == ("h.example.org", "s")
    with pytest.raises(ConfigError, match="not installed"):
        credentials.login_for("n.example.org", "x")
    docker.write_text("not json")
    with pytest.raises(ConfigError):
        credentials.login_for("h.example.org", "x")
    monkeypatch.setenv("LIBERATAI_REGISTRY_USER", "me")
    monkeypatch.setenv("LIBERATAI_REGISTRY_PASSWORD", "mine")
    assert credentials.login_for("h.example.org", "x") == ("me", "mine")


@pytest.fixture
def real(tmp_path):
    if shutil.which("docker-registry") is None or shutil.which("skopeo") is None:
        pytest.skip("docker-registry or skopeo is not installed (apt-get install docker-registry skopeo)")
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    config = tmp_path / "registry.yml"
    config.write_text(
        f"version: 0.1\nstorage: {{filesystem: {{rootdirectory: {tmp_path}/registry}}}}\n"
        f"http: {{addr: '127.0.0.1:{port}'}}\nlog: {{level: error}}\n"
    )
    with subprocess.Popen(
        ["docker-registry", "serve", str(config)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    ) as process:
        try:
            deadline = time.monotonic() + 60
            while True:
                try:
                    socket.create_connection(("127.0.0.1", port), 1).close()
                    break
                except OSError:
                    assert time.monotonic() < deadline
                    time.sleep(0.02)
            yield f"127.0.0.1:{port}"
        finally:
            process.terminate()


def test_the_real_registry_and_skopeo_keep_every_digest(two, real, tmp_path):
    first, second = two
    one = commit(first, weights(1))
    values = weights(1)
    values[9] = -2
    last = commit(first, values, one, message="b")
    place = parse_place(f"{real}/lab/digits:v1")
    with Registry(place.host, place.name) as there:
        transfer.push(first, last.digest, place, there)
        assert np.array_equal(read(second, transfer.fetch(second, place, there).loaded), values)
    target = tmp_path / "copied"
    copy = [
        "skopeo",
        "copy",
        "--all",
        "--preserve-digests",
        "--src-tls-verify=false",
        "--dest-tls-verify=false",
    ]
    docker = f"docker://{real}/lab/digits"
    subprocess.run([*copy, f"{docker}:v1", f"oci:{target}:v1"], check=True, capture_output=True)
    (copied,) = json.loads((target / "index.json").read_bytes())["manifests"]
    assert copied["digest"] == last.digest
    subprocess.run([*copy, f"oci:{target}:v1", f"{docker}2:v1"], check=True, capture_output=True)
    with Registry(place.host, "lab/digits2") as there:
        assert there.has_manifest("v1") == last.digest
        for one_manifest in last.manifests:
            assert there.has_manifest(one_manifest.digest) == one_manifest.digest

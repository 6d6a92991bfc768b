"""examples/serve: the service as a process, asked over HTTP, overloaded, stopped, and its page in a browser."""

import base64
import concurrent.futures
import contextlib
import http.client
import io
import json
import os
import re
import runpy
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import pytest
from PIL import Image

import internvit
from internvit.data import Embedder
from tests.support import ROOT
from tests.support.models import CONFIGS, random_weights

pytest.importorskip("fastapi", reason="the serve extra is not installed")
pytest.importorskip("uvicorn", reason="the serve extra is not installed")
pytest.importorskip("prometheus_client", reason="the serve extra is not installed")

SERVE = ROOT / "examples" / "serve"


class Server(NamedTuple):
    process: subprocess.Popen
    port: int
    embedder: Embedder

    def ask(self, path: str, body: bytes | None = None) -> tuple[int, bytes]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        with contextlib.closing(connection):
            connection.request("GET" if body is None else "POST", path, body)
            answer = connection.getresponse()
            return answer.status, answer.read()

    def check(self, body: bytes, pooling: str = "class") -> int:
        """The status of /embed; an embedding is compared with the library's own of the image."""
        status, content = self.ask(f"/embed?pooling={pooling}", body)
        if status == 200:
            answer = json.loads(content)
            tokens = self.embedder({"image": [body]})["features"][0]
            expected = tokens[0] if pooling == "class" else tokens[1:].mean(0)
            assert np.allclose(answer["embedding"], expected, rtol=1e-4, atol=1e-4)
            assert (answer["height"], answer["width"]) == self.embedder.preprocess(body).shape[1:3]
        return status


@contextlib.contextmanager
def serving(folder, *options: str, change=lambda model: None) -> Iterator[Server]:
    model = internvit.InternViT(CONFIGS["tiny-layer_norm"]).eval()
    random_weights(model)
    change(model)
    model.save_pretrained(folder)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, str(SERVE / "serve_features.py"), "--weights", str(folder), "--size", "image"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen([*command, "--port", str(port), *options], env=environment)
    server = Server(process, port, Embedder(model, size="image", pooling="tokens"))
    try:
        for _ in range(600):
            with contextlib.suppress(OSError):
                if server.ask("/healthz")[0] == 200:
                    break
            assert process.poll() is None, "the service did not start"
            time.sleep(0.1)
        yield server
    finally:
        process.kill()
        process.wait()


@pytest.fixture(scope="module")
def server(tmp_path_factory) -> Iterator[Server]:
    """A service with places for eight requests and small limits."""
    with serving(
        tmp_path_factory.mktemp("weights"), "--queue", "8", "--max-bytes", "200000", "--max-pixels", "90000"
    ) as s:
        yield s


def encoded(height: int, width: int, kind: str = "PNG") -> bytes:
    out = io.BytesIO()
    pixels = np.random.default_rng(height * width).integers(0, 255, (height, width, 3), np.uint8)
    Image.fromarray(pixels).save(out, kind)
    return out.getvalue()


def test_features_are_the_librarys_own(server) -> None:
    for body in (encoded(60, 80), encoded(100, 40, "JPEG")):
        assert server.check(body) == 200
        assert server.check(body, "mean") == 200
    status, content = server.ask("/patches", encoded(60, 80))
    answer = json.loads(content)
    vectors = np.frombuffer(base64.b64decode(answer["vectors"]), "<f4").reshape(-1, answer["channels"])
    assert status == 200
    assert len(vectors) == answer["rows"] * answer["columns"] == 4 * 6
    assert np.allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)


def test_bad_uploads_are_refused(server) -> None:
    bomb = io.BytesIO()
    Image.new("1", (30_000, 30_000)).save(bomb, "PNG")
    cases = {
        b"": 400,
        b"no image": 400,
        encoded(60, 80)[:400]: 400,
        bomb.getvalue(): 413,
        encoded(301, 300, "JPEG"): 413,
        bytes(200_001): 413,
    }
    for body, expected in cases.items():
        status, content = server.ask("/embed", body)
        assert (status, "image" in json.loads(content)["detail"]) == (expected, True), content
    assert server.ask("/embed?pooling=max", encoded(28, 28))[0] == 422
    assert server.ask("/embed")[0] == 405
    assert server.check(encoded(28, 28)) == 200


def test_many_clients_of_many_sizes_get_their_own_features(server) -> None:
    bodies = [encoded(28 + 14 * (i % 5), 28 + 14 * (i % 3)) for i in range(32)]
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        assert set(pool.map(server.check, bodies)) == {200}
    status, text = server.ask("/metrics")
    assert status == 200
    assert b'internvit_answers_total{path="/embed",status="200"}' in text


def test_more_requests_than_places_are_refused_and_none_is_lost(server) -> None:
    bodies = [encoded(150, 150) for _ in range(96)]
    with concurrent.futures.ThreadPoolExecutor(48) as pool:
        statuses = list(pool.map(server.check, bodies))
    assert set(statuses) <= {200, 503}
    assert 503 in statuses
    assert statuses.count(200) >= 8
    assert json.loads(server.ask("/healthz")[1])["in_process"] == 0


def test_sigterm_answers_what_was_accepted(tmp_path) -> None:
    with serving(tmp_path, "--batch", "1") as server, concurrent.futures.ThreadPoolExecutor(8) as pool:
        answers = [pool.submit(server.check, encoded(400, 400)) for _ in range(8)]
        while json.loads(server.ask("/healthz")[1])["in_process"] < 8 and not all(a.done() for a in answers):
            time.sleep(0.01)
        server.process.send_signal(signal.SIGTERM)
        assert [answer.result() for answer in answers] == [200] * 8
        assert server.process.wait(30) in (0, -signal.SIGTERM)
        with pytest.raises(OSError, match="refused"):
            server.ask("/healthz")


@contextlib.contextmanager
def stalled(port: int, number: int) -> Iterator[list[socket.socket]]:
    """Clients that promise a body and do not send it."""
    with contextlib.ExitStack() as stack:
        clients = [stack.enter_context(socket.create_connection(("127.0.0.1", port))) for _ in range(number)]
        for client in clients:
            client.sendall(b"POST /embed HTTP/1.1\r\nHost: a\r\nContent-Length: 1000\r\n\r\nabc")
            client.settimeout(30)
        yield clients


@pytest.mark.sampled(4)
def test_stalled_uploads_give_their_places_back(tmp_path) -> None:
    with serving(tmp_path, "--queue", "2", "--upload-seconds", "3") as server, stalled(server.port, 2) as clients:
        for client in clients:
            with client.makefile("rb") as file:  # until the service closes the connection
                answer = file.read()
            assert answer.startswith(b"HTTP/1.1 408 "), answer
            assert b"expected all bytes within 3 s, got 3" in answer
        assert server.check(encoded(28, 28)) == 200


@pytest.mark.sampled(4)
def test_sigterm_does_not_wait_for_stalled_uploads(tmp_path) -> None:
    options = ("--upload-seconds", "600", "--shutdown-seconds", "1")
    with serving(tmp_path, *options) as server, stalled(server.port, 1):
        for _ in range(3000):
            if json.loads(server.ask("/healthz")[1])["in_process"] == 1:
                break
            time.sleep(0.01)
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(30) in (0, -signal.SIGTERM)


@pytest.mark.sampled(4)
def test_features_that_are_not_finite_are_no_answer(tmp_path) -> None:
    """float16 ends at 65504."""

    def past_float16(model: internvit.InternViT) -> None:
        model.embeddings.position_embedding.data.fill_(60_000)
        model.encoder.layers[-1].ls2.data.fill_(1e4)

    with serving(tmp_path, "--dtype", "float16", change=past_float16) as server:
        for path in ("/embed", "/embed?pooling=mean", "/patches"):
            status, content = server.ask(path, encoded(28, 28))
            assert status == 500
            assert re.search("image: .*float16", json.loads(content)["detail"]), content


def test_options_are_checked(monkeypatch, capsys) -> None:
    main = runpy.run_path(str(SERVE / "serve_features.py"))["main"]
    call = ["serve_features.py", "--weights", "nowhere"]
    monkeypatch.setattr("sys.argv", [*call, "--queue", "0"])
    with pytest.raises(SystemExit):
        main()
    assert "--queue must be at least 1" in capsys.readouterr().err
    monkeypatch.setattr("sys.argv", [*call, "--precision", "int8", "--dtype", "float32"])
    with pytest.raises(SystemExit):
        main()
    assert "--precision int8 computes in bfloat16, got --dtype float32" in capsys.readouterr().err
    monkeypatch.setattr("sys.argv", call)
    with pytest.raises((OSError, ValueError), match="nowhere"):
        main()


@pytest.mark.sampled(3)
@pytest.mark.parametrize(
    ("options", "dtype"), [([], "float32"), (["--precision", "int8"], "bfloat16"), (["--dtype", "float16"], "float16")]
)
def test_the_dtype_follows_from_the_precision(options, dtype, monkeypatch) -> None:
    made = {}

    def embedder(source: str, **settings) -> None:
        made.update(settings)
        raise SystemExit

    main = runpy.run_path(str(SERVE / "serve_features.py"))["main"]
    monkeypatch.setitem(main.__globals__, "Embedder", embedder)
    monkeypatch.setattr("sys.argv", ["serve_features.py", "--weights", "nowhere", *options])
    with pytest.raises(SystemExit):
        main()
    assert made["dtype"] == dtype


@pytest.mark.slow
def test_a_load_of_twice_the_capacity(server, tmp_path) -> None:
    for i in range(8):
        (tmp_path / f"{i}.png").write_bytes(encoded(140 + 14 * (i % 3), 140))
    command = [sys.executable, str(SERVE / "load_test.py"), f"http://127.0.0.1:{server.port}", str(tmp_path)]
    done = subprocess.run(
        [*command, "--seconds", "5", "--loads", "2", "--pid", str(server.process.pid)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert server.check(encoded(28, 28)) == 200


@pytest.mark.slow
def test_the_page_in_a_browser(server, tmp_path) -> None:
    skimage = pytest.importorskip("skimage", reason="scikit-image is not installed")
    webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed")
    waiting = pytest.importorskip("selenium.webdriver.support.wait")
    chromium, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if not chromium or not driver:
        pytest.skip("chromium and chromedriver are not installed")
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for argument in (
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--window-size=900,1200",
        f"--user-data-dir={tmp_path}",
    ):
        options.add_argument(argument)
    picture = tmp_path / "photo.jpg"
    Image.fromarray(skimage.data.astronaut()).resize((280, 280)).save(picture)
    browser = webdriver.Chrome(options, webdriver.ChromeService(driver))
    try:
        browser.get(f"http://127.0.0.1:{server.port}/")
        status, canvas = browser.find_element("id", "status"), browser.find_element("id", "canvas")
        browser.find_element("id", "file").send_keys(str(picture))
        wait = waiting.WebDriverWait(browser, 30)
        wait.until(lambda _: "20 × 20 patches" in status.text)
        before = browser.execute_script("return canvas.toDataURL()")
        webdriver.ActionChains(browser).move_to_element(canvas).click().perform()
        wait.until(lambda _: "cosine 1 with itself" in status.text)
        row, column = (int(number) - 1 for number in re.findall(r"Row (\d+), column (\d+)", status.text)[0])
        assert {row, column} <= {9, 10}, "a click in the middle"
        assert browser.execute_script("return canvas.toDataURL()") != before
        shown = np.array(
            browser.execute_script("return Array.from(similarities(arguments[0], arguments[1]))", row, column)
        ).reshape(20, 20)
        tokens = server.embedder({"image": [picture.read_bytes()]})["features"][0][1:]
        tokens /= np.linalg.norm(tokens, axis=1, keepdims=True)
        assert np.allclose(shown, (tokens @ tokens[row * 20 + column]).reshape(20, 20), atol=1e-4)
        bad = tmp_path / "bad.jpg"
        bad.write_bytes(b"no image")
        browser.find_element("id", "file").send_keys(str(bad))
        wait.until(lambda _: "This did not work" in status.text)
        assert not canvas.is_displayed()
    finally:
        browser.quit()

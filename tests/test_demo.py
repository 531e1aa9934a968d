"""The demo: what its server answers and refuses, the job that runs it, and its page in a browser."""

import base64
import contextlib
import http.client
import io
import itertools
import json
import re
import signal
import subprocess
import sys
import threading
import zlib

import numpy as np
import pytest
from browser import browser
from conftest import patience
from PIL import Image
from test_api import folder  # noqa: F401 (a fixture)

import igpt_jax
from igpt_jax.data.images import decode
from igpt_jax.demo.server import MAX_UPLOAD, Server


@pytest.fixture(scope="module")
def model(folder):  # noqa: F811
    return igpt_jax.load(folder / "runs/pretrain")


@pytest.fixture
def server(model):
    """A server in this process, with one example."""
    with Server("127.0.0.1", 0) as server:
        server.model, server.example = model, lambda number: np.full((8, 8, 3), number % 256, np.uint8)
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def request(server, method, path, body=None, headers=()):
    """The answer, whose body may still be on its way."""
    connection = http.client.HTTPConnection("127.0.0.1", server.server_address[1], timeout=patience())
    connection.request(method, path, body, dict(headers))
    return connection.getresponse()


def post(server, path, body=None):
    """The lines of an answer."""
    answer = request(server, "POST", path, body)
    assert answer.status == 200, answer.read()
    return [json.loads(line) for line in answer]


def png(*shape):
    file = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, shape, np.uint8)).save(file, "PNG")
    return file.getvalue()


def pixels(line, n):
    """The rows of a line, uint8 [n, rows, 8, 3]."""
    return np.frombuffer(base64.b64decode(line["pixels"]), np.uint8).reshape(n, -1, 8, 3)


def test_a_picture_is_analyzed_and_completed(server, model):
    """As the Python interface does it. Seen to fail with rows sent one late, and with the classes' order reversed."""
    picture = png(20, 24, 3)
    first, *rows, last = post(server, "/complete?rows=3&n=3&temperature=0.5&seed=7", picture)
    image = decode(picture, 8)
    assert base64.b64decode(first["picture"]) == model.quantize(image).tobytes()
    np.testing.assert_allclose(np.reshape(first["nats"], (8, 8)), model.nats(image, per_pixel=True)[0], atol=1e-3)
    assert [int(name) for name, _ in first["classes"]] == np.argsort(-model.probabilities(image)[0])[:3].tolist()
    assert [line["row"] for line in rows] == [0, 4, 5, 6, 7] and last["done"] >= 0
    np.testing.assert_array_equal(np.concatenate([pixels(line, 3) for line in rows], axis=1),
                                  model.complete(image, rows=3, n=3, temperature=0.5, seed=7)[0])
    assert post(server, "/complete?example=9&n=1")[0]["picture"] == base64.b64encode(
        model.quantize(np.full((8, 8, 3), 9, np.uint8))).decode()


def test_samples_are_those_of_the_python_interface(server, model):
    *rows, last = post(server, "/sample?n=2&seed=4")
    assert [line["row"] for line in rows] == list(range(8)) and "done" in last and server.drawn == 2
    np.testing.assert_array_equal(np.concatenate([pixels(line, 2) for line in rows], axis=1), model.sample(2, seed=4))


def test_rows_come_as_they_are_drawn(server, model, monkeypatch):
    """The first row arrives while the second is not drawn yet. A reader who leaves frees the model for others.

    Seen to hang with the lines joined before they are sent.
    """
    wait = threading.Event()

    def rows(*_, **__):
        yield np.zeros((1, 1, 8, 8, 3), np.uint8)
        assert wait.wait(patience())
        yield from itertools.repeat(np.zeros((1, 1, 8, 8, 3), np.uint8))

    monkeypatch.setattr(model, "complete_by_row", rows)
    answer = request(server, "POST", "/sample")
    assert json.loads(answer.readline())["row"] == 0
    wait.set()
    answer.close()
    assert server.turn.acquire(timeout=patience())
    server.turn.release()


def test_an_error_while_drawing_is_the_last_line(server, model, monkeypatch):
    """After the rows that were drawn."""
    def rows(*_, **__):
        yield np.zeros((1, 1, 8, 8, 3), np.uint8)
        raise igpt_jax.UserError("its logits are not finite")

    monkeypatch.setattr(model, "complete_by_row", rows)
    assert post(server, "/sample")[-1] == {"error": "its logits are not finite"}


def bomb():
    """A PNG of few bytes whose header says 60,000 x 60,000 pixels."""
    data = bytearray(png(8, 8, 3))
    data[16:24] = (60_000).to_bytes(4, "big") * 2
    data[29:33] = zlib.crc32(data[12:29]).to_bytes(4, "big")
    return bytes(data)


@pytest.mark.parametrize("path, body, headers, status, message", [
    ("/complete", b"not a picture", {}, 400, "not a JPEG, PNG or WebP"),
    ("/complete", b"", {}, 400, "empty file"),
    ("/complete", png(7, 9, 3), {}, 400, "9x7: smaller than 8 pixels"),
    ("/complete", bomb(), {}, 400, "more than"),
    ("/complete", b"0" * (MAX_UPLOAD + 1), {}, 413, "larger than 32 MiB"),
    ("/complete", b"", {"Content-Length": "-1"}, 411, "no picture"),
    ("/complete", b"", {"Content-Length": "abc"}, 411, "no picture"),
    ("/complete?rows=8", png(8, 8, 3), {}, 400, "rows='8' must be a number from 0 to 7"),
    ("/complete?example=-1", None, {}, 400, "example='-1' must be"),
    ("/sample?n=17", None, {}, 400, "n='17' must be a number from 1 to 16"),
    ("/sample?temperature=nan", None, {}, 400, "temperature='nan' must be"),
    ("/sample?seed=1e3", None, {}, 400, "seed='1e3' must be"),
    ("/nothing", None, {}, 404, "no such page"),
    ("/sample", None, {"Host": "evil.example:8000"}, 403, "this server is not 'evil.example:8000'"),
    ("/sample", None, {"Host": "127.0.0.1.evil.example"}, 403, "this server is not"),
    ("/sample", None, {"Host": ""}, 403, "this server is not ''"),
    ("/sample", None, {"Host": "localhost", "Origin": "http://evil.example"}, 403, "pages of http://evil.example"),
    ("/sample", None, {"Host": "localhost:8000", "Origin": "null"}, 403, "pages of null"),
])
def test_what_is_refused(server, path, body, headers, status, message):
    """Each with its reason, and nothing is drawn. Seen to fail without the checks of the origin and of the length."""
    answer = request(server, "POST", path, body, headers)
    assert (answer.status, server.drawn) == (status, 0)
    assert message in json.loads(answer.read())["error"]


@pytest.mark.parametrize("host", ["localhost", "127.0.0.1:1", "[::1]:8000", "192.168.0.7:80", "LOCALHOST:9000"])
def test_names_of_this_machine_are_answered(server, host):
    """Through tunnels with other ports too."""
    headers = {"Host": host, "Origin": f"http://{host}"}
    assert json.loads(request(server, "GET", "/model", headers=headers).read())["image_size"] == 8
    assert request(server, "GET", "/", headers={"Host": "evil.example"}).status == 403


def test_the_page_loads_nothing_from_elsewhere(server):
    """Its policy forbids it, and it does not try."""
    answer = request(server, "GET", "/")
    page = answer.read().decode()
    assert "default-src 'none'" in answer.headers["Content-Security-Policy"]
    assert not re.findall(r"(?:https?:)?//[\w.]+\.\w+", page)
    assert "Python" not in answer.headers["Server"]


@contextlib.contextmanager
def job(folder, *arguments):  # noqa: F811
    command = [sys.executable, "-m", "igpt_jax", "demo", f"--config.checkpoint={folder}/runs/pretrain", *arguments]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, cwd=folder, env=None) as process:
        try:
            yield process
        finally:
            process.kill()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_job_serves_until_a_signal(folder, number):  # noqa: F811
    """It then ends with 0, in one line, and has written nothing. A second one on its port is refused in one line.
    """
    before = sorted(folder.rglob("*"))
    with job(folder, "--config.port=0") as process:
        url = next(found[0] for line in process.stderr if (found := re.search(r"http://127.0.0.1:(\d+)/", line)))
        port = re.search(r":(\d+)/", url)[1]
        connection = http.client.HTTPConnection("127.0.0.1", int(port), timeout=patience())
        connection.request("GET", "/model")
        assert json.loads(connection.getresponse().read())["classifier"] == "linear probe of layer 3"
        if number == signal.SIGINT:
            with job(folder, f"--config.port={port}") as second:
                told = second.communicate(timeout=patience())[1]
                assert second.returncode == 2 and len(told.splitlines()) == 1 and "cannot listen there: Address" in told
        process.send_signal(number)
        told = process.communicate(timeout=patience())[1]
    assert process.returncode == 0 and "igpt_jax demo: done. drawn 0" in told and "Traceback" not in told
    assert sorted(folder.rglob("*")) == before


@pytest.mark.parametrize("arguments, message", [
    (["--config.host=256.0.0.1"], "cannot listen there"), (["--config.port=70000"], "port=70000 must lie in"),
    (["--config.checkpoint=none"], "holds no checkpoint"),
    (["--config.checkpoint=runs/masked"], "objective=masked, which cannot draw"),
    (["--config.data.store=none"], "none"),
])
def test_mistakes_are_one_line(folder, arguments, message):  # noqa: F811
    with job(folder, "--config.port=0", *arguments) as process:
        told = process.communicate(timeout=patience())[1]
    assert process.returncode == 2 and message in told and len(told.splitlines()) == 1, told


@pytest.mark.browser
@pytest.mark.parametrize("width, height", [(1280, 900), (390, 844)])
def test_a_person_completes_a_picture_in_a_browser(server, folder, tmp_path, width, height):  # noqa: F811
    """Upload, click, result. The page reports an unusable file and a stopped server. The console stays empty.

    Seen to fail with a script from another site in the page.
    """
    drawn = """return [...document.querySelectorAll(arguments[0] + ' canvas')].map(canvas => {
        const rgb = canvas.getContext('2d').getImageData(0, 0, 8, 8).data;
        return rgb.at(-1) && new Set(rgb).size; })"""  # the colors of a canvas, 0 if its last pixel is not drawn
    (tmp_path / "notes.txt").write_text("not a picture")
    with browser(width, height, tmp_path / "profile") as page:
        page.open(server.url)
        page.wait("return document.querySelector('#facts').textContent.includes('4 layers')")
        page.type("#file", str(folder / "digit.png"))
        page.wait("return document.querySelector('#status').textContent.startsWith('drawn in')")
        colors = page.script(drawn, "#completions")
        assert len(colors) == 4 and min(colors) > 4
        assert min(page.script(drawn, "#analysis")) > 4
        assert page.script("return document.querySelectorAll('#classes .bar').length") == 3
        page.script("document.querySelector('#rows').value = 2; document.querySelector('#n').value = 8")
        page.click("#complete")
        page.wait("return document.querySelectorAll('#completions canvas').length == 8 && "
                  "document.querySelector('#status').textContent.startsWith('drawn in')")
        page.click("#sample")
        page.wait("return document.querySelectorAll('#samples canvas').length == 8 && "
                  "document.querySelector('#status').textContent.startsWith('drawn in')")
        page.click("#example")
        page.wait("return document.querySelector('#hint').textContent.includes('of the data') && "
                  "document.querySelector('#status').textContent.startsWith('drawn in')")
        assert page.script("return document.documentElement.scrollWidth") <= width
        page.screenshot(tmp_path / "page.png")
        assert page.complaints() == []
        page.type("#file", str(tmp_path / "notes.txt"))
        page.wait("return document.querySelector('#status.bad')?.textContent == 'not a JPEG, PNG or WebP picture'")
        assert all("400" in complaint for complaint in page.complaints())
    with Image.open(tmp_path / "page.png") as shot:
        assert shot.width >= width and len(np.unique(np.asarray(shot.convert("L")))) > 50

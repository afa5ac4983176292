"""`tandem serve up` and `tandem serve deploy` as commands: a change under load, and a SIGTERM in the middle of streams."""

from __future__ import annotations

import signal
import sys
from pathlib import Path

import httpx
import pytest
import yaml
from commands import cluster_mark, gone, started, tandem
from serve_fixtures import free_port, write_model
from steady_load import SteadyLoad

from tandem.registry import Registry

ECHO = {"model": "parrot@1", "name": "parrot", "engine": "echo", "engine_args": {"delay_s": 0.05}, "max_adapters": 0}


def write(path: Path, **model: object) -> Path:
    """An app's config with one model."""
    path.write_text(yaml.safe_dump({"models": [model]}))
    return path


@pytest.mark.slow  # servers of its own, started and stopped by commands
def test_the_commands_change_what_is_served_and_let_streams_end(tmp_path: Path) -> None:
    home, port = tmp_path / "home", free_port()
    home.mkdir()
    config = write(tmp_path / "app.yaml", **ECHO)
    command = [sys.executable, "-m", "tandem", "serve", "up", "-c", str(config), "--port", str(port)]
    with started(command, home=home, log=tmp_path / "up.log") as up:
        up.wait_for("Ctrl-C ends it", timeout_s=120)
        mark = cluster_mark(home)
        again = tandem("serve", "up", "-c", str(config), "--port", str(port), home=home)
        assert again.returncode and "`tandem serve deploy MODEL`" in again.stdout
        # No address is given: it is that of this home's app.
        said = tandem("chat", "hello", home=home, TANDEM_API_URL=None, TANDEM_PORT=None)
        assert said.returncode == 0 and "hello" in said.stdout, said.stdout
        with SteadyLoad(f"http://127.0.0.1:{port}", "parrot") as load:
            load.wait_for(4)
            newer = write(tmp_path / "newer.yaml", **{**ECHO, "model": "parrot@2"})
            changed = tandem("serve", "deploy", "-c", str(newer), home=home)
            assert changed.returncode == 0, changed.stdout
            load.wait_for(8, "parrot@2")
            load.stop()
        assert not load.failed

        words = " ".join(f"word{number}" for number in range(60))
        asked = {"model": "parrot", "prompt": words, "stream": True}
        with httpx.stream("POST", f"http://127.0.0.1:{port}/v1/completions", json=asked, timeout=30) as answer:
            pieces = answer.iter_text()
            text = next(pieces)
            up.process.send_signal(signal.SIGTERM)
            text += "".join(pieces)
        assert text.endswith("data: [DONE]\n\n") and text.count("data: {") == 60
        assert up.process.wait(30) == 0
    assert gone(mark) == []


@pytest.mark.slow  # two starts of vLLM
def test_a_new_version_of_a_real_model_takes_over_under_load(tmp_path: Path) -> None:
    home, port = tmp_path / "home", free_port()
    home.mkdir()
    registry = Registry(f"sqlite:///{home}/tandem.db")
    registry.register_model("tiny", write_model(tmp_path / "one"))
    model = {"model": "tiny", "max_adapters": 0, "engine_args": {"max_model_len": 2048}}
    config = write(tmp_path / "app.yaml", **model)
    command = [sys.executable, "-m", "tandem", "serve", "up", "-c", str(config), "--port", str(port)]
    tokens = {"max_tokens": 80, "ignore_eos": True, "temperature": 0}
    with started(command, home=home, log=tmp_path / "up.log") as up:
        up.wait_for("Ctrl-C ends it", timeout_s=180)
        registry.register_model("tiny", write_model(tmp_path / "two", layers=3))
        with SteadyLoad(f"http://127.0.0.1:{port}", "tiny", tokens=tokens) as load:
            load.wait_for(16, "tiny@1")
            changed = tandem("serve", "deploy", "-c", str(config), home=home)
            assert changed.returncode == 0, changed.stdout
            load.wait_for(16, "tiny@2")
            load.stop()
        assert not load.failed
        # They are two models: greedy, they say different things to the same prompts.
        for number in range(8):
            assert load.texts[f"tiny@1 {number}"] != load.texts[f"tiny@2 {number}"]

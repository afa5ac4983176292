"""`tandem chat` against a real server on loopback, by its functions and as a process at a terminal."""

from __future__ import annotations

import contextlib
import http.server
import io
import os
import pty
import signal
import ssl
import subprocess
import sys
import threading
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path

import psutil
import pytest
from certificates import make_pair
from rich.console import Console

from tandem.cli.chat import Chat, Conversation, chat
from tandem.errors import ClusterError, ConfigError, EngineError, UnknownModelError
from tandem.sdk.talk import Talker

COMMAND = [sys.executable, "-c", "import typer; from tandem.cli.chat import chat_command; typer.run(chat_command)"]


def converse(server, *lines, model="base", key="right-key"):
    """The screen after a person typed `lines`, and the chat."""
    screen, typed = io.StringIO(), iter(lines)

    def read(prompt):
        try:
            return next(typed)
        except StopIteration:
            raise EOFError from None

    talker = Talker(api_url=server.url, api_key=key)
    console = Console(file=screen, width=120, highlight=False)
    session = Chat(talker=talker, model=model, conversation=Conversation(), console=console, read=read)
    session.run()
    return screen.getvalue(), session


def test_a_question_prints_only_its_answer(server, capsys):
    chat("base", question="hello there")
    assert capsys.readouterr().out == "base heard hello there \n"


def test_the_options_reach_the_server(server, capsys):
    chat("base", question="hi", system="Be short.", temperature=0.0, max_tokens=5)
    request = server.requests[0]
    assert (request["temperature"], request["max_tokens"], request["stream"]) == (0.0, 5, True)
    assert request["messages"] == [
        {"role": "system", "content": "Be short."},
        {"role": "user", "content": "hi"},
    ]


def test_options_that_are_not_given_are_left_to_the_server(server, capsys):
    chat("base", question="hi")
    assert "temperature" not in server.requests[0]
    assert "max_tokens" not in server.requests[0]


def test_without_a_model_the_only_one_is_asked(server, capsys):
    server.models = ["lonely"]
    chat(question="hi")
    assert capsys.readouterr().out == "lonely heard hi \n"


def test_without_a_model_several_are_a_choice_and_none_says_what_to_do(server):
    with pytest.raises(ConfigError, match=r"2 models are served; choose one as the model \(--model\): base, helper"):
        chat(question="hi")
    server.models = []
    with pytest.raises(EngineError, match="serves no model.*tandem serve up"):
        chat(question="hi")


def test_an_unknown_model_is_refused_with_the_nearest_and_the_list(server):
    with pytest.raises(UnknownModelError, match=r"'helpr'.*Did you mean 'helper'\? Served: base, helper\."):
        chat("helpr", question="hi")


def test_no_server_says_what_to_run():
    with pytest.raises(ClusterError, match=r"No server answers at http://127.0.0.1:1/v1.*tandem serve up"):
        chat("base", "http://127.0.0.1:1/v1", "k", question="hi")


def test_a_certificate_that_is_not_trusted_is_told_as_that(tmp_path: Path):
    pair = make_pair(tmp_path, "own", begins=datetime.now(UTC) - timedelta(days=1))
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(pair.certificate, pair.key)
    with http.server.HTTPServer(("127.0.0.1", 0), http.server.BaseHTTPRequestHandler) as listening:
        listening.socket = context.wrap_socket(listening.socket, server_side=True)
        threading.Thread(target=listening.serve_forever, daemon=True).start()
        with pytest.raises(
            ClusterError, match=r"certificate of https://127.0.0.1:\d+/v1 is not trusted.*SSL_CERT_FILE"
        ):
            chat("base", f"https://127.0.0.1:{listening.server_address[1]}/v1", "k", question="hi")
        listening.shutdown()


@pytest.mark.parametrize(
    ("question", "message"),
    [
        ("too long", r"answered 400: The prompt has 900 tokens; the model takes 512\.$"),
        ("busy", r"busy \(503\): No replica is ready\. Try again in 0 s"),
        ("busy and says when", r"busy \(503\): No replica is ready\. Try again in 5 s\.$"),
        ("crash", "answered 500"),
        ("break", "connection broke in the middle"),
        ("fail", "The engine died"),
    ],
)
def test_what_goes_wrong_is_one_clear_line(server, question, message):
    with pytest.raises(EngineError, match=message) as caught:
        chat("base", question=question)
    assert "\n" not in str(caught.value)


def test_a_wrong_key_says_where_to_set_it(server):
    with pytest.raises(ConfigError, match="refused the key: Incorrect API key provided. Set it with --api-key"):
        chat("base", api_key="wrong", question="hi")


def test_a_conversation_carries_what_was_said(server):
    screen, _ = converse(server, "first", "second")
    assert "base heard first" in screen
    assert "7 tokens" in screen
    assert [m["content"] for m in server.requests[1]["messages"]] == ["first", "base heard first ", "second"]


def test_clear_forgets_and_system_stays(server):
    converse(server, "/system Be kind.", "first", "/clear", "second", "/system", "third")
    assert [m["content"] for m in server.requests[1]["messages"]] == ["Be kind.", "second"]
    assert [m["role"] for m in server.requests[2]["messages"]] == ["user", "assistant", "user"]


def test_model_switches_and_an_unknown_one_does_not(server):
    screen, session = converse(server, "/model helper", "hi", "/model nope", "/models", "/model")
    assert session.model == "helper"
    assert "helper heard hi" in screen
    assert "No model 'nope' is served" in screen
    assert "* helper" in screen
    assert "  base" in screen


def test_a_mistyped_command_is_not_sent_to_the_model(server):
    screen, _ = converse(server, "/modles", "/help", "", "/quit", "never read")
    assert "/modles is no command. Did you mean '/models'?" in screen
    assert "/clear" in screen
    assert server.requests == []


def test_an_error_leaves_the_conversation_usable(server):
    screen, session = converse(server, "too long", "hi", "break")
    assert "answered 400: The prompt has 900 tokens" in screen
    assert "base heard hi" in screen
    assert "connection broke" in screen
    assert [t["content"] for t in session.conversation.turns] == ["hi", "base heard hi "]


def test_an_answer_is_shown_as_it_is_without_markup(server):
    screen, _ = converse(server, "[bold]x[/] :smile:")
    assert "base heard [bold]x[/] :smile:" in screen


def test_an_answer_cut_at_its_limit_and_an_empty_one_say_so(server):
    screen, session = converse(server, "cut", "nothing")
    assert "cut at the token limit" in screen
    assert len(session.conversation.turns) == 2


def test_ctrl_c_stops_the_answer_and_its_generation_and_keeps_what_came(server):
    lines = iter(["slow", "next"])

    class Interrupting(io.StringIO):
        pressed = False

        def write(self, text):
            if not self.pressed and self.getvalue().count("one") == 3:
                self.pressed = True
                raise KeyboardInterrupt
            return super().write(text)

    def read(prompt):
        line = next(lines, None)
        if line is None:
            raise EOFError
        return line

    screen = Interrupting()
    talker = Talker(api_url=server.url, api_key="right-key")
    session = Chat(
        talker=talker, model="base", conversation=Conversation(), console=Console(file=screen, width=120), read=read
    )
    session.run()
    assert server.aborted.wait(10)
    assert "stopped" in screen.getvalue()
    assert "base heard next" in screen.getvalue()
    assert session.conversation.turns[1]["content"].startswith("one one")


def test_a_pipe_in_and_out(server):
    result = subprocess.run(
        [*COMMAND, "--model", "base"], input="from a pipe\n", capture_output=True, text=True, timeout=60
    )
    assert (result.returncode, result.stdout, result.stderr) == (0, "base heard from a pipe \n", "")


def test_an_empty_pipe_and_a_missing_server_end_with_a_status_and_one_line(server):
    empty = subprocess.run([*COMMAND], stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=60)
    assert (empty.returncode, empty.stdout) == (2, "")
    assert "There is no question" in empty.stderr
    away = subprocess.run(
        [*COMMAND, "hi", "--api-url", "http://127.0.0.1:1/v1"], capture_output=True, text=True, timeout=60
    )
    assert (away.returncode, away.stdout) == (1, "")
    assert "No server answers" in away.stderr
    assert "Traceback" not in away.stderr


def test_at_a_terminal_the_first_ctrl_c_stops_the_answer_and_the_second_leaves(server):
    ours, theirs = pty.openpty()
    process = subprocess.Popen([*COMMAND, "--model", "base"], stdin=theirs, stdout=theirs, stderr=theirs)
    os.close(theirs)
    screen = ""

    def expect(text):
        nonlocal screen
        deadline = time.monotonic() + 60
        while text not in screen and time.monotonic() < deadline:
            with contextlib.suppress(OSError):
                screen += os.read(ours, 4096).decode(errors="replace")
        assert text in screen, screen
        screen = screen.partition(text)[2]

    try:
        expect("you> ")
        os.write(ours, b"slow\n")
        expect("one one one")
        process.send_signal(signal.SIGINT)
        expect("stopped")
        assert server.aborted.wait(10)
        expect("you> ")
        os.write(ours, b"hi\n")
        expect("base heard hi")
        expect("you> ")
        # CPython misses a signal in the instant between showing the prompt and waiting for a key.
        while psutil.Process(process.pid).status() != psutil.STATUS_SLEEPING:
            time.sleep(0.1)
        time.sleep(0.5)
        process.send_signal(signal.SIGINT)
        assert process.wait(30) == 0
    finally:
        process.kill()
        process.wait()
        os.close(ours)

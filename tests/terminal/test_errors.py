"""Errors of `tasks`: one clear line on standard error, and the exit code 2."""

from pathlib import Path

import httpx2
import pytest

from afterward.task import Status
from app.terminal.commands import local_url, main
from app.terminal.output import Trouble
from tests.support.service import free_port
from tests.terminal.conftest import Run
from tests.terminal.stand_in import ID, StandIn, event, page, problem, stream, task, without_styles

URL = "http://127.0.0.1:8000"
Answer = httpx2.Response | Exception

INVALID = [
    {"pointer": "/status", "detail": "is no status"},
    {"pointer": "/filter/since", "detail": "is no time"},
]


@pytest.mark.parametrize(
    ("answer", "line"),
    [
        (
            httpx2.ConnectError("refused"),
            f"Nothing answers at {URL}. Start the service with: make run",
        ),
        (httpx2.ReadTimeout("slow"), f"{URL} did not answer in time."),
        (httpx2.RemoteProtocolError("no HTTP"), f"Cannot reach {URL}: no HTTP"),
        (
            problem(401, "An API key is needed."),
            "The service asks for an API key: set the variable AFTERWARD_API_KEY.",
        ),
        (
            problem(422, "Invalid request.", errors=INVALID),
            "The service answered 422: status: is no status; since: is no time",
        ),
        (problem(404, "Not Found"), "The service answered 404: Not Found"),
        (problem(429, "Too many requests."), "The service answered 429: Too many requests."),
        (problem(503, "The database is away."), "The service answered 503: The database is away."),
        (
            problem(429, "Too many requests.", retry_after="7"),
            "The service answered 429: Too many requests. (Retry-After: 7)",
        ),
        (
            httpx2.Response(502, text="<html>Bad Gateway"),
            f"{URL} does not answer like this service: 502 Bad Gateway",
        ),
        (
            httpx2.Response(500, text="{", headers={"Content-Type": "application/problem+json"}),
            f"{URL} does not answer like this service: 500 Internal Server Error",
        ),
        (
            httpx2.Response(200, text="<html>Hello"),
            f"{URL}/tasks?limit=51 does not answer with JSON, as this service does.",
        ),
        (
            httpx2.Response(200, text="[" * 100_000),
            f"{URL}/tasks?limit=51 does not answer with JSON, as this service does.",
        ),
        (
            httpx2.Response(200, json={"data": [1]}),
            "The service's answer has no list of objects data.",
        ),
    ],
)
@pytest.mark.parametrize("options", [[], ["--json"]])
def test_an_error_is_one_line_and_exit_code_2(
    stand_in: StandIn,
    run: Run,
    capsys: pytest.CaptureFixture[str],
    answer: Answer,
    line: str,
    options: list[str],
) -> None:
    stand_in.answers(answer)
    assert run("list", *options) == 2
    assert capsys.readouterr() == ("", f"{line}\n")


def test_an_unknown_key_is_named_as_the_reason(
    stand_in: StandIn, run: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    stand_in.answers(problem(401, "An API key is needed."))
    assert run("list", "--key", "wrong-key") == 2
    assert capsys.readouterr().err == "The service does not know this API key.\n"
    assert stand_in.requests[0].headers["authorization"] == "Bearer wrong-key"


def test_the_key_comes_from_the_environment(
    stand_in: StandIn, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AFTERWARD_API_KEY", "the-key")
    stand_in.answers(page(task()))
    assert run("list") == 0
    assert stand_in.requests[0].headers["authorization"] == "Bearer the-key"


@pytest.mark.parametrize("key", ["two\nlines", "kéy", " secret"])
def test_a_key_that_no_header_can_hold_is_refused_and_not_printed(
    run: Run, capsys: pytest.CaptureFixture[str], key: str
) -> None:
    assert run("list", "--key", key) == 2
    said = capsys.readouterr().err
    assert said.startswith("The API key has characters")
    assert key.strip() not in said.split()


@pytest.mark.parametrize(
    ("url", "line"),
    [
        ("http://127.0.0.1:x", "http://127.0.0.1:x is not a valid service URL: Invalid port"),
        (
            "localhost:8000",
            "localhost:8000 is not a valid service URL: it must begin with http:// or https://",
        ),
        ("http://mail.example.com", "Cannot reach http://mail.example.com: refused"),
        ("https://localhost", "Cannot reach https://localhost: refused"),
    ],
)
def test_an_address_that_cannot_be_reached_is_named(
    stand_in: StandIn, run: Run, capsys: pytest.CaptureFixture[str], url: str, line: str
) -> None:
    stand_in.answers(httpx2.ConnectError("refused"))
    assert run("list", "--url", url) == 2
    assert capsys.readouterr().err.startswith(line)


@pytest.mark.parametrize("command", ["list", "watch"])
def test_a_name_that_is_no_name_of_a_host_is_an_error(
    capsys: pytest.CaptureFixture[str], command: str
) -> None:
    assert main([command, "--url", "http://a..b"]) == 2
    assert capsys.readouterr().err.startswith("Cannot reach http://a..b: ")


def test_nothing_answers_at_the_default_address(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """This is a real connection, which is refused."""
    monkeypatch.chdir(tmp_path)
    port = free_port()
    monkeypatch.setenv("PORT", str(port))
    monkeypatch.setenv("HTTP_PROXY", "http://proxy.example.com:3128")
    assert main(["list"]) == 2
    assert capsys.readouterr().err == (
        f"Nothing answers at http://127.0.0.1:{port}. Start the service with: make run\n"
    )


@pytest.mark.parametrize(
    ("settings", "url"),
    [
        ({}, "http://127.0.0.1:8000"),
        ({"HOST": "0.0.0.0", "PORT": "8001"}, "http://localhost:8001"),
        ({"HOST": "::", "PORT": "8002"}, "http://[::1]:8002"),
        ({"HOST": "::1", "ROOT_PATH": "/afterward"}, "http://[::1]:8000/afterward"),
    ],
)
def test_the_default_address_is_that_of_the_settings(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, settings: dict[str, str], url: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / ".env").write_text("".join(f"{name}={value}\n" for name, value in settings.items()))
    assert local_url() == url


def test_a_port_that_the_system_chose_is_not_known(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PORT", "0")
    with pytest.raises(Trouble, match="give the address with --url"):
        local_url()


# Wrong options

STATUSES = f"must be one or more of {', '.join(Status)}, separated by commas"


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ([], "the following arguments are required: COMMAND"),
        (["list", "--limit", "0"], "argument --limit: must be a whole number above 0"),
        (["list", "--limit", "many"], "argument --limit: must be a whole number above 0"),
        (["list", "--status", "faild"], f"argument --status: {STATUSES}"),
        (["watch", "--status", "failed,"], f"argument --status: {STATUSES}"),
        (
            ["cancel", "--status", "queued", "--batch-id", ""],
            "argument --batch-id: must not be empty",
        ),
        (["show", "."], "argument ID: must be the id of a task"),
        (["retry", ""], "argument ID: must be the id of a task"),
        (["watch", ".."], "argument ID: must be the id of a task"),
        (["list", "--limit", "5", "--all"], "not allowed with argument"),
        (["retry"], "retry: give an ID, or a filter such as --status failed"),
        (["cancel", ID, "--status", "queued"], "give an ID or filters, and not both"),
        (["watch", ID, "--kind", "send_email"], "give an ID or filters, and not both"),
        (["watch", "--since", "2026-11-28T00:00:00Z"], "unrecognized arguments: --since"),
    ],
)
def test_wrong_options_are_exit_code_2(
    run: Run, capsys: pytest.CaptureFixture[str], arguments: list[str], reason: str
) -> None:
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 2
    assert reason in capsys.readouterr().err


# Texts of strangers

HOSTILE = "\x1b]0;title\x07\x1b[2J\x9b31m[red]x[/red] \u202emoc\u2066 \r\n\ta\u2028b\x7f:smile:"
SHOWN = r"\x1b]0;title\x07\x1b[2J\x9b31m[red]x[/red] \u202emoc\u2066 \r\n\ta\u2028b\x7f:smile:"


def hostile_task() -> dict[str, object]:
    """Return a task with these characters in every field."""
    error = {"type": HOSTILE, "detail": HOSTILE, "smtp_code": HOSTILE}
    attempt = dict.fromkeys(("attempt", "started_at", "worker"), HOSTILE) | {"error": error}
    return dict.fromkeys(task(), HOSTILE) | {"error": error, "history": [attempt]}


@pytest.mark.parametrize("terminal", [False, True])
@pytest.mark.parametrize(
    "arguments",
    [
        ["list"],
        ["list", "--json"],
        ["show", ID],
        ["show", ID, "--json"],
        ["retry", ID],
        ["watch"],
        ["watch", "--json"],
    ],
)
def test_control_characters_from_the_service_never_reach_the_terminal(
    stand_in: StandIn,
    run: Run,
    request: pytest.FixtureRequest,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    *,
    terminal: bool,
) -> None:
    if terminal:
        request.getfixturevalue("on_a_terminal")
    answer: object = hostile_task()
    if arguments[0] == "list":
        answer = page(hostile_task())
    elif arguments[0] == "watch":
        answer = stream(event("task", hostile_task()), event("gap", {"detail": HOSTILE}))
    stand_in.answers(answer, problem(403, HOSTILE))  # type: ignore[arg-type]
    run(*arguments)
    said = "".join(capsys.readouterr())
    assert said
    plain = without_styles(said)
    separators = "\n" if terminal else "\n\t"
    assert all(character.isprintable() or character in separators for character in plain)
    if "--json" not in arguments:
        assert SHOWN[:40] in plain


def test_control_characters_in_an_error_are_escaped(
    stand_in: StandIn, run: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    stand_in.answers(problem(422, "", errors=[{"pointer": HOSTILE, "detail": HOSTILE}]))
    assert run("list") == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line == f"The service answered 422: {SHOWN}: {SHOWN}"

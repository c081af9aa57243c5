"""The documentation: its commands and programs work, its links and paths lead to files."""

import asyncio
import inspect
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from fastapi.testclient import TestClient

from afterward import Afterward, PermanentError, RetryPolicy, Status, Task, TaskKind
from afterward.task import FINISHED
from afterward.tracing import NO_TRACING
from app.settings import Settings
from scripts.screenshots import IMAGES, LARGEST, NAMES, SCHEMES
from tests.support.service import PATIENCE, ROOT, free_port, until
from tests.support.tools import tool

PAGES = {
    path.relative_to(ROOT).as_posix(): path.read_text()
    for path in [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob(".github/**/*.md")]
}
README = PAGES["README.md"]

AS_TEXT: dict[str, Any] = {"capture_output": True, "text": True, "timeout": 2 * PATIENCE}
PORT = 8000  # the port in the documentation; a reader with a different port replaces it
BLOCK = re.compile(r"^```sh\n(.*?)^```", re.DOTALL | re.MULTILINE)
BLOCKS = {
    f"{page}-{number}": block
    for page, text in PAGES.items()
    for number, block in enumerate(BLOCK.findall(text), start=1)
}
# The commands call these programs, and programs in .venv/bin.
PROGRAMS = ["curl", "docker", "make", "openssl", "python3"]

# Interactive shells with their defaults, because a reader pastes into one. The zsh of macOS takes
# `?` for a pattern, and knows no comments.
SHELLS = {"bash": ["bash", "--norc", "--noprofile", "-i"], "zsh": ["zsh", "-f", "-i"]}


def commands(stop: str) -> str:
    """Return the commands of one stop of the tour, as the README or the tutorial has them."""
    marked = re.compile(rf"<!-- tour: {stop} -->\n```sh\n(.*?)```", re.DOTALL)
    blocks: set[str] = {block for text in PAGES.values() for block in marked.findall(text)}
    [found] = blocks
    return found


@pytest.fixture(params=["bash", pytest.param("zsh", marks=pytest.mark.thorough)])
def shell(request: pytest.FixtureRequest) -> list[str]:
    """The command of an interactive shell that reads the pasted text from its standard input."""
    program, *options = SHELLS[request.param]
    return [tool(program), *options]


class Terminal:
    """Pastes the documented commands into a shell in a clone, and replaces the ports by free ones.

    All other settings have their defaults.
    """

    def __init__(self, clone: Path, shell: list[str]) -> None:
        self.clone = clone
        self.port = free_port()
        self.environment = {
            "PATH": os.environ["PATH"],
            "HOME": str(clone),
            "PORT": str(self.port),
            "SMTP_PORT": str(free_port()),
        }
        self._shell = shell
        self.service: subprocess.Popen[str] | None = None

    def run(self, stop: str) -> str:
        """Paste the commands of a stop, and return their output."""
        done = subprocess.run(
            self._shell,
            input=commands(stop).replace(str(PORT), str(self.port)),
            cwd=self.clone,
            env=self.environment,
            check=False,
            capture_output=True,
            text=True,
            timeout=PATIENCE,
            start_new_session=True,
        )
        assert not done.returncode, done.stderr
        return done.stdout

    def run_until(self, stop: str, seen: Callable[[str], bool]) -> str:
        """Run the commands of a stop again and again, until `seen` accepts their output."""
        deadline = time.monotonic() + 2 * PATIENCE
        while not seen(output := self.run(stop)):
            assert time.monotonic() < deadline, output
            time.sleep(0.2)
        return output

    def start(self, stop: str) -> None:
        """Paste the commands of a stop that starts the service, and wait until it answers."""
        self.service = subprocess.Popen(
            self._shell,
            cwd=self.clone,
            env=self.environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
            text=True,
        )
        assert self.service.stdin is not None
        self.service.stdin.write(commands(stop))
        self.service.stdin.close()  # the shell ends when the service has ended
        deadline = time.monotonic() + PATIENCE
        probe = ["curl", "-fs", f"localhost:{self.port}/livez"]
        while subprocess.run(probe, capture_output=True, check=False).returncode:
            assert time.monotonic() < deadline, "the service does not answer"
            time.sleep(0.05)

    def wait_for_the_end(self) -> None:
        """Wait until the service has ended, and the shell that started it."""
        assert self.service is not None
        self.service.wait(PATIENCE)

    def press_ctrl_c(self) -> None:
        """Send SIGINT to the service's process group, as a terminal does."""
        if self.service is not None and self.service.poll() is None:
            os.killpg(self.service.pid, signal.SIGINT)
            self.wait_for_the_end()


@pytest.fixture
def terminal(tmp_path: Path, shell: list[str]) -> Iterator[Terminal]:
    """A terminal in its own clone, with the packages of this test run in .venv."""
    for name in ("Makefile", "afterward", "app", "README.md", "requirements.txt", "scripts"):
        (tmp_path / name).symlink_to(ROOT / name)
    (tmp_path / ".venv").mkdir()
    for name in ("bin", "lib", "pyvenv.cfg"):
        (tmp_path / ".venv" / name).symlink_to(Path(sys.prefix) / name)
    shutil.copy(ROOT / "requirements.txt", tmp_path / ".venv")
    terminal = Terminal(tmp_path, shell)
    yield terminal
    terminal.press_ctrl_c()


@pytest.mark.thorough
def test_the_tour_of_the_readme_and_of_the_tutorial_works(terminal: Terminal) -> None:
    """Its stops are a mail, two retries, a kill, a restart, an upload and a batch."""
    terminal.start("start")
    answer = terminal.run("try")
    assert answer.startswith("HTTP/1.1 202 Accepted")
    assert '"kind": "send_email"' in answer
    terminal.press_ctrl_c()

    terminal.start("restart")
    answer = terminal.run("send")
    assert answer.startswith("HTTP/1.1 202 Accepted")
    terminal.run_until("status", lambda output: '"status": "succeeded"' in output)
    demo = subprocess.run(
        ["make", "demo"], cwd=terminal.clone, env=terminal.environment, check=True, **AS_TEXT
    )
    assert "202 after" in demo.stdout
    assert "The end: succeeded." in demo.stdout

    assert '"status": "queued"' in terminal.run("defer")
    delivered = terminal.run_until("wait", lambda output: '"status": "succeeded"' in output)
    assert '"attempts": 3' in delivered
    assert '"status": "queued"' in terminal.run("kill")
    terminal.wait_for_the_end()

    terminal.start("restart")
    terminal.run_until("watch", lambda output: '"status": "succeeded"' in output)
    assert '"kind": "save_upload"' in terminal.run("upload")
    assert '"total": 2' in terminal.run("batch")


@pytest.mark.parametrize("block", BLOCKS.values(), ids=BLOCKS.keys())
@pytest.mark.parametrize("port", [PORT, pytest.param(8001, marks=pytest.mark.thorough)])
def test_a_shell_passes_every_command_on_unchanged(
    tmp_path: Path, shell: list[str], block: str, port: int
) -> None:
    """No shell takes a part of a command for a pattern, or a comment for arguments.

    Stand-ins for the programs note their arguments. The expected arguments are those that a plain
    sh passes when it runs the same lines as a script.
    """
    text = block.replace(str(PORT), str(port))
    noted = {
        name: calls(tmp_path / name, command, text)
        for name, command in {"pasted": shell, "meant": ["sh", "-e"]}.items()
    }
    assert noted["pasted"]
    # Sorted, because the programs of a pipe run at the same time.
    assert sorted(noted["pasted"]) == sorted(noted["meant"])
    assert not any("#" in call for call in noted["pasted"])


def calls(clone: Path, shell: list[str], text: str) -> list[str]:
    """Paste a text into a shell, in a clone with stand-ins, and return the calls they noted."""
    (clone / "var").mkdir(parents=True)
    (clone / "var" / "queue.db.lock").write_text("0\n")  # kill -9 0 would end the shell as well
    stand_in = clone / "stand-in"
    stand_in.write_text('#!/bin/sh\necho "$(printf "%s|" "${0##*/}" "$@")" >>"$NOTES"\n')
    stand_in.chmod(0o755)
    binaries = clone / ".venv" / "bin"
    binaries.mkdir(parents=True)
    for program in [*PROGRAMS, "python", "ruff", "uvicorn"]:
        (binaries / program).symlink_to(stand_in)
    notes = clone / "notes"
    notes.touch()
    done = subprocess.run(
        shell,
        # kill is a builtin, so no stand-in can replace it.
        input=text.replace("kill -9", "curl"),
        cwd=clone,
        env={"PATH": f"{binaries}:/usr/bin:/bin", "HOME": str(clone), "NOTES": str(notes)},
        check=False,
        start_new_session=True,
        **AS_TEXT,
    )
    assert "no matches" not in done.stderr
    assert "not found" not in done.stderr
    return notes.read_text().splitlines()


def test_the_tutorial_and_the_readme_have_commands() -> None:
    pages = {block.rpartition("-")[0] for block in BLOCKS}
    tutorial = {page for page in PAGES if page.startswith("docs/tutorial/")}
    assert len(tutorial) == 2
    assert pages >= {"README.md", "docs/deployment.md", *tutorial}


PYTHON = re.compile(r"^```python\n(.*?)^```", re.DOTALL | re.MULTILINE)
TO_RUN = re.compile(r"^<!-- run -->\n```python\n(.*?)^```", re.DOTALL | re.MULTILINE)


@pytest.mark.parametrize(
    "program",
    [
        pytest.param("".join(PYTHON.findall(README)), id="README"),
        pytest.param("".join(TO_RUN.findall(PAGES["docs/in-your-app.md"])), id="in-your-app"),
    ],
)
def test_the_lines_for_an_app_work(
    program: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The task is on disk with the 202, and a worker runs it."""
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {"__name__": "program"}
    monkeypatch.setitem(sys.modules, "program", ModuleType("program"))  # for dataclasses
    exec(compile(program, "program", "exec", dont_inherit=True), names)

    with TestClient(names["app"]) as client:
        answer = client.post("/orders", params={"recipient": "ada@example.com"})
        assert answer.status_code == 202
        portal, engine = client.portal, names["afterward"].queue.engine
        assert portal is not None

        def has_succeeded() -> bool:
            task: Task = portal.call(engine.get, answer.json()["task"])
            return task.status is Status.SUCCEEDED

        until(has_succeeded, within=PATIENCE)
        if "remind" in names:
            again = portal.call(names["remind"], "grace@example.com")
            assert client.get(f"/tasks/{again}").status_code == 200


def test_the_tests_for_an_app_pass_and_show_the_error_of_a_task(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """docs/in-your-app.md shows how to test a task alone, and from the request to its end."""
    monkeypatch.chdir(tmp_path)
    program = "".join(TO_RUN.findall(PAGES["docs/in-your-app.md"]))
    names: dict[str, Any] = {"__name__": "program"}
    monkeypatch.setitem(sys.modules, "program", ModuleType("program"))  # for dataclasses
    exec(compile(program, "program", "exec", dont_inherit=True), names)

    asyncio.run(names["test_the_result_has_the_id_of_the_task"]())
    names["test_an_order_sends_a_mail"]()

    def print_no_mail(*words: str) -> None:
        assert words[0] != "mail from", "a bug"

    monkeypatch.setitem(names, "print", print_no_mail)
    with pytest.raises(AssertionError, match="a bug") as raised:
        names["test_an_order_sends_a_mail"]()
    assert "send_email" in [entry.name for entry in raised.traceback]


def test_the_bulk_retry_for_an_app_retries_the_failed_mails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """docs/in-your-app.md shows a task that retries them in slices, here of one."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("afterward.queue.SLICE", 1)
    program = "".join(TO_RUN.findall(PAGES["docs/in-your-app.md"]))
    names: dict[str, Any] = {"__name__": "program"}
    monkeypatch.setitem(sys.modules, "program", ModuleType("program"))  # for dataclasses
    exec(compile(program, "program", "exec", dont_inherit=True), names)
    send, retry_failed = names["send_email"], names["retry_failed_mails"]
    kinds = [send, TaskKind(retry_failed, urgent=True)]
    afterward = Afterward(
        "sqlite:///bulk.db", tasks=kinds, tools=names["Tools"]("shop@example.com")
    )
    monkeypatch.setitem(names, "afterward", afterward)

    def refuse(*_: str) -> None:
        raise PermanentError("refused")

    async def end_of(tasks: int) -> list[Task]:
        async with asyncio.timeout(PATIENCE):
            return [await ends.get() for _ in range(tasks)]

    async def retry_three_failed_mails() -> list[Task]:
        async with afterward.running() as queue:
            monkeypatch.setitem(names, "print", refuse)
            async with queue.transaction() as transaction:
                for number in range(3):
                    transaction.add_task(send, recipient=f"{number}@example.com")
            assert {task.status for task in await end_of(3)} == {Status.FAILED}
            monkeypatch.setitem(names, "print", lambda *words: sent.append(words[-1]))
            async with queue.transaction() as transaction:
                matched = await queue.engine.count_tasks(names["FAILED_MAILS"])
                transaction.add_task(retry_failed, accepted_at=time.time(), matched=matched)
            return await end_of(4)

    ends = asyncio.Queue[Task]()
    sent: list[str] = []
    afterward.queue.events.subscribe(
        lambda event: ends.put_nowait(event.task) if event.task.status in FINISHED else None
    )
    ended = asyncio.run(retry_three_failed_mails())
    assert {task.status for task in ended} == {Status.SUCCEEDED}
    assert [task.result for task in ended if task.kind == "retry_failed_mails"] == ["3"]
    assert sorted(sent) == ["0@example.com", "1@example.com", "2@example.com"]


def test_the_table_of_settings_names_every_setting() -> None:
    """Each has a row in the table of settings."""
    table = PAGES["docs/settings.md"].partition("\n## ")[0]
    first_column = "".join(re.findall(r"^\|([^|]*)\|", table, re.MULTILINE))
    named = set(re.findall(r"`([A-Z_]+)`", first_column))

    assert named == {name.upper() for name in Settings.model_fields}


def test_the_table_of_arguments_has_every_argument_and_its_default() -> None:
    """It describes `Afterward`."""
    table = PAGES["docs/in-your-app.md"].partition("\n## Arguments\n")[2].partition("\n## ")[0]
    rows = re.findall(r"^\| `(\w+)` \| (?:`(.*?)`)? *\|", table, re.MULTILINE)
    parameters = list(inspect.signature(Afterward.__init__).parameters.values())[1:]

    known = {"RetryPolicy": RetryPolicy, "NO_TRACING": NO_TRACING}
    assert [name for name, _ in rows] == [parameter.name for parameter in parameters]
    for (name, text), parameter in zip(rows, parameters, strict=True):
        default = eval(text, known) if text else parameter.empty
        assert default == parameter.default, name


# Links and pictures, `[text](target "title")` or `<img src="target">`, outside of code.
CODE = re.compile(r"^```.*?^```|`[^`\n]+`", re.DOTALL | re.MULTILINE)
LINK = re.compile(r"\]\(([^)\s]+)[^)]*\)|<(?:img|source)\b[^>]*\bsrc(?:set)?=\"([^\"]+)\"")


def links(text: str) -> list[str]:
    """Return the relative links of a page."""
    targets = [link or picture for link, picture in LINK.findall(CODE.sub("", text))]
    return [target for target in targets if ":" not in target]


@pytest.mark.parametrize("page", PAGES)
def test_every_relative_link_leads_to_a_file_and_to_its_heading(page: str) -> None:
    for link in links(PAGES[page]):
        name, _, anchor = link.partition("#")
        path = (ROOT / page).parent / name if name else ROOT / page
        assert path.exists(), link
        assert path.resolve().is_relative_to(ROOT.resolve()), link
        if anchor:
            assert anchor in anchors(path.read_text()), link


def anchors(text: str) -> set[str]:
    """Return the anchors of a page's headings, as GitHub names them."""
    without_code = re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)
    headings = re.findall(r"^#+ (.+)$", without_code, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_control_a_link_without_a_file_is_found() -> None:
    text = "[a](b.md), `[c](d.md)`, [e](https://example.com), ![f](g.svg)\n```\n[h](i.md)\n```\n"
    assert links(text) == ["b.md", "g.svg"]
    assert links('<source media="x" srcset="a.png"><img src="b.png" alt="">') == ["a.png", "b.png"]
    assert anchors("# A task of *your* own\n```\n# no\n```\n") == {"a-task-of-your-own"}


def test_the_pages_show_each_picture_of_the_dashboard_and_no_other() -> None:
    taken = {IMAGES / f"{name}-{scheme}.png" for name in NAMES for scheme in SCHEMES}
    shown = {
        (ROOT / page).parent / link
        for page in PAGES
        for link in links(PAGES[page])
        if ".png" in link
    }
    assert taken == set(IMAGES.iterdir()) == shown
    assert sum(path.stat().st_size for path in taken) < LARGEST


@pytest.mark.parametrize("page", PAGES)
def test_the_paths_in_a_page_exist(page: str) -> None:
    """These are the paths in backquotes, from the root of the repository."""
    new = set(re.findall(r"<!-- new: (\S+) -->", PAGES[page]))  # the reader writes these files
    folders = "app|afterward|benchmarks|docs|examples|scripts|tests"
    for path in set(re.findall(rf"`((?:{folders})/[\w./]*)`", PAGES[page])) - new:
        assert (ROOT / path).exists(), path

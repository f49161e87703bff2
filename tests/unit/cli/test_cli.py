"""The command line and what it shows, in a pipe and on a terminal."""

from __future__ import annotations

import io
import json
import re
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from rich.console import Console

import coterie
import sites
from coterie import __main__ as console
from coterie.cli import compare as comparison
from coterie.cli import main as cli
from coterie.cli import progress
from coterie.cli.doctor import Check
from coterie.cli.progress import Lines, Live, listener, show_summary
from coterie.comparison.jobs import Missing
from coterie.comparison.tuning import Choice
from coterie.config.describe import describe_config
from coterie.methods.registry import methods
from coterie.runs.entries import ClientRound
from coterie.runs.events import (
    CheckpointSaved,
    ClientDone,
    ClientEvaluated,
    ClientSteps,
    Evaluated,
    Listener,
    Note,
    Ready,
    Resumed,
    RoundDone,
    RoundStart,
)
from coterie.runs.summary import Worst
from coterie.types import CoterieError
from summaries import compared, scaled, summary, without_test


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@dataclass
class Command:
    """Runs ``coterie ...`` as the console command does; ``terminal`` takes what a terminal would show."""

    patch: pytest.MonkeyPatch
    capture: pytest.CaptureFixture[str]

    def __call__(self, *args: str) -> tuple[int, str, str]:
        self.patch.setattr(sys, "argv", ["coterie", *args])
        self.capture.readouterr()
        try:
            cli.main()
            code = 0
        except SystemExit as stop:
            code = int(stop.code or 0)
        shown = self.capture.readouterr()
        return code, shown.out, shown.err


@pytest.fixture
def coterie_command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    return Command(monkeypatch, capsys)


def terminal(width: int = 100) -> Console:
    return Console(file=io.StringIO(), force_terminal=True, width=width, emoji=False, _environ={})


def shown_on(console: Console) -> str:
    """What was written, without colours and cursor movements."""
    assert isinstance(console.file, io.StringIO)
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", console.file.getvalue()).replace("\r", "\n")


def markdown(text: str) -> list[list[str]]:
    return [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in text.splitlines()]


# commands that only tell ---------------------------------------------------------------------------------------------


def test_version_and_help(coterie_command: Command) -> None:
    assert coterie_command("version") == (0, f"{coterie.__version__}\n", "")
    code, text, _ = coterie_command("--help")
    assert code == 0
    for name in ("run", "compare", "demo", "methods", "config", "doctor", "report", "version"):
        assert re.search(rf"\b{name}\b", text)
    assert "--resume" in coterie_command("run", "--help")[1]


@pytest.mark.parametrize("args", [("runn",), ("run", "--resum"), ("run", "a.toml", "b.toml"), ("report",)])
def test_a_wrong_command_line_exits_with_2(args: tuple[str, ...], coterie_command: Command) -> None:
    code, _, errors = coterie_command(*args)
    assert code == 2
    assert errors
    assert "Traceback" not in errors


def test_a_near_command_is_named_once(coterie_command: Command) -> None:
    code, _, errors = coterie_command("rum")
    assert (code, errors) == (2, "error: No such command 'rum'. Did you mean 'run'?\n")


def test_methods(coterie_command: Command) -> None:
    code, text, _ = coterie_command("methods")
    assert code == 0
    assert len(methods()) >= 3
    for name, method in methods().items():
        assert re.search(rf"^{name} +{method.title}", text, re.MULTILINE)
    rows = markdown(coterie_command("methods", "--markdown")[1])
    assert rows[0] == ["name", "method", "what it does", "source"]
    assert rows[2:] == [[name, m.title, m.summary, m.paper] for name, m in methods().items()]


def test_config_shows_every_key_whole_even_on_a_narrow_screen(coterie_command: Command) -> None:
    keys = [row[0] for row in describe_config()]
    assert len(keys) > 60
    code, text, _ = coterie_command("config")
    assert code == 0
    heads = [line for line in text.splitlines() if not line.startswith(" ")]
    assert [line.split()[0] for line in heads] == keys
    assert max(map(len, text.splitlines())) <= 120
    assert max(len(line) for line in text.splitlines() if line.startswith(" ")) <= 80
    assert 'model.dtype  float32 | bfloat16  default "float32"' in heads
    rows = markdown(coterie_command("config", "--markdown")[1])
    assert [[cell.replace("\\|", "|") for cell in row] for row in rows[2:]] == [list(row) for row in describe_config()]
    one = coterie_command("config", "--method", "local", "--markdown")[1]
    assert "method.name" in one
    assert "fedlease]" not in one
    code, _, errors = coterie_command("config", "--method", "locla")
    assert (code, errors) == (2, f"error: unknown method 'locla'; the methods are {', '.join(methods())}\n")


def test_doctor_shows_what_is_found_and_the_whole_command_that_mends(
    coterie_command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert coterie_command("doctor")[0] == 0
    checks = [Check("torch", "1.2.3"), Check("x", "[not] here :x:", False, "pip install 'x[y]'")]
    monkeypatch.setattr("coterie.cli.doctor.examine", lambda: checks)
    code, text, _ = coterie_command("doctor")
    assert code == 0
    assert text.splitlines()[1].split() == ["ok", "torch", "1.2.3"]
    assert re.fullmatch(r" -- +x +\[not\] here :x: +pip install 'x\[y\]' *", text.splitlines()[2])


# faults --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("run",), "give a config file, or --resume with --out and the run's folder"),
        (("run", "--resume"), "give a config file, or --resume"),
        (("run", "--resume", "--out", "nowhere"), "there is no run in nowhere"),
        (("run", "none.toml"), "there is no config file none.toml"),
        (("compare", "none.toml"), "there is no config file none.toml"),
        (("compare", "none.toml", "--seeds", "1,x"), "--seeds takes whole numbers separated by commas, not 'x'"),
        (("report", "nowhere"), "there is no run in nowhere"),
    ],
)
def test_a_fault_is_one_line_and_exit_code_2(
    args: tuple[str, ...], message: str, coterie_command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    code, text, errors = coterie_command(*args)
    assert (code, text) == (2, "")
    assert errors.startswith(f"error: {message}")
    assert errors.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_a_fault_is_shown_as_it_is(coterie_command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    """Brackets are no markup, colons no emoji, and a long line is not broken."""
    message = "pip install 'x[y]' in [/tmp/a]:smile: " + "long " * 40 + "end"

    def fail(*args: Any) -> None:
        raise CoterieError(message)

    monkeypatch.setattr("coterie.cli.doctor.examine", fail)
    assert coterie_command("doctor") == (2, "", f"error: {message}\n")


def test_ctrl_c_exits_with_130_and_says_how_to_go_on_where_that_can_be(
    coterie_command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*args: Any, **options: Any) -> None:
        raise KeyboardInterrupt

    path = sites.config(tmp_path)
    for name in ("coterie.experiment.run", "coterie.comparison.jobs.run", "coterie.cli.doctor.examine"):
        monkeypatch.setattr(name, interrupt)
    out = tmp_path / "out"
    run, both = ("run", str(path), "--out", str(out)), ("compare", str(path), "--out", str(tmp_path))
    for command in (run, ("compare", str(path), "--out", str(tmp_path / "none")), ("doctor",)):
        code, _, errors = coterie_command(*command)
        said = "\nstopped\n" if command == ("doctor",) else "\nstopped; nothing was written\n"
        assert (code, errors) == (130, said)
    (out / "checkpoints").mkdir(parents=True)
    (out / "config.json").touch()
    for what in ("stopped before the first checkpoint", "stopped; the last checkpoint is kept"):
        code, _, errors = coterie_command(*run)
        assert (code, errors) == (130, f"\n{what}: continue with the same command and --resume\n")
        code, _, errors = coterie_command(*both)
        assert (code, errors) == (130, f"\n{what}: continue with the same command\n")
        (out / "checkpoints" / "000000.ckpt").touch()


def test_ctrl_c_while_the_command_line_loads(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The console command's own module loads nothing heavy, and catches what comes after."""
    code = "import sys, coterie.__main__; print(sorted({'torch', 'rich', 'typer', 'pydantic'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "[]\n"

    def interrupt() -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "main", interrupt)
    with pytest.raises(SystemExit) as stop:
        console.main()
    assert (stop.value.code, capsys.readouterr().err) == (130, "\nstopped\n")


# a run ---------------------------------------------------------------------------------------------------------------


def test_a_run_in_a_pipe_is_plain_lines(coterie_command: Command, tmp_path: Path) -> None:
    path, out = sites.config(tmp_path, method="fedlease"), tmp_path / "out"
    code, text, errors = coterie_command("run", str(path), "--out", str(out), "--set", "run.rounds=2")
    assert (code, errors) == (0, "")
    assert "\x1b" not in text
    lines = [line for line in text.splitlines() if not line.startswith("note: ")]
    assert lines[0] == f"5 clients, 2 rounds, in {out}"
    assert re.fullmatch(r"round 1/2  loss \d\.\d{3}  [\d,]+ tokens/s", lines[1])
    assert re.match(r"\d clusters?: \d clusters? by texts \(the best silhouette is -?\d\.\d{3}", lines[2])
    assert re.match(r"round 1/2  test: accuracy \d\.\d{3} .*  validation: accuracy \d\.\d{3} ", lines[3])
    assert re.fullmatch(r"round 2/2  loss \d\.\d{3}  [\d,]+ tokens/s  \d+:\d\d left", lines[4])
    assert lines[-1] == f"report: {out / 'report.html'}"
    for name in ("mood-0", "place-0", "size-0", "mood-1", "size-1", "mean"):
        assert re.search(rf"^ ?{name} ", text, re.MULTILINE)
    summary = json.loads((out / "summary.json").read_text())
    clusters = summary["describe"]["clusters"]
    row = next(line.split() for line in lines if line.split()[:1] == ["size-1"])
    test = summary["clients"]["size-1"]["test"]
    assert row[1:] == [str(clusters["size-1"]), "12", *(f"{test[name]:.3f}" for name in sorted(test))]

    (out / "report.html").unlink()
    code, text, _ = coterie_command("report", str(out))
    assert (code, text) == (0, f"report: {out / 'report.html'}\n")
    assert (out / "report.html").stat().st_size > 1000
    code, text, _ = coterie_command("run", "--resume", "--out", str(out))
    assert code == 0
    assert text.splitlines()[0] == f"note: {out} is finished; nothing to do"


def test_a_run_on_a_terminal_shows_a_bar_and_leaves_the_lines(
    coterie_command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    console = terminal()
    monkeypatch.setattr("coterie.cli.console.out", console)
    path, out = sites.config(tmp_path, method="fedit"), tmp_path / "out"
    assert coterie_command("run", str(path), "--out", str(out))[0] == 0
    text = shown_on(console)
    assert re.search(r"^round 3/3  loss \d\.\d{3}  [\d,]+ tokens/s  \d+:\d\d left", text, re.MULTILINE)
    assert "━" in text
    assert re.search(r"3 rounds in 0:\d\d, [\d.]+ [KM]iB up, [\d.]+ [KM]iB down, peak memory [\d.]+ [MG]iB", text)
    assert "report: " in text


def test_the_default_folder_is_named_after_config_method_and_seed(
    coterie_command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sites.config(tmp_path, method="local")
    monkeypatch.chdir(tmp_path)
    assert coterie_command("run", "run.toml", "--set", "run.rounds=1", "--set", "run.seed=4")[0] == 0
    assert (tmp_path / "runs" / "run-local-4" / "summary.json").exists()


# progress ------------------------------------------------------------------------------------------------------------


class Clock:
    """A clock that the test sets."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def at(monkeypatch: pytest.MonkeyPatch) -> Clock:
    found = Clock()
    monkeypatch.setattr(progress, "time", SimpleNamespace(perf_counter=found))
    return found


def entry(loss: float | None = None, tokens: int = 100) -> ClientRound:
    return ClientRound(1, 1, 2.0, {} if loss is None else {"loss": loss, "tokens": tokens})


def play(
    listen: Listener, at: Clock, rnd: int, clients: dict[str, ClientRound], train: float = 8.0, evaluate: float = 2.0
) -> None:
    """The events of one round that takes ``train`` and then ``evaluate`` seconds."""
    failed = {client: "out of [memory]" for client, of in clients.items() if of.loss is None}
    listen(RoundStart(rnd, list(clients)))
    for client, of in clients.items():
        listen(ClientDone(rnd, client, of, failed.get(client)))
    at.now += train
    listen(RoundDone(rnd, clients, failed, train))
    at.now += evaluate
    for client in clients:
        listen(ClientEvaluated(rnd, client, len(clients)))
    listen(Evaluated(rnd, {}, {"test": {"accuracy": 0.5, "loss": 1.25}, "validation": {"accuracy": 1.0}}))
    listen(CheckpointSaved(rnd))


def test_lines_tell_loss_throughput_and_the_time_left(at: Clock) -> None:
    console = Console(file=io.StringIO(), width=40)
    lines = Lines(console, 4, "fedit seed 0")
    assert lines.left(0) is None
    for event in (
        Ready(2, 4, "/runs/[x]"),
        CheckpointSaved(0),
        Resumed(2),
        Note("a [note] that is much longer than the screen is wide, and stays on one line"),
    ):
        lines(event)
    play(lines, at, 1, {"north": entry(1.0), "south": entry(2.0, tokens=300)})
    play(lines, at, 2, {"north": entry(3.0), "south": entry()}, train=18.0)
    play(lines, at, 4, {"north": entry()})
    assert shown_on(console).splitlines() == [
        f"fedit seed 0: {line}" if line[0] != " " else line
        for line in (
            "2 clients, 4 rounds, in /runs/[x]",
            "continues after round 2",
            "note: a [note] that is much longer than the screen is wide, and stays on one line",
            "round 1/4  loss 1.500  50 tokens/s",
            "round 1/4  test: accuracy 0.500 loss 1.250  validation: accuracy 1.000",
            "round 2/4  loss 3.000  6 tokens/s  0:12 left",  # 3 rounds of 10 s, of which 18 s are gone
            "  left out south: out of [memory]",
            "round 2/4  test: accuracy 0.500 loss 1.250  validation: accuracy 1.000",
            "round 4/4  loss nan  0 tokens/s  0:07 left",  # 15 s on average, of which 8 s are gone
            "  left out north: out of [memory]",
            "round 4/4  test: accuracy 0.500 loss 1.250  validation: accuracy 1.000",
        )
    ]
    assert lines.left(2) == pytest.approx(2 * 40 / 3)


def test_a_live_display_names_round_client_loss_throughput_and_time_left(at: Clock) -> None:
    console = terminal(width=120)
    with listener(console, 3, "local") as live:
        assert isinstance(live, Live)
        bar = live.progress.tasks[0]
        assert (bar.total, bar.completed) == (3, 0)
        live(RoundStart(1, ["north", "south", "west"]))
        assert bar.fields["now"] == "north"
        live(ClientDone(1, "north", entry(1.0, tokens=300), None))
        assert bar.fields["now"] == "south  loss 1.000  150 tokens/s"
        live(ClientDone(1, "south", entry(), "gone"))
        assert bar.fields["now"].startswith("west  loss 1.000")
        live(ClientDone(1, "west", entry(2.0), None))
        assert bar.fields["now"] == "west  loss 1.500  50 tokens/s"
        live(ClientEvaluated(1, "north", 3))
        assert bar.fields["now"] == "evaluating north"
        at.now = 90.0
        live(CheckpointSaved(1))
        assert (bar.completed, bar.fields["left"]) == (1, "3:00 left")
        live.progress.refresh()
        play(live, at, 2, {"north": entry(0.25)})
        assert bar.completed == 2
    text = shown_on(console)
    assert re.search(r"local .*━.* 1/3 evaluating north .*0:00:\d\d 3:00 left", text)
    assert "local: round 2/3  loss 0.250" in text


def test_a_second_bar_moves_with_clients_and_steps(at: Clock) -> None:
    console = terminal(width=120)
    with listener(console, 3) as live:
        assert isinstance(live, Live)
        within = live.progress.tasks[1]
        assert not within.visible
        live(RoundStart(1, ["north", "south", "west"]))
        seen = []
        for event in (
            ClientSteps(1, ["north"], 1, 4),
            ClientDone(1, "north", entry(1.0), None),
            ClientSteps(1, ["south", "w[e]st"], 3, 4),
            ClientDone(1, "south", entry(1.0), None),
            ClientDone(1, "west", entry(1.0), None),
            ClientEvaluated(1, "north", 3),
            ClientEvaluated(1, "south", 3),
        ):
            live(event)
            seen.append((within.description, within.completed, within.total, within.fields["now"]))
        assert within.visible
        live.progress.refresh()
        live(CheckpointSaved(1))
        assert not within.visible
    assert seen == [
        ("  training", 0.25, 3, "north at step 1/4"),
        ("  training", 1, 3, ""),
        ("  training", 2.5, 3, "south and 1 more at step 3/4"),
        ("  training", 2, 3, ""),
        ("  training", 3, 3, ""),
        ("  evaluating", 1, 3, ""),
        ("  evaluating", 2, 3, ""),
    ]
    assert re.search(r"  evaluating .*━.* 2/3", shown_on(console))


def test_elsewhere_a_line_now_and_then_says_where_the_round_is(at: Clock) -> None:
    console = Console(file=io.StringIO(), width=40)
    with listener(console, 3, "fedit") as listen:
        listen(RoundStart(2, ["n[o]rth", "south"]))
        for step in range(1, 8):
            at.now += 10.0
            listen(ClientSteps(2, ["n[o]rth"], step, 8))
        listen(ClientDone(2, "n[o]rth", entry(1.0), None))
        at.now += 30.0
        listen(ClientDone(2, "south", entry(1.0), None))
        at.now += 40.0
        listen(RoundDone(2, {"n[o]rth": entry(1.0)}, {}, 100.0))
        for client in ("n[o]rth", "south"):
            at.now += 29.0
            listen(ClientEvaluated(2, client, 2))
    assert shown_on(console).splitlines() == [
        "fedit: round 2/3  training, 0 of 2 clients done, n[o]rth at step 3/8",
        "fedit: round 2/3  training, 0 of 2 clients done, n[o]rth at step 6/8",
        "fedit: round 2/3  training, 2 of 2 clients done",
        "fedit: round 2/3  loss 1.000  1 tokens/s",
        "fedit: round 2/3  evaluating, 2 of 2 clients done",
    ]


def test_elsewhere_than_on_a_terminal_there_is_no_bar() -> None:
    with listener(Console(file=io.StringIO()), 3) as listen:
        assert isinstance(listen, Lines)


# summaries and comparisons -------------------------------------------------------------------------------------------


def test_the_summary_of_a_run(tmp_path: Path) -> None:
    console = Console(file=io.StringIO(), width=80)
    show_summary(console, summary(describe={"clusters": {"north": 1}}), tmp_path)
    text = shown_on(console)
    assert "FedIT: test at round 2" in text
    assert [line.split() for line in text.splitlines() if "0." in line][:3] == [
        ["north", "1", "7", "0.250", "1.750"], ["south", "-", "7", "0.750", "1.250"], ["mean", "0.500", "1.500"],
    ]  # fmt: skip
    assert "3 rounds in 1:15, 1.0 MiB up, 3.0 MiB down, peak memory 512 MiB" in text
    assert text.splitlines()[-1] == f"report: {tmp_path / 'report.html'}"
    show_summary(console, without_test(), tmp_path)


def test_a_comparison_marks_the_best_of_every_row() -> None:
    console = terminal()
    results = {"fedlease": scaled(0.8, describe={"clusters": {"north": 1, "south": 0}}), "fedit": summary()}
    seen = {m: {0: replace(s, mean=s.mean | {"validation": s.mean["test"]})} for m, s in results.items()}
    comparison.show(console, compared(seen), Path("runs/x"))
    assert isinstance(console.file, io.StringIO)
    bold = re.findall(r"\x1b\[1m([\d.]+)\x1b\[0m", console.file.getvalue())
    assert bold == ["25.0", "75.0", "50.0", "50.0", "25.0"]  # three rows of clients and their mean, two columns
    rows = [line.split() for line in shown_on(console).splitlines()]
    assert ["north", "1", "20.0", "25.0"] in rows
    assert ["FedIT", "50.0", "25.0", "-", "+10.0", "0.500", "-", "4.0", "MiB"] in rows
    console = terminal()
    by_loss = {
        m: {0: summary(primary="loss", worst=Worst("north", "loss", loss))}
        for m, loss in (("fedit", 9.0), ("local", 8.0))
    }
    comparison.show(console, compared(by_loss), Path("runs/x"))
    assert isinstance(console.file, io.StringIO)
    assert "8.000" in re.findall(r"\x1b\[1m([\d.]+)\x1b\[0m", console.file.getvalue())
    assert "9.000" not in re.findall(r"\x1b\[1m([\d.]+)\x1b\[0m", console.file.getvalue())


def test_a_comparison_without_test_data_has_dashes() -> None:
    console = terminal()
    comparison.show(console, compared({"fedit": {0: without_test()}, "local": {0: summary()}}), Path("runs/x"))
    assert ["north", "-", "25.0"] in [line.split() for line in shown_on(console).splitlines()]


def test_a_comparison_says_what_has_no_result_and_what_was_tuned() -> None:
    console = Console(file=io.StringIO(), width=200)
    lost = Missing("fedit", 0, ("train.learning_rate=0.1",), "failed", "it [diverged]")
    choice = Choice(("train.learning_rate=0.2",), 1000, {}, ("train.learning_rate",))
    made = compared({"local": {0: summary(), 1: summary()}}, choices={"local": choice}, missing=[lost])
    comparison.show(console, made, Path("runs/x"))
    text = shown_on(console)
    assert "train.learning_rate is at the edge of what was tried" in text
    assert re.search(r"^ Local .* 0\.2 ?$", text, re.MULTILINE)
    assert "page: runs/x/compare.html" in text
    assert "no result: fedit train.learning_rate=0.1 seed 0: failed: it [diverged]" in text
    console = Console(file=io.StringIO(), width=200)
    comparison.show(console, compared({}, missing=[lost]), Path("runs/x"))
    assert len(shown_on(console).splitlines()) == 1


@pytest.mark.parametrize(
    ("missing", "code"), [((), 0), (("does not fit",), 0), (("failed",), 1), (("does not fit", "in use"), 1)]
)
def test_the_exit_code_says_whether_every_run_has_a_result(
    coterie_command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, missing: tuple[Any, ...], code: int
) -> None:
    lost = [Missing("fedit", 0, (), why, "reason") for why in missing]
    monkeypatch.setattr("coterie.comparison.compare", lambda *a, **k: compared({"local": {0: summary()}}, missing=lost))
    assert coterie_command("compare", "x.toml", "--out", str(tmp_path))[0] == code
    monkeypatch.setattr("coterie.comparison.compare", lambda *a, **k: compared({}, missing=lost))
    assert coterie_command("compare", "x.toml", "--out", str(tmp_path))[0] == 1

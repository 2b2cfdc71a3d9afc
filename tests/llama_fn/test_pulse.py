"""Pulse tells staged runs apart, by their work folders and by what stand-ins of schedulers say; and tells somebody."""

from __future__ import annotations

import http.server
import json
import math
import os
import re
import socketserver
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from operation_runs import end, spent, staged, start, training

from llama_fn.operations import alerts, pulse
from llama_fn.operations.pulse import DIVERGING, FAILED, GONE, STUCK, WAITING
from llama_fn.operations.state import Limits, duration

ROOT = Path(__file__).resolve().parents[2]
LIMITS = Limits()
GOOD = [4.0 - i / 100 for i in range(100)]


def trains(*more):
    return [start(), training(), spent(20.0, 100, step=3000.0), *more]


# What it finds: events, other things of the folder, words of the line, and the status.
def situations():
    """Made anew for each test, as times are told from now."""
    return {
        "trains": (trains(), {"losses": GOOD}, ["is running for 1:00:0", "iteration 100 of 1000, loss 3.0100"], 0),
        "compiles": ([start(ago=300)], {}, ["is running for 5:0", "preparing and compiling for 5:0"], 0),
        "compiles for ever": ([start(ago=7200)], {}, ["running but not progressing! no step after 2:00:0"], STUCK),
        "hangs": (
            [start(), training(), spent(900.0, 100)], {"losses": GOOD, "quiet_s": 900},
            ["running but not progressing! no new iteration for 15:0", "iteration 100 of 1000", "every 3.0 s"], STUCK,
        ),
        "slow steps are no hang": (
            [start(), training(), spent(900.0, 100)], {"losses": GOOD, "quiet_s": 900, "step_s": 120.0},
            ["is running"], 0,
        ),
        "first step takes long": ([start(), training(ago=1000)], {}, ["is running", "iteration 0 of 1000"], 0),
        "diverges": (
            trains(), {"losses": [*GOOD, *[6.0] * 40]}, ["running and diverging!", "6.000, and was 3.1"], DIVERGING,
        ),
        "is not finite": (trains(), {"losses": [*GOOD, *[math.nan] * 3]}, ["last losses are not finite"], DIVERGING),
        "finished": (trains(end(0, iteration=1000)), {"losses": GOOD}, ["has finished: 1000 iterations done"], 0),
        "failed": (
            trains(end(4, "100 iterations in a row were skipped")), {"losses": GOOD},
            ["not RUNNING or SCHEDULED! it failed with status 4: 100 iterations in a row"], FAILED,
        ),
        "wrong input": ([start(), end(2, "UserError: no such file")], {}, ["status 2: UserError: no such"], FAILED),
        "stopped": (trains(end(5, "SIGTERM: saved iteration 100")), {}, ["SIGTERM: saved iteration 100"], GONE),
        "killed": (trains(), {"losses": GOOD, "lock": "dead"}, ["without a word, at or after iteration 100"], GONE),
        "elsewhere": (trains(), {"losses": GOOD, "lock": "elsewhere"}, ["is running for 1:00:0"], 0),
        "dead elsewhere": (trains(), {"losses": GOOD, "lock": "elsewhere long ago"}, ["gone without a word"], GONE),
        "never began": ([], {"lock": ""}, ["not RUNNING or SCHEDULED!", "has no run"], GONE),
        "began again": (
            trains(start(ago=60), training(ago=30, iteration=90)), {"losses": GOOD}, ["is running for 1:0"], 0,
        ),
    }  # fmt: skip


@pytest.mark.parametrize("name", situations())
def test_a_run_is_told_by_its_work_folder(name, tmp_path):
    events, more, words, status = situations()[name]
    found = pulse.take(staged(tmp_path / "run", events, **more), "job", "process", LIMITS, 3600)
    assert found.status == status and all(word in found.text for word in words), found
    kind = r"\*\*\*ALERT" if status else "PULSE"
    assert re.fullmatch(rf"\[\d{{4}}-\d\d-\d\d \d\d:\d\d:\d\d\] {kind}: job (is|has) .*", found.line())


def slurm_line(state, start="N/A", reason="None", nodes="n[01-12]", handed_in=60):
    handed = time.strftime("%Y-%m-%dT%H:%M:%S", time.localtime(time.time() - handed_in))
    return f"1165978|{state}|npu|{nodes}|{start}|{handed}|{reason}"


def moment(ahead):
    return time.strftime("%Y-%m-%dT%H:%M:%S", time.localtime(time.time() + ahead))


def scheduled():
    """Made anew for each test, as times are told from now."""
    return {
        "runs": (slurm_line("RUNNING", moment(-90000)), trains(), "job is running for 1-01:00:0", 0),
        "in its place": (slurm_line("RUNNING", moment(-3600)), trains(), "on 'npu' partition (n[01-12]); iteration", 0),
        "hangs": (
            slurm_line("RUNNING", moment(-3600)), [start(), training(), spent(900.0, 100)], "not progressing!", STUCK,
        ),
        "holds devices": (
            slurm_line("RUNNING", moment(-7200)), trains(end(2, "no data")), "holds its devices and does not train!",
            STUCK,
        ),
        "just began": (slurm_line("RUNNING", moment(-5)), trains(end(5)), "its start has written nothing yet", 0),
        "will start": (
            slurm_line("PENDING", moment(7200), "Resources", ""), trains(end(5)), "is scheduled to start in 1:59:5", 0,
        ),
        "waits": (
            slurm_line("PENDING", "N/A", "Priority", ""), trains(end(5)),
            "waiting to be scheduled (1165978 on 'npu' partition (Priority)", 0,
        ),
        "waits too long": (
            slurm_line("PENDING", "N/A", "Priority", "", 90000), trains(end(5)),
            "scheduled but not running for 1-01:00:0", WAITING,
        ),
        "is not known": ("", trains(end(5, "SIGUSR1: saved iteration 100")), "not RUNNING or SCHEDULED! SIGUSR1", GONE),
        "is done": ("", trains(end(0)), "has finished", 0),
    }  # fmt: skip


def stand_in(folder, monkeypatch, name, output, status=0):
    (folder / "answer").write_text(output)
    program = folder / name
    program.write_text(f'#!/bin/sh\necho "$@" >> {folder}/asked\ncat {folder}/answer\nexit {status}\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")


@pytest.mark.parametrize("name", scheduled())
def test_slurm_is_asked_and_the_work_folder_says_the_rest(name, tmp_path, monkeypatch):
    line, events, words, status = scheduled()[name]
    stand_in(tmp_path, monkeypatch, "squeue", line + "\n")
    quiet = 900 if name == "hangs" else 1
    folder = staged(tmp_path / "run", events, GOOD, quiet)
    found = pulse.take(folder, "job", "slurm", LIMITS, 86400)
    assert found.status == status and words in found.text, found
    assert "--name=job" in (tmp_path / "asked").read_text()


def pod(phase, **status):
    meta = {"name": "job-worker-0", "namespace": "llm", "creationTimestamp": "2026-11-27T10:00:00Z"}
    return {"metadata": meta, "spec": {"nodeName": "node-7"}, "status": {"phase": phase, **status}}


@pytest.mark.parametrize(
    ("items", "words", "status"),
    [
        ([pod("Running", startTime="2026-11-27T10:00:00Z")], "(job-worker-0 on 'llm' partition (node-7); iter", 0),
        ([pod("Pending", conditions=[{"status": "False", "reason": "Unschedulable"}])], "(Unschedulable)", WAITING),
        ([pod("Failed")], "is running", 0),  # by its work folder
    ],
)  # fmt: skip
def test_kubernetes_is_asked(items, words, status, tmp_path, monkeypatch):
    stand_in(tmp_path, monkeypatch, "kubectl", json.dumps({"items": items}))
    wait = 0 if status else 1e9
    found = pulse.take(staged(tmp_path / "run", trains(), GOOD), "job", "kubernetes", LIMITS, wait)
    assert found.status == status and words in found.text, found


def test_a_scheduler_that_does_not_answer_is_no_alert(tmp_path, monkeypatch):
    folder = staged(tmp_path / "run", trains(), GOOD)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert check(folder, "--scheduler=slurm") == (2, "error: squeue is not on this machine")
    stand_in(tmp_path, monkeypatch, "squeue", "", 1)
    code, said = check(folder, "--scheduler=slurm")
    assert code == 2 and "squeue failed with status 1" in said


def check(folder, *flags):
    """The command: its status, and the beginning of what it said."""
    words = [str(folder), f"--state={folder}.told", *flags]
    done = subprocess.run(
        [sys.executable, "-m", "llama_fn.tools.pulse", *words], cwd=ROOT, capture_output=True, text=True
    )
    return done.returncode, (done.stdout or done.stderr.split(":")[0] + ":" + done.stderr.split(":")[1]).strip()


class Mailbox(socketserver.StreamRequestHandler):
    """As much of SMTP as a client needs."""

    def handle(self):
        self.wfile.write(b"220 here\r\n")
        while line := self.rfile.readline():
            word = line[:4].upper()
            if word == b"DATA":
                self.wfile.write(b"354 go on\r\n")
                held = b"".join(iter(self.rfile.readline, b".\r\n"))
                self.server.got.append(held.decode())
            elif word == b"QUIT":
                self.wfile.write(b"221 bye\r\n")
                return
            self.wfile.write(b"250 ok\r\n")


class Chat(http.server.BaseHTTPRequestHandler):
    def do_POST(self):
        self.server.got.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
        self.send_response(200)
        self.end_headers()

    def log_message(self, *_):
        pass


@pytest.fixture
def servers():
    made = [socketserver.ThreadingTCPServer(("127.0.0.1", 0), handler) for handler in (Mailbox, Chat)]
    for server in made:
        server.got = []
        threading.Thread(target=server.serve_forever, daemon=True).start()
    yield made
    for server in made:
        server.shutdown()
        server.server_close()


def test_an_alert_is_told_once_in_a_while_and_a_recovery_once(tmp_path, servers):
    mail, chat = servers
    dead = [*trains()]
    folder = staged(tmp_path / "run", dead, GOOD, lock="dead")
    script = tmp_path / "tell"
    script.write_text(f'#!/bin/sh\necho "$2" >> {tmp_path}/told\n')
    script.chmod(0o755)
    flags = [
        f"--mail_server=127.0.0.1:{mail.server_address[1]}", "--mail=a@example.org,b@example.org",
        f"--webhook=http://127.0.0.1:{chat.server_address[1]}/x", "--webhook_shape=feishu",
        f"--command={script} 'a word'", f"--log={tmp_path / 'main_log.txt'}",
    ]  # fmt: skip
    for _ in range(2):
        assert check(folder, *flags)[0] == GONE
    assert len(mail.got) == len(chat.got) == 1, "the second is within --quiet_hours"
    assert "***ALERT: run is not RUNNING" in mail.got[0] and "To: a@example.org, b@example.org" in mail.got[0]
    assert chat.got[0]["msg_type"] == "text" and "***ALERT: run is not" in chat.got[0]["content"]["text"]
    assert "***ALERT" in (tmp_path / "told").read_text()
    assert check(folder, *flags, "--quiet_hours=0")[0] == GONE and len(mail.got) == 2
    with open(folder / "events.jsonl", "a") as events:
        events.write(json.dumps(end(0)) + "\n")
    for _ in range(2):
        assert check(folder, *flags)[0] == 0
    assert len(mail.got) == 3 and "Subject: run: well again" in mail.got[2]
    assert len((tmp_path / "main_log.txt").read_text().splitlines()) == 5


def test_what_cannot_be_told_is_said_and_tried_again(tmp_path, capsys):
    folder = staged(tmp_path / "run", trains(), GOOD, lock="dead")
    words = [sys.executable, "-m", "llama_fn.tools.pulse", str(folder), f"--state={tmp_path / 'told'}"]
    done = subprocess.run([*words, "--command=false"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == GONE and "was not told: --command: false ended with status 1" in done.stderr
    assert not (tmp_path / "told").exists()
    done = subprocess.run([*words, "--webhook=file:///etc/passwd"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and "is no http or https address" in done.stderr


def test_shapes_of_posts_and_durations():
    assert alerts.BODIES["slack"]("x") == {"text": "x"}
    assert alerts.BODIES["dingtalk"]("x") == {"msgtype": "text", "text": {"content": "x"}}
    assert [duration(s) for s in (5, 65, 3600, 90061)] == ["0:05", "1:05", "1:00:00", "1-01:01:01"]

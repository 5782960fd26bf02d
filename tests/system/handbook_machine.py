"""Runs the blocks of the handbook, one after another, on a machine made for it.

Started by test_handbook.py as root of namespaces of its own: /etc, /var/lib, /srv and /mnt are the host's, but
what is written there is gone afterwards; the network is a loopback. `systemctl` is played by `Services`: it
starts and stops the very programs of the units in deploy/systemd, and waits for their READY=1.
"""

# ruff: noqa: T201 - what it prints is what the test shows

import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

UNITS = {
    "mosquitto": "mosquitto -c /etc/mosquitto/liberatai/mosquitto.conf",
    "liberatai-coordinator": "liberatai serve --config /etc/liberatai/coordinator.yaml",
    "liberatai-agent": "liberatai-agent run",
}
NOTIFIES = ("liberatai-coordinator", "liberatai-agent")
OVERLAID = ("/etc", "/var/lib", "/srv", "/mnt")
SOON_S = 120.0
SYSTEMCTL = """#!{python}
import socket, sys
asked = socket.socket(socket.AF_UNIX)
asked.connect({address!r})
asked.sendall(" ".join(sys.argv[1:]).encode())
asked.shutdown(socket.SHUT_WR)
answer = b"".join(iter(lambda: asked.recv(4096), b"")).decode()
print(answer, end="")
sys.exit(bool(answer))
"""


def main() -> int:
    """Run all blocks; 1: one has failed."""
    handbook, root = Path(sys.argv[1]).read_text(encoding="utf-8"), Path(sys.argv[2])
    programs = make_machine(root)
    os.environ["PATH"] = f"{programs}:{Path(sys.executable).parent}:{os.environ['PATH']}:/usr/sbin:/sbin"
    work = root / "work"
    work.mkdir()
    os.chdir(work)
    services = Services(root)
    words: dict[str, str] = {}
    try:
        for title, block in blocks(handbook):
            print(f"== {title}", flush=True)
            for command in commands(block):
                if not run(command, services, words):
                    return 1
    finally:
        services.stop_all()
    return 0


def make_machine(root: Path) -> Path:
    """Lay a skin over the folders that are written to, and return the folder with stand-ins for programs."""
    subprocess.run(["mount", "-t", "tmpfs", "tmpfs", str(root)], check=True)
    for folder in OVERLAID:
        upper, inner = root / f"upper{folder}", root / f"inner{folder}"
        upper.mkdir(parents=True)
        inner.mkdir(parents=True)
        options = f"lowerdir={folder},upperdir={upper},workdir={inner}"
        subprocess.run(["mount", "-t", "overlay", "overlay", "-o", options, folder], check=True)
    subprocess.run(["ip", "link", "set", "lo", "up"], check=True)
    with Path("/etc/hosts").open("a", encoding="ascii") as hosts:
        hosts.write("127.0.0.1 broker.example.org\n")
    rng = np.random.default_rng(0)
    x = rng.uniform(-1, 1, (300, 2)).astype(np.float32)
    np.savez("/srv/private.npz", x=x, y=(np.hypot(*x.T) < 0.7).astype(np.int64))
    programs = root / "programs"
    programs.mkdir()
    asking = SYSTEMCTL.format(python=sys.executable, address=str(root / "systemctl.sock"))
    for name, text in (("sudo", '#!/bin/sh\nexec "$@"\n'), ("systemctl", asking)):
        path = programs / name
        path.write_text(text, encoding="ascii")
        path.chmod(0o755)
    return programs


class Services:
    """What systemd does with our units: start and wait until they are ready, stop, restart; logs in files."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._running: dict[str, subprocess.Popen[bytes]] = {}
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.bind(str(root / "systemctl.sock"))
        self._socket.listen()

    def serve_while(self, process: "subprocess.Popen[bytes]") -> None:
        """Answer calls of systemctl until a command has ended."""
        self._socket.settimeout(0.1)
        while process.poll() is None:
            try:
                caller, _ = self._socket.accept()
            except TimeoutError:
                continue
            with caller:
                asked = b"".join(iter(lambda: caller.recv(4096), b"")).decode().split()  # noqa: B023
                caller.sendall(self._do([word for word in asked if not word.startswith("-")]).encode())

    def _do(self, words: list[str]) -> str:
        verb, *units = words
        for unit in (name.removesuffix(".service") for name in units):
            if unit not in UNITS:
                return f"Unit {unit} not found.\n"
            if verb in ("stop", "restart"):
                self.stop(unit)
            if verb == "reload" and unit in self._running:
                self._running[unit].send_signal(signal.SIGHUP)
            if verb in ("start", "restart", "enable") and (fault := self._start(unit)):
                return fault
        return ""

    def _start(self, unit: str) -> str:
        if unit in self._running and self._running[unit].poll() is None:
            return ""
        notifies = unit in NOTIFIES
        with (
            tempfile.TemporaryDirectory() as folder,
            socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as ready,
        ):
            ready.bind(f"{folder}/notify")
            ready.settimeout(0.2)
            environment = dict(os.environ) | ({"NOTIFY_SOCKET": f"{folder}/notify"} if notifies else {})
            with (self._root / f"{unit}.log").open("ab") as log:
                process = subprocess.Popen(
                    UNITS[unit].split(), env=environment, stdout=log, stderr=subprocess.STDOUT
                )
            self._running[unit] = process
            ends_s = time.monotonic() + 60
            while process.poll() is None and time.monotonic() < ends_s:
                if not notifies:
                    time.sleep(1.0)
                    return "" if process.poll() is None else f"{unit} failed\n{self.log(unit)}"
                try:
                    if b"READY=1" in ready.recv(4096):
                        return ""
                except TimeoutError:
                    continue
        return f"{unit} is not ready\n{self.log(unit)}"

    def stop(self, unit: str, number: int = signal.SIGTERM) -> None:
        """End a service."""
        process = self._running.pop(unit, None)
        if process is not None:
            process.send_signal(number)
            process.wait(60)

    def stop_all(self) -> None:
        """End all."""
        for unit in list(self._running):
            self.stop(unit)

    def log(self, unit: str) -> str:
        """Return the end of a service's log."""
        path = self._root / f"{unit}.log"
        return "\n".join(path.read_text(errors="replace").splitlines()[-15:]) if path.exists() else ""


def blocks(text: str) -> list[tuple[str, str]]:
    """Return the blocks of shell commands, each with the heading that it stands under."""
    found, title = [], ""
    for heading, block in re.findall(r"^## (.+?)$|^```sh\n(.*?)^```$", text, re.MULTILINE | re.DOTALL):
        title = heading or title
        if block:
            found.append((title, block))
    return found


def commands(block: str) -> list[str]:
    """Return the commands of a block; a here-document belongs to its command."""
    found, rest = [], block.splitlines()
    while rest:
        lines = [rest.pop(0)]
        if end := re.search(r"<<'(\w+)'", lines[0]):
            while lines[-1] != end[1]:
                lines.append(rest.pop(0))
        found.append("\n".join(lines))
    return [command for command in found if command.strip() and not command.startswith("#")]


def run(command: str, services: Services, words: dict[str, str]) -> bool:
    """Run one command as an operator would; again and again where a remark says what is soon so."""
    if "# another machine" in command:
        lose_the_machine(services)
    command = re.sub(r"\b(TOKEN|RELEASE_KEY)\b", lambda found: words.get(found[0], found[0]), command)
    soon = re.search(r"# soon: (.+)$", command)
    ends_s = time.monotonic() + SOON_S
    while True:
        with tempfile.TemporaryFile() as out:
            process = subprocess.Popen(["bash", "-ec", command], stdout=out, stderr=subprocess.STDOUT)
            services.serve_while(process)
            out.seek(0)
            told = out.read().decode(errors="replace")
        well = process.returncode == 0 and (soon is None or soon[1] in told)
        if well or soon is None or time.monotonic() > ends_s:
            break
        time.sleep(1.0)
    print(f"$ {command}\n{told}", flush=True)
    for name, pattern in (("TOKEN", r"enrol (\S+)$"), ("RELEASE_KEY", r'release_key: "([0-9a-f]{64})"')):
        if found := re.search(pattern, told, re.MULTILINE):
            words[name] = found[1]
    if not well:
        print(f"FAILED: exit code {process.returncode}, wanted {soon[1] if soon else 'success'!r}")
        for unit in UNITS:
            print(f"--- {unit}\n{services.log(unit)}")
    return well


def lose_the_machine(services: Services) -> None:
    """The coordinator's machine is gone: what comes now is on another one, which has the broker's name."""
    services.stop("liberatai-coordinator", signal.SIGKILL)
    services.stop("mosquitto", signal.SIGKILL)
    lost = ("/etc/liberatai/coordinator.yaml", "/var/lib/liberatai", "/etc/mosquitto/liberatai")
    subprocess.run(["rm", "-rf", *lost], check=True)


if __name__ == "__main__":
    sys.exit(main())

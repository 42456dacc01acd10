"""Network namespaces of this machine, one a host, and cuts between two of them.

    root (the test) ---+
                       |  bridge, in a namespace of its own
    buffer ---veth-----+-----veth--- engine-0
    router ---veth-----+-----veth--- ...

A silent cut gives a host a wrong, permanent link-layer address for another one: frames leave and nobody takes
them, established connections included, and no sender hears of it. One such entry drops one direction, two cut
both. `refusing` is the other kind: packets are rejected, so that connections break at once and new ones are
refused. The test itself reaches every host all the time.

`Network` owns namespaces, links and the processes in them: they end with the block, and those of an earlier
run that crashed are removed at the next start (their names carry the process id of their owner).
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Generator, Mapping, Sequence
from pathlib import Path

NOBODY = "02:00:00:00:00:99"
_PREFIX = "mpnet"
_COMMAND_S = 20.0
_STOP_S = 20.0
_PR_SET_PDEATHSIG = 1
_LIBC = ctypes.CDLL(None)


def why_not() -> str:
    """Why there can be no namespaces here; empty: there can. Finds out by trying."""
    if not sys.platform.startswith("linux") or not shutil.which("ip") or not shutil.which("nsenter"):
        return "network namespaces need Linux with iproute2 and util-linux"
    if os.geteuid():
        return "network namespaces need root"
    try:
        with Network(["probe"]):
            return ""
    except RuntimeError as error:
        return f"no network namespaces here: {error}"


class Network:
    """Hosts that see one another.

    Args:
      hosts: their names.
    """

    def __init__(self, hosts: Sequence[str]) -> None:
        self._tag = f"{_PREFIX}-{os.getpid()}"
        self._hub = f"{self._tag}-hub"
        self._outside = f"mp{os.getpid()}"
        self._subnet = ""
        self._hosts = {name: i for i, name in enumerate(hosts, start=2)}
        self._processes: list[subprocess.Popen[bytes]] = []

    # ------------------------------------------------------------------ life

    def __enter__(self) -> Network:
        _remove_leftovers()
        try:
            self._build()
        except BaseException:
            self._remove()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._remove()

    def _build(self) -> None:
        self._subnet = _free_subnet()
        _ip("netns", "add", self._hub)
        _ip("-n", self._hub, "link", "add", "bridge", "type", "bridge")
        _ip("-n", self._hub, "link", "set", "bridge", "up")
        _ip("link", "add", self._outside, "type", "veth", "peer", "name", "port1", "netns", self._hub)
        _ip("-n", self._hub, "link", "set", "port1", "master", "bridge", "up")
        _ip("addr", "add", f"{self._subnet}.1/24", "dev", self._outside)
        _ip("link", "set", self._outside, "up")
        for name, number in self._hosts.items():
            self._add_host(self.namespace(name), number)

    def _add_host(self, namespace: str, number: int) -> None:
        port = f"port{number}"
        _ip("netns", "add", namespace)
        _ip("-n", self._hub, "link", "add", port, "type", "veth", "peer", "name", "eth0", "netns", namespace)
        _ip("-n", self._hub, "link", "set", port, "master", "bridge", "up")
        _ip("-n", namespace, "addr", "add", f"{self._subnet}.{number}/24", "dev", "eth0")
        _ip("-n", namespace, "link", "set", "lo", "up")
        _ip("-n", namespace, "link", "set", "eth0", "up")

    def _remove(self) -> None:
        for process in reversed(self._processes):
            end(process)
        with contextlib.suppress(RuntimeError):
            _ip("link", "del", self._outside)
        for name in [*map(self.namespace, self._hosts), self._hub]:
            with contextlib.suppress(RuntimeError):
                _remove_namespace(name)

    # ------------------------------------------------------------------ hosts

    def namespace(self, host: str) -> str:
        """Name of a host's namespace."""
        return f"{self._tag}-{host}"

    def address(self, host: str) -> str:
        """IPv4 address of a host."""
        return f"{self._subnet}.{self._hosts[host]}"

    def spawn(
        self, host: str, command: Sequence[str | Path], *, log: Path, environ: Mapping[str, str] | None = None
    ) -> subprocess.Popen[bytes]:
        """Starts a process on a host: its own process group, killed with the block, or when the test dies."""
        words = ["nsenter", f"--net=/run/netns/{self.namespace(host)}", *map(str, command)]
        parent = os.getpid()
        inherited = {k: v for k, v in os.environ.items() if not k.startswith("MILEPOST_")}

        def die_with_parent() -> None:
            _LIBC.prctl(_PR_SET_PDEATHSIG, int(signal.SIGKILL), 0, 0, 0)
            if os.getppid() != parent:
                os._exit(1)

        with log.open("ab") as out:
            process = subprocess.Popen(
                words,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=out,
                env={**inherited, **(environ or {})},
                start_new_session=True,
                preexec_fn=die_with_parent,
            )
        self._processes.append(process)
        return process

    # ------------------------------------------------------------------ cuts

    @contextlib.contextmanager
    def cut(self, one: str, other: str) -> Generator[None]:
        """Nothing passes between two hosts, and nobody is told."""
        with self.deaf(to=one, from_=other), self.deaf(to=other, from_=one):
            yield

    @contextlib.contextmanager
    def deaf(self, *, to: str, from_: str) -> Generator[None]:
        """What `from_` sends to `to` is lost; the other direction passes."""
        entry = (self.address(to), "dev", "eth0")
        where = self.namespace(from_)
        _ip("-n", where, "neigh", "replace", *entry, "lladdr", NOBODY, "nud", "permanent")
        try:
            yield
        finally:
            _ip("-n", where, "neigh", "del", *entry)

    @contextlib.contextmanager
    def refusing(self, one: str, other: str) -> Generator[None]:
        """Connections between two hosts are reset, and new ones refused."""
        answers_pass = ("-p", "tcp", "!", "--tcp-flags", "RST", "RST")
        with contextlib.ExitStack() as stack:
            for to, from_ in ((one, other), (other, one)):
                rule = ("INPUT", "-s", self.address(from_), *answers_pass)
                rule = (*rule, "-j", "REJECT", "--reject-with", "tcp-reset")
                _iptables(self.namespace(to), "-A", *rule)
                stack.callback(_iptables, self.namespace(to), "-D", *rule)
            yield

    def can_refuse(self) -> bool:
        """Whether packets can be rejected here."""
        try:
            with self.refusing(*list(self._hosts)[:2]):
                return True
        except (RuntimeError, FileNotFoundError):
            return False


def end(process: subprocess.Popen[bytes], *, patience_s: float = 0.0) -> int:
    """Ends a process and its group: asks first if there is patience; returns its exit status."""
    if process.poll() is None and patience_s:
        process.send_signal(signal.SIGINT)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(patience_s)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    return process.wait(_STOP_S)


def _remove_leftovers() -> None:
    """Removes namespaces whose owner is gone, and what runs in them."""
    names = re.findall(rf"^({_PREFIX}-(\d+)-\S+)", _ip("netns", "list"), re.MULTILINE)
    for name, pid in names:
        if not Path(f"/proc/{pid}").exists():
            with contextlib.suppress(RuntimeError):
                _remove_namespace(name)


def _remove_namespace(name: str) -> None:
    for pid in _ip("netns", "pids", name).split():
        with contextlib.suppress(ProcessLookupError):
            os.kill(int(pid), signal.SIGKILL)
    _ip("netns", "del", name)


def _free_subnet() -> str:
    taken = set(re.findall(r"inet (\d+\.\d+\.\d+)\.", _ip("-4", "-o", "addr", "show")))
    return next(s for i in range(256) if (s := f"10.213.{(os.getpid() + i) % 256}") not in taken)


def _ip(*words: str) -> str:
    return _command("ip", *words)


def _iptables(namespace: str, *words: str) -> None:
    _command("nsenter", f"--net=/run/netns/{namespace}", "iptables", "-w", "5", *words)


def _command(*words: str) -> str:
    done = subprocess.run(words, capture_output=True, text=True, timeout=_COMMAND_S, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(words)}: {done.stderr.strip() or done.returncode}")
    return done.stdout

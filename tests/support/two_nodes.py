"""Two nodes on this machine: network namespaces joined by a cable, reached by an `ssh` that enters them."""

import contextlib
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
ON_HOSTS = ROOT / "launchers" / "shell" / "on_hosts.sh"


@dataclass(frozen=True)
class Nodes:
    """Two nodes, a hostfile that names them, and the environment in which `ssh` reaches them."""

    hostfile: Path
    env: dict[str, str]
    addresses: tuple[str, str] = ("127.0.0.1", "127.0.0.1")

    def start(self, command: str, **options: object) -> subprocess.Popen:
        """Run a command on both, by launchers/shell/on_hosts.sh."""
        words = ["bash", str(ON_HOSTS), str(self.hostfile), command]
        return subprocess.Popen(words, env=self.env, cwd=ROOT, text=True, encoding="utf-8", **options)

    def run(self, command: str, timeout: float = 200) -> tuple[int, str]:
        """Exit code and output of a command on both."""
        with self.start(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as process:
            try:
                output, _ = process.communicate(timeout=timeout)
            except subprocess.TimeoutExpired:
                process.terminate()
                raise
        return process.returncode, output


def same_machine(folder: Path, enter: str = "") -> Nodes:
    """Two names for this machine; `enter` is what the pretended ssh puts before `sh`."""
    commands = folder / "commands"
    commands.mkdir(parents=True)
    ssh = commands / "ssh"
    ssh.write_text(
        # Called as `ssh -o BatchMode=yes HOST COMMAND`; a real one passes on no environment but this little.
        f"""#!/bin/sh
test "$1 $2" = "-o BatchMode=yes" && test $# = 4 || exit 255
host=$3
exec env -i HOME="$HOME" DS_ACCELERATOR=cpu CUDA_VISIBLE_DEVICES= {enter} sh -c "$4"
""",
        encoding="utf-8",
    )
    ssh.chmod(0o755)
    hostfile = folder / "hosts"
    names = [f"dt{os.getpid()}{letter}" for letter in "ab"]
    hostfile.write_text(f"# two\n{names[0]} slots=1\n\n{names[1]} slots=1\n", encoding="utf-8")
    path = f"{commands}:{Path(sys.executable).parent}:{os.environ['PATH']}"
    env = {**os.environ, "PATH": path, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        env.pop(name, None)
    return Nodes(hostfile, env)


class NoNamespacesError(Exception):
    """This process may not make network namespaces, or cannot."""


@contextlib.contextmanager
def own_networks(folder: Path) -> Iterator[Nodes]:
    """Two nodes, each with a network of its own, that end with the block.

    Raises:
        NoNamespacesError: There is no `ip`, or this process may not make namespaces.
    """
    ip = shutil.which("ip", path=f"{os.environ['PATH']}:/usr/sbin:/sbin")
    if ip is None:
        raise NoNamespacesError("there is no `ip` (iproute2)")
    nodes = same_machine(folder, f'{ip} netns exec "$host"')
    names = [line.split()[0] for line in nodes.hostfile.read_text("utf-8").splitlines() if " slots=" in line]
    addresses = ("10.77.0.1", "10.77.0.2")
    try:
        for name in names:
            _ip(ip, "netns", "add", name)
        _ip(ip, "link", "add", "eth0", "netns", names[0], "type", "veth", "peer", "eth0", "netns", names[1])
        for name, address in zip(names, addresses, strict=True):
            _ip(ip, "-n", name, "addr", "add", f"{address}/24", "dev", "eth0")
            _ip(ip, "-n", name, "link", "set", "lo", "up")
            _ip(ip, "-n", name, "link", "set", "eth0", "up")
        # The same name in both, by which gloo finds the cable.
        env = {**nodes.env, "GLOO_SOCKET_IFNAME": "eth0", "MASTER_ADDR": addresses[0]}
        yield Nodes(nodes.hostfile, env, addresses)
    finally:
        for name in names:  # takes the cable along
            subprocess.run([ip, "netns", "del", name], capture_output=True)


def _ip(*words: str) -> None:
    done = subprocess.run(words, capture_output=True, text=True, encoding="utf-8")
    if done.returncode:
        raise NoNamespacesError(f"{' '.join(words)}: {' '.join(done.stderr.split())}")

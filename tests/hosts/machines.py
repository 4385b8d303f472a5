"""Isolated hosts on one machine: each with a network, processes, files and an sshd of its own, joined by a switch.

They are namespaces without names, so several users' hosts do not meet, and all of it goes when the process that started them ends, however
it ends. Needs root, iproute2, openssh-server and rsync. By hand, from the top folder: ``python -i tests/hosts/machines.py FOLDER COUNT``.
"""

import os
import shutil
import signal
import subprocess
import sys
import sysconfig
import tempfile
import time
from contextlib import suppress
from pathlib import Path

CODE = Path(__file__).parents[2]
CTL = "ctl"
NETWORK = "10.77.0."
GATEWAY = NETWORK + "254"
STORE_PORT = 9000
# What a host must know of the S3 that a test may run on ``ctl`` (store.py).
STORE = {
    "AWS_ENDPOINT_URL": f"http://{GATEWAY}:{STORE_PORT}",
    "AWS_ACCESS_KEY_ID": "test-key",
    "AWS_SECRET_ACCESS_KEY": "test-secret",
    "AWS_DEFAULT_REGION": "us-east-1",
}
NEEDS = {"ip": "iproute2", "sshd": "openssh-server", "ssh-keygen": "openssh-client", "rsync": "rsync", "unshare": "util-linux"}
# Dies with this process.
TIED = ("setpriv", "--pdeathsig", "KILL")


class Hosts:
    """``count`` hosts h1, h2, ... with the addresses 10.77.0.1, ..., and ``ctl``, from which a user drives them.

    A host has a disk of its own of ``disk`` bytes with /root and /tmp, which is kept when it is killed and started again. ``shared`` is one
    folder for all, as a shared file system would be. The rest of the machine's files is seen by all.

    Raises:
        RuntimeError: not root, a program is missing, or a host does not come up; the message says what to do.
    """

    def __init__(self, folder: Path, count: int, disk: str = "2g") -> None:
        check_machine()
        self.folder = folder
        self.shared = folder / "shared"
        self.names = [f"h{number + 1}" for number in range(count)]
        self._boots: dict[str, subprocess.Popen[str]] = {}  # host -> what started it
        self._logs = 0
        for name in ("shared", "keys", "logs"):
            (folder / name).mkdir(parents=True)
        make_image(folder / "image")
        for key in ("id", "host"):
            subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", folder / "keys" / key], check=True)
        # The switch also holds the disks: a file system lives as long as one namespace has it.
        self._switch = subprocess.Popen([*TIED, "unshare", "--net", "--mount", "sleep", "infinity"])
        try:
            self._wait_for_switch()
            self._at_switch("ip link add br0 type bridge && ip link set br0 up")
            for name in [CTL, *self.names]:
                (folder / "disks" / name).mkdir(parents=True)
                self._at_switch(f"mount -t tmpfs -o size={disk} disk {folder / 'disks' / name}")
                self._boot(name)
            for name in [CTL, *self.names]:
                self._wait_for(name)
        except BaseException:
            self.down()
            raise

    def ip(self, name: str) -> str:
        """Address of a host."""
        return GATEWAY if name == CTL else NETWORK + name.removeprefix("h")

    def start(self, name: str) -> None:
        """Switch a host on, and wait until it answers to ssh."""
        self._boot(name)
        self._wait_for(name)

    def _boot(self, name: str) -> None:
        settings = {
            "NAME": name,
            "IP": self.ip(name),
            "GATEWAY": GATEWAY,
            "KEYS": self.folder / "keys",
            "IMAGE": self.folder / "image",
            "DISK": self.folder / "disks" / name,
            "SHARED": self.shared,
            "CODE": CODE,
            "VENV": sys.prefix,
            "PYTHON": sys.base_prefix,
        }
        environment = {"PATH": os.environ["PATH"], **{f"HOST_{key}": str(value) for key, value in settings.items()}}
        unshare = ("unshare", "--net", "--pid", "--mount", "--uts", "--ipc", "--fork", "--kill-child", "--mount-proc")
        with self._boot_log(name).open("a") as errors:
            self._boots[name] = subprocess.Popen(
                [
                    *TIED,
                    "nsenter",
                    f"--mount=/proc/{self._switch.pid}/ns/mnt",
                    *unshare,
                    "bash",
                    Path(__file__).with_name("boot.sh"),
                ],
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
            )
        self._at_switch(
            f"ip link add {name} type veth peer name eth0 netns {self._first(name)} && ip link set {name} master br0 up"
        )

    def _wait_for(self, name: str) -> None:
        said = self._boots[name].stdout
        if said is None or said.readline() != "ready\n":
            raise RuntimeError(f"host {name} did not start: {self._boot_log(name).read_text()}")

    def kill(self, name: str) -> None:
        """Pull the plug: nobody hears of it, not even by a closed connection."""
        self.cut(name)
        os.kill(self._first(name), signal.SIGKILL)
        self._boots.pop(name).wait()
        self._at_switch(f"ip link del {name} || true")  # it goes with the host's network, sooner or later

    def cut(self, name: str) -> None:
        """Pull the network cable of a host."""
        self._at_switch(f"ip link set {name} down")

    def mend(self, name: str) -> None:
        """Put the cable back."""
        self._at_switch(f"ip link set {name} up")

    def fill(self, name: str) -> None:
        """Fill the disk of a host to the last byte."""
        self.run(name, "dd if=/dev/zero of=/tmp/filling bs=1M status=none", check=False)

    def free(self, name: str) -> None:
        """Take away what ``fill`` wrote."""
        self.run(name, "rm -f /tmp/filling")

    def run(self, name: str, command: str, timeout: float = 120.0, check: bool = True) -> subprocess.CompletedProcess[str]:
        """Run a shell command on a host and return it with its output; what runs longer is killed there (return code 124 or 137).

        Raises:
            RuntimeError: it failed and ``check`` is set; the message has its output.
        """
        # Not through pipes: what the command leaves behind (the master of ssh, daemons) would hold them open.
        with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
            limited = ["timeout", "--kill-after=5", f"{timeout}", "bash", "-c", f". ~/.bashrc; cd; {command}"]
            code = subprocess.run([*self._enter(name), *limited], stdin=subprocess.DEVNULL, stdout=out, stderr=err, check=False)
            out.seek(0)
            err.seek(0)
            done = subprocess.CompletedProcess(command, code.returncode, out.read(), err.read())
        if check and done.returncode:
            raise RuntimeError(f"{name}: {command}\nreturned {done.returncode}\n{done.stdout[-4000:]}\n{done.stderr[-4000:]}")
        return done

    def begin(self, name: str, command: str) -> "Running":
        """Start a shell command on a host and go on."""
        self._logs += 1
        return Running(
            [*self._enter(name), "bash", "-c", f". ~/.bashrc; cd; {command}"], self.folder / "logs" / f"{self._logs:03}-{name}"
        )

    def wait_for_port(self, name: str, port: int, serving: "Running", timeout: float = 180.0) -> None:
        """Wait until a host answers on ``port``, which ``serving`` will open."""
        end = time.monotonic() + timeout
        while self.run(name, f"timeout 2 bash -c '</dev/tcp/{self.ip(name)}/{port}'", check=False).returncode:
            if serving.returncode is not None or time.monotonic() > end:
                raise RuntimeError(f"{name}: nothing answers on port {port}: {serving.err.read_text()[-4000:]}")
            time.sleep(0.5)

    def is_up(self, name: str) -> bool:
        """Whether a host is switched on."""
        return name in self._boots

    def down(self) -> None:
        """End all hosts."""
        for name, boot in self._boots.items():
            if boot.poll() is None:
                os.kill(self._first(name), signal.SIGKILL)  # takes all processes of the host along, and ``boot`` ends after them
            boot.wait()
        self._boots.clear()
        self._switch.kill()
        self._switch.wait()

    def _first(self, name: str) -> int:
        """Process 1 of a host, by its number on this machine."""
        outer, end = self._boots[name].pid, time.monotonic() + 10
        while outer and time.monotonic() < end:
            children = Path(f"/proc/{outer}/task/{outer}/children").read_text().split()
            if children:
                return int(children[0])
            time.sleep(0.01)
        raise RuntimeError(f"host {name} did not start: {self._boot_log(name).read_text()}")

    def _boot_log(self, name: str) -> Path:
        return self.folder / "logs" / f"boot-{name}.log"

    def _enter(self, name: str) -> list[str]:
        """A command in front of others, which then run on a host as root of a clean environment."""
        home = ["HOME=/root", "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "LANG=C.UTF-8", "TERM=dumb"]
        return [*TIED, "nsenter", f"--target={self._first(name)}", *("-n", "-p", "-m", "-u", "-i"), "--", "env", "-i", *home]

    def _wait_for_switch(self) -> None:
        end = time.monotonic() + 10
        while Path(f"/proc/{self._switch.pid}/comm").read_text() != "sleep\n":
            if self._switch.poll() is not None or time.monotonic() > end:
                raise RuntimeError("hosts: this machine lets nobody make network namespaces (unshare --net)")
            time.sleep(0.01)

    def _at_switch(self, command: str) -> None:
        enter = ["nsenter", f"--net=/proc/{self._switch.pid}/ns/net", f"--mount=/proc/{self._switch.pid}/ns/mnt"]
        done = subprocess.run([*enter, "sh", "-c", command], capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(f"hosts: {command}: {done.stderr.strip()}")


class Running:
    """A command that runs on a host."""

    def __init__(self, command: list[str], log: Path) -> None:
        self.out, self.err = log.with_suffix(".out"), log.with_suffix(".err")
        with self.out.open("w") as out, self.err.open("w") as err:
            self._process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=out, stderr=err)

    @property
    def returncode(self) -> int | None:
        """None while it runs."""
        return self._process.poll()

    def wait(self, timeout: float) -> int:
        """Its return code, when it has ended; ``subprocess.TimeoutExpired`` if it has not by then."""
        return self._process.wait(timeout)

    def kill(self) -> None:
        """SIGKILL to the command and to all that it started and did not detach, and wait for its end."""
        for process in reversed(_below(self._process.pid)):
            with suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)
        self._process.wait(10)


def _below(process: int) -> list[int]:
    """Children of a process, their children, ..., parents first."""
    children = [int(pid) for path in Path(f"/proc/{process}/task").glob("*/children") for pid in path.read_text().split()]
    return children + [pid for child in children for pid in _below(child)]


def make_image(folder: Path) -> None:
    """The home folder of a host that a careful administrator prepared for life without internet: ~/csm-venv with all packages but csm."""
    venv = folder / "csm-venv"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", venv], check=True)
    site = Path(sysconfig.get_path("purelib"))
    (venv / site.relative_to(sys.prefix) / "image.pth").write_text(f"{site}\n")
    for script in Path(sys.prefix, "bin").iterdir():
        if script.is_file() and not script.is_symlink() and script.name != "csm":
            first, _, rest = script.read_bytes().partition(b"\n")
            if first.startswith(b"#!") and b"python" in first:
                (venv / "bin" / script.name).write_bytes(b"#!/root/csm-venv/bin/python\n" + rest)
                (venv / "bin" / script.name).chmod(0o755)
    pip = folder / ".config" / "pip" / "pip.conf"
    pip.parent.mkdir(parents=True)
    pip.write_text("[global]\nno-index = true\nno-build-isolation = false\n")
    (folder / ".csm_env").write_text("".join(f"export {name}={value}\n" for name, value in STORE.items()))
    # Ray's workers are nice to the rest of a machine; here the rest is all the other hosts.
    (folder / ".bashrc").write_text("export RAY_worker_niceness=0\n")


def check_machine() -> None:
    """Raise ``RuntimeError`` if no hosts can be made here."""
    if os.geteuid():
        raise RuntimeError("hosts: only root can make them; try sudo make cluster-test")
    missing = [
        package for program, package in NEEDS.items() if not shutil.which(program, path=f"{os.environ['PATH']}:/usr/sbin:/sbin")
    ]
    if missing:
        raise RuntimeError(f"hosts: needs {', '.join(missing)}; Debian, Ubuntu: apt install {' '.join(missing)}")


if __name__ == "__main__":
    hosts = Hosts(Path(sys.argv[1]).absolute(), int(sys.argv[2]))
    print(f"hosts {', '.join(hosts.names)} are up: hosts.run('h1', 'hostname'), hosts.kill('h1'), ...; they go when you leave")

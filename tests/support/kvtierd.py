"""A private kvtierd for a test: started in a temporary runtime directory, stopped by its pid.

    with Daemon(sets={"device.cpu0.budget": "8MiB", "host.budget": "64MiB"}) as daemon:
        ...  daemon.runtime_dir, daemon.pid, daemon.front_pid(), daemon.log()

Programs come from $KVT_BIN, or build/release/bin. `sets` become --set options; `config` is the text
of a configuration file. Nothing is left behind: the daemon is stopped, its directory removed. A
daemon that does not stop, or that a sanitizer complained about, fails the test.
"""

import os
import resource
import shutil
import signal
import subprocess
import tempfile
import threading
import time

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
BIN = os.environ.get("KVT_BIN") or os.path.join(ROOT, "build", "release", "bin")
# Sanitizers are slower, and so are the machines that they run on.
SLOWER = {"asan": 4, "tsan": 8}.get(os.environ.get("KVT_VARIANT", ""), 1)

EXIT_FAILED, EXIT_USAGE, EXIT_TAKEN, EXIT_DEVICE, EXIT_STUCK = 1, 2, 3, 4, 5


def wait_until(condition, what, timeout_s=10):
    """Polls until condition() is true, and returns what it returned."""
    deadline = time.monotonic() + timeout_s * SLOWER
    while True:
        value = condition()
        if value:
            return value
        if time.monotonic() > deadline:
            raise AssertionError(f"not within {timeout_s * SLOWER} s: {what}")
        time.sleep(0.005)


def program(name):
    return os.path.join(BIN, name)


def open_folders(folder):
    """Lets other users pass through the folder and those above it."""
    while folder != "/":
        mode = os.stat(folder).st_mode
        if not mode & 0o001:
            os.chmod(folder, mode | 0o011)
        folder = os.path.dirname(folder)


class Daemon:
    def __init__(self, sets=None, config=None, runtime_dir=None, fds=None, arguments=(),
                 environment=None, user=None, start=True):
        self.directory = tempfile.mkdtemp(prefix="kvd.")
        self.runtime_dir = runtime_dir or os.path.join(self.directory, "run")
        self.sets = {"host.budget": "64MiB", "host.chunk": "1MiB", "device.cpu0.budget": "16MiB"}
        if config is not None:
            self.sets = {}
        self.sets.update(sets or {})
        self.config = config
        self.fds = fds
        self.arguments = list(arguments)
        self.environment = environment
        self.user = user  # a uid to run as, for a test that runs as root
        if user is not None:
            os.chown(self.directory, user, -1)
            self.open_to_others()
        self.process = None
        self.lines = []
        self.reader = None
        if start:
            try:
                self.start()
            except BaseException:
                self.close(check=False)
                raise

    def open_to_others(self):
        """Lets other users pass through the folders above the runtime directory."""
        open_folders(self.directory)

    # ---- life

    def command(self):
        path = os.path.join(self.directory, "kvtierd.conf")
        with open(path, "w", encoding="utf-8") as stream:
            stream.write(self.config or "")
        command = [program("kvtierd"), "--config", path, "--runtime-dir", self.runtime_dir]
        for name, value in self.sets.items():
            command += ["--set", f"{name}={value}"]
        return command + self.arguments

    def spawn(self):
        """Starts it and does not wait. The log is read by a thread, so that no pipe fills."""
        def limit():
            if self.fds is not None:
                resource.setrlimit(resource.RLIMIT_NOFILE, (self.fds, self.fds))
        self.lines = []
        self.process = subprocess.Popen(self.command(), stdin=subprocess.DEVNULL,
                                        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
                                        env=self.environment, user=self.user,
                                        extra_groups=None if self.user is None else [],
                                        preexec_fn=limit if self.fds else None)
        self.reader = threading.Thread(target=self._read, args=(self.process.stderr, self.lines))
        self.reader.start()

    @staticmethod
    def _read(stream, lines):
        for line in stream:
            lines.append(line.decode(errors="replace").rstrip("\n"))
        stream.close()

    def start(self):
        self.spawn()
        wait_until(lambda: self.ended() or self.has_line("ready:"), "the daemon is ready", 20)
        if self.ended():
            self.process.wait()
            self.reader.join()
            raise AssertionError(f"kvtierd ended with {self.process.returncode}:\n{self.log()}")
        return self

    def stop(self, check=True):
        """SIGTERM, and waits for the end. Returns the exit status."""
        if self.process is None:
            return None
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGCONT)
            self.process.send_signal(signal.SIGTERM)
        return self._wait(check)

    def kill(self):
        """SIGKILL, as the system does when memory runs out."""
        self.process.kill()
        self._wait(check=False)

    def _wait(self, check):
        process, self.process = self.process, None
        try:
            process.wait(timeout=20 * SLOWER)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            self.reader.join()
            raise AssertionError(f"kvtierd did not stop:\n{self.log()}") from None
        self.reader.join()
        if check and process.returncode != 0:
            raise AssertionError(f"kvtierd ended with {process.returncode}:\n{self.log()}")
        return process.returncode

    def close(self, check=True):
        try:
            self.stop(check)
        finally:
            shutil.rmtree(self.directory, ignore_errors=True)

    def __enter__(self):
        return self

    def __exit__(self, kind, value, traceback):
        self.close(check=kind is None)

    # ---- what can be asked

    @property
    def pid(self):
        return self.process.pid

    @property
    def attach_path(self):
        return os.path.join(self.runtime_dir, "attach.sock")

    @property
    def front_path(self):
        return os.path.join(self.runtime_dir, "front.sock")

    def ended(self):
        return self.process is None or self.process.poll() is not None

    def log(self):
        return "\n".join(self.lines)

    def has_line(self, text):
        return any(text in line for line in self.lines)

    def wait_for_line(self, text, timeout_s=10):
        wait_until(lambda: self.has_line(text) or self.ended(), f"'{text}' in the log", timeout_s)
        assert self.has_line(text), self.log()

    def front_pid(self):
        """The pid of kvtierd-front, or 0 while there is none."""
        path = f"/proc/{self.pid}/task/{self.pid}/children"
        try:
            with open(path, encoding="ascii") as stream:
                children = [int(word) for word in stream.read().split()]
        except OSError:
            return 0
        for child in children:
            try:
                with open(f"/proc/{child}/comm", encoding="ascii") as stream:
                    if stream.read().startswith("kvtierd-front"):
                        return child
            except OSError:
                continue
        return 0

    def fds_used(self):
        return len(os.listdir(f"/proc/{self.pid}/fd"))


def run_to_end(**options):
    """Starts a daemon that is expected to end by itself. Returns (exit status, log)."""
    daemon = Daemon(start=False, **options)
    try:
        daemon.spawn()
        wait_until(daemon.ended, "kvtierd has ended by itself", 20)
        daemon.process.wait()
        status = daemon.process.returncode
        daemon.process = None
        daemon.reader.join()
        return status, daemon.log()
    finally:
        daemon.close(check=False)

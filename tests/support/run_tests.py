#!/usr/bin/env python3
"""Run tests, each in its own process group with a time limit, and end with one summary line.

    tests/support/run_tests.py --variant release unit sim process fuzz python [--only WORD]

What is a test
    unit, process, crash, gpu   tests/<group>/test_*.c   its binary in build/<variant>/tests/<group>/
    process, crash, python,     tests/<group>/test_*.py  under pytest; each of its cases is counted
      gpu, lint                 tests/<group>/test_*.sh  under sh
    sim                         build/<variant>/bin/kvtier-sim --seconds N, behind the seeds of
                                tests/sim/seeds.txt; with release also each lie of the device
                                (--lies) and build/mutant/bin/kvtier-sim --break-all, if built
    fuzz                        tests/fuzz/fuzz_*.c      its binary in build/fuzz/fuzz/, seeds in
                                                         tests/fuzz/corpus/<name>/
    "lint" also runs tests/support/test_*.py: the checkers are checked first.

What a test is told, in its environment
    KVT_SOURCE   the repository's root, also the working directory
    KVT_BUILD    build/<variant>, absolute; KVT_BIN its programs, KVT_LIB its libraries
    KVT_VARIANT  release, asan, tsan ...
    KVT_MODEL    the model's GGUF file, when `make model` has fetched it
    KVT_TEST_DIR and TMPDIR  an empty directory of its own with a short path (a socket path holds
                 107 characters), removed afterwards

What a test says
    exit 0 passed; 77 skipped, the last line of output being the reason; anything else failed.
    In the first 40 lines of its source a comment may hold a line with directives:
        test: timeout_s=300      instead of TIMEOUT_S
        test: alone              nothing else runs beside it (it measures, or needs both cores)
    A process that still has the test's KVT_TEST_DIR in its environment when the test has ended is
    killed, and the test has failed: who starts a process stops it.
    A sanitizer's report from any process of the test fails it, whatever the exit codes were.

tests/skip.txt holds what is not run, with reasons; each prints a SKIP line.
"""

import argparse
import difflib
import fnmatch
import glob
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import xml.etree.ElementTree

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
TIMEOUT_S = 60
TAIL_LINES = 60
# Sanitizers are slower, and so are the machines that they run on.
SLOWER = {"asan": 4, "tsan": 8, "fuzz": 4}
# The leak checker looks at the threads of a process that is being killed: that is no leak.
HARMLESS = "Unable to get registers from thread"
SKIP_STATUS = 77
SANITIZER_OPTIONS = {
    "ASAN_OPTIONS": "detect_stack_use_after_return=1:strict_string_checks=1:handle_abort=1",
    "UBSAN_OPTIONS": "print_stacktrace=1",
    "LSAN_OPTIONS": "suppressions=tests/support/lsan.supp:print_suppressions=0",
    "TSAN_OPTIONS": "suppressions=tests/support/tsan.supp:second_deadlock_stack=1:"
                    "history_size=5:print_suppressions=0",
}


class Test:
    """One process to run: its name, command, limits; later its outcome."""

    def __init__(self, name, command, source=None, timeout_s=TIMEOUT_S, kind="binary"):
        self.name = name
        self.command = command
        self.kind = kind  # binary | pytest | sim | fuzz
        self.timeout_s = timeout_s
        self.alone = False
        self.passed = self.failed = self.skipped = 0
        self.text = []  # lines to print once it has ended
        if source:
            self.read_directives(source)

    def read_directives(self, source):
        with open(source, encoding="utf-8", errors="replace") as stream:
            head = [line for _, line in zip(range(40), stream)]
        for line in head:
            match = re.match(r"^[\s/*#]*test:\s+(.*?)\s*(\*/)?\s*$", line)
            if not match:
                continue
            for word in match.group(1).split():
                if word == "alone":
                    self.alone = True
                elif re.fullmatch(r"timeout_s=\d+", word):
                    self.timeout_s = int(word.split("=")[1])
                else:
                    sys.exit(f"run_tests: {source}: directive '{word}' is unknown")


class Runner:
    def __init__(self, options):
        self.options = options
        self.variant = options.variant
        self.build = os.path.join(ROOT, "build", self.variant)
        self.python = os.path.join(ROOT, "build", "venv", "bin", "python")
        self.scratch = tempfile.mkdtemp(prefix="kvt.")
        self.lock = threading.Lock()  # guards running and the totals; also keeps output whole
        self.running = {}  # test name -> pid of its process group's leader
        self.stopping = False
        self.interrupted = 0
        self.count = 0
        self.totals = {"passed": 0, "failed": 0, "skipped": 0}

    # ------------------------------------------------------------ finding

    def find(self, group):
        tests = []
        directories = ["tests/lint", "tests/support"] if group == "lint" else [f"tests/{group}"]
        if group == "sim":
            return self.find_sim()
        if group == "fuzz":
            return self.find_fuzz()
        for directory in directories:
            for source in sorted(glob.glob(os.path.join(ROOT, directory, "test_*"))):
                path = os.path.relpath(source, ROOT)
                stem, extension = os.path.splitext(path)
                name = stem.removeprefix("tests/")
                if extension == ".c":
                    tests.append(Test(name, [os.path.join(self.build, stem)], source))
                elif extension == ".py":
                    tests.append(Test(name, [self.python, "-m", "pytest", "-q", "-p",
                                             "no:cacheprovider", path], source, kind="pytest"))
                elif extension == ".sh":
                    tests.append(Test(name, ["sh", path], source))
        return tests

    def find_sim(self):
        if not glob.glob(os.path.join(ROOT, "tests/sim/*.c")):
            return []
        seconds = self.options.sim_seconds
        tests = [Test("sim/kvtier-sim", [os.path.join(self.build, "bin/kvtier-sim"),
                                         "--seconds", str(seconds),
                                         "--replay", os.path.join(ROOT, "tests/sim/seeds.txt")],
                      timeout_s=2 * seconds + TIMEOUT_S, kind="sim")]
        if self.options.variant == "release":
            tests.append(Test("sim/lies", [os.path.join(self.build, "bin/kvtier-sim"), "--lies",
                                           "100", "--from", "1"], timeout_s=300, kind="sim"))
        mutant = os.path.join(ROOT, "build/mutant/bin/kvtier-sim")
        if self.options.variant == "release" and os.path.exists(mutant):
            tests.append(Test("sim/rules", [mutant, "--break-all", "--from", "1"], timeout_s=300,
                              kind="sim"))
        return tests

    def find_fuzz(self):
        sources = sorted(glob.glob(os.path.join(ROOT, "tests/fuzz/fuzz_*.c")))
        if not sources:
            return []
        seconds = max(1, self.options.fuzz_seconds // len(sources))
        tests = []
        for source in sources:
            binary = os.path.basename(source)[:-2]
            name = binary.removeprefix("fuzz_")
            corpus = os.path.join(ROOT, "build/fuzz/corpus", name)
            artifacts = os.path.join(ROOT, "build/fuzz/artifacts", "")
            os.makedirs(corpus, exist_ok=True)
            os.makedirs(artifacts, exist_ok=True)
            command = [os.path.join(ROOT, "build/fuzz/fuzz", binary),
                       f"-max_total_time={seconds}", "-timeout=10", "-rss_limit_mb=1024",
                       "-print_final_stats=1", f"-artifact_prefix={artifacts}{name}-", corpus]
            seeds = os.path.join(ROOT, "tests/fuzz/corpus", name)
            if os.path.isdir(seeds):
                command.append(seeds)
            tests.append(Test(f"fuzz/{name}", command, timeout_s=seconds + TIMEOUT_S, kind="fuzz"))
        return tests

    def read_skips(self):
        """Lines of `variant pattern reason`; variant may be *; # starts a comment."""
        skips = []
        path = os.path.join(ROOT, "tests/skip.txt")
        if os.path.exists(path):
            with open(path, encoding="utf-8") as stream:
                for number, line in enumerate(stream, 1):
                    fields = line.split("#")[0].split(None, 2)
                    if fields and len(fields) < 3:
                        sys.exit(f"run_tests: tests/skip.txt:{number}: variant, pattern and reason"
                                 " are needed")
                    if fields and fields[0] in ("*", self.variant):
                        skips.append((fields[1], fields[2].strip()))
        return skips

    # ------------------------------------------------------------ running

    def environment(self, directory):
        env = dict(os.environ)
        env.update(KVT_SOURCE=ROOT, KVT_BUILD=self.build, KVT_BIN=os.path.join(self.build, "bin"),
                   KVT_LIB=os.path.join(self.build, "lib"), KVT_VARIANT=self.variant,
                   KVT_TEST_DIR=directory, TMPDIR=directory, LC_ALL="C.UTF-8",
                   PYTHONDONTWRITEBYTECODE="1",
                   PYTHONPATH=os.path.join(ROOT, "tests/support"))
        models = glob.glob(os.path.join(ROOT, "build/model/*.gguf"))
        if models and "KVT_MODEL" not in env:
            env["KVT_MODEL"] = models[0]
        for name, value in SANITIZER_OPTIONS.items():
            reports = os.path.join(directory, "sanitizer")
            env[name] = ":".join(filter(None, [value, env.get(name), f"log_path={reports}"]))
        return env

    def run(self, test):
        with self.lock:
            self.count += 1
            directory = os.path.join(self.scratch, str(self.count))
        os.makedirs(directory)
        command = list(test.command)
        junit = os.path.join(directory, "junit.xml")
        if test.kind == "pytest":
            command += [f"--junitxml={junit}", "-o", "junit_family=xunit2",
                        f"--basetemp={directory}/t"]
        if self.variant == "tsan" and NO_RANDOM_ADDRESSES:
            command = NO_RANDOM_ADDRESSES + command
        env = self.environment(directory)
        if test.kind == "fuzz":
            # libFuzzer must see its own reports on stderr.
            env = {key: value for key, value in env.items() if not key.endswith("SAN_OPTIONS")}
        output_path = os.path.join(directory, "output")
        started = time.monotonic()
        status = None
        with open(output_path, "wb") as output:
            try:
                process = subprocess.Popen(command, cwd=ROOT, env=env, stdin=subprocess.DEVNULL,
                                           stdout=output, stderr=subprocess.STDOUT,
                                           start_new_session=True)
            except OSError as error:
                output.write(f"{command[0]}: {error.strerror}; is it built?\n".encode())
                process = None
            if process:
                with self.lock:
                    self.running[test.name] = process.pid
                limit = test.timeout_s * SLOWER.get(self.variant, 1)
                try:
                    status = process.wait(limit)
                except subprocess.TimeoutExpired:
                    output.write(f"\nrun_tests: still running after {limit} s, killed\n".encode())
                self.kill_group(process.pid)
                process.wait()
                with self.lock:
                    del self.running[test.name]
        seconds = time.monotonic() - started
        with open(output_path, encoding="utf-8", errors="replace") as output:
            lines = output.read().splitlines()
        left = self.kill_left_behind(directory, process.pid if process else 0)
        for pid, text in left:
            lines.append(f"run_tests: left a process behind, killed: {pid} {text}")
        reports = []
        for report in sorted(glob.glob(os.path.join(directory, "sanitizer*"))):
            with open(report, encoding="utf-8", errors="replace") as stream:
                said = [line.rstrip() for line in stream if line.strip() and HARMLESS not in line]
            lines += said[:TAIL_LINES]
            reports += [report] if said else []
        self.judge(test, status, lines, bool(left or reports), junit, seconds)
        shutil.rmtree(directory, ignore_errors=True)

    @staticmethod
    def kill_group(pid):
        """The group's leader is ours and not yet waited for, or just ended: its id is not reused
        while members live, and without members there is nothing to kill."""
        try:
            os.killpg(pid, signal.SIGKILL)
        except (ProcessLookupError, PermissionError):
            pass

    @staticmethod
    def kill_left_behind(directory, leader):
        """Processes that left the group but carry this test's own directory in their environment:
        nobody else can have it. The leader's zombie and processes about to end do not count."""
        mark = f"KVT_TEST_DIR={directory}".encode()

        def find():
            found = []
            for path in glob.glob("/proc/[0-9]*/environ"):
                pid = int(path.split("/")[2])
                try:
                    with open(path, "rb") as stream:
                        if mark not in stream.read().split(b"\0") or pid == leader:
                            continue
                    with open(f"/proc/{pid}/cmdline", "rb") as stream:
                        found.append((pid, stream.read().replace(b"\0", b" ").decode("utf-8",
                                                                                      "replace")))
                except OSError:
                    continue
            return found

        left = find()
        if left:
            time.sleep(0.5)  # those killed with their group, and not yet gone
            left = find()
        for pid, _ in left:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                pass
        return left

    # ------------------------------------------------------------ judging

    def judge(self, test, status, lines, dirty, junit, seconds):
        reasons = []  # of what was skipped
        if test.kind == "pytest" and os.path.exists(junit):
            for case in xml.etree.ElementTree.parse(junit).iter("testcase"):
                skipped = case.find("skipped")
                if skipped is not None:
                    test.skipped += 1
                    reasons.append((f"{test.name}::{case.get('name')}", skipped.get("message")))
                elif case.find("failure") is not None or case.find("error") is not None:
                    test.failed += 1
                else:
                    test.passed += 1
            nothing_to_run = status == 5 and test.skipped > 0  # pytest's own code, the module was skipped
            if status != 0 and not nothing_to_run and not test.failed:
                test.failed += 1
        elif status == SKIP_STATUS and test.kind != "fuzz":  # libFuzzer's 77 is a finding
            test.skipped = 1
            reasons.append((test.name, lines[-1] if lines else "no reason given"))
        elif status == 0:
            test.passed = 1
        else:
            test.failed = 1
        if dirty and not test.failed:
            test.failed, test.passed = 1, max(0, test.passed - 1)

        verdict = "FAIL" if test.failed else "ok" if test.passed else "SKIP"
        cases = test.passed + test.failed + test.skipped
        text = [] if verdict == "SKIP" and cases == len(reasons) else [
            f"{verdict:4} {seconds:6.1f} s  {test.name}" + (f" ({cases} cases)" if cases > 1 else "")]
        text += [f"SKIP           {name}: {(reason or 'no reason').strip()}"
                 for name, reason in reasons]
        if test.failed:
            if status is not None and status < 0:
                lines.append(f"run_tests: ended by signal {signal.Signals(-status).name}")
            elif status not in (None, 0):
                lines.append(f"run_tests: exit status {status}")
            text += [f"     | {line}" for line in lines[-TAIL_LINES:]]
        elif test.kind == "sim":
            text += [f"     | {line}" for line in lines[-6:]]
        elif test.kind == "fuzz":
            runs = [line for line in lines if "number_of_executed_units" in line]
            text[0] += f": {int(runs[-1].split()[-1]):,} executions" if runs else ""
        with self.lock:
            print("\n".join(text), flush=True)
            for key in self.totals:
                self.totals[key] += getattr(test, key)

    # ------------------------------------------------------------ all of them

    def run_all(self, tests):
        """Long ones first, `jobs` at a time; then those that want to be alone."""
        together = [test for test in tests if not test.alone]
        together.sort(key=lambda test: test.kind not in ("sim", "fuzz"))
        queue = iter(together)
        queue_lock = threading.Lock()

        def work():
            while not self.stopping:
                with queue_lock:
                    test = next(queue, None)
                if test is None:
                    return
                self.run(test)

        threads = [threading.Thread(target=work) for _ in range(self.options.jobs)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        for test in tests:
            if test.alone and not self.stopping:
                self.run(test)

    def stop(self, signum, _frame):
        """Ctrl-C: end what was started, then the summary says what had been done."""
        self.stopping = True
        for pid in list(self.running.values()):
            self.kill_group(pid)
        self.interrupted = signum

    def main(self):
        for signum in (signal.SIGINT, signal.SIGTERM):
            signal.signal(signum, self.stop)
        skips = self.read_skips()
        tests = []
        names = []
        found = False
        try:
            for group in self.options.groups:
                for test in self.find(group):
                    names.append(test.name)
                    if self.options.only and self.options.only not in test.name:
                        continue
                    found = True
                    reason = next((why for pattern, why in skips
                                   if fnmatch.fnmatch(test.name, pattern)), None)
                    if reason:
                        print(f"SKIP           {test.name}: {reason}")
                        self.totals["skipped"] += 1
                    else:
                        tests.append(test)
            self.run_all(tests)
        finally:
            shutil.rmtree(self.scratch, ignore_errors=True)
        if self.options.only and not found:
            near = difflib.get_close_matches(self.options.only, [n.split("/")[-1] for n in names], 3, 0.4)
            elsewhere = [test.name for group in self.options.beside for test in self.find(group)
                         if self.options.only in test.name]
            print(f"run_tests: no test has '{self.options.only}' in its name" +
                  (f" among {', '.join(self.options.groups)}" if elsewhere else
                   f"; near it are {', '.join(near)}" if near else ""))
            self.totals["failed"] += not elsewhere
        if self.interrupted:
            print(f"run_tests: interrupted by {signal.Signals(self.interrupted).name}")
        print("{passed} passed, {failed} failed, {skipped} skipped".format(**self.totals))
        return 1 if self.totals["failed"] or self.interrupted else 0


def no_random_addresses():
    """TSan of gcc 12 cannot live with some kernels' address randomisation; setarch turns it off
    where that is permitted."""
    command = ["setarch", os.uname().machine, "-R"]
    try:
        permitted = subprocess.run(command + ["true"], capture_output=True, check=False)
    except OSError:
        return []
    return command if permitted.returncode == 0 else []


NO_RANDOM_ADDRESSES = []


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("groups", nargs="+",
                        choices=["lint", "unit", "sim", "process", "crash", "fuzz", "python", "gpu"])
    parser.add_argument("--variant", default="release")
    parser.add_argument("--only", default="", help="tests with this in their name")
    parser.add_argument("--beside", nargs="*", default=[],
                        help="groups that are run elsewhere: one of them may have --only's match")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--sim-seconds", type=int, default=60)
    parser.add_argument("--fuzz-seconds", type=int, default=60)
    options = parser.parse_args()
    if options.variant == "tsan":
        NO_RANDOM_ADDRESSES[:] = no_random_addresses()
    return Runner(options).main()


if __name__ == "__main__":
    sys.exit(main())

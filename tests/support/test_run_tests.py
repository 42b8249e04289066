"""The runner is checked before it is believed: each way to fail is planted once and seen."""

import os
import shutil
import signal
import subprocess
import sys
import time

import pytest

HERE = os.path.dirname(os.path.abspath(__file__))


@pytest.fixture
def tree(tmp_path):
    """A small repository of its own, with the runner in it; returns (write a test, run it)."""
    (tmp_path / "tests/support").mkdir(parents=True)
    (tmp_path / "tests/process").mkdir()
    (tmp_path / "tests/unit").mkdir()
    runner = tmp_path / "tests/support/run_tests.py"
    shutil.copy(os.path.join(HERE, "run_tests.py"), runner)
    (tmp_path / "build/venv/bin").mkdir(parents=True)
    os.symlink(sys.executable, tmp_path / "build/venv/bin/python")

    def write(name, text):
        (tmp_path / "tests/process" / name).write_text(text)

    def run(*args):
        # The tree's tests are not tests of the outer runner: nor do they carry its mark.
        env = {key: value for key, value in os.environ.items() if not key.startswith("KVT_")}
        done = subprocess.run([sys.executable, str(runner), *args, "process"], env=env,
                              capture_output=True, text=True, check=False, timeout=60)
        lines = done.stdout.splitlines()
        return done.returncode, lines[-1] if lines else done.stderr, done.stdout

    run.runner = runner
    return write, run


def test_counts_what_passed(tree):
    write, run = tree
    write("test_a.sh", "test -d $KVT_TEST_DIR && test -z \"$(ls $KVT_TEST_DIR | grep -v output)\"")
    write("test_b.sh", "exit 0")
    assert run()[:2] == (0, "2 passed, 0 failed, 0 skipped")


def test_no_tests_is_a_summary_too(tree):
    assert tree[1]()[:2] == (0, "0 passed, 0 failed, 0 skipped")


def test_a_name_that_no_test_has(tree):
    write, run = tree
    write("test_counters.sh", "exit 0")
    status, summary, text = run("--only", "countters")
    assert (status, summary) == (1, "0 passed, 1 failed, 0 skipped")
    assert "no test has 'countters' in its name" in text and "test_counters" in text
    assert run("--only", "counters")[:2] == (0, "1 passed, 0 failed, 0 skipped")


def test_a_name_that_a_group_run_beside_has(tree):
    write, run = tree
    write("test_counters.sh", "exit 0")
    write("../unit/test_block.c", "")
    status, summary, text = run("--only", "block", "--beside", "unit", "process", "--variant", "release")
    assert (status, summary) == (0, "0 passed, 0 failed, 0 skipped")
    assert "no test has 'block' in its name among process" in text
    assert run("--only", "blokk", "--beside", "unit", "process", "--variant", "release")[0] == 1


def test_failure_shows_its_output(tree):
    write, run = tree
    write("test_a.sh", "echo the very reason; exit 3")
    status, summary, text = run()
    assert (status, summary) == (1, "0 passed, 1 failed, 0 skipped")
    assert "the very reason" in text and "exit status 3" in text


def test_abort_names_the_signal(tree):
    write, run = tree
    write("test_a.sh", "kill -ABRT $$")
    status, _, text = run()
    assert status == 1 and "SIGABRT" in text


def test_exit_77_is_a_skip_with_its_reason(tree):
    write, run = tree
    write("test_a.sh", "echo no GPU here; exit 77")
    status, summary, text = run()
    assert (status, summary) == (0, "0 passed, 0 failed, 1 skipped")
    assert "SKIP" in text and "no GPU here" in text


def test_too_long_is_killed(tree):
    write, run = tree
    write("test_a.sh", "# test: timeout_s=1\nsleep 50")
    started = time.monotonic()
    status, summary, text = run()
    assert (status, summary) == (1, "0 passed, 1 failed, 0 skipped")
    assert "still running after 1 s" in text and time.monotonic() - started < 20


def test_process_left_behind_fails_and_is_killed(tree):
    write, run = tree
    write("test_a.sh", "setsid sleep 4321 & sleep 0.2; echo $! >&2; exit 0")
    status, summary, text = run()
    assert (status, summary) == (1, "0 passed, 1 failed, 0 skipped")
    line = next(line for line in text.splitlines() if "left a process behind" in line)
    pid = int(line.split("killed: ")[1].split()[0])
    for _ in range(50):  # it is a zombie until its new parent has noticed
        try:
            with open(f"/proc/{pid}/stat", encoding="ascii") as stat:
                if stat.read().split()[2] == "Z":
                    return
        except OSError:
            return
        time.sleep(0.1)
    pytest.fail(f"{pid} is still there")


def test_missing_binary_fails(tree):
    write, run = tree
    write("test_a.c", "int main(void) { return 0; }")
    status, _, text = run()
    assert status == 1 and "is it built?" in text


def test_sanitizer_report_fails_whatever_the_status(tree):
    write, run = tree
    write("test_a.sh", 'path=${ASAN_OPTIONS##*log_path=}; echo ERROR: planted > $path.1')
    status, _, text = run()
    assert status == 1 and "ERROR: planted" in text


def test_pytest_cases_are_counted(tree):
    write, run = tree
    write("test_a.py", "import pytest\n"
                       "def test_1(): pass\n"
                       "def test_2(): assert 1 == 2\n"
                       "def test_3(): pytest.skip('planted reason')\n")
    status, summary, text = run()
    assert (status, summary) == (1, "1 passed, 1 failed, 1 skipped")
    assert "planted reason" in text and "assert 1 == 2" in text


def test_broken_pytest_file_fails(tree):
    write, run = tree
    write("test_a.py", "import no_such_module\n")
    assert run()[:2] == (1, "0 passed, 1 failed, 0 skipped")


def test_skip_list(tree):
    write, run = tree
    write("test_a.sh", "exit 1")
    skips = run.runner.parent.parent / "skip.txt"
    skips.write_text("# comment\nasan process/test_a not here\n")
    assert run()[0] == 1
    skips.write_text("* process/test_* a planted reason\n")
    status, summary, text = run()
    assert (status, summary) == (0, "0 passed, 0 failed, 1 skipped")
    assert "a planted reason" in text
    skips.write_text("* process/test_a\n")
    assert "reason" in run()[1]


def test_unknown_directive_is_refused(tree):
    write, run = tree
    write("test_a.sh", "# test: timeout=5\n")
    assert run()[0] == 1


def test_alone_runs_alone(tree):
    write, run = tree
    write("test_a.sh", "# test: alone\ntest ! -e busy")
    write("test_b.sh", "touch busy; sleep 1; rm busy")
    assert run()[:2] == (0, "2 passed, 0 failed, 0 skipped")


def test_interrupt_still_ends_with_the_summary(tree):
    write, run = tree
    write("test_a.sh", "sleep 50")
    process = subprocess.Popen([sys.executable, str(run.runner), "process"], text=True,
                               stdout=subprocess.PIPE)
    time.sleep(1)
    process.send_signal(signal.SIGINT)
    text, _ = process.communicate(timeout=20)
    assert process.returncode == 1
    assert text.splitlines()[-1] == "0 passed, 1 failed, 0 skipped"

"""A control page that the device cannot use: that worker is hung up, whatever it has done meanwhile.

The device is that of a plug-in, tests/process/plugin/gated_driver.c: it refuses every page, once a file
is there.
"""

import os

import pytest

from kvtierd import Daemon, wait_until
from rawclient import CONTROL, STATUS, Client, fields_of, number

PLUGINS = os.path.join(os.environ["KVT_BUILD"], "tests", "plugin", "gated")
GPU0, CPU0 = b"\x11" * 16, b"\x22" * 16
SETS = {"daemon.plugin_dir": PLUGINS, "host.budget": "64MiB", "host.chunk": "1MiB",
        "device.gpu0.driver": "cuda", "device.gpu0.budget": "8MiB", "device.gpu0.uuid": GPU0.hex(),
        "device.cpu0.budget": "8MiB", "device.cpu0.uuid": CPU0.hex()}


@pytest.mark.parametrize("gone", [False, True])
def test_refused_page(tmp_path, gone):
    order = tmp_path / "refuse"
    with Daemon(config="[device gpu0]\n[device cpu0]\n", sets=SETS,
                environment=dict(os.environ, KVT_REFUSE_PAGES=str(order))) as daemon, \
            Client(daemon.runtime_dir, role=CONTROL) as control:
        def workers():
            reply = control.ask(STATUS, number(2, 1))
            return len(fields_of(fields_of(reply.bytes)[30][0]).get(4, []))
        worker = Client(daemon.runtime_dir, device=GPU0)
        if gone:
            worker.close()
            daemon.wait_for_line("hung up: it detached")
        order.touch()  # the device has tried for long, and fails now
        daemon.wait_for_line("control page cannot be used: no page today")
        wait_until(lambda: workers() == 0, "the session is gone")
        assert daemon.has_line("hung up: the device cannot use its control page") != gone
        if not gone:
            assert worker.hung_up()
            worker.close()
        with Client(daemon.runtime_dir, device=CPU0) as other:
            other.ping()

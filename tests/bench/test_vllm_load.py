"""How much of the machine others use: from the system's own counters."""

import os
import subprocess
import sys
import time

from kvtier.bench.vllm.load import Load, machine_s, process_s

TICK_S = 1 / os.sysconf("SC_CLK_TCK")
SPIN = "import time; u = time.process_time\nwhile u() < 0.5: pass\nprint(flush=True); input()"


def test_idle_and_guests_do_not_count() -> None:
    # user nice system idle iowait irq softirq steal guest guest_nice
    assert machine_s("cpu  1 2 4 800 900 8 16 32 999 999\ncpu0 5 5\n") == 63 * TICK_S
    assert machine_s("cpu  1 2 4 800\n") == 7 * TICK_S


def test_a_process_counts_while_it_runs() -> None:
    with subprocess.Popen(
        [sys.executable, "-c", SPIN], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as child:
        assert child.stdout is not None
        child.stdout.readline()
        assert process_s([child.pid]) >= 0.45
        assert process_s([child.pid, child.pid]) == 2 * process_s([child.pid])
    assert process_s([child.pid]) == 0


def test_what_is_ours_is_no_others() -> None:
    load = Load(own_s=5.0)
    time.sleep(0.05)
    assert 0 <= load.others(own_s=5.0) <= 1
    assert load.others(own_s=5.0 + 1000) == 0
    assert load.others(own_s=5.0 - 1000) == 1

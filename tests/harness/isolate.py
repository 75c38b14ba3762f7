"""Network, mount and IPC namespaces of the test's own, with an uplink that leads nowhere.

Several tests can so run side by side on one machine: host ports, nft tables, the
bridge and System V segments are each test's own. Mounts are shared inside the
namespace (mount propagation can be tested) and never reach the machine.
"""

import ctypes
import os
import subprocess
import sys

MARK = "BERTH_TEST_ISOLATED"
UPLINK_ADDRESS = "192.0.2.10"
PR_SET_CHILD_SUBREAPER = 36


def become_subreaper():
    """Whatever the runtime leaves running is then a descendant of this process."""
    if ctypes.CDLL(None, use_errno=True).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_CHILD_SUBREAPER)")


def enter(isolated=True):
    """Starts this program again inside its own namespaces, once."""
    if os.geteuid() != 0:
        sys.exit("this test needs root")
    if isolated and MARK not in os.environ:
        os.environ[MARK] = "1"
        os.execvp("unshare", ["unshare", "--net", "--mount", "--ipc", "--propagation", "private",
                              sys.executable, *sys.argv])
    become_subreaper()
    if isolated:
        _furnish()


def is_hybrid():
    """Does cgroup v2 lie beside v1 here?"""
    return os.path.isdir("/sys/fs/cgroup/unified")


def without_hybrid_cgroups():
    """Replaces cgroup v2 where it lies beside v1: some OCI runtimes refuse such a machine. Only inside namespaces of the
    test's own. By an empty tmpfs, for such a runtime makes its directories there all the same."""
    if MARK in os.environ and is_hybrid():
        subprocess.run(["umount", "/sys/fs/cgroup/unified"], check=True)
        subprocess.run(["mount", "-t", "tmpfs", "tmpfs", "/sys/fs/cgroup/unified"], check=True)


def _furnish():
    for command in ("mount --make-rshared /",
                    "ip link set lo up",
                    "ip link add uplink0 type veth peer name uplink1",
                    f"ip address add {UPLINK_ADDRESS}/24 dev uplink0",
                    "ip link set uplink0 up",
                    "ip link set uplink1 up",
                    "ip route add default via 192.0.2.1"):
        subprocess.run(command.split(), check=True)

#!/usr/bin/env python3
"""Files of the node and of others: what users of the node can reach of containers, and containers of the node.

    run.py [--only PART] [--runtime NAME]
"""

import os
import re
import sys

HERE = os.path.dirname(os.path.abspath(__file__))
TESTS = os.path.dirname(HERE)
sys.path[:0] = [TESTS, os.path.join(TESTS, "crictl"), os.path.join(TESTS, "security")]
from harness import oci, options, runtimes  # noqa: E402
from harness.report import Steps  # noqa: E402
from inside import IMAGE  # noqa: E402
from walkthrough import Crictl  # noqa: E402
from closed import closed  # noqa: E402
from devices import devices  # noqa: E402
from layers import layers  # noqa: E402
from logs import logs  # noqa: E402

PARTS = {"closed": closed, "logs": logs, "layers": layers, "devices": devices}


def main():
    parser = options.parser(__doc__)
    parser.add_argument("--only", default="", metavar="PART", help=f"a regular expression of {', '.join(PARTS)}")
    args = parser.parse_args()
    steps = Steps("files")
    runtimes.Berth.handlers = oci.handlers(args.hide_hybrid)
    with options.session(args, steps) as s:
        c = Crictl(s.endpoint, s.factor)
        with steps.step("pull", fatal=True):
            c("pull", IMAGE)
        for name, part in PARTS.items():
            if re.search(args.only, name):
                part(steps, s, c)
        with steps.step("remove"):
            for one in c("pods", "-q").split():  # those of failed steps too
                c("rmp", "--force", one)
    sys.exit(steps.finish())


if __name__ == "__main__":
    main()

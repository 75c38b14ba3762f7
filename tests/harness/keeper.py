"""What a step that failed has made: found by the records of berth, removed by crictl."""

import os
import subprocess

from harness import runtimes

KINDS = (("containers", "rm"), ("pods", "rmp"))  # the places of their records, and crictl's words


class Keeper:
    """Remembers which pods and containers a runtime had. Of another runtime than berth it knows none."""

    def __init__(self, runtime):
        self.runtime = runtime

    def seen(self):
        return {kind: set(self._records(kind)) for kind, _ in KINDS}

    def _records(self, kind):
        try:
            names = os.listdir(os.path.join(self.runtime.root, kind))
        except FileNotFoundError:
            return []
        return [name.removesuffix(".json") for name in names if name.endswith(".json") and not name.startswith(".")]

    def restore(self, before):
        """Removes what was not there before. A daemon that has ended meanwhile starts again, with the configuration of now."""
        if not self.runtime.alive():
            print(f"      (the {self.runtime.name} of the failed step had ended with {self.runtime.process.poll()}: started again)")
            self.runtime.start()
        for kind, word in KINDS:
            new = sorted(set(self._records(kind)) - before[kind])
            if not new:
                continue
            print(f"      (removing what it left: {len(new)} {kind})", flush=True)
            socket, limit = "unix://" + self.runtime.socket, 60 * self.runtime.factor
            command = [runtimes.tool("CRICTL"), "--config", "/dev/null", "-r", socket, "-i", socket, "--timeout", f"{limit:.0f}s"]
            done = subprocess.run([*command, word, "--force", *new], stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
                                  stderr=subprocess.PIPE, timeout=4 * limit, check=False)
            self.runtime.ids.update(new)
            if done.returncode:
                print(f"      ({done.stderr.decode(errors='replace').strip()})", flush=True)

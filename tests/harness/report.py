"""Steps of a test, each printed with its time and outcome."""

import contextlib
import time


class Failure(AssertionError):
    """Something the test asserts is not so."""


def expect(condition, message):
    if not condition:
        raise Failure(message)


class Steps:
    """Prints `ok` or `FAIL` per step; a failed step does not end the test unless told."""

    def __init__(self, title):
        self.title, self.passed, self.failed, self.start = title, 0, [], time.monotonic()
        self.left = []

    @contextlib.contextmanager
    def step(self, name, fatal=False):
        start = time.monotonic()
        try:
            yield
        except (Failure, OSError, ValueError, KeyError, IndexError, TypeError) as error:
            why = str(error) if isinstance(error, Failure) else f"{type(error).__name__}: {error}"
            print(f"FAIL  {name} ({time.monotonic() - start:.2f} s): {why}", flush=True)
            self.failed.append(name)
            if fatal:
                raise SystemExit(self.finish()) from error
        else:
            print(f"ok    {name} ({time.monotonic() - start:.2f} s)", flush=True)
            self.passed += 1

    def left_out(self, name, why):
        """A step that this machine cannot do: named and counted."""
        print(f"out   {name}: {why}", flush=True)
        self.left.append(name)

    def finish(self):
        """The closing line; the exit status."""
        failed = f", failed: {', '.join(self.failed)}" if self.failed else ""
        left = f", {len(self.left)} left out: {', '.join(self.left)}" if self.left else ""
        print(f"{self.title}: {self.passed} passed, {len(self.failed)} failed{failed}{left} "
              f"({time.monotonic() - self.start:.0f} s)", flush=True)
        return 1 if self.failed or not self.passed else 0


def wait_for(what, check, seconds, interval=0.2):
    """Polls `check` until it gives something true, which is returned.

    `check` may raise Failure to say what is still missing.
    """
    end, last = time.monotonic() + seconds, None
    while True:
        try:
            value = check()
            if value:
                return value
        except (Failure, OSError, ValueError, KeyError, IndexError) as error:
            last = error
        if time.monotonic() > end:
            raise Failure(f"not within {seconds:.0f} s: {what}" + (f" ({last})" if last else ""))
        time.sleep(interval)

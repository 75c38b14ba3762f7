"""Steps of a test, each printed with its time and outcome."""

import contextlib
import time
import traceback


class Failure(AssertionError):
    """Something the test asserts is not so."""


class _PartOver(Exception):
    """A step failed without which the rest of its part says nothing."""


def expect(condition, message):
    if not condition:
        raise Failure(message)


class Steps:
    """Prints `ok` or `FAIL` per step. A failed step does not end the test unless told, and what it has made goes: the steps
    after it do not fail over what it left (`keeper`, which options.session sets)."""

    def __init__(self, title):
        self.title, self.passed, self.failed, self.start = title, 0, [], time.monotonic()
        self.left, self.keeper, self.parts = [], None, 0

    @contextlib.contextmanager
    def step(self, name, fatal=False):
        """`fatal`: the part that it is in ends with it, or the test."""
        start, before = time.monotonic(), self._seen()
        try:
            yield
        except _PartOver:
            raise
        except Exception as error:  # whatever it is, the steps after this one are others
            self._fail(name, error, time.monotonic() - start)
            if fatal and self.parts:
                raise _PartOver from error
            if fatal:
                raise SystemExit(self.finish()) from error
            self._clean(before)
        else:
            print(f"ok    {name} ({time.monotonic() - start:.2f} s)", flush=True)
            self.passed += 1

    @contextlib.contextmanager
    def part(self, name):
        """Steps that build on each other; the parts after this one do not, however it ends."""
        start, before = time.monotonic(), self._seen()
        self.parts += 1
        try:
            yield
        except _PartOver:
            print(f"      (the rest of {name} is left out)", flush=True)
            self._clean(before)
        except Exception as error:
            traceback.print_exc()
            self._fail(name, error, time.monotonic() - start)
            self._clean(before)
        finally:
            self.parts -= 1

    def run(self, part, *arguments, **named):
        """`part(...)` as a part; what it returns, or None if it did not get there."""
        with self.part(part.__name__):
            return part(*arguments, **named)

    def _fail(self, name, error, seconds):
        why = str(error) if isinstance(error, Failure) else f"{type(error).__name__}: {error}"
        print(f"FAIL  {name} ({seconds:.2f} s): {why}", flush=True)
        self.failed.append(name)

    def _seen(self):
        return self.keeper and self.keeper.seen()

    def _clean(self, before):
        if self.keeper:
            self.keeper.restore(before)

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

"""Ctrl-C and SIGTERM as requests to stop at the next good place.

Python's own KeyboardInterrupt may be raised anywhere: it leaves things half done, or the callback
of a library swallows it.
"""

import contextlib
import signal
import sys
import threading
from collections.abc import Iterator

_open: list[list[str]] = []


@contextlib.contextmanager
def stop_requests() -> Iterator[list[str]]:
    """Yields a list that gets the name of the first signal; a second signal interrupts.

    If contexts are nested, the innermost one gets the signal and passes it on when it ends. Only
    the main thread receives signals; in another thread the list stays empty.
    """
    received: list[str] = []
    if threading.current_thread() is not threading.main_thread():
        yield received
        return

    def note(number, frame):
        if received:
            raise KeyboardInterrupt
        received.append(signal.Signals(number).name)
        print(f"{received[0]}: stopping soon; once more to stop at once", file=sys.stderr)

    _open.append(received)
    before = {s: signal.signal(s, note) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield received
    finally:
        _open.pop()
        if _open:
            _open[-1].extend(received)
        for number, handler in before.items():
            # A handler that was not set from Python, such as one of a C library, is None.
            signal.signal(number, signal.SIG_DFL if handler is None else handler)

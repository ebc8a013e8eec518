"""Ctrl-C and SIGTERM as a request to stop at the next good place.

Python's own KeyboardInterrupt may come up anywhere, where it leaves things half done or, in a
callback of some library, is swallowed.
"""

import contextlib
import signal
import sys
import threading
from collections.abc import Iterator

_open: list[list[str]] = []


@contextlib.contextmanager
def stop_requests() -> Iterator[list[str]]:
    """Yields a list that gets the name of the signal that asks for a stop; a second one interrupts.

    Of contexts inside one another the innermost gets it, the one around that at its end. Only the
    main thread can ask for signals; in others the list stays empty.
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
            # None: a handler that is not Python's, such as a library's in C.
            signal.signal(number, signal.SIG_DFL if handler is None else handler)

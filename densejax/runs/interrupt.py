"""Ctrl-C ends a command at once, with one line and exit code 130, whatever it is doing.

Python's own handler waits until the main thread returns from a library (a compilation takes
minutes), and then raises KeyboardInterrupt anywhere. Here a separate thread gets every signal.
"""

import os
import signal
import threading
from concurrent.futures import Future

handler_gets_next = False  # whether the next SIGINT, and only that, is for the handler that is set
stuck: list[Future] = []  # of threads that may wait forever and would keep the process alive


def watch() -> None:
    """From now on SIGINT ends this process; call it in the main thread."""
    signal.signal(signal.SIGINT, lambda *_: None)
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    threading.Thread(target=_listen, args=[reader], daemon=True).start()


def end() -> None:
    """Ends the process."""
    clear = b"\r\x1b[K" if os.isatty(2) else b""  # the terminal's ^C, and a line of progress
    os.write(2, clear + b"densejax: interrupted\n")
    os._exit(130)


def _listen(reader: int) -> None:
    global handler_gets_next
    while number := os.read(reader, 1):
        if number[0] == signal.SIGINT:
            if not handler_gets_next:
                end()
            handler_gets_next = False

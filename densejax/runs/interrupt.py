"""Ctrl-C ends a command at once, in one line and with exit code 130, whatever it is doing.

Python's own handler waits until the main thread is back from a library, such as from a compilation
of minutes, and then raises KeyboardInterrupt at any place. Here a thread gets every signal.
"""

import os
import signal
import threading
from concurrent.futures import Future

spared = False  # whether the next SIGINT, and no other, is left to the handler that is set
waiting: list[Future] = []  # threads that may wait for what never comes, and keep the process


def watch() -> None:
    """From now on SIGINT ends this process; call it in the main thread."""
    signal.signal(signal.SIGINT, lambda *_: None)
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    threading.Thread(target=_listen, args=[reader], daemon=True).start()


def end() -> None:
    """Ends the process."""
    os.write(2, b"densejax: interrupted\n")
    os._exit(130)


def _listen(reader: int) -> None:
    global spared
    while number := os.read(reader, 1):
        if number[0] == signal.SIGINT:
            if not spared:
                end()
            spared = False

"""Ctrl-C and SIGTERM: the first asks the running stage to stop at its next safe point, the second stops at once."""

from __future__ import annotations

import signal
import sys
import threading
from types import FrameType, TracebackType

MESSAGE = "\nstopping at the next safe point, so that the same command continues from here; once more to stop at once"


class Interrupts:
    """A context in which the two signals set a flag that stages poll with `check`."""

    def __init__(self) -> None:
        self.asked = False
        self._previous: dict[int, object] = {}

    def __enter__(self) -> Interrupts:
        if threading.current_thread() is threading.main_thread():  # signals can be caught only there
            for number in (signal.SIGINT, signal.SIGTERM):
                self._previous[number] = signal.signal(number, self._on_signal)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True
        print(MESSAGE, file=sys.stderr, flush=True)

    def check(self) -> None:
        """Raise KeyboardInterrupt if a signal has come. Called where everything done so far is on disk."""
        if self.asked:
            raise KeyboardInterrupt

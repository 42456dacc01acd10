"""A client beside the run: one request after another to the router, each with a deadline to be kept."""

from __future__ import annotations

import http.client
import json
import threading
import time
from dataclasses import dataclass

DEADLINE_S = 3.0
SLACK_S = 5.0  # of a machine that also starts processes
GIVE_UP_S = DEADLINE_S + SLACK_S  # without a word from the router
LATE_S = GIVE_UP_S + SLACK_S  # well apart: a word that comes just before it gives up is no late answer
PAUSE_S = 0.2
BODY = json.dumps({"input_ids": [1, 2, 10, 3, 4, 11], "sampling_params": {"max_new_tokens": 4}})


@dataclass(frozen=True)
class Asked:
    """One request: how long it took, and the status, or what stood in its place."""

    took_s: float
    status: int = 0
    error: str = ""


class Bystander(threading.Thread):
    """Asks until `stop`; `asked` is read after `join`.

    Args:
      address: HTTP side of the router, host:port.
    """

    def __init__(self, address: str) -> None:
        super().__init__(name="bystander", daemon=True)
        self._address = address
        self.asked: list[Asked] = []
        self.stop = threading.Event()

    def run(self) -> None:
        """Asks and notes."""
        while not self.stop.wait(PAUSE_S):
            started = time.monotonic()
            status, error = 0, ""
            try:
                status = self._ask()
            except (OSError, http.client.HTTPException) as caught:
                error = type(caught).__name__
            self.asked.append(Asked(time.monotonic() - started, status, error))

    def _ask(self) -> int:
        connection = http.client.HTTPConnection(self._address, timeout=GIVE_UP_S)
        headers = {"content-type": "application/json", "x-milepost-deadline-ms": str(int(DEADLINE_S * 1000))}
        try:
            connection.request("POST", "/generate", body=BODY, headers=headers)
            reply = connection.getresponse()
            reply.read()
            return reply.status
        finally:
            connection.close()

    def end(self) -> None:
        """Stops it."""
        self.stop.set()
        self.join(2 * LATE_S)

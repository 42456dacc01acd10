"""What the router says to one engine: SGLang's HTTP surface, one method a route, a deadline on each.

An engine's answer is one of three:
- it did it: the JSON of its reply;
- `EngineRefused`: it said no (HTTP 4xx, or `success: false`), so it lives and says why;
- `EngineBroken`: no reply, a late one, HTTP 5xx, or one that is no JSON object. Whether it did it is unknown.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast
from urllib.parse import urlsplit

import orjson

from milepost.types import TensorSpec
from milepost_router.record import EngineRecord
from milepost_router.upstream import Died, GaveUp, Pool, Refused, Rubbish, UpstreamError

HOOK_REPORT, HOOK_SIGNAL = "milepost.report", "milepost.signal:"
"""What our loader in an engine answers to, as `milepost_engine.weight_hook` has it."""
MAX_REPLY_BYTES = 16 * 1024 * 1024

Call = tuple[str, str, Mapping[str, Any] | None]
"""Method, path and body."""

_PAUSE, _RESUME = "/pause_generation", "/continue_generation"
_WORDLESS = (_PAUSE, _RESUME)
"""What they answer says nothing but by its status."""
RESUMING: Call = ("POST", _RESUME, {"torch_empty_cache": False})
"""Goes on generating; no effect where it was not paused."""


class EngineFault(Exception):
    """An engine did not do what it was told."""


class EngineRefused(EngineFault):
    """It answered no."""

    def __init__(self, message: str, status: int) -> None:
        super().__init__(message)
        self.status = status


class EngineBroken(EngineFault):
    """It did not answer, or not sensibly.

    Attributes:
      gone: its process is not there any more, or is silent: it let an admin call's deadline pass.
    """

    def __init__(self, message: str, *, gone: bool = False) -> None:
        super().__init__(message)
        self.gone = gone


class EngineApi:
    """Calls to one engine.

    Args:
      pool: connections.
      record: the engine; its URL and key are read at each call.
      timeout_s: deadline of a call that names none.
    """

    def __init__(self, pool: Pool, record: EngineRecord, *, timeout_s: float) -> None:
        self._pool, self._record, self._timeout_s = pool, record, timeout_s

    # ------------------------------------------------------------------------------------ looking

    async def health(self, *, timeout_s: float) -> None:
        """It says that it is well."""
        await self._call("GET", "/health", timeout_s=timeout_s, json_reply=False)

    async def model_info(self, *, timeout_s: float) -> dict[str, Any]:
        """`weight_version` and what it is made of."""
        return await self._call("GET", "/model_info", timeout_s=timeout_s)

    async def server_info(self, *, timeout_s: float | None = None) -> dict[str, Any]:
        """Version and launch arguments; SGLang's scheduler answers it, paused or not."""
        return await self._call("GET", "/server_info", timeout_s=timeout_s)

    async def has_route(self, path: str) -> bool:
        """Whether it knows a route, by a method that none of its routes takes, so that nothing is done."""
        try:
            await self._call("DELETE", path, json_reply=False)
        except EngineRefused as refusal:
            if refusal.status not in (404, 405):
                raise
            return refusal.status == 405
        return True

    async def checksum(self) -> dict[str, Any]:
        """Digest of its weights; also waits until they are written."""
        return await self._call("POST", "/weights_checker", {"action": "checksum"})

    async def require_fit(self, tensors: Sequence[TensorSpec]) -> None:
        """Asks whether these are all of its tensors, in its shapes; refused by name where they are not."""
        body = {
            "action": "fits",
            "names": [x.name for x in tensors],
            "dtypes": [x.dtype for x in tensors],
            "shapes": [list(x.shape) for x in tensors],
        }
        await self._call("POST", "/weights_checker", body)

    async def read_back(self, name: str) -> None:
        """Reads one parameter, which waits until the weights are written; SGLang can it for few models."""
        body = {"name": name, "truncate_size": 1}
        await self._call("POST", "/get_weights_by_name", body, json_reply=False)

    # ------------------------------------------------------------------------------------ requests

    async def pause(self, mode: str) -> None:
        """Stops generating: `retract`, `in_place` or `abort`."""
        await self.in_turn(pausing(mode))

    async def resume(self) -> None:
        """Goes on generating; no effect where it was not paused."""
        await self.in_turn(RESUMING)

    async def abort_all(self) -> None:
        """Ends every request with the tokens it has."""
        await self._call("POST", "/abort_request", {"rid": "", "abort_all": True}, json_reply=False)

    async def flush_cache(self) -> None:
        """Forgets cached prefixes."""
        await self._call("POST", "/flush_cache", {}, json_reply=False)

    # ------------------------------------------------------------------------------------ memory

    async def release_memory(self, tags: Sequence[str]) -> None:
        """Gives up GPU memory; SGLang must be at rest, or dies of it."""
        await self._call("POST", "/release_memory_occupation", {"tags": list(tags)}, json_reply=False)

    async def resume_memory(self, tags: Sequence[str]) -> None:
        """Takes it back; SGLang must have given up just that, or dies of it."""
        await self._call("POST", "/resume_memory_occupation", {"tags": list(tags)}, json_reply=False)

    # ------------------------------------------------------------------------------------ weights

    async def set_version(self, text: str, *, begins: Callable[[], None] | None = None) -> None:
        """Sets its version string; running requests stay. `begins`: called right before it is sent."""
        call = naming(text)
        self._judge_all([call], await self._ask(call, begins=begins))

    async def in_turn(self, *calls: Call) -> None:
        """Makes calls that are sent at once and done in this order; the first that failed is raised."""
        self._judge_all(calls, await self._ask(*calls))

    async def begin_update(self) -> None:
        """Opens its update session."""
        await self._call("POST", "/begin_weight_update", {}, json_reply=False)

    async def end_update(self) -> None:
        """Closes its update session."""
        await self._call("POST", "/end_weight_update", {}, json_reply=False)

    async def join_group(self, group: Mapping[str, Any], *, timeout_s: float) -> None:
        """Joins the trainer's process group."""
        await self._call("POST", "/init_weights_update_group", group, timeout_s=timeout_s)

    async def leave_group(self, group_name: str) -> None:
        """Leaves the process group, also out of the middle of a broadcast."""
        await self._call("POST", "/destroy_weights_update_group", {"group_name": group_name})

    async def receive_broadcast(
        self, tensors: Sequence[TensorSpec], group_name: str, *, timeout_s: float
    ) -> None:
        """Takes one flattened bucket from the group's rank 0."""
        body = {
            "names": [x.name for x in tensors],
            "dtypes": [x.dtype for x in tensors],
            "shapes": [list(x.shape) for x in tensors],
            "group_name": group_name,
            "load_format": "flattened_bucket",
            "flush_cache": False,
            "abort_all_requests": False,
        }
        await self._call("POST", "/update_weights_from_distributed", body, timeout_s=timeout_s)

    async def receive_handles(self, handles: Sequence[str], *, timeout_s: float) -> None:
        """Takes one flattened bucket by handles, one a tensor-parallel rank."""
        await self._call(*_taking(handles, "flattened_bucket"), timeout_s=timeout_s)

    async def receive_order(
        self,
        handles: Sequence[str],
        *,
        load_format: str,
        opening: Sequence[Call],
        begins: Callable[[], None],
        timeout_s: float,
    ) -> None:
        """Does an order, one a tensor-parallel rank, by our loader in it, which `load_format` names.

        Args:
          handles: the order.
          load_format: the loader.
          opening: calls that come before it; all are sent at once, and done in this order.
          begins: called when it begins.
          timeout_s: from then on; what comes before it has the usual deadlines.
        """
        calls = (*opening, _taking(handles, load_format))
        self._judge_all(calls, await self._ask(*calls, timeout_s=timeout_s, once=True, begins=begins))

    async def signal(self, text: str, *, opening: Sequence[Call], timeout_s: float) -> dict[str, Any]:
        """Has our loader in it repeat an order between two of its steps, paused or not; returns its report.

        Args:
          text: the order.
          opening: calls that come before it; all are sent at once, and done in this order.
          timeout_s: from when it begins; what comes before it has the usual deadlines.

        Raises:
          EngineRefused: there is no loader, or one that knows no orders.
        """
        calls = (*opening, _reading(HOOK_SIGNAL + text))
        replies = await self._ask(*calls, timeout_s=timeout_s, once=True)
        self._judge_all(opening, replies[:-1])
        return self._as_report(calls[-1], replies[-1])

    async def hook_report(self, *, timeout_s: float) -> dict[str, Any]:
        """What our loader in it says of its last order: JSON, as a list of numbers.

        Raises:
          EngineRefused: it has none to give.
        """
        call = _reading(HOOK_REPORT)
        (reply,) = await self._ask(call, timeout_s=timeout_s)
        return self._as_report(call, reply)

    def _as_report(self, call: Call, reply: tuple[int, bytes]) -> dict[str, Any]:
        status, raw = reply
        if status == 200:
            with contextlib.suppress(ValueError, TypeError):
                said: object = orjson.loads(bytes(int(number) for number in orjson.loads(raw)))
                if isinstance(said, dict):
                    return cast(dict[str, Any], said)
        raise EngineRefused(f"{self._where(call)}: HTTP {status}: no report: {raw[:80]!r}", status)

    async def load_folder(self, folder: str, *, timeout_s: float) -> None:
        """Loads safetensors from a folder."""
        body = {
            "model_path": folder,
            "load_format": "auto",  # unset, SGLang loads as it did at its start, dummy weights too
            "flush_cache": False,
            "abort_all_requests": False,
        }
        await self._call("POST", "/update_weights_from_disk", body, timeout_s=timeout_s)

    # ------------------------------------------------------------------------------------ the call

    async def _call(
        self,
        method: str,
        path: str,
        body: Mapping[str, Any] | None = None,
        *,
        timeout_s: float | None = None,
        json_reply: bool = True,
    ) -> dict[str, Any]:
        call = method, path, body
        ((status, raw),) = await self._ask(call, timeout_s=timeout_s)
        return _judge(self._where(call), status, raw, json_reply=json_reply)

    def _judge_all(self, calls: Sequence[Call], replies: Sequence[tuple[int, bytes]]) -> None:
        for call, (status, raw) in zip(calls, replies, strict=True):
            _judge(self._where(call), status, raw, json_reply=call[1] not in _WORDLESS)

    def _where(self, call: Call) -> str:
        method, path, _ = call
        return f"{self._record.engine_id}: {method} {path}"

    async def _ask(
        self,
        *calls: Call,
        timeout_s: float | None = None,
        once: bool = False,
        begins: Callable[[], None] | None = None,
    ) -> list[tuple[int, bytes]]:
        """Status and body of each reply; calls that are made together are done in their order.

        Args:
          calls: to make.
          timeout_s: deadline of the last one, from when it begins; None: that of the others.
          once: an engine that hangs up between two replies is not asked for the rest.
          begins: called when the last one begins.
        """
        replies: list[tuple[int, bytes]] = []
        limits_s = [self._timeout_s] * (len(calls) - 1) + [timeout_s or self._timeout_s]
        try:
            while len(replies) < len(calls):
                await self._exchange(calls, limits_s, replies, once=once, begins=begins)
        except TimeoutError:
            at = len(replies)
            # A call with a deadline of its own moves weights, and may be late because another party is.
            gone = at < len(calls) - 1 or not timeout_s
            why = f"{self._where(calls[at])}: no answer within {limits_s[at]:g} s"
            raise EngineBroken(why, gone=gone) from None
        except UpstreamError as error:
            where = self._where(calls[len(replies)])
            raise EngineBroken(f"{where}: {error}", gone=isinstance(error, Refused | Died)) from error
        return replies

    async def _exchange(
        self,
        calls: Sequence[Call],
        limits_s: Sequence[float],
        replies: list[tuple[int, bytes]],
        *,
        once: bool,
        begins: Callable[[], None] | None,
    ) -> None:
        """Asks what has no reply yet over one connection; again where a kept one turned out to be closed.

        It returns with less than all where the engine hangs up between two replies.
        """
        asked, last = len(replies), len(calls) - 1
        *before, (head, payload) = map(self._request, calls[asked:])
        head = b"".join(itertools.chain(*before, (head,)))
        for fresh in (False, True):
            async with asyncio.timeout(limits_s[asked]) as limit:
                connection = await self._pool.connect(self._record.url, fresh=fresh)
                try:
                    if asked == last and begins is not None:
                        begins()
                    connection.send(head, payload, replies=len(calls) - asked)
                    while len(replies) < last:
                        reply = await connection.earlier_reply(len(replies) - asked)
                        if reply is None:
                            break
                        replies.append(reply)
                        limit.reschedule(asyncio.get_running_loop().time() + limits_s[len(replies)])
                        if len(replies) == last and begins is not None:
                            begins()
                    status = (await connection.reply()).status
                    raw, whole = await connection.body(MAX_REPLY_BYTES)
                    if not whole:
                        raise Died(f"its answer is larger than {MAX_REPLY_BYTES} bytes", got_bytes=True)
                    replies.append((status, raw))
                    if once and len(replies) <= last:
                        raise Died("the engine closed the connection", got_bytes=True)
                    return
                except (Died, Rubbish) as error:
                    if len(replies) > asked and not once:
                        return
                    if isinstance(error, Rubbish) or not connection.reused or error.got_bytes:
                        raise
                finally:
                    self._pool.release(connection)
        raise GaveUp("no connection")

    def _request(self, call: Call) -> tuple[bytes, bytes]:
        """Head and body as they go on the wire."""
        method, path, body = call
        url = urlsplit(self._record.url)
        payload = b"" if body is None else orjson.dumps(body)
        lines = [f"{method} {url.path.rstrip('/')}{path} HTTP/1.1", f"host: {url.netloc}"]
        if self._record.admin_api_key:
            lines.append(f"authorization: Bearer {self._record.admin_api_key}")
        if body is not None:
            lines += ["content-type: application/json", f"content-length: {len(payload)}"]
        return "\r\n".join([*lines, "", ""]).encode(), payload


def naming(text: str) -> Call:
    """Sets its version string; running requests stay."""
    return "POST", "/update_weight_version", {"new_version": text, "abort_all_requests": False}


def pausing(mode: str) -> Call:
    """Stops generating: `retract`, `in_place` or `abort`."""
    return "POST", _PAUSE, {"mode": mode}


def _reading(name: str) -> Call:
    return "POST", "/get_weights_by_name", {"name": name, "truncate_size": 1}


def _taking(handles: Sequence[str], load_format: str) -> Call:
    body = {
        "serialized_named_tensors": list(handles),
        "load_format": load_format,
        "flush_cache": False,
        "abort_all_requests": False,
    }
    return "POST", "/update_weights_from_tensor", body


def _judge(where: str, status: int, raw: bytes, *, json_reply: bool) -> dict[str, Any]:
    """Sorts an answer into done, refused and broken."""
    try:
        parsed: object = orjson.loads(raw) if raw else {}
    except orjson.JSONDecodeError:
        parsed = None
    answer = cast(dict[str, Any], parsed) if isinstance(parsed, dict) else None
    said = _message(answer) if answer is not None else raw[:200].decode("utf-8", "replace")
    if status >= 500:
        raise EngineBroken(f"{where}: HTTP {status}: {said}")
    if status != 200:
        raise EngineRefused(f"{where}: HTTP {status}: {said}", status)
    if answer is None and json_reply:
        raise EngineBroken(f"{where}: its answer is no JSON object: {raw[:80]!r}")
    if answer is not None and answer.get("success") is False:
        raise EngineRefused(f"{where}: {said}", status)
    return answer or {}


def _message(answer: Mapping[str, Any]) -> str:
    """The words in an answer, wherever this engine puts them."""
    error: object = answer.get("error")
    if isinstance(error, dict):
        error = cast(dict[str, Any], error).get("message")
    return str(answer.get("message") or error or answer.get("detail") or orjson.dumps(answer)[:200].decode())

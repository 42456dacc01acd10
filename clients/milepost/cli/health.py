"""`milepost health`: does a service answer that it is well? For container health checks; base install.

`grpc.health.v1` is spoken by hand, because its package belongs to the extras: the request holds one string
(field 1, the service's name; empty: the server as a whole), the reply one enumeration (field 1, 1: serving).
"""

from __future__ import annotations

import argparse
import asyncio
import http.client
import urllib.error
import urllib.request
from typing import Any

import grpc

from milepost.channel import open_channel
from milepost.errors import DeadlineExceeded, InvalidArgument, MilepostError, Unavailable
from milepost.status import from_rpc_error

CHECK = "/grpc.health.v1.Health/Check"
SERVING = b"\x08\x01"
_LONGEST_NAME_BYTES = 127  # its length then fits one byte on the wire


def add(commands: Any, text: str) -> None:
    """Adds the subcommand."""
    parser = commands.add_parser(
        "health", help=text, description=_DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("target", metavar="TARGET", help="host:port (gRPC) or http://host:port/path")
    parser.add_argument(
        "--service", default="", metavar="NAME", help="one service, milepost.v1.BufferService (default: all)"
    )
    parser.add_argument(
        "--timeout-s", type=float, default=3.0, metavar="S", help="deadline (default: %(default)s)"
    )
    parser.set_defaults(run=health)


_DESCRIPTION = """Asks a service whether it serves: by grpc.health.v1, or by GET where the target is a URL.

exit status: 0 it serves; 1 it does not, or does not answer in time; 2 wrong command line
"""


async def health(options: argparse.Namespace) -> int:
    """Runs the subcommand."""
    target, timeout_s = str(options.target), float(options.timeout_s)
    if timeout_s <= 0:
        raise InvalidArgument(f"--timeout-s {timeout_s}: give seconds above 0", reason="BAD_FLAG")
    if "://" in target:
        await asyncio.to_thread(check_url, target, timeout_s=timeout_s)
    else:
        await check(target, service=options.service, timeout_s=timeout_s)
    print(f"{target} serves")
    return 0


async def check(
    address: str, *, service: str = "", timeout_s: float = 3.0, wait_for_ready: bool = False
) -> None:
    """Asks a gRPC server for its health.

    Args:
      address: of the server.
      service: one of its services; empty: all.
      timeout_s: deadline of the answer.
      wait_for_ready: connect again until then where nobody listens yet, or a busy machine is slow to.

    Raises:
      Unavailable: nobody answers, or the answer is not SERVING.
      NotFound: the server has no service of that name.
      DeadlineExceeded: no answer in time.
    """
    name = service.encode()
    if len(name) > _LONGEST_NAME_BYTES:
        raise InvalidArgument(f"--service {service}: longer than {_LONGEST_NAME_BYTES} bytes")
    request = b"\x0a" + bytes([len(name)]) + name if name else b""
    async with open_channel(address) as channel:
        call: Any = channel.unary_unary(CHECK, request_serializer=None, response_deserializer=None)
        try:
            reply: bytes = await call(request, timeout=timeout_s, wait_for_ready=wait_for_ready)
        except grpc.aio.AioRpcError as error:
            raise from_rpc_error(error) from error
    if reply != SERVING:
        raise Unavailable(f"{address} {service or 'as a whole'} does not serve", reason="NOT_SERVING")


def check_url(url: str, *, timeout_s: float) -> None:
    """GETs a URL.

    Raises:
      Unavailable: nobody answers, or with another status than 200.
      DeadlineExceeded: no answer in time.
    """
    if not url.startswith(("http://", "https://")):
        raise InvalidArgument(f"{url}: give host:port, or a URL that starts with http://")
    try:
        with urllib.request.urlopen(url, timeout=timeout_s) as reply:
            status = int(reply.status)
    except urllib.error.HTTPError as error:
        status = error.code
    except TimeoutError as error:
        raise _late(url, timeout_s) from error
    except urllib.error.URLError as error:
        if isinstance(error.reason, TimeoutError):
            raise _late(url, timeout_s) from error
        raise Unavailable(f"{url} does not answer: {error.reason}", reason="NOT_SERVING") from error
    except http.client.HTTPException as error:
        raise Unavailable(f"{url} answers no HTTP: {error!r}", reason="NOT_SERVING") from error
    if status != 200:
        raise Unavailable(f"{url} answers {status}", reason="NOT_SERVING")


def _late(target: str, timeout_s: float) -> MilepostError:
    return DeadlineExceeded(f"{target} does not answer within {timeout_s:g} s")

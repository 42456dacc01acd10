"""The buffer process: `python -m milepost_buffer serve --config milepost.toml [--key value ...]`."""

from __future__ import annotations

import asyncio
import logging
import sys
from collections.abc import AsyncGenerator, Sequence
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager

from milepost import errors
from milepost.v1.weights_pb2_grpc import add_WeightServiceServicer_to_server
from milepost_buffer import buffer_servicer, weight_servicer
from milepost_buffer.embedded import EmbeddedRedis
from milepost_buffer.ledger import Ledger, open_ledger
from milepost_buffer.metrics import LedgerView
from milepost_buffer.settings import BufferSettings
from milepost_common.metrics.export import serving as serving_metrics
from milepost_common.process import announce, run
from milepost_common.server import GrpcServer
from milepost_common.settings import load_or_exit

USAGE = "usage: python -m milepost_buffer serve [--config FILE] [--key value ...]"
STATUS_CANNOT_START, STATUS_BAD_SETTINGS = 1, 2

log = logging.getLogger(__name__)


@asynccontextmanager
async def serving(settings: BufferSettings) -> AsyncGenerator[tuple[GrpcServer, Ledger]]:
    """A buffer that serves until the block ends: waiting calls answer first, Redis stops last."""
    async with AsyncExitStack() as stack:
        url = settings.redis_url or await _start_redis(settings, stack)
        ledger = await stack.enter_async_context(
            open_ledger(
                url,
                redis_wait_s=settings.redis_wait_s,
                redis_timeout_s=settings.redis_timeout_s,
                require_aof=settings.require_aof,
            )
        )
        server = GrpcServer(listen=settings.listen, advertise=settings.advertise)
        servicer = buffer_servicer.BufferServicer(ledger)
        server.add(buffer_servicer.add_to_server, servicer, buffer_servicer.NAME)
        server.add(
            add_WeightServiceServicer_to_server, weight_servicer.WeightServicer(ledger), weight_servicer.NAME
        )
        await stack.enter_async_context(server)
        await server.start()
        stack.push_async_callback(ledger.bell.close)
        yield server, ledger


def metered(settings: BufferSettings, server: GrpcServer, ledger: Ledger) -> AbstractAsyncContextManager[str]:
    """Serves the buffer's metrics until the block ends, which gets their address."""
    return serving_metrics(
        "buffer",
        [*server.meter.instruments, *ledger.instruments],
        listen=settings.metrics_listen,
        telemetry=settings.telemetry,
        refresh=LedgerView(ledger.accounts, ledger.store).refresh,
    )


async def _start_redis(settings: BufferSettings, stack: AsyncExitStack) -> str:
    redis = EmbeddedRedis(
        settings.data_dir,
        appendfsync=settings.appendfsync,
        wait_s=settings.redis_wait_s,
        liveness_timeout_s=settings.redis_liveness_timeout_s,
    )
    await stack.enter_async_context(redis)
    return redis.url


async def serve(settings: BufferSettings, stop: asyncio.Event) -> int:
    """Serves until `stop`; returns the exit status."""
    try:
        async with serving(settings) as (server, ledger), metered(settings, server, ledger) as metrics:
            log.info("ledger on %s", ledger.link.url)
            announce("buffer", grpc=server.address, metrics=metrics)
            await stop.wait()
    except errors.InvalidArgument as error:
        print(f"milepost buffer: {error}", file=sys.stderr, flush=True)
        return STATUS_BAD_SETTINGS
    except errors.MilepostError as error:
        hint = "" if settings.redis_url else f" (log of the embedded server: {settings.data_dir}/redis.log)"
        print(f"milepost buffer: {error}{hint}", file=sys.stderr, flush=True)
        return STATUS_CANNOT_START
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; returns the exit status."""
    args = list(sys.argv[1:] if argv is None else argv)
    if not args or args[0] != "serve":
        print(USAGE, file=sys.stderr)
        return 2
    settings = load_or_exit(BufferSettings, args[1:])
    return run("buffer", lambda stop: serve(settings, stop), telemetry=settings.telemetry)


if __name__ == "__main__":
    sys.exit(main())

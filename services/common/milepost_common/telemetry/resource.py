"""Who tells: the resource that traces and metrics of one process share."""

from __future__ import annotations

import os
import platform
import uuid
from functools import cache

from opentelemetry.sdk.resources import Resource

from milepost import __version__

INSTANCE_ID = uuid.uuid4().hex
"""New in each process."""


@cache
def resource_of(name: str) -> Resource:
    """The resource of a service, `service.name=milepost-<name>`; OTEL_RESOURCE_ATTRIBUTES adds to it."""
    return Resource.create(
        {
            "service.name": f"milepost-{name}",
            "service.namespace": "milepost",
            "service.instance.id": INSTANCE_ID,
            "service.version": __version__,
            "host.name": platform.node(),
            "process.pid": os.getpid(),
        }
    )

"""Every rpc of the contract is served, and importing the service brings no torch."""

from __future__ import annotations

import inspect
import subprocess
import sys

import pytest

from milepost.v1 import buffer_pb2, weights_pb2
from milepost_buffer.buffer_servicer import NAME as BUFFER
from milepost_buffer.buffer_servicer import BufferServicer
from milepost_buffer.weight_servicer import NAME as WEIGHTS
from milepost_buffer.weight_servicer import WeightServicer


@pytest.mark.parametrize(
    "servicer, name, module",
    [(BufferServicer, BUFFER, buffer_pb2), (WeightServicer, WEIGHTS, weights_pb2)],
)
def test_every_rpc_has_a_handler_of_its_kind(servicer, name, module) -> None:
    service = module.DESCRIPTOR.services_by_name[name.rpartition(".")[2]]
    assert service.full_name == name
    for method in service.methods:
        handler = getattr(servicer, method.name)
        assert inspect.isasyncgenfunction(handler) == method.server_streaming, method.name


def test_the_buffer_needs_no_torch() -> None:
    code = (
        "import sys, milepost_buffer.__main__; sys.exit(bool({'torch', 'transformers'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], timeout=60, check=False).returncode == 0

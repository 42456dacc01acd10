"""Benchmarks of the services beside peers, each a ratio measured side by side in one run: `make bench`.

Benchmarks start processes while they hold channels. gRPC's fork handlers, which are on by default, abort a
few in a hundred of those children before they are what they are to be; none of ours forks to go on in Python.
"""

import os

os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")  # read when gRPC is imported

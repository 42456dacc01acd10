"""Async clients of the seven services, one method an rpc."""

from milepost.client.buffer import PUBLISHER, BufferClient
from milepost.client.reward import EnvironmentClient, RewardClient
from milepost.client.rollout import RolloutClient
from milepost.client.router import RouterClient
from milepost.client.trainer import TrainerClient
from milepost.client.weights import WeightClient

__all__ = [
    "PUBLISHER",
    "BufferClient",
    "EnvironmentClient",
    "RewardClient",
    "RolloutClient",
    "RouterClient",
    "TrainerClient",
    "WeightClient",
]

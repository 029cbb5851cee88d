"""Engines that drive the federation machine and real trainers without a network.

Holds no server logic of its own: whatever is decided, the machine decides.
"""

from fedge.simulation.adversary import Adversary
from fedge.simulation.engine import Result, Simulation
from fedge.simulation.network import Network
from fedge.simulation.speeds import SPEEDS, StepTimes

__all__ = ["SPEEDS", "Adversary", "Network", "Result", "Simulation", "StepTimes"]

"""Lying: a flipped update that claims to stand for very many examples, made in very few steps.

    sent = -scale * own,   examples = 10^9,   steps = 1

A mean weighted by examples becomes this client's update, and normalised averaging divides by the steps (FedNova). The
base version cannot be lied about: the coordinator knows which it handed out.
"""

import dataclasses
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from fedge.core.params import Vector
from fedge.core.task import Update
from fedge.strategies.attacks.scene import Scene


@dataclass(frozen=True, slots=True)
class Lying:
    """`examples` as many as the default limit lets pass; `steps` 0: tells the truth about them."""

    scale: float = 1.0
    examples: int = 1_000_000_000
    steps: int = 1
    omniscient: ClassVar[bool] = False

    def forge(self, scene: Scene) -> Vector:
        """-scale * own."""
        return np.multiply(scene.own, np.float32(-self.scale))

    def lie(self, update: Update) -> Update:
        """With these claims."""
        return dataclasses.replace(update, examples=self.examples, steps=self.steps or update.steps)

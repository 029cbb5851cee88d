"""Rounds of pfl's in-process simulation with a trivial client and a NumPy model.

The model and its local step are NumPy on one vector; the algorithm, the cohort, the weighting by examples and the sum
are pfl's own. Nothing is evaluated.
"""

import asyncio
import logging
import warnings
from typing import Any

import numpy as np
from pfl.aggregate.simulate import SimulatedBackend
from pfl.aggregate.weighting import WeightByDatapoints
from pfl.algorithm.base import NNAlgorithmParams
from pfl.algorithm.federated_averaging import FederatedAveraging
from pfl.data.federated_dataset import FederatedDataset
from pfl.data.sampling import get_user_sampler
from pfl.hyperparam.base import NNTrainHyperParams
from pfl.metrics import Metrics
from pfl.model.base import StatefulModel
from pfl.stats import MappedVectorStatistics

from benchmarks.trivial import RATE, SIZE, examples_of
from fedge.core.params import Vector

KEY = "parameters"


class NumpyModel(StatefulModel):  # type: ignore[misc]  # pfl is not typed
    """One vector; its buffers are reused, as pfl's own PyTorch model does."""

    def __init__(self) -> None:
        super().__init__()
        self.vector = np.ones(SIZE, np.float32)
        self._difference = np.empty_like(self.vector)

    def evaluate(self, *_: Any) -> Metrics:
        """Nothing to measure."""
        return Metrics()

    def save(self, dir_path: str) -> None:
        """Nothing is kept."""

    def load(self, dir_path: str) -> None:
        """Nothing is kept."""

    def get_parameters(self, placeholders: Any = None) -> Any:
        """A copy, in the placeholders where given."""
        if placeholders is None:
            return MappedVectorStatistics({KEY: self.vector.copy()})
        np.copyto(placeholders[KEY], self.vector)
        return placeholders

    def set_parameters(self, w: Any) -> None:
        """Back to these."""
        np.copyto(self.vector, w[KEY])

    def get_model_difference(self, other_parameters: Any, clone: bool = False) -> Any:
        """What training changed."""
        out = None if clone else self._difference
        return MappedVectorStatistics({KEY: np.subtract(self.vector, other_parameters[KEY], out=out)})

    def apply_model_update(self, statistics: Any) -> tuple["NumpyModel", Metrics]:
        """Add the mean."""
        self.vector += statistics[KEY]
        return self, Metrics()


class Trivial(FederatedAveraging):  # type: ignore[misc]
    """Federated averaging whose local training is one multiplication."""

    def train_one_user(self, initial_model_state: Any, model: Any, user_dataset: Any, central_context: Any) -> Any:
        """(statistics, metrics) of one client."""
        np.multiply(model.vector, np.float32(1 - RATE), out=model.vector)
        return model.get_model_difference(initial_model_state), Metrics()


def rounds(clients: int, count: int) -> Vector:
    """So many rounds in which every client takes part; the parameters it ends with."""
    logging.getLogger("pfl").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        asyncio.set_event_loop(asyncio.new_event_loop())
        users = {str(index): [np.zeros(examples_of(index))] for index in range(clients)}
        dataset = FederatedDataset.from_slices(users, get_user_sampler("minimize_reuse", list(users)))
        backend = SimulatedBackend(dataset, dataset, postprocessors=[WeightByDatapoints()])
        plan = NNAlgorithmParams(count, count + 1, clients, None)
        train = NNTrainHyperParams(local_batch_size=None, local_num_epochs=1, local_learning_rate=RATE)
        model = NumpyModel()
        Trivial().run(plan, backend, model, train, send_metrics_to_platform=False)
    return model.vector

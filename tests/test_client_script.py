"""An existing training script as a client."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import fedge.client
from fedge.client.script import layout_of
from fedge.core.errors import ModelError, TaskSpent, TooStale, TrainerError
from fedge.core.params import Layout
from tests.fake_coordinator import FakeCoordinator

SIZE = 3000


@pytest.fixture
def coordinator():
    with FakeCoordinator(np.zeros(SIZE), tasks=2) as fake:
        yield fake


def test_a_script_of_arrays_is_a_client(tmp_path):
    weights = {"w": np.zeros((2, 3), np.float32), "b": np.zeros(3, np.float32)}
    with FakeCoordinator(np.zeros(9), tasks=3, layout=Layout.of(weights)) as coordinator:
        session = fedge.client.connect(coordinator.address, "site-1", examples=4, layout=weights, folder=tmp_path)
        steps = []
        while (task := session.receive()) is not None:
            steps.append(task.steps)
            task.weights["w"] += 1
            task.weights["b"] -= 1
            assert session.send(task.weights, metrics={"loss": np.float32(0.5)})
        assert session.finished == "updates"
        assert steps == [3, 4, 5]
        np.testing.assert_array_equal(coordinator.broadcasts[-1].vector, [3] * 6 + [-3] * 3)
        assert coordinator.updates["site-1-2"].metrics == {"loss": 0.5}
        assert coordinator.updates["site-1-2"].examples == 4


def test_a_torch_script_is_a_client():
    import torch

    model = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.BatchNorm1d(2))
    layout = layout_of(model)
    with FakeCoordinator(np.arange(layout.size), tasks=2, layout=layout) as coordinator:
        with fedge.client.connect(coordinator.address, "site-1", examples=4, layout=model) as session:
            while session.receive(model) is not None:
                with torch.no_grad():
                    model[0].weight += 1
                assert session.send(model.state_dict())
        expected = np.arange(layout.size, dtype=np.float32)
        expected[:6] += 2
        np.testing.assert_array_equal(coordinator.broadcasts[-1].vector, expected)
        np.testing.assert_array_equal(model[1].running_mean.numpy(), expected[12:14])


def test_the_layout_of_a_module_is_that_of_the_trainer():
    import torch

    from fedge.client.torch_trainer import FlatModel

    def factory():
        model = torch.nn.Sequential(torch.nn.Conv2d(1, 2, 3), torch.nn.BatchNorm2d(2), torch.nn.Linear(4, 2))
        model[0].bias.requires_grad_(False)
        return model

    assert layout_of(factory()).hash == FlatModel(factory, 0).layout.hash


def test_a_script_that_answers_out_of_turn_is_told(coordinator):
    layout = Layout.of({"parameters": np.zeros(SIZE)})
    with fedge.client.connect(coordinator.address, "site-1", examples=4, layout=layout) as session:
        with pytest.raises(TrainerError, match="receive"):
            session.send({"parameters": np.zeros(SIZE)})
        session.receive()
        with pytest.raises(ModelError, match="'parameters'"):
            session.send({"other": np.zeros(SIZE)})
        session.receive()  # the first goes back
        assert [task for task, _ in coordinator.failures] == ["site-1-0"]


def test_a_refused_update_does_not_stop_a_script(coordinator):
    layout = Layout.of({"parameters": np.zeros(SIZE)})
    coordinator.faults["Upload"] = [TooStale("Late.")]
    with fedge.client.connect(coordinator.address, "site-1", examples=4, layout=layout) as session:
        assert session.receive() is not None
        assert not session.send({"parameters": np.zeros(SIZE)})


@pytest.mark.parametrize("over", [True, False])
def test_a_spent_task_is_a_warning_only_where_the_run_goes_on(coordinator, caplog, over):
    layout = Layout.of({"parameters": np.zeros(SIZE)})
    coordinator.faults["Upload"] = [TaskSpent("It is over.")]
    with fedge.client.connect(coordinator.address, "site-1", examples=4, layout=layout) as session:
        session.receive()
        with coordinator._news:
            coordinator._done["site-1"] = 2 if over else 1
        assert not session.send({"parameters": np.zeros(SIZE)})
        assert (session.receive() is None) == over
    warned = [record for record in caplog.records if "TASK_SPENT" in record.getMessage()]
    assert len(warned) == (0 if over else 1)


def test_the_client_room_loads_without_grpc_and_torch():
    code = "import fedge.client, sys; assert not {'grpc', 'torch'} & set(sys.modules); fedge.client.connect"
    code += "; assert 'grpc' in sys.modules and 'torch' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(__file__).parent)
    assert done.returncode == 0, done.stderr

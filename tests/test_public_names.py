"""The public names: adding or losing one is a decision, made here."""

import subprocess
import sys

import fedge
import fedge.edge

PUBLIC = [
    "Experiment",
    "FedgeError",
    "Layout",
    "OurFault",
    "Run",
    "Task",
    "TheirFault",
    "Update",
    "__version__",
    "aggregate",
    "load_experiment",
    "load_run",
    "simulate",
]


def test_the_list_is_the_one_decided_on() -> None:
    assert sorted(fedge.__all__) == sorted(PUBLIC)
    assert dir(fedge) == sorted(PUBLIC)


def test_the_names_of_the_edge_are_there_documented_and_cost_nothing_unused() -> None:
    assert fedge.edge.__all__ == ["Answer", "Bounds", "Session", "cuts", "export", "load", "open_graph"]
    assert all(getattr(fedge.edge, name).__doc__ for name in fedge.edge.__all__)
    assert not hasattr(fedge.edge, "no_such_name")
    code = "import sys, fedge.edge; print({'onnx', 'onnxruntime', 'grpc', 'numpy'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


def test_every_name_is_there_and_documented() -> None:
    for name in PUBLIC:
        thing = getattr(fedge, name)
        assert isinstance(thing, str) or thing.__doc__


def test_another_name_is_an_attribute_error() -> None:
    assert not hasattr(fedge, "no_such_name")


def test_python_m_fedge_is_the_command_line() -> None:
    done = subprocess.run([sys.executable, "-m", "fedge", "--version"], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == fedge.__version__

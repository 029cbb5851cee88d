"""Serving: addresses, state folders, and the end of a run, over real gRPC on loopback."""

import asyncio
import socket
from pathlib import Path
from typing import Any

import pytest

from fedge.core.addresses import check_listen
from fedge.core.errors import AddressError, ExperimentError, JournalError
from fedge.server.coordinator import replay, serve
from fedge.server.machine import Stop
from fedge.server.machine.events import Record
from tests.coordinator_fixture import Peer, initial, plan, room


async def served(tmp_path: Path, **changes: Any) -> Any:
    values = {"listen": "127.0.0.1:0", "state_dir": tmp_path, "on_record": lambda _: None, **changes}
    return await serve(values.pop("federation", plan()), initial(), **values)


def test_a_port_in_use_is_an_address_error(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(AddressError, match="the port is in use; stop who uses it, or choose another"):
            asyncio.run(served(tmp_path, listen=f"127.0.0.1:{taken.getsockname()[1]}"))


@pytest.mark.parametrize("listen", ["192.0.2.7:7443", "no-such-host.invalid:7443"])
def test_an_address_of_another_machine_is_told_from_a_port_in_use(tmp_path: Path, listen: str) -> None:
    with pytest.raises(AddressError, match="this machine has no such address"):
        asyncio.run(served(tmp_path, listen=listen, allow_remote=True))


def test_two_coordinators_do_not_share_a_port(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with room(tmp_path / "one", plan()) as made:
            with pytest.raises(AddressError):
                await served(tmp_path / "two", listen=made.address)

    asyncio.run(scenario())


@pytest.mark.parametrize("listen", ["0.0.0.0:0", "[::]:0", "192.0.2.7:80", "example.org:80"])
def test_other_machines_are_kept_out_unless_allowed(tmp_path: Path, listen: str) -> None:
    with pytest.raises(AddressError, match="--insecure-remote"):
        asyncio.run(served(tmp_path, listen=listen))
    check_listen(listen, allow_remote=True)


@pytest.mark.parametrize("listen", ["127.0.0.1", "localhost:x", ":80", "127.0.0.1:70000"])
def test_what_is_no_address_is_refused(listen: str) -> None:
    with pytest.raises(AddressError, match="host:port"):
        check_listen(listen, allow_remote=False)


@pytest.mark.parametrize("listen", ["127.0.0.1:80", "localhost:80", "[::1]:80", "127.9.9.9:1", "[::ffff:127.0.0.1]:1"])
def test_loopback_is_free(listen: str) -> None:
    check_listen(listen, allow_remote=False)


def test_a_second_coordinator_on_the_folder_is_refused(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with room(tmp_path, plan()):
            with pytest.raises(JournalError, match="Another coordinator") as caught:
                await served(tmp_path)
            assert caught.value.exit_code == 7

    asyncio.run(scenario())


def test_another_experiment_on_the_folder_is_refused(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with room(tmp_path, plan()):
            pass
        with pytest.raises(ExperimentError, match="another experiment"):
            await served(tmp_path, federation=plan(seed=7))

    asyncio.run(scenario())


def test_there_is_nothing_to_replay_in_an_empty_folder(tmp_path: Path) -> None:
    with pytest.raises(JournalError, match="no journal"):
        replay(tmp_path, plan())


def test_serve_returns_the_machine_once_all_know_that_it_is_over(tmp_path: Path) -> None:
    async def scenario() -> None:
        addresses: asyncio.Queue[str] = asyncio.Queue()
        federation = plan(clients=1, stop=Stop(updates=2))
        lines: list[Record] = []
        running = asyncio.create_task(
            served(tmp_path, federation=federation, on_record=lines.append, on_listening=addresses.put_nowait)
        )
        peer = Peer(await addresses.get(), "device")
        await peer.join()
        for _ in range(2):
            await peer.upload(await peer.task())
        offers = [offer async for offer in peer.offers()]
        assert offers[-1].finished == "updates"
        machine = await asyncio.wait_for(running, 30)
        assert (machine.updates, machine.finished) == (2, "updates")
        assert lines[-1].kind == "finished"
        await peer.channel.close()

    asyncio.run(scenario())


def test_a_finished_run_that_is_served_again_ends_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fedge.server.coordinator.serving.GRACE_S", 0.2)  # the device does not come back

    async def scenario() -> None:
        addresses: asyncio.Queue[str] = asyncio.Queue()
        again: dict[str, Any] = {
            "federation": plan(clients=1, stop=Stop(updates=1)),
            "evaluate": lambda _: {"accuracy": 0.5},
        }
        running = asyncio.create_task(served(tmp_path, **again, on_listening=addresses.put_nowait))
        peer = Peer(await addresses.get(), "device")
        await peer.join()
        await peer.upload(await peer.task())
        await asyncio.wait_for(running, 30)
        await peer.channel.close()
        machine = await asyncio.wait_for(served(tmp_path, **again), 30)
        assert (machine.updates, machine.finished) == (1, "updates")

    asyncio.run(scenario())

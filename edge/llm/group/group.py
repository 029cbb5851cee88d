"""The head of a group: forms it of the devices that are there, and forms it anew when one is lost or has come.

Owns the epochs: every group of ranks has a number, a key and a mesh of its own, and ends as a whole. Threads: `form`,
`recover`, `better` and `improve` are called by one at a time, `give_up` and `close` by any. Must never run a step.
"""

import contextlib
import logging
import secrets
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from fedge.core import addresses
from fedge.core.addresses import is_local
from fedge.core.errors import AddressError, ExperimentError, ModelError, RankLost
from fedge.core.limits import LlmLimits
from fedge.edge.llm.group import membership
from fedge.edge.llm.group.blocks import open_blocks, spare_bytes
from fedge.edge.llm.group.cuts import Cut, Cuts
from fedge.edge.llm.group.device import listen as listen_for_ranks
from fedge.edge.llm.group.division import HOPED, Divide, Division, planned
from fedge.edge.llm.group.membership import Event, Member, Members, Phase
from fedge.edge.llm.group.messages import HEAD, PROTOCOL, Offer
from fedge.edge.llm.group.roster import Roster
from fedge.edge.llm.group.service import Ranks
from fedge.edge.llm.group.speeds import Speeds, speeds
from fedge.edge.llm.mesh import security
from fedge.edge.llm.mesh.collectives import INT8_SUMS, named
from fedge.edge.llm.mesh.control import serve
from fedge.edge.llm.mesh.mesh import Alone, Mesh, connect
from fedge.edge.llm.mesh.security import Ticket, Tls
from fedge.edge.llm.models.folder import Folder
from fedge.edge.llm.ranks.model import Model
from fedge.edge.llm.shards.planner import FLOAT_BYTES, kv_bytes
from fedge.edge.llm.shards.quant import KINDS, Kind
from fedge.edge.llm.shards.shard import open_shard
from fedge.edge.llm.shards.shares import Share
from fedge.edge.plan.link import Link
from fedge.protos import llm_pb2 as pb

log = logging.getLogger("fedge")
GAIN = 0.9  # a group is formed anew where a token is predicted to take this part of the time, or less
_KEY_BYTES = 32


class Group:
    """Serves workers at `address` from its making on, and forms groups of them.

    `store` is the folder for shards; `wanted` the devices beside the head that `form` waits for. `slots` sequences of
    `context` tokens. `memory_bytes` is the head's own (None: most of what is free). A `ticket` with a certificate, and
    its `key` (PEM), mean TLS, which `listen` needs off loopback; `data_port` is where ranks dial the head (0: any).
    `kernel`, `collective` and `speed` replace measurements, and `divide` the planner; "int8" is for sums of several
    tokens. `invariant`: what a sequence computes does not depend, to the bit, on the others of its pass. `watch` is
    asked while devices are waited for, and may raise. Raises AddressError, ExperimentError for settings that cannot
    work.
    """

    def __init__(
        self,
        folder: Folder,
        *,
        kind: Kind,
        store: Path,
        slots: int,
        context: int,
        listen: str = "127.0.0.1:0",
        ticket: Ticket | None = None,
        key: str = "",
        wanted: int = 0,
        memory_bytes: int | None = None,
        data_port: int = 0,
        kernel: str | None = None,
        collective: str | None = None,
        invariant: bool = False,
        speed: Speeds | None = None,
        divide: Divide = planned,
        watch: Callable[[], None] = lambda: None,
        limits: LlmLimits = LlmLimits(),
    ) -> None:
        if kind not in KINDS or not 0 < slots <= limits.max_slots or context < 1:
            raise ExperimentError(
                f"{kind} weights and {slots} slots of {context} tokens cannot be; choose one of {', '.join(KINDS)} "
                f"and at most {limits.max_slots} slots."
            )
        try:
            store.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ExperimentError(f"The folder {store} cannot be used ({error}); name another for shards.") from error
        self._folder, self._kind, self._limits, self._divide = folder, kind, limits, divide
        self._slots, self._context, self._kv_tokens = slots, context, slots * context
        self._wanted, self._watch, self._kernel, self._invariant = wanted, watch, kernel, invariant
        self._collective = _named(collective, invariant)
        known = speed or speeds(store)
        memory = spare_bytes() if memory_bytes is None else memory_bytes
        self._offer = Offer(HEAD, known.weights_per_s, memory, known.disk_bytes_per_s, known.layer_s)
        self._cuts = Cuts(folder, kind, store, limits)
        self._roster = Roster(limits)
        self._model: Model | None = None
        self._division: Division | None = None
        self._measurement: _Measurement | None = None
        self._epoch = 0
        self._forming = threading.Lock()  # held while a group is formed, and while the last one ends
        self._given_up = self._closed = False
        secure = bool(ticket and ticket.certificate)
        self._identity = security.identity() if secure else None
        host, _ = addresses.parse(listen)
        self._listener = listen_for_ranks(host.strip("[]") if is_local(host) else "", data_port)
        welcome = pb.Welcome(protocol=PROTOCOL)
        ranks = Ranks(self._roster, welcome, self._cuts.find, ticket, limits)
        try:
            self._listening = serve(
                ranks.handler(), listen, ticket, key, calls=2 * limits.max_ranks + 2, most_bytes=limits.max_report_bytes
            )
        except AddressError:
            self._listener.close()
            raise

    @property
    def address(self) -> str:
        """Where workers come."""
        return self._listening.address

    @property
    def epoch(self) -> int:
        """How many groups have been formed, or tried."""
        return self._epoch

    @property
    def names(self) -> tuple[str, ...]:
        """The devices of the present group, by rank."""
        return self._division.names if self._division else ()

    @property
    def sent_bytes(self) -> int:
        """What the head has sent to the other ranks of the present group."""
        model = self._model
        return model.sent_bytes if model else 0

    def devices(self) -> tuple[Member, ...]:
        """Who is there, beside the head."""
        return tuple(self._roster.members.values())

    def form(self, timeout_s: float) -> Model:
        """Wait `timeout_s` for the devices that are wanted, and form a group of those that the division takes.

        Once the links have been measured it may take fewer. Raises AddressError where too few come in time, ModelError
        where there is not the memory or a shard cannot be cut, RankLost where devices fail again and again.
        """
        if not self._roster.wait(self._complete, timeout_s):
            raise AddressError(
                f"{len(self._roster.members)} of {self._wanted} devices have come within {timeout_s:g} s; start "
                "`fedge llm join` on the others, or ask for fewer."
            )
        return self._measured()

    def recover(self) -> Model:
        """A group of those that are there now, or the head alone: after a rank was lost, or for a better one.

        The last model is closed. Who computed in it and has not noticed its end in time is left out: it may hang.
        Raises as `form`.
        """
        return self._measured()

    def better(self) -> bool:
        """Whether one of the group's devices is gone, or others that it does not use would make it faster."""
        now = self._division
        if now is None:
            return False
        if set(now.names[1:]) - set(membership.in_epoch(self._roster.members, self._epoch, Phase.RUNNING)):
            return True
        free = {one.name for one in self._roster.usable()}
        if not free - set(now.names):
            return False
        try:
            new = self._plan(self._everybody())
            if not set(new.names) - set(now.names):
                return False
            if new.token_s is None or now.token_s is None:
                return True
            present = self._plan([one for one in self._everybody() if one.name in now.names])
        except ModelError:
            return False
        return present.token_s is None or new.token_s < GAIN * present.token_s

    def improve(self) -> Model | None:
        """A model of a better group if there is one, else None: what an engine asks between requests.

        Raises as `form`.
        """
        return self._measured() if self.better() else None

    def give_up(self) -> None:
        """No group is formed any more: who forms one, in another thread, ends soon with an AddressError.

        The present group goes on. Never waits.
        """
        self._given_up = True

    def close(self) -> None:
        """End the group, dismiss all devices, stop serving. May be called twice.

        Who forms a group is waited for, within limits; beyond them it ends its own when it notices. Nothing is done at
        the end of the interpreter, when the other threads are gone, maybe with a lock, and the system takes all back.
        """
        if self._closed or sys.is_finalizing():
            return
        self._closed = True
        self.give_up()
        if self._forming.acquire(timeout=self._limits.step_timeout_s):
            self._end()
            self._forming.release()
        self._roster.close("The head has ended; the device waits for it.")
        self._listening.stop()
        self._listener.close()
        self._cuts.close()

    def __enter__(self) -> "Group":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # ---- epochs --------------------------------------------------------------------------------

    def _complete(self, members: Members) -> bool:
        """Whether as many devices have come as are wanted."""
        self._go_on()
        self._watch()
        return len(members) >= self._wanted

    def _measured(self) -> Model:
        """Form a group; where its links turn out too slow, once more without the devices that do not help."""
        with self._forming:
            due_at = time.monotonic() + self._limits.load_timeout_s
            model = self._formed(due_at)
            useless = set(self.names) - set(self._plan(self._everybody()).names)
            for name in useless:
                self._roster.rest(name, "The others are faster without it.", self._limits.useless_s)
            return self._formed(due_at) if useless else model

    def _go_on(self) -> None:
        """Raises AddressError once given up."""
        if self._given_up:
            raise AddressError("The group is about to end; start the model again.")

    def _formed(self, due_at: float) -> Model:
        """Try with whoever is usable until `due_at`; a device that fails rests, so that the next try differs."""
        for left in reversed(range(self._limits.form_tries)):
            self._end()
            try:
                model = self._attempt()
                self._go_on()  # or nobody would close it
                return model
            except RankLost as error:
                log.warning("Epoch %d has not come about: %s", self._epoch, error)
                self._blame(error)
                if not left or time.monotonic() > due_at:
                    self._end()
                    raise
            except BaseException:
                self._end()
                raise
        raise AssertionError("unreachable")

    def _attempt(self) -> Model:
        """One epoch, up to a mesh that stands."""
        self._go_on()
        self._epoch += 1
        offers, division = self._choose()
        self._division = division
        cuts = self._cuts.make(division.shares, self._go_on)
        key = secrets.token_bytes(_KEY_BYTES)
        members = self._roster.members
        workers = [members.get(name) for name in division.names[1:]]
        if None in workers:
            raise RankLost("A device has left before the group was formed.", 1 + workers.index(None))
        party = [one for one in workers if one is not None]
        self._order(party, division, cuts, key, {one.name: one.memory_bytes for one in offers})
        shard = open_shard(cuts[0].path, self._limits)
        budget = self._budget(self._offer.memory_bytes, division.shares[0])
        with contextlib.ExitStack() as opened:
            blocks = open_blocks(shard, budget, self._limits, self._kernel, invariant=self._invariant)
            opened.callback(blocks.close)
            self._go_on()
            mesh = self._meet(party, key)
            opened.callback(mesh.close)
            self._model = Model(shard, blocks, mesh, slots=self._slots, context=self._context, limits=self._limits)
            opened.pop_all()
        log.info("Epoch %d: %s", self._epoch, ", ".join(division.names))
        return self._model

    def _order(
        self, party: Sequence[Member], division: Division, cuts: Sequence[Cut], key: bytes, memory: dict[str, int]
    ) -> None:
        """Tell every worker what to load."""
        own = self._identity[0] if self._identity else ""
        peers = [pb.Peer(address=f":{self._listener.getsockname()[1]}", certificate=own)]
        peers += [pb.Peer(address=one.hello.address, certificate=one.hello.certificate) for one in party]
        for rank, member in enumerate(party, 1):
            load = pb.Load(
                epoch=self._epoch,
                rank=rank,
                peers=peers,
                digest=cuts[rank].digest,
                bytes=cuts[rank].bytes,
                key=key,
                slots=self._slots,
                context=self._context,
                memory_bytes=self._budget(memory[member.name], division.shares[rank]),
                collective=self._collective or "",
                invariant=self._invariant,
            )
            self._roster.order(member.name, Event.LOAD, self._epoch, pb.Order(load=load))

    def _meet(self, party: Sequence[Member], key: bytes) -> Mesh | Alone:
        """Wait until all are ready, tell them to start, and connect."""
        if not party:
            return Alone()
        names, epoch = [one.name for one in party], self._epoch
        self._wait(lambda members: _settled(members, names, epoch), self._limits.load_timeout_s)
        self._require_all(names)
        for name in names:
            self._roster.order(name, Event.START, epoch, pb.Order(start=pb.Start(epoch=epoch)))
        tls = None
        if self._identity:
            tls = Tls(*self._identity, (self._identity[0], *(one.hello.certificate for one in party)))
        where = ["", *(one.hello.address for one in party)]
        mesh = connect(
            0,
            len(where),
            where,
            key,
            epoch,
            listener=self._listener,
            limits=self._limits,
            tls=tls,
            collective=self._collective,
            exact_bytes=FLOAT_BYTES * self._folder.config.hidden,
        )
        self._roster.met(names)
        if mesh.speed is not None:
            link = Link(mesh.speed.bandwidth_bps, mesh.speed.round_trip_s)
            self._measurement = _Measurement(link, frozenset(names), time.monotonic())
        return mesh

    def _wait(self, condition: Callable[[Members], bool], timeout_s: float) -> None:
        """Until it is true of the members, at most so long. Raises AddressError once given up."""

        def met(members: Members) -> bool:
            self._go_on()
            return condition(members)

        self._roster.wait(met, timeout_s)

    def _require_all(self, names: Sequence[str]) -> None:
        """Raises RankLost naming a device that has failed to load, or else one that takes too long."""
        members = self._roster.members
        ready = membership.in_epoch(members, self._epoch, Phase.READY)
        loading = membership.in_epoch(members, self._epoch, Phase.LOADING)
        missing = [name for name in names if name not in ready]
        if missing:
            name = next((one for one in missing if one not in loading), missing[0])
            member = members.get(name)
            why = "it is gone" if member is None else member.detail or "it takes too long"
            raise RankLost(f"{name} has not loaded its shard ({why}).", 1 + names.index(name))

    def _end(self) -> None:
        """End the present epoch, and wait a moment until all that computed in it have noticed."""
        if self._model is not None:
            self._model.close()
            self._model = None
        self._division = None
        epoch = self._epoch
        self._roster.end(epoch, list(self._roster.members))
        self._roster.wait(lambda members: not membership.in_epoch(members, epoch, Phase.ENDING), self._limits.settle_s)

    def _blame(self, error: RankLost) -> None:
        """Leave out a device that could not be met, so that the next try goes without it."""
        names = self.names
        if 0 < error.rank < len(names):
            self._roster.fail(names[error.rank], str(error))

    def _everybody(self) -> list[Offer]:
        """The head, the devices of the present group, and those that are free."""
        free = {one.name for one in self._roster.usable()} | set(self.names)
        return [self._offer, *(one.hello.offer for one in self._roster.members.values() if one.name in free)]

    def _choose(self) -> tuple[list[Offer], Division]:
        """What is offered and who is taken; where the model cannot be held otherwise, also of devices that rest, and of
        those that have still to notice the end of the last group.
        """
        offers = [self._offer, *(one.hello.offer for one in self._roster.usable())]
        try:
            return offers, self._plan(offers)
        except ModelError:
            self._wait(_noticed, self._limits.connect_timeout_s)
            more = [self._offer, *(one.hello.offer for one in self._roster.usable(resting=True))]
            if len(more) == len(offers):
                raise
            return more, self._plan(more)

    def _plan(self, offers: Sequence[Offer]) -> Division:
        return self._divide(self._folder.config, self._kind, offers, self._link(), self._kv_tokens)

    def _link(self) -> Link:
        """As measured last, unless that is old or one of the devices is gone: then it may have been the slow one."""
        last = self._measurement
        if last is None or time.monotonic() - last.at > self._limits.useless_s:
            return HOPED
        return last.link if last.names <= set(self._roster.members) else HOPED

    def _budget(self, memory_bytes: int, share: Share) -> int:
        """Bytes for weights beside keys and values."""
        return max(1, memory_bytes - kv_bytes(self._folder.config, share, self._kv_tokens))


@dataclass(frozen=True, slots=True)
class _Measurement:
    """The slowest link between the head and the devices `names`; `at` is a time of time.monotonic."""

    link: Link
    names: frozenset[str]
    at: float


def _named(collective: str | None, invariant: bool) -> str | None:
    """Of four ranks and more, collectives add in different orders, so with `invariant` all sums are taken by one."""
    if invariant and collective == INT8_SUMS:
        raise ExperimentError("Sums in 8 bits depend on the tokens that share them; leave out int8, or invariant.")
    return named(collective or "full") if collective or invariant else None


def _noticed(members: Members) -> bool:
    """All know that their last group has ended."""
    return all(one.phase != Phase.ENDING for one in members.values())


def _settled(members: Members, names: Sequence[str], epoch: int) -> bool:
    """All are ready, or one cannot be."""
    there = membership.in_epoch(members, epoch, Phase.LOADING, Phase.READY)
    ready = membership.in_epoch(members, epoch, Phase.READY)
    return len(there) < len(names) or len(ready) == len(names)

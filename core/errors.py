"""Every error fedge raises on purpose, in two families: theirs (bad input) and ours (we failed).

    FedgeError
    +-- TheirFault            the caller or a peer sent something unusable; nothing else is affected
    |   +-- ExperimentError   the experiment file or a setting               exit 2
    |   +-- DataError         a data set that is missing, empty or malformed exit 3
    |   |   +-- TooLong       a prompt that leaves a language model no room for an answer
    |   +-- ModelError        a model that cannot be used, cut or loaded, or whose layout differs   exit 4
    |   +-- TrainerError      the user's training code raised or returned the wrong thing exit 5
    |   +-- RefusedUpdate     an update the screen turned away; one leaf per reason
    |   +-- RefusedClient     a client that may not join
    |   +-- RefusedTensor     a tensor on its way to the tail that does not fit the model served   exit 11
    +-- OurFault
        +-- AddressError      cannot listen on, or reach, an address          exit 6
        |   +-- Overloaded    the cloud has no room for one more request
        +-- RankLost          a rank of a language model died, fell silent or broke the protocol   exit 13
        +-- JournalError      the journal cannot be written or does not verify exit 7
        +-- StrategyError     a strategy plug-in broke its contract           exit 8

Owns what each leaf tells the outside: `reason` (a stable code: metric label, journal entry and heading in
docs/errors.md), `status` (the name of the gRPC status) and `exit_code`. Messages are one sentence with the remedy.
Must never import gRPC or format a stack trace for a peer.
"""

from typing import ClassVar


class FedgeError(Exception):
    """The root. Subclasses set `reason`, `status` (a gRPC status name) and `exit_code`."""

    reason: ClassVar[str] = "INTERNAL"
    status: ClassVar[str] = "INTERNAL"
    exit_code: ClassVar[int] = 1


class TheirFault(FedgeError):
    """The input is unusable; the sender can mend it."""

    reason = "INVALID"
    status = "INVALID_ARGUMENT"
    exit_code = 2


class OurFault(FedgeError):
    """fedge, a plug-in or the machine under it failed."""


class ExperimentError(TheirFault):
    """The experiment file, or an option, is wrong."""

    reason = "BAD_EXPERIMENT"


class DataError(TheirFault):
    """A data set is missing, empty or malformed."""

    reason = "BAD_DATA"
    status = "FAILED_PRECONDITION"
    exit_code = 3


class TooLong(DataError):
    """A prompt leaves no room for an answer in the context of a language model."""

    reason = "TOO_LONG"


class ModelError(TheirFault):
    """A model cannot be used, or its layout differs from the coordinator's."""

    reason = "BAD_MODEL"
    status = "FAILED_PRECONDITION"
    exit_code = 4


class CannotCut(ModelError):
    """The graph has no place, or not the wanted one, where it falls into a head and a tail."""

    reason = "CANNOT_CUT"


class BadBundle(ModelError):
    """A folder of a split model is incomplete, of another format, or not what its hashes promise."""

    reason = "BAD_BUNDLE"


class TrainerError(TheirFault):
    """The user's training code raised, or returned something that is no update."""

    reason = "TRAINER_FAILED"
    status = "ABORTED"
    exit_code = 5


class RefusedClient(TheirFault):
    """A client may not join (it was evicted, or its name is in use)."""

    reason = "CLIENT_REFUSED"
    status = "PERMISSION_DENIED"
    exit_code = 9


class NotJoined(RefusedClient):
    """A call by a client that has not joined, or has been taken for gone since; it joins again."""

    reason = "NOT_JOINED"
    status = "FAILED_PRECONDITION"


class StaleIncarnation(RefusedClient):
    """Another process has joined under this client's name since; this one must stop."""

    reason = "STALE_INCARNATION"
    status = "FAILED_PRECONDITION"


class RefusedTensor(TheirFault):
    """A tensor at a boundary has the wrong name, shape, type, size or coding; nothing was computed."""

    reason = "BAD_TENSOR"
    exit_code = 11


class OtherBundle(RefusedTensor):
    """The tensor comes from another version of the model than the one that is served."""

    reason = "OTHER_BUNDLE"
    status = "FAILED_PRECONDITION"


class RefusedUpdate(TheirFault):
    """An update that changes nothing; each leaf is one reason."""

    reason = "UPDATE_REFUSED"
    exit_code = 10


class UnknownTask(RefusedUpdate):
    """No such task was ever issued by this coordinator, or its record has been dropped since."""

    reason = "UNKNOWN_TASK"
    status = "NOT_FOUND"


class NotYourTask(RefusedUpdate):
    """The task was issued to another client."""

    reason = "NOT_YOUR_TASK"
    status = "PERMISSION_DENIED"


class TaskSpent(RefusedUpdate):
    """The task has ended (refused, failed or cancelled), so an update for it cannot count."""

    reason = "TASK_SPENT"
    status = "FAILED_PRECONDITION"


class TooStale(RefusedUpdate):
    """The update is older than the scheduler can use."""

    reason = "TOO_STALE"
    status = "FAILED_PRECONDITION"


class WrongSize(RefusedUpdate):
    """The upload is longer, or shorter, than it declared or than the limits allow."""

    reason = "WRONG_SIZE"
    status = "RESOURCE_EXHAUSTED"


class WrongOffset(RefusedUpdate):
    """A chunk does not begin where the last one ended."""

    reason = "WRONG_OFFSET"
    status = "OUT_OF_RANGE"


class WrongHash(RefusedUpdate):
    """The bytes do not have the declared SHA-256."""

    reason = "WRONG_HASH"
    status = "DATA_LOSS"


class WrongManifest(RefusedUpdate):
    """Names, shapes or types differ from the model's."""

    reason = "WRONG_MANIFEST"


class NotFinite(RefusedUpdate):
    """A value is NaN or infinite."""

    reason = "NOT_FINITE"


class NormTooLarge(RefusedUpdate):
    """The delta is longer than the limits allow."""

    reason = "NORM_TOO_LARGE"


class BadExamples(RefusedUpdate):
    """The count of examples is not a whole number within the limits."""

    reason = "BAD_EXAMPLES"


class BadReport(RefusedUpdate):
    """Steps, timings or metrics are out of range."""

    reason = "BAD_REPORT"


class AddressError(OurFault):
    """An address cannot be listened on, or not be reached."""

    reason = "ADDRESS"
    status = "UNAVAILABLE"
    exit_code = 6


class Overloaded(AddressError):
    """The queue of requests is full, or none of them would be answered in time."""

    reason = "OVERLOADED"
    status = "RESOURCE_EXHAUSTED"


class TooLate(OurFault):
    """No answer was to be had before the deadline."""

    reason = "TOO_LATE"
    status = "DEADLINE_EXCEEDED"
    exit_code = 12


class RankLost(OurFault):
    """A rank of a language model died, fell silent or broke the protocol; nothing of the step counts.

    `rank` is its number, -1 where it is not known.
    """

    reason = "RANK_LOST"
    status = "UNAVAILABLE"
    exit_code = 13

    def __init__(self, message: str, rank: int = -1) -> None:
        super().__init__(message)
        self.rank = rank


class JournalError(OurFault):
    """The journal cannot be written, or what it holds does not verify."""

    reason = "JOURNAL"
    status = "UNAVAILABLE"
    exit_code = 7


class StrategyError(OurFault):
    """A strategy plug-in raised, or returned what its contract does not allow."""

    reason = "STRATEGY"
    exit_code = 8


def leaves(root: type[FedgeError] = FedgeError) -> list[type[FedgeError]]:
    """All classes below `root`, depth first: what docs/errors.md must cover."""
    found: list[type[FedgeError]] = []
    for child in root.__subclasses__():
        found += [child, *leaves(child)]
    return found

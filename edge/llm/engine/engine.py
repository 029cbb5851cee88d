"""The head's loop: one thread that plans a pass, runs it, chooses tokens and hands them out, as long as there is work.

Owns the thread, the requests that are under way, and what happens when the model fails: ranks that were lost are
recovered and the sequences computed again, so that a stream goes on where it stood; any other failure ends the requests
it hit, with one sentence. Nobody waits for a thread that is dead. Must never decide what a pass holds (scheduler.py) or
which token follows (sampler.py).
"""

import logging
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Protocol

from fedge.core.errors import AddressError, DataError, ExperimentError, FedgeError, Overloaded, RankLost
from fedge.core.limits import LlmLimits
from fedge.core.params import Array
from fedge.edge.llm.engine.answer import Answer, Detokenizer
from fedge.edge.llm.engine.handle import Handle
from fedge.edge.llm.engine.requests import Finish, Piece, Request
from fedge.edge.llm.engine.scheduler import Scheduler, Want
from fedge.edge.llm.ranks.step import Step

log = logging.getLogger("fedge")

IDLE_S = 1.0  # how often an engine without requests asks for a better model
MAX_LOSSES = 3  # ranks lost while a request waits for one token; it may be the reason, and others wait for it


class Model(Protocol):
    """All ranks, as the head sees them."""

    def run(self, step: Step, tokens: Array, rows: Array | None, /) -> Array:
        """Logits [rows, vocab] float32 of those of the flattened `tokens` [step.tokens] that `rows` names, maybe none.

        Raises RankLost; then nothing of the step counts.
        """


class Tokenizer(Protocol):
    """What the engine needs of a tokenizer."""

    @property
    def eos(self) -> tuple[int, ...]:
        """The tokens that end an answer."""

    def stream(self) -> Detokenizer:
        """For one answer."""


@dataclass(slots=True)
class _Job:
    """A request between the user's thread and the engine's."""

    handle: Handle
    answer: Answer


@dataclass(slots=True)
class _Totals:
    """Counters since the start; written by the engine's thread only."""

    steps: int = 0
    step_tokens: int = 0
    prompt_tokens: int = 0
    generated_tokens: int = 0
    drafted_tokens: int = 0
    accepted_tokens: int = 0
    recoveries: int = 0
    busy_s: float = 0.0


@dataclass(slots=True)
class Mean:
    """Of times that are there: a request that ended before its first token has none (0)."""

    total_s: float = 0.0
    count: int = 0

    def add(self, seconds: float) -> None:
        """One more, or none."""
        self.total_s += seconds
        self.count += seconds > 0

    @property
    def value(self) -> float:
        """Seconds; 0 where there was none."""
        return self.total_s / max(1, self.count)


class Engine:
    """Answers requests over `slots` slots of `context` tokens each, `max_kv_tokens` together (None: all of them).

    `vocab` is the number of tokens the model knows. `recover` gives a model that works after ranks were lost; it may
    take long, and requests wait for it. Without it the same model is tried again, and the requests that ran end with
    an error. `between` is asked while there are no requests, and gives a model that is to be used from now on, or None.
    `give_up` is called by `close`, in its thread, and makes whichever of the two is under way raise soon.
    `speculate` lets greedy requests guess tokens (lookup.py); answers are the same as far as the model's
    arithmetic does not depend on who shares a pass. The models stay the caller's to close.
    Raises ExperimentError for sizes that cannot work.
    """

    def __init__(
        self,
        model: Model,
        tokenizer: Tokenizer | None = None,
        *,
        vocab: int,
        slots: int,
        context: int,
        max_kv_tokens: int | None = None,
        limits: LlmLimits | None = None,
        speculate: bool = True,
        recover: Callable[[], Model] | None = None,
        between: Callable[[], Model | None] | None = None,
        give_up: Callable[[], None] = lambda: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._limits = limits or LlmLimits()
        if slots > self._limits.max_slots:
            raise ExperimentError(f"{slots} slots are more than the limit of {self._limits.max_slots}; ask for fewer.")
        self._model, self._tokenizer, self._vocab = model, tokenizer, vocab
        self._recover, self._between, self._give_up = recover, between, give_up
        self._clock, self._speculate = clock, speculate
        self._scheduler = Scheduler(
            slots, context, self._limits.max_step_tokens, self._limits.chunk_tokens, max_kv_tokens
        )
        self._totals = _Totals()
        self._broken = False  # the model failed and has not been recovered
        self._answers: dict[int, Answer] = {}  # the engine's thread's own
        # Below: shared, under the lock of `_wake`.
        self._wake = threading.Condition()
        self._handles: dict[int, Handle] = {}
        self._inbox: list[_Job] = []
        self._cancelled: list[int] = []
        self._finished: Counter[str] = Counter()
        self._ttft_s, self._tpot_s = Mean(), Mean()
        self._keys = 0
        self._closed = False
        self._thread = threading.Thread(target=self._loop, name="fedge-llm-engine", daemon=True)
        self._thread.start()

    def submit(self, request: Request, on_piece: Callable[[Piece], None] | None = None) -> Handle:
        """Let a request wait for its turn; from any thread. `on_piece`: see Handle.

        Raises DataError for a prompt that does not fit, Overloaded where too many wait, AddressError after `close`.
        """
        came_at = self._clock()
        wanted = self._limits.max_new_tokens if request.max_tokens is None else request.max_tokens
        new_tokens = self._scheduler.new_tokens(len(request.tokens), wanted)
        if not all(0 <= token < self._vocab for token in request.tokens):
            raise DataError(f"A token of the prompt is none of the model's {self._vocab}; use the model's tokenizer.")
        stop_tokens = request.stop_tokens
        if stop_tokens is None:
            stop_tokens = self._tokenizer.eos if self._tokenizer else ()
        stream = self._tokenizer.stream() if self._tokenizer else None
        answer = Answer(request, new_tokens, stop_tokens, stream, came_at)
        with self._wake:
            if self._closed:
                raise AddressError("The engine has been closed; start it again.")
            if len(self._handles) >= self._limits.max_requests:
                raise Overloaded(f"{len(self._handles)} requests wait or run already; ask again later.")
            self._keys += 1
            handle = Handle(self._keys, answer.usage, self._cancel, on_piece)
            self._handles[handle.key] = handle
            self._inbox.append(_Job(handle, answer))
            self._wake.notify_all()
        return handle

    def requests(self) -> tuple[int, int]:
        """How many run, and how many wait."""
        with self._wake:
            handles = len(self._handles)
        running = len(self._scheduler.running)
        return running, max(0, handles - running)

    def close(self) -> None:
        """End all requests as cancelled, and the thread. A pass that is under way is waited for, within limits."""
        with self._wake:
            self._closed = True
            self._wake.notify_all()
        self._give_up()
        if threading.current_thread() is not self._thread:
            self._thread.join(self._limits.step_timeout_s)
        self._end(list(self._handles), "cancelled")

    def stats(self) -> dict[str, float]:
        """Counters since the start, gauges of this moment, and means of requests that have such a time; in seconds."""
        totals, scheduler = self._totals, self._scheduler
        with self._wake:
            finished = dict(self._finished)
            means = {"mean_ttft_s": self._ttft_s.value, "mean_tpot_s": self._tpot_s.value}
        running, waiting = self.requests()
        return {
            "running": running,
            "waiting": waiting,
            **{f"finished_{name}": finished.get(name, 0) for name in ("stop", "length", "cancelled", "error")},
            "steps": totals.steps,
            "step_tokens": totals.step_tokens,
            "prompt_tokens": totals.prompt_tokens,
            "generated_tokens": totals.generated_tokens,
            "tokens_per_s": totals.generated_tokens / totals.busy_s if totals.busy_s else 0.0,
            "reused_tokens": scheduler.reused_tokens,
            "copied_tokens": scheduler.copied_tokens,
            "drafted_tokens": totals.drafted_tokens,
            "accepted_tokens": totals.accepted_tokens,
            "kv_tokens": scheduler.kv_tokens,
            "recoveries": totals.recoveries,
            "busy_s": totals.busy_s,
            **means,
        }

    def _cancel(self, key: int) -> None:
        with self._wake:
            if key in self._handles:
                self._cancelled.append(key)
                self._wake.notify_all()

    def _loop(self) -> None:
        while self._wait():
            try:
                self._take_in()
                if self._answers and (not self._broken or self._mend()):
                    self._pass()
            except Exception as error:  # a mistake of ours must not leave anybody waiting
                log.exception("The engine failed; the requests that wait or run end with an error")
                self._scheduler.forget()
                self._fail(list(self._handles), error)
        self._end(list(self._handles), "cancelled")

    def _wait(self) -> bool:
        """Until there is work; False once the engine is closed."""
        while True:
            with self._wake:
                idle_s = IDLE_S if self._between else None
                if self._wake.wait_for(
                    lambda: self._closed or self._inbox or self._cancelled or self._answers, timeout=idle_s
                ):
                    return not self._closed
            self._look_around()

    def _look_around(self) -> None:
        """Between requests: another model, if there is a better one. A failed change is mended by the next request."""
        if self._between is None:
            return
        try:
            model = self._between()
        except Exception as error:
            log.warning("The model could not be changed: %s", error)
            self._broken = True
            return
        if model is not None:
            self._model, self._broken = model, False
            self._scheduler.forget()

    def _take_in(self) -> None:
        """What users have asked for since the last pass."""
        with self._wake:
            jobs, self._inbox = [job for job in self._inbox if job.handle.key in self._handles], []
            cancelled, self._cancelled = self._cancelled, []
        for job in jobs:
            drafts = self._speculate and job.answer.request.sampling.greedy
            self._scheduler.add(job.handle.key, job.answer.request.tokens, job.answer.new_tokens, drafts=drafts)
            self._answers[job.handle.key] = job.answer
            self._totals.prompt_tokens += len(job.answer.request.tokens)
        self._end(cancelled, "cancelled")

    def _pass(self) -> None:
        """One pass through the model, and what comes of it."""
        started = self._clock()
        plan = self._scheduler.plan()
        if plan is None:
            raise RuntimeError("requests wait, and none can run")
        try:
            logits = self._model.run(plan.step, plan.tokens, plan.rows)
        except Exception as error:  # a model may fail in ways nobody has thought of
            self._lose(error)
            return
        now = self._clock()
        self._totals.steps += 1
        self._totals.step_tokens += plan.step.tokens
        self._totals.drafted_tokens += sum(len(want.draft) for want in plan.wants)
        for want in plan.wants:
            self._advance(want, logits[want.row : want.row + 1 + len(want.draft)], now)
        self._totals.busy_s += self._clock() - started

    def _advance(self, want: Want, logits: Array, now: float) -> None:
        """The next tokens of one request: one, and one more for each token of the draft that proves right."""
        answer = self._answers.get(want.key)
        if answer is None:  # closed meanwhile, by a receiver of pieces
            return
        pieces: list[Piece] = []
        try:
            reused = self._scheduler.reused(want.key)
            for row, guess in zip(logits, (*want.draft, None), strict=True):
                pieces.append(answer.next(row, now, reused))
                if pieces[-1].finish or pieces[-1].token != guess:
                    break
        except Exception as error:
            log.warning("Request %d ends: %s", want.key, error)
            pieces.append(failure(error))
        tokens = [piece.token for piece in pieces if piece.token is not None]
        self._totals.generated_tokens += len(tokens)
        self._totals.accepted_tokens += max(0, len(tokens) - 1)
        if tokens:
            self._scheduler.accept(want, tokens)
        for piece in pieces:
            self._hand_out(want.key, piece)

    def _hand_out(self, key: int, piece: Piece) -> None:
        with self._wake:
            handle = self._handles.get(key)
        if handle is None:  # closed meanwhile
            return
        handle.usage = self._answers[key].usage
        if piece.finish is None:
            handle.deliver(piece)
        else:
            self._finish(key, piece)

    def _lose(self, error: Exception) -> None:
        """The model failed: nothing of the pass counts, and no slot is known to hold anything."""
        self._broken = True
        self._scheduler.forget()
        running = list(self._scheduler.running)
        if isinstance(error, RankLost) and self._recover is not None:
            log.warning("A rank was lost (%s); %d sequences are computed again", error, len(running))
            for key in running:
                self._answers[key].losses += 1
            running = [key for key in running if self._answers[key].losses > MAX_LOSSES]
        else:
            log.error("The model failed; the requests that ran end with an error", exc_info=error)
        self._fail(running, error)

    def _mend(self) -> bool:
        """A model that works again, if there is one; otherwise all requests end, and the next one tries again."""
        try:
            if self._recover is not None:
                self._model = self._recover()
                self._totals.recoveries += 1
        except Exception as error:
            if self._closed:  # it was given up, and all end as cancelled
                return False
            log.warning("The model could not be recovered: %s", error)
            last = replace(failure(error), cause=RankLost)  # whatever hindered it, devices may come back
            for key in list(self._answers):
                self._finish(key, last)
            return False
        self._broken = False
        return True

    def _end(self, keys: Iterable[int], finish: Finish) -> None:
        for key in keys:
            self._finish(key, Piece(None, finish=finish))

    def _fail(self, keys: Iterable[int], error: Exception) -> None:
        for key in keys:
            self._finish(key, failure(error))

    def _finish(self, key: int, piece: Piece) -> None:
        """Forget a request, then tell its user: who knows of the end may send the next one at once."""
        if threading.current_thread() is self._thread:
            self._scheduler.end(key)
            self._answers.pop(key, None)
        with self._wake:
            handle = self._handles.pop(key, None)
            if handle is None:
                return
            self._finished[str(piece.finish)] += 1
            self._ttft_s.add(handle.usage.ttft_s)
            self._tpot_s.add(handle.usage.tpot_s)
        handle.deliver(piece)


def failure(error: Exception) -> Piece:
    """The last piece of a request that failed: fedge's own sentence, and of anything else its kind."""
    known = isinstance(error, FedgeError)
    sentence = str(error) if known else f"The model failed ({type(error).__name__}); try again."
    return Piece(None, finish="error", error=sentence, cause=type(error))

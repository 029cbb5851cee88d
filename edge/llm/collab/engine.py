"""Requests to a device and its cloud, one after the other: the same face as fedge.edge.llm.engine.engine.Engine.

Owns the thread, the queue, and the sums over requests. Whatever fails ends the request it hit, with one sentence. Must
never decide where a token comes from (decoder.py).
"""

import contextlib
import logging
import secrets
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from fedge.core.errors import AddressError, DataError, FedgeError, Overloaded
from fedge.core.limits import LlmLimits
from fedge.core.params import Array
from fedge.edge.llm.collab.decoder import Decoder, Summary, Token
from fedge.edge.llm.engine.answer import Answer
from fedge.edge.llm.engine.engine import Mean, Tokenizer, failure
from fedge.edge.llm.engine.handle import Handle
from fedge.edge.llm.engine.requests import Piece, Request, new_tokens
from fedge.edge.llm.engine.sampler import Sampling

log = logging.getLogger("fedge")

_CHOSEN = Sampling(temperature=0.0)


@dataclass(slots=True)
class _Job:
    """A request. `answer` turns its tokens into text; `sampling` has a seed."""

    handle: Handle
    answer: Answer
    sampling: Sampling


class Engine:
    """Answers by `decoder`, which stays the caller's. `watch` is told every token, and a summary at each end, under
    the key of the request's handle, on the engine's thread.
    """

    def __init__(
        self,
        decoder: Decoder,
        tokenizer: Tokenizer | None,
        *,
        limits: LlmLimits = LlmLimits(),
        watch: Callable[[int, Token | Summary], None] = lambda *_: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._decoder, self._tokenizer, self._limits = decoder, tokenizer, limits
        self._watch, self._clock = watch, clock
        self._one_hot: Array = np.zeros(decoder.vocab, np.float32)
        # Below: shared, under the lock of `_wake`.
        self._wake = threading.Condition()
        self._waiting: list[_Job] = []
        self._running: _Job | None = None
        self._cancelled: set[int] = set()
        self._finished: Counter[str] = Counter()
        self._sums: Counter[str] = Counter()
        self._times: dict[str, float] = {"busy_s": 0.0, "cloud_wait_s": 0.0}
        self._ttft_s, self._tpot_s = Mean(), Mean()
        self._keys = 0
        self._closed = False
        self._thread = threading.Thread(target=self._loop, name="fedge-llm-collab", daemon=True)
        self._thread.start()

    def submit(self, request: Request, on_piece: Callable[[Piece], None] | None = None) -> Handle:
        """Let a request wait for its turn; from any thread. `on_piece`: see Handle.

        Raises DataError for a prompt that does not fit and for what a cloud cannot tell (log-probabilities,
        penalties), Overloaded where too many wait, AddressError after `close`.
        """
        came_at = self._clock()
        wanted = self._limits.max_new_tokens if request.max_tokens is None else request.max_tokens
        room = new_tokens(len(request.tokens), wanted, self._decoder.context)
        self._decoder.check(request.sampling)
        if request.top_logprobs is not None:
            raise DataError("The cloud tells tokens alone, no log-probabilities; ask without them.")
        if not all(0 <= token < self._decoder.vocab for token in request.tokens):
            raise DataError(f"A token is none of the model's {self._decoder.vocab}; use the model's tokenizer.")
        stops = request.stop_tokens
        if stops is None:
            stops = self._tokenizer.eos if self._tokenizer else ()
        stream = self._tokenizer.stream() if self._tokenizer else None
        chosen = replace(request, sampling=_CHOSEN)
        answer = Answer(chosen, room, stops, stream, came_at)
        seed = secrets.randbits(63) if request.sampling.seed is None else request.sampling.seed
        with self._wake:
            if self._closed:
                raise AddressError("The engine has been closed; start it again.")
            if len(self._waiting) >= self._limits.max_requests:
                raise Overloaded(f"{len(self._waiting)} requests wait already; ask again later.")
            self._keys += 1
            handle = Handle(self._keys, answer.usage, self._cancel, on_piece)
            self._waiting.append(_Job(handle, answer, replace(request.sampling, seed=seed)))
            self._wake.notify_all()
        return handle

    def requests(self) -> tuple[int, int]:
        """How many run, and how many wait."""
        with self._wake:
            return int(self._running is not None), len(self._waiting)

    def close(self) -> None:
        """End all requests as cancelled, and the thread: a question to the cloud that is under way is waited for, and a
        pass, within limits. Then the decoder's parts may be closed.
        """
        with self._wake:
            self._closed = True
            self._wake.notify_all()
        if threading.current_thread() is not self._thread:
            self._thread.join(self._limits.max_deadline_s + self._limits.step_timeout_s)

    def stats(self) -> dict[str, float]:
        """Counters since the start, gauges of this moment, and means of requests that have such a time; in seconds."""
        with self._wake:
            times, finished, sums = dict(self._times), dict(self._finished), dict(self._sums)
            means = {"mean_ttft_s": self._ttft_s.value, "mean_tpot_s": self._tpot_s.value}
            running, waiting = self.requests()
        return {
            "running": running,
            "waiting": waiting,
            **{f"finished_{name}": finished.get(name, 0) for name in ("stop", "length", "cancelled", "error")},
            "tokens_per_s": sums.get("generated_tokens", 0) / times["busy_s"] if times["busy_s"] else 0.0,
            "busy_s": times["busy_s"],
            "cloud_wait_s": times["cloud_wait_s"],
            "cloud_up": int(self._decoder.cloud_usable),
            **means,
            **sums,
        }

    def _cancel(self, key: int) -> None:
        with self._wake:
            self._cancelled.add(key)
            self._wake.notify_all()

    def _loop(self) -> None:
        while True:
            with self._wake:
                self._wake.wait_for(lambda: self._closed or self._waiting or self._cancelled)
            self._drop()
            with self._wake:
                if self._closed:
                    return
                self._running = self._waiting.pop(0) if self._waiting else None
            if self._running:
                self._serve(self._running)

    def _drop(self) -> None:
        """End those of the requests in the queue that nobody wants any more."""
        with self._wake:
            gone = [job for job in self._waiting if self._closed or job.handle.key in self._cancelled]
            self._waiting = [job for job in self._waiting if job not in gone]
            self._cancelled &= {self._running.handle.key} if self._running else set()
        for job in gone:
            self._finish(job, Piece(None, finish="cancelled"))

    def _wanted(self, job: _Job) -> bool:
        """Whether the request that runs shall go on. Those in the queue that shall not are ended meanwhile."""
        self._drop()
        with self._wake:
            return not self._closed and job.handle.key not in self._cancelled

    def _serve(self, job: _Job) -> None:
        began_at = self._clock()
        try:
            last = self._answer(job)
        except Exception as error:  # a mistake of ours must not leave anybody waiting
            if not isinstance(error, FedgeError):
                log.exception("A request failed")
            last = failure(error)
        summary = self._decoder.summary
        self._count(job, summary, self._clock() - began_at)
        self._watch_safely(job, summary)
        self._finish(job, last)

    def _answer(self, job: _Job) -> Piece:
        """Hand out all pieces but the last, which is returned."""
        answer, asked = job.answer, job.answer.request
        tokens = self._decoder.run(
            asked.tokens, job.sampling, answer.new_tokens, answer.stop_tokens, lambda: self._wanted(job)
        )
        with contextlib.closing(tokens):
            for token in tokens:
                self._watch_safely(job, token)
                piece = self._piece(answer, token.id)
                job.handle.usage = answer.usage
                if piece.finish:
                    return piece
                job.handle.deliver(piece)
                if not self._wanted(job):
                    break
        return Piece(None, finish="cancelled")

    def _piece(self, answer: Answer, token: int) -> Piece:
        """The token is chosen already: logits leave no other."""
        self._one_hot[token] = 1.0
        try:
            return answer.next(self._one_hot, self._clock(), 0)
        finally:
            self._one_hot[token] = 0.0

    def _watch_safely(self, job: _Job, what: Token | Summary) -> None:
        try:
            self._watch(job.handle.key, what)
        except Exception:
            log.exception("Who watches the tokens raised; the answer goes on")

    def _count(self, job: _Job, summary: Summary, took_s: float) -> None:
        with self._wake:
            self._times["busy_s"] += took_s
            self._times["cloud_wait_s"] += summary.cloud_wait_s
            self._ttft_s.add(job.answer.usage.ttft_s)
            self._tpot_s.add(job.answer.usage.tpot_s)
            self._sums.update(
                prompt_tokens=len(job.answer.request.tokens),
                generated_tokens=summary.tokens.total(),
                drafted_tokens=summary.guesses,
                accepted_tokens=summary.tokens["draft"],
                cloud_requests=summary.cloud_requests,
                cloud_failures=summary.cloud_failures,
                sent_bytes=summary.sent_bytes,
                received_bytes=summary.received_bytes,
            )
            self._sums.update({f'tokens{{by="{label}"}}': count for label, count in summary.tokens.items()})

    def _finish(self, job: _Job, piece: Piece) -> None:
        """Forget a request, then tell its user: who knows of the end may send the next one at once."""
        with self._wake:
            if self._running is job:
                self._running = None
            self._cancelled.discard(job.handle.key)
            self._finished[str(piece.finish)] += 1
        job.handle.deliver(piece)

"""Many requests at once: a bounded number under way, each tried several times, within a budget, every outcome committed.

Workers take leased requests, ask, and go on when the answer is on the disk; one writer commits what they bring, many outcomes a
transaction, and renews the leases. A process that is killed has lost no more answers than were under way.
A fault that no retry mends, an empty purse and Ctrl-C stop it alike: nothing new is sent, what is under way is kept.
"""

import asyncio
import random
import signal
import threading
import time
from collections import deque
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field, replace
from types import FrameType
from typing import Any, TypeVar

from gadjax.errors import UserError
from gadjax.teachers.cache import TeacherCache
from gadjax.teachers.config import TeacherConfig
from gadjax.teachers.replies import Retry, most_prompt_tokens
from gadjax.teachers.requests import Outcome, Request

OnProgress = Callable[[int, int], None]  # answers that are there, answers that are wanted
Result = TypeVar("Result")

LONGEST_WAIT = 60.0  # seconds that the growing wait between tries grows to
LEASE = 64  # requests leased at once: as many wait for another collector, at most, when this one is killed
HELD_SECONDS = 0.5  # between looks at what another collector has leased, or at money that is set aside
FAILURES_IN_A_ROW = 32  # so many and the endpoint counts as broken


def run_to_its_end(work: Coroutine[Any, Any, None]) -> None:
    """`asyncio.run`, in which SIGTERM lets the work keep what is under way, as Ctrl-C does.

    Where Ctrl-C interrupts, the command line's handler of SIGTERM calls what asyncio installs for it. A shell's background job
    ignores Ctrl-C, and asyncio installs nothing: here SIGTERM cancels the work itself, and the handler that was there is called after.
    """
    main_thread = threading.current_thread() is threading.main_thread()
    handler = signal.getsignal(signal.SIGTERM)
    if not main_thread or not callable(handler) or signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
        asyncio.run(work)
        return
    try:
        asyncio.run(_ended_by_sigterm(work))
    except asyncio.CancelledError:
        handler(signal.SIGTERM, None)
        raise KeyboardInterrupt from None


async def _ended_by_sigterm(work: Coroutine[Any, Any, None]) -> None:
    """The first SIGTERM cancels the work, which may take its time to end; the second one does not wait."""
    loop, task, before, came = asyncio.get_running_loop(), asyncio.current_task(), signal.getsignal(signal.SIGTERM), list[int]()

    def cancel(number: int, frame: FrameType | None) -> None:
        came.append(number)
        if len(came) > 1 or task is None:
            raise KeyboardInterrupt
        task.cancel()
        loop.call_soon_threadsafe(lambda: None)  # which wakes the loop

    signal.signal(signal.SIGTERM, cancel)
    try:
        await work
    finally:
        signal.signal(signal.SIGTERM, before)


class Pace:
    """When the next request may be sent, by limits on requests and on tokens a minute; evenly, without bursts.

    A request takes its turn with the most tokens that it may have; those that it did not have are given back.

    Attributes:
        limited: whether there is a limit.
        next: the times from which the next request, and the next token, may be sent.
    """

    def __init__(self, requests_per_minute: float | None, tokens_per_minute: float | None):
        self._between = 60.0 / requests_per_minute if requests_per_minute else 0.0
        self._a_token = 60.0 / tokens_per_minute if tokens_per_minute else 0.0
        self.limited = bool(self._between or self._a_token)
        self.next = (0.0, 0.0)  # in the caller's time

    def take(self, now: float, tokens: int) -> float:
        """Takes a turn; returns the time of it."""
        turn = max(now, *self.next)
        request, token = self.next
        self.next = (turn + self._between if self._between else request, turn + tokens * self._a_token if self._a_token else token)
        return turn

    def give_back(self, tokens: int) -> None:
        """Takes back the share of a turn that was not used."""
        request, token = self.next
        self.next = (request, token - tokens * self._a_token)


class Dispatcher:
    """Brings requests to their outcomes.

    Args:
        ask: sends one request. Raises Retry where another try may help, UserError where none of all requests can succeed.
        worst_cost: the most that a request can cost, in US dollars.
    """

    def __init__(
        self,
        ask: Callable[[Request], Awaitable[Outcome]],
        worst_cost: Callable[[Request], float],
        config: TeacherConfig,
        cache: TeacherCache,
        on_progress: OnProgress,
    ):
        self._ask, self._worst_cost, self._config, self._cache, self._on_progress = ask, worst_cost, config, cache, on_progress
        self._pace = Pace(config.requests_per_minute, config.tokens_per_minute)
        self._leased: deque[Request] = deque()
        self._leasing = asyncio.Lock()
        self._outcomes: asyncio.Queue[_Kept | None] = asyncio.Queue()
        self._waiting = set[_Kept]()
        self._broken = False  # the cache cannot be written to
        self._stop = asyncio.Event()
        self._fault: UserError | None = None
        self._quiet_until = 0.0  # monotonic time before which the endpoint wants no request
        self._answers = 0  # outcomes that came of a reply
        self._failures = 0
        self._thread = ThreadPoolExecutor(1)  # where all of the cache's waiting for the disk is done

    async def run(self, requests: Sequence[Request], done: int = 0) -> None:
        """Asks for every request that is pending in the cache.

        Args:
            requests: rows of the cache; those that another collector holds are waited for.
            done: answers that are there already, for the progress.

        Raises:
            UserError: it was stopped by a fault or the budget.
        """
        self._open, self._done, self._total = deque(requests), done, done + len(requests)
        self._endpoint = f"{requests[0].provider} {requests[0].model}" if requests else ""
        tasks = [asyncio.create_task(self._work_all()), asyncio.create_task(self._write_all())]
        try:
            await asyncio.wait(tasks)
        finally:  # also at Ctrl-C, which cancels the wait but not the tasks; a second Ctrl-C leaves at once
            self._stop.set()
            await asyncio.wait(tasks)
            await self._in_thread(self._cache.release)
            self._thread.shutdown()
        for task in tasks:
            task.result()
        if self._fault:
            raise self._fault

    # --- asking ------------------------------------------------------------------------------------------------------

    async def _work_all(self) -> None:
        try:
            async with asyncio.TaskGroup() as workers:
                for _ in range(self._config.concurrency):
                    workers.create_task(self._work())
        finally:
            self._outcomes.put_nowait(None)

    async def _work(self) -> None:
        while request := await self._next():
            if outcome := await self._outcome(request):
                self._watch(outcome)
                await self._keep(_Kept(request, outcome))

    async def _keep(self, kept: "_Kept") -> None:
        """Waits until it is on the disk, or known that nothing can be kept."""
        if not self._broken:
            self._waiting.add(kept)
            self._outcomes.put_nowait(kept)
            await kept.done.wait()

    async def _next(self) -> Request | None:
        """A request that is leased to us; None when there is nothing more to ask."""
        async with self._leasing:
            while not self._leased and self._open and not self._stop.is_set():
                chunk = [self._open.popleft() for _ in range(min(LEASE, len(self._open)))]
                costs = {request.key: self._worst_cost(request) for request in chunk}
                lease = await self._in_thread(self._cache.lease, costs, self._config.max_cost)
                self._leased.extend(request for request in chunk if request.key in lease.taken)
                waits = lease.held | lease.dear
                self._open.extend(request for request in chunk if request.key in waits)
                self._advance(len(chunk) - len(lease.taken) - len(waits))  # what another collector has finished
                if lease.dear and not lease.reserved:
                    await self._halt_for_money()
                elif not lease.taken:
                    await self._pause(HELD_SECONDS if waits else 0.0)
            return self._leased.popleft() if self._leased and not self._stop.is_set() else None

    async def _halt_for_money(self, paid: float = 0.0) -> None:
        spent, limit = paid + await self._in_thread(self._cache.cost), self._config.max_cost
        what = f"{spent:.2f} of {limit:.2f} dollars are spent and the next answer might exceed them"
        self._halt(UserError("teacher.max_cost", what, "raise it and run the same command again: what is collected is kept"))

    async def _outcome(self, request: Request) -> Outcome | None:
        """The outcome, with what all tries may have cost; None where it is stopped before one did."""
        worst, paid, tries, reason = self._worst_cost(request), 0.0, 0, ""
        answers = self._answers
        while tries < self._config.tries and await self._may_send(request, paid, worst):
            try:
                outcome = await self._send(request)
                self._answers += 1
                return replace(outcome, cost=outcome.cost + paid)
            except UserError as fault:
                self._halt(fault)
                break
            except Retry as retry:
                reason, paid = str(retry), paid + worst * retry.billed
                tries += not (retry.limited and self._answers > answers)  # a limit that lets others through is no failure
                answers = self._answers
                if retry.wait:  # it is everybody's
                    self._quiet_until = max(self._quiet_until, time.monotonic() + retry.wait)
            if tries < self._config.tries:
                await self._pause(min(self._config.retry_wait * 2 ** max(tries - 1, 0), LONGEST_WAIT) * random.uniform(0.5, 1.0))
        stopped = tries < self._config.tries
        return None if stopped and not paid else Outcome("failed", cost=paid, error=reason)

    async def _may_send(self, request: Request, paid: float, worst: float) -> bool:
        """Waits for the request's turn. False: it is stopped, or the money is too short for another try."""
        while (quiet := self._quiet_until - time.monotonic()) > 0 and not self._stop.is_set():
            await self._pause(quiet + random.uniform(0.0, self._config.retry_wait))  # not all at once
        if self._pace.limited:
            await self._pause(await self._in_thread(self._take_turn, self._most_tokens(request)))
        if paid and not self._stop.is_set():
            if not await self._in_thread(self._cache.reserve, request.key, paid + worst, self._config.max_cost):
                await self._halt_for_money(paid)
        return not self._stop.is_set()

    async def _send(self, request: Request) -> Outcome:
        """Sends it once."""
        most, used = self._most_tokens(request), 0
        try:
            outcome = await self._ask(request)
            used = outcome.prompt_tokens + outcome.completion_tokens or most
        except Retry as retry:
            used = most if retry.billed else 0
            raise
        finally:
            if self._pace.limited:
                await self._in_thread(self._give_back, most - used)
        return outcome

    def _take_turn(self, tokens: int) -> float:
        """Takes a turn among all who collect from this endpoint with this cache; returns the seconds until then."""
        with self._cache.shared(self._endpoint) as kept:
            now = time.time()  # which they have in common
            if kept.get("now", 0.0) > now:
                kept.clear()  # the clock has gone back
            self._pace.next = (kept.get("request", 0.0), kept.get("token", 0.0))
            turn = self._pace.take(now, tokens)
            kept["now"], (kept["request"], kept["token"]) = now, self._pace.next
        return turn - now

    def _give_back(self, tokens: int) -> None:
        with self._cache.shared(self._endpoint) as kept:
            self._pace.next = (kept.get("request", 0.0), kept.get("token", 0.0))
            self._pace.give_back(tokens)
            kept["request"], kept["token"] = self._pace.next

    def _most_tokens(self, request: Request) -> int:
        return most_prompt_tokens(request) + int(request.parameters["max_tokens"])

    def _watch(self, outcome: Outcome) -> None:
        """Stops a collection that only fails."""
        self._failures = self._failures + 1 if outcome.state == "failed" else 0
        if self._failures == FAILURES_IN_A_ROW:
            what = f"{self._failures} requests in a row failed, the last with: {outcome.error}"
            self._halt(UserError("teacher", what, "mend the cause and run the same command again: what is collected is kept"))

    def _halt(self, fault: UserError) -> None:
        self._fault = self._fault or fault
        self._stop.set()

    async def _pause(self, seconds: float) -> None:
        """Sleeps, or until it is stopped."""
        if seconds > 0:
            with suppress(TimeoutError):
                await asyncio.wait_for(self._stop.wait(), seconds)

    # --- writing -----------------------------------------------------------------------------------------------------

    async def _write_all(self) -> None:
        renewed, more = time.monotonic(), True
        try:
            while more:
                more = await self._write(await self._gather())
                if time.monotonic() - renewed > self._cache.lease_seconds / 4:
                    await self._in_thread(self._cache.renew)
                    renewed = time.monotonic()
        except BaseException:
            self._stop.set()  # nothing is asked that cannot be kept
            self._broken = True
            for kept in self._waiting:
                kept.done.set()
            raise

    async def _gather(self) -> list["_Kept | None"]:
        """The outcomes that are there; none where there are none in time to renew the leases."""
        try:
            batch = [await asyncio.wait_for(self._outcomes.get(), self._cache.lease_seconds / 4)]
        except TimeoutError:
            return []
        while not self._outcomes.empty():
            batch.append(self._outcomes.get_nowait())
        return batch

    async def _write(self, batch: list["_Kept | None"]) -> bool:
        """Commits a batch. False: it was the last."""
        outcomes = [each for each in batch if each is not None]
        if outcomes:
            await self._in_thread(self._cache.record, [(each.request, each.outcome) for each in outcomes])
            self._advance(len(outcomes))
        for each in outcomes:
            self._waiting.remove(each)
            each.done.set()
        return len(outcomes) == len(batch)

    def _advance(self, done: int) -> None:
        if done:
            self._done += done
            self._on_progress(self._done, self._total)

    async def _in_thread(self, call: Callable[..., Result], *args: object) -> Result:
        return await asyncio.get_running_loop().run_in_executor(self._thread, call, *args)


@dataclass(eq=False)
class _Kept:
    """An outcome on its way to the disk; `done` is set when it is there."""

    request: Request
    outcome: Outcome
    done: asyncio.Event = field(default_factory=asyncio.Event)

"""Many requests at once: a bounded number under way, each tried several times, within a budget, every outcome committed.

Workers take leased requests and ask; one writer commits what they bring, many outcomes a transaction, and renews the leases.
A fault that no retry mends, an empty purse and Ctrl-C stop it alike: nothing new is sent, what is under way is kept.
"""

import asyncio
import random
import time
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import TypeVar

from gadjax.errors import UserError
from gadjax.teachers.cache import Outcome, Request, TeacherCache
from gadjax.teachers.config import TeacherConfig

OnProgress = Callable[[int, int], None]  # answers that are there, answers that are wanted
Result = TypeVar("Result")

LONGEST_WAIT = 60.0  # seconds that the growing wait between tries grows to
GATHER_SECONDS = 0.02  # outcomes of so long share a transaction
LEASE = 64  # requests leased at once: as many wait for another collector, at most, when this one is killed
HELD_SECONDS = 0.5  # between looks at what another collector has leased
FAILURES_IN_A_ROW = 32  # so many and the endpoint counts as broken


class Retry(Exception):
    """A request may succeed when it is sent again: not before `wait` seconds, where the endpoint says so."""

    def __init__(self, reason: str, wait: float = 0.0):
        super().__init__(reason)
        self.wait = wait


class Budget:
    """US dollars: those spent, and those that the requests under way may cost at most."""

    def __init__(self, limit: float, spent: float):
        self.spent, self._limit, self._reserved = spent, limit, 0.0
        self._changed = asyncio.Condition()

    async def reserve(self, cost: float) -> bool:
        """Sets `cost` aside, waiting where requests under way may yet cost less than feared. False: the limit does not allow it."""
        async with self._changed:
            while cost and self.spent + self._reserved + cost > self._limit:
                if not self._reserved:
                    return False
                await self._changed.wait()
            self._reserved += cost
            return True

    async def settle(self, reserved: float, cost: float) -> None:
        """Turns what was set aside into what it cost."""
        async with self._changed:
            self._reserved -= reserved
            self.spent += cost
            self._changed.notify_all()


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
        self._budget = Budget(config.max_cost, cache.cost())
        self._leased: deque[Request] = deque()
        self._leasing = asyncio.Lock()
        self._outcomes: asyncio.Queue[tuple[Request, Outcome] | None] = asyncio.Queue()
        self._stop = asyncio.Event()
        self._fault: UserError | None = None
        self._quiet_until = 0.0  # monotonic time before which the endpoint wants no request
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
            if outcome := await self._paid_outcome(request):
                self._outcomes.put_nowait((request, outcome))
                self._watch(outcome)

    async def _next(self) -> Request | None:
        """A request that is leased to us; None when there is nothing more to ask."""
        async with self._leasing:
            while not self._leased and self._open and not self._stop.is_set():
                chunk = [self._open.popleft() for _ in range(min(LEASE, len(self._open)))]
                taken, held = await self._in_thread(self._cache.lease, [request.key for request in chunk])
                self._leased.extend(request for request in chunk if request.key in taken)
                self._open.extend(request for request in chunk if request.key in held)
                self._advance(len(chunk) - len(taken) - len(held))  # what another collector has finished
                if not taken:
                    await self._pause(HELD_SECONDS if held else 0.0)
            return self._leased.popleft() if self._leased and not self._stop.is_set() else None

    async def _paid_outcome(self, request: Request) -> Outcome | None:
        """The outcome within the budget; None where it is stopped first."""
        worst, outcome = self._worst_cost(request), None
        if not await self._budget.reserve(worst):
            spent = f"{self._budget.spent:.2f} of {self._config.max_cost:.2f} dollars are spent and the next answer might exceed them"
            self._halt(UserError("teacher.max_cost", spent, "raise it and run the same command again: what is collected is kept"))
            return None
        try:
            outcome = await self._outcome(request)
        finally:
            await self._budget.settle(worst, outcome.cost if outcome else 0.0)
        return outcome

    async def _outcome(self, request: Request) -> Outcome | None:
        reason = ""
        for attempt in range(self._config.tries):
            await self._pause(self._quiet_until - time.monotonic())
            if self._stop.is_set():
                return None
            try:
                return await self._ask(request)
            except UserError as fault:
                self._halt(fault)
                return None
            except Retry as retry:
                reason = str(retry)
                self._quiet_until = max(self._quiet_until, time.monotonic() + retry.wait)  # a rate limit is everybody's
            if attempt + 1 < self._config.tries:
                await self._pause(min(self._config.retry_wait * 2**attempt, LONGEST_WAIT) * random.uniform(0.5, 1.0))
        return Outcome("failed", error=reason)

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
            raise

    async def _gather(self) -> list[tuple[Request, Outcome] | None]:
        """The outcomes of a short while; none where there are none in time to renew the leases."""
        try:
            batch = [await asyncio.wait_for(self._outcomes.get(), self._cache.lease_seconds / 4)]
        except TimeoutError:
            return []
        await asyncio.sleep(GATHER_SECONDS)
        while not self._outcomes.empty():
            batch.append(self._outcomes.get_nowait())
        return batch

    async def _write(self, batch: list[tuple[Request, Outcome] | None]) -> bool:
        """Commits a batch. False: it was the last."""
        outcomes = [each for each in batch if each is not None]
        if outcomes:
            await self._in_thread(self._cache.record, outcomes)
            self._advance(len(outcomes))
        return len(outcomes) == len(batch)

    def _advance(self, done: int) -> None:
        if done:
            self._done += done
            self._on_progress(self._done, self._total)

    async def _in_thread(self, call: Callable[..., Result], *args: object) -> Result:
        return await asyncio.get_running_loop().run_in_executor(self._thread, call, *args)

"""One piece of work beside the main one: a checkpoint that is committed while training goes on."""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType

__all__ = ["Background"]


class Background:
    """Runs one job at a time in a thread; what a job raises is raised here, at the next call."""

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="kallm-background")
        self._job: Future[None] | None = None

    @property
    def is_busy(self) -> bool:
        """Whether a job is under way."""
        return self._job is not None and not self._job.done()

    def check(self) -> None:
        """Raise what the last job raised, if it is done."""
        if not self.is_busy:
            self.wait()

    def start(self, job: Callable[[], None]) -> None:
        """Begin a job, when the one before is done."""
        self.wait()
        self._job = self._pool.submit(job)

    def wait(self) -> None:
        """Wait until nothing is under way, and raise what the last job raised."""
        job, self._job = self._job, None
        if job is not None:
            job.result()

    def __enter__(self) -> "Background":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Wait for the job; its error is raised only where no other one is under way."""
        self._pool.shutdown(wait=True)
        if error is None:
            self.wait()

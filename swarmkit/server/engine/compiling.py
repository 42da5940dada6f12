"""Has the decode step of a stage compiled while the server serves, and puts it in place.

::

    look at the blocks ── for 1, 2, 4 … rows: ── on the shelf? ── else compile, in a process of low priority
    (engine)                                         │
                             load ── compare each block ── measure ── put in place, and say so
                                     (engine, block by block, between the steps of clients)

For one row and for two there are two programs each: in the second one the products with weights are
compiled, too. It takes the place of the first one where it is faster, which depends on the processor and the
shapes.

Until then, and wherever something of it cannot be done, tokens run as they do without; the reason is told.

Compiling takes half a minute of a processor for each number of rows. With `auto`, a server compiles only what
it has by then decoded for as long: at worst compiling doubles its work, and one that is hardly used does
nothing of all this.
"""

from __future__ import annotations

import json
import logging
import os
import platform
import shutil
import signal
import statistics
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager, suppress
from functools import cache
from hashlib import sha256
from pathlib import Path

import anyio
import anyio.to_thread
import filelock
import torch
import transformers
from torch import nn

from swarmkit.events import Event, StepCompiled, StepNotCompiled
from swarmkit.models.compiled import build
from swarmkit.models.compiled.kinds import BlockKind, NotCompiledError, StageKinds, kinds_of
from swarmkit.models.compiled.shelf import PackageShelf, default_folder
from swarmkit.models.compiled.steps import CompiledSteps, Program, Race, StepComparison
from swarmkit.models.execution import packed
from swarmkit.models.execution.stage import Stage
from swarmkit.models.kernels.blocked_linear import BlockedLinear
from swarmkit.models.kernels.choices import processor
from swarmkit.models.kernels.compiled_products import remember_faster
from swarmkit.server.engine.engine import Engine
from swarmkit.server.engine.work import BULK, EngineClosedError
from swarmkit.settings import EngineSettings

logger = logging.getLogger(__name__)

BOUND = {torch.float32: 2e-5, torch.bfloat16: 3e-2, torch.float16: 4e-3}
"""Largest difference to the step that is replaced, in parts of the largest value; the order of additions and
roundings within a block differs."""
_ROUNDS = 7
"""Steps of each kind that are timed."""
_FASTER = 1.03
MOST_ROWS_WITH_PRODUCTS = 2
"""Of more rows no products are compiled: matrix libraries are as fast there, or faster."""
_PATIENCE_S = 1800.0
"""How long a compiler may take, on a machine that has other things to do."""
_PAUSE_S = 0.5
_USED_S = 2.0
"""Seconds of decoding after which a server is used enough to look for programs on the shelf."""
_COMPILING_TAKES_S = 30.0


def worth_s(compiled: int) -> float:
    """Seconds of decoding from which on another program is worth compiling, after `compiled` others.

    Whoever buys when the rent has reached the price never pays more than twice the least (ski rental).
    """
    return _COMPILING_TAKES_S * (compiled + 1)


def sizes_up_to(slots: int) -> list[int]:
    """The numbers of rows that programs are compiled for: powers of two, and the largest that may be."""
    sizes = [1]
    while sizes[-1] < slots:
        sizes.append(min(2 * sizes[-1], slots))
    return sizes


class StepCompiler:
    """Compiles the decode step of one stage; its `run` is a task that ends when all is done.

    Attributes:
        reason: why there are no (or no more) compiled steps; empty while nothing is in the way.
        steps: what was put in place; None before.
    """

    def __init__(
        self,
        stage: Stage,
        engine: Engine,
        settings: EngineSettings,
        emit: Callable[..., None],
        folder: Path | None = None,
    ) -> None:
        """Args:
        emit: is given a kind of event, and its values.
        folder: for compiled programs; `default_folder` if not given.
        """
        self._stage = stage
        self._engine = engine
        self._settings = settings
        self._emit = emit
        self._folder = folder or default_folder()
        self._compiled = 0
        self.reason = ""
        self.steps: CompiledSteps | None = None

    async def run(self) -> None:
        """Compile for more and more rows, until all is done or something is in the way."""
        size = 0
        try:
            with suppress(EngineClosedError):
                await self._until_decoded(_USED_S)
                ensure_compiler()
                shelf = await anyio.to_thread.run_sync(PackageShelf, self._folder)
                kinds = (await self._engine.run(lambda: kinds_of(self._stage), BULK)).value
                for size in sizes_up_to(self._settings.compile_slots):
                    speedup = await self._put_in_place(shelf, kinds, size)
                    if size <= MOST_ROWS_WITH_PRODUCTS:
                        await self._try_with_products(shelf, kinds, size, speedup)
        except NotCompiledError as error:
            self._tell(str(error), size)
        except Exception as error:
            logger.warning("compiling decode steps failed", exc_info=True)
            self._tell(f"{type(error).__name__}: {error}", size)

    async def _until_decoded(self, seconds: float) -> None:
        """With `auto`, wait until the stage has decoded for so long."""
        learned = self._engine.learned_of(self._stage)
        while True:
            if self._settings.compile == "on" or learned.decode_s >= seconds or self._engine.closed:
                break
            await anyio.sleep(_PAUSE_S)

    def _tell(self, reason: str, size: int) -> None:
        self.reason = reason
        self._told(StepNotCompiled, reason, size)

    def _told(self, kind: type[Event], *values: object) -> None:
        self._emit(kind, self._stage.start, self._stage.stop, *values)

    async def _put_in_place(self, shelf: PackageShelf, kinds: StageKinds, size: int) -> float:
        """Have programs for so many rows, and use them if they compute the same.

        Returns: how many times as fast they are.

        Raises:
            NotCompiledError: there are none, or they do not.
        """
        programs, speedup = await self._checked(shelf, kinds, size)
        if self._settings.compile == "auto" and speedup < _FASTER:
            reason = f"compiled steps take {1 / speedup:.2f} times as long here as others"
            self._told(StepNotCompiled, reason, size)
        else:
            await self._engine.run(lambda: self._use(kinds, programs, size), BULK)
            self._told(StepCompiled, size, speedup)
        return speedup

    async def _try_with_products(
        self, shelf: PackageShelf, kinds: StageKinds, size: int, without: float
    ) -> None:
        """Have programs with products for so many rows, and use them where they are faster than any others.

        Args: without: how many times as fast those without are.
        """
        try:
            programs, speedup = await self._checked(shelf, kinds, size, with_products=True)
        except NotCompiledError as error:
            logger.info("products with %d rows are not compiled: %s", size, error)
            return
        faster = speedup >= _FASTER * max(without, 1.0)
        if size == 1:
            await anyio.to_thread.run_sync(self._remember_products, faster)
        if faster:
            await self._engine.run(lambda: self._use(kinds, programs, size), BULK)
            self._told(StepCompiled, size, speedup)

    def _remember_products(self, faster: bool) -> None:
        """Remember what compiled products of one row bring, for those who choose the order of weights."""
        layers = [one for one in self._stage.base.modules() if isinstance(one, nn.Linear)]
        plain = {one.weight.shape for one in layers if not isinstance(one, BlockedLinear)}
        for shape in plain:
            remember_faster(shape, self._stage.dtype, torch.get_num_threads(), faster)

    async def _checked(
        self, shelf: PackageShelf, kinds: StageKinds, size: int, with_products: bool = False
    ) -> tuple[Mapping[str, Program], float]:
        """Programs for so many rows that compute the same, and how many times as fast they are.

        Raises:
            NotCompiledError: there are none, or they do not.
        """
        tokens = self._settings.compile_tokens
        keys = {digest: program_key(digest, size, tokens, with_products) for digest in kinds.kinds}
        packages = {
            digest: await self._have(shelf, keys[digest], kind, size, with_products)
            for digest, kind in kinds.kinds.items()
        }
        with shelf.trying(keys.values()):
            try:
                programs = {
                    digest: await anyio.to_thread.run_sync(Program, package)
                    for digest, package in packages.items()
                }
                await self._compare(kinds, programs, size)
            except NotCompiledError:
                for key in keys.values():
                    shelf.remove(key)
                raise
            return programs, await self._measure(kinds, programs, size)

    def _use(self, kinds: StageKinds, programs: Mapping[str, Program], size: int) -> None:
        if self.steps is None:
            settings = self._settings
            self.steps = CompiledSteps(self._stage, kinds, settings.compile_slots, settings.compile_tokens)
            self._stage.decode_path = self.steps
        self.steps.put(size, programs)

    async def _have(
        self, shelf: PackageShelf, key: str, kind: BlockKind, size: int, with_products: bool
    ) -> Path:
        """A program on the shelf, compiled now if it is not there."""
        found = await anyio.to_thread.run_sync(shelf.find, key)
        if found is None:
            await self._until_decoded(worth_s(self._compiled))
            self._compiled += 1
            async with _alone(shelf.folder):
                found = await anyio.to_thread.run_sync(shelf.find, key)  # others may have been at it
                if found is None:
                    tokens = self._settings.compile_tokens
                    found = await compile_apart(shelf, key, kind, size, tokens, with_products)
        return found

    async def _compare(self, kinds: StageKinds, programs: Mapping[str, Program], size: int) -> None:
        """Compare each block's step with the one that it is to replace.

        Raises:
            NotCompiledError: they differ by more than the order of additions can make.
        """
        stage, bound = self._stage, BOUND[self._stage.dtype]
        comparison = StepComparison(stage, kinds, size, self._settings.compile_tokens)
        for index, digest in enumerate(kinds.of_block):
            compare = comparison.difference
            found = (await self._engine.run(lambda: compare(index, programs[digest]), BULK)).value  # noqa: B023
            if not found <= bound:
                raise NotCompiledError(
                    f"the compiled step of block {stage.start + index} differs from the other by "
                    f"{found:.1e} of the largest value, and {bound:.0e} is the bound"
                )

    async def _measure(self, kinds: StageKinds, programs: Mapping[str, Program], size: int) -> float:
        """How many times as fast compiled steps are, by steps of both kinds in turn."""
        race = Race(self._stage, kinds, size, self._settings.compile_tokens)
        await self._engine.run(lambda: race.put(programs), BULK)
        ratios = []
        for _ in range(_ROUNDS):
            before = await self._engine.run(race.step_eagerly, BULK)
            after = await self._engine.run(race.step_compiled, BULK)
            ratios.append(before.compute_s / max(after.compute_s, 1e-9))
        return statistics.median(ratios[1:])  # the first of each moves its sessions, and warms up


def will_compile(settings: EngineSettings) -> bool:
    """Whether a server with these settings compiles the decode step of a stage on a CPU, once it is used."""
    if settings.compile == "off":
        return False
    try:
        ensure_compiler()
    except NotCompiledError:
        return False
    return True


def ensure_compiler() -> None:
    """Check that there is a C++ compiler.

    Raises:
        NotCompiledError: there is none.
    """
    usual = "clang++" if sys.platform == "darwin" else "g++"
    named = os.environ.get("CXX", usual)
    if shutil.which(named) is None:
        raise NotCompiledError(
            f"there is no C++ compiler named {named} on this machine; install one, or name one in CXX"
        )


def program_key(digest: str, rows: int, tokens: int, with_products: bool = False) -> str:
    """The name of a program: what it was made for, of what, and by what.

    Args:
        digest: of the kind of block.
        with_products: whether products with weights are compiled, too.
    """
    made_for = [digest, str(rows), str(tokens), *(["with products"] if with_products else [])]
    return sha256("\n".join([*made_for, *_made_by()]).encode()).hexdigest()


@cache
def _made_by() -> tuple[str, ...]:
    own = [Path(build.__file__).with_name("trace.py"), Path(packed.__file__)]
    sources = [sha256(path.read_bytes()).hexdigest() for path in own]
    # Programs use all that the processor can do.
    return torch.__version__, transformers.__version__, platform.system(), processor(), *sources


@asynccontextmanager
async def _alone(folder: Path) -> AsyncIterator[None]:
    """Wait until no other server of this machine compiles; two would only slow each other down."""
    lock = filelock.FileLock(folder / "compiling.lock", mode=0o600)
    while True:
        try:
            lock.acquire(blocking=False)
            break
        except filelock.Timeout:
            await anyio.sleep(_PAUSE_S)
    try:
        yield
    finally:
        lock.release()


async def compile_apart(
    shelf: PackageShelf, key: str, kind: BlockKind, rows: int, tokens: int, with_products: bool = False
) -> Path:
    """Compile a program in a process of its own, and put it on the shelf.

    If this is cancelled, the process and its compiler are killed.

    Raises:
        NotCompiledError: it could not be compiled; the message says why.
    """
    with shelf.workplace() as place:
        package = place / "made.pt2"
        order = {
            "kind": kind.text,
            "rows": rows,
            "length": tokens,
            "package": str(package),
            "with_products": with_products,
        }
        with (place / "errors.txt").open("w+b") as errors:
            with anyio.move_on_after(_PATIENCE_S) as patience:
                code = await _run_to_the_end(json.dumps(order), errors.fileno(), place)
            if patience.cancelled_caught:
                raise NotCompiledError(f"it took longer than {_PATIENCE_S:.0f} s to compile")
            errors.seek(0)
            words = errors.read().decode(errors="replace").strip().splitlines()
        try:
            reason = json.loads((place / build.ANSWER).read_text())["reason"]
        except OSError:
            reason = f"its process ended with {code}{f': {words[-1]}' if words else ''}"
        if reason:
            raise NotCompiledError(reason)
        return await anyio.to_thread.run_sync(shelf.put, key, package)


async def _run_to_the_end(order: str, errors: int, place: Path) -> int:
    """Run the process that compiles; returns its exit code. It ends with this call, whatever happens."""
    own = {
        "TORCHINDUCTOR_CACHE_DIR": str(place / "inductor"),
        "TORCHINDUCTOR_COMPILE_THREADS": "1",
        "TMPDIR": str(place),
        "OMP_NUM_THREADS": "1",
    }
    process = await anyio.open_process(
        [sys.executable, "-m", build.__name__],
        stdin=subprocess.PIPE,
        stdout=errors,
        stderr=errors,
        env={**os.environ, **own},
        start_new_session=True,
    )
    try:
        assert process.stdin is not None
        await process.stdin.send(f"{order}\n".encode())
        return await process.wait()
    finally:
        if process.returncode is None:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # and with it the compiler that it may have started
        with anyio.CancelScope(shield=True):
            await process.aclose()

"""Several processes that compute one run, started by torchrun or whatever sets the same variables.

What is computed goes through torch.distributed. All else, which may take as long as it likes, goes through the
launcher's store, where waiting has no end: a collective gives up after minutes, and encoding, a pause or previews last
longer than that.
"""

from __future__ import annotations

import os
import pickle
import socket
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from lora_trainer.devices import torch_version
from lora_trainer.errors import RankFailedError, UserError
from lora_trainer.models.sharding import Peers
from lora_trainer.out_of_memory import is_out_of_memory
from lora_trainer.training.callbacks import TrainCommands
from lora_trainer.training.ranks import Ranks
from lora_trainer.training.watch import Limits, Watch, peek

Value = TypeVar("Value")
Turn = Callable[[], AbstractContextManager[None]]

COLLECTIVE_SECONDS = 1800.0
"""A collective gives up after so long. Nothing waits in one that long: what fails, the watch finds before."""
_LARGE = 2**20
"""A value of more bytes is broadcast instead of being put into the store."""
_NO_END = timedelta(days=365)
_NONE = 2**31
"""Of all blocks of a base that is kept together, which are counted from 0."""
_SOON, _SLOWEST_POLL = 0.05, 0.02


def choose_own_device(device: str) -> None:
    """Make this process's own GPU the one that "auto" and "cuda" stand for, so that the settings, which are saved, name
    none. Raises UserError when there is none for it."""
    index = int(os.environ.get("LOCAL_RANK") or 0)
    if device not in ("auto", "cuda") or not torch.cuda.is_available():
        if device.startswith("cuda:"):
            message = f"{device} is one GPU, and each of several processes needs its own."
            raise UserError(message, field="device", remedy="Use auto.")
        return
    count = torch.cuda.device_count()
    if index >= count:
        message = f"There is no GPU for process {index} of this machine."
        raise UserError(message, field="device", remedy=f"Use --nproc-per-node {count}.")
    torch.cuda.set_device(index)


class Processes(Ranks):
    """``Ranks`` of more than one process.

    device: on which gradients lie.

    Raises:
        RankFailedError: in whatever waits for the others, when one of them has failed.
    """

    def __init__(self, device: torch.device, limits: Limits | None = None):
        if sys.platform == "win32":
            os.environ.setdefault("USE_LIBUV", "0")  # torch for Windows is built without it
        self.rank, self.size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        self._device = device
        self._count = 0  # of what all have done together
        self._told: list[str] = []  # keys that are still in the store
        self._parts: Sequence[Tensor] = ()  # of the base's blocks, what this process keeps
        self._needs: Any = None  # the group in which processes say which block they need
        self._on_gpu = device.type == "cuda" and dist.is_nccl_available()
        timeout = timedelta(seconds=COLLECTIVE_SECONDS)
        dist.init_process_group("nccl" if self._on_gpu else "gloo", timeout=timeout)
        self._small = dist.new_group(backend="gloo", timeout=timeout)
        self._token = _everywhere(os.urandom(8).hex(), self._small)
        self._store = self._connect()
        names = [""] * self.size
        dist.all_gather_object(names, f"Rank {self.rank} on {socket.gethostname()}", group=self._small)
        self.name = names[self.rank]
        self._watch = Watch(self.rank, names, self._connect, limits or Limits.from_environment())
        dist.barrier(group=self._small)
        self._watch.start()

    def _connect(self) -> Any:
        """A connection to the launcher's store."""
        options = {"use_libuv": False} if sys.platform == "win32" and torch_version() >= (2, 3) else {}
        address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        store = dist.TCPStore(address, port, None, False, timedelta(seconds=300), **options)
        return dist.PrefixStore(f"lora-trainer/{self._token}", store)

    # -- waiting without an end

    def first(self, compute: Callable[[], Value]) -> Value:
        key = self._key("first")
        if self.leads:
            value = compute()
        self._take_part()
        if self.leads:
            data = pickle.dumps(value)
            large = len(data) > _LARGE
            self._put(key, b"large" if large else data)
        else:
            data = self._get(key)
            large = data == b"large"
        if large:
            with self._collective():
                data = _everywhere(data, self._small)
        self._told.append(key)
        return value if self.leads else pickle.loads(data)

    def meet(self, value: Value) -> list[Value]:
        self._take_part()
        key = self._key("meet")
        self._put(f"{key}/{self.rank}", pickle.dumps(value))
        if self.leads:
            values = [pickle.loads(self._get(f"{key}/{rank}")) for rank in range(self.size)]
            self._put(key, pickle.dumps(values))
            self._together()
            self._told += [key, *(f"{key}/{rank}" for rank in range(self.size))]
        else:
            values = pickle.loads(self._get(key))
        return values

    def decide(self, stop: bool) -> bool:
        self._take_part()
        key = self._key("decide")
        if self.leads:
            self._put(key, b"1" if stop else b"0")
        else:
            stop = self._get(key) == b"1"
        self._told.append(key)
        return stop

    def _key(self, kind: str) -> str:
        self._count += 1
        return f"{kind}/{self._count}"

    def _together(self) -> None:
        """All processes are here: what they were told before has been read."""
        if self.leads:
            with self._connection():
                for key in self._told:
                    self._store.delete_key(key)
            self._told.clear()

    def _put(self, key: str, data: bytes) -> None:
        with self._connection():
            self._store.set(key, data)

    def _get(self, key: str) -> bytes:
        """What is put there, whenever that is. Asked for again and again, as a question that waits may give up."""
        return self._found(lambda: peek(self._store, key))

    def _found(self, look: Callable[[], Value | None]) -> Value:
        """What ``look`` finds sooner or later; a signal is heard meanwhile."""
        started = time.monotonic()
        with self._watch.waiting():
            while True:
                if self._watch.problem is not None:
                    raise self._watch.problem
                with self._connection():
                    if (found := look()) is not None:
                        return found
                if (waited := time.monotonic() - started) > _SOON:
                    time.sleep(min(_SLOWEST_POLL, waited / 10))

    @contextmanager
    def _connection(self) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:
            raise self._failure(error) from error

    # -- within a step

    def total(self, *numbers: float) -> list[float]:
        self._take_part()
        values = torch.tensor(numbers, dtype=torch.float64)
        with self._collective():
            dist.all_reduce(values, group=self._small)
        self._together()
        return values.tolist()

    def add(self, flat: Tensor) -> None:
        self._take_part()
        with self._collective():
            dist.all_reduce(flat)

    def collect(self, flat: Tensor) -> list[Tensor]:
        self._take_part()
        found = [torch.empty_like(flat) for _ in range(self.size)]
        with self._collective():
            dist.all_gather(found, flat)
        return found

    @contextmanager
    def _collective(self) -> Iterator[None]:
        try:
            with self._watch.waiting():
                yield
                if self._on_gpu:  # the CPU is to wait here, where it is known to wait for others
                    torch.cuda.current_stream(self._device).synchronize()
        except RuntimeError as error:
            raise self._failure(error) from error

    def _failure(self, error: Exception) -> RankFailedError:
        """Who is to blame for an error of torch.distributed."""
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        return self._watch.verdict() or RankFailedError(f"{self.name} has lost the others: {reason}")

    # -- a base of which each process keeps a part

    @property
    def peers(self) -> Peers | None:
        return self

    def keep(self, parts: Sequence[Tensor]) -> None:
        """See ``models.sharding.Peers``. Where some are kept, all processes call it."""
        self._parts = parts
        if parts and self._needs is None:
            with self._collective():
                self._needs = dist.new_group(backend="gloo", timeout=_NO_END)

    def gather(self, number: int) -> Tensor:
        while True:
            needed = self._needed(number)
            whole = self._gathered(needed)
            if needed == number:
                return whole

    def _take_part(self) -> None:
        """Before all processes do something together: until no other one needs a block any more."""
        while self._parts and (needed := self._needed(_NONE)) != _NONE:
            self._gathered(needed)

    def _needed(self, number: int) -> int:
        """The block that is gathered next: of those that any process needs, the one with the lowest number."""
        needed = torch.tensor(number)
        work = dist.all_reduce(needed, dist.ReduceOp.MIN, group=self._needs, async_op=True)
        self._found(lambda: work.is_completed() or None)
        with self._connection():
            work.wait()
        return int(needed)

    def _gathered(self, number: int) -> Tensor:
        part = self._parts[number]
        try:
            whole = part.new_empty(self.size * part.numel())
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            # No less would do, and the others wait: nothing can be repeated with less memory here.
            message = "The memory of the device does not suffice for a whole block of the base model beside the rest."
            raise UserError(message, field="batch_size", remedy="Lower it, or the resolution or max_length.") from error
        with self._collective():
            if self._on_gpu:
                dist.all_gather_into_tensor(whole, part)
            else:  # gloo cannot do that in torch 2.1
                dist.all_gather(list(whole.chunk(self.size)), part)
        return whole

    # -- what the others must know

    def listen(self, commands: TrainCommands) -> None:
        self._watch.on_stop = commands.stop_and_save

    def ask_to_stop(self) -> None:
        """End all processes' runs, as a signal to this one asks for."""
        self._watch.ask_to_stop()

    def guard(self, turn: Turn) -> Turn:
        @contextmanager
        def guarded() -> Iterator[None]:
            with turn(), self._watch.in_turn():
                yield

        return guarded

    def working(self) -> AbstractContextManager[None]:
        return self._watch.in_turn()

    def expect_progress(self) -> None:
        self._watch.guard()

    def progress(self) -> None:
        self._watch.progress()

    def unhurried(self, seconds: float | None = None) -> AbstractContextManager[None]:
        return self._watch.unhurried(seconds)

    def say(self, text: str) -> None:
        print(f"{self.name}: {text}", file=sys.stderr, flush=True)

    def close(self, error: BaseException | None = None) -> None:
        if error is not None and not isinstance(error, RankFailedError):
            text = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
            with suppress(RuntimeError):
                self._watch.fail(f"{self.name} failed: {text}", error.code if isinstance(error, UserError) else 1)
                time.sleep(0 if _launcher_keeps_store() else 3)  # the store ends with rank 0
        if error is None:
            with self._collective():  # rank 0 may keep the store, which the others still read
                dist.barrier(group=self._small)
        self._watch.leave()
        if error is None:
            dist.destroy_process_group()


def _launcher_keeps_store() -> bool:
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


def _everywhere(value: Any, group: Any) -> Any:
    """Rank 0's."""
    values = [value]
    dist.broadcast_object_list(values, src=0, group=group)
    return values[0]

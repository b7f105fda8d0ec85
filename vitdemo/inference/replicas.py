"""One engine on many devices or machines: replicas as Ray actors, every image exactly once.

The driver carries only ranges of indices there and rows back; each replica opens the data set and the artifact itself.
A range that a replica did not bring back, because it died or hangs, is done again by its successor or by another one.
"""

import socket
import sys
from collections import Counter, deque
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Self

import psutil
from tqdm.auto import tqdm

from vitdemo.dataset.imagenet import ImageNetVal
from vitdemo.engines.contract import Engine
from vitdemo.errors import EngineFailure, VitdemoError, at_least_1, reason_of
from vitdemo.inference.actor import Place, Replica, Shard, code_fingerprint
from vitdemo.inference.cluster import connect, loss_of, place_replicas, share_cores
from vitdemo.inference.schedule import Schedule
from vitdemo.machine import now, versions

# A replica's place in a run: who works there, on what, and what was done so far.


@dataclass
class Task:
    """What a replica was asked for. indices: of a range of images, None while the replica is made ready."""

    reference: object
    indices: range | None
    began: float


@dataclass
class ReplicaState:
    """A replica's place in the run, which its successors take over, and what was done there.

    cpus: its share of Ray's CPUs on its node. busy_s: seconds it worked on ranges that it brought back.
    """

    number: int
    node: str
    cpus: float
    gpus: int
    actor: object = None
    place: Place | None = None
    process: psutil.Process | None = None
    host: str = ""
    cores: list[int] = field(default_factory=list)
    threads: int = 0
    precision_ran: dict[str, float] = field(default_factory=dict)
    ready: bool = False
    tasks: deque[Task] = field(default_factory=deque)
    lost: int = 0
    lost_in_a_row: int = 0
    images: int = 0
    ranges: int = 0
    busy_s: float = 0.0
    peak_memory_bytes: int = 0

    @property
    def pid(self) -> int | None:
        """Of its process on its machine; None while it is being started."""
        return self.place and self.place.pid

    @property
    def images_per_s(self) -> float:
        return self.images / self.busy_s if self.busy_s else 0.0

    def brought_back(self, shard: Shard) -> None:
        """Count a range that it did."""
        self.images += len(shard.indices)
        self.ranges += 1
        self.busy_s += shard.wall_s
        self.lost_in_a_row = 0
        self.peak_memory_bytes = shard.peak_memory_bytes

    def forget_run(self) -> None:
        """Begin to count anew."""
        self.images, self.ranges, self.busy_s, self.lost, self.lost_in_a_row = 0, 0, 0.0, 0, 0

    def record(self, wall_s: float) -> dict:
        """Of a run that took ``wall_s``: its machine and cores, images and ranges that it brought back, ``busy_s``
        (working on those), ``idle_s`` (the rest of ``wall_s``: waiting, being replaced, or working on what was lost),
        ``images_per_s`` (over ``busy_s``), the precision that ran there, its process's peak memory."""
        return {
            "replica": self.number,
            "host": self.host,
            "cores": self.cores,
            "images": self.images,
            "ranges": self.ranges,
            "busy_s": self.busy_s,
            "idle_s": wall_s - self.busy_s,
            "images_per_s": self.images_per_s,
            "precision_ran": self.precision_ran,
            "peak_memory_bytes": self.peak_memory_bytes,
            "lost": self.lost,
        }


ATTEMPTS = 3  # of one range, or of starting one replica; then something is wrong that a restart does not cure
DEADLINE_S = 300.0
SLOWER = 10  # times a range may take what the replica's rate says, before it counts as hung
PLACED_S = 60.0  # for all to get a process; 10 s each where there are more than six
GOING_S = 3.0
PREPARING = 6  # deadlines that a replica may take to be ready: it may have to build the engine


class Replicas:
    """``count`` replicas of an engine, started once, for any number of runs over ``data``.

    ::

        with Replicas(engine, data, 2) as replicas:
            evaluation = evaluate(engine, data, replicas=replicas)

    One replica a device: a GPU each for an engine on CUDA; otherwise an equal share of each machine's cores, or
    ``cores_each`` of them, to which its process is bound before a runtime is loaded. More replicas than cores share
    cores. ray_address: of an existing cluster ("host:6379", or "auto" on one of its machines), all of whose machines
    are used; by default the Ray that this process has, or one of its own on this machine. deadline_s: how long a range
    of images may take (one batch at first, then about 5 s each) before its replica is given up for hung, unless it is
    so slow that ten times what its rate says is more; give more for a model whose single batch takes minutes. share: of
    Ray's CPUs; of several ``Replicas`` that are alive at once, to work by turns, the shares add up to 1 at most.

    ray_start_s: starting or finding Ray. start_s: from then until every replica was ready. slots: the replicas.
    Raises VitdemoError where Ray is not installed or does not answer, and for what a replica lacks.
    """

    def __init__(
        self,
        engine: Engine,
        data: ImageNetVal,
        count: int,
        *,
        cores_each: int | None = None,
        ray_address: str | None = None,
        deadline_s: float = DEADLINE_S,
        share: float = 1.0,
    ):
        at_least_1(replicas=count, cores_each=cores_each)
        if engine.recipe is None:
            raise VitdemoError(f"{engine.info.tag}: replicas build an engine anew, so take one that convert made")
        self.engine, self.data, self._cores_each, self._deadline_s = engine, data, cores_each, deadline_s
        print(f"starting Ray and {count} replicas" if count > 1 else "starting Ray and a replica", file=sys.stderr)
        begin = now()
        self._ray = connect(ray_address)
        self.ray_start_s, begin = now() - begin, now()
        self._job = self._ray.get_runtime_context().get_job_id()
        try:
            recipe = self._ray.put(engine.recipe)
        except self._ray.exceptions.RayError as error:
            raise VitdemoError(f"replicas: Ray has no room for the model ({reason_of(error)})") from None
        self._recipe = [recipe]  # Ray fetches an argument, but not what lies in a list: only who must build does
        self.slots = [
            ReplicaState(k, *share) for k, share in enumerate(place_replicas(self._ray, count, engine.device, share))
        ]
        self._failed: Counter[range | None] = Counter()
        try:
            for slot in self.slots:
                self._start(slot)
            while not all(slot.ready for slot in self.slots):
                self._attend(None)
        except BaseException:
            self.close()
            raise
        self.start_s = now() - begin

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """End the replicas. Ray itself goes on for the next ones, until ``stop_ray`` or the end of the process."""
        self._end(self.slots)

    @property
    def pids(self) -> list[int]:
        """The replicas' processes, on their machines."""
        return [slot.pid for slot in self.slots]

    @property
    def threads(self) -> int:
        """CPU threads that a call of the largest replica uses."""
        return max(slot.threads for slot in self.slots)

    @property
    def cores(self) -> int:
        """CPU cores of all replicas together."""
        return len({(slot.host, core) for slot in self.slots for core in slot.cores})

    def __str__(self) -> str:
        hosts = {slot.host for slot in self.slots}
        where = "this machine" if hosts == {socket.gethostname()} else f"{len(hosts)} machines"
        shared = ", which they share" if self.cores < len(self.slots) else ""
        return f"replicas: {len(self.slots)} on {self.cores} cores of {where}{shared}"

    def summary(self, schedule: str, wall_s: float) -> dict:
        """Of the last run, which took ``wall_s``: who did how much.

        ``lost``: replicas that died or hung and were replaced. ``each``: by replica, see ``ReplicaState.record``.
        ``ray_start_s``, ``start_s``: starting Ray, and the replicas; in no rate.
        """
        each = [slot.record(wall_s) for slot in self.slots]
        started = {"ray_start_s": self.ray_start_s, "start_s": self.start_s}
        lost = sum(slot.lost for slot in self.slots)
        return {"count": len(each), "schedule": schedule, "lost": lost, **started, "each": each}

    def run(self, images: int, schedule: Schedule, device_batch_size: int, input_path: str) -> Iterator[Shard]:
        """The rows of the ``images`` that ``schedule`` holds, a shard a range, as they come back; each exactly once.

        Raises EngineFailure when an engine breaks, and VitdemoError when replicas are lost again and again.
        """
        self._check_ray()
        self._failed.clear()
        for slot in self.slots:
            slot.forget_run()
            if slot.actor is None:
                self._start(slot)
        left = images
        try:
            while left:
                for slot in filter(lambda slot: slot.ready, self.slots):
                    self._hand_out(slot, schedule, device_batch_size, input_path)
                for shard in self._attend(schedule):
                    schedule.done(shard)
                    left -= len(shard.indices)
                    yield shard
        finally:
            # Stopped half-way: what they still do is for nobody, and one that did not start may never.
            stopped = left > 0
            self._end([s for s in self.slots if any(task.indices for task in s.tasks) or stopped and not s.ready])

    def _check_ray(self) -> None:
        if not self._ray.is_initialized() or self._ray.get_runtime_context().get_job_id() != self._job:
            raise VitdemoError("replicas: the Ray that they were started on was stopped; start others")

    def step(self, device_batch_size: int) -> float:
        """Seconds of one batch of random pixels on every replica, handed out one right after the other, until the last
        one is done.

        Raises VitdemoError when a replica is lost.
        """
        self._check_ray()
        begin = now()
        calls = [slot.actor.call.remote(device_batch_size) for slot in self.slots]
        try:
            self._ray.get(calls, timeout=self._deadline_s)
        except self._ray.exceptions.RayTaskError as error:
            raise VitdemoError(f"a replica failed: {reason_of(error.cause)}") from None
        except self._ray.exceptions.RayError as error:
            raise VitdemoError(f"a replica was lost: {loss_of(error)}") from None
        return now() - begin

    def _hand_out(self, slot: ReplicaState, schedule: Schedule, device_batch_size: int, input_path: str) -> None:
        while len(slot.tasks) < schedule.ahead and (indices := schedule.take(slot.number, slot.images_per_s)):
            reference = slot.actor.run.remote(slot.number, indices, device_batch_size, input_path)
            slot.tasks.append(Task(reference, indices, now()))

    def _attend(self, schedule: Schedule | None) -> list[Shard]:
        """Wait until something happened, and do what it asks for; the ranges that were brought back."""
        heads = {slot.tasks[0].reference: slot for slot in self.slots if slot.tasks}
        happened, _ = self._ray.wait(list(heads), num_returns=1, timeout=min(1.0, self._deadline_s / 4))
        if len(heads) > 1 and happened:
            happened, _ = self._ray.wait(list(heads), num_returns=len(heads), timeout=0)
        shards = []
        for reference in happened:
            if (shard := self._collect(heads[reference], schedule)) is not None:
                shards.append(shard)
        for slot in filter(lambda slot: slot.tasks, self.slots):
            if now() - slot.tasks[0].began > (patience := self._patience_s(slot)):
                if slot.place is None:
                    raise VitdemoError(
                        f"replica {slot.number}: Ray gave it no process in {patience:.0f} s; `ray status` says who has "
                        "the CPUs and GPUs"
                    )
                self._replace(slot, schedule, f"did not answer for {patience:.0f} s, see deadline_s")
        return shards

    def _patience_s(self, slot: ReplicaState) -> float:
        """How long its first task may take."""
        if slot.place is None:
            return max(PLACED_S, 10.0 * len(self.slots))
        if slot.ready and slot.images_per_s:
            return max(self._deadline_s, SLOWER * len(slot.tasks[0].indices) / slot.images_per_s)
        return self._deadline_s * (1 if slot.ready else PREPARING)

    def _collect(self, slot: ReplicaState, schedule: Schedule | None) -> Shard | None:
        """Take what a slot's first task gave."""
        task = slot.tasks[0]
        try:
            answer = self._ray.get(task.reference)
        except self._ray.exceptions.RayTaskError as error:
            if isinstance(error.cause, VitdemoError | EngineFailure):
                raise error.cause from None
            raise VitdemoError(f"replica on {slot.host or 'a machine'}: {reason_of(error.cause)}") from None
        except self._ray.exceptions.RayError as error:
            self._replace(slot, schedule, loss_of(error))
            return None
        slot.tasks.popleft()
        if slot.tasks:
            slot.tasks[0].began = now()
        if isinstance(answer, Place):
            self._place(slot, answer)
        elif isinstance(answer, Shard):
            slot.brought_back(answer)
            return answer
        else:
            slot.threads, slot.precision_ran, slot.ready = answer["threads"], answer["precision_ran"], True
        return None

    def _start(self, slot: ReplicaState) -> None:
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        options = dict(num_cpus=slot.cpus, num_gpus=slot.gpus, max_restarts=0)
        where = NodeAffinitySchedulingStrategy(slot.node, soft=True)  # another one where that is gone
        slot.actor = self._ray.remote(Replica).options(**options, scheduling_strategy=where).remote()
        slot.tasks.append(Task(slot.actor.place.remote(), None, now()))

    def _place(self, slot: ReplicaState, place: Place) -> None:
        """Give a replica its cores, those of its predecessor if it has one, and have it made ready.

        The first ones wait for each other, as a machine's cores are shared out among all that are there.
        """
        if place.code != code_fingerprint():
            raise VitdemoError(f"replica on {place.host}: has another vitdemo than this process; install the same")
        if different := [name for name, version in versions().items() if place.versions[name] != version]:
            raise VitdemoError(f"replica on {place.host}: has another {', '.join(different)}; install the same")
        moved, slot.place, slot.host = slot.host not in ("", place.host), place, place.host
        with suppress(psutil.NoSuchProcess):
            process = psutil.Process(place.pid) if place.host == socket.gethostname() else None
            ours = process and abs(process.create_time() - place.created) < 2  # containers may share a name
            slot.process = process if ours else None
        if moved:
            self._share_cores(place, only=slot)
        if slot.cores:
            self._prepare(slot)
        elif all(other.host for other in self.slots):
            for host in {other.host for other in self.slots}:
                self._share_cores(next(other.place for other in self.slots if other.host == host and other.place))
            for other in self.slots:
                if other.place:
                    self._prepare(other)

    def _share_cores(self, place: Place, only: ReplicaState | None = None) -> None:
        there = [slot for slot in self.slots if slot.host == place.host]
        for slot, share in zip(there, share_cores(place.cores, len(there), self._cores_each), strict=True):
            if only in (None, slot):
                slot.cores = share

    def _prepare(self, slot: ReplicaState) -> None:
        data = str(Path(self.data.path).absolute()), self.data.fingerprint
        slot.actor.bind.remote(slot.cores)  # done first: an actor takes its calls in order
        reference = slot.actor.prepare.remote(self.engine.recipe.ticket(), self._recipe, *data)
        slot.tasks.append(Task(reference, None, now()))

    def _replace(self, slot: ReplicaState, schedule: Schedule | None, reason: str) -> None:
        """End a slot's replica, hand its ranges to others, and start a successor."""
        first = slot.tasks[0].indices
        self._failed[first] += 1
        slot.lost += 1
        slot.lost_in_a_row += 1
        if max(self._failed[first] if first else 0, slot.lost_in_a_row) >= ATTEMPTS:
            what = f"doing images {first.start} to {first.stop - 1}" if first else "starting"
            raise VitdemoError(f"replica {slot.number} was lost {ATTEMPTS} times, last while {what}: {reason}")
        for task in slot.tasks:
            if task.indices is not None:
                schedule.give_back(task.indices, slot.number)
        tqdm.write(f"replica {slot.number} was lost ({reason}); a successor is starting", file=sys.stderr)
        self._end([slot])
        self._start(slot)

    def _end(self, slots: list[ReplicaState]) -> None:
        """End the replicas of these slots, and wait until they are gone, as far as they are on this machine."""
        processes = [slot.process for slot in slots if slot.process]
        for slot in slots:
            if slot.actor is not None and self._ray.is_initialized():
                self._ray.kill(slot.actor)
            slot.actor, slot.place, slot.process, slot.ready = None, None, None, False
            slot.tasks.clear()
        for stuck in psutil.wait_procs(processes, timeout=GOING_S)[1]:  # a stopped process does not hear Ray
            with suppress(psutil.NoSuchProcess):
                stuck.kill()

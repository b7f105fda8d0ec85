"""Starts replicas, hands out ranges of images, and replaces a replica that dies or hangs; every image exactly once.

The driver sends only ranges of indices and receives rows; each replica opens the data set and the artifact itself. If a
replica dies or hangs before it returns a range, its successor or another replica computes the range again.

Ray can restart actors and retry their calls too (``max_restarts``, ``max_task_retries``), but it does so silently: a
loss could be neither counted nor reported, a restarting replica could not be distinguished from a hanging one, and a
retried range would wait for the successor while other replicas are idle. Without retries, the calls of an actor that
Ray will restart fail 1.3 to 2 s after its death, while those of any other actor fail at once (Ray 2.60). So here a
successor is a new actor, and the unfinished ranges of a lost replica go to the next free one.
"""

import socket
from collections import Counter, deque
from collections.abc import Iterator
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass, field
from typing import Any

import psutil
from tqdm.auto import tqdm

from vitdemo.dataset.dataset import Dataset
from vitdemo.engines.contract import Engine
from vitdemo.errors import EngineFailure, VitdemoError, at_least_1, reason_of
from vitdemo.inference.actor import Place, Replica, Shard, installed
from vitdemo.inference.cluster import Share, connect, loss_of, place_replicas
from vitdemo.inference.schedule import Schedule
from vitdemo.machine import message_stream, now
from vitdemo.models.classes import match_classes


@dataclass
class Task:
    """A call of a replica. indices: the range of images, None for a call that makes the replica ready."""

    reference: object
    indices: range | None
    began: float = field(default_factory=now)


@dataclass
class ReplicaState:
    """A replica's slot in the run, which its successors take over, and the work done there.

    place: the place of its process, None while there is no process. process: that process, if it is on this machine.
    busy_s: the seconds of work on ranges that were returned.
    """

    number: int
    share: Share
    actor: object = None
    place: Place | None = None
    process: psutil.Process | None = None
    host: str = ""
    cores: list[int] = field(default_factory=list)
    threads: int = 0
    precision_ran: dict[str, float] = field(default_factory=dict)
    ready: bool = False
    tasks: deque[Task] = field(default_factory=deque)
    losses: list[tuple[float, int]] = field(default_factory=list)  # when by ``now``, and the images in hand
    images: int = 0
    ranges: int = 0
    busy_s: float = 0.0
    peak_memory_bytes: int = 0

    @property
    def pid(self) -> int | None:
        """The id of its process on its machine; None while it is being started."""
        return self.place and self.place.pid

    @property
    def images_per_s(self) -> float:
        return self.images / self.busy_s if self.busy_s else 0.0

    def brought_back(self, shard: Shard) -> None:
        """Count a range that the replica returned."""
        self.images += len(shard.indices)
        self.ranges += 1
        self.busy_s += shard.wall_s
        self.peak_memory_bytes = shard.peak_memory_bytes

    def record(self, wall_s: float) -> dict:
        """The record of this slot for a run of ``wall_s`` seconds.

        It has the machine and the cores, the images and ranges that were returned, ``busy_s`` (seconds of work on
        them), ``idle_s`` (the rest of ``wall_s``: waiting, being replaced, or work that was lost), ``images_per_s``
        (over ``busy_s``), the precision that ran there, the process's peak memory, and the number of lost replicas.
        """
        own = ("host", "cores", "images", "ranges", "busy_s", "idle_s", "images_per_s", "precision_ran")
        found = vars(self) | {"images_per_s": self.images_per_s, "idle_s": wall_s - self.busy_s}
        found |= {"lost": len(self.losses)}
        return {"replica": self.number} | {name: found[name] for name in (*own, "peak_memory_bytes", "lost")}


ATTEMPTS = 3  # for one range, or for starting one replica; after these a restart does not help
DEADLINE_S = 300.0
SLOWER = 10  # a range may take this many times as long as the replica's rate predicts; then the replica counts as hung
PLACED_S = 60.0  # seconds in which all replicas must get a process; 10 s each where there are more than six
GOING_S = 3.0
PREPARING = 6  # deadlines in which a replica must be ready, because it may have to build the engine


class Replicas(AbstractContextManager):
    """``count`` replicas of an engine, started once for any number of runs over ``data``.

    ::

        with Replicas(engine, data, 2) as replicas:
            evaluation = evaluate(engine, data, replicas=replicas)

    For an engine on CUDA each replica has one GPU. Otherwise each has a share of its machine's cores, to which its
    process is bound before a runtime is loaded. If there are more replicas than cores, they share cores.

    Args:
        engine: an engine from ``convert``.
        data: the labelled images, under the same path on every machine.
        count: the number of replicas.
        cores_each: the number of cores per replica; None is an equal share of its machine's cores.
        ray_address: the address of an existing cluster ("host:6379", or "auto" on one of its machines), all of whose
            machines are used; None is the Ray that this process has, or a new one on this machine.
        deadline_s: the seconds that a range of images may take (one batch at first, then about 5 s each) before its
            replica counts as hung. A slow replica may take ten times as long as its rate predicts, if that is more.
            Give a larger value for a model whose single batch takes minutes.
        share: the fraction of Ray's CPUs. If several ``Replicas`` exist at the same time and work interleaved, their
            shares must add up to at most 1.

    Attributes:
        ray_start_s: the seconds to start or find Ray.
        start_s: the seconds from then until every replica was ready.
        slots: the replicas.

    Raises:
        VitdemoError: where Ray is not installed or does not answer, and where a replica lacks something.
    """

    def __init__(
        self,
        engine: Engine,
        data: Dataset | None,
        count: int,
        *,
        cores_each: int | None = None,
        ray_address: str | None = None,
        deadline_s: float = DEADLINE_S,
        share: float = 1.0,
    ):
        at_least_1(replicas=count, cores_each=cores_each)
        if engine.recipe is None:
            raise VitdemoError(f"{engine.info.tag}: replicas build the engine again, so it must come from convert")
        self.engine, self.data = engine, data and match_classes(engine.info, data)
        self._cores_each, self._deadline_s = cores_each, deadline_s
        what = f"{count} replicas" if count > 1 else "a replica"
        print(f"starting Ray and {what}", file=message_stream())
        begin = now()
        self._ray = connect(ray_address)
        self.ray_start_s, begin = now() - begin, now()
        self._job = self._ray.get_runtime_context().get_job_id()
        try:
            recipe = self._ray.put(engine.recipe)
        except self._ray.exceptions.RayError as error:
            raise VitdemoError(f"replicas: Ray has no room for the model ({reason_of(error)})") from None
        self._recipe = [recipe]  # Ray fetches arguments, but not those in a list; only a replica that builds fetches it
        self.slots = [ReplicaState(*each) for each in enumerate(place_replicas(self._ray, count, engine.device, share))]
        self._failed: Counter[range | int] = Counter()  # failures by range, and successive failures by replica number
        try:
            for slot in self.slots:
                self._start(slot)
            while not all(slot.ready for slot in self.slots):
                self._attend(None)
        except BaseException:
            self.close()
            raise
        self.start_s = now() - begin

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """End the replicas. Ray itself keeps running for later ones, until ``stop_ray`` or the end of the process."""
        self._end(self.slots)

    @property
    def pids(self) -> list[int]:
        """The ids of the replicas' processes on their machines."""
        return [slot.pid for slot in self.slots]

    @property
    def threads(self) -> int:
        """The CPU threads that a call of the largest replica uses."""
        return max(slot.threads for slot in self.slots)

    @property
    def cores(self) -> int:
        """The number of CPU cores of all replicas together."""
        return len({(slot.host, core) for slot in self.slots for core in slot.cores})

    def __str__(self) -> str:
        hosts = {slot.host for slot in self.slots}
        where = "this machine" if hosts == {socket.gethostname()} else f"{len(hosts)} machines"
        shared = ", which they share" if self.cores < len(self.slots) else ""
        return f"replicas: {len(self.slots)} on {self.cores} cores of {where}{shared}"

    def summary(self, schedule: str, wall_s: float) -> dict:
        """The work of each replica in the last run.

        Args:
            schedule: the name of the schedule.
            wall_s: the seconds of the run.

        Returns:
            ``count``, ``schedule``; ``lost``: the number of replicas that died or hung and were replaced; ``losses``:
            for each of them its number, the second of the run, and how many images it had, which were done again;
            ``ray_start_s``, ``start_s``: the seconds to start Ray and the replicas, which no rate includes;
            ``each``: one record per replica, see ``ReplicaState.record``.
        """
        began = now() - wall_s
        losses = [(slot.number, at - began, images) for slot in self.slots for at, images in slot.losses]
        own = {"lost": len(losses), "losses": losses, "ray_start_s": self.ray_start_s, "start_s": self.start_s}
        each = [slot.record(wall_s) for slot in self.slots]
        return {"count": len(each), "schedule": schedule, **own, "each": each}

    def run(self, images: int, schedule: Schedule, **how: Any) -> Iterator[Shard]:
        """Yield the rows of every image exactly once, one shard per range, in the order in which they return.

        Args:
            images: the number of images in ``schedule``.
            schedule: the schedule, which decides which replica computes which range.
            how: the further arguments of ``Replica.run``.

        Raises:
            EngineFailure: when an engine breaks.
            VitdemoError: when replicas are lost again and again.
        """
        self._check_ray()
        self._failed.clear()
        for slot in self.slots:
            slot.images, slot.ranges, slot.busy_s, slot.losses = 0, 0, 0.0, []
            if slot.actor is None:
                self._start(slot)
        left = images
        try:
            while left:
                for slot in filter(lambda slot: slot.ready, self.slots):
                    self._hand_out(slot, schedule, how)
                for shard in self._attend(schedule):
                    schedule.done(shard.indices)
                    left -= len(shard.indices)
                    yield shard
        finally:
            # After an early stop, end the replicas that still work, and those that are not ready and may never be.
            stopped = left > 0
            self._end([s for s in self.slots if any(task.indices for task in s.tasks) or stopped and not s.ready])

    def _check_ray(self) -> None:
        if not self._ray.is_initialized() or self._ray.get_runtime_context().get_job_id() != self._job:
            raise VitdemoError("replicas: the Ray that they were started on was stopped; start others")

    def step(self, device_batch_size: int) -> float:
        """Time one batch of random pixels on every replica; all batches are handed out at once.

        Args:
            device_batch_size: images per batch.

        Returns:
            The seconds until the last batch is done.

        Raises:
            VitdemoError: when a replica is lost.
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

    def _hand_out(self, slot: ReplicaState, schedule: Schedule, how: dict) -> None:
        while len(slot.tasks) < schedule.ahead and (indices := schedule.take(slot.number, slot.images_per_s)):
            slot.tasks.append(Task(slot.actor.run.remote(slot.number, indices, **how), indices))

    def _attend(self, schedule: Schedule | None) -> list[Shard]:
        """Wait until a task is done or too late, and react to it; return the shards that were returned."""
        heads = {slot.tasks[0].reference: slot for slot in self.slots if slot.tasks}
        self._ray.wait(list(heads), timeout=min(1.0, self._deadline_s / 4))  # for one task; below, all that are done
        happened, _ = self._ray.wait(list(heads), num_returns=len(heads), timeout=0)
        shards = [shard for reference in happened if (shard := self._collect(heads[reference], schedule))]
        for slot in filter(lambda slot: slot.tasks, self.slots):
            if now() - slot.tasks[0].began > (patience := self._patience_s(slot)):
                if slot.place is None:
                    wrong = f"Ray gave it no process in {patience:.0f} s"
                    raise VitdemoError(f"replica {slot.number}: {wrong}; `ray status` says who has the CPUs and GPUs")
                self._replace(slot, schedule, f"did not answer for {patience:.0f} s, see deadline_s")
        return shards

    def _patience_s(self, slot: ReplicaState) -> float:
        """The seconds that the slot's first task may take."""
        if slot.place is None:
            return max(PLACED_S, 10.0 * len(self.slots))
        if slot.ready and slot.images_per_s:
            return max(self._deadline_s, SLOWER * len(slot.tasks[0].indices) / slot.images_per_s)
        return self._deadline_s * (1 if slot.ready else PREPARING)

    def _collect(self, slot: ReplicaState, schedule: Schedule | None) -> Shard | None:
        """Take the result of a slot's first task; return it if it is a shard."""
        try:
            answer = self._ray.get(slot.tasks[0].reference)
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
        if isinstance(answer, Shard):
            slot.brought_back(answer)
            self._failed[slot.number] = 0
            return answer
        if isinstance(answer, Place):
            self._place(slot, answer)
        else:
            (slot.threads, slot.precision_ran), slot.ready = answer, True
        return None

    def _start(self, slot: ReplicaState) -> None:
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        share = slot.share
        where = NodeAffinitySchedulingStrategy(share.node, soft=True)  # another node where this one is gone
        options = dict(num_cpus=share.cpus, num_gpus=share.gpus, scheduling_strategy=where)
        slot.actor = self._ray.remote(Replica).options(**options).remote(share.number, share.count, self._cores_each)
        slot.tasks.append(Task(slot.actor.place.remote(), None))
        ready = slot.actor.prepare.remote(self.engine.recipe.ticket(), self._recipe, self.data and self.data.address)
        slot.tasks.append(Task(ready, None))

    def _place(self, slot: ReplicaState, place: Place) -> None:
        """Note the place of a replica that has got its process. Raises VitdemoError for other versions there."""
        if different := [name for name, version in installed().items() if place.installed.get(name) != version]:
            raise VitdemoError(f"replica on {place.host}: has another {', '.join(different)}; install the same")
        slot.place, slot.host, slot.cores = place, place.host, place.cores
        if place.node == self._ray.get_runtime_context().get_node_id():
            with suppress(psutil.NoSuchProcess):
                slot.process = psutil.Process(place.pid)

    def _replace(self, slot: ReplicaState, schedule: Schedule | None, reason: str) -> None:
        """End a slot's replica, give its ranges back to the schedule, and start a successor."""
        first = slot.tasks[0].indices
        self._failed.update({first or slot.number, slot.number})
        slot.losses.append((now(), sum(len(task.indices) for task in slot.tasks if task.indices)))
        if max(self._failed[first], self._failed[slot.number]) >= ATTEMPTS:
            what = f"doing images {first.start} to {first.stop - 1}" if first else "starting"
            raise VitdemoError(f"replica {slot.number} was lost {ATTEMPTS} times, last while {what}: {reason}")
        for task in slot.tasks:
            if task.indices is not None:
                schedule.give_back(task.indices, slot.number)
        tqdm.write(f"replica {slot.number} was lost ({reason}); a successor is starting", file=message_stream())
        self._end([slot])
        self._start(slot)

    def _end(self, slots: list[ReplicaState]) -> None:
        """End the replicas of these slots, and wait for the end of those on this machine."""
        processes = [slot.process for slot in slots if slot.process]
        for slot in slots:
            if slot.actor is not None and self._ray.is_initialized():
                self._ray.kill(slot.actor)
            slot.actor, slot.place, slot.process, slot.ready = None, None, None, False
            slot.tasks.clear()
        for stuck in psutil.wait_procs(processes, timeout=GOING_S)[1]:  # a suspended process does not react to Ray
            with suppress(psutil.NoSuchProcess):
                stuck.kill()
